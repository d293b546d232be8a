"""Turn rewards and outcomes to turn advantages: pure functions of the turn table.

Every estimator returns a `Credit`: the advantages, and the streams they were made of, so that a reader can be shown
why a turn got what it got. In all of them a group without variance, and a group of one, gives zero, never NaN.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from turnwise.credit.table import Rollouts, TurnKeys, Turns, TurnTable


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One normalised quantity: what each turn's value was compared with, and what came out."""

    value: Turns
    baseline: Turns
    """The group's mean."""
    advantage: Turns


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Turn advantages and the streams behind them, rows as in the table."""

    advantages: Turns
    streams: Mapping[str, Stream]


def group_mean(values: Turns, keys: TurnKeys) -> Turns:
    """The mean over all rows with the same key, at each row."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return (np.bincount(inverse, weights=values) / counts)[inverse]


def group_std(values: Turns, keys: TurnKeys, *, ddof: int) -> Turns:
    """The standard deviation over all rows with the same key, at each row; 0 in groups of `ddof` rows or fewer.

    Exactly 0 where all values of a group are equal.
    """
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=values) / counts
    squares = np.bincount(inverse, weights=(values - means[inverse]) ** 2)
    variance = squares / np.maximum(counts - ddof, 1)
    low, high = np.full(len(counts), np.inf), np.full(len(counts), -np.inf)
    np.minimum.at(low, inverse, values)
    np.maximum.at(high, inverse, values)
    return np.where((counts > ddof) & (high > low), np.sqrt(variance), 0.0)[inverse]


def z_score(values: Turns, keys: TurnKeys, *, ddof: int = 1, eps: float = 1e-4) -> Turns:
    """Values minus their group's mean, in units of its standard deviation.

        z = (x − mean) / (std + eps),    0 where std = 0

    `keys` names each row's group.
    """
    std = group_std(values, keys, ddof=ddof)
    centred = values - group_mean(values, keys)
    return np.where(std > 0, centred / (std + np.where(std > 0, eps, 1.0)), 0.0)


def _trajectory_credit(table: TurnTable, rewards: Rollouts, *, ddof: int, eps: float) -> Credit:
    """One z-scored number per rollout, on all of its turns."""
    advantage = z_score(rewards, table.rollout_group, ddof=ddof, eps=eps)[table.rollout]
    stream = Stream(
        value=rewards[table.rollout],
        baseline=group_mean(rewards, table.rollout_group)[table.rollout],
        advantage=advantage,
    )
    return Credit(advantages=advantage, streams={"trajectory": stream})


def grpo_or(table: TurnTable, *, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """GRPO on the outcome reward alone: one advantage for the whole rollout.

        Aᵢ = (Rᴼᵢ − mean Rᴼ) / (std Rᴼ + eps)   over the rollouts of the group

    Shao et al. 2024, arXiv 2402.03300; "GRPO-OR" of arXiv 2505.11821.
    """
    return _trajectory_credit(table, table.outcome_reward(), ddof=ddof, eps=eps)


def grpo_mr(table: TurnTable, *, gamma: float = 1.0, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """GRPO on the merged reward: turn rewards and outcome in one sum, one advantage for the whole rollout.

        Rᵢ = Σₖ γ^(k−1) rᵢₖ + γ^(Kᵢ−1) Rᴼᵢ,    Aᵢ = (Rᵢ − mean R) / (std R + eps)

    "GRPO-MR" of arXiv 2505.11821, section 3. `gamma` discounts per turn.
    """
    discount = gamma ** table.index.astype(float)
    merged = np.bincount(table.rollout, weights=discount * table.turn_reward())
    merged = merged + discount[table.last] * table.outcome_reward()
    return _trajectory_credit(table, merged, ddof=ddof, eps=eps)


def mt_grpo(table: TurnTable, *, alpha: float = 1.0, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """MT-GRPO: a turn is credited with its own reward, those after it, and the outcome.

        Aᴵᵢₖ = z-score of rᵢₖ over the rollouts of the group that took a turn k
        Aᴼᵢ  = z-score of Rᴼᵢ over the rollouts of the group
        Aᵢₖ  = Aᴵᵢₖ + α Aᵢ,ₖ₊₁,    Aᵢ,Kᵢ = Aᴵᵢ,Kᵢ + Aᴼᵢ

    Zeng et al. 2025, arXiv 2505.11821, appendix D, as chains: groups by turn index instead of by identical state. The
    paper leaves groups with unequal numbers of turns open. Here a turn without a turn reward (a rollout that answers
    where its siblings search) enters the statistics of its index with reward 0 and receives that Aᴵ too; so its one
    turn gets Aᴵ + Aᴼ. Where all rollouts have equally many turns and the last has no turn reward, Aᴵ of the last
    turn is 0 and the paper's form remains.
    """
    reward = table.turn_reward()
    keys = turn_index_keys(table)
    own = z_score(reward, keys, ddof=ddof, eps=eps)
    outcome = table.outcome_reward()
    last = z_score(outcome, table.rollout_group, ddof=ddof, eps=eps)
    advantages = reward_to_go(own, last, table, discount=alpha)
    streams = {
        "turn": Stream(value=reward, baseline=group_mean(reward, keys), advantage=own),
        "outcome": Stream(
            value=outcome[table.rollout],
            baseline=group_mean(outcome, table.rollout_group)[table.rollout],
            advantage=last[table.rollout],
        ),
    }
    return Credit(advantages=advantages, streams=streams)


def turn_index_keys(table: TurnTable) -> TurnKeys:
    """A key per turn that is shared by the turns of one group at one index."""
    _, group = np.unique(table.group, return_inverse=True)  # small numbers, whatever the caller's are
    return group * (int(table.index.max()) + 1) + table.index


def reward_to_go(turns: Turns, final: Rollouts, table: TurnTable, *, discount: float) -> Turns:
    """Each turn's own number plus the discounted rest of its rollout.

    Gₖ = xₖ + discount · Gₖ₊₁,    G_K = x_K + final   for the last turn K
    """
    out = turns.astype(float).copy()
    out[table.last] += final
    for k in range(int(table.index.max()) - 1, -1, -1):
        rows = np.flatnonzero((table.index == k) & ~_is_last(table))
        out[rows] += discount * out[rows + 1]
    return out


def _is_last(table: TurnTable) -> np.ndarray:
    last = np.zeros(len(table.rollout), dtype=bool)
    last[table.last] = True
    return last


ESTIMATORS: dict[str, Callable[..., Credit]] = {
    "grpo-or": grpo_or,
    "grpo-mr": grpo_mr,
    "mt-grpo": mt_grpo,
}
"""The estimators by their published names."""
