"""Tables and columns that are not what they must be, and keys of small integers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose, assert_array_equal

from turnwise import credit
from turnwise.credit import ESTIMATORS, TokenTable, TurnTable, turn_table
from turnwise.credit.table import check_flat, is_number, shown, whole_numbers


def columns(turns: int = 40, dtype: type = np.int64) -> dict[str, Any]:
    """Two groups of two rollouts; as many turns in each as a small integer times its group would not hold."""
    rollout = np.repeat(np.arange(4), turns)
    index = np.tile(np.arange(turns), 4)
    return {
        "rollout": rollout.astype(dtype),
        "index": index.astype(dtype),
        "group": np.repeat([3, 100], 2 * turns).astype(dtype),
        "turn_rewards": {"r": np.random.default_rng(0).normal(size=4 * turns)},
        "outcome_rewards": {"o": np.arange(4.0)},
        "anchor": (index % 7).astype(dtype),
        "node": (rollout * turns + index) if dtype == np.int64 else None,
        "tokens": (index + 1).astype(dtype),
    }


@pytest.mark.parametrize("name", ["mt-grpo", "gigpo", "hgpo", "turn-rloo", "reinforce++"])
def test_keys_of_eight_bits_give_the_same_advantages(name: str):
    wide, small = (TurnTable(**columns(dtype=each)) for each in (np.int64, np.int8))
    assert small.group.dtype == np.int64
    assert_array_equal(ESTIMATORS[name](small).advantages, ESTIMATORS[name](wide).advantages)


def test_keys_without_a_sign_are_kept_in_64_bits():
    for dtype in (np.uint8, np.uint64):
        found = whole_numbers("group", np.array([200, 3], dtype=dtype))
        assert found.dtype == np.int64
        assert found.tolist() == [200, 3]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (np.arange(2.0), "column 'key' must be a flat array of whole numbers; got float64"),
        (np.zeros((8, 1), dtype=int), r"column 'key' must be a flat array .* of shape \(8, 1\)"),
        (np.array(["a", "b"]), "column 'key' must be a flat array of whole numbers; got <U1"),
        (np.array([0, 2**63], dtype=np.uint64), "column 'key' must be of 64 signed bits; row 1 is 9223372036854775808"),
    ],
)
def test_keys_must_be_flat_and_whole(column: np.ndarray, words: str):
    with pytest.raises(ValueError, match=words):
        whole_numbers("key", column)


def test_rewards_and_values_must_be_flat_arrays_of_numbers():
    check_flat("r", np.array([True, False]))
    for bad in (np.zeros((8, 2)), np.array(["a"]), np.array([1j]), np.array([None])):
        with pytest.raises(ValueError, match="column 'r' must be a flat array of numbers; got"):
            check_flat("r", bad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": np.array([0, 0, 1e200, 0])}, r"'values' must be finite and within .*; row 2 is 1e\+200"),
        ({"bootstrap": np.array([0, np.nan, 0, 0])}, "'bootstrap' must be finite and within .*; row 1 is nan"),
    ],
)
def test_a_critics_values_are_bounded_as_rewards_are(change: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        TurnTable(**{**columns(turns=1), **change})


def two() -> TurnTable:
    """A rollout of two turns and one of one."""
    return turn_table([0, 0], [[{"r": 1.0}, {}], [{}]], [{"o": 1.0}, {}], tokens=[[1, 1], [2]])


def test_tokens_of_a_turn_table_must_be_whole_numbers_of_at_least_one():
    for bad in (0, 1.5, True, 2**70):
        with pytest.raises((ValueError, TypeCheckError), match=r"turn 1 has|(.|\n)*(tokens|entries)"):
            turn_table([0], [[{}, {}]], [{}], tokens=[[1, bad]])  # pyright: ignore[reportArgumentType]


def test_rewards_and_values_without_a_square_are_refused_with_their_row():
    with pytest.raises(ValueError, match=r"'r' of turn 1 is 1e\+200"):
        turn_table([0], [[{}, {"r": 1e200}]], [{}])
    with pytest.raises(ValueError, match=r"values must be finite and within .*; turn 1 has 1e\+200"):
        turn_table([0], [[{}, {}]], [{}], values=[[0.0, 1e200]])


def test_a_reward_is_a_real_number_of_any_kind_and_true_is_one():
    assert all(is_number(good) for good in (1, -2.5, np.float32(1), np.int8(1), True, np.True_))
    assert not any(is_number(bad) for bad in (10**400, 1j, np.complex64(1), float("nan"), None, "1"))
    assert shown(10**5000) == "a whole number of 16610 bits"


def test_a_token_table_names_the_token_whose_turn_does_not_exist_and_the_value_that_is_too_large():
    with pytest.raises(ValueError, match="0 to 2; token 3 names turn 7"):
        TokenTable(turns=two(), turn=np.array([0, 1, 2, 7]))
    values = np.array([0.0, np.nan, 0.0, 1e200])
    with pytest.raises(ValueError, match=r"policy wrote; token 3 has 1e\+200"):
        TokenTable(turns=two(), turn=np.array([0, -1, 1, 2]), values=values)
    with pytest.raises(ValueError, match="row 0, token 1 is not"):
        credit.padded_tokens(np.array([[0, 1]]), [0], values=np.array([[0.0, 1e200]]))


def test_masks_of_zeros_and_ones_of_any_dtype_number_turns():
    mask = np.array([[1, 1, 0, 1], [0, 1, 0, 0]])
    for dtype in (bool, np.int64, np.uint8, np.float32):
        assert credit.turn_ids_from_mask(mask.astype(dtype)).tolist() == [[0, 0, -1, 1], [-1, 0, -1, -1]]
    for bad in (mask * 2, np.where(mask, np.nan, 0.0)):
        with pytest.raises(ValueError, match=r"a mask must be \(B, T\) of 0 and 1"):
            credit.turn_ids_from_mask(bad)


TOKENS = TokenTable(turns=two(), turn=np.array([0, 1, 2, 2]))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: credit.broadcast(TOKENS, np.zeros(4)), r"advantages must have one entry per turn \(3\); got 4"),
        (lambda: credit.broadcast(TOKENS, np.array([0, np.nan, 0])), "turn 1 has nan"),
        (lambda: credit.turn_means(TOKENS, np.zeros(5)), r"tokens must have one entry per token \(4\); got 5"),
        (lambda: credit.whiten_tokens(TOKENS, np.zeros(5)), r"advantages must have one entry per token \(4\); got 5"),
        (lambda: credit.padded(np.zeros(1), np.array([[0, 1, -1]])), r"one entry per written token \(2\); got 1"),
        (
            lambda: credit.gae(np.zeros(3), np.zeros(3), np.array([0, 0, 1]), np.zeros(1), gamma=1.0, lam=1.0),
            r"bootstrap must have one entry per sequence \(2\); got 1",
        ),
        (
            lambda: credit.gae(np.zeros(2), np.array([0, np.nan]), np.zeros(2, int), np.zeros(1), gamma=1.0, lam=1.0),
            "values must be finite .*; step 1 has nan",
        ),
        (lambda: credit.diagnostics(two(), np.zeros(4)), r"advantages must have one entry per turn \(3\); got 4"),
        (lambda: credit.diagnostics(two(), np.array([0, 0, np.nan])), "advantages must be finite .*; turn 2 has nan"),
        (lambda: credit.probability_gain(np.zeros(4), two()), r"before must have one entry per turn \(3\); got 4"),
        (lambda: credit.probability_gain(np.array([0, -np.inf, 0]), two()), "turn 1 has -inf"),
        (lambda: credit.probability_gain(np.array([0, 0, 1000.0]), two()), "before must be log-prob.*; row 2 has 1000"),
    ],
)
def test_columns_of_other_lengths_and_what_is_not_finite_are_refused(made: Callable[[], Any], words: str):
    with pytest.raises(ValueError, match=words):
        made()


def test_values_of_states_must_be_one_per_rollout():
    tree = turn_table([0, 0], [[{}], [{}]], [{}, {}], nodes=[[0], [1]])
    for values in (credit.child_mean_values, credit.leaf_mean_values):
        with pytest.raises(ValueError, match=r"returns must have one entry per rollout \(2\); got 3"):
            values(tree, np.zeros(3))


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([["a"], ["a", "b"], ["a", "c"]], [1 / 3] * 3),  # a's draws: b, c and the first rollout's end
        ([["a"], ["a"], ["b"]], [1 / 4, 1 / 4, 1 / 2]),  # a and b are drawn, then a's two ends
        ([["a", "b"], ["a", "c"], ["d"]], [1 / 4, 1 / 4, 1 / 2]),
        ([["a"], ["a", "b", "c"], ["a", "b", "d"], ["e"]], [1 / 4, 1 / 8, 1 / 8, 1 / 2]),
    ],
)
def test_an_ending_is_a_draw_of_its_own_so_that_leaf_weights_sum_to_one(nodes: list, weights: list[float]):
    table = turn_table([0] * len(nodes), [[{}] * len(each) for each in nodes], [{}] * len(nodes), nodes=nodes)
    assert_allclose(credit.leaf_weights(table), weights)
    assert sum(weights) == 1


def test_slate_says_that_the_outcome_is_in_the_last_turn():
    tree = turn_table([0, 0], [[{}], [{}, {}]], [{"o": 1.0}, {"o": 0.0}], nodes=[["a"], ["a", "b"]])
    with pytest.raises(ValueError, match="agree in its reward, to which the outcome is added in a rollout's last turn"):
        credit.slate(tree)
