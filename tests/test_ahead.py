"""Drawing ahead: whose weights draw what, that timing changes nothing, and that a run can be stopped anywhere."""

import itertools
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from faults import Forks, left, operations, survived
from small_runs import small_world
from test_train import Stopper, assert_same_run, crash, lines, numbers
from turnwise import ahead, training
from turnwise.ahead import Sampler
from turnwise.config import TrainConfig
from turnwise.devices import SMALL
from turnwise.errors import ConfigError, RunError
from turnwise.policy import load_policy
from turnwise.rundir import checkpoint_folder, latest_checkpoint
from turnwise.training import train

REWARDS = """
def turn_small(task, rollout):
    return [sum(i < 150 for i in turn.action_ids) / len(turn.action_ids) for turn in rollout.turns]

def outcome_varied(task, rollout):
    return sum(rollout.turns[-1].action_ids) % 97 / 97
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, Any]:
    """Options of a run of four quick steps that draws ahead, without `out`."""
    folder = tmp_path_factory.mktemp("world")
    return {
        **small_world(folder, checkpoint, (f"q{i}" for i in range(9)), REWARDS),
        "ahead": True,
        "steps": 4,
        "tasks_per_step": 2,
        "group_size": 3,
        "max_turn_tokens": 6,
        "minibatches": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "validate_every": 2,
        "validation_size": 2,
    }


@pytest.fixture(scope="module")
def whole(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without any interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(**world, out=out)
    return out


def steps(run: Path) -> list[dict[str, float]]:
    return [line["metrics"] for line in numbers(run) if line["split"] == "train"]


# ---------------------------------------------------------------------- whose weights draw what


def test_every_batch_but_the_first_is_one_update_old(whole: Path):
    assert [step["updates_behind"] for step in steps(whole)] == [0, 1, 1, 1]
    drawn_with = {line["step"]: line["rollout"]["policy_version"] for line in lines(whole / "rollouts.jsonl")}
    assert drawn_with == {1: 0, 2: 0, 3: 1, 4: 2}


def test_the_first_step_is_that_of_a_run_that_does_not_draw_ahead(world: dict[str, Any], whole: Path, tmp_path: Path):
    train(**{**world, "ahead": False}, out=tmp_path / "run")
    one, other = steps(whole)[0], steps(tmp_path / "run")[0]
    assert {name: x for name, x in one.items() if name != "updates_behind"} == other
    assert steps(whole)[1]["return"] != steps(tmp_path / "run")[1]["return"]


def test_without_a_learning_rate_all_numbers_are_those_of_drawing_first(world: dict[str, Any], tmp_path: Path):
    still = {**world, "learning_rate": 0.0}
    for name, is_ahead in (("ahead", True), ("first", False)):
        train(**{**still, "ahead": is_ahead}, out=tmp_path / name)
    found = numbers(tmp_path / "ahead")
    for line in found:
        line["metrics"].pop("updates_behind", None)
    assert found == numbers(tmp_path / "first")
    one, other = (lines(tmp_path / name / "rollouts.jsonl") for name in ("ahead", "first"))
    for line in (*one, *other):
        del line["rollout"]["policy_version"]
    assert one == other


def test_the_gap_to_the_sampler_is_that_of_one_update(world: dict[str, Any], whole: Path, tmp_path: Path):
    found = steps(whole)
    assert found[0]["sampler_gap"] < 1e-6
    assert min(step["sampler_gap"] for step in found[1:]) > 1e-5
    corrected = {**world, "sampler_correction": "truncate", "minibatches": 1}
    train(**corrected, out=tmp_path / "run")
    found = steps(tmp_path / "run")
    assert found[0]["sampler_kl"] < 1e-9
    assert min(step["sampler_kl"] for step in found[1:]) > 1e-7
    assert max(step["sampler_gap"] for step in found) < 1e-6, "the ratio of the loss is against the trainer's own"


def test_validations_play_with_the_weights_of_the_last_update(whole: Path, world: dict[str, Any], tmp_path: Path):
    """A run that starts from the weights of the last step validates them as that run did."""
    plain = {**world, "ahead": False, "steps": 1, "policy": str(checkpoint_folder(whole, 4))}
    train(**plain, out=tmp_path / "fresh")
    validated = {line["step"]: line["metrics"] for line in numbers(whole) if line["split"] == "validation"}
    first = next(line["metrics"] for line in numbers(tmp_path / "fresh") if line["split"] == "validation")
    assert validated[4] == first


# ---------------------------------------------------------------------- timing changes no number


@pytest.mark.parametrize("slow", ["drawing", "learning"])
def test_timing_changes_no_number(world, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str):
    where, name = {"drawing": (training, "draw"), "learning": (training, "update")}[slow]
    function = getattr(where, name)

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return function(*args, **options)

    monkeypatch.setattr(where, name, slowly)
    train(**world, out=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_step_is_learned_from_while_the_next_one_waits_for_its_tools(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each half waits until the other has begun: one after the other, this would never end."""
    drawing, learning = threading.Semaphore(0), threading.Semaphore(0)
    draw, update, number = training.draw, training.update, itertools.count()

    def watched_draw(*args: Any, **options: Any) -> Any:
        if next(number):  # the first batch is drawn before anything can be learned
            drawing.release()
            assert learning.acquire(timeout=20), "the update begins while the batch is drawn"
        return draw(*args, **options)

    def watched_update(*args: Any, **options: Any) -> Any:
        if args[4] < 3:  # nothing is drawn beside the last step
            learning.release()
            assert drawing.acquire(timeout=20), "the batch is begun before the update ends"
        return update(*args, **options)

    monkeypatch.setattr(training, "draw", watched_draw)
    monkeypatch.setattr(training, "update", watched_update)
    train(**world, out=tmp_path / "run")
    assert next(number) == 4


# ---------------------------------------------------------------------- stopped, and gone on


@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_a_crash_at_any_step_is_made_good_by_resuming(world, whole: Path, tmp_path: Path, step: int):
    with pytest.raises(ZeroDivisionError):
        train(**world, out=tmp_path / "run", display=Stopper(step, crash))
    assert not any(thread.name.startswith("turnwise-ahead") for thread in threading.enumerate())
    train(**world, out=tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_ctrl_c_leaves_a_run_that_goes_on_to_the_same_numbers(world, whole: Path, tmp_path: Path):
    stop = Stopper(2, lambda: signal.raise_signal(signal.SIGINT))
    result = train(**world, out=tmp_path / "run", display=stop)
    assert (result.steps, result.finished) == (2, False)
    train(**world, out=tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_two_steps_and_then_two_more_are_four(world: dict[str, Any], whole: Path, tmp_path: Path):
    train(**{**world, "steps": 2}, out=tmp_path / "run")
    train(**world, out=tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_failure_while_drawing_ahead_is_the_runs_own_and_keeps_the_steps_before_it(
    world: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    draw, number = training.draw, itertools.count()

    def failing(*args: Any, **options: Any) -> Any:
        if next(number) == 2:  # of the third batch, beside the second step
            raise RunError("the engine must live; it died")
        return draw(*args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(training, "draw", failing)
        with pytest.raises(RunError, match="the engine must live"):
            train(**world, out=tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run")[1]["step"] == 2
    train(**world, out=tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_failing_update_ends_what_is_drawn(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "update", lambda *args, **options: crash())
    with pytest.raises(ZeroDivisionError):
        train(**{**world, "max_turn_tokens": 100, "max_turns": 3}, out=tmp_path / "run")
    assert not any(thread.name.startswith("turnwise-ahead") for thread in threading.enumerate())


@pytest.mark.slow
def test_dynamic_sampling_and_trees_go_on_alike(world: dict[str, Any], tmp_path: Path):
    for name, more in (
        ("dynamic", {"dynamic_sampling": 3}),
        ("tree", {"branches": (2, 2), "estimator": "tree-grpo"}),
        ("critic", {"estimator": "turn-ppo", "group_size": 2}),
    ):
        whole, run = tmp_path / f"{name}-whole", tmp_path / name
        train(**{**world, **more}, out=whole)
        train(**{**world, **more, "steps": 2}, out=run)
        train(**{**world, **more}, out=run, resume=True)
        assert numbers(run) == numbers(whole), name


def test_an_adapter_goes_on_alike_and_its_base_is_not_copied(world: dict[str, Any], tmp_path: Path):
    pytest.importorskip("peft")
    adapted = {**world, "lora_rank": 2}
    train(**adapted, out=tmp_path / "whole")
    train(**{**adapted, "steps": 2}, out=tmp_path / "run")
    train(**adapted, out=tmp_path / "run", resume=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    saved = load_file(checkpoint_folder(tmp_path / "run", 4) / "sampler.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_numbers(
    world: dict[str, Any], tmp_path: Path, checkpoint: Path
):
    forks = Forks(tmp_path)
    options = {**world, "steps": 3, "threads": 1, "group_size": 2, "minibatches": 1, "max_turn_tokens": 4}
    try:
        taken = operations(forks, tmp_path / "whole", options)
        whole = left(tmp_path / "whole")
        saves = [at for at, name in enumerate(taken, start=1) if "sampler" in name]
        assert saves, "the weights that draw are in the checkpoint"
        for number, (fault, at) in enumerate((("torn", saves[0]), ("before", saves[1]), ("after", len(taken) // 2))):
            survived(forks, tmp_path / f"run{number}", options, whole, fault=fault, at=at)
    finally:
        forks.close()


@pytest.mark.slow
def test_a_kill_at_any_time_is_survived(world: dict[str, Any], tmp_path: Path):
    forks = Forks(tmp_path)
    options = {**world, "steps": 3, "threads": 1, "group_size": 2, "minibatches": 1, "max_turn_tokens": 4}
    try:
        operations(forks, tmp_path / "whole", options)
        whole = left(tmp_path / "whole")
        ends = [survived(forks, tmp_path / f"run{n}", options, whole, kill_after_s=0.1 + 0.07 * n) for n in range(20)]
        assert "was killed" in ends
    finally:
        forks.close()


@pytest.mark.slow
def test_the_embedded_policy_learns_from_rollouts_that_are_one_update_old(tmp_path: Path):
    train(
        out=tmp_path / "run",
        ahead=True,
        sampler_correction="truncate",
        steps=12,
        tasks_per_step=8,
        group_size=8,
        validate_every=12,
        validation_size=8,
    )
    returns = [step["return"] for step in steps(tmp_path / "run")]
    assert sum(returns[-3:]) / 3 > sum(returns[:3]) / 3 + 0.3


# ---------------------------------------------------------------------- the copy


def test_the_copy_is_a_copy_and_follows(checkpoint: Path):
    policy = load_policy(checkpoint)
    sampler: Sampler[int] = Sampler(policy, TrainConfig(ahead=True, threads=4))
    try:
        before = {name: w.clone() for name, w in sampler.weights.items()}
        with torch.no_grad():
            for p in policy.learned:
                p.add_(1.0)
        assert all(torch.equal(before[name], w) for name, w in sampler.weights.items())
        sampler.follow(dict(policy.model.named_parameters()), 3)
        assert all(torch.equal(before[name] + 1, w) for name, w in sampler.weights.items())
        assert {engine.policy_version for engine in sampler.engines} == {3}
        assert (sampler.cores, sampler.threads) == (2, 1), "half of four, and one thread in a small model's operations"
        assert len(sampler.engines) == 2
        assert sampler.take(lambda: 7) == 7
        sampler.begin(lambda: 8)
        assert sampler.take(lambda: 9) == 8
    finally:
        sampler.close()


def test_a_large_policys_operations_get_half_of_the_cores(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_policy(checkpoint).model
    monkeypatch.setattr(ahead, "SMALL", 1)
    assert SMALL > 1
    assert ahead.halves(TrainConfig(threads=6), model) == (3, 3)
    assert ahead.halves(TrainConfig(threads=1), model) == (1, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ahead": 2}, "ahead must be true or false; got 2"),
        ({"ahead": True, "engine": "vllm"}, "ahead must go with engine hf"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(**options)
