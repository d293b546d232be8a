"""Warnings: each on a history that provokes it, none on healthy runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turnwise import atlas
from turnwise.config import TrainConfig
from turnwise.credit import mt_grpo, sign_flips, turn_table
from turnwise.crediting import rollout_table, training_rows
from turnwise.evaluation import rollouts
from turnwise.learning import update
from turnwise.policy import load_policy
from turnwise.watch import new_warnings

HEALTHY = {
    "terminated": 0.9,
    "cut_unpaid": 0.1,
    "tool_execution": 0.9,
    "exact_match": 0.6,
    "all_turns": 0.5,
    "turn_tokens": 30.0,
    "dead_groups": 0.3,
    "entropy": 0.5,
    "sign_flips": 0.3,
    "sampler_gap": 1e-7,
    "policy_shift": 0.005,
    "clip_fraction": 0.05,
    "judge/approved": 0.6,
    "judge/turn_spread": 0.3,
    "explained_variance": 0.2,
}
ROOT = Path(__file__).parent.parent


def history(*steps: dict[str, float]) -> list[dict[str, float]]:
    return [{**HEALTHY, **step} for step in steps]


def all_warnings(steps: list[dict[str, float]], **options: Any) -> list[tuple[int, str]]:
    """Every warning of a run with its step, counted from 1."""
    return [(n, said) for n in range(len(steps) + 1) for said in new_warnings(steps[:n], **options)]


def said(found: list[dict[str, float]], **options: Any) -> list[tuple[int, str]]:
    """Each warning's step and first words."""
    return [(step, text.split(":")[0]) for step, text in all_warnings(found, **{"max_turns": 4, **options})]


def test_a_step_in_which_everything_was_cut_off():
    found = history({}, {"terminated": 0.0}, {"terminated": 0.0}, {}, {"terminated": 0.0})
    assert said(found) == [(2, "all rollouts of a step were cut off"), (5, "all rollouts of a step were cut off")]


def test_a_tool_that_is_given_up():
    falling = history(*({"tool_execution": rate} for rate in [0.5] * 6 + [0.1] * 6))
    # running means of 3: .5 until step 6, then .37, .23, .1: under .2 and under half of .5 at step 9
    assert said(falling) == [(9, "the tool is being abandoned")]
    assert said(history(*({"tool_execution": rate} for rate in [0.9] * 6 + [0.3] * 9))) == [], "a third is not given up"
    assert said(history(*({"tool_execution": 0.05} for _ in range(20)))) == [], "what never was is not lost"


def test_a_critic_that_explains_nothing():
    dead = history(*({"explained_variance": x} for x in [0.1] + [0.0, -0.2] * 4))
    assert said(dead) == [(7, "the critic is dead")]
    assert said(dead, critic_warmup_steps=2) == [(8, "the critic is dead")]
    assert said(dead, critic_warmup_steps=4) == []
    assert said(history(*({"explained_variance": x} for x in ([-0.1] * 5 + [0.01]) * 2))) == []


def test_searching_that_runs_away():
    away = [{"all_turns": 0.5, "exact_match": 0.3}] * 10 + [{"all_turns": 0.95, "exact_match": 0.2}] * 12
    assert said(history(*away)) == [(15, "searching runs away")]
    assert said(history(*away), max_turns=2) == [], "one search and an answer are two turns"
    rising = [{"all_turns": 1.0, "exact_match": step / 50} for step in range(24)]
    assert said(history(*rising)) == []
    assert said(history(*[{"all_turns": 1.0, "exact_match": 0.9}] * 30)) == [], "two hops take all turns, and are right"


BAD = {"exact_match": 0.1}
PROVOKED = {
    "all rollouts of a step were cut off": [{"terminated": 0.0}],
    "truncation takes the rewards": [{"cut_unpaid": 0.7}] * 3,
    "the tool is being abandoned": [{"tool_execution": rate} for rate in [0.5] * 3 + [0.0] * 2],
    "groups are dead": [{**BAD, "dead_groups": 0.9}] * 3,
    "rewards never arrive": [{"reward/found": 0.0}] * 5,
    "a reward is constant": [{"reward/found": 0.1, "reward/format": 0.2}] * 5,
    "turns collapse in length": [BAD] * 3 + [{**BAD, "turn_tokens": 8.0}] * 3,
    "entropy collapses": [BAD] * 3 + [{**BAD, "entropy": 0.05}] * 3,
    "credit contradicts turn rewards": [{"sign_flips": 0.7}] * 3,
    "sampler and trainer disagree": [{"sampler_gap": 0.05}],
    "updates go off policy": [{"policy_shift": 0.2}] * 3,
    "the judge is of one mind": [{**BAD, "judge/approved": 1.0}] * 3,
    "the critic is dead": [{"explained_variance": -0.1}] * 6,
    "the critic does harm": [{"explained_variance": -1.0}] * 3,
    "searching runs away": [{"all_turns": 1.0, "exact_match": 0.1}] * 10,
}
"""The shortest history that provokes each warning."""


@pytest.mark.parametrize("name", PROVOKED)
def test_each_warning_comes_as_soon_as_it_can_and_names_what_to_do(name: str):
    steps = history(*PROVOKED[name])
    weights = {"found": 0.5} if name == "rewards never arrive" else {}
    [(step, text)] = all_warnings(steps, max_turns=4, weights=weights)
    assert (step, text.split(":")[0]) == (len(steps), name)
    assert "--" in text
    assert "\n" not in text
    assert all_warnings([*steps, *steps[-1:]], max_turns=4, weights=weights) == [(step, text)], "once"


@pytest.mark.parametrize("name", ["groups are dead", "turns collapse in length", "entropy collapses"])
def test_what_comes_with_success_is_no_fault(name: str):
    steps = history(*({**step, "exact_match": 0.9} for step in PROVOKED[name]))
    assert said(steps) == []
    # without a measure of what is right, a return above that of the start
    del steps[0]["exact_match"]
    returns = [{k: v for k, v in s.items() if k != "exact_match"} | {"return": 0.1 * n} for n, s in enumerate(steps)]
    assert said(returns) == [] or len(returns) == 3
    assert said([{**s, "return": 0.1} for s in returns]) == [(len(returns), name)]


def test_truncation_that_pays_or_is_total_is_another_matter():
    paid = {"cut_unpaid": 0.7, "environment_return": 3.0}
    assert said(history(*[paid] * 4)) == []
    total = {"cut_unpaid": 1.0, "terminated": 0.0}
    assert said(history(*[total] * 4)) == [(1, "all rollouts of a step were cut off")]


def test_rewards_that_never_arrive_are_those_that_are_to_be_earned():
    weights = {"found": 0.5, "penalty": -0.1, "seldom": 1.0, "unseen": 0.3}
    steps = history(*[{"reward/found": 0.0, "reward/penalty": 0.0, "reward/seldom": 0.0}] * 4, {"reward/seldom": 0.01})
    [(step, text)] = all_warnings(steps, max_turns=4, weights=weights)
    assert step == 5
    assert "found or unseen since" in text
    varied = history(*({"reward/found": x} for x in (0.1, 0.1, 0.1, 0.1, 0.11)))
    assert said(varied, weights={"found": 0.5}) == []


def test_a_judge_that_agrees_with_what_is_right_may_be_of_one_mind():
    assert said(history(*[{"judge/approved": 1.0, "exact_match": 0.95}] * 4)) == []
    assert said(history(*[{"judge/approved": 0.0, "exact_match": 0.05}] * 4)) == []
    assert said(history(*[{"judge/approved": 0.0}] * 4)) == [(3, "the judge is of one mind")]
    assert said(history(*[{"judge/turn_spread": 0.0}] * 4)) == [(3, "the judge is of one mind")]


def test_the_samplers_own_divergence_counts_where_it_is_corrected():
    assert said(history({"sampler_gap": 0.0, "sampler_kl": 0.1})) == [(1, "sampler and trainer disagree")]
    assert said(history({"sampler_gap": 0.1, "sampler_kl": 0.001})) == []
    assert said(history(*[{"clip_fraction": 0.5}] * 3)) == [(3, "updates go off policy")]


def test_sign_flips_by_hand():
    # First turns earn 1 and 0, mean 1/2; second ones alike. Advantages 2 and 3: the second rollout's is against its
    # reward. Third turns of one rollout alone are compared with nothing.
    table = turn_table([0, 0], [[{"r": 1.0}, {"r": 0.3}], [{"r": 0.0}, {"r": 0.3}]], [{}, {}])
    assert sign_flips(table, np.array([2.0, -1.0, 3.0, 1.0])) == 0.5
    assert sign_flips(table, np.array([2.0, -1.0, -3.0, 1.0])) == 0.0
    assert sign_flips(table, np.zeros(4)) is None


def test_a_trainer_that_computes_other_probabilities_is_found_in_its_first_update():
    config = TrainConfig(tasks_per_step=1, minibatches=1, group_size=6, threads=1)
    [group] = rollouts("embedded", group_size=6, tasks=atlas.tasks("train")[:1])
    table = rollout_table(group)
    rows = training_rows(group, table, mt_grpo(table))

    def gap(config: TrainConfig) -> float:
        policy = load_policy("embedded")
        return update(policy, torch.optim.AdamW(policy.learned, lr=1e-6), rows, config, 0)["sampler_gap"]

    same, other = gap(config), gap(dataclasses.replace(config, temperature=2.0))
    assert said(history({"sampler_gap": same})) == []
    assert said(history({"sampler_gap": other})) == [(1, "sampler and trainer disagree")]


def test_no_history_and_missing_metrics_are_silent():
    assert new_warnings([], max_turns=4) == []
    assert all_warnings([{}] * 30, max_turns=4) == []


def published(name: str) -> list[tuple[dict, list[dict[str, float]]]]:
    """The runs of a published result with the metrics of their steps."""
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    found = []
    for run in result["runs"]:
        columns = run["curve"].items()
        steps = [{name: values[i] for name, values in columns if values[i] is not None} for i in range(run["steps"])]
        found.append((run, steps))
    return found


def test_the_published_runs_on_one_hop_are_silent():
    runs = published("atlas")
    assert len(runs) == 15
    for _, steps in runs:
        assert len(steps) == 60
        assert {"tool_execution", "exact_match", "entropy", "dead_groups"} <= steps[0].keys()
        assert all_warnings(steps, max_turns=2) == []


def test_of_the_published_runs_on_two_hops_those_that_stop_searching_are_warned_of_at_once():
    for run, steps in published("two-hop"):
        found = said(steps)
        lost = any(step["tool_execution"] < 0.1 for step in steps)
        assert ("the tool is being abandoned" in {text for _, text in found}) == lost
        if lost:
            assert found[0][0] <= 7
        elif np.mean([step["exact_match"] for step in steps[-3:]]) >= 0.5:
            assert found == [], run["arm"]


def test_short_real_runs_are_silent():
    runs = json.loads((ROOT / "tests" / "fixtures" / "healthy-metrics.json").read_text())
    assert {run["max_turns"] for run in runs.values()} == {2, 4}
    for name, run in runs.items():
        missing = HEALTHY.keys() - set().union(*run["steps"])
        assert missing <= {"explained_variance", "judge/approved", "judge/turn_spread"}, name
        assert all_warnings(run["steps"], max_turns=run["max_turns"], weights=run["weights"]) == [], name
