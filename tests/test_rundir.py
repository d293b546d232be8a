"""The run directory: whole files or none, damage is noticed, and failed writes are one line."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import turnwise
from turnwise.config import TrainConfig
from turnwise.errors import RunError
from turnwise.policy import load_policy, tiny_policy
from turnwise.rundir import (
    FORMAT,
    KEPT_CHECKPOINTS,
    append_lines,
    checkpoint_folder,
    create_run,
    cut_lines,
    latest_checkpoint,
    load_optimizer,
    read_config,
    save_best,
    save_checkpoint,
    write_atomically,
    write_config,
)


@contextmanager
def files_of_at_most(size: int):
    """Within, the system refuses to let any file grow beyond `size` bytes: a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------- configuration


def test_a_new_run_holds_its_configuration_with_format_and_version(tmp_path):
    config = TrainConfig(out=tmp_path / "a/b", steps=7, reward_weights={"exact_match": 1.0})
    create_run(config.out, config)
    record = json.loads((config.out / "config.json").read_text())
    assert (record["format"], record["turnwise"]) == (FORMAT, turnwise.__version__)
    assert read_config(config.out) == config
    assert [file.name for file in config.out.iterdir()] == ["config.json"]


def test_a_directory_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="must name a new or empty directory") as caught:
        create_run(tmp_path, TrainConfig())
    assert "--resume" in one_line(caught)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="must be writable") as caught:
            create_run(out, TrainConfig())
        assert str(out) in one_line(caught)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1}', '{"format": 1, "config": []}'])
def test_a_configuration_that_is_none_is_refused(tmp_path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match="must be a run directory") as caught:
        read_config(tmp_path)
    one_line(caught)


def test_a_run_of_another_format_names_the_version_that_wrote_it(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 99, "turnwise": "7.0", "config": {}}')
    with pytest.raises(RunError, match=r"must have format 1; got 99; .*\(7\.0\)"):
        read_config(tmp_path)


# --------------------------------------------------------------------------------- text files


def records(file: Path) -> list[dict]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, "old")
    with files_of_at_most(10), pytest.raises(RunError, match=r"writing .*a\.json failed") as caught:
        write_atomically(file, "new" * 1000)
    one_line(caught)
    assert file.read_text() == "old"
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_one_line_and_keeps_what_was_written(tmp_path):
    with pytest.raises(RunError, match="writing /dev/full failed: No space left on device") as caught:
        append_lines(Path("/dev/full"), [{"step": 1}])
    assert "kept" in one_line(caught)


STRANGE = ["a b\x85c", "\u2028\u2029", "\ud800", "\x0b\x0c\x1c", "é\n\r\t", "Nairobi"]


def test_any_text_survives_appending_and_cutting(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    append_lines(file, [{"step": i, "text": text} for i, text in enumerate(STRANGE)])
    append_lines(file, [{"step": 99}])
    cut_lines(file, after_step=50)
    assert records(file) == [{"step": i, "text": text} for i, text in enumerate(STRANGE)]


def test_line_separators_inside_a_record_do_not_cut_it(tmp_path):
    file = tmp_path / "rollouts.jsonl"  # as another writer may leave it: not ASCII
    file.write_text(json.dumps({"step": 1, "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    before = file.read_text()
    cut_lines(file, after_step=1)
    assert file.read_text() == before


def test_cutting_drops_later_steps_and_a_torn_last_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append_lines(file, [{"step": step} for step in (0, 1, 2, 3, 2)])
    with file.open("ab") as torn:
        torn.write('{"step": 1, "é'.encode()[:-1])  # in the middle of a character
    cut_lines(file, after_step=2)
    assert [record["step"] for record in records(file)] == [0, 1, 2, 2]
    cut_lines(tmp_path / "none.jsonl", after_step=2)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("line", ["5", "[]", '{"split": "train"}', '{"step": "1"}'])
def test_a_line_that_is_no_record_of_a_step_is_named_before_a_run_goes_on(tmp_path, line: str):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(
        RunError, match=r"metrics\.jsonl:2 must hold a JSON object with a step; got .*; repair"
    ) as caught:
        cut_lines(file, after_step=2)
    one_line(caught)
    assert file.read_text().endswith(line + "\n")


# -------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(bpe_chat):
    """A tiny policy and its optimiser after a step."""
    policy = tiny_policy(bpe_chat, seed=3, hidden=16, layers=1)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1)
    sum(p.square().sum() for p in policy.model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return policy, optimizer


STATE = {"best": 0.5, "wall_s": 1.0, "validation": {}}
"""What a checkpoint must hold besides its step."""


def test_a_checkpoint_brings_back_weights_optimiser_and_state(trained, tmp_path):
    policy, optimizer = trained
    folder = save_checkpoint(tmp_path, 20, policy, optimizer, STATE)
    found, state = latest_checkpoint(tmp_path)
    assert (found, state["step"], state["best"], state["format"]) == (folder, 20, 0.5, FORMAT)
    again = load_policy(found)
    fresh = torch.optim.AdamW(again.model.parameters(), lr=0.1)
    load_optimizer(fresh, found)
    before, after = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys()
    for i, entry in before.items():
        assert entry.keys() == after[i].keys()
        assert all(torch.equal(value, after[i][name]) for name, value in entry.items())
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in policy.model.state_dict().items())


def test_an_optimiser_without_state_is_a_checkpoint_too(trained, tmp_path):
    policy, _ = trained
    unused = torch.optim.AdamW(policy.model.parameters(), lr=0.1)
    folder = save_checkpoint(tmp_path, 1, policy, unused, STATE)
    load_optimizer(unused, folder)
    assert unused.state_dict()["state"] == {}


def test_only_the_newest_checkpoints_are_kept(trained, tmp_path):
    for step in range(1, KEPT_CHECKPOINTS + 3):
        save_checkpoint(tmp_path, step, *trained, STATE)
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:06d}" for step in (3, 4)]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_makes_the_older_checkpoint_count(trained, tmp_path, name: str):
    save_checkpoint(tmp_path, 1, *trained, STATE)
    save_checkpoint(tmp_path, 2, *trained, STATE)
    file = checkpoint_folder(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=rf"damaged checkpoint: step-000002 \({name} has changed\); step-000001 is"):
        assert latest_checkpoint(tmp_path)[1]["step"] == 1
    file.unlink()
    with pytest.warns(UserWarning, match="passed over a damaged checkpoint"):
        assert latest_checkpoint(tmp_path)[1]["step"] == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "sha256": {}}', '{"format": 1, "sha256": 3}'])
def test_where_no_checkpoint_is_whole_the_damaged_ones_are_named(trained, tmp_path, text: str):
    save_checkpoint(tmp_path, 2, *trained, STATE)
    (checkpoint_folder(tmp_path, 2) / "state.json").write_text(text)
    with pytest.raises(RunError, match="must hold a whole checkpoint; damaged: step-000002") as caught:
        latest_checkpoint(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("name", STATE)
def test_a_state_that_lacks_what_training_goes_on_with_is_damage(trained, tmp_path, name: str):
    save_checkpoint(tmp_path, 1, *trained, STATE)
    save_checkpoint(tmp_path, 2, *trained, {n: value for n, value in STATE.items() if n != name})
    with pytest.warns(UserWarning, match=rf"step-000002 \(KeyError: '{name}'\); step-000001 is whole"):
        assert latest_checkpoint(tmp_path)[1]["step"] == 1
    save_checkpoint(tmp_path, 2, *trained, {**STATE, name: "x"})
    with pytest.warns(UserWarning, match=rf"step-000002 \(its {name} is 'x'\)"):
        latest_checkpoint(tmp_path)


def test_a_run_without_checkpoints_says_so(tmp_path):
    with pytest.raises(RunError, match="there is none"):
        latest_checkpoint(tmp_path)


def test_a_disk_that_fills_up_while_saving_keeps_the_last_checkpoint(trained, tmp_path):
    save_checkpoint(tmp_path, 1, *trained, STATE)
    save_best(tmp_path, trained[0])
    with files_of_at_most(4096), pytest.raises(RunError, match="must be writable and have room") as caught:
        save_checkpoint(tmp_path, 2, *trained, STATE)
    one_line(caught)
    with files_of_at_most(4096), pytest.raises(RunError):
        save_best(tmp_path, trained[0])
    assert latest_checkpoint(tmp_path)[1]["step"] == 1
    assert load_policy(tmp_path / "best").context == 1024
    save_checkpoint(tmp_path, 2, *trained, STATE)
    assert latest_checkpoint(tmp_path)[1]["step"] == 2


def test_the_configuration_can_be_replaced(tmp_path):
    create_run(tmp_path, TrainConfig(steps=3))
    write_config(tmp_path, TrainConfig(steps=5))
    assert read_config(tmp_path).steps == 5


def test_a_configuration_that_was_being_written_is_not_in_the_way(tmp_path: Path):
    (tmp_path / ".config.json.partial").write_text("{")
    create_run(tmp_path, TrainConfig(out=tmp_path))
    assert read_config(tmp_path).out == tmp_path
