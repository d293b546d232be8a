"""The exact laboratory: truth by hand, and estimators whose expectation is known."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from turnwise.credit import Credit, TurnTable, leave_one_out_mean, reward_to_go, turn_index_keys, turn_table, z_score
from turnwise.lab import (
    CELLS,
    METRICS,
    PROBLEMS,
    TurnProcess,
    action_probabilities,
    action_scores,
    all_rollouts,
    bias_map,
    choice_probabilities,
    expected_return,
    group_gradient,
    group_table,
    heat_map,
    json_text,
    logit_table,
    metrics,
    ordered_groups,
    policy_gradient,
    rank_correlation,
    sign_agreement,
    solve,
    text_table,
    turn_process,
    unordered_groups,
)

problems = pytest.mark.parametrize("name", sorted(PROBLEMS))


def search() -> TurnProcess:
    """A call finds in three of four and pays ½; telling what was found is worth 1, hedging ½, guessing at once ⅕."""
    return turn_process(
        {"ask": 1.0},
        {
            "ask": {"call": [(0.75, "found", 0.5), (0.25, "lost", 0.0)], "answer": [(1.0, "guessed", 0.0)]},
            "found": {"tell": [(1.0, "right", 0.0)], "hedge": [(1.0, "half", 0.0)]},
            "lost": {"give up": [(1.0, "wrong", 0.0)]},
        },
        {"right": 1.0, "half": 0.5, "guessed": 0.2},
        max_turns=2,
    )


def coin() -> TurnProcess:
    """One turn: heads is worth 1, tails 0."""
    moves = {"toss": {"heads": [(1.0, "won", 0.0)], "tails": [(1.0, "lost", 0.0)]}}
    return turn_process({"toss": 1.0}, moves, {"won": 1.0}, max_turns=1)


def words() -> TurnProcess:
    """One turn of one or two tokens."""
    moves = {
        "ask": {
            "search exactly": [(1.0, "right", 0.0)],
            "search loosely": [(1.0, "hardly", 0.0)],
            "guess": [(1.0, "maybe", 0.0)],
        }
    }
    return turn_process({"ask": 1.0}, moves, {"right": 1.0, "hardly": 0.2, "maybe": 0.3}, max_turns=1)


# -------------------------------------------------------------------- estimators whose mean is known


def returns(table: TurnTable) -> np.ndarray:
    return reward_to_go(table.turn_reward(), table.outcome_reward(), table, discount=1.0)


def totals(table: TurnTable) -> np.ndarray:
    return np.bincount(table.rollout, weights=table.turn_reward()) + table.outcome_reward()


def leave_one_out(table: TurnTable) -> Credit:
    """RLOO: the whole return minus the mean of the others'."""
    found = totals(table) - leave_one_out_mean(totals(table), table.rollout_group)
    return Credit(advantages=found[table.rollout])


def minus_mean(table: TurnTable) -> Credit:
    """Dr. GRPO: the whole return minus the mean of all."""
    group = table.rollout_group
    sums, counts = np.bincount(group, weights=totals(table)), np.bincount(group)
    return Credit(advantages=(totals(table) - (sums / counts)[group])[table.rollout])


def minus_first(table: TurnTable) -> Credit:
    """The whole return minus that of the group's first rollout."""
    group = table.rollout_group
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return Credit(advantages=(totals(table) - totals(table)[first][group])[table.rollout])


def standardised(table: TurnTable) -> Credit:
    return Credit(advantages=z_score(totals(table), table.rollout_group)[table.rollout])


def whitened(table: TurnTable) -> Credit:
    """Over the whole table."""
    return Credit(advantages=z_score(totals(table), np.zeros(table.num_rollouts, dtype=np.int64))[table.rollout])


def one_step(table: TurnTable) -> Credit:
    """The critic's one-step advantage: r + V' − V."""
    assert table.values is not None
    after = np.append(table.values[1:], 0.0)
    after[table.last] = table.outcome_reward()
    return Credit(advantages=table.turn_reward() + after - table.values)


def by_turn_index(table: TurnTable) -> Credit:
    """Return-to-go minus the mean of the others at this turn index; minus 0 where no other came so far."""
    return Credit(advantages=returns(table) - leave_one_out_mean(returns(table), turn_index_keys(table)))


def by_turn_index_zero_alone(table: TurnTable) -> Credit:
    """As before, but a turn that no other rollout reached gets 0."""
    alone = np.bincount(turn_index_keys(table))[turn_index_keys(table)] == 1
    return Credit(advantages=np.where(alone, 0.0, by_turn_index(table).advantages))


def by_anchor(table: TurnTable, *, whole_rollout: bool) -> Credit:
    """Return-to-go minus the mean over the group's other turns in this state, or over those of other rollouts."""
    assert table.anchor is not None
    keys = table.group * 1000 + table.anchor
    if not whole_rollout:
        return Credit(advantages=returns(table) - leave_one_out_mean(returns(table), keys))
    sums, counts = (np.bincount(keys, weights=w)[keys] for w in (returns(table), np.ones(len(keys))))
    _, own = np.unique(np.stack([keys, table.rollout]), axis=1, return_inverse=True)
    own_sums, own_counts = (np.bincount(own, weights=w)[own] for w in (returns(table), np.ones(len(keys))))
    baseline = (sums - own_sums) / np.maximum(counts - own_counts, 1)
    return Credit(advantages=returns(table) - baseline)


# --------------------------------------------------------------------------------- the truth by hand


def test_values_of_two_turns_by_hand():
    # all choices ½.   V₂(found) = (1 + ½)/2 = ¾,  V₂(lost) = 0
    # Q₁(call) = ¾ (½ + ¾) = .9375,  Q₁(answer) = .2,  V₁(ask) = .56875,  A = ±.36875
    process = search()
    found = solve(process, np.zeros(len(process.choices)))
    ask, seen, lost = (process.states.index(name) for name in ("ask", "found", "lost"))
    assert_allclose(found.v[1, [seen, lost]], [0.75, 0.0])
    assert_allclose(found.q[0, ask], [0.9375, 0.2])
    assert_allclose(found.v[0, ask], 0.56875)
    assert_allclose(found.advantage[0, ask], [0.36875, -0.36875])
    assert_allclose(found.advantage[1, seen], [0.25, -0.25])


def test_values_depend_on_the_turn_since_rollouts_are_cut_off():
    # asking in the second and last turn: a call pays ¾ · ½ and then nothing; V₂(ask) = (.375 + .2)/2 = .2875
    process = search()
    found = solve(process, np.zeros(len(process.choices)))
    assert_allclose(found.q[1, 0], [0.375, 0.2])
    assert_allclose(found.v[1, 0], 0.2875)
    assert_allclose(found.v[2, 0], 0.0)


def test_the_gradient_of_two_turns_by_hand():
    # call: ½ · ½ · (.9375 − .2) = .184375;   tell: reached with ½ · ¾ = .375, times ½ · ½ · (1 − ½) = .046875
    process = search()
    gradient = policy_gradient(process, np.zeros(len(process.choices)))
    assert [words for _, words in process.choices] == ["call", "answer", "tell", "hedge", "give", "give up"]
    assert_allclose(gradient, [0.184375, -0.184375, 0.046875, -0.046875, 0, 0], atol=1e-15)


def test_tokens_share_the_advantage_of_their_turn():
    # choices ½:  "search" ½ (exactly ¼, loosely ¼), "guess" ½.  Q(search) = (1 + .2)/2 = .6,  V = (.6 + .3)/2 = .45
    # A(search) = .15,  A(exactly | search) = 1 − .6 = .4:  together .55 = Q(search exactly) − V
    process = words()
    zeros = np.zeros(len(process.choices))
    found = solve(process, zeros)
    assert [w for _, w in process.choices] == ["search", "search exactly", "search loosely", "guess"]
    assert_allclose(action_probabilities(process, zeros)[0], [0.25, 0.25, 0.5])
    assert_allclose(found.token_q[0], [0.6, 1.0, 0.2, 0.3])
    assert_allclose(found.token_advantage[0], [0.15, 0.4, -0.4, -0.15])
    assert_allclose(found.advantage[0, 0], [0.55, -0.25, -0.15])


def test_scores_of_tokens_by_hand():
    # ∂ log π(search exactly) = (1 − ½, 1 − ½, 0 − ½, 0 − ½);  a guess never comes to the second token
    process = words()
    scores = action_scores(process, np.zeros(4))
    assert_allclose(scores[0, 0], [0.5, 0.5, -0.5, -0.5])
    assert_allclose(scores[0, 2], [-0.5, 0, 0, 0.5])


def test_the_mean_and_covariance_of_two_tosses_by_hand():
    # both equal: 0.   One of each, probability ½: advantages ±1, scores ±(½, −½):  ĝ = ½ (½ + ½) = ½, and −½ for tails
    # mean ¼ = p (1 − p);   variance ½ · ¼ − 1/16 = 1/16, covariance −1/16
    found = group_gradient(leave_one_out, coin(), np.zeros(2), group_size=2)
    assert found.exact
    assert found.num_groups == 3
    assert_allclose(found.mean, [0.25, -0.25])
    assert_allclose(found.covariance, [[1 / 16, -1 / 16], [-1 / 16, 1 / 16]])
    assert_allclose(found.standard_error, 0)


def test_metrics_of_two_tosses_by_hand():
    # trace 1/8, |∇J|² = 1/8: variance 1;  best step size: 1 − 1/(1 + 1) = ½.  Half of all turns get 0: no sign
    # ranks of estimates −1, 0, 1 (weights ¼, ½, ¼): ⅛, ½, ⅞;  of the truth: ¼, ¾
    # covariance 2 · ¼ · ⅜ · ¼ = 3/64,  variances ½ · 9/64 = 9/128 and 1/16:  3/64 / √(9/2048) = √½
    found = metrics(group_gradient(leave_one_out, coin(), np.zeros(2), group_size=2), np.array([0.25, -0.25]))
    expected = {"bias": 0, "bias_error": 0, "cosine": 1, "variance": 1, "mse": 1, "best_mse": 0.5}
    expected |= {"sign_agreement": 0.5, "rank_correlation": math.sqrt(0.5)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_bias_and_cosine_are_relative_to_the_true_gradient():
    # mean (3, 4)/5 · 2 against (1, 0): difference (1/5, 8/5), length √65/5;  cosine 3/5
    found = group_gradient(leave_one_out, coin(), np.zeros(2), group_size=2)
    moved = type(found)(**{**vars(found), "mean": np.array([1.2, 1.6])})
    assert metrics(moved, np.array([1.0, 0.0]))["bias"] == pytest.approx(math.sqrt(65) / 5)
    assert metrics(moved, np.array([1.0, 0.0]))["cosine"] == pytest.approx(0.6)


def test_squared_errors_of_a_biased_estimate_by_hand():
    # mean (1.2, 1.6), |·|² = 4, against (2, 0), |·|² = 4; trace 1/8.   bias² = (.64 + 2.56)/4 = .8,  variance 1/32
    # along = 2.4/4 = .6:  best_mse = 1 − .36 / (1 + 1/32)
    found = group_gradient(leave_one_out, coin(), np.zeros(2), group_size=2)
    moved = type(found)(**{**vars(found), "mean": np.array([1.2, 1.6])})
    got = metrics(moved, np.array([2.0, 0.0]))
    assert got["mse"] == pytest.approx(0.8 + 1 / 32)
    assert got["best_mse"] == pytest.approx(1 - 0.36 / (1 + 1 / 32))


def test_the_standard_error_of_sampled_tosses_by_hand():
    # each group's ĝ is (½, −½) with probability ½, else 0: standard deviation ¼, so ¼/√n for n sampled groups
    found = group_gradient(leave_one_out, coin(), np.zeros(2), group_size=2, limit=0, samples=10_000)
    assert found.num_groups == 10_000
    assert_allclose(found.standard_error, 0.25 / 100, rtol=0.01)


def test_logits_of_any_size_have_probabilities():
    process = words()
    assert_allclose(choice_probabilities(process, np.array([900.0, -900.0, -900.0, 0.0])), [1, 0.5, 0.5, 0])


def test_rank_correlation_and_sign_agreement_by_hand():
    # estimates in the opposite order of the truths; signs agree in the first, of weight 1 of 3 (a truth of 0 has none)
    estimates, truths, weights = np.array([3.0, 2.0, 1.0]), np.array([0.5, 0.0, -1.0]), np.array([1.0, 5.0, 2.0])
    assert rank_correlation(estimates, -truths, weights) == pytest.approx(-1)
    assert sign_agreement(estimates, truths, weights) == pytest.approx(1 / 3)
    assert rank_correlation(np.array([7.0, 7.0 + 1e-14, 7.0]), truths, weights) is None
    assert sign_agreement(estimates, np.zeros(3), weights) is None


# ----------------------------------------------------------------------------- the truth, every problem


@problems
def test_enumerated_probabilities_sum_to_one_and_returns_to_the_value(name: str):
    process, logits = PROBLEMS[name]()
    found = all_rollouts(process, logits)
    rollout = np.repeat(np.arange(len(found.length)), found.length)
    total = np.bincount(rollout, weights=found.turn_reward) + found.outcome
    assert found.probability.sum() == pytest.approx(1, abs=1e-12)
    assert found.probability @ total == pytest.approx(expected_return(process, logits), abs=1e-12)
    assert found.length.max() <= process.max_turns


@problems
def test_advantages_are_zero_in_the_mean_of_every_state_and_word(name: str):
    process, logits = PROBLEMS[name]()
    found = solve(process, logits)
    policy, choices = action_probabilities(process, logits), choice_probabilities(process, logits)
    assert_allclose((policy * found.advantage).sum(-1), 0, atol=1e-12)
    for k in range(process.max_turns):
        assert_allclose(np.bincount(process.decision, weights=choices * found.token_advantage[k]), 0, atol=1e-12)
    assert_allclose(np.einsum("kp,sap->ksa", found.token_advantage, process.through), found.advantage, atol=1e-12)


@problems
def test_the_exact_gradient_is_that_of_the_exact_value(name: str):
    process, usual = PROBLEMS[name]()
    logits = usual + np.random.default_rng(0).normal(size=len(usual))
    step = 1e-5
    differences = [
        (expected_return(process, logits + step * e) - expected_return(process, logits - step * e)) / (2 * step)
        for e in np.eye(len(logits))
    ]
    assert_allclose(policy_gradient(process, logits), differences, atol=1e-9)


def random_process(seed: int) -> tuple[TurnProcess, np.ndarray]:
    """Three states with one to three actions, of one or two tokens, that lead anywhere, or to one of two ends."""
    draw = np.random.default_rng(seed)
    names = ["a", "b", "c", "end", "exit"]
    moves = {}
    for state in names[:3]:
        offered = ["x", "y one", "y two"][: draw.integers(1, 4)]
        to = {action: draw.choice(5, size=2, replace=False) for action in offered}
        split = {action: draw.choice([0.25, 0.5]) for action in offered}
        moves[state] = {
            action: [
                (p, names[s], float(draw.normal()))
                for p, s in zip((split[action], 1 - split[action]), to[action], strict=True)
            ]
            for action in offered
        }
    reached = {s for by_action in moves.values() for found in by_action.values() for _, s, _ in found} | set(moves)
    outcomes = {state: float(draw.normal()) for state in sorted(reached)}
    process = turn_process({"a": 0.5, "b": 0.5}, moves, outcomes, max_turns=int(draw.integers(1, 4)))
    return process, draw.normal(size=len(process.choices))


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_any_process_is_enumerated_as_it_is_solved(seed: int):
    process, logits = random_process(seed)
    found = all_rollouts(process, logits)
    rollout = np.repeat(np.arange(len(found.length)), found.length)
    total = np.bincount(rollout, weights=found.turn_reward) + found.outcome
    scores = action_scores(process, logits)[found.state, found.action]
    assert found.probability.sum() == pytest.approx(1, abs=1e-12)
    assert found.probability @ total == pytest.approx(expected_return(process, logits), abs=1e-12)
    by_likelihood_ratio = ((found.probability * total)[rollout][:, None] * scores).sum(0)
    assert_allclose(by_likelihood_ratio, policy_gradient(process, logits), atol=1e-12)


@settings(max_examples=10)
@given(st.integers(0, 10_000))
def test_leaving_one_out_is_unbiased_in_any_process(seed: int):
    process, logits = random_process(seed)
    found = group_gradient(leave_one_out, process, logits, group_size=2, limit=10**6)
    assert_allclose(found.mean, policy_gradient(process, logits), atol=1e-12)


def test_rollouts_carry_the_truth_about_their_turns():
    process = search()
    found = all_rollouts(process, np.zeros(len(process.choices)))
    # answer (½); call, found, tell and hedge (½ ¾ ½ each); call, lost, give up (½ ¼)
    assert found.length.tolist() == [1, 2, 2, 2]
    assert sorted(found.probability.tolist()) == [0.125, 0.1875, 0.1875, 0.5]
    table, rows = group_table(found, np.array([[1, 0], [2, 2]]))
    assert table.group.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert table.rollout.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert table.values is not None
    assert table.anchor is not None
    assert_allclose(table.values[:3], [0.56875, 0.75, 0.56875])
    assert [process.states[s] for s in table.anchor[:3]] == ["ask", "found", "ask"]
    assert_allclose(found.advantage[rows][:3], [0.36875, 0.25, -0.36875])
    assert_allclose(table.turn_reward()[:3], [0.5, 0, 0])
    assert_allclose(table.outcome_reward()[:2], [1.0, 0.2])


def test_the_truth_about_a_turn_is_that_of_its_place():
    # ½ each, a step costs .1: in room 3 going on wins 1 − .1 = .9 at any turn; going back is worth nothing more in the
    # last turn (−.1), and in the one before the last −.1 + V₄(room 2) = −.2.   A = ½ (.9 − back) = .5 and .55
    process, logits = PROBLEMS["revisits"](turns=4)
    found = all_rollouts(process, np.zeros(len(logits)))
    on = (found.state == process.states.index("room 3")) & (found.action == 1)
    assert_allclose(found.advantage[on & (found.index == 3)], 0.5)
    assert_allclose(found.advantage[on & (found.index == 2)], 0.55)


# ------------------------------------------------------------------------------ expectations, identities


@problems
@pytest.mark.parametrize("group_size", [2, 3])
def test_leave_one_out_is_unbiased_and_subtracting_the_mean_shrinks(name: str, group_size: int):
    """Identity 17: E[RLOO] = ∇J, E[Dr. GRPO] = (G−1)/G ∇J."""
    process, logits = PROBLEMS[name]()
    truth = policy_gradient(process, logits)
    exact = group_gradient(leave_one_out, process, logits, group_size=group_size)
    shrunk = group_gradient(minus_mean, process, logits, group_size=group_size)
    assert exact.exact
    assert_allclose(exact.mean, truth, atol=1e-12)
    assert_allclose(shrunk.mean, (group_size - 1) / group_size * truth, atol=1e-12)
    assert np.abs(shrunk.mean - truth).max() > 1e-3  # the first assertion would see it
    assert_allclose(shrunk.covariance, ((group_size - 1) / group_size) ** 2 * exact.covariance, atol=1e-12)


@problems
def test_an_exact_critic_is_unbiased(name: str):
    """Identity 12, for one-step advantages: with a critic the group does not matter, so one rollout will do."""
    process, logits = PROBLEMS[name]()
    found = group_gradient(one_step, process, logits, group_size=1)
    assert_allclose(found.mean, policy_gradient(process, logits), atol=1e-12)


@pytest.mark.parametrize("name", ["stop-or-go", "ragged"])
def test_turn_index_groups_are_unbiased_but_not_if_lonely_turns_get_zero(name: str):
    """Identity 22."""
    process, logits = PROBLEMS[name]()
    truth = policy_gradient(process, logits)
    right = group_gradient(by_turn_index, process, logits, group_size=3)
    wrong = group_gradient(by_turn_index_zero_alone, process, logits, group_size=3)
    assert_allclose(right.mean, truth, atol=1e-12)
    assert np.abs(wrong.mean - truth).max() > 1e-3


def test_anchor_groups_are_biased_by_revisits_unless_the_whole_rollout_is_left_out():
    """Identity 21."""
    process, logits = PROBLEMS["revisits"]()
    truth = policy_gradient(process, logits)
    row = group_gradient(lambda t: by_anchor(t, whole_rollout=False), process, logits, group_size=2)
    whole = group_gradient(lambda t: by_anchor(t, whole_rollout=True), process, logits, group_size=2)
    assert_allclose(whole.mean, truth, atol=1e-12)
    assert np.abs(row.mean - truth).max() > 1e-3


def test_the_z_score_changes_the_direction():
    process, logits = PROBLEMS["decoy"]()
    found = metrics(group_gradient(standardised, process, logits, group_size=3), policy_gradient(process, logits))
    assert found["cosine"] is not None
    assert found["cosine"] < 0.99


# --------------------------------------------------------------------------------- groups, every way


def test_multisets_stand_for_all_orders():
    process, logits = PROBLEMS["stochastic-tool"]()
    probability = all_rollouts(process, logits).probability
    sets, weights = unordered_groups(probability, 3)
    orders, chances = ordered_groups(probability, 3)
    assert (len(probability), len(sets), len(orders)) == (12, 364, 1728)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert chances.sum() == pytest.approx(1, abs=1e-12)
    for estimator in (leave_one_out, standardised, one_step):
        a = group_gradient(estimator, process, logits, group_size=3)
        b = group_gradient(estimator, process, logits, group_size=3, ordered=True)
        assert (a.num_groups, b.num_groups) == (364, 1728)
        assert_allclose(a.mean, b.mean, atol=1e-12)
        assert_allclose(a.covariance, b.covariance, atol=1e-12)
        assert a.sign_agreement == pytest.approx(b.sign_agreement)
        assert a.rank_correlation == pytest.approx(b.rank_correlation)


def test_multiplicities_by_hand():
    # (0,0), (0,1), (1,1) with ¼ · ¼, 2 · ¼ · ¾, ¾ · ¾;  and 30 rollouts of one kind are one group
    sets, weights = unordered_groups(np.array([0.25, 0.75]), 2)
    assert sets.tolist() == [[0, 0], [0, 1], [1, 1]]
    assert_allclose(weights, [1 / 16, 6 / 16, 9 / 16])
    assert_allclose(unordered_groups(np.array([1.0]), 30)[1], [1.0])


@pytest.mark.parametrize("estimator", [leave_one_out, standardised, by_turn_index])
def test_sampled_groups_agree_with_all_groups(estimator):
    process, logits = PROBLEMS["stop-or-go"]()
    exact = group_gradient(estimator, process, logits, group_size=3)
    sampled = group_gradient(estimator, process, logits, group_size=3, limit=0, samples=20_000)
    assert exact.exact
    assert not sampled.exact
    assert (np.abs(sampled.mean - exact.mean) <= 4 * sampled.standard_error + 1e-15).all()
    assert_allclose(sampled.covariance, exact.covariance, atol=0.05 * np.abs(exact.covariance).max())
    assert sampled.rank_correlation == pytest.approx(exact.rank_correlation, abs=0.03)


def test_a_simulation_turn_by_turn_agrees_with_all_groups():
    """Independent of the enumeration: states, actions and moves are drawn one by one."""
    process, logits = PROBLEMS["stochastic-tool"]()
    draw, groups, group_size = np.random.default_rng(1), 4000, 3
    policy, scores = action_probabilities(process, logits), action_scores(process, logits)
    rewards, outcomes, taken = [], [], []
    for _ in range(groups * group_size):
        state, paid, steps = int(draw.choice(len(process.start), p=process.start)), [], []
        while not process.terminal[state] and len(paid) < process.max_turns:
            action = int(draw.choice(policy.shape[1], p=policy[state]))
            after = int(draw.choice(len(policy), p=process.transition[state, action]))
            paid.append({"turn": process.turn_reward[state, action, after]})
            steps.append(scores[state, action])
            state = after
        rewards.append(paid)
        outcomes.append({"outcome": process.outcome[state]})
        taken += steps
    table = turn_table(np.repeat(np.arange(groups), group_size).tolist(), rewards, outcomes)
    each = np.zeros((groups, len(logits)))
    np.add.at(each, table.group, standardised(table).advantages[:, None] * np.array(taken) / group_size)
    error = each.std(0, ddof=1) / math.sqrt(groups)
    exact = group_gradient(standardised, process, logits, group_size=group_size)
    assert (np.abs(each.mean(0) - exact.mean) <= 4 * error + 1e-15).all()


def test_an_estimator_that_looks_beyond_its_group_needs_a_call_per_group():
    process = search()
    logits = np.zeros(len(process.choices))
    with pytest.raises(ValueError, match="per_group=True"):
        group_gradient(whitened, process, logits, group_size=2)
    # in a table of its own, whitening over the table is the z-score over the group
    alone = group_gradient(whitened, process, logits, group_size=2, per_group=True)
    apart = group_gradient(standardised, process, logits, group_size=2)
    assert_allclose(alone.mean, apart.mean, atol=1e-12)
    assert_allclose(alone.covariance, apart.covariance, atol=1e-12)


def test_a_call_per_group_changes_nothing_for_others():
    process, logits = PROBLEMS["tokens"]()
    together = group_gradient(by_turn_index, process, logits, group_size=2)
    apart = group_gradient(by_turn_index, process, logits, group_size=2, per_group=True)
    assert_allclose(together.mean, apart.mean, atol=1e-12)
    assert_allclose(together.covariance, apart.covariance, atol=1e-12)


def test_an_estimator_that_minds_the_order_needs_all_orders():
    # the first rollout gets 0, the others are unbiased: (G−1)/G of the gradient, as if by Dr. GRPO
    process, logits = PROBLEMS["stochastic-tool"]()
    with pytest.raises(ValueError, match="ordered=True"):
        group_gradient(minus_first, process, logits, group_size=3)
    found = group_gradient(minus_first, process, logits, group_size=3, ordered=True)
    assert_allclose(found.mean, 2 / 3 * policy_gradient(process, logits), atol=1e-12)


def test_tables_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch):
    process, logits = PROBLEMS["ragged"]()
    whole = group_gradient(leave_one_out, process, logits, group_size=2)
    monkeypatch.setattr("turnwise.lab.exact.CHUNK", 14)
    parts = group_gradient(leave_one_out, process, logits, group_size=2)
    assert_allclose(parts.covariance, whole.covariance, atol=1e-15)
    assert parts.rank_correlation == pytest.approx(whole.rank_correlation)


# ------------------------------------------------------------------------------------------- refusals


MOVES = {"a": {"x": [(1.0, "b", 0.0)]}}


@pytest.mark.parametrize(
    ("start", "moves", "outcomes", "turns", "message"),
    [
        ({"a": 0.5}, MOVES, {}, 1, "start must be probabilities"),
        ({"b": 1.0}, MOVES, {}, 1, "'b' has no actions"),
        ({"a": 1.0}, MOVES, {"z": 1.0}, 1, "got 'z'"),
        ({"a": 1.0}, MOVES, {"b": math.nan}, 1, "outcome must be finite; entry \\[1\\]"),
        ({"a": 1.0}, MOVES, {}, 0, "max_turns must be a whole number >= 1 and finite; got 0"),
        ({"a": 1.0}, {"a": {"x": [(0.5, "b", 0.0)]}}, {}, 1, "sum to 1; those of 'x' in 'a'"),
        ({"a": 1.0}, {"a": {"x": [(0.5, "b", 0.0), (0.5, "b", 1.0)]}}, {}, 1, "'x' in 'a' has two"),
        ({"a": 1.0}, {"a": {"x": MOVES["a"]["x"], "x y": MOVES["a"]["x"]}}, {}, 1, "'x' begins 'x y'"),
        ({"a": 1.0}, {"a": {" ": MOVES["a"]["x"]}}, {}, 1, "action 0 of 'a' has none"),
    ],
)
def test_a_broken_process_is_refused_with_its_place(start, moves, outcomes, turns, message):
    with pytest.raises(ValueError, match=message):
        turn_process(start, moves, outcomes, max_turns=turns)


def test_what_cannot_be_computed_is_refused():
    process = search()
    logits = np.zeros(len(process.choices))
    with pytest.raises(ValueError, match="no choice 'cal'"):
        logit_table(process, {"ask": {"cal": 1.0}})
    with pytest.raises(ValueError, match="6 finite numbers"):
        policy_gradient(process, np.zeros(2))
    with pytest.raises(ValueError, match="3 at most; there are 4 after turn 2"):
        all_rollouts(process, logits, limit=3)
    with pytest.raises(ValueError, match="group_size must be a whole number >= 1"):
        group_gradient(leave_one_out, process, logits, group_size=0)
    with pytest.raises(ValueError, match="one finite number per turn"):
        group_gradient(lambda t: Credit(advantages=np.full(len(t.rollout), np.nan)), process, logits, group_size=2)
    with pytest.raises(ValueError, match="must not be 0"):
        metrics(group_gradient(leave_one_out, process, logits, group_size=2), np.zeros(6))


# -------------------------------------------------------------------------------- problems and the map


def test_problems_have_what_they_are_named_for():
    lengths = {name: set(all_rollouts(*make()).length.tolist()) for name, make in PROBLEMS.items()}
    assert lengths["ragged"] == lengths["stop-or-go"] == {1, 2, 3}
    assert lengths["sparse"] == {3}
    process, logits = PROBLEMS["one-decisive-turn"](turns=4)
    found = all_rollouts(process, logits)
    assert (np.abs(found.advantage[found.index == 1]) > 0.1).all()
    assert_allclose(found.advantage[found.index != 1], 0, atol=1e-12)
    process, logits = PROBLEMS["sparse"](paying=0)
    assert (process.turn_reward == 0).all()
    process, logits = PROBLEMS["tokens"]()
    assert set(all_rollouts(process, logits).tokens.tolist()) == {1, 2, 3}
    # the shiny call pays ½ more at once, and is worse: its Q is below that of the plain one
    process, logits = PROBLEMS["decoy"]()
    shiny, plain = solve(process, logits).q[0, 0]
    assert shiny < plain


def test_every_cell_of_the_usual_map_is_a_problem_with_a_gradient():
    for problem, parameters in CELLS:
        assert np.linalg.norm(policy_gradient(*PROBLEMS[problem](**parameters))) > 0.05


def the_map():
    cells = [("decoy", {}), ("stochastic-tool", {"noise": 0.4})]
    estimators = {"rloo": leave_one_out, "dr-grpo": minus_mean, "whitened": whitened, "none": no_credit}
    return bias_map(estimators, cells=cells, group_sizes=(2, 3), per_group=["whitened"], limit=100, samples=200)


def no_credit(table: TurnTable) -> Credit:
    return Credit(advantages=np.zeros(len(table.rollout)))


def test_the_map_has_a_row_for_each_estimator_problem_and_group_size():
    rows = the_map()
    keys = [(r["estimator"], r["problem"], r["parameters"], r["group_size"]) for r in rows]
    places = [
        ("decoy", "", 2),
        ("decoy", "", 3),
        ("stochastic-tool", "noise=0.4", 2),
        ("stochastic-tool", "noise=0.4", 3),
    ]
    names = ["rloo", "dr-grpo", "whitened", "none"]
    assert keys == [(name, *place) for place, name in itertools.product(places, names)]
    first = {(r["estimator"], r["group_size"]): r for r in rows if r["problem"] == "decoy"}
    assert first["rloo", 2]["bias"] == pytest.approx(0, abs=1e-12)
    assert first["dr-grpo", 2]["bias"] == pytest.approx(1 / 2)
    assert first["dr-grpo", 3]["bias"] == pytest.approx(1 / 3)
    assert first["none", 2]["bias"] == 1
    assert first["none", 2]["best_mse"] == 1
    assert first["none", 2]["cosine"] is None
    assert [r["exact"] for r in rows[::4]] == [True, True, True, False]
    assert json.loads(json_text(rows)) == rows


def test_the_map_takes_every_order_for_those_that_need_it():
    # the first of two rollouts gets 0: half the gradient
    (row,) = bias_map({"first": minus_first}, cells=[("decoy", {})], group_sizes=[2], ordered=["first"])
    assert row["bias"] == pytest.approx(1 / 2)
    assert row["num_groups"] == 25


def test_the_text_table_has_a_line_per_place_and_marks_what_is_sampled():
    lines = text_table(the_map(), "cosine").splitlines()
    assert lines[2].split() == ["problem", "G", "rloo", "dr-grpo", "whitened", "none"]
    assert lines[4].split()[:4] == ["decoy", "2", "1.00", "1.00"]
    assert lines[4].split()[-1] == "–"
    assert lines[-1].startswith("stochastic-tool (noise=0.4)")
    assert "~" in lines[-1]
    assert len({len(line) for line in lines[2:]}) == 1


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_the_figure_is_valid_and_has_every_number(metric: str):
    rows = the_map()
    root = ET.fromstring(heat_map(rows, metric))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == METRICS[metric][0]
    assert {"rloo", "dr-grpo", "whitened", "none", "decoy", "stochastic-tool (noise=0.4)"} <= set(texts)
    numbers = [text for text in texts if text and re.fullmatch(r"–|~?-?\d+\.\d\d", text)]
    assert len(numbers) == len(rows)


def test_a_map_that_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="got 'baas'"):
        heat_map(the_map(), "baas")
    with pytest.raises(ValueError, match="got none"):
        text_table([])
    with pytest.raises(ValueError, match="got 'chess'"):
        bias_map({"rloo": leave_one_out}, cells=[("chess", {})])
    with pytest.raises(ValueError, match="got 'gdpo'"):
        bias_map({"rloo": leave_one_out}, per_group=["gdpo"])
