"""Training that draws further questions where a group shows no difference, and that corrects for its sampler."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from small_runs import small_world
from turnwise import memory
from turnwise.config import TrainConfig
from turnwise.errors import ConfigError
from turnwise.rundir import checkpoint_folder, latest_checkpoint
from turnwise.training import ordered_tasks, train
from turnwise.types import Task

REWARDS = '''
def outcome_varied(task, rollout):
    """Different for different rollouts of questions that can be told apart; nothing for the others."""
    return 0.0 if task.id.startswith("dead") else sum(rollout.turns[-1].action_ids) % 97 / 97
'''
TIMES = ("tokens_per_s", "rollout_s", "update_s")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict:
    """Options of a run of three quick steps over five questions with a signal and four without."""
    folder = tmp_path_factory.mktemp("world")
    names = [f"live{i}" for i in range(5)] + [f"dead{i}" for i in range(4)]
    return {
        **small_world(folder, checkpoint, names, REWARDS),
        "estimator": "grpo-or",
        "steps": 3,
        "tasks_per_step": 3,
        "group_size": 3,
        "max_turn_tokens": 6,
        "minibatches": 1,
        "learning_rate": 1e-2,
        "validate_every": 3,
        "validation_size": 1,
        "checkpoint_every": 1,
        "log_groups": 3,
    }


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps(run: Path) -> list[dict]:
    found = [line["metrics"] for line in lines(run / "metrics.jsonl") if line["split"] == "train"]
    return [{name: value for name, value in metrics.items() if name not in TIMES} for metrics in found]


def learned_from(run: Path, step: int) -> list[str]:
    """The questions of a step's groups, in order."""
    groups = {r["group"]: r["task"]["id"] for r in lines(run / "rollouts.jsonl") if r["step"] == step}
    return [groups[i] for i in sorted(groups)]


def order(world: dict, count: int) -> list[str]:
    """The first `count` questions of the run's order."""
    tasks = [Task(**{**task, "answers": ("w",)}) for task in lines(Path(world["tasks"]))]
    return [task.id for task in ordered_tasks(tasks, 0, 0, count)]


@pytest.fixture(scope="module")
def dynamic(world: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dynamic"
    train(**world, out=out, dynamic_sampling=20)
    return out


def test_groups_without_a_signal_make_room_for_the_next_questions(world: dict, dynamic: Path):
    ids = order(world, 60)
    live = [place for place, name in enumerate(ids) if name.startswith("live")]
    used = 0
    for step, metrics in enumerate(steps(dynamic), start=1):
        expected = live[3 * (step - 1) : 3 * step]
        assert learned_from(dynamic, step) == [ids[place] for place in expected]
        drawn = expected[-1] + 1 - used
        assert metrics["dropped_groups"] == drawn - 3
        assert metrics["dead_groups"] == 0
        used = expected[-1] + 1
        assert latest_or(dynamic, step)["drawn_tasks"] == used
    assert max(metrics["extra_rounds"] for metrics in steps(dynamic)) >= 1


def latest_or(run: Path, step: int) -> dict:
    """A step's checkpoint, or the newest where it is gone."""
    file = checkpoint_folder(run, step) / "state.json"
    return json.loads(file.read_text()) if file.is_file() else {"drawn_tasks": _drawn(run, step)}


def _drawn(run: Path, step: int) -> int:
    return int(sum(3 + metrics["dropped_groups"] for metrics in steps(run)[:step]))


def test_dropped_rollouts_count_as_sampled(world: dict, dynamic: Path, tmp_path: Path):
    train(**{**world, "steps": 1}, out=tmp_path / "run")
    (plain,) = steps(tmp_path / "run")
    first = steps(dynamic)[0]
    extra = (3 + first["dropped_groups"]) / 3
    assert first["dropped_groups"] > 0
    assert first["sampled_tokens"] == pytest.approx(extra * plain["sampled_tokens"], rel=0.2)
    assert "dropped_groups" not in plain


def test_a_run_with_dynamic_sampling_goes_on_where_it_was(world: dict, dynamic: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(dynamic, out)
    shutil.rmtree(checkpoint_folder(out, 3))
    assert latest_checkpoint(out)[1]["step"] == 2
    train(out=out, resume=True)
    assert steps(out) == steps(dynamic)
    assert lines(out / "rollouts.jsonl") == lines(dynamic / "rollouts.jsonl")
    one, other = (load_file(checkpoint_folder(run, 3) / "model.safetensors") for run in (out, dynamic))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_when_the_rounds_are_spent_dead_groups_fill_the_step(world: dict, tmp_path: Path):
    lines_of = lines(Path(world["tasks"]))
    alone = tmp_path / "dead.jsonl"
    alone.write_text("".join(json.dumps(task) + "\n" for task in lines_of if task["id"].startswith("dead")))
    train(**{**world, "tasks": str(alone), "steps": 1}, out=tmp_path / "run", dynamic_sampling=2)
    (metrics,) = steps(tmp_path / "run")
    assert (metrics["extra_rounds"], metrics["dropped_groups"], metrics["dead_groups"]) == (2, 6, 1)
    assert len(learned_from(tmp_path / "run", 1)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mt-ppo"}, "compares rollouts of one question; mt-ppo learns from every rollout"),
        ({"group_size": 1}, "dynamic-sampling must have rollouts to compare; got group-size 1"),
        ({"dynamic_sampling": -1}, r"dynamic-sampling must be in \[0, 1000\]"),
    ],
)
def test_dynamic_sampling_that_cannot_work_is_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"dynamic_sampling": 2, **options})


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_a_correction_leaves_training_alone_where_sampler_and_trainer_agree(world: dict, tmp_path: Path, kind):
    for name, options in (("plain", {}), ("corrected", {"sampler_correction": kind})):
        train(**{**world, "steps": 2}, out=tmp_path / name, **options)
    for plain, corrected in zip(steps(tmp_path / "plain"), steps(tmp_path / "corrected"), strict=True):
        assert corrected["sampler_weight"] == pytest.approx(1, abs=1e-5)
        assert corrected["sampler_capped"] == 0
        assert corrected["sampler_kl"] == pytest.approx(0, abs=1e-6)
        assert {k: corrected[k] for k in plain} == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_a_run_in_bfloat16_goes_on_to_the_same_numbers(world: dict, tmp_path: Path, dtype):
    options = {
        **world,
        "dtype": dtype,
        "gradient_checkpointing": True,
        "sampler_correction": "truncate",
        "kl_coef": 0.1,
    }
    train(**options, out=tmp_path / "whole")
    train(**{**options, "steps": 2}, out=tmp_path / "parts")
    train(out=tmp_path / "parts", resume=True, steps=3)
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")
    saved = load_file(checkpoint_folder(tmp_path / "whole", 3) / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}


class Said:
    """A display that keeps what it is told of the run."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def show(self, record: dict) -> None:
        pass

    def say(self, text: str) -> None:
        self.texts.append(text)


def test_a_larger_policy_says_what_it_takes_or_is_refused_before_anything_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SMALL", 1)
    display = Said()
    train(**{**world, "steps": 1}, out=tmp_path / "run", display=display)
    assert [text.startswith("memory: about ") for text in display.texts] == [True]
    monkeypatch.setattr(memory, "device_memory", lambda device: 1000)
    with pytest.raises(ConfigError, match="the run must fit its device"):
        train(**world, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
