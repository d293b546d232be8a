"""Generalised advantages over tokens and turns: worked numbers, identities, and an exact process."""

from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from turnwise.credit import TokenTable, TurnTable, reinforce_pp, turn_table
from turnwise.credit.gae import (
    bi_level_gae,
    gae,
    mt_ppo,
    mt_ppo_paid_at_end,
    ppo_mr,
    ppo_or,
    sampled_token_rewards,
    step_ppo,
    token_gae,
    token_rewards,
    turn_ppo,
    vetta,
    whiten_tokens,
)

few = settings(max_examples=40)
unit = st.sampled_from([0.0, 0.3, 0.9, 1.0])


@dataclass(frozen=True)
class Run:
    """One rollout: a turn is its token values, its reward (None: absent), its value and what the tool wrote after."""

    turns: list[tuple[list[float], float | None, float, int]]
    outcome: float | None = None
    bootstrap: float = 0.0
    group: int = 0


def turns_of(runs: list[Run]) -> TurnTable:
    return turn_table(
        [run.group for run in runs],
        [[{} if reward is None else {"r": reward} for _, reward, _, _ in run.turns] for run in runs],
        [{} if run.outcome is None else {"o": run.outcome} for run in runs],
        values=[[value for _, _, value, _ in run.turns] for run in runs],
        bootstrap=[run.bootstrap for run in runs],
        tokens=[[len(values) for values, _, _, _ in run.turns] for run in runs],
    )


def tokens_of(runs: list[Run]) -> TokenTable:
    """Their tokens; the value at a token that the tool wrote is NaN, which must never be read."""
    turn, values, row = [], [], 0
    for run in runs:
        for own, _, _, after in run.turns:
            turn += [row] * len(own) + [-1] * after
            values += own + [np.nan] * after
            row += 1
    return TokenTable(turns=turns_of(runs), turn=np.array(turn), values=np.array(values))


def without_tool_tokens(table: TokenTable) -> TokenTable:
    written = table.turn >= 0
    return replace(table, turn=table.turn[written], values=None if table.values is None else table.values[written])


# A rollout of two turns with two sampled tokens each and two tool tokens between, then one of a single turn of one
# token that was cut off where the value was 4.
#   values  2 1 | tool tool | 3 1      turn reward 4, outcome 2
#   values  5                          turn reward 1, bootstrap 4
TWO = [
    Run([([2.0, 1.0], 4.0, 2.0, 2), ([3.0, 1.0], None, 3.0, 0)], 2.0),
    Run([([5.0], 1.0, 5.0, 0)], bootstrap=4.0),
]

number = st.integers(-8, 8).map(lambda n: n / 4)


@st.composite
def runs(draw, *, one_token: bool = False, max_turns: int = 4, cut: bool = True) -> list[Run]:
    """Ragged rollouts with tool tokens after some turns, some of them cut off."""
    lengths = st.integers(1, 1 if one_token else 3)
    found = []
    for _ in range(draw(st.integers(1, 4))):
        turns = []
        for _ in range(draw(st.integers(1, max_turns))):
            values = [draw(number) for _ in range(draw(lengths))]
            turns.append((values, draw(number | st.none()), draw(number), draw(st.integers(0, 2))))
        bootstrap = draw(number | st.just(0.0)) if cut else 0.0
        found.append(Run(turns, draw(number | st.none()), bootstrap, draw(st.integers(0, 2))))
    return found


# ----------------------------------------------------------------------------- worked examples


def test_placements_pay_at_the_last_sampled_token():
    table = tokens_of(TWO)
    assert_allclose(token_rewards(table, "outcome"), [0, 0, 0, 0, 0, 2, 0])
    assert_allclose(token_rewards(table, "merged"), [0, 0, 0, 0, 0, 6, 1])
    assert_allclose(token_rewards(table, "turns"), [0, 4, 0, 0, 0, 2, 1])


def test_the_last_turns_own_reward_is_paid_with_the_outcome():
    table = tokens_of([Run([([0.0], 1.0, 0.0, 1), ([0.0, 0.0], 3.0, 0.0, 2)], 10.0)])
    assert_allclose(token_rewards(table, "turns"), [1, 0, 0, 13, 0, 0])


def test_an_unknown_placement_is_refused():
    with pytest.raises((ValueError, TypeCheckError), match=r"'end'(.|\n)*'outcome', 'merged', 'turns'"):
        token_rewards(tokens_of(TWO), "end")  # pyright: ignore[reportArgumentType]


def test_token_gae_skips_what_the_tool_wrote():
    # γ = λ = ½, so γλ = ¼. Steps of the first rollout: values 2 1 3 1, rewards 0 4 0 2.
    #   δ₄ = 2 + 0 − 1 = 1              A₄ = 1
    #   δ₃ = 0 + ½·1 − 3 = −5/2         A₃ = −5/2 + ¼·1 = −9/4
    #   δ₂ = 4 + ½·3 − 1 = 9/2          A₂ = 9/2 − ¼·9/4 = 63/16
    #   δ₁ = 0 + ½·1 − 2 = −3/2         A₁ = −3/2 + ¼·63/16 = −33/64
    # The second was cut off: A = 1 + ½·4 − 5 = −2
    credit = mt_ppo(tokens_of(TWO), gamma=0.5, lam=0.5)
    assert_allclose(credit.advantages, [-33 / 64, 63 / 16, 0, 0, -9 / 4, 1, -2])
    assert_allclose(credit.returns, [2 - 33 / 64, 1 + 63 / 16, 0, 0, 3 - 9 / 4, 2, 3])


def test_the_three_ppos_without_discount_are_return_minus_value():
    # to go: outcome 2 everywhere, then bootstrap 4; turns 6 6 2 2, then 1 + 4; merged 6 6 6 6, then 5
    table = tokens_of(TWO)
    assert_allclose(ppo_or(table).advantages, [2 - 2, 2 - 1, 0, 0, 2 - 3, 2 - 1, 4 - 5])
    assert_allclose(mt_ppo(table).advantages, [6 - 2, 6 - 1, 0, 0, 2 - 3, 2 - 1, 5 - 5])
    assert_allclose(ppo_mr(table).advantages, [6 - 2, 6 - 1, 0, 0, 6 - 3, 6 - 1, 5 - 5])


def test_turn_ppo_is_gae_over_turns():
    # γ = λ = ½: δ₂ = 2 − 3 = −1;  δ₁ = 4 + ½·3 − 2 = 7/2,  A₁ = 7/2 − ¼ = 13/4;  cut off: 1 + ½·4 − 5 = −2
    credit = turn_ppo(turns_of(TWO), gamma=0.5, lam=0.5)
    assert_allclose(credit.advantages, [13 / 4, -1, -2])
    assert_allclose(credit.streams["turn"].value, [2 + 13 / 4, 2, 3])
    assert_allclose(credit.streams["turn"].baseline, [2, 3, 5])


def test_step_ppo_is_whitened_over_turns():
    # turn advantages 13/4, −1, −2 (above): mean 1/12; centred 38/12, −13/12, −25/12;
    # variance (1444 + 169 + 625) / 144 / 2 = 2238/288
    centred, std = np.array([38, -13, -25]) / 12, np.sqrt(2238 / 288)
    credit = step_ppo(turns_of(TWO), gamma=0.5, lam=0.5, eps=0.0)
    assert_allclose(credit.advantages, centred / std)
    assert_allclose(credit.streams["turn"].advantage, [13 / 4, -1, -2])
    assert_allclose(step_ppo(turns_of(TWO), gamma=0.5, lam=0.5, eps=1.0).advantages, centred / (std + 1))


def test_bi_level_gae_pays_each_turn_its_return():
    # Turns: values at their last tokens 1, 1; γ = ½, λ = 1:
    #   A₂ = 2 − 1 = 1;   A₁ = 4 + ½·1 − 1 + ½·A₂ = 4      returns A + V: 2 and 5
    # Tokens with γ′ = ½, λ′ = 1, V = 0 after a turn:
    #   turn 2: last 2 − 1 = 1;   first ½·2 − 3 = −2;      turn 1: last 5 − 1 = 4;   first ½·5 − 2 = ½
    # Second rollout: A = 1 + ½·4 − 5 = −2, return 3, token 3 − 5 = −2
    credit = bi_level_gae(tokens_of(TWO), gamma=0.5, lam=1.0, token_gamma=0.5, token_lam=1.0)
    assert_allclose(credit.advantages, [0.5, 4, 0, 0, -2, 1, -2])
    assert_allclose(credit.returns, [2.5, 5, 0, 0, 1, 2, 3])


def test_vetta_adds_the_centred_token_advantage_to_the_turns():
    # Turn advantages 13/4, −1, −2 (above). Token advantages at γ = λ = 1: 4 5 | −1 1 | 0, turn means 9/2, 0, 0.
    # α = 3:  13/4 ∓ 3/2,   −1 ∓ 3,   −2
    credit = vetta(tokens_of(TWO), alpha=3.0, gamma=0.5, lam=0.5)
    assert_allclose(credit.advantages, [7 / 4, 19 / 4, 0, 0, -4, 2, -2])
    assert_allclose(credit.returns, [6, 6, 0, 0, 2, 2, 5])


@pytest.mark.parametrize(
    ("estimate", "published"),
    [
        (ppo_or, {"gamma": 1.0, "lam": 1.0}),
        (ppo_mr, {"gamma": 1.0, "lam": 1.0}),
        (mt_ppo, {"gamma": 1.0, "lam": 1.0}),
        (bi_level_gae, {"gamma": 0.95, "lam": 1.0, "token_gamma": 1.0, "token_lam": 1.0}),
        (vetta, {"alpha": 1.0, "gamma": 0.95, "lam": 0.95, "token_gamma": 1.0, "token_lam": 1.0}),
        (turn_ppo, {"gamma": 0.99, "lam": 0.9}),
        (step_ppo, {"gamma": 0.99, "lam": 1.0}),
    ],
)
def test_the_defaults_are_the_published_settings(estimate, published):
    table = turns_of(TWO) if estimate in (turn_ppo, step_ppo) else tokens_of(TWO)
    assert_allclose(estimate(table).advantages, estimate(table, **published).advantages, rtol=0, atol=0)


def test_whitened_tokens_leave_out_what_the_tool_wrote():
    # sampled: 1, 3: mean 2, std √2; the tool's 0 is neither counted nor moved
    table = tokens_of([Run([([0.0], None, 0.0, 1), ([0.0], None, 0.0, 0)])])
    half = np.sqrt(0.5)
    assert_allclose(whiten_tokens(table, np.array([1.0, 0.0, 3.0]), eps=0.0), [-half, 0, half])
    assert_allclose(whiten_tokens(table, np.array([2.0, 0.0, 2.0])), [0, 0, 0])


# ------------------------------------------------------------------- rewards where the tool writes


def test_a_reward_on_a_tools_token_goes_to_the_sampled_token_before():
    table = tokens_of(TWO)  # sampled, sampled, tool, tool, sampled, sampled | sampled
    assert_allclose(sampled_token_rewards(table, np.array([1.0, 2, 4, 8, 16, 32, 64])), [1, 14, 0, 0, 16, 32, 64])


def test_a_reward_before_the_first_sampled_token_goes_to_that_one():
    turns = turns_of([Run([([0.0, 0.0], None, 0.0, 0)])])
    table = TokenTable(turns=turns, turn=np.array([-1, -1, 0, 0]))
    assert_allclose(sampled_token_rewards(table, np.array([1.0, 2, 4, 8])), [0, 0, 7, 8])


@few
@given(runs(), st.integers(0, 2**32 - 1))
def test_rewards_are_moved_and_never_dropped(found, seed):  # identity 32
    table = tokens_of(found)
    rewards = np.random.default_rng(seed).normal(size=len(table.turn))
    moved = sampled_token_rewards(table, rewards)
    assert (moved[table.turn < 0] == 0).all()
    assert_allclose(moved.sum(), rewards.sum())
    assert_allclose(moved.cumsum()[table.last[-1]], rewards.sum())
    credit, as_moved = (token_gae(table, each, gamma=0.9, lam=0.8) for each in (rewards, moved))
    assert_allclose(credit.advantages, as_moved.advantages)


def test_a_reward_that_the_tool_gave_counts_in_gae():  # identity 32, and broken: dropped
    table = tokens_of([Run([([1.0], None, 0.0, 1), ([2.0], None, 0.0, 0)])])
    assert_allclose(token_gae(table, np.array([0.0, 5, 0]), gamma=1.0, lam=1.0).advantages, [5 - 1, 0, 0 - 2])
    assert_allclose(token_gae(table, np.zeros(3), gamma=1.0, lam=1.0).advantages, [0 - 1, 0, 0 - 2])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [(np.zeros(6), "one entry per token .7.; got 6"), (np.array([0, 0, np.nan, 0, 0, 0, 0]), "token 2 has nan")],
)
def test_bad_token_rewards_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        token_gae(tokens_of(TWO), rewards, gamma=1.0, lam=1.0)


@pytest.mark.parametrize("estimate", [ppo_or, ppo_mr, mt_ppo, mt_ppo_paid_at_end, bi_level_gae, vetta])
def test_values_must_be_given(estimate):
    with pytest.raises(ValueError, match="needs the values of the token table"):
        estimate(replace(tokens_of(TWO), values=None))


@pytest.mark.parametrize("estimate", [turn_ppo, step_ppo])
def test_turn_values_must_be_given(estimate):
    with pytest.raises(ValueError, match="needs the column 'values'"):
        estimate(replace(turns_of(TWO), values=None))


def test_vetta_needs_turn_values_too():
    table = tokens_of(TWO)
    with pytest.raises(ValueError, match="needs the column 'values'"):
        vetta(replace(table, turns=replace(table.turns, values=None)))


@pytest.mark.parametrize(("gamma", "lam", "name"), [(1.5, 1.0, "gamma"), (1.0, -0.1, "lam"), (np.nan, 1.0, "gamma")])
def test_discounts_must_lie_between_zero_and_one(gamma, lam, name):
    with pytest.raises(ValueError, match=f"{name} must be in"):
        turn_ppo(turns_of(TWO), gamma=gamma, lam=lam)


def test_arrays_of_other_lengths_are_refused_not_broadcast():
    with pytest.raises(TypeCheckError):
        gae(np.zeros(3), np.zeros(1), np.zeros(3, dtype=int), np.zeros(1), gamma=1.0, lam=1.0)


# ------------------------------------------------------------------- against a textbook with loops


def textbook(rewards: list[float], values: list[float], bootstrap: float, gamma: float, lam: float) -> list[float]:
    """GAE of one rollout as a double sum, with no recursion."""
    following = [*values[1:], bootstrap]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, len(deltas))) if gamma * lam else deltas[t]
        for t in range(len(deltas))
    ]


def run_rewards(run: Run, placement: str) -> list[list[float]]:
    """The rewards of a run's sampled tokens, turn by turn."""
    paid = [[0.0] * len(values) for values, _, _, _ in run.turns]
    total = 0.0
    for rewards, (_, reward, _, _) in zip(paid, run.turns, strict=True):
        rewards[-1] += (reward or 0.0) if placement == "turns" else 0.0
        total += reward or 0.0
    paid[-1][-1] += (run.outcome or 0.0) + (total if placement == "merged" else 0.0)
    return paid


@few
@given(runs(), unit, unit)
def test_token_gae_agrees_with_the_textbook(found, gamma, lam):
    table = tokens_of(found)
    for placement, estimate in (("outcome", ppo_or), ("merged", ppo_mr), ("turns", mt_ppo)):
        expected = []
        for run in found:
            paid = [reward for turn in run_rewards(run, placement) for reward in turn]
            values = [value for own, _, _, _ in run.turns for value in own]
            expected += textbook(paid, values, run.bootstrap, gamma, lam)
        credit = estimate(table, gamma=gamma, lam=lam)
        assert_allclose(credit.advantages[table.turn >= 0], expected, rtol=1e-10, atol=1e-10)


@few
@given(runs(), unit, unit)
def test_turn_gae_agrees_with_the_textbook(found, gamma, lam):
    expected = []
    for run in found:
        paid = [sum(turn) for turn in run_rewards(run, "turns")]
        expected += textbook(paid, [value for _, _, value, _ in run.turns], run.bootstrap, gamma, lam)
    assert_allclose(turn_ppo(turns_of(found), gamma=gamma, lam=lam).advantages, expected, rtol=1e-10, atol=1e-10)


@few
@given(runs(), unit, unit, unit, unit)
def test_bi_level_gae_and_vetta_agree_with_the_textbook(found, gamma, lam, token_gamma, token_lam):
    bi_level, fused = [], []
    for run in found:
        ends = [own[-1] for own, _, _, _ in run.turns]
        paid = [sum(turn) for turn in run_rewards(run, "turns")]
        outer = textbook(paid, ends, run.bootstrap, gamma, lam)
        turn = textbook(paid, [value for _, _, value, _ in run.turns], run.bootstrap, gamma, lam)
        inner = [reward for each in run_rewards(run, "turns") for reward in each]
        flat = [value for own, _, _, _ in run.turns for value in own]
        token = iter(textbook(inner, flat, run.bootstrap, token_gamma, token_lam))
        for k, (own, _, _, _) in enumerate(run.turns):
            bi_level += textbook([0.0] * (len(own) - 1) + [outer[k] + ends[k]], own, 0.0, token_gamma, token_lam)
            mine = [next(token) for _ in own]
            fused += [turn[k] + 0.7 * (a - sum(mine) / len(mine)) for a in mine]
    table = tokens_of(found)
    written = table.turn >= 0
    both = {"gamma": gamma, "lam": lam, "token_gamma": token_gamma, "token_lam": token_lam}
    assert_allclose(bi_level_gae(table, **both).advantages[written], bi_level, rtol=1e-10, atol=1e-10)
    assert_allclose(vetta(table, alpha=0.7, **both).advantages[written], fused, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5, 0.99, 1.0])
def test_long_rollouts_stay_exact(gamma):
    # 3,000 tokens: powers of a small discount underflow to 0, which is what they are worth
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=3000), rng.normal(size=3000)
    expected, carry, after = np.zeros(3000), 0.0, 0.25
    for t in range(2999, -1, -1):
        carry = rewards[t] + gamma * after - values[t] + gamma * 0.95 * carry
        expected[t], after = carry, values[t]
    one = np.zeros(3000, dtype=np.int64)
    assert_allclose(gae(rewards, values, one, np.array([0.25]), gamma=gamma, lam=0.95), expected, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------- identities


@few
@given(runs(), unit, unit)
def test_mt_ppo_without_turn_rewards_is_ppo_or(found, gamma, lam):  # identity 10
    bare = tokens_of([replace(run, turns=[(own, None, v, after) for own, _, v, after in run.turns]) for run in found])
    assert_allclose(mt_ppo(bare, gamma=gamma, lam=lam).advantages, ppo_or(bare, gamma=gamma, lam=lam).advantages)


def test_mt_ppo_with_turn_rewards_is_not_ppo_or():  # identity 10, broken
    table = tokens_of(TWO)
    assert not np.allclose(mt_ppo(table).advantages, ppo_or(table).advantages)


@few
@given(runs())
def test_paid_at_the_end_differs_by_what_was_paid_before(found):  # identity 9
    table = tokens_of(found)
    written = table.turn >= 0
    paid = token_rewards(table, "turns")[written]
    rollout = table.turns.rollout[table.turn[written]]
    before = np.concatenate([np.append(0.0, paid[rollout == i].cumsum()[:-1]) for i in range(table.turns.num_rollouts)])
    late = mt_ppo_paid_at_end(table).advantages - mt_ppo(table).advantages
    assert_allclose(late[written], before, atol=1e-12)


def test_paid_at_the_end_under_a_discount_differs_by_more():  # identity 9, broken
    # the first rollout's 4, paid two steps later at γ = ½, is worth 1 at the second token: 1 − 4 = −3, not 0
    table = tokens_of(TWO)
    late = mt_ppo_paid_at_end(table, gamma=0.5).advantages - mt_ppo(table, gamma=0.5).advantages
    assert_allclose(late[1], 4 / 4 - 4)


@few
@given(runs(), unit)
def test_lambda_zero_is_one_step_and_lambda_one_is_return_minus_value(found, gamma):  # identity 11
    table = tokens_of(found)
    written = table.turn >= 0
    assert table.values is not None
    values = table.values[written]
    rewards = token_rewards(table, "turns")
    rollout = table.turns.rollout[table.turn[written]]
    last = np.append(rollout[1:] != rollout[:-1], True)
    after = np.where(last, table.turns.bootstrap[rollout], np.append(values[1:], 0.0))
    one_step = rewards[written] + gamma * after - values
    assert_allclose(token_gae(table, rewards, gamma=gamma, lam=0.0).advantages[written], one_step)
    to_go = token_gae(replace(table, values=np.zeros(len(written))), rewards, gamma=gamma, lam=1.0)
    credit = token_gae(table, rewards, gamma=gamma, lam=1.0)
    assert_allclose(credit.advantages[written], to_go.advantages[written] - values, atol=1e-10)


def test_zero_values_and_lambda_one_are_the_reward_to_go():  # identity 11, and broken: λ = ½
    # γ = ½, rewards 0 4 | 0 2: 2, 1, 4 + ½ = 9/2, 9/4; then 1 + ½·4 = 3
    table = replace(tokens_of(TWO), values=np.zeros(7))
    assert_allclose(mt_ppo(table, gamma=0.5).advantages, [9 / 4, 9 / 2, 0, 0, 1, 2, 3])
    assert not np.allclose(mt_ppo(table, gamma=0.5, lam=0.5).advantages, mt_ppo(table, gamma=0.5).advantages)


def test_zero_values_without_discount_are_what_reinforce_pp_whitens():  # identity 11, and broken: a discount
    # 4 + 2 at all four tokens of the first, 1 at that of the second, which ended itself
    table = tokens_of([TWO[0], replace(TWO[1], bootstrap=0.0)])
    table = replace(table, values=np.zeros(7))
    whole = reinforce_pp(table.turns).streams["trajectory"].value
    assert_allclose(whole, [6, 6, 1])
    written = table.turn >= 0
    assert_allclose(ppo_mr(table).advantages[written], whole[table.turn[written]])
    assert_allclose(ppo_mr(table, gamma=0.5).advantages[written], [6 / 8, 6 / 4, 6 / 2, 6, 1])


@few
@given(runs(one_token=True), unit, unit)
def test_turn_gae_is_token_gae_where_turns_are_one_token_long(found, gamma, lam):  # identity 13
    same = [replace(run, turns=[([v], reward, v, after) for _, reward, v, after in run.turns]) for run in found]
    table = tokens_of(same)
    expected = mt_ppo(table, gamma=gamma, lam=lam).advantages[table.turn >= 0]
    assert_allclose(turn_ppo(table.turns, gamma=gamma, lam=lam).advantages, expected)


def test_turn_gae_is_not_token_gae_where_turns_are_longer():  # identity 13, broken
    # two tokens of value 0, reward 1, γ = ½: the turn gets 1, its first token ½
    table = tokens_of([Run([([0.0, 0.0], 1.0, 0.0, 0)])])
    assert_allclose(turn_ppo(table.turns, gamma=0.5).advantages, [1])
    assert_allclose(mt_ppo(table, gamma=0.5).advantages, [0.5, 1])


@few
@given(runs(max_turns=1, cut=False), unit, unit, unit, unit)
def test_bi_level_gae_with_one_turn_is_token_gae(found, gamma, lam, token_gamma, token_lam):  # identity 13
    table = tokens_of(found)
    both = bi_level_gae(table, gamma=gamma, lam=lam, token_gamma=token_gamma, token_lam=token_lam)
    assert_allclose(both.advantages, mt_ppo(table, gamma=token_gamma, lam=token_lam).advantages, atol=1e-12)


@few
@given(runs())
def test_bi_level_gae_without_discount_is_token_gae(found):
    table = tokens_of(found)
    both = bi_level_gae(table, gamma=1.0)
    assert_allclose(both.advantages, mt_ppo(table).advantages, atol=1e-12)
    assert_allclose(both.returns, mt_ppo(table).returns, atol=1e-12)


def test_bi_level_gae_with_a_turn_discount_is_not_token_gae():  # identity 13, broken: two turns
    table = tokens_of(TWO)
    assert not np.allclose(bi_level_gae(table, gamma=0.9).advantages, mt_ppo(table).advantages)


@few
@given(runs())
def test_bi_level_gae_gives_a_turns_last_token_the_turns_advantage(found):
    table = tokens_of(found)
    assert table.values is not None
    at_ends = replace(table.turns, values=table.values[table.last])
    turn = turn_ppo(at_ends, gamma=0.8, lam=0.7).advantages
    both = bi_level_gae(table, gamma=0.8, lam=0.7, token_gamma=0.6, token_lam=0.5)
    assert_allclose(both.advantages[table.last], turn, atol=1e-12)


def test_bi_level_gae_keeps_turns_without_reward():
    # no reward in turn 1 and an outcome of 1; γ = ½, values 0: the first turn gets ½, not nothing
    table = tokens_of([Run([([0.0, 0.0], 0.0, 0.0, 1), ([0.0], None, 0.0, 0)], 1.0)])
    assert_allclose(bi_level_gae(table, gamma=0.5).advantages, [0.5, 0.5, 0, 1])


@few
@given(runs(), unit, unit, st.sampled_from([0.0, 1.0, 3.0]))
def test_vetta_has_the_turns_advantage_as_its_mean(found, gamma, lam, alpha):  # identity 14
    table = tokens_of(found)
    fused = vetta(table, alpha=alpha, gamma=gamma, lam=lam, token_gamma=0.9, token_lam=0.8).advantages
    turn = turn_ppo(table.turns, gamma=gamma, lam=lam).advantages
    means = [fused[table.turn == k].mean() for k in range(len(turn))]
    assert_allclose(means, turn, atol=1e-12)
    if alpha == 0:
        assert_allclose(fused[table.turn >= 0], turn[table.turn[table.turn >= 0]])


def test_adding_token_advantages_uncentred_would_move_the_mean():  # identity 14, broken
    table = tokens_of(TWO)
    plain = turn_ppo(table.turns).advantages[[0, 0, 1, 1, 2]] + mt_ppo(table).advantages[table.turn >= 0]
    assert not np.allclose(plain[:2].mean(), turn_ppo(table.turns).advantages[0])
    # and with α = 1, not 0, VETTA is not Turn-PPO at each token
    turn = turn_ppo(table.turns, gamma=1.0, lam=1.0).advantages[[0, 0, 1, 1, 2]]
    alone, fused = (vetta(table, alpha=a, gamma=1.0, lam=1.0).advantages[table.turn >= 0] for a in (0.0, 1.0))
    assert_allclose(alone, turn)
    assert np.abs(fused - turn).max() > 0.4


ON_TOKENS = [ppo_or, ppo_mr, mt_ppo, bi_level_gae, vetta]
on_tokens = st.sampled_from(ON_TOKENS)
on_turns = st.sampled_from([turn_ppo, step_ppo])


@few
@given(runs(), on_tokens)
def test_tools_tokens_change_nothing_and_get_exactly_zero(found, estimate):  # identities 13 and 32
    table = tokens_of(found)
    written = table.turn >= 0
    credit, bare = estimate(table, lam=0.9), estimate(without_tool_tokens(table), lam=0.9)
    for name in ("advantages", "returns"):
        assert (getattr(credit, name)[~written] == 0).all()
        assert_allclose(getattr(credit, name)[written], getattr(bare, name), rtol=0, atol=0)


def test_tools_tokens_counted_as_steps_would_change_the_rest():  # identities 13 and 32, broken
    # values 0, outcome 1, λ = ½: sampled, tool, sampled gives ½ at the first; with the tool's as a step it is ¼
    skipped = tokens_of([Run([([0.0], None, 0.0, 1), ([0.0], None, 0.0, 0)], 1.0)])
    counted = tokens_of([Run([([0.0, 0.0], None, 0.0, 0), ([0.0], None, 0.0, 0)], 1.0)])
    assert_allclose(mt_ppo(skipped, lam=0.5).advantages, [0.5, 0, 1])
    assert_allclose(mt_ppo(counted, lam=0.5).advantages, [0.25, 0.5, 1])


@few
@given(runs(cut=False), number, number, unit, unit)
def test_a_cut_rollout_is_one_whose_rest_is_worth_the_bootstrap(found, reward, value, gamma, lam):  # identity 15
    # the rest: one more token with value V that pays V, so that its own advantage is 0
    whole = [replace(run, turns=[*run.turns, ([value], value, value, 0)], outcome=None) for run in found]
    cut = [replace(run, bootstrap=value, outcome=None) for run in found]
    long, short = tokens_of(whole), tokens_of(cut)
    for estimate in ON_TOKENS[2:]:
        full = estimate(long, gamma=gamma, lam=lam).advantages
        rest = np.isin(np.arange(len(full)), long.last[long.turns.last])
        assert_allclose(full[~rest], estimate(short, gamma=gamma, lam=lam).advantages, atol=1e-12)
    turns = turn_ppo(long.turns, gamma=gamma, lam=lam).advantages
    assert_allclose(np.delete(turns, long.turns.last), turn_ppo(short.turns, gamma=gamma, lam=lam).advantages)


def test_without_its_bootstrap_a_cut_rollout_loses_the_rest():  # identity 15, broken
    cut = tokens_of([Run([([1.0], 0.0, 1.0, 0)], bootstrap=3.0)])
    assert_allclose(mt_ppo(cut).advantages, [3 - 1])
    ended = replace(cut, turns=replace(cut.turns, bootstrap=None))
    assert_allclose(mt_ppo(ended).advantages, [0 - 1])
    assert_allclose(turn_ppo(ended.turns, gamma=1.0).advantages, [0 - 1])


# ----------------------------------------------------------------- the order and company of rollouts


@few
@given(runs(), on_tokens, st.randoms(use_true_random=False))
def test_the_order_of_rollouts_and_their_groups_change_no_token(found, estimate, random):  # identity 31
    order = list(range(len(found)))
    random.shuffle(order)
    table, shuffled = tokens_of(found), tokens_of([replace(found[i], group=5 - found[i].group) for i in order])
    lengths = [sum(len(own) + after for own, _, _, after in run.turns) for run in found]
    parts = np.split(estimate(table).advantages, np.cumsum(lengths)[:-1])
    assert_allclose(estimate(shuffled).advantages, np.concatenate([parts[i] for i in order]), rtol=0, atol=0)


@few
@given(runs(), on_tokens)
def test_a_rollout_has_the_same_advantages_alone(found, estimate):  # identity 31
    alone = np.concatenate([estimate(tokens_of([run])).advantages for run in found])
    assert_allclose(estimate(tokens_of(found)).advantages, alone, rtol=0, atol=0)
    turns = np.concatenate([turn_ppo(turns_of([run])).advantages for run in found])
    assert_allclose(turn_ppo(turns_of(found)).advantages, turns, rtol=0, atol=0)


@few
@given(runs(), on_turns, st.randoms(use_true_random=False))
def test_the_order_of_rollouts_changes_no_turn(found, estimate, random):
    order = list(range(len(found)))
    random.shuffle(order)
    parts = np.split(estimate(turns_of(found)).advantages, turns_of(found).last[:-1] + 1)
    shuffled = estimate(turns_of([found[i] for i in order])).advantages
    assert_allclose(shuffled, np.concatenate([parts[i] for i in order]), atol=1e-7)


def test_whitening_does_depend_on_company():  # identity 31, broken
    both = step_ppo(turns_of(TWO)).advantages
    assert not np.allclose(both[:2], step_ppo(turns_of(TWO[:1])).advantages)


@few
@given(runs(), on_tokens, on_turns, unit, unit)
def test_nothing_is_ever_infinite(found, estimate, of_turns, gamma, lam):  # identity 33
    credit = estimate(tokens_of(found), gamma=gamma, lam=lam)
    assert np.isfinite(credit.advantages).all()
    assert np.isfinite(credit.returns).all()
    assert np.isfinite(of_turns(turns_of(found), gamma=gamma, lam=lam).advantages).all()


def test_equal_advantages_and_a_single_turn_are_whitened_to_zero():
    one = [Run([([0.0], 0.1, 0.0, 0)])]
    assert_allclose(step_ppo(turns_of(one)).advantages, [0], atol=0)
    assert_allclose(step_ppo(turns_of(one * 3)).advantages, [0, 0, 0], atol=0)


def test_single_precision_values_are_computed_in_double():  # identity 33, and broken: in single precision
    table = tokens_of(TWO)
    assert table.values is not None
    narrow = replace(table, values=table.values.astype(np.float32))
    assert mt_ppo(narrow, gamma=0.7).advantages.dtype == np.float64
    assert_allclose(mt_ppo(narrow, gamma=0.7).advantages, mt_ppo(table, gamma=0.7).advantages, rtol=0, atol=0)
    assert narrow.values is not None
    single = np.float32(0.7) * narrow.values[1] - narrow.values[0]  # the first token's difference, 0.7 · 1 − 2
    assert single != mt_ppo(narrow, gamma=0.7, lam=0.0).advantages[0] == 0.7 - 2


# -------------------------------------------------------------------------------- an exact process


@dataclass
class Path:
    """One way through the process: its probability, what every sampled token saw and what it did, and its rewards."""

    probability: float
    seen: list[str]
    turns: list[list[str]]
    rewards: list[float] = field(default_factory=list)
    outcome: float = 0.0


def process() -> list[Path]:
    """All 13 ways through a process with a stochastic tool, ragged turns and tokens that depend on those before.

    Turn 1 is two tokens a, b: a = 1 with .6, b = 1 with .3 + .4a. Where both are 0 it ends with outcome ½. Else the
    tool writes o, which is 1 with .7 if b else .2; the turn is paid a + ½ o. Turn 2 is one token c, 1 with .5 + .2 o;
    the outcome is c where o = 1, and ¼ (1 − c) where o = 0.
    """
    found = []
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        second = 0.3 + 0.4 * a
        first = (0.6 if a else 0.4) * (second if b else 1 - second)
        if (a, b) == (0, 0):
            found.append(Path(first, ["", "0"], [["0", "0"]], [0.0], 0.5))
            continue
        for o in (0, 1):
            one = 0.7 if b else 0.2
            for c in (0, 1):
                third = 0.5 + 0.2 * o
                found.append(
                    Path(
                        first * (one if o else 1 - one) * (third if c else 1 - third),
                        ["", f"{a}", f"{a}{b}:{o}"],
                        [[f"{a}", f"{b}"], [f"{c}"]],
                        [a + 0.5 * o, 0.0],
                        float(c if o else 0.25 * (1 - c)),
                    )
                )
    return found


def averages(paths: list[Path], keys: list[list[str]], numbers: list[list[float]]) -> dict[str, float]:
    """The mean of the numbers at each key, weighted by the probability of the paths."""
    mass, total = defaultdict(float), defaultdict(float)
    for path, names, row in zip(paths, keys, numbers, strict=True):
        for name, entry in zip(names, row, strict=True):
            mass[name] += path.probability
            total[name] += path.probability * entry
    return {name: total[name] / mass[name] for name in mass}


def returns_to_go(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (u - t) * rewards[u] for u in range(t, len(rewards))) for t in range(len(rewards))]


def path_rewards(path: Path, placement: str) -> list[float]:
    run = Run([([0.0] * len(t), r, 0.0, 0) for t, r in zip(path.turns, path.rewards, strict=True)], path.outcome)
    return [reward for turn in run_rewards(run, placement) for reward in turn]


def exact(paths: list[Path], placement: str, gamma: float) -> tuple[list[list[str]], dict, dict]:
    """What each sampled token saw; the value of seeing it; and the value of seeing it and doing what it did."""
    # paid at the end, what was paid so far is part of the state; here what was seen tells it
    seen = [path.seen for path in paths]
    done = [[f"{s}>{a}" for s, a in zip(p.seen, "".join(map("".join, p.turns)), strict=True)] for p in paths]
    to_go = [returns_to_go(path_rewards(path, placement), gamma) for path in paths]
    return done, averages(paths, seen, to_go), averages(paths, done, to_go)


def exact_table(paths: list[Path], values: dict[str, float]) -> TokenTable:
    """All paths as rollouts, with the values of what was seen and a tool's token between turns."""
    found = []
    for path in paths:
        own = iter(path.seen)
        turns = [
            ([values[next(own)] for _ in turn], reward, 0.0, int(k + 1 < len(path.turns)))
            for k, (turn, reward) in enumerate(zip(path.turns, path.rewards, strict=True))
        ]
        found.append(Run([(v, r, v[0], after) for v, r, _, after in turns], path.outcome))
    return tokens_of(found)


def per_path(paths: list[Path], table: TokenTable, advantages: np.ndarray) -> list[list[float]]:
    lengths = [len(path.seen) for path in paths]
    return [part.tolist() for part in np.split(advantages[table.turn >= 0], np.cumsum(lengths)[:-1])]


def test_the_process_is_a_distribution():
    paths = process()
    assert len(paths) == 13
    assert_allclose(sum(path.probability for path in paths), 1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [0.7, 1.0])
@pytest.mark.parametrize(("placement", "estimate"), [("turns", mt_ppo), ("outcome", ppo_or)])
def test_with_exact_values_advantages_are_unbiased_for_every_lambda(placement, estimate, gamma, lam):
    # identity 12, and broken: a wrong value
    # E[A | s] = 0 and E[A | s, a] = Q(s, a) − V(s)
    paths = process()
    done, values, action_values = exact(paths, placement, gamma)
    table = exact_table(paths, values)
    found = per_path(paths, table, estimate(table, gamma=gamma, lam=lam).advantages)
    seen = [path.seen for path in paths]
    assert_allclose(list(averages(paths, seen, found).values()), 0, atol=1e-12)
    for name, mean in averages(paths, done, found).items():
        assert_allclose(mean, action_values[name] - values[name.split(">")[0]], atol=1e-12)
    # one value that is wrong is seen at λ < 1 in other states too, at λ = 1 only in its own
    wrong = exact_table(paths, {**values, "11:1": values["11:1"] + 1})
    means = averages(paths, seen, per_path(paths, wrong, estimate(wrong, gamma=gamma, lam=lam).advantages))
    assert_allclose(means["11:1"], -1, atol=1e-12)
    assert (abs(means["1"]) > 1e-3) == (lam < 1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_turn_gae_with_exact_values_is_unbiased_for_every_lambda(lam):  # identity 12, and broken: a wrong value
    paths, gamma = process(), 0.8
    starts = [[path.seen[0], *path.seen[2:]] for path in paths]
    done = [
        [f"{s}>{a}" for s, a in zip(s, map("".join, p.turns), strict=True)] for s, p in zip(starts, paths, strict=True)
    ]
    rewards = [[*path.rewards[:-1], path.rewards[-1] + path.outcome] for path in paths]
    to_go = [returns_to_go(each, gamma) for each in rewards]
    values, action_values = averages(paths, starts, to_go), averages(paths, done, to_go)
    found = [
        Run([([0.0], r, values[s], 1) for s, r in zip(state, path.rewards, strict=True)], path.outcome)
        for state, path in zip(starts, paths, strict=True)
    ]
    advantages = turn_ppo(turns_of(found), gamma=gamma, lam=lam).advantages
    parts = [part.tolist() for part in np.split(advantages, turns_of(found).last[:-1] + 1)]
    assert_allclose(list(averages(paths, starts, parts).values()), 0, atol=1e-12)
    for name, mean in averages(paths, done, parts).items():
        assert_allclose(mean, action_values[name] - values[name.split(">")[0]], atol=1e-12)
    wrong = turns_of(found)  # the value after a = b = 1 and a found o is 1 too high, once in each path there
    assert wrong.values is not None
    off = np.concatenate([[seen == "11:1" for seen in state] for state in starts])
    moved = turn_ppo(replace(wrong, values=wrong.values + off), gamma=gamma, lam=lam).advantages
    means = averages(paths, starts, [part.tolist() for part in np.split(moved, wrong.last[:-1] + 1)])
    assert_allclose(means["11:1"], -1, atol=1e-12)
    assert (abs(means[""]) > 1e-3) == (lam < 1)


def test_without_discount_and_with_exact_critics_placement_does_not_matter():
    # identity 9, and broken: the critic of the other
    # each placement with its own exact critic: the same advantage at every token of every path
    paths = process()
    credits = {}
    for placement, estimate in (("turns", mt_ppo), ("merged", mt_ppo_paid_at_end)):
        _, values, _ = exact(paths, placement, 1.0)
        credits[placement] = estimate(exact_table(paths, values)).advantages
    assert_allclose(credits["merged"], credits["turns"], atol=1e-12)
    # with λ < 1 the critic's error is 0 too, so it still does not; with the other's critic it does
    _, values, _ = exact(paths, "turns", 1.0)
    assert not np.allclose(mt_ppo_paid_at_end(exact_table(paths, values)).advantages, credits["turns"])


def test_under_a_discount_placement_matters_even_with_exact_critics():  # identity 9, broken
    paths = process()
    credits = []
    for placement, estimate in (("turns", mt_ppo), ("merged", mt_ppo_paid_at_end)):
        _, values, _ = exact(paths, placement, 0.7)
        credits.append(estimate(exact_table(paths, values), gamma=0.7).advantages)
    assert not np.allclose(*credits)
