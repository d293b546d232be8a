"""Rows of other trainers: the same rollouts get the same token advantages as natively, whatever the layout."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from adapter_rollouts import awkward_rollouts, critic_values, native_advantages, padded_rollouts, shuffled
from turnwise.adapters.rows import (
    TREES,
    WITH_CRITIC,
    WITHOUT_CRITIC,
    CreditRow,
    batch_turn_ids,
    check_estimator,
    credit_rows,
    dense_rewards,
    observation_anchors,
    row_credit,
    token_advantages,
)
from turnwise.config import TRAINABLE
from turnwise.credit import ESTIMATORS, TOKEN_ESTIMATORS
from turnwise.errors import ConfigError, InputError
from turnwise.types import Rollout


def through_rows(rollouts: list[Rollout], estimator: str, *, critic: bool = False, **layout) -> list[np.ndarray]:
    """Each rollout's advantages at its sampled tokens, by way of padded arrays."""
    batch = padded_rollouts(rollouts, **layout)
    turn_ids = batch_turn_ids(batch.action)
    values, bootstrap = None, None
    if critic:
        own, after = critic_values(rollouts, estimator)
        values, bootstrap = np.full(turn_ids.shape, np.nan), [*after[:, 0], *[0.0] * (len(turn_ids) - len(rollouts))]
        for i, found in enumerate(own):
            values[i, turn_ids[i] >= 0] = found[:, 0]
    rows = credit_rows(
        turn_ids,
        batch.groups,
        batch.turn_rewards,
        batch.outcome_rewards,
        anchors=observation_anchors(turn_ids, batch.ids, batch.present, batch.prompts),
        values=values,
        bootstrap=bootstrap,
    )
    found = token_advantages(turn_ids, row_credit(rows, estimator).tokens)
    assert found.shape == turn_ids.shape
    assert_array_equal(found[turn_ids < 0], 0.0)
    return [row[own >= 0] for row, own in zip(found, turn_ids, strict=True)][: len(rollouts)]


def assert_alike(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for own, other in zip(found, expected, strict=True):
        assert_allclose(own, other, rtol=1e-6, atol=1e-6)


def test_every_estimator_is_offered_or_said_to_need_a_tree():
    assert {*WITHOUT_CRITIC, *WITH_CRITIC, *TREES} == {*ESTIMATORS, *TOKEN_ESTIMATORS}
    assert {*WITHOUT_CRITIC, *WITH_CRITIC} - {"vineppo"} == set(TRAINABLE)


@pytest.mark.parametrize("layout", [{}, {"left": True}, {"padding_rows": 3}])
@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_rows_get_the_native_advantages(estimator: str, layout: dict):
    rollouts = shuffled(awkward_rollouts())
    expected = native_advantages(rollouts, estimator)
    assert np.ptp(np.concatenate(expected)) > 0.1
    assert_alike(through_rows(rollouts, estimator, **layout), expected)


@pytest.mark.parametrize("estimator", [name for name in WITH_CRITIC if name in TRAINABLE])
def test_rows_with_values_get_the_native_advantages(estimator: str):
    rollouts = shuffled(awkward_rollouts(), 3)
    # A rollout that a token budget cut off is not paid its outcome natively; a trainer's rewards must say so.
    paid = [
        r if r.stop != "max_tokens" else _unpaid(r, at_end=estimator in ("ppo-mr", "mt-ppo-paid-at-end"))
        for r in rollouts
    ]
    assert_alike(through_rows(paid, estimator, critic=True, padding_rows=1), native_advantages(paid, estimator))


def _unpaid(rollout: Rollout, *, at_end: bool) -> Rollout:
    import dataclasses

    turns = ({},) * len(rollout.turns) if at_end else rollout.turn_rewards
    return dataclasses.replace(rollout, outcome_rewards={}, turn_rewards=turns)


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_groups_that_are_split_over_processes_are_one_group_again(estimator: str):
    rollouts = shuffled(awkward_rollouts())
    halves = [rollouts[: len(rollouts) // 2], rollouts[len(rollouts) // 2 :]]
    rows = []
    for half in halves:
        batch = padded_rollouts(half, padding_rows=1)
        ids = batch_turn_ids(batch.action)
        anchors = observation_anchors(ids, batch.ids, batch.present, batch.prompts)
        rows += credit_rows(ids, batch.groups, batch.turn_rewards, batch.outcome_rewards, anchors=anchors)
    found = [own for own in row_credit(rows, estimator).tokens if len(own)]
    assert_alike(found, native_advantages(rollouts, estimator))
    alone = np.concatenate(row_credit(rows[: len(halves[0])], estimator).tokens)
    assert not np.allclose(alone, np.concatenate(found)[: len(alone)])


def test_two_turns_of_one_rollout_differ():
    # tool 1 and 0 in the group: z = ±1/√2 · 1/(…+1e-4) on turn 1, outcome equal
    rows = [
        CreditRow(group="a", tokens=(2, 1), turn_rewards=({"tool": x}, {}), outcome_rewards={"exact": x})
        for x in (1.0, 0.0)
    ]
    credit = row_credit(rows, "mt-grpo")
    z = 0.5 / (np.sqrt(0.5) + 1e-4)
    assert_allclose(credit.turns, [[2 * z, z], [-2 * z, -z]])
    assert_allclose(credit.tokens[0], [2 * z, 2 * z, z])
    metrics = credit.metrics()
    assert metrics["turns"] == 2.0
    assert metrics["reward/tool"] == 0.5
    assert metrics["abs_advantage/turn_1"] == pytest.approx(2 * z)


def test_a_batch_of_padding_gets_nothing():
    turn_ids = batch_turn_ids(np.zeros((2, 3), int))
    credit = row_credit(credit_rows(turn_ids, ["a", "b"], [[], []], [{}, {}]), "mt-grpo")
    assert_array_equal(token_advantages(turn_ids, credit.tokens), np.zeros((2, 3)))
    assert credit.metrics() == {}


def test_options_reach_the_estimator():
    rollouts = awkward_rollouts()
    batch = padded_rollouts(rollouts)
    ids = batch_turn_ids(batch.action)
    rows = credit_rows(ids, batch.groups, batch.turn_rewards, batch.outcome_rewards)
    half = row_credit(rows, "mt-grpo", {"alpha": 0.5}).tokens
    assert_alike(list(half), native_advantages(rollouts, "mt-grpo", alpha=0.5))


def test_given_turn_ids_part_turns_that_touch():
    action = np.array([[1, 1, 1, 0]])
    assert_array_equal(batch_turn_ids(action), [[0, 0, 0, -1]])
    assert_array_equal(batch_turn_ids(action, [[0, 1, 1]]), [[0, 1, 1, -1]])
    assert_array_equal(batch_turn_ids(np.zeros((1, 4)), [[0, 1, 1]]), [[-1, -1, -1, -1]])  # masked out by the trainer
    with pytest.raises(InputError, match="row 0, token 2 has turn -1 and mask 1"):
        batch_turn_ids(action, [[0, 1]])
    with pytest.raises(InputError, match="without a gap"):
        batch_turn_ids(action, [[0, 2, 2]])


def test_dense_rewards_pay_turns_and_then_the_outcome():
    #                     turn 0      tool  turn 1   after
    turn_ids = np.array([[0, 0, -1, 1, 1, -1], [-1, 0, 0, 0, -1, -1]])
    rewards = np.array([[0.0, 0.2, 0.1, 0.0, 1.0, 2.0], [0.5, 0.0, 0.0, 1.0, 0.0, 0.0]])
    turns, outcomes = dense_rewards(turn_ids, rewards)
    assert turns == [[{"reward": pytest.approx(0.3)}, {}], [{}]]
    assert outcomes == [{"outcome": 3.0}, {"outcome": 1.5}]


def test_equal_observations_are_equal_anchors():
    turn_ids = np.array([[0, -1, 1, -1], [0, -1, 1, -1], [0, -1, -1, 1]])
    ids = np.array([[5, 7, 6, 9], [8, 7, 6, 9], [5, 7, 7, 6]])
    present = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    first, second, third = observation_anchors(turn_ids, ids, present, [(1, 2)] * 3)
    assert first == second
    assert first[0] == third[0]
    assert first[1] != third[1]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mt-grop", {}, "did you mean mt-grpo"),
        ("mt-grpo", {"beta": 1.0}, "which are alpha, ddof, eps; got 'beta'"),
        ("mt-grpo", {"alpha": 2.0}, "alpha must be in"),
        ("mt-ppo", {}, "needs its values"),
        ("mt-grpo-tree", {}, "needs trees"),
        ("rloo", {"whiten": True}, "whiten must go with"),
    ],
)
def test_what_cannot_be_used_is_said_before_any_work(name: str, options: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        check_estimator(name, options)


@pytest.mark.parametrize("name", [*WITHOUT_CRITIC, *WITH_CRITIC])
def test_what_can_be_used_passes_and_credits_every_token(name: str):
    check_estimator(name, {}, critic=True)
    rows = [
        CreditRow(
            group=0,
            tokens=(2, 1),
            turn_rewards=({"a": paid}, {}),
            outcome_rewards={"b": 1 - paid},
            anchors=("x", "y"),
            values=(0.0,) * 3,
        )
        for paid in (0.0, 1.0)
    ]
    assert np.isfinite(row_credit(rows, name).tokens).all(), "two rows of three tokens"


def test_turn_rewards_of_another_length_are_refused():
    with pytest.raises(InputError, match="row 0 has 1 turns in its mask; got rewards for 2"):
        credit_rows(np.array([[0, 0]]), ["a"], [[{}, {}]], [{}])


def test_rewards_that_do_not_suit_are_the_users():
    rows = [CreditRow(group=0, tokens=(1,), turn_rewards=({"a": float("inf")},), outcome_rewards={})]
    with pytest.raises(InputError, match="the batch must suit mt-grpo"):
        row_credit(rows, "mt-grpo")


# --------------------------------------------------------------------------------------------- the doctor


def test_the_doctor_stops_at_the_first_failure_and_says_what_to_run(monkeypatch, capsys):
    import importlib.metadata

    from turnwise.cli import main

    real = importlib.metadata.version

    def without(name: str) -> str:
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name in ("accelerate", "datasets") else real(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert main(["doctor", "trl"]) == 1
    said = capsys.readouterr().out
    assert said == 'FAILED  trl is not installed\nto mend it:  pip install "turnwise[trl]"\n'


def test_the_doctor_knows_its_trainers(capsys):
    from turnwise.cli import main

    assert main(["doctor", "trk"]) == 2
    assert "did you mean trl?" in capsys.readouterr().err


def test_a_release_out_of_range_is_a_finding(monkeypatch):
    import importlib.metadata

    from turnwise.adapters import trl_checks

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.29.1")
    assert trl_checks.releases().fix == 'pip install "trl>=1.8,<2"'
    assert "cannot read tool calls" in trl_checks.tool_parsing().what


def test_what_a_check_raises_is_a_finding():
    from turnwise.adapters.doctor import run_check

    def broken():
        """The batch is whole."""
        raise RuntimeError("no\nbatch")

    assert run_check(broken).what == "The batch is whole. Failed: RuntimeError: no batch"
