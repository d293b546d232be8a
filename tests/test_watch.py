"""Warnings: each on a history that provokes it, none on healthy runs."""

import json
from pathlib import Path

import pytest

from turnwise.watch import new_warnings

HEALTHY = {"terminated": 0.9, "tool_execution": 0.9, "exact_match": 0.6, "all_turns": 0.5, "explained_variance": 0.2}


def history(*steps: dict[str, float]) -> list[dict[str, float]]:
    return [{**HEALTHY, **step} for step in steps]


def all_warnings(steps: list[dict[str, float]], **options: int) -> list[tuple[int, str]]:
    """Every warning of a run with its step, counted from 1."""
    return [(n, said) for n in range(len(steps) + 1) for said in new_warnings(steps[:n], **options)]


def said(found: list[dict[str, float]], **options: int) -> list[tuple[int, str]]:
    """Each warning's step and first words."""
    return [(step, text.split(":")[0]) for step, text in all_warnings(found, **{"max_turns": 4, **options})]


def test_a_step_in_which_everything_was_cut_off():
    found = history({}, {"terminated": 0.0}, {"terminated": 0.0}, {}, {"terminated": 0.0})
    assert said(found) == [(2, "all rollouts of a step were cut off"), (5, "all rollouts of a step were cut off")]


def test_a_tool_that_is_given_up():
    falling = history(*({"tool_execution": rate} for rate in [0.5] * 6 + [0.1] * 6))
    # running means of 5: .5 until step 6, then .42, .34, .26, .18, .1: under .2 and under half of .5 at step 10
    assert said(falling) == [(10, "the tool is being abandoned")]
    assert said(history(*({"tool_execution": rate} for rate in [0.9] * 6 + [0.3] * 9))) == [], "a third is not given up"
    assert said(history(*({"tool_execution": 0.05} for _ in range(20)))) == [], "what never was is not lost"


def test_a_critic_that_explains_nothing():
    dead = history(*({"explained_variance": x} for x in [0.1] + [0.0, -0.2] * 6))
    assert said(dead) == [(11, "the critic is dead")]
    assert said(dead, critic_warmup_steps=2) == [(12, "the critic is dead")]
    assert said(dead, critic_warmup_steps=4) == []
    assert said(history(*({"explained_variance": x} for x in ([-0.1] * 9 + [0.01]) * 2))) == []


def test_searching_that_runs_away():
    away = [{"all_turns": 0.5, "exact_match": 0.3}] * 10 + [{"all_turns": 0.95, "exact_match": 0.2}] * 12
    assert said(history(*away)) == [(20, "searching runs away")]
    assert said(history(*away), max_turns=2) == [], "one search and an answer are two turns"
    rising = [{"all_turns": 1.0, "exact_match": step / 50} for step in range(24)]
    assert said(history(*rising)) == []
    assert said(history(*[{"all_turns": 1.0, "exact_match": 0.9}] * 30)) == [], "two hops take all turns, and are right"


def test_every_warning_names_what_to_do():
    provoked = [
        history({"terminated": 0.0}),
        history(*({"tool_execution": rate} for rate in [0.5] * 6 + [0.0] * 5)),
        history(*[{"explained_variance": -1.0}] * 10),
        history(*[{"all_turns": 1.0, "exact_match": 0.1}] * 20),
    ]
    for found in provoked:
        [(_, text)] = all_warnings(found, max_turns=4)
        assert "--" in text
        assert "\n" not in text


def test_no_history_and_missing_metrics_are_silent():
    assert new_warnings([], max_turns=4) == []
    assert all_warnings([{}] * 30, max_turns=4) == []


def test_the_published_runs_are_silent():
    result = json.loads((Path(__file__).parent.parent / "results" / "atlas.json").read_text())
    for run in result["runs"]:
        curve = {name: values for name, values in run["curve"].items() if None not in values}
        steps = [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]
        assert len(steps) == 60
        assert all_warnings(steps, max_turns=2) == []


@pytest.mark.parametrize("name", ["tool_execution", "exact_match"])
def test_the_published_runs_are_not_silent_for_lack_of_numbers(name: str):
    result = json.loads((Path(__file__).parent.parent / "results" / "atlas.json").read_text())
    assert all(name in run["curve"] for run in result["runs"])
