"""One number per rollout: worked numbers, and the identities between GRPO and its relatives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from turnwise.credit import (
    TurnTable,
    dr_grpo,
    gdpo,
    grpo_mr,
    grpo_or,
    informative,
    leave_one_out_mean,
    mt_grpo,
    mt_grpo_repo,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
    turn_table,
    whiten,
)


def table(groups, turns, outcomes, **columns) -> TurnTable:
    """A table of one turn component "r" and one outcome component "o"; None is absent."""
    return turn_table(
        groups,
        [[{} if r is None else {"r": r} for r in rewards] for rewards in turns],
        [{} if o is None else {"o": o} for o in outcomes],
        **columns,
    )


# Three rollouts of one question: merged rewards 1 + 2 = 3, 0 + 0 = 0, 3; outcomes 2, 0, 3. The last has one turn.
THREE = ([0, 0, 0], [[1.0, None], [0.0, None], [None]], [2.0, 0.0, 3.0])


@st.composite
def steps(draw) -> tuple[list[int], list[list[float]], list[float]]:
    """Groups, turn rewards and outcomes of ragged rollouts, rollouts of a group side by side."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    number = st.integers(-3, 3).map(float)
    turns = [draw(st.lists(number, min_size=1, max_size=4)) for _ in groups]
    return groups, turns, [draw(number) for _ in groups]


def test_dr_grpo_takes_off_the_mean():
    # mean of 3, 0, 3 is 2
    assert_allclose(dr_grpo(table(*THREE)).advantages, [1, 1, -2, -2, 1])
    # outcomes 2, 0, 3: mean 5/3
    assert_allclose(dr_grpo(table(*THREE), rewards="outcome").advantages, np.array([1, 1, -5, -5, 4]) / 3)


def test_rloo_takes_off_the_others_mean():
    # others of 3: 0 and 3, mean 1.5; others of 0: 3 and 3
    assert_allclose(rloo(table(*THREE)).advantages, [1.5, 1.5, -3, -3, 1.5])


def test_a_group_of_one_gets_nothing_from_rloo_or_its_reward():
    alone = table([0], [[1.0, 2.0]], [3.0])
    assert_allclose(rloo(alone).advantages, [0, 0])
    assert_allclose(rloo(alone, singleton="raw").advantages, [6, 6])
    with pytest.raises((ValueError, TypeCheckError), match=r"'zero'.*'raw'"):
        rloo(alone, singleton="one")  # pyright: ignore[reportArgumentType]


def test_reinforce_pp_whitens_over_the_step_by_tokens_or_by_rollouts():
    # two groups of one rollout each; rewards 1 and 0; 3 tokens against 1
    two = table([0, 1], [[None], [None]], [1.0, 0.0], tokens=[[3], [1]])
    # by rollouts: mean ½, variance (¼ + ¼) / 1
    assert_allclose(reinforce_pp(two, over="rollouts", eps=0.0).advantages, [np.sqrt(0.5), -np.sqrt(0.5)])
    # by tokens 1 1 1 0: mean ¾, variance (3/16 + 9/16) / 3 = ¼
    assert_allclose(reinforce_pp(two, eps=0.0).advantages, [0.5, -1.5])
    with pytest.raises(ValueError, match="needs the column 'tokens'"):
        reinforce_pp(table([0], [[None]], [1.0]))


def test_reinforce_pp_baseline_takes_off_the_groups_mean_first():
    # groups (4, 0) and (1, 1): centred 2 −2 0 0, mean 0, variance 8/3
    four = table([0, 0, 1, 1], [[None]] * 4, [4.0, 0.0, 1.0, 1.0])
    root = np.sqrt(8 / 3)
    found = reinforce_pp_baseline(four, over="rollouts", eps=0.0)
    assert_allclose(found.advantages, [2 / root, -2 / root, 0, 0])


def test_whitening_is_over_everything():
    assert_allclose(whiten(np.array([1.0, 2.0, 3.0]), eps=0.0), [-1, 0, 1])
    assert_allclose(whiten(np.full(3, 0.1)), 0)


def test_gdpo_normalises_every_component_on_its_own():
    # component a: 0, 2 → ∓√½; component b: 0, 200 → ∓√½ as well, though it is a hundred times larger; c: equal, 0
    made = turn_table([0, 0], [[{"c": 1.0}], [{"c": 1.0}]], [{"a": 0.0, "b": 200.0}, {"a": 2.0, "b": 0.0}])
    found = gdpo(made, eps=0.0)
    assert_allclose(found.streams["a"].advantage, [-np.sqrt(0.5), np.sqrt(0.5)])
    assert_allclose(found.streams["b"].advantage, [np.sqrt(0.5), -np.sqrt(0.5)])
    assert_allclose(found.advantages, [0, 0], atol=1e-12)  # they cancel
    assert_allclose(grpo_mr(made, eps=0.0).advantages, [np.sqrt(0.5), -np.sqrt(0.5)])  # here the larger one wins
    # weight 3 on a: −3√½ + √½ = −2√½ and +2√½; whitened over the two: ∓√½
    assert_allclose(gdpo(made, weights={"a": 3.0}, eps=0.0).advantages, [-np.sqrt(0.5), np.sqrt(0.5)])
    with pytest.raises(ValueError, match="must name reward components"):
        gdpo(made, weights={"d": 1.0})


def test_a_component_of_turns_and_outcome_is_one_component():
    made = turn_table([0, 0], [[{"x": 1.0}, {"x": 2.0}], [{}]], [{"x": 1.0}, {"x": 4.0}])
    assert_allclose(gdpo(made).streams["x"].value, [4, 4, 4])  # 1 + 2 + 1, and 4
    assert_allclose(gdpo(made).advantages, 0)


def test_groups_without_variance_are_not_informative():
    made = table([0, 0, 1, 1], [[1.0], [1.0], [0.0], [0.0]], [0.0, 1.0, 2.0, 2.0])
    assert informative(made).tolist() == [True, True, False, False]
    other = table([0, 0], [[1.0], [0.0]], [0.0, 1.0])  # turn reward and outcome make up for each other
    assert informative(other).tolist() == [False, False]
    assert informative(other, rewards="outcome").tolist() == [True, True]


def test_the_authors_code_gives_later_turns_the_outcome_and_loners_the_merged_score():
    # turn rewards summed 1, 0, 0: mean 1/3, std √((4/9 + 1/9 + 1/9)/2) = √(1/3): z = 2/√3, −1/√3, −1/√3
    # outcomes 2, 0, 3: mean 5/3, std √((1/9 + 25/9 + 16/9)/2) = √(7/3)
    # merged 3, 0, 3: mean 2, std √3: the loner gets 1/√3
    turn, outcome = np.array([2, -1]) / np.sqrt(3), np.array([1, -5]) / 3 / np.sqrt(7 / 3)
    found = mt_grpo_repo(table(*THREE), coef=2.0, eps=0.0).advantages
    expected = [outcome[0] + 2 * turn[0], outcome[0], outcome[1] + 2 * turn[1], outcome[1], 1 / np.sqrt(3)]
    assert_allclose(found, expected)


def test_paper_and_code_agree_for_two_turns_and_coefficient_one_alone():  # identity 6
    two = table([0, 0, 0], [[1.0, None], [0.0, None], [0.5, None]], [2.0, 0.0, 3.0])
    assert_allclose(mt_grpo_repo(two).advantages, mt_grpo(two).advantages)
    assert np.abs(mt_grpo_repo(two, coef=0.5).advantages - mt_grpo(two, alpha=0.5).advantages).max() > 0.1
    three = table([0, 0], [[1.0, 0.0, None], [0.0, 1.0, None]], [0.0, 1.0])
    assert np.abs(mt_grpo_repo(three).advantages - mt_grpo(three).advantages).max() > 0.1


@given(steps())
def test_rloo_dr_grpo_and_grpo_differ_by_a_factor_per_group(step):  # identity 16
    made = table(*step)
    sizes = np.bincount(made.rollout_group)[made.group]
    centred = dr_grpo(made).advantages
    assert_allclose(rloo(made).advantages * (sizes - 1), sizes * centred, atol=1e-9)
    streams = grpo_mr(made, eps=0.0).streams["trajectory"]
    same = np.abs(streams.advantage) > 1e-9
    ratio = centred[same] / streams.advantage[same]
    for group in np.unique(made.group[same]):
        assert np.ptp(ratio[made.group[same] == group]) < 1e-6  # the group's standard deviation
    first = np.append(True, np.diff(made.rollout) == 1)
    for advantages in (centred, rloo(made).advantages, grpo_or(made).advantages):
        assert_allclose(np.bincount(made.group[first], weights=advantages[first]), 0, atol=1e-9)


def test_other_eps_other_degrees_and_other_company_break_these_factors():  # identity 16, broken
    # outcomes 0 and 2: mean 1, std √2 (ddof 1) or 1 (ddof 0).  RLOO ∓2 = 2/1 · ∓1
    pair = table([0, 0], [[None], [None]], [0.0, 2.0])
    centred, sign = dr_grpo(pair).advantages, np.array([-1, 1])
    assert_allclose(rloo(pair).advantages, 2 * centred)
    assert_allclose(grpo_or(pair, eps=1.0).advantages, centred / (np.sqrt(2) + 1))
    assert_allclose(grpo_or(pair, eps=1.0, ddof=0).advantages, sign / 2)  # not 1/(√2 + 1)
    # whitened over the step, (4, 0) and (1, 1, 1): mean 7/5, so the group (1, 1, 1) sums to less than 0
    step = table([0, 0, 1, 1, 1], [[None]] * 5, [4.0, 0.0, 1.0, 1.0, 1.0])
    assert reinforce_pp(step, over="rollouts").advantages[2:].sum() < -0.5
    assert_allclose(rloo(step).advantages[2:].sum(), 0, atol=1e-12)


@given(steps())
def test_a_step_split_by_group_gives_the_same_within_groups(step):
    groups, turns, outcomes = step
    for estimator in (dr_grpo, rloo, mt_grpo_repo):
        whole = estimator(table(*step)).advantages
        parts = []
        for g in sorted(set(groups)):
            at = [i for i in range(len(groups)) if groups[i] == g]
            parts.append(estimator(table([g] * len(at), [turns[i] for i in at], [outcomes[i] for i in at])).advantages)
        assert_allclose(np.concatenate(parts), whole, atol=1e-12)


@given(steps(), st.randoms(use_true_random=False))
def test_the_order_of_rollouts_does_not_matter(step, random):
    groups, turns, outcomes = step
    order = list(range(len(groups)))
    random.shuffle(order)
    tokens = [[len(t) + k + 1 for k in range(len(t))] for t in turns]
    usual = table(groups, turns, outcomes, tokens=tokens)
    shuffled = table(
        *([column[i] for i in order] for column in (groups, turns, outcomes)), tokens=[tokens[i] for i in order]
    )
    for estimator in (dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, gdpo, mt_grpo_repo):
        by_rollout = np.split(estimator(usual).advantages, usual.last[:-1] + 1)
        expected = np.concatenate([by_rollout[i] for i in order])
        found = estimator(shuffled).advantages
        assert np.isfinite(found).all()
        assert_allclose(found, expected, atol=1e-9)


def test_what_is_left_out_is_left_out():
    values, keys = np.array([1.0, 2.0, 6.0, 5.0]), np.array([7, 7, 7, 8])
    assert_allclose(leave_one_out_mean(values, keys, alone=-1.0), [4, 3.5, 1.5, -1])
