"""Turn rewards to advantages: worked numbers, and the identities between the estimators."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from turnwise.credit import (
    TurnTable,
    group_mean,
    group_std,
    grpo_mr,
    grpo_or,
    mt_grpo,
    reward_to_go,
    turn_index_keys,
    turn_table,
    z_score,
)

PAPERS_THREE = {"grpo-or": grpo_or, "grpo-mr": grpo_mr, "mt-grpo": mt_grpo}
ROOT_HALF = math.sqrt(0.5)


def table(groups, turns, outcomes) -> TurnTable:
    """A table of one turn component "r" and one outcome component "o"; None is absent."""
    return turn_table(
        groups,
        [[{} if r is None else {"r": r} for r in rewards] for rewards in turns],
        [{} if o is None else {"o": o} for o in outcomes],
    )


# Two rollouts of two turns: turn rewards 1 and 0, outcomes 0 and 2; and a second group alone.
#   turn stream     mean ½, std (ddof 1) √½:   z = ±½ / √½ = ±√½
#   outcome stream  mean 1, std √2:            z = ∓1 / √2 = ∓√½
PAIR = ([0, 0], [[1.0, None], [0.0, None]], [0.0, 2.0])


# ----------------------------------------------------------------------------- worked examples


def test_grpo_or_gives_the_outcome_z_score_to_every_turn():
    credit = grpo_or(table(*PAIR), eps=0.0)
    assert_allclose(credit.advantages, [-ROOT_HALF, -ROOT_HALF, ROOT_HALF, ROOT_HALF])
    assert_allclose(credit.streams["trajectory"].value, [0, 0, 2, 2])
    assert_allclose(credit.streams["trajectory"].baseline, [1, 1, 1, 1])


def test_grpo_mr_gives_the_merged_z_score_to_every_turn():
    # merged: 1 + 0 = 1 and 0 + 2 = 2; mean 1.5, std √½; z = ∓½/√½ = ∓√½
    credit = grpo_mr(table(*PAIR), eps=0.0)
    assert_allclose(credit.advantages, [-ROOT_HALF, -ROOT_HALF, ROOT_HALF, ROOT_HALF])
    assert_allclose(credit.streams["trajectory"].value, [1, 1, 2, 2])


def test_grpo_mr_discounts_per_turn():
    # γ = ½: turns 4, 4 and outcome 8 in the second turn: 4 + 4/2 + 8/2 = 10; a single turn: 1 + 3 = 4
    credit = grpo_mr(table([0, 0], [[4.0, 4.0], [1.0]], [8.0, 3.0]), gamma=0.5)
    assert_allclose(credit.streams["trajectory"].value, [10, 10, 4])


def test_mt_grpo_is_the_papers_form_for_two_turns():
    # A₁ = Aᴵ + α Aᴼ = ±√½ ∓ α √½,   A₂ = Aᴼ
    credit = mt_grpo(table(*PAIR), alpha=0.5, eps=0.0)
    half = ROOT_HALF / 2
    assert_allclose(credit.advantages, [half, -ROOT_HALF, -half, ROOT_HALF])
    assert_allclose(credit.streams["turn"].advantage, [ROOT_HALF, 0, -ROOT_HALF, 0])
    assert_allclose(credit.streams["turn"].baseline, [0.5, 0, 0.5, 0])
    assert_allclose(credit.streams["outcome"].advantage, np.repeat([-1, 1], 2) * ROOT_HALF)


def test_mt_grpo_in_a_ragged_group_credits_the_one_turn_with_both_streams():
    # Two callers with turn rewards 3 and 3, one that answers at once (absent, so 0); outcomes 0, 1, 2.
    #   turn 1: 3, 3, 0: mean 2, std √((1+1+4)/2) = √3:   z = 1/√3, 1/√3, −2/√3
    #   turn 2: 0, 0: no variance, 0
    #   outcome: mean 1, std 1:                           z = −1, 0, 1
    credit = mt_grpo(table([0] * 3, [[3.0, None], [3.0, None], [None]], [0.0, 1.0, 2.0]), eps=0.0)
    third = 1 / math.sqrt(3)
    assert_allclose(credit.advantages, [third - 1, -1, third, 0, -2 * third + 1], atol=1e-15)


def test_the_standard_deviation_has_ddof_one_and_eps_is_added_to_it():
    # values 0 and 2: std √2 (ddof 1) or 1 (ddof 0); eps 1 is added
    values, keys = np.array([0.0, 2.0]), np.array([0, 0])
    assert_allclose(z_score(values, keys, eps=1.0), [-1 / (1 + math.sqrt(2)), 1 / (1 + math.sqrt(2))])
    assert_allclose(z_score(values, keys, ddof=0, eps=0.0), [-1, 1])


def test_group_statistics_go_by_key():
    values, keys = np.array([1.0, 10.0, 3.0, 10.0, 7.0]), np.array([5, -2, 5, -2, 9])
    assert_allclose(group_mean(values, keys), [2, 10, 2, 10, 7])
    assert_allclose(group_std(values, keys, ddof=1), [math.sqrt(2), 0, math.sqrt(2), 0, 0])


def test_reward_to_go_discounts_once_per_turn():
    # discount ½, last turn's final 8: G₃ = 4 + 8 = 12, G₂ = 2 + 12/2 = 8, G₁ = 1 + 8/2 = 5; then 1 + 2 = 3
    rows = table([0, 0], [[1.0, 2.0, 4.0], [1.0]], [0.0, 0.0])
    out = reward_to_go(rows.turn_reward(), np.array([8.0, 2.0]), rows, discount=0.5)
    assert_allclose(out, [5, 8, 12, 3])


def test_statistics_do_not_cross_groups_even_where_their_numbers_are_far_apart():
    near = table([0, 0, 1, 1], [[1.0, None], [0.0]] * 2, [0.0, 1.0, 5.0, 9.0])
    far = table([2**62, 2**62, -(2**63), -(2**63)], [[1.0, None], [0.0]] * 2, [0.0, 1.0, 5.0, 9.0])
    for estimate in PAPERS_THREE.values():
        assert_allclose(estimate(near).advantages, estimate(far).advantages)


# ---------------------------------------------------------------------- unbiasedness, enumerated


def test_the_ragged_rule_is_unbiased_where_rollouts_stop_or_call():
    """All triples of a stop/call toy: the estimator's mean gradient is the true one.

    The policy calls with p = .6 and then answers rightly with q = .3. A call pays 1, a right answer 1, an
    answer without a call ½. With a huge eps a z-score is (x − mean)/eps, so that eps · G/(G−1) times
    mt_grpo is its form with leave-one-out means.
    """
    p, q, group_size, huge = 0.6, 0.3, 3, 1e12
    # (probability, turn rewards, outcome, ∂ log π of each turn by the logits of calling and of answering)
    paths = [
        (1 - p, [None], 0.5, [(-p, 0.0)]),
        (p * q, [1.0, None], 1.0, [(1 - p, 0.0), (0.0, 1 - q)]),
        (p * (1 - q), [1.0, None], 0.0, [(1 - p, 0.0), (0.0, -q)]),
    ]
    gradient = np.zeros(2)
    for triple in itertools.product(paths, repeat=group_size):
        rows = table([0] * group_size, [path[1] for path in triple], [path[2] for path in triple])
        advantages = mt_grpo(rows, eps=huge).advantages * huge * group_size / (group_size - 1)
        scores = np.array([score for path in triple for score in path[3]])
        gradient += math.prod(path[0] for path in triple) * advantages @ scores / group_size
    # J = p (1 + q) + (1 − p)/2:   ∂J = p(1−p)(1 + q − ½),  p q(1−q)
    assert_allclose(gradient, [0.24 * 0.8, 0.6 * 0.21], rtol=1e-9)


# --------------------------------------------------------------------------------- identities

rewards = st.sampled_from([-1.0, 0.0, 0.2, 0.5, 1.0])


@st.composite
def steps(draw, *, equal: bool = False, max_turns: int = 4):
    """Groups, turn rewards and outcomes of a step; with `equal`, all rollouts have as many turns.

    The last turn has no turn reward, as in the paper, where `equal`.
    """
    groups = draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
    num_turns = draw(st.integers(1, max_turns))
    maybe = rewards | st.none()
    turns, outcomes = [], []
    for _ in groups:
        length = num_turns if equal else draw(st.integers(1, max_turns))
        drawn = draw(st.lists(maybe, min_size=length, max_size=length))
        turns.append([*drawn[:-1], None] if equal else drawn)
        outcomes.append(draw(maybe))
    return groups, turns, outcomes


few = settings(max_examples=40)


@few
@given(steps(equal=True, max_turns=1), st.sampled_from([0.0, 0.5, 1.0]))
def test_mt_grpo_with_one_turn_is_grpo_or(step, alpha):  # identity 1
    rows = table(*step)
    assert_allclose(mt_grpo(rows, alpha=alpha).advantages, grpo_or(rows).advantages, atol=1e-12)


@few
@given(steps(equal=True), st.sampled_from([0.3, 1.0]))
def test_mt_grpo_with_equal_turn_rewards_is_grpo_or_discounted_from_the_end(step, alpha):  # identity 2
    groups, turns, outcomes = step
    rows = table(groups, [[0.7] * (len(t) - 1) + [None] for t in turns], outcomes)
    to_end = len(turns[0]) - 1 - rows.index
    assert_allclose(
        mt_grpo(rows, alpha=alpha).advantages,
        alpha**to_end * grpo_or(rows).advantages,
        atol=1e-12,
    )


def test_mt_grpo_is_not_grpo_or_where_turns_are_paid_unequally():  # identities 1 and 2, broken
    # z-scores of rewards 1, 0 are ±√½, of outcomes 0, 2 ∓√½: in sum 0, where GRPO-OR gives ∓√½
    one_turn = table([0, 0], [[1.0], [0.0]], [0.0, 2.0])
    assert_allclose(mt_grpo(one_turn, eps=0.0).advantages, [0, 0], atol=1e-12)
    assert_allclose(grpo_or(one_turn, eps=0.0).advantages, [-ROOT_HALF, ROOT_HALF])
    assert_allclose(mt_grpo(table(*PAIR), eps=0.0).advantages, [0, -ROOT_HALF, 0, ROOT_HALF], atol=1e-12)
    # equal rewards, but α = ½ and not 1: the first turn gets half of what the last one gets
    equal = table([0, 0], [[0.7, None]] * 2, [0.0, 2.0])
    expected = [-ROOT_HALF / 2, -ROOT_HALF, ROOT_HALF / 2, ROOT_HALF]
    assert_allclose(mt_grpo(equal, alpha=0.5, eps=0.0).advantages, expected)


@few
@given(steps(equal=True))
def test_mt_grpo_with_alpha_zero_gives_each_turn_only_its_own(step):  # identity 3
    rows = table(*step)
    credit = mt_grpo(rows, alpha=0.0)
    own = credit.streams["turn"].advantage.copy()
    own[rows.last] += credit.streams["outcome"].advantage[rows.last]
    assert_allclose(credit.advantages, own, atol=1e-12)
    assert_allclose(credit.advantages[rows.last], grpo_or(rows).advantages[rows.last], atol=1e-12)


def test_mt_grpo_with_alpha_above_zero_gives_a_turn_more_than_its_own():  # identity 3, broken
    # PAIR: the first turn's own is ±√½, half of the last one's ∓√½ is added
    first = mt_grpo(table(*PAIR), alpha=0.5, eps=0.0).advantages[[0, 2]]
    assert_allclose(first, [ROOT_HALF / 2, -ROOT_HALF / 2])


@few
@given(steps(equal=True), st.lists(rewards, min_size=40, max_size=40))
def test_with_equal_turns_the_last_advantage_does_not_depend_on_turn_rewards(step, others):  # identity 4
    groups, turns, outcomes = step
    changed = [[*others[4 * i : 4 * i + len(t) - 1], None] for i, t in enumerate(turns)]
    before, after = table(*step), table(groups, changed, outcomes)
    assert_allclose(mt_grpo(before).advantages[before.last], mt_grpo(after).advantages[after.last], atol=1e-12)


def test_with_unequal_turns_the_last_advantage_depends_on_turn_rewards():  # identity 4, broken
    # the second rollout answers at once: its last turn is its first, compared with a search that is paid 1 or -1
    for paid, sign in ((1.0, -1), (-1.0, 1)):
        ragged = table([0, 0], [[paid, None], [None]], [0.0, 0.0])
        assert_allclose(mt_grpo(ragged, eps=0.0).advantages[ragged.last], [0, sign * ROOT_HALF])


@few
@given(steps(), st.sampled_from([0.0, 0.4, 1.0]))
def test_mt_grpo_is_its_backward_recursion(step, alpha):  # identity 5
    rows = table(*step)
    credit = mt_grpo(rows, alpha=alpha)
    is_last = np.isin(np.arange(len(rows.rollout)), rows.last)
    after = np.where(is_last, credit.streams["outcome"].advantage, alpha * np.roll(credit.advantages, -1))
    assert_allclose(credit.advantages, credit.streams["turn"].advantage + after, atol=1e-12)


def test_the_backward_recursion_with_another_alpha_is_not_met():  # identity 5, broken
    # PAIR at α = ½: A₁ = ½√½ for the first rollout, and √½ − 1·√½ is 0
    credit = mt_grpo(table(*PAIR), alpha=0.5, eps=0.0)
    assert_allclose(credit.streams["turn"].advantage[0] + 1.0 * credit.advantages[1], 0, atol=1e-12)
    assert_allclose(credit.advantages[0], ROOT_HALF / 2)


@few
@given(steps(equal=True), st.sampled_from([0.5, 3.0]), st.sampled_from([-2.0, 0.5]))
def test_mt_grpo_ignores_positive_affine_maps_of_each_stream(step, scale, shift):  # identity 7
    groups, turns, outcomes = step
    full = [[r or 0.0 for r in t] for t in turns]  # absent and 0 differ under a shift
    whole = [o or 0.0 for o in outcomes]
    moved = table(groups, [[scale * r + shift for r in t] for t in full], [o / scale - shift for o in whole])
    assert_allclose(
        mt_grpo(moved, eps=1e-12).advantages,
        mt_grpo(table(groups, full, whole), eps=1e-12).advantages,
        atol=1e-6,
    )


def test_mt_grpo_does_not_ignore_a_negative_map_nor_any_map_at_a_large_eps():  # identity 7, broken
    # turn rewards 1, 0 become -1, 0: −√½ − √½ where it was √½ − √½
    turned = table([0, 0], [[-1.0, 0.0], [0.0, 0.0]], [0.0, 2.0])
    assert_allclose(mt_grpo(turned, eps=0.0).advantages[[0, 2]], [-2 * ROOT_HALF, 2 * ROOT_HALF])
    # eps 1: half a reward over √½ + 1, but one and a half over 3√½ + 1
    for scale in (1.0, 3.0):
        scaled = table([0, 0], [[scale, 0.0], [0.0, 0.0]], [0.0, 0.0])
        expected = scale / 2 / (scale * ROOT_HALF + 1)
        assert_allclose(mt_grpo(scaled, eps=1.0).advantages[[0, 2]], [expected, -expected])


def test_grpo_mr_ignores_a_common_map_but_not_one_of_a_single_stream():  # identity 7
    # merged 1 + 0, 0 + 2: the second is better; turn rewards times 4: 4 + 0, 0 + 2: the first is
    groups, _, outcomes = PAIR
    common = table(groups, [[3.0 + 1, None], [0.0 + 1, None]], [0.0 * 3, 2.0 * 3])
    single = table(groups, [[4.0, None], [0.0, None]], outcomes)
    usual = grpo_mr(table(*PAIR), eps=0.0).advantages
    assert_allclose(grpo_mr(common, eps=0.0).advantages, usual)
    assert_allclose(grpo_mr(single, eps=0.0).advantages, -usual)


@few
@given(steps(equal=True))
def test_grpo_mr_with_equal_turn_rewards_is_grpo_or(step):  # identity 7
    groups, turns, outcomes = step
    rows = table(groups, [[0.5] * (len(t) - 1) + [None] for t in turns], outcomes)
    assert_allclose(grpo_mr(rows).advantages, grpo_or(rows).advantages, atol=1e-10)


def test_grpo_mr_of_unequal_turns_feels_a_shift_and_equal_turn_rewards():  # identity 7, broken
    # two turns against one. Merged 1 and ½: the first is better; all turn rewards less 1: -1 and -½, the second is
    for shift, sign in ((0.0, 1), (-1.0, -1)):
        ragged = table([0, 0], [[1.0 + shift, 0.0 + shift], [0.0 + shift]], [0.0, 0.5])
        assert_allclose(grpo_mr(ragged, eps=0.0).advantages, sign * ROOT_HALF * np.array([1, 1, -1]))
    # turn rewards all ½, outcomes equal: merged 1 and ½ where GRPO-OR has nothing to compare
    equal = table([0, 0], [[0.5, 0.5], [0.5]], [0.0, 0.0])
    assert_allclose(grpo_mr(equal, eps=0.0).advantages, ROOT_HALF * np.array([1, 1, -1]))
    assert_allclose(grpo_or(equal, eps=0.0).advantages, 0)


@few
@given(steps(), st.sampled_from(sorted(PAPERS_THREE)), st.randoms(use_true_random=False))
def test_the_order_of_rollouts_and_the_names_of_groups_change_nothing(step, name, random):  # identity 31
    groups, turns, outcomes = step
    order = list(range(len(groups)))
    random.shuffle(order)
    renamed = {g: 7 - 3 * g for g in groups}
    rows = table(*step)
    shuffled = table([renamed[groups[i]] for i in order], [turns[i] for i in order], [outcomes[i] for i in order])
    parts = np.split(PAPERS_THREE[name](rows).advantages, rows.last[:-1] + 1)
    expected = np.concatenate([parts[i] for i in order])
    assert_allclose(PAPERS_THREE[name](shuffled).advantages, expected, atol=1e-12)


@pytest.mark.parametrize("name", sorted(PAPERS_THREE))
def test_outcomes_that_do_not_move_with_their_rollouts_change_advantages(name):  # identity 31, broken
    # rollouts exchanged, outcomes not: the parts, moved back, are not what they were
    groups, turns, outcomes = [0, 0], [[0.25], [0.0]], [0.0, 2.0]
    usual = PAPERS_THREE[name](table(groups, turns, outcomes)).advantages
    moved, half_moved = (
        PAPERS_THREE[name](table(groups, turns[::-1], found)).advantages[::-1] for found in (outcomes[::-1], outcomes)
    )
    assert_allclose(moved, usual)
    assert np.abs(half_moved - usual).max() > 0.5


@few
@given(steps(), st.sampled_from(sorted(PAPERS_THREE)), st.sampled_from([0, 1]), st.sampled_from([0.0, 1e-4]))
def test_advantages_are_finite_and_groups_of_one_get_exactly_zero(step, name, ddof, eps):  # identity 33
    rows = table(*step)
    advantages = PAPERS_THREE[name](rows, ddof=ddof, eps=eps).advantages
    assert np.isfinite(advantages).all()
    alone = np.bincount(rows.rollout_group, minlength=3)[rows.group] == 1
    assert (advantages[alone] == 0).all()


@pytest.mark.parametrize("name", sorted(PAPERS_THREE))
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_a_group_without_variance_gets_exactly_zero(name: str, size: int, eps: float):  # identity 33
    # 0.1 three times has a floating-point mean that is not 0.1; and a live group stands beside it
    rows = table([0] * size + [1, 1], [[0.1, None]] * size + [[1.0, None], [0.0, None]], [0.1] * size + [0.0, 3.0])
    advantages = PAPERS_THREE[name](rows, eps=eps).advantages
    assert (advantages[: 2 * size] == 0).all()
    assert (advantages[2 * size :] != 0).any()


def test_a_naive_z_score_of_equal_numbers_is_not_zero():  # identity 33, broken
    values = np.full(3, 0.1)
    centred = values - values.sum() / 3  # the sum is 0.30000000000000004
    assert (centred != 0).all()
    assert np.abs(centred / np.sqrt((centred**2).sum() / 2)).min() > 0.8  # at eps = 0 of the size of a true difference
    assert (z_score(values, np.zeros(3, dtype=np.int64), eps=0.0) == 0).all()


# ------------------------------------------------------------------------------------ the table


def test_a_missing_component_is_absent_in_the_table_and_adds_nothing():
    rows = turn_table([0, 0], [[{"a": 1.0}, {"b": 2.0}], [{"a": 0.0, "b": 3.0}]], [{"x": 1.0}, {}])
    assert_allclose(rows.turn_rewards["a"], [1, np.nan, 0])
    assert_allclose(rows.turn_rewards["b"], [np.nan, 2, 3])
    assert_allclose(rows.outcome_rewards["x"], [1, np.nan])
    assert_allclose(rows.turn_reward(), [1, 2, 3])
    assert_allclose(rows.outcome_reward(), [1, 0])


def test_the_table_knows_turns_rollouts_and_groups():
    rows = table([4, 4, 2], [[None, None], [None], [None, None, None]], [0.0, 0.0, 0.0])
    assert rows.rollout.tolist() == [0, 0, 1, 2, 2, 2]
    assert rows.index.tolist() == [0, 1, 0, 0, 1, 2]
    assert rows.group.tolist() == [4, 4, 4, 2, 2, 2]
    assert rows.last.tolist() == [1, 2, 5]
    assert rows.rollout_group.tolist() == [4, 4, 2]
    assert len(set(turn_index_keys(rows).tolist())) == 5  # (4,0) twice, (4,1), (2,0), (2,1), (2,2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": np.array([0, 2, 0])}, "row 1 is rollout 0, turn 2"),
        ({"rollout": np.array([0, 0, 2])}, "row 2 is rollout 2, turn 0"),
        ({"rollout": np.array([1, 1, 2])}, "row 0 is rollout 1"),
        ({"group": np.array([0, 1, 1])}, "row 1 changes it"),
        ({"turn_rewards": {"r": np.array([0.0, 1.0, np.inf])}}, "'r' is inf in row 2"),
        ({"outcome_rewards": {"o": np.zeros(3)}}, "'o' must have one entry per rollout"),
    ],
)
def test_a_broken_table_is_refused_with_the_row(change: dict, message: str):
    good = {
        "rollout": np.array([0, 0, 1]),
        "index": np.array([0, 1, 0]),
        "group": np.array([0, 0, 0]),
        "turn_rewards": {"r": np.zeros(3)},
        "outcome_rewards": {"o": np.zeros(2)},
    }
    TurnTable(**good)
    with pytest.raises(ValueError, match=message):
        TurnTable(**{**good, **change})


@pytest.mark.parametrize(
    ("groups", "turns", "outcomes", "message"),
    [
        ([0, 0], [[{}], []], [{}, {}], "rollout 1 has none"),
        ([0], [[{}], [{}]], [{}, {}], "got 1, 2 and 2"),
        ([0, 0], [[{}], [{"r": 1.0}, {"r": math.nan}]], [{}, {}], "'r' of turn 2 is nan"),
        ([0, 0], [[{}], [{}]], [{}, {"o": math.inf}], "'o' of rollout 1 is inf"),
        ([], [], [], "at least one turn"),
        ([0, 2**70], [[{}], [{}]], [{}, {}], "rollout 1 has 1180591620717411303424"),
        ([0, 2**63], [[{}], [{}]], [{}, {}], "rollout 1 has 9223372036854775808"),
    ],
)
def test_bad_rewards_are_refused_with_their_place(groups, turns, outcomes, message):
    with pytest.raises(ValueError, match=message):
        turn_table(groups, turns, outcomes)


def test_a_reward_that_is_none_is_refused_with_its_row():
    with pytest.raises((ValueError, TypeCheckError), match="None"):
        turn_table([0], [[{}, {"r": None}]], [{}])  # pyright: ignore[reportArgumentType]


def test_a_column_of_the_wrong_length_is_refused_not_broadcast():
    with pytest.raises(TypeCheckError):
        group_mean(np.zeros(3), np.zeros(1, dtype=int))
