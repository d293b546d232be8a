"""Where records come from: JSON lists, Parquet files and data sets; lines are tested with the tasks."""

import gzip
import json
from pathlib import Path

import pytest

from turnwise.errors import InputError
from turnwise.records import hub_parts, read_rows
from turnwise.tasks import load_tasks

ROWS = [{"id": f"q{i}", "question": f"What is {i}?", "answers": [str(i)], "level": i} for i in range(5)]


def error_of(source: object) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(str(source)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what the library stores of a folder out of the home folder, and the network out of the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


# ------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_a_container_and_lines_in_a_json_file_are_records(tmp_path: Path, indent: int | None):
    path = tmp_path / "t.json"
    for value in (ROWS, {"data": ROWS}, {"Data": ROWS, "Version": 1.0}):
        path.write_text(json.dumps(value, indent=indent))
        assert list(read_rows(path)) == [(f"{path}: item {i}", row) for i, row in enumerate(ROWS, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(read_rows(path)) == [(f"{path}:{i}", row) for i, row in enumerate(ROWS, 1)]
    path.write_text(json.dumps(ROWS[0], indent=indent))
    assert [row for _, row in read_rows(path)] == ROWS[:1]


def test_a_compressed_json_list_is_read(tmp_path: Path):
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert [task.id for task in load_tasks(path)] == ["q0", "q1", "q2", "q3", "q4"]


def test_json_that_holds_no_records_is_named(tmp_path: Path):
    path = tmp_path / "t.json"
    for text, expected in (
        ("", "must hold JSON; it is empty"),
        ("[1", "must hold JSON; got"),
        ("[]", "must hold a list of JSON objects; got []"),
        ("[{}, 2]", "t.json: item 2 must be a JSON object; got 2"),
        ('{"a": 1}\n[2]', "t.json:2: each line must be one JSON object; got [2]"),
    ):
        path.write_text(text)
        assert expected in error_of(path)


# --------------------------------------------------------------------- Parquet and data sets


def test_a_parquet_file_is_read_row_by_row(tmp_path: Path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    tasks = load_tasks(path)
    assert [(task.id, task.answers, task.metadata) for task in tasks[:2]] == [
        ("q0", ("0",), {"level": 0}),
        ("q1", ("1",), {"level": 1}),
    ]
    parquet.write_table(arrow.Table.from_pylist([*ROWS, {**ROWS[0], "answers": None}]), path)
    with pytest.raises(InputError, match=r"t\.parquet: row 6: field 'answers' must be a string or a list"):
        load_tasks(path)
    path.write_bytes(b"PAR1 and no more")
    assert "t.parquet must be a Parquet file; got" in error_of(path)
    assert "there is none" in error_of(tmp_path / "nowhere.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS).slice(0, 0), path)
    assert "must hold rows" in error_of(path)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf:squad", ("squad", None, None)),
        ("hf:owner/squad:validation", ("owner/squad", None, "validation")),
        ("hf:owner/trivia_qa:rc.nocontext", ("owner/trivia_qa", "rc.nocontext", None)),
        ("hf:owner/trivia_qa:rc:train[:100]", ("owner/trivia_qa", "rc", "train[:100]")),
        ("hf:gsm8k:train[5%:10%]", ("gsm8k", None, "train[5%:10%]")),
        ("hf:x::dev_distractor", ("x", None, "dev_distractor")),
    ],
)
def test_a_data_sets_name_has_up_to_three_parts(source: str, parts: tuple):
    assert hub_parts(source) == parts


@pytest.mark.parametrize("source", ["hf:", "hf::train", "hf:a:b:c:d"])
def test_a_name_with_more_parts_or_none_is_refused(source: str):
    assert "a data set must be hf:NAME[:CONFIG][:SPLIT]" in error_of(source)


@pytest.mark.usefixtures("cache")
def test_a_saved_data_set_gives_the_split_that_is_named_or_wanted(tmp_path: Path):
    import datasets

    datasets.disable_progress_bars()
    parts = {"train": datasets.Dataset.from_list(ROWS[:3]), "validation": datasets.Dataset.from_list(ROWS[3:])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    parts["train"].save_to_disk(str(tmp_path / "one"))
    source = f"hf:{tmp_path / 'both'}"
    assert [task.id for task in load_tasks(source)] == ["q0", "q1", "q2"]
    assert [task.id for task in load_tasks(source, split="validation")] == ["q3", "q4"]
    assert [task.id for task in load_tasks(f"{source}:validation")] == ["q3", "q4"]
    assert [task.id for task in load_tasks(f"hf:{tmp_path / 'one'}", split="validation")] == ["q0", "q1", "q2"]
    assert f"the split of {source}:dev must be one of train, validation; got dev" in error_of(f"{source}:dev")


@pytest.mark.usefixtures("cache")
def test_a_folder_of_files_is_a_data_set_with_slices(tmp_path: Path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [task.id for task in load_tasks(f"hf:{folder}")] == ["q0", "q1", "q2", "q3", "q4"]
    assert [task.id for task in load_tasks(f"hf:{folder}:train[1:3]")] == ["q1", "q2"]


@pytest.mark.usefixtures("cache")
def test_a_data_set_that_cannot_be_fetched_is_a_one_line_error(tmp_path: Path):
    text = error_of(f"hf:{tmp_path / 'nothing'}")
    assert "must name a folder with data, or a data set that can be fetched; got" in text
    assert "give a local folder (hf:path/to/folder)" in text


@pytest.mark.parametrize(("source", "module"), [("t.parquet", "pyarrow"), ("hf:squad", "datasets")])
def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, source: str, module: str):
    import importlib

    def missing(name: str, *_: object) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert f'must have {module} to read it; install it: pip install "turnwise[data]"' in error_of(source)
