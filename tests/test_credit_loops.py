"""Every estimator against its formula as loops, which the benchmark has, and what a calibrated reward pays."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from turnwise.credit import (
    ESTIMATORS,
    TOKEN_ESTIMATORS,
    TurnTable,
    calibrated_rewards,
    irc_hybrid,
    turn_means,
    turn_table,
)
from turnwise.credit.parts import numbered, sums_to_go


def benchmark():
    """benchmarks/credit.py as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / "credit.py"
    spec = importlib.util.spec_from_file_location("benchmark_credit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


LOOPS = benchmark()
STEPS = {ragged: LOOPS.make_table(48, seed=3, ragged=ragged) for ragged in (False, True)}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("ragged", [False, True])
def test_estimators_of_turns_are_their_formula_as_loops(name: str, ragged: bool):
    expected = LOOPS.flat(LOOPS.LOOPS[name](STEPS[ragged]))
    assert_allclose(ESTIMATORS[name](STEPS[ragged]).advantages, expected, rtol=1e-9, atol=1e-9)
    others = {other: estimate(STEPS[ragged]).advantages for other, estimate in ESTIMATORS.items() if other != name}
    near = [other for other, found in others.items() if np.allclose(found, expected, rtol=1e-9, atol=1e-9)]
    assert near == []  # the loops of one method do not fit another


@pytest.mark.parametrize("name", ESTIMATORS)
def test_single_precision_columns_are_computed_in_double(name: str):  # identity 33
    step = STEPS[True]

    def rounded(columns, kind):
        return {key: column.astype(np.float32).astype(kind) for key, column in columns.items()}

    found = []
    for kind in (np.float32, np.float64):
        assert step.values is not None
        found.append(
            ESTIMATORS[name](
                replace(
                    step,
                    turn_rewards=rounded(step.turn_rewards, kind),
                    outcome_rewards=rounded(step.outcome_rewards, kind),
                    values=step.values.astype(np.float32).astype(kind),
                )
            ).advantages
        )
    assert found[0].dtype == np.float64
    assert_allclose(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_estimators_of_tokens_are_their_formula_as_loops(name: str):
    tokens = LOOPS.tokens_of(STEPS[True], 7)
    assert_allclose(TOKEN_ESTIMATORS[name](tokens).advantages, LOOPS.loop_tokens(name, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("lengths", [[1], [64], [65], [128, 1, 200], [5000, 3], [4097]])
def test_long_sequences_are_summed_in_blocks_as_without(lengths: list[int], discount: float):
    steps = np.random.default_rng(0).normal(size=sum(lengths))
    expected = []
    for own in np.split(steps, np.cumsum(lengths)[:-1]):
        carry, out = 0.0, []
        for step in own[::-1]:
            carry = step + discount * carry
            out.append(carry)
        expected += out[::-1]
    assert_allclose(sums_to_go(steps, np.array(lengths), discount), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keys", [[5, -2, 5, 9], [2**62, -(2**63), 2**62, 0], [0, 0, 0, 0], [-7, -6, -7, -5]])
def test_numbers_are_small_and_equal_for_equal_keys_alone(keys: list[int]):
    numbers, count = numbered(np.array(keys))
    assert 0 <= numbers.min() <= numbers.max() < count <= 4 * len(keys)
    assert_array_equal(numbers[:, None] == numbers, np.array(keys)[:, None] == np.array(keys))


def test_the_mean_over_a_turns_tokens():
    # rewards 1 and 0, outcome 2; two tokens and one; values 0: to go 3 3 | 2, and values 1 and 3 off the first turn
    table = LOOPS.tokens_of(turn_table([0], [[{"r": 1.0}, {}]], [{"o": 2.0}]), 2)
    assert_allclose(turn_means(table, np.array([1.0, 3.0, 5.0, 5.0])), [2, 5])


# ------------------------------------------------------------------------- calibrated turn rewards


def calls() -> tuple[TurnTable, np.ndarray]:
    """Four rollouts of three turns: those that succeed have the good call, all have the idle one, two a fair one."""
    turns = [
        [{"good": 9.0}, {"idle": 9.0}, {"fair": 9.0}],
        [{"good": 9.0}, {"idle": 9.0}, {}],
        [{}, {"idle": 9.0}, {"fair": 9.0}],
        [{"bad": 9.0}, {"idle": 9.0}, {}],
    ]
    return turn_table([0] * 4, turns, [{"o": float(i < 2)} for i in range(4)]), np.array([1.0, 1.0, 0.0, 0.0])


def test_a_calibrated_reward_is_the_correlation_with_success():
    # of 12 turns 6 are in successful rollouts. good: 2 of them, both there: covariance 2/12 − (2/12)(6/12) = 1/12,
    # variances (1/6)(5/6) and 1/4: ρ = (1/12) / √(5/144) = 1/√5.  bad: 1 of the others: −(1/24) / √(11/576) = −1/√11
    table, success = calls()
    made = calibrated_rewards(table, success, irc_hybrid, alpha=2.0, delta=0.1, rounds=0)
    assert_allclose(made.turn_rewards["good"][0], 2 / np.sqrt(5))
    assert_allclose(made.turn_rewards["bad"][9], -2 / np.sqrt(11))
    assert_array_equal(made.turn_rewards["idle"][1::3], 0)  # everywhere, so it tells nothing
    assert_array_equal(made.turn_rewards["fair"][[2, 8]], 0)  # as often there as here
    for name, column in table.turn_rewards.items():
        assert_array_equal(np.isnan(made.turn_rewards[name]), np.isnan(column))
    strict = calibrated_rewards(table, success, irc_hybrid, alpha=2.0, delta=0.4, rounds=0)
    assert strict.turn_rewards["bad"][9] == 0  # |ρ| = .30 is not above .4
    assert strict.turn_rewards["good"][0] > 0


def test_a_reward_whose_turns_get_the_opposite_credit_is_taken_away():
    table, success = calls()

    def of_sign(sign: float):
        return lambda made: irc_hybrid(made) if sign > 0 else _flipped(made)

    kept = calibrated_rewards(table, success, of_sign(1.0), alpha=1.0, delta=0.0, rounds=3)
    assert kept.turn_rewards["good"][0] > 0
    gone = calibrated_rewards(table, success, of_sign(-1.0), alpha=1.0, delta=0.0, rounds=3)
    assert gone.turn_rewards["good"][0] == 0
    assert gone.turn_rewards["bad"][9] == 0


def _flipped(table: TurnTable):
    found = irc_hybrid(table)
    return type(found)(advantages=-found.advantages)


def test_calibration_refuses_what_is_no_success_and_what_is_out_of_range():
    table, success = calls()
    with pytest.raises(ValueError, match=r"rollout 1 has 0\.5"):
        calibrated_rewards(table, np.array([1, 0.5, 0, 0]), irc_hybrid, alpha=1.0, delta=0.1, rounds=1)
    for wrong in ({"delta": 1.5}, {"delta": -0.1}, {"rounds": -1}, {"alpha": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            calibrated_rewards(table, success, irc_hybrid, **{"alpha": 1.0, "delta": 0.1, "rounds": 1, **wrong})
