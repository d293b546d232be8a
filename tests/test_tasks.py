import gzip
import json
from pathlib import Path

import pytest

from turnwise.errors import InputError
from turnwise.tasks import check_answers_in_corpus, load_tasks, task_line
from turnwise.types import Task

DATA = Path(__file__).parents[2] / "shared/data"
KENYA = {"id": "q1", "question": "What is the capital of Kenya?", "answers": ["Nairobi"]}


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_tasks(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_but_the_known_ones_becomes_metadata(tmp_path):
    path = written(tmp_path / "t.jsonl", {**KENYA, "kind": "capital", "level": 3, "tags": ["a"]})
    assert load_tasks(path) == [
        Task(
            id="q1",
            question="What is the capital of Kenya?",
            answers=("Nairobi",),
            kind="capital",
            metadata={"level": 3, "tags": ["a"]},
        )
    ]


def test_an_answer_may_be_one_string_and_be_called_answer(tmp_path):
    one = {"id": 7, "question": "Which country is Nairobi in?", "answers": "Kenya"}
    other = {"id": "8", "question": "Which city?", "answer": "Nairobi"}
    tasks = load_tasks(written(tmp_path / "t.jsonl", one, other))
    assert [(t.id, t.answers) for t in tasks] == [("7", ("Kenya",)), ("8", ("Nairobi",))]


def test_a_task_that_is_written_as_a_line_is_read_back_equal(tmp_path):
    task = Task(id="é", question="a\nb?", answers=("x", "y"), kind="k", metadata={"n": [1, None]})
    path = tmp_path / "t.jsonl"
    path.write_text(task_line(task) + "\n", encoding="utf-8")
    assert load_tasks(path) == [task]


def test_compressed_files_byte_order_marks_and_blank_lines_are_read(tmp_path):
    line = json.dumps(KENYA)
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(f"\ufeff{line}\n\n  \n".encode()))
    assert [task.id for task in load_tasks(path)] == ["q1"]


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"id": ""}, "'id'", "a string that is not blank"),
        ({"id": True}, "'id'", "a string that is not blank"),
        ({"question": 3}, "'question'", "a string that is not blank; got 3"),
        ({"question": None}, "'question'", "got null"),
        ({"answers": []}, "'answers'", "a list of at least one"),
        ({"answers": ["Nairobi", " "]}, "'answers'", "none blank"),
        ({"answers": ""}, "'answers'", "none blank"),
        ({"answers": {"a": 1}}, "'answers'", "a string or a list"),
        ({"kind": 1}, "'kind'", "a string; got 1"),
    ],
)
def test_a_bad_field_is_named_with_file_line_and_what_was_expected(tmp_path, changes, field, expected):
    path = written(tmp_path / "t.jsonl", KENYA, {**KENYA, "id": "q2", **changes})
    text = error_of(path)
    assert text.startswith(f"{path}:2: field {field}")
    assert expected in text


def test_a_missing_field_is_told_from_a_bad_one(tmp_path):
    path = written(tmp_path / "t.jsonl", {"id": "q", "question": "Why?"})
    text = error_of(path)
    assert "t.jsonl:1: field 'answers'" in text
    assert "missing among the fields" in text


def test_a_line_that_is_no_json_object_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(KENYA) + '\n\n{"id": "q2", \n')
    assert error_of(path).startswith(f"{path}:3: each line must be one JSON object")
    path.write_text("[1, 2]\n")
    assert error_of(path).startswith(f"{path}:1: each line must be one JSON object; got [1, 2]")


def test_an_id_that_comes_twice_names_both_lines(tmp_path):
    path = written(tmp_path / "t.jsonl", KENYA, {**KENYA, "id": "q2"}, KENYA)
    text = error_of(path)
    assert text.startswith(f"{path}:3: field 'id' must be unique; got 'q1'")
    assert f"{path}:1 has too" in text


def test_files_that_are_missing_empty_cut_off_or_no_text_are_one_line_errors(tmp_path):
    assert "there is none" in error_of(tmp_path / "nowhere.jsonl")
    assert "directory" in error_of(tmp_path).lower()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    assert "it is empty" in error_of(empty)
    whole = gzip.compress("".join(f"{json.dumps({**KENYA, 'id': i})}\n" for i in range(999)).encode())
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "must be a whole gzip file" in error_of(cut)
    cut.write_bytes(b"plain text")
    assert "must be a whole gzip file" in error_of(cut)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"id": "é"}'.encode("latin-1"))
    assert f"{latin}:1: the text must be UTF-8; got byte 0xe9" in error_of(latin)


def test_the_share_of_answerable_tasks_counts_whole_words_of_any_alias_in_any_case():
    tasks = [
        Task(id="1", question="?", answers=("Ville Lumière", "PARIS")),  # in the first text
        Task(id="2", question="?", answers=("New York",)),  # in the second, across a line end
        Task(id="3", question="?", answers=("Nair",)),  # only as a part of Nairobi: no
        Task(id="4", question="?", answers=("?!",)),  # no word at all: no
        Task(id="5", question="?", answers=("not Pari",)),  # its last word only in part: no
    ]
    texts = ["Nairobi is not Paris.", "From new\nyork, with love.", "New things in York."]
    assert check_answers_in_corpus(tasks, texts) == 2 / 5


def test_one_answer_counts_for_every_task_that_has_it():
    tasks = [Task(id=str(i), question="?", answers=("Oslo",)) for i in range(3)]
    assert check_answers_in_corpus(tasks, iter(["Oslo", "unread"])) == 1.0


def test_a_corpus_without_any_answer_is_refused():
    tasks = [Task(id="1", question="?", answers=("Oslo",))]
    with pytest.raises(InputError, match="it holds none of 1 tasks, such as 'Oslo'"):
        check_answers_in_corpus(tasks, ["Nairobi"])
    with pytest.raises(InputError, match="at least one"):
        check_answers_in_corpus([], ["Nairobi"])


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
def test_the_real_trivia_questions_load():
    tasks = load_tasks(DATA / "trivia/validation.jsonl")
    assert len(tasks) == 800
    assert tasks[0].id == "triviaqa-5800"
    assert "Imaging" in tasks[0].answers
