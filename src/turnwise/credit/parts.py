"""What estimators are made of: statistics within groups, and returns along rollouts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from turnwise.credit.table import LARGEST, Rollouts, TurnKeys, Turns, TurnTable

Flags = Bool[np.ndarray, "N"]
PerNumber = Float[np.ndarray, "C"]
"""One number per group."""
FlagPerNumber = Bool[np.ndarray, "C"]
Column = Float[np.ndarray, "X"]
"""One number per turn, rollout or token."""
Steps = Float[np.ndarray, "S"]
"""One number per time step: a turn or a token."""
Lengths = Int[np.ndarray, "Q"]
"""One whole number per sequence of steps."""
BLOCK = 64
"""Sequences of steps that are longer are summed block by block."""
ROUNDING = 1e-6
"""Standard deviations below this share of the mean may be errors of rounding."""


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


def check_number(
    name: str, value: object, low: int | float, high: int | float = LARGEST, *, whole: bool = False
) -> None:
    """ValueError where a parameter is no number from `low` to `high`, or with `whole` no whole one."""
    own = value.item() if isinstance(value, np.generic) else value  # the bound is too large for single precision
    if isinstance(own, bool) or not isinstance(own, int if whole else int | float) or not low <= own <= high:
        bounds = f">= {low:g} and finite" if high == LARGEST else f"in [{low:g}, {high:g}]"
        raise ValueError(
            f"{name} must be {'a whole number ' if whole else ''}{bounds}; got {value!r}; give one that is"
        )


def check_unit(**numbers: object) -> None:
    """ValueError where a discount or share is no number in [0, 1]."""
    for name, value in numbers.items():
        check_number(name, value, 0.0, 1.0)


def check_flag(name: str, value: object) -> None:
    """ValueError where what turns something on or off is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False; got {value!r}; give one of them")


def check_scale(*, ddof: object, eps: object) -> None:
    """ValueError where a standard deviation has other degrees of freedom than 0 or 1, or a negative or endless eps."""
    check_number("ddof", ddof, 0, 1, whole=True)
    check_number("eps", eps, 0.0)


def require_length(name: str, column: object, length: int, *, what: str = "turn") -> None:
    """ValueError where a column is not flat, or has another length."""
    shape = np.asarray(column).shape
    if len(shape) != 1 or shape[0] != length:
        got = shape[0] if len(shape) == 1 else f"shape {shape}"
        raise ValueError(f"{name} must have one entry per {what} ({length}); got {got}; give them all")


def require(name: str, column: object, length: int, *, what: str = "turn", absent: bool = False) -> Column:
    """The column as floats; ValueError where it has another length or an entry is not finite. NaN passes with `absent`.

    Flags count 1 and 0.
    """
    require_length(name, column, length, what=what)
    found = np.asarray(column)
    if found.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be numbers; got {found.dtype}; give numbers")
    found = found.astype(float, copy=False)
    broken = ~(np.abs(found) <= LARGEST) & ~(np.isnan(found) & absent)
    if broken.any():
        row = int(broken.argmax())
        raise ValueError(
            f"{name} must be finite and within ±{LARGEST:g}; {what} {row} has {found[row]}; leave it out or mend it"
        )
    return found


def on_turns(stream: Stream, table: TurnTable) -> Stream:
    """What each rollout has, at each of its turns."""
    value, baseline, advantage = (
        np.repeat(each, table.lengths) for each in (stream.value, stream.baseline, stream.advantage)
    )
    return Stream(value=value, baseline=baseline, advantage=advantage)


def numbered(keys: TurnKeys) -> tuple[TurnKeys, int]:
    """Small numbers from 0, equal for equal keys and for no others, and one more than the largest of them.

    Keys that are small already stay as they are, so not every number up to the largest need occur: that saves the
    sort by which others are numbered. The count is below four times the rows.
    """
    low, high = int(keys.min()), int(keys.max())
    if high - low < 4 * len(keys):
        return (keys - low if low else keys), high - low + 1
    names, numbers = np.unique(keys, return_inverse=True)
    return numbers, len(names)


def paired(first: TurnKeys, second: TurnKeys) -> TurnKeys:
    """One key per pair of keys, 0 or more."""
    (a, _), (b, count) = numbered(first), numbered(second)
    return numbered(a * count + b)[0]


def group_sizes(keys: TurnKeys) -> TurnKeys:
    """How many rows have the same key, at each row."""
    numbers, _ = numbered(keys)
    return np.bincount(numbers)[numbers]


def group_sum(values: Turns, keys: TurnKeys) -> Turns:
    """The sum over all rows with the same key, at each row."""
    numbers, _ = numbered(keys)
    return np.bincount(numbers, weights=values)[numbers]


def group_mean(values: Turns, keys: TurnKeys) -> Turns:
    """The mean over all rows with the same key, at each row."""
    numbers, _ = numbered(keys)
    return (np.bincount(numbers, weights=values) / np.maximum(np.bincount(numbers), 1))[numbers]


def group_std(values: Turns, keys: TurnKeys, *, ddof: int) -> Turns:
    """The standard deviation over all rows with the same key, at each row; 0 in groups of `ddof` rows or fewer.

    Exactly 0 where all values of a group are equal.
    """
    check_number("ddof", ddof, 0, 1, whole=True)
    numbers, _ = numbered(keys)
    return _moments(values, numbers, ddof)[2][numbers]


def z_score(values: Turns, keys: TurnKeys, *, ddof: int = 1, eps: float = 1e-4) -> Turns:
    """Values minus their group's mean, in units of its standard deviation.

        z = (x − mean) / (std + eps),    0 where std = 0

    `keys` names each row's group.
    """
    return z_stream(values, keys, ddof=ddof, eps=eps).advantage


def z_stream(values: Turns, keys: TurnKeys, *, ddof: int = 1, eps: float = 1e-4) -> Stream:
    """Values, the means of their groups, and their z-scores."""
    check_scale(ddof=ddof, eps=eps)
    numbers, _ = numbered(keys)
    baseline, centred, stds = _moments(values, numbers, ddof)
    return Stream(value=values, baseline=baseline, advantage=_divided(centred, stds, eps, numbers))


def in_stds(centred: Turns, values: Turns, keys: TurnKeys, *, ddof: int, eps: float) -> Turns:
    """Differences in units of the standard deviation of the values with the same key, plus eps; 0 where that is 0."""
    numbers, _ = numbered(keys)
    return _divided(centred, _moments(values, numbers, ddof)[2], eps, numbers)


def varied(values: Turns, keys: TurnKeys) -> Flags:
    """Which rows have a key whose rows differ in their values."""
    numbers, count = numbered(keys)
    return _differ(values, numbers, count)[numbers]


def leave_one_out_mean(values: Turns, keys: TurnKeys, *, alone: float = 0.0) -> Turns:
    """The mean over all *other* rows with the same key, at each row; `alone` where there are none.

    Kool et al. 2019; RLOO, Ahmadian et al. 2024, arXiv 2402.14740.
    """
    numbers, _ = numbered(keys)
    others = np.bincount(numbers) - 1
    found = (np.bincount(numbers, weights=values)[numbers] - values) / np.maximum(others, 1)[numbers]
    found[others[numbers] == 0] = alone
    return found


def whiten(values: Turns, *, eps: float = 1e-8) -> Turns:
    """All values minus their mean, in units of their standard deviation (ddof 1); 0 where all are equal.

    (x − mean) / (std + eps)   over the whole step, groups together
    """
    check_number("eps", eps, 0.0)
    std = 0.0 if values.min() == values.max() else values.std(ddof=1)
    return (values - values.mean()) / (std + eps) if std > 0 else np.zeros(len(values))


def turn_index_keys(table: TurnTable) -> TurnKeys:
    """A key per turn that is shared by the turns of one group at one index."""
    group, _ = numbered(table.rollout_group)  # small numbers, whatever the caller's are
    return np.repeat(group * int(table.lengths.max()), table.lengths) + table.index


def reward_to_go(turns: Turns, final: Rollouts, table: TurnTable, *, discount: float) -> Turns:
    """Each turn's own number plus the discounted rest of its rollout.

    Gₖ = xₖ + discount · Gₖ₊₁,    G_K = x_K + final   for the last turn K
    """
    check_unit(discount=discount)
    out = turns.astype(float)
    out[table.last] += final
    return sums_to_go(out, table.lengths, discount)


def sums_to_go(steps: Steps, lengths: Lengths, discount: float) -> Steps:
    """Sₜ = xₜ + discount · Sₜ₊₁ within sequences of these lengths, one after the other.

    Long sequences are cut into blocks: first the sums within each, then those of the blocks' first steps, which are
    sequences again, and then what every step has from the block after its own.
    """
    if lengths.max() <= BLOCK:
        return _short_sums_to_go(steps, lengths, discount)
    count = -(-lengths // BLOCK)
    ends = np.cumsum(count)
    blocks = np.full(ends[-1], BLOCK)
    blocks[ends - 1] = lengths - (count - 1) * BLOCK
    within, after_block = _short_sums_to_go(steps, blocks, discount), np.cumsum(blocks)
    rest = np.append(sums_to_go(within[after_block - blocks], count, discount**BLOCK)[1:], 0.0)
    rest[ends - 1] = 0.0
    powers = discount ** np.arange(BLOCK + 1.0)
    within += powers[np.repeat(after_block, blocks) - np.arange(len(steps))] * np.repeat(rest, blocks)
    return within


def _short_sums_to_go(steps: Steps, lengths: Lengths, discount: float) -> Steps:
    """The same, from the last steps back: at each distance from the end, the sequences that are longer."""
    out, longest_first = steps.copy(), np.argsort(-lengths, kind="stable")
    at = (np.cumsum(lengths) - 1)[longest_first]
    found = out[at]
    longer = len(lengths) - np.cumsum(np.bincount(lengths))  # how many have more than 0, 1, ... steps
    for count in longer[1:-1]:
        at, found = at[:count], found[:count]
        at -= 1
        found *= discount
        found += out[at]
        out[at] = found
    return out


def _moments(values: Turns, numbers: TurnKeys, ddof: int) -> tuple[Turns, Turns, PerNumber]:
    """At each row its number's mean and the value minus it; of each number the standard deviation.

    That is exactly 0 where the values are equal, which is looked at where rounding may hide it.
    """
    counts = np.bincount(numbers)
    means = np.bincount(numbers, weights=values) / np.maximum(counts, 1)
    baseline = means[numbers]
    centred = values - baseline
    variance = np.bincount(numbers, weights=centred * centred) / np.maximum(counts - ddof, 1)
    differ = variance > (ROUNDING * means) ** 2
    hidden = ~differ & (counts > 1)
    if hidden.any():
        unsure = np.flatnonzero(hidden[numbers])
        differ |= _differ(values[unsure], numbers[unsure], len(counts))
    return baseline, centred, np.where((counts > ddof) & differ, np.sqrt(variance), 0.0)


def _differ(values: Turns, numbers: TurnKeys, count: int) -> FlagPerNumber:
    """Of each number, whether its values differ."""
    some = np.zeros(count)
    some[numbers] = values
    return np.bincount(numbers, weights=values != some[numbers], minlength=count) > 0


def _divided(centred: Turns, stds: PerNumber, eps: float, numbers: TurnKeys) -> Turns:
    found = centred / np.where(stds > 0, stds + eps, np.inf)[numbers]
    found += 0.0  # no -0
    return found
