"""A run that is broken at any operation on its files, in any way, goes on to the numbers that it would have reached."""

import random
from pathlib import Path
from typing import Any

import pytest

from faults import FAULTS, Forks, left, operations, survived
from small_runs import small_world

REWARDS = """
def turn_small(task, rollout):
    return [sum(i < 150 for i in turn.action_ids) / len(turn.action_ids) for turn in rollout.turns]

def outcome_varied(task, rollout):
    return sum(rollout.turns[-1].action_ids) % 97 / 97

def turn_exact(task, rollout):
    return [None for turn in rollout.turns]
"""
SHAPE: dict[str, Any] = {
    "steps": 3,
    "tasks_per_step": 2,
    "group_size": 2,
    "max_turn_tokens": 4,
    "minibatches": 1,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "validate_every": 2,
    "validation_size": 2,
    "threads": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {
        **small_world(folder, checkpoint, (f"q{i}" for i in range(5)), REWARDS),
        **SHAPE,
    }


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory):
    running = Forks(tmp_path_factory.mktemp("forks"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def whole(forks: Forks, world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    """What a run leaves that nothing broke, and the operations that it takes."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    taken = operations(forks, run, world)
    return left(run), taken


def points(taken: list[str]) -> list[tuple[str, int]]:
    """Every fault at every operation that it can meet."""
    wrote = ("write", "save")
    return [
        (fault, at)
        for at, name in enumerate(taken, start=1)
        for fault in FAULTS
        if fault not in ("short", "torn") or name.split()[0] in wrote
    ]


def broken(forks: Forks, folder: Path, world, whole, chosen: list[tuple[str, int]]) -> list[str]:
    """Which of the chosen faults a run did not survive, and how."""
    found = []
    for number, (fault, at) in enumerate(chosen):
        try:
            survived(forks, folder / f"run{number}", world, whole[0], fault=fault, at=at)
        except AssertionError as error:
            found.append(f"{fault} at {at}, {whole[1][at - 1]}: {error}")
    return found


def test_two_runs_are_equal(forks: Forks, world, whole, tmp_path: Path):
    again = Forks(tmp_path)  # another process, with another order of sets
    try:
        assert operations(again, tmp_path / "run", world) == whole[1]
    finally:
        again.close()
    assert left(tmp_path / "run") == whole[0]


def test_a_sample_of_faults_is_survived(forks: Forks, world, whole, tmp_path: Path):
    chosen = random.Random(0).sample(points(whole[1]), 12)
    assert broken(forks, tmp_path, world, whole, chosen) == []


def test_records_that_could_not_be_written_come_once(forks: Forks, world, whole, tmp_path: Path):
    [*_, at] = (n for n, name in enumerate(whole[1], start=1) if name == "write metrics.jsonl")
    survived(forks, tmp_path / "run", world, whole[0], fault="eio", at=at)
    code, told = forks.train(tmp_path / "run", world, resume=True)  # once more, from the same checkpoint
    assert code == 0, told
    assert left(tmp_path / "run") == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_operations_all_over_a_run_survive_the_fault(forks: Forks, world, whole, tmp_path: Path, fault: str):
    """Every twelfth, each fault's from another one on; `python benchmarks/kill.py --points 0` tries all."""
    chosen = [point for point in points(whole[1]) if point[0] == fault][FAULTS.index(fault) :: 12]
    assert broken(forks, tmp_path, world, whole, chosen) == []


@pytest.mark.slow
def test_a_kill_at_any_time_is_survived(forks: Forks, world, whole, tmp_path: Path):
    moments = random.Random(1)
    ends = [
        survived(forks, tmp_path / f"run{number}", world, whole[0], kill_after_s=moments.uniform(0, 1.5))
        for number in range(30)
    ]
    assert set(ends) <= {"was killed", "went on"}
    assert "was killed" in ends
