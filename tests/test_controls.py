"""Controls: what they move, what they leave, and that the seed decides."""

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.testing import assert_allclose

from turnwise.config import TrainConfig
from turnwise.controls import NOISE, learned_from
from turnwise.credit import grpo_decoupled, grpo_mr, gtpo, mt_grpo, turn_table
from turnwise.crediting import estimate, rollout_table
from turnwise.env import LOST, ToolEnvironment
from turnwise.errors import ConfigError
from turnwise.tools import tool
from turnwise.types import Action, Rollout, Task, Turn


def rollout(group: int, paid: Sequence[dict[str, float]], outcome: float) -> Rollout:
    turn = Turn(action_ids=(1, 2), sampling_logprobs=(0.0, 0.0), text="", action=Action())
    return Rollout(
        task_id=f"q{group}", group=group, prompt_ids=(0,), turns=(turn,) * len(paid), stop="answer",
        turn_rewards=tuple(paid), outcome_rewards={"exact_match": outcome},
    )  # fmt: skip


STEP = [
    rollout(0, [{"found": 0.5}, {"found": 0.0, "format": 0.1}, {}], 1.0),
    rollout(0, [{"found": 0.25}, {}], 0.0),
    rollout(0, [{"found": 0.75}, {"found": 0.125}, {}], 0.0),
    rollout(1, [{"found": 1.0}, {}], 1.0),
    rollout(1, [{}], 0.0),
]


def turn_sums(rollouts: Sequence[Rollout]) -> list[float]:
    return [sum(sum(paid.values()) for paid in r.turn_rewards) for r in rollouts]


def control(**options) -> TrainConfig:
    return TrainConfig(estimator="grpo-mr", **options)


def test_without_a_control_rewards_are_as_they_were():
    assert learned_from(STEP, TrainConfig(), 3) is STEP


def test_rewards_dealt_among_turns_keep_each_rollouts_sum():
    dealt = [learned_from(STEP, control(placebo="turns"), step) for step in range(8)]
    assert any(found != STEP for found in dealt)
    for found in dealt:
        assert_allclose(turn_sums(found), turn_sums(STEP))
        assert found[1] == STEP[1]  # one paid turn has nowhere to go
        assert [r.outcome_rewards for r in found] == [r.outcome_rewards for r in STEP]
        pair = {tuple(sorted(paid.items())) for paid in found[0].turn_rewards[:2]}
        assert pair == {(("found", 0.5),), (("format", 0.1), ("found", 0.0))}  # a turn's components stay together


def test_rewards_of_other_rollouts_keep_each_turns_rewards_within_the_group():
    dealt = [learned_from(STEP, control(placebo="rollouts"), step) for step in range(8)]
    firsts = {tuple(found[i].turn_rewards[0]["found"] for i in range(3)) for found in dealt}
    assert len(firsts) > 1
    assert {tuple(sorted(first)) for first in firsts} == {(0.25, 0.5, 0.75)}
    assert all(found[3:] == STEP[3:] for found in dealt)  # the only paid one of its group


def test_rewards_paid_at_the_end_make_mt_grpo_the_merged_method():
    """z-scores of sums of turn rewards and outcome, on all turns: GRPO-MR."""
    moved = learned_from(STEP, control(placebo="end"), 0)
    assert moved[0].turn_rewards == ({}, {}, {})
    assert moved[0].outcome_rewards == pytest.approx({"exact_match": 1.0, "found": 0.5, "format": 0.1})
    assert moved[4] == STEP[4]
    found = estimate(TrainConfig(estimator="mt-grpo"), rollout_table(moved)).advantages
    assert_allclose(found, estimate(control(), rollout_table(STEP)).advantages)


@pytest.mark.parametrize("options", [{"placebo": "turns"}, {"placebo": "rollouts"}, {"outcome_noise": 0.5}])
def test_the_seed_and_the_step_decide_the_draws(options: dict):
    config = control(**options)
    one = learned_from(STEP, config, 3)
    assert learned_from(STEP, config, 3) == one
    assert any(learned_from(STEP, config, step) != one for step in range(4, 9))
    others = [dataclasses.replace(config, seed=seed) for seed in range(1, 6)]
    assert any(learned_from(STEP, other, 3) != one for other in others)
    assert learned_from(STEP, dataclasses.replace(config, estimator="turn-rloo"), 3) == one  # arms are disturbed alike


def test_noise_is_a_component_of_the_outcome_with_the_spread_that_was_asked_for():
    many = [rollout(0, [{}], 1.0)] * 4000
    found = learned_from(many, control(outcome_noise=0.5), 0)
    noise = np.array([r.outcome_rewards[NOISE] for r in found])
    assert abs(noise.mean()) < 4 * 0.5 / 4000**0.5
    assert_allclose(noise.std(), 0.5, rtol=0.05)
    assert all(r.outcome_rewards["exact_match"] == 1.0 for r in found)


# ------------------------------------------------------------------------------ tools that do not answer


@tool
def look(word: str) -> str:
    """The word."""
    return word


CALL = '<reasoning>\nx\n</reasoning>\n<tool>\n{"name": "look", "args": {"word": "hare"}}\n</tool>'


def answered(failures: float, seed: int, turns: int = 8) -> list[bool]:
    """Which of a rollout's calls were answered."""
    environment = ToolEnvironment(Task(id="1", question="?"), {"look": look}, max_turns=turns + 1, failures=failures)
    environment.use_seed(seed)
    environment.start()

    async def played() -> list[bool]:
        return [(await environment.step(CALL)).results != (LOST,) for _ in range(turns)]

    return asyncio.run(played())


def test_a_lost_result_is_an_error_that_the_agent_sees():
    environment = ToolEnvironment(Task(id="1", question="?"), {"look": look}, max_turns=2, failures=1.0)
    environment.start()
    step = asyncio.run(environment.step(CALL))
    assert step.results == (LOST,)
    assert step.results[0].error == "exception"
    assert "did not answer" in step.reply[0].content
    assert "hare" not in step.reply[0].content


def test_the_rollouts_seed_decides_which_results_are_lost():
    assert answered(0.0, 1) == [True] * 8
    assert answered(0.5, 1) == answered(0.5, 1)
    share = np.mean([answered(0.3, seed) for seed in range(200)])
    assert abs(share - 0.7) < 4 * (0.3 * 0.7 / 1600) ** 0.5
    assert len({tuple(answered(0.5, seed)) for seed in range(20)}) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placebo": "shuffle"}, "placebo must be a known name"),
        ({"outcome_noise": -1.0}, "outcome-noise must be"),
        ({"tool_failures": 1.5}, r"tool-failures must be in \[0, 1\]"),
        ({"tool_failures": 0.1, "dynamic_sampling": 2}, "tool-failures must go with .*; got dynamic-sampling"),
        ({"placebo": "end", "estimator": "mt-grpo-tree", "branches": (2, 2)}, "placebo must go with .*; got branches"),
        ({"tool_failures": 0.1, "environment": "gym:CartPole-v1"}, "tool-failures must go with the environment of"),
    ],
)
def test_a_control_that_cannot_be_is_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


# -------------------------------------------------------------------- normalisation and causality, a square


SQUARE = turn_table(
    [0, 0, 0],
    [[{"a": 1.0}, {"a": 0.0}, {}], [{"a": 0.0}, {"a": 2.0}, {}], [{"a": 0.0}, {"a": 0.0}, {}]],
    [{"x": 0.0}, {"x": 1.0}, {"x": 0.0}],
)


def test_decoupled_without_causality_gives_every_turn_the_sum_of_all_z_scores():
    #  z of 1 0 0: 2/√3, −1/√3, −1/√3 (mean 1/3, std 1/√3); of 0 2 0 and 0 1 0 the same for the second rollout
    r = 1 / np.sqrt(3)
    found = grpo_decoupled(SQUARE, eps=0.0).advantages.reshape(3, 3)
    assert_allclose(found, [[2 * r - r - r] * 3, [-r + 2 * r + 2 * r] * 3, [-3 * r] * 3], atol=1e-12)
    assert_allclose(found[:, 0], mt_grpo(SQUARE, eps=0.0).advantages[::3])  # the first turn is credited with all anyway


def test_the_four_corners_differ_by_what_they_say():
    merged = grpo_mr(SQUARE).advantages.reshape(3, 3)
    decoupled = grpo_decoupled(SQUARE).advantages.reshape(3, 3)
    causal = gtpo(SQUARE, gamma=1.0).advantages.reshape(3, 3)
    both = mt_grpo(SQUARE).advantages.reshape(3, 3)
    for constant in (merged, decoupled):
        assert_allclose(constant, constant[:, :1].repeat(3, 1))
    assert_allclose(causal[:, 0], merged[:, 0])  # before the first turn nothing was paid
    assert_allclose(both[:, 0], decoupled[:, 0])
    assert_allclose(both[:, 2], causal[:, 2])  # after the second turn the outcome alone is left
    assert not np.allclose(merged, decoupled)


def test_with_the_outcome_alone_all_corners_are_one():
    table = turn_table([0, 0], [[{}, {}], [{}, {}]], [{"x": 0.0}, {"x": 1.0}])
    expected = grpo_mr(table).advantages
    for corner in (grpo_decoupled(table), gtpo(table, gamma=1.0), mt_grpo(table)):
        assert_allclose(corner.advantages, expected)
