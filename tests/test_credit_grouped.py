"""Turns against turns like them: worked numbers, identities, and what is unbiased, by enumeration."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from turnwise.credit import (
    Credit,
    TurnTable,
    dr_grpo,
    group_mean,
    grpo_mr,
    grpo_or,
    leave_one_out_mean,
    reward_to_go,
    rloo,
    turn_index_keys,
    turn_table,
)
from turnwise.credit.grouped import anchor_keys, gagpo, gigpo, gtpo, hgpo, hgpo_code, irc_hybrid, matchtir, turn_rloo

ROOT_HALF = math.sqrt(0.5)


def table(groups, turns, outcomes, anchors=None, **columns) -> TurnTable:
    """A table of one turn component "r" and one outcome component "o"; None is absent."""
    return turn_table(
        groups,
        [[{} if r is None else {"r": r} for r in rewards] for rewards in turns],
        [{} if o is None else {"o": o} for o in outcomes],
        anchors=anchors,
        **columns,
    )


def returns(rows: TurnTable, gamma: float = 1.0) -> np.ndarray:
    return reward_to_go(rows.turn_reward(), rows.outcome_reward(), rows, discount=gamma)


# ------------------------------------------------------------------- worked examples, by turn index

# γ = ½.  First: G₂ = 2, G₁ = 1 + 2/2 = 2.  Second: G₃ = 4, G₂ = 2, G₁ = 1.
#   turn 1: 2 and 1, mean 1½, std √½: z = ±½/√½ = ±√½;   turn 2: 2 and 2: 0;   turn 3: alone, 0
RAGGED = ([0, 0], [[1.0, None], [None, None, None]], [2.0, 4.0])


def test_turn_rloo_compares_with_the_others_that_came_as_far():
    # G: 3 2 | 2 2 1 | 4
    #   turn 1: 3 − (2+4)/2 = 0;  2 − (3+4)/2 = −1½;  4 − (3+2)/2 = 1½.   turn 2: 2 − 2 = 0, twice
    #   turn 3: nobody else; the others ended with 2 and 4: 1 − 3 = −2
    rows = table([0] * 3, [[1.0, None], [0.0, 1.0, None], [None]], [2.0, 1.0, 4.0])
    credit = turn_rloo(rows)
    assert_allclose(credit.streams["turn"].value, [3, 2, 2, 2, 1, 4])
    assert_allclose(credit.streams["turn"].baseline, [3, 2, 3.5, 2, 3, 2.5])
    assert_allclose(credit.advantages, [0, 0, -1.5, 0, -2, 1.5])


def test_turn_rloo_discounts_per_turn_and_gives_a_lone_rollout_its_returns():
    # γ = ½: 1, 1 + 0, then 4: G₃ = 4, G₂ = 2 + 4/2 = 4, G₁ = 1 + 4/2 = 3
    assert_allclose(turn_rloo(table([7], [[1.0, 2.0, None]], [4.0]), gamma=0.5).advantages, [3, 4, 4])


def test_gtpo_is_the_z_score_of_the_return_at_the_turns_index():
    credit = gtpo(table(*RAGGED), gamma=0.5, eps=0.0)
    assert_allclose(credit.streams["turn"].value, [2, 2, 1, 2, 4])
    assert_allclose(credit.streams["turn"].baseline, [1.5, 2, 1.5, 2, 4])
    assert_allclose(credit.advantages, [ROOT_HALF, 0, -ROOT_HALF, 0, 0])


def test_matchtir_is_half_the_rollouts_and_half_the_turns():
    # rollouts: 3 and 4, undiscounted: ∓√½
    credit = matchtir(table(*RAGGED), gamma=0.5, eps=0.0)
    half = ROOT_HALF / 2
    assert_allclose(credit.streams["trajectory"].value, [3, 3, 4, 4, 4])
    assert_allclose(credit.advantages, [0, -half, 0, half, half], atol=1e-15)


def test_the_hybrid_adds_some_of_the_outcome():
    # outcomes 2 and 4: ∓√½, times 0.3
    credit = irc_hybrid(table(*RAGGED), gamma=0.5, eps=0.0)
    assert_allclose(credit.advantages, np.array([0.7, -0.3, -0.7, 0.3, 0.3]) * ROOT_HALF)
    assert_allclose(credit.streams["outcome"].value, [2, 2, 4, 4, 4])


def test_the_published_discounts_are_the_defaults():
    rows = table(*RAGGED, anchors=[["s", "t"], ["s", "s", "t"]])
    for estimate, gamma in ((gtpo, 0.9), (matchtir, 0.9), (irc_hybrid, 0.9), (gigpo, 0.95), (hgpo, 0.95)):
        assert_allclose(estimate(rows).advantages, estimate(rows, gamma=gamma).advantages)
        assert not np.allclose(estimate(rows).advantages, estimate(rows, gamma=0.2).advantages)


# ----------------------------------------------------------------- worked examples, by anchor state

# γ = ½.  First, s then t, outcome 2: G = 1, 2.  Second, s, s, t, outcome 0: G = 0, 0, 0.
#   state s: 1, 0, 0, mean ⅓;  state t: 2, 0, mean 1.   Rollouts: 2 and 0, mean 1
VISITS = ([0, 0], [[None, None], [None] * 3], [2.0, 0.0], [["s", "t"], ["s", "s", "t"]])


def test_anchor_keys_look_back_within_the_rollout():
    rows = table(
        [0, 0, 1], [[None] * 4, [None] * 3, [None] * 2], [None] * 3, [["a", "b", "a", "b"], ["c", "a", "b"], ["a", "b"]]
    )
    a, b, a2, b2, c, a3, b3, other_a, other_b = anchor_keys(rows).tolist()
    assert a == a2 == a3
    assert b == b2 == b3
    assert len({a, b, c, other_a, other_b}) == 5  # another group has its own
    keys = anchor_keys(rows, history=1)
    # with the state before:  -  ab  ba  ab | -  ca  ab | -  ab (of the other group)
    assert keys[1] == keys[3] == keys[6]
    assert len(set(keys.tolist())) == 7
    assert (keys < 0).tolist() == [True, False, False, False, True, False, False, True, False]
    assert len(set(anchor_keys(rows, history=2).tolist())) == 9  # aba bab, cab
    with pytest.raises(ValueError, match="history must be a whole number >= 0 and finite; got -1"):
        anchor_keys(rows, history=-1)


def test_gigpo_adds_what_the_state_says_to_what_the_rollout_says():
    credit = gigpo(table(*VISITS), gamma=0.5, scale="one")
    assert_allclose(credit.streams["turn"].baseline, [1 / 3, 1, 1 / 3, 1 / 3, 1])
    assert_allclose(credit.streams["turn"].advantage, [2 / 3, 1, -1 / 3, -1 / 3, -1])
    assert_allclose(credit.advantages, [5 / 3, 2, -4 / 3, -4 / 3, -2])
    assert_allclose(gigpo(table(*VISITS), gamma=0.5, scale="one", omega=3.0).advantages, [3, 4, -2, -2, -4])


def test_gigpo_divides_by_the_standard_deviation():
    # ddof 0.  rollouts: std 1: ±1;  state t: std 1: ±1;  state s: variance ⅓·⅔ = 2/9, std √2/3: √2, −√½, −√½
    credit = gigpo(table(*VISITS), gamma=0.5, ddof=0, eps=0.0)
    r = ROOT_HALF
    assert_allclose(credit.advantages, [1 + 2 * r, 2, -1 - r, -1 - r, -2])


def test_gigpo_without_own_visits_compares_with_other_rollouts_alone():
    # s: first against 0, 0; second against 1, both times.  t: 2 against 0 and 0 against 2
    credit = gigpo(table(*VISITS), gamma=0.5, scale="one", own=False)
    assert_allclose(credit.streams["turn"].baseline, [0, 0, 1, 1, 2])
    assert_allclose(credit.streams["turn"].advantage, [1, 2, -1, -1, -2])


def test_what_a_state_of_one_visitor_gives_is_a_choice():
    # the second rollout is in u twice, then in t: with own visits u is a group of two (2, 4), without it is none
    rows = table([0, 0], [[None], [2.0, None, None]], [1.0, 4.0], [["t"], ["u", "u", "t"]])

    def turn(**choice) -> np.ndarray:
        return gigpo(rows, gamma=1.0, scale="one", **choice).streams["turn"].advantage

    assert_allclose(turn(), [-1.5, 1, -1, 1.5])
    assert_allclose(turn(singleton="raw"), [-1.5, 1, -1, 1.5])
    assert_allclose(turn(own=False), [-3, 0, 0, 3])
    assert_allclose(turn(own=False, singleton="raw"), [-3, 6, 4, 3])


# Three rollouts in t, two of them from s; outcomes 4, 2, 0; γ = 1; the first turns: s: 4, 2;  r alone
#   j = 0: 4, 2, 0, mean 2: 2, 0, −2.   j = 1: from s 4, 2, mean 3: 1, −1;  from r alone
NESTED = ([0] * 3, [[None, None]] * 3, [4.0, 2.0, 0.0], [["s", "t"], ["s", "t"], ["r", "t"]])


def test_hgpo_weighs_longer_histories_more_and_drops_lone_turns():
    # weights 1, 2:  (2 + 2·1)/3,  (0 − 2·1)/3,  −2 by j = 0 alone
    credit = hgpo(table(*NESTED), history=1, gamma=1.0, scale="one")
    assert_allclose(credit.advantages, [1, 4 / 3, -1, -2 / 3, 0, -2])
    assert_allclose(credit.streams["history 0"].advantage, [1, 2, -1, 0, 0, -2])
    assert_allclose(credit.streams["history 1"].advantage, [0, 1, 0, -1, 0, 0])
    # α = 2: weights 1, 4:  (2 + 4)/5,  −4/5
    assert_allclose(hgpo(table(*NESTED), history=1, gamma=1.0, scale="one", alpha=2.0).advantages[1:4:2], [1.2, -0.8])


def test_the_code_of_hgpo_takes_a_zero_for_missing_and_weighs_from_two():
    # weights 2, 3:  (2·2 + 3·1)/5;  0 is dropped: −1;  −2 by j = 0 alone
    credit = hgpo_code(table(*NESTED), history=1, gamma=1.0, scale="one", eps=0.0)
    assert_allclose(credit.advantages, [1, 1.4, -1, -1, 0, -2])


def test_gagpo_is_gae_on_the_mean_return_of_states():
    # V(s) = ⅓, V(t) = 1:  δ = ½·1 − ⅓, 2 − 1;   ½·⅓ − ⅓, ½·1 − ⅓, 0 − 1
    credit = gagpo(table(*VISITS), gamma=0.5, lam=0.0, eps=0.0)
    deltas = np.array([1 / 6, 1, -1 / 6, 1 / 6, -1])
    assert_allclose(credit.streams["turn"].baseline, [1 / 3, 1, 1 / 3, 1 / 3, 1])
    assert_allclose(credit.streams["turn"].advantage, deltas)
    # over all turns of the group: mean 1/30; squares 1/36·3 + 2 = 75/36; variance (75/36 − 5/900)/4
    assert_allclose(credit.advantages, (deltas - 1 / 30) / math.sqrt((75 / 36 - 5 / 900) / 4))
    # λ = ½, γλ = ¼:  ⅙ + ¼·1;  then ⅙ + ¼·(−1) = −1/12, −⅙ − 1/48
    assert_allclose(
        gagpo(table(*VISITS), gamma=0.5, lam=0.5).streams["turn"].advantage, [5 / 12, 1, -9 / 48, -1 / 12, -1]
    )


def test_gagpo_without_own_visits_takes_values_from_others():
    # values: first 0, 0;  second 1, 1, 2:  δ = 0, 2;  ½ − 1, 1 − 1, −2.   A state of one visitor has value 0
    found = gagpo(table(*VISITS), gamma=0.5, lam=0.0, own=False).streams["turn"]
    assert_allclose(found.baseline, [0, 0, 1, 1, 2])
    assert_allclose(found.advantage, [0, 2, -0.5, 0, -2])
    alone = gagpo(table([0, 0], [[None]] * 2, [3.0, 1.0], [["s"], ["t"]]), own=False).streams["turn"]
    assert_allclose(alone.advantage, [3, 1])


# ------------------------------------------------------------------------- exactness, enumerated

# state: (what the policy sees, its probability of action 1, what follows each action). A follow-up is
# (probability, turn reward, next state, outcome). The policy has one logit per seen state.
CALL = {
    "start": ("start", 0.6, ([(1.0, None, None, 0.5)], [(1.0, 1.0, "answer", None)])),
    "answer": ("answer", 0.3, ([(1.0, None, None, 0.0)], [(1.0, None, None, 1.0)])),
}
SEARCH = {  # one to four turns, a noisy tool; two visits to "lost" look alike
    "start": ("start", 0.7, ([(1.0, None, None, 0.4)], [(0.5, 0.3, "found", None), (0.5, -0.2, "lost", None)])),
    "found": ("found", 0.4, ([(1.0, None, None, 1.0)], [(1.0, -0.1, "end", None)])),
    "lost": ("lost", 0.8, ([(1.0, None, None, 0.0)], [(0.4, 0.3, "end", None), (0.6, -0.2, "again", None)])),
    "again": ("lost", 0.8, ([(1.0, None, None, 0.0)], [(1.0, -0.1, "end", None)])),
    "end": ("end", 0.6, ([(1.0, None, None, 0.2)], [(1.0, None, None, 1.0)])),
}


def paths(process, state="start"):
    """All rollouts from a state: probability, turns (reward, what was seen, ∂ log π by its logit), outcome."""
    seen, p, follow = process[state]
    for action, chance in enumerate((1 - p, p)):
        for likely, reward, after, outcome in follow[action]:
            step = (reward, seen, action - p)
            if after is None:
                yield chance * likely, [step], outcome
            for rest, steps_, final in () if after is None else paths(process, after):
                yield chance * likely * rest, [step, *steps_], final


class Enumeration:
    """Every group of rollouts that a process can give, as one table of many groups."""

    def __init__(self, process, size: int):
        found = list(paths(process))
        names = sorted({seen for seen, _, _ in process.values()})
        groups = list(itertools.product(found, repeat=size))
        rollouts = list(itertools.chain.from_iterable(groups))
        self.rows = table(
            np.repeat(np.arange(len(groups)), size).tolist(),
            [[reward for reward, _, _ in steps_] for _, steps_, _ in rollouts],
            [outcome for _, _, outcome in rollouts],
            [[seen for _, seen, _ in steps_] for _, steps_, _ in rollouts],
        )
        self.size = size
        self.probability = np.array([math.prod(p for p, _, _ in group) for group in groups])
        taken = [(names.index(seen), score) for _, steps_, _ in rollouts for _, seen, score in steps_]
        self.scores = np.zeros((len(taken), len(names)))
        self.scores[np.arange(len(taken)), [at for at, _ in taken]] = [score for _, score in taken]

    def moments(self, advantages: np.ndarray) -> tuple[np.ndarray, float]:
        """Mean and total variance of the gradient estimate: the mean over a group's rollouts of Σₖ Aₖ ∇log π."""
        estimates = np.zeros((len(self.probability), self.scores.shape[1]))
        np.add.at(estimates, self.rows.group, advantages[:, None] * self.scores / self.size)
        mean = self.probability @ estimates
        return mean, float(self.probability @ (estimates**2).sum(1) - (mean**2).sum())


def value(process, logits, state="start") -> float:
    """What the policy with these logits expects from a state on."""
    seen, _, follow = process[state]
    p = 1 / (1 + math.exp(-logits[seen]))
    return sum(
        chance * likely * ((reward or 0.0) + (outcome or 0.0) + (value(process, logits, after) if after else 0.0))
        for chance, outcomes in zip((1 - p, p), follow, strict=True)
        for likely, reward, after, outcome in outcomes
    )


def true_gradient(process, h: float = 1e-3) -> np.ndarray:
    """By a difference formula of fourth order: (8 (J(h) − J(−h)) − (J(2h) − J(−2h))) / 12h, in each logit."""
    logits = {seen: math.log(p / (1 - p)) for seen, p, _ in process.values()}
    at = lambda name, d: value(process, {**logits, name: logits[name] + d})  # noqa: E731
    return np.array([(8 * (at(n, h) - at(n, -h)) - (at(n, 2 * h) - at(n, -2 * h))) / (12 * h) for n in sorted(logits)])


def exact_gradient(process) -> np.ndarray:
    """The same by enumeration: the expected total reward times Σₖ ∇log π."""
    every = Enumeration(process, 1)
    total = returns(every.rows)[every.rows.index == 0][every.rows.rollout]
    return every.moments(total)[0]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_exact_gradient_is_that_of_the_value():
    assert_allclose(exact_gradient(CALL), [0.3 * 0.7 * 0.6, 0.6 * 0.4 * (1 + 0.3 - 0.5)], rtol=1e-14)  # answer, start
    assert_allclose(exact_gradient(CALL), true_gradient(CALL), rtol=1e-9)
    assert_allclose(exact_gradient(SEARCH), true_gradient(SEARCH), rtol=1e-9)


@pytest.mark.parametrize("process", [CALL, SEARCH], ids=["call", "search"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_turn_rloo_is_unbiased_where_its_relatives_are_not(process, size: int):
    # identity 22, and broken: nothing for lone turns
    every, exact = Enumeration(process, size), exact_gradient(process)
    rows, found = every.rows, turn_rloo(every.rows)
    mean, variance = every.moments(found.advantages)
    assert_allclose(mean, exact, atol=1e-12)
    if size == 1:
        return

    keys, plain = turn_index_keys(rows), returns(rows)
    lone = np.bincount(keys)[keys] == 1
    biased = {
        "z-scores": gtpo(rows, gamma=1.0).advantages,
        "nothing for turns that nobody else reached": np.where(lone, 0.0, found.advantages),
        "the own rollout in the mean": plain - group_mean(plain, keys),
    }
    for name, advantages in biased.items():
        mean, _ = every.moments(advantages)
        assert np.abs(mean - exact).max() > 5e-3, name
        assert cosine(mean, exact) < 0.999, name  # more than a factor

    # baseline 0 for turns that nobody else reached is unbiased too, but varies more; so does one number per rollout
    for other in (plain - leave_one_out_mean(plain, keys), rloo(rows).advantages):
        mean, more = every.moments(other)
        assert_allclose(mean, exact, atol=1e-12)
        assert variance < more


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_with_the_own_rollout_shrinks_the_gradient_by_one_in_g_where_all_took_the_turn(size: int):
    # identity 17 turn by turn: at index 0, which all reach, exactly (G−1)/G; later ones shrink more
    every, exact = Enumeration(CALL, size), exact_gradient(CALL)
    plain = returns(every.rows)
    answer, start = every.moments(plain - group_mean(plain, turn_index_keys(every.rows)))[0]
    assert_allclose(start, exact[1] * (size - 1) / size, rtol=1e-12)
    assert answer < exact[0] * (size - 1) / size - 1e-3
    assert_allclose(every.moments(dr_grpo(every.rows).advantages)[0], exact * (size - 1) / size, rtol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_anchor_groups_are_unbiased_only_without_the_whole_own_rollout(size: int):
    # identity 21, and broken: one row left out
    def turn(rows: TurnTable, **choice) -> np.ndarray:
        return gigpo(rows, gamma=1.0, scale="one", **choice).streams["turn"].advantage

    every, exact = Enumeration(SEARCH, size), exact_gradient(SEARCH)
    rows, plain = every.rows, returns(every.rows)
    values = gagpo(rows, gamma=1.0, lam=1.0, own=False).streams["turn"].advantage
    assert_allclose(every.moments(values)[0], exact, atol=1e-12)
    assert_allclose(every.moments(turn(rows, own=False, singleton="raw"))[0], exact, atol=1e-12)
    one_row_out = plain - leave_one_out_mean(plain, anchor_keys(rows))
    for advantages in (turn(rows), turn(rows, own=False), one_row_out):
        assert np.abs(every.moments(advantages)[0] - exact).max() > 5e-3
    # where no rollout comes back to a state, leaving out the row is leaving out the rollout
    never, exact = Enumeration(CALL, size), exact_gradient(CALL)
    plain = returns(never.rows)
    one_row_out = plain - leave_one_out_mean(plain, anchor_keys(never.rows))
    assert_allclose(never.moments(one_row_out)[0], exact, atol=1e-12)
    assert_allclose(turn(never.rows, own=False, singleton="raw"), one_row_out, atol=1e-12)


# --------------------------------------------------------------------------------- identities

rewards = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])  # sums and halves of these are exact
few = settings(max_examples=30, deadline=None)


@st.composite
def steps(draw, *, max_turns: int = 4, states: str = "stu"):
    """Groups, turn rewards, outcomes and anchors of ragged rollouts."""
    groups = draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
    turns, anchors = [], []
    for _ in groups:
        turns.append(draw(st.lists(rewards | st.none(), min_size=1, max_size=max_turns)))
        anchors.append(draw(st.lists(st.sampled_from(states), min_size=len(turns[-1]), max_size=len(turns[-1]))))
    return groups, turns, [draw(rewards | st.none()) for _ in groups], anchors


@few
@given(steps(max_turns=1))
def test_with_one_turn_turn_rloo_is_rloo_and_the_z_scores_are_grpo(step):
    rows = table(*step)
    sizes = np.bincount(rows.group, minlength=3)[rows.group]
    found = turn_rloo(rows).advantages
    assert_allclose(found, rloo(rows, singleton="raw").advantages, atol=1e-12)
    many = sizes > 1
    assert_allclose(found[many], (sizes / np.maximum(sizes - 1, 1) * dr_grpo(rows).advantages)[many], atol=1e-12)
    assert_allclose(np.bincount(rows.group[many], weights=found[many], minlength=1), 0, atol=1e-12)
    for estimate in (gtpo, matchtir):
        assert_allclose(estimate(rows).advantages, grpo_mr(rows).advantages, atol=1e-12)


def test_with_two_turns_turn_rloo_is_not_rloo():
    rows = table([0, 0], [[1.0, None], [0.0, None]], [0.0, 2.0])
    assert_allclose(rloo(rows).advantages, [-1, -1, 1, 1])
    assert_allclose(turn_rloo(rows).advantages, [-1, -2, 1, 2])


@few
@given(steps())
def test_advantages_of_one_index_sum_to_zero(step):
    rows = table(*step)
    keys = turn_index_keys(rows)
    assert_allclose(np.bincount(keys, weights=gtpo(rows).advantages), 0, atol=1e-9)
    several = np.bincount(keys)[keys] > 1
    assert_allclose(np.bincount(keys[several], weights=turn_rloo(rows).advantages[several], minlength=1), 0, atol=1e-9)


@few
@given(steps(), st.sampled_from([0.5, 1.0]))
def test_the_hybrid_without_the_outcome_is_gtpo(step, gamma):
    rows = table(*step)
    assert_allclose(irc_hybrid(rows, gamma=gamma, lam=0.0).advantages, gtpo(rows, gamma=gamma).advantages)
    both = gtpo(rows, gamma=gamma).advantages + 2 * grpo_or(rows).advantages
    assert_allclose(irc_hybrid(rows, gamma=gamma, lam=2.0).advantages, both, atol=1e-12)


@few
@given(steps(), st.sampled_from(["std", "one"]))
def test_gigpo_with_omega_zero_is_grpo(step, scale):  # identity 18
    rows = table(*step)
    whole = grpo_mr(rows, eps=1e-6) if scale == "std" else dr_grpo(rows)
    assert_allclose(gigpo(rows, omega=0.0, scale=scale).advantages, whole.advantages, atol=1e-12)


@few
@given(steps())
def test_gigpo_with_all_states_different_is_grpo_under_the_zero_rule_alone(step):
    # identity 18, and broken: singletons raw
    groups, turns, outcomes, anchors = step
    unique = [[(i, k) for k in range(len(a))] for i, a in enumerate(anchors)]
    rows = table(groups, turns, outcomes, unique)
    whole = grpo_mr(rows, eps=1e-6).advantages
    assert_allclose(gigpo(rows).advantages, whole, atol=1e-12)
    assert_allclose(gigpo(rows, singleton="raw").advantages, whole + returns(rows, 0.95), atol=1e-12)
    assert_allclose(gagpo(rows, lam=1.0).advantages, 0)
    assert_allclose(hgpo(rows).advantages, 0)


@few
@given(steps())
def test_at_a_start_that_none_returns_to_gigpos_two_terms_agree(step):  # identity 18
    groups, turns, outcomes, anchors = step
    rows = table(groups, [[None] * len(t) for t in turns], outcomes, [["start", *a[1:]] for a in anchors])
    credit, first = gigpo(rows, gamma=1.0), rows.index == 0
    whole, turn = credit.streams["trajectory"].advantage, credit.streams["turn"].advantage
    assert_allclose(turn[first], whole[first], atol=1e-12)


def test_gigpos_two_terms_differ_where_the_start_comes_again_or_rewards_are_discounted():  # identity 18, broken
    again = gigpo(table(*VISITS), gamma=1.0, scale="one")
    # outcomes 2, 0: mean 1 over rollouts; over visits of s (2, 0, 0) mean ⅔
    assert_allclose(again.streams["trajectory"].advantage[0], 1)
    assert_allclose(again.streams["turn"].advantage[0], 4 / 3)
    later = gigpo(table([0, 0], [[None, None], [None]], [2.0, 0.0], [["s", "t"], ["s"]]), gamma=0.5, scale="one")
    assert_allclose(later.streams["turn"].advantage[0], 0.5)  # 1 and 0 instead of 2 and 0
    # and with ω = 1 it is not GRPO: 1 + 4/3 instead of 1
    assert_allclose(again.advantages[0] - dr_grpo(table(*VISITS)).advantages[0], 4 / 3)


@few
@given(steps(states="st"), st.sampled_from(["std", "one"]), st.booleans())
def test_hgpo_without_history_is_gigpos_turn_term(step, scale, own):  # identity 19
    rows = table(*step)
    turn = gigpo(rows, gamma=0.5, scale=scale, own=own).streams["turn"].advantage
    assert_allclose(hgpo(rows, history=0, gamma=0.5, scale=scale, own=own).advantages, turn, atol=1e-12)
    code = hgpo_code(rows, history=0, gamma=0.5, scale=scale, own=own, ddof=1, eps=1e-6).advantages
    assert_allclose(code, turn, atol=1e-5)  # eps is in its weights too


def test_hgpo_with_history_is_more_than_gigpos_turn_term():  # identity 19, broken
    rows = table(*NESTED)
    turn = gigpo(rows, gamma=1.0, scale="one").streams["turn"].advantage
    assert_allclose(turn, [1, 2, -1, 0, 0, -2])
    assert not np.allclose(hgpo(rows, history=1, gamma=1.0, scale="one").advantages, turn)


@few
@given(steps(states="st"), st.sampled_from([0.5, 1.0]))
def test_gagpo_at_the_ends_of_lambda(step, gamma):  # identity 20
    rows = table(*step)
    turn = gigpo(rows, gamma=gamma, scale="one").streams["turn"]
    assert_allclose(gagpo(rows, gamma=gamma, lam=1.0).streams["turn"].advantage, turn.advantage, atol=1e-12)
    last = np.isin(np.arange(len(rows.rollout)), rows.last)
    after = np.where(last, rows.outcome_reward()[rows.rollout], gamma * np.roll(turn.baseline, -1))
    difference = rows.turn_reward() + after - turn.baseline
    assert_allclose(gagpo(rows, gamma=gamma, lam=0.0).streams["turn"].advantage, difference, atol=1e-12)


def test_gagpo_between_the_ends_of_lambda_is_neither():  # identity 20, broken
    # the ends: ⅔, −⅓, −⅓ and ⅙, −⅙, ⅙ in state s of VISITS (worked above); another γ gives another V
    turn = gigpo(table(*VISITS), gamma=0.5, scale="one").streams["turn"].advantage
    for other in (gagpo(table(*VISITS), gamma=0.5, lam=0.5), gagpo(table(*VISITS), gamma=1.0, lam=1.0)):
        assert not np.allclose(other.streams["turn"].advantage, turn)


def by_hand(rows: TurnTable, *, history: int, alpha: float, gamma: float, scale: str, own: bool) -> list[float]:
    """HGPO row by row."""
    assert rows.anchor is not None
    plain, out = returns(rows, gamma), []
    past = [tuple(rows.anchor[t - rows.index[t] : t + 1]) for t in range(len(rows.rollout))]
    for t in range(len(past)):
        summed = total = 0.0
        for j in range(min(history, rows.index[t]) + 1):
            same = [
                u
                for u in range(len(past))
                if rows.group[u] == rows.group[t] and len(past[u]) > j and past[u][-j - 1 :] == past[t][-j - 1 :]
            ]
            against = same if own else [u for u in same if rows.rollout[u] != rows.rollout[t]]
            if len(against) < 1 + own:
                continue
            std = np.std(plain[same], ddof=1) if scale == "std" else 1.0
            summed += (j + 1) ** alpha * (0.0 if std < 1e-12 else (plain[t] - np.mean(plain[against])) / std)
            total += (j + 1) ** alpha
        out.append(summed / total if total else 0.0)
    return out


@few
@given(
    steps(states="st"), st.integers(0, 3), st.sampled_from(["std", "one"]), st.booleans(), st.sampled_from([0.0, 1.5])
)
def test_hgpo_is_what_it_is_row_by_row(step, history, scale, own, alpha):
    rows = table(*step)
    found = hgpo(rows, history=history, alpha=alpha, gamma=0.5, scale=scale, own=own, eps=0.0).advantages
    expected = by_hand(rows, history=history, alpha=alpha, gamma=0.5, scale=scale, own=own)
    assert_allclose(found, expected, atol=1e-9)


# ------------------------------------------------------------------- invariants of all of them

ALL: dict[str, Callable[..., Credit]] = {
    "turn_rloo": partial(turn_rloo, gamma=0.5),
    "gtpo": partial(gtpo, gamma=0.5),
    "matchtir": partial(matchtir, gamma=0.5),
    "irc_hybrid": partial(irc_hybrid, gamma=0.5),
    "gigpo": partial(gigpo, gamma=0.5),
    "gigpo raw, others": partial(gigpo, gamma=0.5, scale="one", singleton="raw", own=False),
    "gigpo std, others": partial(gigpo, gamma=0.5, own=False),
    "hgpo": partial(hgpo, gamma=0.5),
    "hgpo others": partial(hgpo, gamma=0.5, scale="one", own=False),
    "hgpo_code": partial(hgpo_code, gamma=0.5),
    "gagpo": partial(gagpo, gamma=0.5, lam=0.5),
    "gagpo others": partial(gagpo, gamma=0.5, lam=0.5, own=False),
}
RAW = {"turn_rloo", "gigpo raw, others", "gagpo others"}
"""Those that do not give a lone rollout 0."""


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12, deadline=None)
@given(step=steps(), random=st.randoms(use_true_random=False))
def test_order_and_names_change_nothing(name, step, random):  # identity 31
    groups, turns, outcomes, anchors = step
    order = list(range(len(groups)))
    random.shuffle(order)
    rows = table(*step)
    again = table(
        [2**40 - 7 * groups[i] for i in order],
        [turns[i] for i in order],
        [outcomes[i] for i in order],
        [[f"{state}{groups[i]}" for state in anchors[i]] for i in order],
    )
    parts = np.split(ALL[name](rows).advantages, rows.last[:-1] + 1)
    assert_allclose(ALL[name](again).advantages, np.concatenate([parts[i] for i in order]), atol=1e-9)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12, deadline=None)
@given(step=steps())
def test_each_group_stands_for_itself(name, step):  # identity 31
    groups, turns, outcomes, anchors = step
    rows = table(*step)
    whole = ALL[name](rows).advantages
    for group in set(groups):
        at = [i for i, g in enumerate(groups) if g == group]
        own = table([group] * len(at), [turns[i] for i in at], [outcomes[i] for i in at], [anchors[i] for i in at])
        assert_allclose(ALL[name](own).advantages, whole[rows.group == group], atol=1e-9)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12, deadline=None)
@given(step=steps(), eps=st.sampled_from([0.0, 1e-4]), ddof=st.sampled_from([0, 1]))
def test_advantages_are_finite_and_a_lone_rollout_gets_nothing(name, step, eps, ddof):
    groups, turns, outcomes, anchors = step
    rows = table(*step)
    choice = {} if name == "turn_rloo" else {"eps": eps, "ddof": ddof}
    assert np.isfinite(ALL[name](rows, **choice).advantages).all()
    distinct = table(groups, turns, outcomes, [[(i, k) for k in range(len(a))] for i, a in enumerate(anchors)])
    if name not in RAW:
        alone = np.bincount(rows.rollout_group, minlength=3)[rows.group] == 1
        assert (ALL[name](distinct, **choice).advantages[alone] == 0).all()


@pytest.mark.parametrize("name", [n for n in ALL if n not in RAW])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rollouts_get_exactly_nothing(name: str, size: int):
    # 0.1 three times has a floating-point mean that is not 0.1; and a live group stands beside it
    states = [["s", "t"]] * (size + 2)
    rows = table([0] * size + [1, 1], [[0.1, 0.3]] * size + [[1.0, 0.0]] * 2, [0.1] * size + [0.0, 3.0], states)
    advantages = ALL[name](rows, eps=0.0).advantages
    assert (advantages[: 2 * size] == 0).all()
    assert (advantages[2 * size :] != 0).any()


def test_equal_rollouts_cancel_in_those_that_are_raw_alone():
    rows = table([0] * 3, [[0.1, 0.3]] * 3, [0.1] * 3, [["s", "t"]] * 3)
    for name in RAW:
        assert_allclose(ALL[name](rows).advantages, 0, atol=1e-12)


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (gtpo, 1 / 2),
        (matchtir, 1 / 2),
        (irc_hybrid, 0.65),
        (gigpo, 1),
        (hgpo, 1 / 2),
        (hgpo_code, 1 / 3),
        (gagpo, 1 / 2),
    ],
)
def test_ddof_and_eps_reach_every_standard_deviation(estimate, expected):
    # outcomes 0 and 2: mean 1, std 1 with ddof 0, and eps 1: z = ±½.  The hybrid ½ + 0.3·½, GiGPO ½ + ½;
    # the code of HGPO has eps in its weights too: 2·½ / (2 + 1)
    rows = table([0, 0], [[None], [None]], [0.0, 2.0], [["s"], ["s"]])
    assert_allclose(estimate(rows, ddof=0, eps=1.0).advantages, [-expected, expected])


@pytest.mark.parametrize("name", ALL)
def test_groups_stay_apart_where_their_numbers_are_far_apart(name: str):
    # with four states, group numbers times 4 would both be 0 in 64 bits
    rest = ([[1.0, None], [0.0, None]] * 2, [0.0, 1.0, 5.0, 9.0], [["s", "t"], ["s", "u"], ["s", "t"], ["s", "v"]])
    near, far = table([0, 0, 1, 1], *rest), table([2**62, 2**62, -(2**63), -(2**63)], *rest)
    assert_allclose(ALL[name](near).advantages, ALL[name](far).advantages)


@pytest.mark.parametrize("name", ALL)
def test_a_critic_changes_nothing(name: str):
    plain = table(*VISITS)
    valued = table(*VISITS, values=[[1.0, 2.0], [3.0, 4.0, 5.0]], bootstrap=[7.0, 0.0])
    assert_allclose(ALL[name](plain).advantages, ALL[name](valued).advantages)


@pytest.mark.parametrize("estimate", [anchor_keys, gigpo, hgpo, hgpo_code, gagpo])
def test_anchor_methods_say_that_they_need_anchors(estimate):
    with pytest.raises(ValueError, match="needs the column 'anchor'"):
        estimate(table(*RAGGED))


def test_an_unknown_choice_is_refused_with_the_known_ones():
    with pytest.raises((ValueError, TypeCheckError), match=r"'std'.*'one'"):
        gigpo(table(*VISITS), scale="none")  # pyright: ignore[reportArgumentType]
    with pytest.raises((ValueError, TypeCheckError), match=r"'zero'.*'raw'"):
        gigpo(table(*VISITS), singleton="parent")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="history must be a whole number >= 0 and finite; got -2"):
        hgpo(table(*VISITS), history=-2)
