"""Reward transforms and modulators: worked numbers, telescoping sums, invariances and controls."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from turnwise.credit import TurnTable, grpo_mr, grpo_or, mt_grpo, reward_to_go, turn_index_keys, turn_table
from turnwise.credit.modulators import agent_opsd, empg
from turnwise.credit.transforms import (
    alias_potential,
    information_gain,
    pay_at_the_end,
    potential_shaping,
    probability_gain,
    shuffle_across_rollouts,
    shuffle_in_rollouts,
    tips,
    with_turn_reward,
)


def table(groups, turns, outcomes, **columns) -> TurnTable:
    """A table of one turn component "r" and one outcome component "o"; None is absent."""
    return turn_table(
        groups,
        [[{} if r is None else {"r": r} for r in rewards] for rewards in turns],
        [{} if o is None else {"o": o} for o in outcomes],
        **columns,
    )


# Two rollouts of one question: three turns, and one turn that was cut off.
TWO = table([0, 0], [[None] * 3, [None]], [1.0, 0.0])

rewards = st.sampled_from([-1.0, 0.0, 0.1, 0.5, 1.0])
numbers = st.floats(-3, 3)
few = settings(max_examples=25)


@st.composite
def steps(draw) -> tuple[list[int], list[list[float | None]], list[float | None]]:
    """Groups, turn rewards and outcomes of ragged rollouts; None is absent."""
    groups = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
    turns = [draw(st.lists(rewards | st.none(), min_size=1, max_size=4)) for _ in groups]
    return groups, turns, [draw(rewards | st.none()) for _ in groups]


def column(draw_from: st.DataObject, length: int) -> np.ndarray:
    return np.array(draw_from.draw(st.lists(numbers, min_size=length, max_size=length)), dtype=float)


# ------------------------------------------------------------------------- potential-based shaping


def test_shaping_pays_the_gain_in_potential():
    # Φ = 1, 2, 4 then the end, 0:  γ = ½:  2/2 − 1, 4/2 − 2, 0 − 4;   cut off at Φ = 6: 6/2 − 3
    before, end = np.array([1.0, 2.0, 4.0, 3.0]), np.array([0.0, 6.0])
    assert_allclose(potential_shaping(before, TWO, end=end, gamma=0.5), [0, 0, -4, 0])
    assert_allclose(potential_shaping(before, TWO, end=end), [1, 2, -4, 3])
    assert_allclose(potential_shaping(before, TWO), [1, 2, -4, -3])  # both ended themselves


@few
@given(steps(), st.data(), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_discounted_shaping_sums_to_last_minus_first_potential(step, data, gamma):  # identity 27
    rows = table(*step)
    before, end = column(data, len(rows.rollout)), column(data, rows.num_rollouts)
    paid = potential_shaping(before, rows, end=end, gamma=gamma)
    total = np.bincount(rows.rollout, weights=gamma ** rows.index.astype(float) * paid)
    turns = np.bincount(rows.rollout).astype(float)
    assert_allclose(total, gamma**turns * end - before[rows.index == 0], atol=1e-12)


def test_shaping_with_another_discount_does_not_telescope():  # identity 27, broken
    before = np.array([1.0, 2.0, 4.0, 3.0])
    paid = potential_shaping(before, TWO, gamma=1.0)
    # with γ = ½ in the sum: 1 + 2/2 − 4/4 = 1, not −1
    assert_allclose((0.5 ** np.arange(3) * paid[:3]).sum(), 1)


# The policy calls with p = .6 and then answers rightly with q = .3, or answers at once. States: start, after the call.
# (probability, turns, outcome, ∂ log π of each turn by the logits of calling and of answering, potentials)
P, Q, GAMMA = 0.6, 0.3, 0.9
PATHS = [
    (1 - P, [None], 0.5, [(-P, 0.0)], [0.7]),
    (P * Q, [0.2, None], 1.0, [(1 - P, 0.0), (0.0, 1 - Q)], [0.7, -1.3]),
    (P * (1 - Q), [0.2, None], 0.0, [(1 - P, 0.0), (0.0, -Q)], [0.7, -1.3]),
]


def gradient(rows: TurnTable) -> np.ndarray:
    """E Σₖ γ^(k−1) Gₖ ∂ log π of the paths above."""
    chances = np.array([path[0] for path in PATHS])[rows.rollout]
    scores = np.array([score for path in PATHS for score in path[3]])
    returns = reward_to_go(rows.turn_reward(), rows.outcome_reward(), rows, discount=GAMMA)
    return (chances * GAMMA**rows.index * returns) @ scores


def test_shaping_leaves_the_expected_gradient_as_it_was():  # identity 27, and broken: a potential at the end
    rows = table([0] * 3, [path[1] for path in PATHS], [path[2] for path in PATHS])
    before = np.concatenate([path[4] for path in PATHS])
    plain = gradient(rows)
    # J = (1 − p)/2 + p (.2 + .9 q):   ∂J = p(1−p)(.2 + .27 − .5),  .9 p q(1−q)
    assert_allclose(plain, [0.24 * -0.03, 0.9 * 0.6 * 0.21])
    shaped = with_turn_reward(rows, "shaping", potential_shaping(before, rows, gamma=GAMMA))
    assert_allclose(gradient(shaped), plain, atol=1e-12)
    # broken: a potential that is not 0 where rollouts end themselves, and one that is not taken back at the end
    wrong = with_turn_reward(rows, "x", potential_shaping(before, rows, end=np.array([0.0, 1.0, 0.0]), gamma=GAMMA))
    assert np.abs(gradient(wrong) - plain).max() > 0.05
    kept = with_turn_reward(rows, "x", information_gain(before, rows))
    assert np.abs(gradient(kept) - plain).max() > 0.05


def test_a_new_turn_reward_must_have_a_new_name_and_the_right_length():
    rows = table([0], [[1.0, None]], [0.0])
    added = with_turn_reward(rows, "extra", np.array([np.nan, 2.0]))
    assert_allclose(added.turn_reward(), [1, 2])
    assert "extra" not in rows.turn_rewards
    with pytest.raises(ValueError, match="'r' must be new"):
        with_turn_reward(rows, "r", np.zeros(2))
    with pytest.raises(ValueError, match=r"one entry per turn \(2\); got 3"):
        with_turn_reward(rows, "extra", np.zeros(3))
    with pytest.raises(ValueError, match="turn 1 has inf"):
        with_turn_reward(rows, "extra", np.array([0.0, np.inf]))


# ----------------------------------------------------------------------------- information gain


def test_information_gain_is_the_rise_of_the_answers_log_probability():
    # before the turns −4, −3, −1: the calls raise it by 1 and 2, the answer is not paid; cut off at −2: 0.5
    before = np.array([-4.0, -3.0, -1.0, -2.5])
    assert_allclose(information_gain(before, TWO), [1, 2, np.nan, np.nan])
    assert_allclose(information_gain(before, TWO, end=np.array([np.nan, -2.0])), [1, 2, np.nan, 0.5])


def test_probability_gain_is_the_rise_of_the_probability():
    # probabilities ¼, ½, ¾ before the turns and ⅛, then ⅜ in the end
    before = np.log([0.25, 0.5, 0.75, 0.125])
    assert_allclose(probability_gain(before, TWO, end=np.log([np.nan, 0.375])), [0.25, 0.25, np.nan, 0.25])


@few
@given(steps(), st.data())
def test_information_gains_sum_to_last_minus_first_score_and_do_not_know_its_level(step, data):  # identity 28
    rows = table(*step)
    before, end = column(data, len(rows.rollout)), column(data, rows.num_rollouts)
    paid = information_gain(before, rows, end=end)
    first = before[rows.index == 0]
    assert_allclose(np.bincount(rows.rollout, weights=paid), end - first, atol=1e-12)
    assert_allclose(information_gain(before + 2, rows, end=end + 2), paid, atol=1e-12)
    without_answer = np.nan_to_num(information_gain(before, rows), nan=0.0)
    assert_allclose(np.bincount(rows.rollout, weights=without_answer), before[rows.last] - first, atol=1e-12)


def test_probability_gain_does_know_the_level_of_the_score():  # identity 28, broken
    before = np.log([0.25, 0.5, 0.75, 0.125])
    assert_allclose(probability_gain(before + math.log(2), TWO)[:2], [0.5, 0.5])


def test_tips_pays_a_fiftieth_of_the_gain_over_all_spellings():
    # spellings of probability ⅛ and ⅛, ½ and absent, ¼ and ¾:  Φ = log ¼, log ½, log 1
    logprobs = np.array([[-math.log(8), -math.log(8)], [-math.log(2), -np.inf], [math.log(0.25), math.log(0.75)]])
    potential = alias_potential(logprobs)
    assert_allclose(potential, [-math.log(4), -math.log(2), 0], atol=1e-12)
    rows = table([0], [[None] * 3], [1.0])
    assert_allclose(tips(potential, rows), [0.02 * math.log(2), 0.02 * math.log(2), np.nan])
    assert_allclose(tips(potential, rows, scale=1.0)[:2], information_gain(potential, rows)[:2])
    with pytest.raises(ValueError, match="state 1 has"):
        alias_potential(np.array([[0.0, 0.0], [-np.inf, -np.inf]]))


@pytest.mark.parametrize("transform", [potential_shaping, information_gain, tips])
def test_what_is_measured_in_states_must_be_complete(transform):
    with pytest.raises(ValueError, match=r"one entry per turn \(4\); got 3"):
        transform(np.zeros(3), TWO)
    with pytest.raises(ValueError, match="turn 2 has nan"):
        transform(np.array([0.0, 0.0, np.nan, 0.0]), TWO)
    with pytest.raises(ValueError, match=r"one entry per rollout \(2\); got 4"):
        transform(np.zeros(4), TWO, end=np.zeros(4))
    with pytest.raises(ValueError, match="rollout 1 has inf"):
        transform(np.zeros(4), TWO, end=np.array([0.0, np.inf]))


# ------------------------------------------------------------------------------------- controls


def test_shuffling_in_rollouts_reaches_every_order_and_leaves_the_answer_without():
    rows = table([0, 0], [[1.0, 2.0, 3.0, None], [7.0, None]], [0.0, 0.0])
    seen = set()
    for seed in range(200):  # six orders; one is missed with a chance of 6 · (5/6)^200 < 1e-14
        column = shuffle_in_rollouts(rows, np.random.default_rng(seed)).turn_rewards["r"]
        assert_allclose(column[3:], [np.nan, 7, np.nan])
        seen.add(tuple(column[:3]))
    assert len(seen) == 6


def test_shuffling_across_rollouts_swaps_at_one_turn_index_of_one_group():
    rows = table([0, 0, 1], [[1.0, 10.0, None], [2.0, 20.0], [3.0]], [0.0] * 3)
    seen = set()
    for seed in range(100):  # four arrangements; one is missed with a chance of 4 · (3/4)^100 < 1e-11
        seen.add(tuple(np.nan_to_num(shuffle_across_rollouts(rows, np.random.default_rng(seed)).turn_rewards["r"])))
    first = {(1, 10, 0, 2, 20, 3), (1, 20, 0, 2, 10, 3), (2, 10, 0, 1, 20, 3), (2, 20, 0, 1, 10, 3)}
    assert seen == first


def test_components_of_a_turn_move_together():
    rows = turn_table([0], [[{"a": 1.0, "b": 10.0}, {"a": 2.0}, {"b": 30.0}, {}]], [{}])
    seen = set()
    for seed in range(200):
        moved = shuffle_in_rollouts(rows, np.random.default_rng(seed)).turn_rewards
        seen.add(tuple(zip(np.nan_to_num(moved["a"]).tolist(), np.nan_to_num(moved["b"]).tolist(), strict=True)))
    assert seen == {(*order, (0, 0)) for order in itertools.permutations([(1, 10), (2, 0), (0, 30)])}


@few
@given(steps(), st.integers(0, 5))
def test_shuffles_keep_what_they_say_and_the_seed_says_which(step, seed):
    rows = table(*step)
    for shuffle, keys in ((shuffle_in_rollouts, rows.rollout), (shuffle_across_rollouts, turn_index_keys(rows))):
        made = shuffle(rows, np.random.default_rng(seed))
        again = shuffle(rows, np.random.default_rng(seed))
        for name, before in rows.turn_rewards.items():
            after = made.turn_rewards[name]
            assert (np.isnan(after) == np.isnan(before)).all()
            for key in set(keys.tolist()):
                assert sorted(np.nan_to_num(after[keys == key])) == sorted(np.nan_to_num(before[keys == key]))
            assert_allclose(again.turn_rewards[name], after)
        assert made.outcome_rewards is rows.outcome_rewards


def test_paying_at_the_end_moves_the_content():
    rows = turn_table(
        [0, 0, 0],
        [[{"a": 1.0, "x": 2.0}, {"a": 3.0}], [{"x": 4.0}], [{}]],
        [{"x": 10.0}, {}, {"y": 5.0}],
    )
    paid = pay_at_the_end(rows)
    assert paid.turn_rewards == {}
    assert_allclose(paid.outcome_rewards["a"], [4, np.nan, np.nan])
    assert_allclose(paid.outcome_rewards["x"], [12, 4, np.nan])
    assert_allclose(paid.outcome_rewards["y"], [np.nan, np.nan, 5])


@few
@given(steps())
def test_paying_at_the_end_is_what_grpo_mr_sees_anyway(step):
    rows = table(*step)
    paid = pay_at_the_end(rows)
    assert_allclose(grpo_mr(paid).advantages, grpo_mr(rows).advantages, atol=1e-9)
    assert_allclose(grpo_or(paid).advantages, grpo_mr(rows).advantages, atol=1e-9)


def test_paying_at_the_end_is_not_what_turn_credit_sees():
    # rewards 1, 0 of the first turns, outcomes equal: MT-GRPO credits the first turn alone, paid late also the second
    rows = table([0, 0], [[1.0, None], [0.0, None]], [0.0, 0.0])
    half = math.sqrt(0.5)
    assert_allclose(mt_grpo(rows, eps=0.0).advantages, [half, 0, -half, 0])
    assert_allclose(mt_grpo(pay_at_the_end(rows), eps=0.0).advantages, [half, half, -half, -half])


# ----------------------------------------------------------------------------------- modulators


def test_empg_weighs_sure_turns_more_and_pays_for_what_follows():  # identity 29, broken: κ and ζ above 0
    # entropies 1, 3, 2 and 3: h = 0, 1, ½, 1.   κ = log 4: exp(−κh) = 1, ¼, ½, ¼, mean ½: g = 2, ½, 1, ½
    # κ' = log 16: exp(−κ'h) = 1, 1/16, ¼, 1/16; the bonus is that of the next turn: 1/16, ¼, none, none
    entropies, advantages = np.array([1.0, 3.0, 2.0, 3.0]), np.array([1.0, 1.0, -1.0, 2.0])
    found = partial(empg, advantages, entropies, TWO, kappa=math.log(4), kappa_next=math.log(16), zeta=0.16, eps=0.0)
    raw = np.array([2 + 0.01, 0.5 + 0.04, -1, 1])
    assert_allclose(found(centre=False), raw)
    assert_allclose(found(), raw - 2.55 / 4)


@few
@given(steps(), st.data())
def test_empg_without_scale_and_bonus_changes_nothing_but_the_mean(step, data):  # identity 29
    rows = table(*step)
    advantages, entropies = column(data, len(rows.rollout)), np.abs(column(data, len(rows.rollout)))
    same = empg(advantages, entropies, rows, kappa=0.0, zeta=0.0, centre=False)
    assert_allclose(same, advantages, atol=1e-12)
    centred = empg(advantages, entropies, rows, kappa=0.0, zeta=0.0)
    assert_allclose(centred, advantages - advantages.mean(), atol=1e-12)
    equal = empg(advantages, np.full(len(entropies), 0.1), rows, zeta=0.0, centre=False)
    assert_allclose(equal, advantages, atol=1e-12)


def test_agent_opsd_moves_credit_to_turns_that_the_teacher_finds_helpful():
    # V₀ = ½; δ = log 3, −log 3, 0: V = ¾, ½, ½; q = ¼, −¼, 0: mean 0, std (ddof 1) ¼: z = 1, −1, 0
    # b = .2: m = 1.2, .8, 1 for A = 1.   The other rollout has one turn: m = 1
    evidence = np.array([math.log(3), -math.log(3), 0.0, 5.0])
    advantages, success = np.array([1.0, 1.0, 1.0, -1.0]), np.array([1.0, 0.0])
    full = agent_opsd(advantages, evidence, success, TWO, lam=1.0, eps=0.0)
    assert_allclose(full, [1.2, 0.8, 1, -1])
    assert_allclose(agent_opsd(advantages, evidence, success, TWO, lam=0.5, eps=0.0), [1.1, 0.9, 1, -1])
    # a bad advantage: the helpful turn is blamed less
    assert_allclose(agent_opsd(-advantages, evidence, success, TWO, lam=1.0, eps=0.0), [-0.8, -1.2, -1, 1])


def test_agent_opsd_is_bounded():
    # q = ¼, 0, 0: mean 1/12, std √((1/36 + 2/144)/2) = √3/12: z = 2/√3 and −1/√3: 1 + .2 · 1.15 is clipped to 1.2
    evidence = np.array([math.log(3), 0.0, 0.0, 0.0])
    found = agent_opsd(np.ones(4), evidence, np.array([1.0, 0.0]), TWO, lam=1.0, eps=0.0)
    assert_allclose(found, [1.2, 1 - 0.2 / math.sqrt(3), 1 - 0.2 / math.sqrt(3), 1])


def test_agent_opsd_takes_any_amount_of_evidence():
    # V = ½, 0, 1, 1: q = −½, 1, 0: mean 1/6, variance (16/36 + 25/36 + 1/36)/2 = 7/12
    found = agent_opsd(
        np.ones(4), np.array([-2000.0, 4000.0, 0.0, 0.0]), np.array([1.0, 0.0]), TWO, lam=1.0, bound=0.5, eps=0.0
    )
    std = math.sqrt(7 / 12)
    assert_allclose(found, [1 - 0.5 * 4 / 6 / std, 1.5, 1 - 0.5 / 6 / std, 1])


@few
@given(steps(), st.data(), st.sampled_from([0.1, 0.9]), st.sampled_from([0.2, 0.9]))
def test_agent_opsd_never_flips_a_sign_and_is_off_without_evidence_or_weight(step, data, lam, bound):  # identity 29
    rows = table(*step)
    turns = len(rows.rollout)
    advantages, evidence = column(data, turns), 300 * column(data, turns)
    wins = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=rows.num_rollouts, max_size=rows.num_rollouts))
    success = np.array(wins)
    found = agent_opsd(advantages, evidence, success, rows, lam=lam, bound=bound)
    assert np.isfinite(found).all()
    assert (np.sign(found) == np.sign(advantages)).all()
    for off in (
        agent_opsd(advantages, evidence, success, rows, lam=0.0),
        agent_opsd(advantages, np.zeros(turns), success, rows, lam=lam),
        agent_opsd(advantages, evidence, np.ones(rows.num_rollouts), rows, lam=lam),
        agent_opsd(advantages, evidence, np.zeros(rows.num_rollouts), rows, lam=lam),
    ):
        assert_allclose(off, advantages, rtol=1e-12, atol=1e-12)


def test_agent_opsd_with_a_bound_of_one_may_lose_a_sign():  # identity 29, broken
    # z = 1, −1, 0 as worked above; b = 1, λ = 1: factors 2, 0, 1
    evidence = np.array([math.log(3), -math.log(3), 0.0, 5.0])
    found = agent_opsd(np.ones(4), evidence, np.array([1.0, 0.0]), TWO, lam=1.0, bound=1.0, eps=0.0)
    assert_allclose(found, [2, 0, 1, 1], atol=1e-12)


@few
@given(steps(), st.data(), st.randoms(use_true_random=False))
def test_modulators_do_not_depend_on_the_order_of_rollouts(step, data, random):
    rows = table(*step)
    turns = len(rows.rollout)
    advantages, known = column(data, turns), column(data, turns)
    success = (np.arange(rows.num_rollouts) % 2).astype(float)
    order = list(range(rows.num_rollouts))
    random.shuffle(order)
    to = np.concatenate([np.flatnonzero(rows.rollout == i) for i in order])
    lengths = np.bincount(rows.rollout)
    renamed = table(rows.rollout_group[order].tolist(), [[None] * lengths[i] for i in order], [None] * len(order))
    for before, after in (
        (empg(advantages, known, rows), empg(advantages[to], known[to], renamed)),
        (
            agent_opsd(advantages, known, success, rows, lam=0.5),
            agent_opsd(advantages[to], known[to], success[order], renamed, lam=0.5),
        ),
    ):
        assert_allclose(after, before[to], atol=1e-9)


def test_modulators_say_which_row_is_broken():
    good = np.zeros(4)
    bad = np.array([0.0, np.nan, 0.0, 0.0])
    for call in (lambda x: empg(good, x, TWO), lambda x: agent_opsd(good, x, np.zeros(2), TWO, lam=0.5)):
        with pytest.raises(ValueError, match="turn 1 has nan"):
            call(bad)
    with pytest.raises(ValueError, match=r"advantages must have one entry per turn \(4\); got 3"):
        empg(good[:3], good[:3], TWO)
    with pytest.raises(ValueError, match=r"success must be in \[0, 1\]; rollout 1 has 2\.0"):
        agent_opsd(good, good, np.array([0.0, 2.0]), TWO, lam=0.5)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]; got 1\.5"):
        agent_opsd(good, good, np.zeros(2), TWO, lam=1.5)
