"""Files from a stranger: none runs code, leads out of its folder, or takes memory and time without bound."""

import collections
import gzip
import json
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from report_runs import write_run
from turnwise import records, rendering
from turnwise.chat import load_chat
from turnwise.config import TrainConfig
from turnwise.errors import TurnwiseError
from turnwise.evaluation import run_config, run_policy
from turnwise.lora import add_lora
from turnwise.policy import load_policy, save_policy
from turnwise.records import read_lines, read_rows
from turnwise.report import load_run, write_report
from turnwise.rundir import (
    append_lines,
    chosen_checkpoint,
    create_run,
    cut_lines,
    drop_after,
    latest_checkpoint,
    read_config,
    save_best,
    save_checkpoint,
    write_atomically,
)
from turnwise.search import SearchIndex
from turnwise.search.corpus import Article
from turnwise.tasks import load_tasks
from turnwise.templates import Template, read_template
from turnwise.traces import read_traces, traces_table
from turnwise.trackers import _saved_id
from turnwise.training import resumed_config

STATE = {"best": 0.5, "wall_s": 1.0, "validation": {}}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a stranger's code would write."""
    return tmp_path / "marker"


class Program:
    """An object whose pickle runs a command where it is read."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def pickled(marker: Path, file: Path, *, plain: bool = False) -> None:
    if plain:
        file.write_bytes(pickle.dumps(Program(marker)))
    else:
        torch.save({"lm_head.weight": Program(marker)}, file)


def test_the_pickle_of_these_tests_is_really_malicious(marker: Path, tmp_path: Path):
    pickled(marker, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert marker.exists()


def changed(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(call: Callable[[], Any], match: str = "") -> None:
    with pytest.raises(TurnwiseError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def read_or_refused(call: Callable[[], Any]) -> bool:
    """Whether a call says nothing against a file; where it raises, the error is ours and one line."""
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            call()
    except TurnwiseError as error:
        said = str(error)
    else:
        return not warned
    assert "\n" not in said
    assert len(said) < 2000
    return False


# --- models -----------------------------------------------------------------------------------------


def bin_alone(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    pickled(marker, folder / "pytorch_model.bin")


def plain_bin_alone(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    pickled(marker, folder / "pytorch_model.bin", plain=True)


def listed_bin(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    pickled(marker, folder / "evil.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "evil.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def listed_elsewhere(folder: Path, marker: Path) -> None:
    listed_bin(folder, marker)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def named_bin(folder: Path, marker: Path) -> None:
    pickled(marker, folder / "adapter_model.bin")
    changed(folder / "config.json", transformers_weights="adapter_model.bin")


def named_index(folder: Path, marker: Path) -> None:
    listed_bin(folder, marker)
    (folder / "sub").mkdir()
    (folder / "model.safetensors.index.json").rename(folder / "sub" / "x.safetensors.index.json")
    changed(folder / "config.json", transformers_weights="sub/x.safetensors.index.json")


def kernel(folder: Path, marker: Path) -> None:
    changed(folder / "config.json", attn_implementation="stranger/kernel")


def kernels_of_experts(folder: Path, marker: Path) -> None:
    changed(folder / "config.json", _experts_implementation="stranger/kernel")


def own_model(folder: Path, marker: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    changed(folder / "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"})


def own_tokenizer(folder: Path, marker: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("malice", "says"),
    [
        (bin_alone, "whole model in safetensors"),
        (plain_bin_alone, "whole model in safetensors"),
        (listed_bin, r"lists 'evil\.bin'"),
        (listed_elsewhere, r"lists '\.\./\.\./x\.safetensors'"),
        (named_bin, r"transformers_weights = 'adapter_model\.bin'"),
        (named_index, "transformers_weights"),
        (kernel, "attn_implementation = 'stranger/kernel'"),
        (kernels_of_experts, "_experts_implementation = 'stranger/kernel'"),
        (own_model, "code of its own, which is not run"),
        (own_tokenizer, "or what transformers makes a tokenizer of"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_runs_nothing(
    malice: Callable, says: str, checkpoint: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    malice(folder, marker)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked whether to run it"))
    refused(lambda: load_policy(folder), says)
    assert not marker.exists()


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    policy = load_policy(checkpoint)
    add_lora(policy.model, rank=2, alpha=2, targets=(), seed=0, base=str(checkpoint))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_policy(policy, folder)
    return folder


def test_an_adapter_runs_nothing(adapter: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load_policy(adapter)
    (tmp_path / "imported_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    changed(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="imported_evil")
    refused(lambda: load_policy(adapter), "a module to import, in megatron_config")
    changed(adapter / "adapter_config.json", megatron_config=None)
    (adapter / "adapter_model.safetensors").unlink()
    pickled(marker, adapter / "adapter_model.bin")
    refused(lambda: load_policy(adapter), r"has no adapter_model\.safetensors")
    assert not marker.exists()


# --- chat templates ---------------------------------------------------------------------------------

DOUBLING = "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
UNBOUNDED = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{{ 7 ** (10 ** 9) }}",
    "{{ 'x' * 10 ** 11 }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ 'x' | center(10 ** 11) }}",
    "{{ ('x' * 999999).replace('x', 'y' * 999999) }}",
    "{{ 'x' * 17000000 }}",
    "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "x" * 1_000_001,
    DOUBLING,
]


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no such bounds")
@pytest.mark.parametrize("source", UNBOUNDED, ids=[f"{k}" for k in range(len(UNBOUNDED))])
def test_a_template_without_bound_is_one_line(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    refused(lambda: Template(source=source).render([{"role": "user", "content": "a"}]), "the chat template must")
    assert Template(source="{{ messages[0].content }}").render([{"role": "user", "content": "a"}]) == "a"


@pytest.mark.parametrize(
    "call", ["cycler.__init__.__globals__.os.system", "lipsum.__globals__['os'].system", "''.__class__.__mro__"]
)
def test_a_template_reaches_nothing(call: str, marker: Path, checkpoint: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(f"{{{{ {call}('touch {marker}') }}}}")
    refused(lambda: load_chat(folder), "unsafe")
    assert not marker.exists()


def test_a_template_that_never_ends_is_not_waited_for_where_it_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    (tmp_path / "chat_template.jinja").write_text("{{ 7 ** (7 ** 12) }}")  # constants are computed at once
    refused(lambda: read_template(tmp_path), "must be Jinja2")
    (tmp_path / "chat_template.jinja").write_text("{{ 7 ** 2 }}")
    assert read_template(tmp_path)


# --- links ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Path:
    """A run of two checkpoints, a best policy, metrics and rollouts."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", estimator="mt-grpo", seed=0, steps=4)
    metrics, rollouts = ((folder / name).read_bytes() for name in ("metrics.jsonl", "rollouts.jsonl"))
    shutil.rmtree(folder)
    create_run(folder, TrainConfig(out=folder))
    (folder / "metrics.jsonl").write_bytes(metrics)
    (folder / "rollouts.jsonl").write_bytes(rollouts)
    optimizer = torch.optim.AdamW(tiny.model.parameters())
    for step in (1, 2):
        save_checkpoint(folder, step, tiny, optimizer, STATE)
    save_best(folder, tiny)
    return folder


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole_run, tmp_path / "run")


def opened(run: Path) -> None:
    """Everything that reads a run finds what is in it."""
    assert load_run(run).rollouts
    assert run_config(run).estimator == resumed_config(TrainConfig(out=run)).estimator == "mt-grpo"
    assert run_policy(run)[0].context == run_policy(run, "last")[0].context


LINKED = [
    "wandb",
    "best",
    "checkpoints",
    "checkpoints/step-000002",
    "checkpoints/.step-000003.partial",
    ".best.partial",
    ".config.json.partial",
    "metrics.jsonl",
    "rollouts.jsonl",
    "best/merges.txt",
    "config.json",
    "eval-x.json",
    "report.html",
]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_a_run_is_refused_before_anything_is_read_or_written(run: Path, name: str, tmp_path: Path):
    place, outside = run / name, tmp_path / "outside"
    if place.exists():
        shutil.move(place, outside)
    else:
        outside.write_text("the user's own")
    place.symlink_to(outside)
    before = sorted(tmp_path.rglob("*"))
    for read in (load_run, run_config, run_policy, read_config, lambda path: resumed_config(TrainConfig(out=path))):
        refused(lambda read=read: read(run), f"must hold files of its own alone; {name} is a link to .*outside; remove")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_within_a_run_to_a_run_or_of_a_tracker_is_let_be(run: Path, tmp_path: Path):
    (run / "latest").symlink_to("checkpoints/step-000002")
    (run / "wandb" / "logs").mkdir(parents=True)
    (run / "wandb" / "logs" / "debug-core.log").symlink_to(tmp_path / "its own log")
    (tmp_path / "named").symlink_to(run)
    opened(tmp_path / "named")
    assert (run / "latest").is_symlink()


def test_a_link_that_the_user_trusts_is_followed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.move(run / "checkpoints", tmp_path / "large disk")
    (run / "checkpoints").symlink_to(tmp_path / "large disk")
    refused(lambda: load_run(run), "checkpoints is a link")
    monkeypatch.setenv("TURNWISE_TRUST", "1")
    opened(run)
    assert (run / "checkpoints").is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
@pytest.mark.parametrize("name", ["rollouts.jsonl", "best/vocab.json"])
def test_a_pipe_in_a_run_is_not_waited_for(run: Path, name: str):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for read in (load_run, run_config, run_policy):
        refused(lambda read=read: read(run), "is a pipe or a device")
    assert (run / name).is_fifo()


def test_removing_and_replacing_never_reach_through_a_link(run: Path, tiny: Any, tmp_path: Path):
    """Also where a link came after the run was checked."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("the user's own")
    optimizer = torch.optim.AdamW(tiny.model.parameters())
    for name in ("checkpoints/step-000000", "checkpoints/step-000009", "checkpoints/.step-000001.old", ".best.old"):
        (run / name).symlink_to(outside)
    (run / ".metrics.jsonl.partial").symlink_to(outside / "kept")
    (run / "checkpoints" / ".step-000003.partial").symlink_to(outside)
    for act in (
        lambda: save_checkpoint(run, 3, tiny, optimizer, STATE),
        lambda: save_best(run, tiny),
        lambda: drop_after(run, 2),
        lambda: cut_lines(run / "metrics.jsonl", after_step=1),
        lambda: write_atomically(run / "metrics.jsonl", "x"),
    ):
        read_or_refused(act)
    assert [(file.name, file.read_text()) for file in outside.iterdir()] == [("kept", "the user's own")]


# --- damage -----------------------------------------------------------------------------------------

DEEP, DIGITS = "[" * 200_000, "9" * 10_000
CONTENTS = [
    b"",
    b"\xff\xfe\x00",
    b"null",
    b"[]",
    b'{"format": 1}',
    DEEP.encode(),
    ('{"a":' * 200_000).encode(),
    ("[" * 900 + "]" * 900).encode(),
    f'{{"step": {DIGITS}}}'.encode(),
    b'{"step": 1e999, "split": "train", "metrics": {"a": NaN}}',
    b'{"step": NaN, "rollout": {}, "format": NaN}',
    b'{"step": 1, "split": "train", "metrics": {"a": -1e999, "b": 1' + b"0" * 4000 + b"}}",
    b'{"step": 1, "split": "train", "metrics": {}, "rollout": 1' + b"0" * 400 + b"}",
]
FILES = [
    "config.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "eval-x.json",
    "record.json",
    "checkpoints/step-000002/state.json",
    "checkpoints/step-000002/SHA256SUMS",
    "best/SHA256SUMS",
    "best/config.json",
]


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_run_are_one_line_each(run: Path, name: str, tmp_path: Path):
    if name == "best/config.json":
        reads = [lambda: run_policy(run)]
    elif "/" in name:
        reads = [lambda: chosen_checkpoint(run, best=True), lambda: latest_checkpoint(run)]
    else:
        reads = [
            lambda: write_report([load_run(run)], tmp_path / "report.html"),
            lambda: resumed_config(TrainConfig(out=run)),
            lambda: traces_table(read_traces(run / "rollouts.jsonl")),
            lambda: cut_lines(run / "metrics.jsonl", after_step=9),
        ]
    taken = []
    for content in CONTENTS:
        for read in reads:
            (run / name).write_bytes(content + b"\n")
            taken.append(read_or_refused(read))
    assert len(taken) == len(CONTENTS) * len(reads)
    assert not all(taken), "none of it was found damaged"


def test_a_damaged_id_of_a_tracker_begins_a_new_run_there(run: Path):
    (run / "tracker.json").write_text('{"id": "abc"}')
    assert _saved_id(run / "tracker.json") == "abc"
    for content in CONTENTS:
        (run / "tracker.json").write_bytes(content)
        assert _saved_id(run / "tracker.json") is None


def hostile_numbers() -> list[str]:
    return ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "1" + "0" * 4000, DIGITS, "[" * 900 + "]" * 900]


def places(value: Any) -> list[list[Any]]:
    """The ways to each value in a JSON value, the first of each list alone."""
    if isinstance(value, dict):
        return [[]] + [[name, *way] for name in value for way in places(value[name])]
    if isinstance(value, list):
        return [[]] + ([[0, *way] for way in places(value[0])] if value else [])
    return [[]]


def test_a_rollout_with_any_value_replaced_is_read_or_refused(run: Path):
    line = (run / "rollouts.jsonl").read_text().splitlines()[0]
    taken = []
    for way in places(json.loads(line)):
        for number in hostile_numbers():
            record = json.loads(line)
            if not way:
                continue
            inner = record
            for step in way[:-1]:
                inner = inner[step]
            inner[way[-1]] = "HERE"
            (run / "rollouts.jsonl").write_text(json.dumps(record).replace('"HERE"', number) + "\n" + line + "\n")
            taken.append(read_or_refused(lambda: load_run(run)))
            taken.append(read_or_refused(lambda: traces_table(read_traces(run / "rollouts.jsonl"))))
    assert len(taken) > 100
    assert not all(taken), "no value was refused"


# --- size -------------------------------------------------------------------------------------------


def test_a_line_without_end_is_not_read(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records.bounded_lines, "__defaults__", (100_000,))
    monkeypatch.setattr(records.read_lines, "__kwdefaults__", {"longest": 100_000})
    append_lines(run / "rollouts.jsonl", [{"x": "x" * 100_000}])
    refused(lambda: load_run(run), r"rollouts\.jsonl:\d+ must be a line of at most 100000 bytes")
    refused(lambda: read_traces(run / "rollouts.jsonl"), "must be a line of at most 100000 bytes")
    (tmp_path / "tasks.jsonl").write_text('{"id": "a", "question": "' + "x" * 100_000)
    refused(lambda: load_tasks(tmp_path / "tasks.jsonl"), "must be a line of at most 100000 bytes")
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"id": "a", "question": "x" * 99_000, "answers": ["x"]}))
    assert [len(task.question) for task in load_tasks(tmp_path / "tasks.jsonl")] == [99_000]


@pytest.mark.parametrize("content", [b"\0", b"\n", b'{"id": 1}\n'])
def test_a_compressed_file_that_unpacks_to_far_more_than_text_does_is_left(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(records, "UNPACKED_FREELY", 100_000)
    file = tmp_path / "bomb.jsonl.gz"
    with gzip.open(file, "wb") as packed:
        for _ in range(4):
            packed.write(content * (1_000_000 // len(content)))
    monkeypatch.setattr(records.read_lines, "__kwdefaults__", {"longest": 10_000_000})
    lines = read_lines(file)
    refused(lambda: collections.deque(lines, maxlen=0), "unpacks to more than 200 times its size|at most 10000000")
    good = tmp_path / "good.json.gz"
    good.write_bytes(gzip.compress(json.dumps([{"id": str(k), "text": "word " * k} for k in range(300)]).encode()))
    assert len([*read_rows(good)]) == 300


# --- search indexes ---------------------------------------------------------------------------------


def test_a_damaged_index_is_one_line_or_answers(tmp_path: Path):
    folder = tmp_path / "index"
    SearchIndex.build([Article(id="1", title="Kenya", text="The capital is Nairobi.")], folder)
    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def put(name: str, content: bytes) -> None:
        (folder / name).unlink()  # a new file: tantivy may still map the old one, and a map of less file is a bus error
        (folder / name).write_bytes(content)

    for name in whole:
        for content in (*CONTENTS, whole[name].replace(b"1", b"../../../1"), whole[name][: len(whole[name]) // 2]):
            put(name, content)
            read_or_refused(lambda: SearchIndex.open(folder).search("Kenya", 1))
        put(name, whole[name])
    assert SearchIndex.open(folder).search("Kenya", 1)[0].id == "1"
