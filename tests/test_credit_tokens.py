"""Padded arrays to tables and back, tokens' weights, and the diagnostics of a step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose, assert_array_equal

from turnwise.credit import (
    broadcast,
    diagnostics,
    loss_weights,
    mt_grpo,
    padded,
    padded_tokens,
    token_table,
    turn_ids_from_mask,
    turn_table,
)

NONE = np.nan
#            turn 0  reply  turn 1        padding
ROW = [0, 0, -1, -1, 1, -1]
#      padding  turn 0
OTHER = [-1, -1, -1, 0, 0, 0]
IDS = np.array([ROW, OTHER])


def test_turns_are_the_runs_of_sampled_tokens():
    mask = np.array([[1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1]], dtype=bool)
    assert_array_equal(turn_ids_from_mask(mask), IDS)


def test_padded_arrays_become_the_tables():
    rewards = np.array([[0, 0.5, NONE, NONE, NONE, NONE], [NONE, NONE, NONE, 0.25, NONE, 1.0]])
    made = padded_tokens(IDS, [7, 7], turn_rewards={"r": rewards}, outcome_rewards={"o": np.array([1.0, 0.0])})
    assert_array_equal(made.turns.rollout, [0, 0, 1])
    assert_array_equal(made.turns.index, [0, 1, 0])
    assert_array_equal(made.turns.group, [7, 7, 7])
    assert_array_equal(made.turns.tokens, [2, 1, 3])
    assert_array_equal(made.turns.turn_rewards["r"], [0.5, NONE, 1.25])  # turn 1 has no such reward, which is not 0
    assert_array_equal(made.turn, [0, 0, 1, 2, 2, 2])
    assert_array_equal(made.last, [1, 2, 5])


def test_rewards_on_environment_tokens_count_for_the_turn_before():  # identity 32
    for place, turn in ((2, 0), (3, 0), (5, 1)):
        rewards = np.full(IDS.shape, NONE)
        rewards[0, place] = 3.0
        found = padded_tokens(IDS, [0, 0], turn_rewards={"r": rewards}).turns.turn_rewards["r"]
        assert_array_equal(found, np.where(np.arange(3) == turn, 3.0, NONE))
    early = np.full(IDS.shape, NONE)
    early[1, 0] = 2.0  # before the first turn: it must not be lost either
    assert padded_tokens(IDS, [0, 0], turn_rewards={"r": early}).turns.turn_rewards["r"][2] == 2.0


def test_the_side_of_padding_does_not_matter():  # identity 31, and broken: values that stay
    left = np.array([[-1, *ROW[:-1]], OTHER])
    right = np.array([ROW, [0, 0, 0, -1, -1, -1]])
    values = np.arange(12.0).reshape(2, 6)
    moved = np.array([np.roll(values[0], 1), values[1]])
    moved_right = np.array([values[0], np.roll(values[1], -3)])
    usual, other, third = (
        padded_tokens(ids, [0, 0], values=v) for ids, v in ((IDS, values), (left, moved), (right, moved_right))
    )
    assert_array_equal(usual.values, [0, 1, 4, 9, 10, 11])
    for table in (other, third):
        assert_array_equal(table.turn, usual.turn)
        assert_array_equal(table.values, usual.values)
    stayed = padded_tokens(left, [0, 0], values=values)  # the tokens moved, their values did not
    assert_array_equal(stayed.values, [1, 2, 5, 9, 10, 11])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[0, 2]], "row 0 has turn 2 at token 1 after turn 0"),
        ([[0, 1], [1, 0]], "row 1 has turn 1 at token 0 after turn -1"),
        ([[0, 1, 0]], "row 0 has turn 0 at token 2 after turn 1"),
        ([[0, 0], [-1, -1]], "at least one turn; row 1 has none"),
    ],
)
def test_turns_out_of_order_are_refused(ids: list[list[int]], words: str):
    with pytest.raises(ValueError, match=words):
        padded_tokens(np.array(ids), [0] * len(ids))


def test_arrays_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one group per row"):
        padded_tokens(IDS, [0])
    with pytest.raises((ValueError, TypeCheckError), match=r"\(2, 5\)|2,5"):
        padded_tokens(IDS, [0, 0], turn_rewards={"r": np.zeros((2, 5))})
    values = np.zeros(IDS.shape)
    values[0, 2] = NONE  # not written by the policy: no matter
    assert padded_tokens(IDS, [0, 0], values=values).values is not None
    values[0, 4] = NONE
    with pytest.raises(ValueError, match="row 0, token 4 is not"):
        padded_tokens(IDS, [0, 0], values=values)


def test_tokens_get_their_turns_advantage_and_others_exactly_zero():  # identity 32
    made = padded_tokens(IDS, [0, 0])
    tokens = broadcast(made, np.array([0.5, -1.0, 2.0]))
    assert_array_equal(tokens, [0.5, 0.5, -1, 2, 2, 2])
    assert_array_equal(padded(tokens, IDS), [[0.5, 0.5, 0, 0, -1, 0], [0, 0, 0, 2, 2, 2]])


def test_weights_of_tokens():
    made = padded_tokens(IDS, [0, 0])  # turns of 2, 1 and 3 tokens; rollouts of 3 and 3
    assert_allclose(loss_weights(made, "token-mean"), 1 / 6)
    assert_allclose(loss_weights(made, "sequence-mean"), 1 / 6)
    assert_allclose(loss_weights(made, "turn-mean"), np.array([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3]) / 3)
    assert_allclose(loss_weights(made, "constant", length=10), 1 / 20)
    with pytest.raises(ValueError, match="needs a length >= 1, tokens; got None"):
        loss_weights(made, "constant")


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(-5, 5)), min_size=1, max_size=4), min_size=1, max_size=5)
)
def test_token_mean_weighs_turns_by_length_and_turn_mean_does_not(rollouts):  # identity 35
    turns = turn_table(
        [0] * len(rollouts),
        [[{} for _ in turns] for turns in rollouts],
        [{} for _ in rollouts],
        tokens=[[n for n, _ in turns] for turns in rollouts],
    )
    made = token_table(turns)
    lengths = np.array([n for turns in rollouts for n, _ in turns])
    advantages = np.array([float(a) for turns in rollouts for _, a in turns])
    tokens = broadcast(made, advantages)
    by_length = np.average(advantages, weights=lengths)
    assert_allclose((loss_weights(made, "token-mean") * tokens).sum(), by_length, atol=1e-12)
    assert_allclose((loss_weights(made, "turn-mean") * tokens).sum(), advantages.mean(), atol=1e-12)
    for aggregation in ("token-mean", "sequence-mean", "turn-mean"):
        assert_allclose(loss_weights(made, aggregation).sum(), 1)


def test_the_two_means_differ_where_turns_differ_in_length():  # identity 35, broken
    # 1 at a turn of one token, -1 at a turn of three: (1 − 3)/4 and (1 − 1)/2
    made = token_table(turn_table([0], [[{}, {}]], [{}], tokens=[[1, 3]]))
    tokens = broadcast(made, np.array([1.0, -1.0]))
    found = [(loss_weights(made, name) * tokens).sum() for name in ("token-mean", "turn-mean")]
    assert_allclose(found, [-0.5, 0], atol=1e-12)


def test_diagnostics_by_hand():
    # group 0: two rollouts that differ; group 1: two alike; group 2: alone
    table = turn_table(
        [0, 0, 1, 1, 2],
        [[{"r": 1.0}, {}], [{"r": 0.0}, {}], [{"r": 1.0}], [{"r": 1.0}], [{"r": 1.0}]],
        [{"o": 0.0}, {"o": 3.0}, {"o": 1.0}, {"o": 1.0}, {"o": 0.0}],
        tokens=[[1, 4], [1, 4], [2], [2], [9]],
    )
    found = diagnostics(table, np.array([-1.0, 0.0, 2.0, 1.0, 0, 0, 0]))
    assert_allclose(found["zero_variance_groups"], 2 / 3)
    assert_allclose(found["singleton_groups"], 1 / 3)
    assert_allclose(found["dead_groups"], 2 / 3)
    assert_allclose(found["dead_turns"], 4 / 7)
    assert found["sign_mismatch"] == 1.0  # one turn has a reward and an advantage: 1 and -1
    assert_allclose(found["effective_sample_size"], 16 / 6 / 7)  # (1 + 2 + 1)² / (1 + 4 + 1), of seven turns
    assert_allclose(found["abs_advantage/turn_1"], 3 / 5)
    assert_allclose(found["abs_advantage/turn_2"], 1 / 2)
    # shorter half: tokens 1, 1, 2 with |A| 1, 2, 0 → 3 of 1·1 + 2·1 + 1·4 = 7
    assert_allclose(found["weight/short_turns"], 3 / 7)


def test_a_dead_step_has_diagnostics_without_nan():
    table = turn_table([0, 0], [[{"r": 1.0}], [{"r": 1.0}]], [{}, {}], tokens=[[1], [1]])
    found = diagnostics(table, mt_grpo(table).advantages)
    assert all(np.isfinite(value) for value in found.values())
    assert found["dead_turns"] == 1.0
    assert found["effective_sample_size"] == 0.0
