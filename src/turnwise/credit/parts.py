"""What estimators are made of: statistics within groups, and returns along rollouts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from turnwise.credit.table import Rollouts, TurnKeys, Turns, TurnTable


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One normalised quantity: what each turn's value was compared with, and what came out."""

    value: Turns
    baseline: Turns
    """What the value is compared with: a mean over the group or its others, or a critic's value."""
    advantage: Turns


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Turn advantages and the streams behind them, rows as in the table."""

    advantages: Turns
    streams: Mapping[str, Stream] = field(default_factory=dict)


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


def leave_one_out_mean(values: Turns, keys: TurnKeys, *, alone: float = 0.0) -> Turns:
    """The mean over all *other* rows with the same key, at each row; `alone` where there are none.

    Kool et al. 2019; RLOO, Ahmadian et al. 2024, arXiv 2402.14740.
    """
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    others = (counts - 1)[inverse]
    sums = np.bincount(inverse, weights=values)[inverse] - values
    return np.where(others > 0, sums / np.maximum(others, 1), alone)


def whiten(values: Turns, *, eps: float = 1e-8) -> Turns:
    """All values minus their mean, in units of their standard deviation (ddof 1); 0 where all are equal.

    (x − mean) / (std + eps)   over the whole step, groups together
    """
    return z_score(values, np.zeros(len(values), dtype=np.int64), ddof=1, eps=eps)


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
