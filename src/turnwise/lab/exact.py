"""The truth about a turn process, and the exact mean and covariance of what a group estimator makes of it.

The objective is the expected sum of turn rewards and outcome, undiscounted, within `max_turns` turns.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from turnwise.credit import Credit, TurnTable
from turnwise.credit.parts import check_number
from turnwise.credit.table import RolloutKeys, Rollouts, TurnKeys, Turns
from turnwise.lab.process import (
    Choices,
    Logits,
    TurnProcess,
    action_log_probabilities,
    action_probabilities,
    action_scores,
    choice_probabilities,
)

Estimator = Callable[[TurnTable], Credit]
"""Any function from the turn table to one advantage per turn."""
TurnStates = Float[np.ndarray, "L S"]
"""L is K + 1: one more than the turns."""
TurnActions = Float[np.ndarray, "K S A"]
TurnChoices = Float[np.ndarray, "K P"]
Members = Int[np.ndarray, "T G"]
"""Groups, each as the numbers of its rollouts."""
Weights = Float[np.ndarray, "T"]
"""One number per group."""
Gradients = Float[np.ndarray, "T P"]
"""One gradient per group."""
Covariance = Float[np.ndarray, "P P"]

CHUNK = 100_000
"""About how many rollouts are put into one table."""
ZERO = 1e-10
"""Advantages below this are rounding errors."""


# ------------------------------------------------------------------------------------------- the truth


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Values and advantages by turn index; they depend on it, since rollouts are cut off."""

    v: TurnStates
    """V of the state before turn k; for k = `max_turns`, what being cut off there pays."""
    q: TurnActions
    """Q of the actions of turn k; 0 where a state has no such action."""
    advantage: TurnActions
    """Q − V; 0 where a state has no such action."""
    token_q: TurnChoices
    """Q of each token of turn k, given the words before it."""
    token_advantage: TurnChoices
    """Q of a token minus the value before it."""


def solve(process: TurnProcess, logits: Logits) -> Solution:
    """The exact values of a policy, by dynamic programming from the last turn back.

    Q_k(s, a) = Σ_s' P(s'|s, a) (r(s, a, s') + V_k+1(s')),    V_k(s) = Σ_a π(a|s) Q_k(s, a)
    V_k(s) = outcome of s   where s is terminal or k = max_turns
    Q_k(s, words so far) = Σ of π(a|s) Q_k(s, a) / Σ of π(a|s)   over the actions that begin with these words
    """
    policy = action_probabilities(process, logits)
    v = np.tile(process.outcome, (process.max_turns + 1, 1))
    q = np.zeros((process.max_turns, *policy.shape))
    for k in range(process.max_turns - 1, -1, -1):
        q[k] = (process.transition * (process.turn_reward + v[k + 1])).sum(-1)
        v[k] = np.where(process.terminal, process.outcome, (policy * q[k]).sum(-1))
    chosen = _shares(process, logits)
    token_q = np.einsum("ksa,sap->kp", q, chosen)
    alternatives = process.decision[:, None] == process.decision
    token_v = (token_q * choice_probabilities(process, logits)) @ alternatives
    return Solution(
        v=v,
        q=q,
        advantage=np.where(process.through.any(-1), q - v[:-1, :, None], 0.0),
        token_q=token_q,
        token_advantage=token_q - token_v,
    )


def _shares(process: TurnProcess, logits: Logits) -> Choices:
    """The probability of each action where its words so far are chosen: π(a|s) over the sum of those that share them.

    From logarithms, since the probabilities themselves may all be too small for numbers.
    """
    through = process.through > 0
    logs = np.where(through, action_log_probabilities(process, logits)[:, :, None], -np.inf)
    powers = np.exp(logs - logs.max((0, 1)))
    return powers / powers.sum((0, 1))


def expected_return(process: TurnProcess, logits: Logits) -> float:
    """J = Σ_s start(s) V_1(s)."""
    return float(process.start @ solve(process, logits).v[0])


def policy_gradient(process: TurnProcess, logits: Logits) -> Logits:
    """The exact gradient of the expected return by the logits.

        ∇J = Σ_k Σ_s d_k(s) Σ_a π(a|s) A_k(s, a) ∇log π(a|s)   with d_k(s) the probability of s before turn k

    Sutton et al. 2000, the policy gradient theorem, for a horizon of `max_turns`.
    """
    policy, solution = action_probabilities(process, logits), solve(process, logits)
    taken = np.zeros_like(policy)
    here = process.start
    for advantage in solution.advantage:
        taken += here[:, None] * policy * advantage
        here = np.einsum("s,sa,sat->t", here, policy, process.transition)
    return np.einsum("sa,sap->p", taken, action_scores(process, logits))


# --------------------------------------------------------------------------------------- every rollout


@dataclass(frozen=True, kw_only=True)
class AllRollouts:
    """Every rollout that can happen; turns as rows, rollout by rollout, with the truth about each."""

    probability: Rollouts
    length: RolloutKeys
    """The number of turns."""
    outcome: Rollouts
    index: TurnKeys
    """The turn's place in its rollout, from 0."""
    state: TurnKeys
    action: TurnKeys
    turn_reward: Turns
    tokens: TurnKeys
    value: Turns
    """V of the state before the turn."""
    advantage: Turns
    """A of the turn's action."""

    @cached_property
    def first(self) -> RolloutKeys:
        """The row of each rollout's first turn."""
        return np.cumsum(self.length) - self.length


def all_rollouts(process: TurnProcess, logits: Logits, *, limit: int = 100_000) -> AllRollouts:
    """Every rollout with its probability, shorter ones first.

    probability = start(s₁) Πₖ π(aₖ|sₖ) P(sₖ₊₁|sₖ, aₖ)

    Raises ValueError where there are more than `limit`.
    """
    policy, solution = action_probabilities(process, logits), solve(process, logits)
    state, action, after = np.nonzero(process.transition)
    probability = policy[state, action] * process.transition[state, action, after]
    by_length: list[tuple[np.ndarray, np.ndarray]] = []
    at = np.flatnonzero(process.start)
    way, reached = np.zeros((len(at), 0), dtype=np.int64), process.start[at]
    for k in range(1, process.max_turns + 1):
        fan = np.bincount(state, minlength=len(process.states))[at]
        came = np.repeat(np.arange(len(at)), fan)
        move = _ranges(np.searchsorted(state, at), fan)
        way, reached, at = np.column_stack([way[came], move]), reached[came] * probability[move], after[move]
        if (found := len(at) + sum(len(each) for _, each in by_length)) > limit:
            raise ValueError(
                f"the rollouts must be {limit} at most; there are {found} after turn {k}; take fewer turns"
            )
        ended = process.terminal[at] | (k == process.max_turns)
        by_length.append((way[ended], reached[ended]))
        way, reached, at = way[~ended], reached[~ended], at[~ended]
    moves = np.concatenate([ways.ravel() for ways, _ in by_length])
    length = np.concatenate([np.full(len(ways), ways.shape[1]) for ways, _ in by_length])
    index = _ranges(np.zeros_like(length), length)
    s, a = state[moves], action[moves]
    return AllRollouts(
        probability=np.concatenate([each for _, each in by_length]),
        length=length,
        outcome=process.outcome[after[moves[np.cumsum(length) - 1]]],
        index=index,
        state=s,
        action=a,
        turn_reward=process.turn_reward[s, a, after[moves]],
        tokens=process.through[s, a].sum(-1).astype(np.int64),
        value=solution.v[index, s],
        advantage=solution.advantage[index, s, a],
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each start, as many as its length says, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def group_table(rollouts: AllRollouts, members: Members) -> tuple[TurnTable, TurnKeys]:
    """The turn table of many groups, one for each row of `members`, and the row of `rollouts` behind each of its rows.

    It has the turn reward "turn" and the outcome "outcome", anchors (the state), token counts, and as a critic's
    values the true ones. Rollouts that are cut off end there, without a bootstrap.
    """
    member = members.ravel()
    length = rollouts.length[member]
    rows = _ranges(rollouts.first[member], length)
    table = TurnTable(
        rollout=np.repeat(np.arange(len(member)), length),
        index=rollouts.index[rows],
        group=np.repeat(np.arange(len(member)) // members.shape[1], length),
        turn_rewards={"turn": rollouts.turn_reward[rows]},
        outcome_rewards={"outcome": rollouts.outcome[member]},
        values=rollouts.value[rows],
        anchor=rollouts.state[rows],
        tokens=rollouts.tokens[rows],
    )
    return table, rows


# ---------------------------------------------------------------------------------------- every group


def ordered_groups(probability: Rollouts, group_size: int) -> tuple[Members, Weights]:
    """Every group as an ordered tuple of rollouts, and its probability: Π p."""
    members = np.indices((len(probability),) * group_size).reshape(group_size, -1).T
    return members, probability[members].prod(1)


def unordered_groups(probability: Rollouts, group_size: int) -> tuple[Members, Weights]:
    """Every group as a multiset of rollouts, and its probability.

    G! / Π_i cᵢ! · Π p   with cᵢ how often rollout i occurs
    """
    pool = range(len(probability))
    flat = itertools.chain.from_iterable(itertools.combinations_with_replacement(pool, group_size))
    members = np.fromiter(flat, dtype=np.int64).reshape(-1, group_size)
    orders, occurrence = np.full(len(members), float(math.factorial(group_size))), np.ones(len(members))
    for g in range(1, group_size):
        occurrence = np.where(members[:, g] == members[:, g - 1], occurrence + 1, 1.0)
        orders /= occurrence
    return members, orders * probability[members].prod(1)


@dataclass(frozen=True, kw_only=True)
class GroupGradient:
    """What an estimator's group gradient is in expectation, and how it varies."""

    mean: Logits
    covariance: Covariance
    standard_error: Logits
    """Of the mean; 0 where it is exact."""
    num_groups: int
    """How many groups were enumerated, or sampled."""
    exact: bool
    sign_agreement: float | None
    """Share of turns whose estimated advantage has the true one's sign, among those where the true one is not 0. An
    estimate of 0 has no sign. None where the true advantages are all 0."""
    rank_correlation: float | None
    """Spearman's correlation of estimated and true advantages over all turns of all groups. None where either is the
    same everywhere."""


def group_gradient(
    estimator: Estimator,
    process: TurnProcess,
    logits: Logits,
    *,
    group_size: int,
    per_group: bool = False,
    ordered: bool = False,
    limit: int = 50_000,
    samples: int = 20_000,
    seed: int = 0,
) -> GroupGradient:
    """The exact mean and covariance of the gradient that an estimator makes of a group of `group_size` rollouts.

        ĝ = 1/G Σᵢ Σₖ Aᵢₖ ∇log π(aᵢₖ|sᵢₖ),    E ĝ = Σ over all groups of probability · ĝ

    Groups that differ only in the order of their rollouts are enumerated once, with their joint probability; with
    `ordered`, one by one. Where there are more than `limit`, `samples` groups are drawn instead, the same ones for
    every estimator and equal `seed`. Thousands of groups share one table; `per_group` gives each its own, for
    estimators that look beyond a group, as whitening does, and is then the step of that one group.
    Raises ValueError where an estimator needs `per_group` or `ordered` and they are not given, and for fewer than two
    samples, which have no covariance.
    """
    check_number("group_size", group_size, 1, whole=True)
    check_number("limit", limit, 0, whole=True)
    check_number("samples", samples, 2, whole=True)
    rollouts = all_rollouts(process, logits)
    size = len(rollouts.probability)
    exact = (size**group_size if ordered else math.comb(size + group_size - 1, group_size)) <= limit
    if exact:
        members, weights = (ordered_groups if ordered else unordered_groups)(rollouts.probability, group_size)
    else:
        draw = np.random.default_rng(seed)
        chance = rollouts.probability / rollouts.probability.sum()
        members, weights = draw.choice(size, size=(samples, group_size), p=chance), np.full(samples, 1 / samples)
    _check_symmetry(estimator, rollouts, members, per_group=per_group, ordered=ordered or not exact)

    scores = action_scores(process, logits)
    gradients, estimates, truths, shares = [], [], [], []
    for part in _parts(len(members), 1 if per_group else max(1, CHUNK // group_size)):
        found, rows = _advantages(estimator, rollouts, members[part])
        group = np.repeat(np.arange(len(members[part])), rollouts.length[members[part]].sum(1))
        gradients.append(_gradients(found, group, rollouts.state[rows], rollouts.action[rows], scores) / group_size)
        estimates.append(found)
        truths.append(rollouts.advantage[rows])
        shares.append(weights[part][group])
    return _group_gradient(np.concatenate(gradients), weights, exact, *map(np.concatenate, (estimates, truths, shares)))


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(at, at + size) for at in range(0, length, size))


def _advantages(estimator: Estimator, rollouts: AllRollouts, members: Members) -> tuple[Turns, TurnKeys]:
    table, rows = group_table(rollouts, members)
    found = estimator(table).advantages
    if found.shape != rows.shape or not np.isfinite(found).all():
        raise ValueError(f"an estimator must give one finite number per turn ({len(rows)}); got {found}")
    return found, rows


def _gradients(found: Turns, group: TurnKeys, state: TurnKeys, action: TurnKeys, scores: np.ndarray) -> Gradients:
    """Σ of advantage · ∇log π over each group's turns."""
    _, actions, choices = scores.shape
    cells = scores.shape[0] * actions
    place = group * cells + state * actions + action
    credit = np.bincount(place, weights=found, minlength=(int(group[-1]) + 1) * cells)
    return credit.reshape(-1, cells) @ scores.reshape(cells, choices)


def _check_symmetry(
    estimator: Estimator, rollouts: AllRollouts, members: Members, *, per_group: bool, ordered: bool
) -> None:
    """A look at a few groups: alone as in company, and in the other order, they must get the same."""
    few = members[np.linspace(0, len(members) - 1, 12).astype(int)]
    alone = [_advantages(estimator, rollouts, few[t : t + 1])[0] for t in range(len(few))]
    if not per_group and not np.allclose(np.concatenate(alone), _advantages(estimator, rollouts, few)[0]):
        raise ValueError("the estimator must treat each group apart; this one looks beyond it; give per_group=True")
    if ordered:
        return
    for t, before in enumerate(alone):
        turned = _advantages(estimator, rollouts, few[t : t + 1, ::-1])[0]
        lengths = rollouts.length[few[t]]
        parts = np.split(turned, np.cumsum(lengths[::-1])[:-1])
        if not np.allclose(before, np.concatenate(parts[::-1])):
            raise ValueError("the estimator must not depend on the order of rollouts; this one does; give ordered=True")


def _group_gradient(
    gradients: Gradients, weights: Weights, exact: bool, estimates: Turns, truths: Turns, shares: Turns
) -> GroupGradient:
    mean = weights @ gradients
    centred = gradients - mean
    covariance = (weights[:, None] * centred).T @ centred
    if not exact and len(weights) > 1:
        covariance *= len(weights) / (len(weights) - 1)
    return GroupGradient(
        mean=mean,
        covariance=covariance,
        standard_error=np.zeros_like(mean) if exact else np.sqrt(np.diag(covariance) / len(weights)),
        num_groups=len(weights),
        exact=exact,
        sign_agreement=sign_agreement(estimates, truths, shares),
        rank_correlation=rank_correlation(estimates, truths, shares),
    )


# --------------------------------------------------------------------------------------------- metrics


def sign_agreement(estimates: Turns, truths: Turns, weights: Turns) -> float | None:
    """The weighted share of entries whose estimate has the truth's sign, where the truth is not 0."""
    there = np.abs(truths) > ZERO
    if not there.any():
        return None
    same = np.where(np.abs(estimates) > ZERO, np.sign(estimates), 0.0) == np.sign(truths)
    return float((weights * same)[there].sum() / weights[there].sum())


def rank_correlation(estimates: Turns, truths: Turns, weights: Turns) -> float | None:
    """Spearman's rank correlation of weighted entries; ties share their middle rank."""
    a, b = _middle_ranks(estimates, weights), _middle_ranks(truths, weights)
    a, b = a - np.average(a, weights=weights), b - np.average(b, weights=weights)
    spread = (weights @ a**2) * (weights @ b**2)
    return float(weights @ (a * b) / math.sqrt(spread)) if spread > ZERO**2 else None


def _middle_ranks(values: Turns, weights: Turns) -> Turns:
    """The share of weight below each value and half of that at it; values that differ by rounding alone are tied."""
    _, inverse = np.unique(np.round(values / ZERO), return_inverse=True)
    mass = np.bincount(inverse, weights=weights)
    return ((np.cumsum(mass) - mass / 2) / mass.sum())[inverse]


def metrics(found: GroupGradient, truth: Logits) -> dict[str, float | None]:
    """How a group gradient compares with the true gradient.

        bias = |E ĝ − ∇J| / |∇J|,    cosine = E ĝ · ∇J / (|E ĝ| |∇J|)
        variance = trace Cov ĝ / |∇J|²,    mse = E|ĝ − ∇J|² / |∇J|² = bias² + variance
        best_mse = min over c of E|c ĝ − ∇J|² / |∇J|² = 1 − (E ĝ · ∇J)² / (|∇J|² E|ĝ|²)

    `best_mse` compares estimators of different scale, z-scores among them. `bias_error` is the standard error of E ĝ
    where groups were sampled, and about what sampling alone adds to the bias. `cosine` is None where E ĝ is 0.
    """
    length = float(np.linalg.norm(truth))
    if length < ZERO:
        raise ValueError(f"the true gradient must not be 0; got {truth.tolist()}; look at another policy")
    bias = float(np.linalg.norm(found.mean - truth)) / length
    variance = float(np.trace(found.covariance)) / length**2
    mean = float(np.linalg.norm(found.mean)) / length
    along = float(found.mean @ truth) / length**2
    square = mean**2 + variance
    return {
        "bias": bias,
        "bias_error": float(np.linalg.norm(found.standard_error)) / length,
        "cosine": along / mean if mean > ZERO else None,
        "variance": variance,
        "mse": bias**2 + variance,
        "best_mse": 1 - along**2 / square if square > ZERO**2 else 1.0,
        "sign_agreement": found.sign_agreement,
        "rank_correlation": found.rank_correlation,
    }
