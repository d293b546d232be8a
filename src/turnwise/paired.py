"""Statistics of few seeds: paired differences, exact tests, exact intervals, times that a run may never reach.

Numpy alone. Seeds are few and cost much, so nothing here leans on large numbers: where there are few enough resamples
or signs to write them all down, they are. `docs/compare.md` says what each number can and cannot bear.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 5
"""Differences that an interval takes. Of fewer, a 95 % interval is little more than the range."""
ENUMERATED = 8
"""Differences up to which the resamples are written down, 6,435 of them; beyond, `RESAMPLES` are drawn."""
RESAMPLES = 20_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Two bounds."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What one arm does beside another on the same seeds."""

    differences: tuple[float, ...]
    """Own value minus the baseline's, seed by seed."""
    mean: float
    interval: Interval | None
    """95 % bootstrap interval of the mean; None for fewer than `FEWEST` differences."""
    wins: int
    losses: int
    p: float
    """Of the two-sided sign test; ties count for neither side."""
    least_p: float
    """The smallest p that so many untied differences can have."""


def paired(own: Sequence[float], baseline: Sequence[float]) -> Paired:
    """One arm's values beside the baseline's, in the order of the seeds that both have."""
    if not len(own) == len(baseline) >= 1:
        raise ValueError(f"paired values must be equally many, one at least; got {len(own)} and {len(baseline)}")
    differences = [float(a) - float(b) for a, b in zip(own, baseline, strict=True)]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Paired(
        differences=tuple(differences),
        mean=sum(differences) / len(differences),
        interval=bootstrap_interval(differences) if len(differences) >= FEWEST else None,
        wins=wins,
        losses=losses,
        p=sign_test(wins, losses),
        least_p=sign_test(wins + losses, 0),
    )


# ------------------------------------------------------------------------------------------ resamples


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """The percentile bootstrap interval of the mean (Efron 1979).

    Up to `ENUMERATED` values from all resamples, with what each weighs; beyond from `RESAMPLES` drawn ones, always the
    same. The bounds are the smallest means with at least (1 ∓ level)/2 of the weight at or below them.
    """
    means, weights = resampled_means(values)
    order = np.argsort(means, kind="stable")
    below = np.cumsum(weights[order])
    tail = (1 - level) / 2
    low, high = (int(np.searchsorted(below, share - 1e-12)) for share in (tail, 1 - tail))
    return Interval(low=float(means[order][low]), high=float(means[order][min(high, len(means) - 1)]))


def resampled_means(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means of resamples and their probabilities.

    A resample of n values is how often each was drawn, (k₁ … kₙ) with Σ k = n. There are C(2n − 1, n) of them, each of
    probability n! / (k₁! … kₙ! nⁿ).
    """
    counts, weights = _resamples(len(values))
    return counts @ np.asarray(values, dtype=float) / len(values), weights


@functools.cache
def _resamples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample draws each of n values, and the resamples' probabilities."""
    if n > ENUMERATED:
        drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, RESAMPLES)
        return drawn, np.full(RESAMPLES, 1 / RESAMPLES)
    counts = np.array(list(_shares(n, n)))
    factorials = np.array([math.factorial(k) for k in range(n + 1)], dtype=float)
    return counts, factorials[n] / factorials[counts].prod(1) / float(n) ** n


def _shares(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as an ordered sum of `parts` numbers from 0 on."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _shares(total - first, parts - 1):
            yield (first, *rest)


# ------------------------------------------------------------------------------------ counts of successes


def sign_test(wins: int, losses: int) -> float:
    """The probability of a split at least as uneven where both signs are as likely; two-sided, exact.

    p = min(1, 2 Σ_{i ≤ min(wins, losses)} C(n, i) / 2ⁿ)   with n = wins + losses;   1 for n = 0
    """
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n)


def proportion_interval(count: int, total: int, *, level: float = 0.95) -> Interval:
    """The interval of Clopper and Pearson (1934) for a probability, of which `count` of `total` is what was seen.

    The low bound is the probability under which `count` or more have chance (1 − level)/2, the high bound that under
    which `count` or fewer have it. It covers the true probability at least as often as it says.
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"a count must be in [0, total] and the total 1 or more; got {count} of {total}")
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else _solved(lambda p: 1 - _at_most(count - 1, total, p), tail)
    high = 1.0 if count == total else 1 - _solved(lambda q: _at_most(count, total, 1 - q), tail)
    return Interval(low=low, high=high)


def _at_most(count: int, total: int, p: float) -> float:
    """The chance of `count` or fewer successes."""
    return sum(math.comb(total, i) * p**i * (1 - p) ** (total - i) for i in range(count + 1))


def _solved(rising: Callable[[float], float], value: float) -> float:
    """Where a function that rises over [0, 1] has a value."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


# --------------------------------------------------------------------------- times that may not be reached


@dataclass(frozen=True, kw_only=True)
class Time:
    """When a run reached something, or how long it was watched without."""

    at: float
    reached: bool

    def text(self, form: str = ",.0f") -> str:
        """`12`, or `>60` where it was not reached."""
        return f"{'' if self.reached else '>'}{self.at:{form}}"


def first_reaching(values: Sequence[float | None], threshold: float, *, window: int = 3) -> int | None:
    """The number, from 1, of the first step at which the mean of the last `window` steps is the threshold or more.

    None where it never is. One lucky step is not an arrival, hence the window; steps without a value count for nothing,
    and a run that is shorter than the window never arrives.
    """
    for end in range(window, len(values) + 1):
        known = [value for value in values[end - window : end] if value is not None]
        if known and sum(known) / len(known) >= threshold - 1e-12:
            return end
    return None


def median_time(times: Sequence[Time]) -> Time:
    """The middle time, of an even number the later of the two; one that was not reached comes after those that were.

    Where the middle one was not reached, the median is only known to be later than the shortest watch.
    """
    if not times:
        raise ValueError("a median must be of times; got none")
    reached = sorted(t.at for t in times if t.reached)
    middle = len(times) // 2
    if middle < len(reached):
        return Time(at=reached[middle], reached=True)
    return Time(at=min(t.at for t in times if not t.reached), reached=False)


def earlier(own: Time, other: Time) -> int:
    """1 where the own time is earlier, -1 where it is later, 0 where they are equal or nobody can tell.

    A time that was not reached is later than one that was only if it was watched for at least as long.
    """
    if own.reached and other.reached:
        return (own.at < other.at) - (own.at > other.at)
    if own.reached:
        return int(other.at >= own.at)
    if other.reached:
        return -int(own.at >= other.at)
    return 0


def area(values: Sequence[float | None], ends: Sequence[float], until: float) -> float:
    """The mean of a curve over what was spent, from 0 to `until`: its area, divided by its width.

    The value of step i holds from the end of the step before to `ends[i]`, the steps or tokens spent by then; what lies
    beyond `until` does not count, and the last value holds where the curve ends before. A step without a value has the
    one before it, the first ones the first that there is.
    """
    known = [value for value in values if value is not None]
    if not known or not until > 0:
        raise ValueError(f"a curve must have a value, and its width must be above 0; got {len(known)} and {until}")
    filled, last = [], known[0]
    for value in values:
        last = last if value is None else value
        filled.append(last)
    edges = np.minimum([0.0, *ends[:-1], max(ends[-1], until)], until)
    return float(np.diff(edges) @ np.array(filled) / until)
