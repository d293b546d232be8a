"""The turn table: one row per turn over a whole step, columns as flat arrays; and the token table beside it.

Rollouts may differ in their number of turns; nothing is padded. A reward component that a turn or rollout does not
have is *absent* (NaN inside the table), which is not the same as 0. What only some methods need (values, anchor
states, tree nodes, token counts) is a column that may be missing; a method that needs it says so.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int

T = TypeVar("T")
LARGEST = 1e100
"""The largest size of a reward: squares of it are still numbers."""

Turns = Float[np.ndarray, "N"]
"""One number per turn."""
TurnKeys = Int[np.ndarray, "N"]
"""One whole number per turn."""
Rollouts = Float[np.ndarray, "R"]
"""One number per rollout."""
RolloutKeys = Int[np.ndarray, "R"]
"""One whole number per rollout."""


@dataclass(frozen=True, kw_only=True)
class TurnTable:
    """The turns of a step. Rows are sorted by rollout and, within a rollout, by turn index."""

    rollout: TurnKeys
    """Which rollout a turn belongs to, 0 .. R-1."""
    index: TurnKeys
    """The turn's place in its rollout, from 0."""
    group: TurnKeys
    """Which group the turn's rollout belongs to."""
    turn_rewards: Mapping[str, Turns]
    """Reward components paid at the end of a turn; NaN where absent."""
    outcome_rewards: Mapping[str, Rollouts]
    """Reward components paid at the end of a rollout; NaN where absent."""
    values: Turns | None = None
    """A critic's value of the state before each turn."""
    bootstrap: Rollouts | None = None
    """Value of the state in which a rollout was cut off; 0 where it ended itself. None: all ended themselves."""
    anchor: TurnKeys | None = None
    """Turns of one group with equal keys were taken in equal states."""
    node: TurnKeys | None = None
    """Which node of its group's tree a turn is; rollouts that share a turn name the same node."""
    tokens: TurnKeys | None = None
    """How many tokens the policy sampled in each turn, one at least."""

    def __post_init__(self) -> None:
        for name in ("rollout", "index", "group", "anchor", "node", "tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_numbers(name, getattr(self, name)))
        self._check_rows()
        self._check_rewards()
        self._check_optional()

    def _check_rows(self) -> None:
        turns = len(self.rollout)
        if turns == 0:
            raise ValueError("a turn table must hold at least one turn; got none")
        for name, column in (("index", self.index), ("group", self.group)):
            if len(column) != turns:
                raise ValueError(f"column {name!r} must have one entry per turn ({turns}); got {len(column)}")
        step = np.diff(self.rollout)
        follows = np.where(step == 0, self.index[1:] == self.index[:-1] + 1, self.index[1:] == 0)
        broken = np.flatnonzero(~(follows & ((step == 0) | (step == 1))))
        if self.rollout[0] != 0 or self.index[0] != 0 or len(broken):
            row = int(broken[0]) + 1 if len(broken) else 0
            raise ValueError(
                f"rows must go rollout by rollout (0, 1, ...), turn by turn (0, 1, ...); row {row} is "
                f"rollout {self.rollout[row]}, turn {self.index[row]}"
            )
        mixed = np.flatnonzero((step == 0) & (np.diff(self.group) != 0))
        if len(mixed):
            raise ValueError(f"a rollout must be in one group; row {mixed[0] + 1} changes it")

    def _check_rewards(self) -> None:
        for name, column in self.turn_rewards.items():
            if len(column) != len(self.rollout):
                raise ValueError(
                    f"column {name!r} must have one entry per turn ({len(self.rollout)}); got {len(column)}"
                )
        for name, column in self.outcome_rewards.items():
            if len(column) != self.num_rollouts:
                raise ValueError(
                    f"outcome {name!r} must have one entry per rollout ({self.num_rollouts}); got {len(column)}"
                )
        for name, column in (*self.turn_rewards.items(), *self.outcome_rewards.items()):
            check_flat(name, column)
            large = np.abs(column.astype(float)) > LARGEST
            if large.any():
                row = int(large.argmax())
                raise ValueError(
                    f"rewards must be finite and within ±{LARGEST:g}; {name!r} is {column[row]} in row {row}"
                )

    def _check_optional(self) -> None:
        lengths = {"values": len(self.rollout), "anchor": len(self.rollout), "node": len(self.rollout)}
        lengths |= {"tokens": len(self.rollout), "bootstrap": self.num_rollouts}
        for name, length in lengths.items():
            column = getattr(self, name)
            if column is None:
                continue
            if len(column) != length:
                what = "rollout" if name == "bootstrap" else "turn"
                raise ValueError(f"column {name!r} must have one entry per {what} ({length}); got {len(column)}")
            check_flat(name, column)
            row = first_unbounded(column)
            if row is not None:
                raise ValueError(f"column {name!r} must be finite and within ±{LARGEST:g}; row {row} is {column[row]}")
        if self.tokens is not None and self.tokens.min() < 1:
            raise ValueError(f"a turn must have at least one token; row {int(self.tokens.argmin())} has none")
        if self.node is not None:
            self._check_tree(self.node)

    def _check_tree(self, node: TurnKeys) -> None:
        """One node, one parent: rollouts that meet in a node came the same way."""
        before = np.where(self.index == 0, -1, np.roll(node, 1))
        place = np.stack([self.group, self.index, before])
        _, first, inverse = np.unique(node, return_index=True, return_inverse=True)
        odd = np.flatnonzero((place != place[:, first[inverse]]).any(0))
        if len(odd):
            row, other = int(odd[0]), int(first[inverse[odd[0]]])
            raise ValueError(
                f"rows of one tree node must agree in group, turn index and the node before; rows {other} and {row} "
                f"of node {int(node[row])} do not"
            )

    def need(self, *names: str) -> None:
        """ValueError where a method needs a column that the table does not have."""
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"this method needs the column {name!r} of the turn table; it is missing; give it")

    @cached_property
    def num_rollouts(self) -> int:
        return int(self.rollout[-1]) + 1

    @cached_property
    def first(self) -> RolloutKeys:
        """The row of each rollout's first turn."""
        return np.append(0, self.last[:-1] + 1)

    @cached_property
    def last(self) -> RolloutKeys:
        """The row of each rollout's last turn."""
        return np.append(np.flatnonzero(self.index[1:] == 0), len(self.index) - 1)

    @cached_property
    def lengths(self) -> RolloutKeys:
        """How many turns each rollout has."""
        return np.diff(self.last, prepend=-1)

    @cached_property
    def rollout_group(self) -> RolloutKeys:
        """The group of each rollout."""
        return self.group[self.last]

    def turn_reward(self) -> Turns:
        """The sum of each turn's components; absent ones add nothing."""
        return self._turn_reward.copy()

    @cached_property
    def _turn_reward(self) -> Turns:
        return _summed(self.turn_rewards, len(self.rollout))

    def outcome_reward(self) -> Rollouts:
        """The sum of each rollout's components; absent ones add nothing."""
        return _summed(self.outcome_rewards, self.num_rollouts)

    def reward(self) -> Turns:
        """Each turn's reward; the last turn's with the outcome."""
        rewards = self.turn_reward()
        rewards[self.last] += self.outcome_reward()
        return rewards


def whole_numbers(name: str, column: np.ndarray) -> TurnKeys:
    """The column in 64 bits, in which keys of pairs do not overflow; ValueError where it holds anything else."""
    found = np.asarray(column)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(
            f"column {name!r} must be a flat array of whole numbers; got {found.dtype} of shape {found.shape}"
        )
    if found.dtype.kind == "u" and len(found) and found.max() > np.iinfo(np.int64).max:
        row = int(found.argmax())
        raise ValueError(f"column {name!r} must be of 64 signed bits; row {row} is {found[row]}; number it from 0")
    return found.astype(np.int64, copy=False)


def check_flat(name: str, column: np.ndarray) -> None:
    """ValueError where a column is no flat array of real numbers."""
    if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype.kind not in "fiub":
        found = np.asarray(column)
        raise ValueError(f"column {name!r} must be a flat array of numbers; got {found.dtype} of shape {found.shape}")


def first_unbounded(column: np.ndarray) -> int | None:
    """The first row whose number is not finite, or so large that its square is none; None where all are good."""
    good = np.abs(column.astype(float)) <= LARGEST
    return None if good.all() else int((~good).argmax())


def without_absent(column: np.ndarray) -> np.ndarray:
    """The column with 0 where it is absent."""
    found = np.fmax(column, 0.0, dtype=float)
    found += np.fmin(column, 0.0)  # either takes the 0 for a NaN, and one of them for a number
    return found


def _summed(columns: Mapping[str, np.ndarray], length: int) -> np.ndarray:
    found = np.zeros(length)
    for column in columns.values():
        found += without_absent(column)
    return found


Tokens = Float[np.ndarray, "M"]
"""One number per token."""
TokenKeys = Int[np.ndarray, "M"]
"""One whole number per token."""
TokenPlaces = Int[np.ndarray, "W"]
"""Places of some of the tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """The tokens that follow the prompts of a step, rollout by rollout, in order; environment tokens among them."""

    turns: TurnTable
    turn: TokenKeys
    """The turn table's row that sampled the token; -1 for tokens that the policy did not write."""
    values: Tokens | None = None
    """A critic's value of the state before each token; ignored where the policy did not write it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "turn", whole_numbers("turn", self.turn))
        written = self.turn[self.turn >= 0]
        rows = len(self.turns.rollout)
        if len(written) and written.max() >= rows:
            at = int(self.turn.argmax())
            raise ValueError(
                f"tokens must name turns of the table, 0 to {rows - 1}; token {at} names turn {self.turn[at]}"
            )
        if len(written) == 0 or not np.array_equal(np.unique(written), np.arange(rows)):
            raise ValueError(f"every one of the {rows} turns must have a token; turn {self._missing(written)} has none")
        if (np.diff(written) < 0).any():
            at = int(np.flatnonzero(np.diff(written) < 0)[0]) + 1
            raise ValueError(
                f"tokens must come in the order of turns; turn {written[at]} follows turn {written[at - 1]}"
            )
        if self.values is not None:
            if len(self.values) != len(self.turn):
                raise ValueError(f"values must have one entry per token ({len(self.turn)}); got {len(self.values)}")
            check_flat("values", self.values)
            row = first_unbounded(np.where(self.turn >= 0, self.values, 0.0))
            if row is not None:
                raise ValueError(
                    f"values must be finite and within ±{LARGEST:g} at every token that the policy wrote; token {row} "
                    f"has {self.values[row]}"
                )

    def _missing(self, written: TokenKeys) -> int:
        return int(np.setdiff1d(np.arange(len(self.turns.rollout)), written)[0])

    @cached_property
    def written(self) -> TokenPlaces:
        """The places of the tokens that the policy wrote."""
        return np.flatnonzero(self.turn >= 0)

    @cached_property
    def last(self) -> TurnKeys:
        """The place of each turn's last token."""
        written = self.written
        return written[np.append(np.flatnonzero(np.diff(self.turn[written])), len(written) - 1)]


def token_table(turns: TurnTable) -> TokenTable:
    """The tokens of a turn table with token counts, without environment tokens and values."""
    turns.need("tokens")
    assert turns.tokens is not None
    return TokenTable(turns=turns, turn=np.repeat(np.arange(len(turns.rollout)), turns.tokens))


def turn_table(
    groups: Sequence[int],
    turn_rewards: Sequence[Sequence[Mapping[str, float]]],
    outcome_rewards: Sequence[Mapping[str, float]],
    *,
    values: Sequence[Sequence[float]] | None = None,
    bootstrap: Sequence[float] | None = None,
    anchors: Sequence[Sequence[Hashable]] | None = None,
    nodes: Sequence[Sequence[Hashable]] | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
) -> TurnTable:
    """The table of rollouts given as plain lists.

    `groups` has one number per rollout, `turn_rewards` one mapping per turn of each rollout, `outcome_rewards` one
    mapping per rollout. A name that is missing from a mapping is absent there. `values`, `anchors`, `nodes` and
    `tokens` have one entry per turn of each rollout, `bootstrap` one per rollout; anchors and nodes may be anything
    hashable.
    Raises ValueError for a rollout without turns, lists of different lengths, and rewards that are not finite.
    """
    if not len(groups) == len(turn_rewards) == len(outcome_rewards):
        raise ValueError(
            "groups, turn_rewards and outcome_rewards must have one entry per rollout; got "
            f"{len(groups)}, {len(turn_rewards)} and {len(outcome_rewards)}"
        )
    for i, group in enumerate(groups):
        whole = isinstance(group, int | np.integer) and not isinstance(group, bool)
        if not whole or not -(2**63) <= group < 2**63:
            raise ValueError(f"groups must be whole numbers of 64 bits; rollout {i} has {group!r}; number them")
    for i, turns in enumerate(turn_rewards):
        if len(turns) == 0:
            raise ValueError(f"a rollout must have at least one turn; rollout {i} has none")
    lengths = np.array([len(turns) for turns in turn_rewards], dtype=np.int64)
    rows = [reward for turns in turn_rewards for reward in turns]
    starts = np.cumsum(lengths) - lengths
    return TurnTable(
        rollout=np.repeat(np.arange(len(lengths)), lengths),
        index=np.arange(len(rows)) - np.repeat(starts, lengths),
        group=np.repeat(np.asarray(groups, dtype=np.int64), lengths),
        turn_rewards=_columns(rows, "turn"),
        outcome_rewards=_columns(outcome_rewards, "rollout"),
        values=None if values is None else _numbers(_flat(values, lengths, "values"), "values", "turn"),
        bootstrap=None if bootstrap is None else _numbers(bootstrap, "bootstrap", "rollout"),
        anchor=None if anchors is None else _numbered(_flat(anchors, lengths, "anchors")),
        node=None if nodes is None else _numbered(_flat(nodes, lengths, "nodes")),
        tokens=None if tokens is None else _counts(_flat(tokens, lengths, "tokens")),
    )


def _flat(ragged: Sequence[Sequence[T]], lengths: np.ndarray, name: str) -> list[T]:
    found = [len(each) for each in ragged]
    if found != lengths.tolist():
        raise ValueError(f"{name} must have one entry per turn, {lengths.tolist()} of each rollout; got {found}")
    return [entry for each in ragged for entry in each]


def _numbered(keys: Sequence[Hashable]) -> TurnKeys:
    """Equal keys get equal numbers."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _columns(rows: Sequence[Mapping[str, float]], what: str) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.full(len(rows), np.nan) for name in names}
    for i, row in enumerate(rows):
        for name, value in row.items():
            if not is_number(value):
                raise ValueError(
                    f"rewards must be finite and within ±{LARGEST:g}; {name!r} of {what} {i} is {shown(value)}"
                )
            columns[name][i] = value
    return columns


def _numbers(entries: Sequence[float], name: str, what: str) -> np.ndarray:
    for i, value in enumerate(entries):
        if not is_number(value):
            raise ValueError(f"{name} must be finite and within ±{LARGEST:g}; {what} {i} has {shown(value)}")
    return np.array(entries, dtype=float)


def _counts(entries: Sequence[int]) -> TurnKeys:
    for i, value in enumerate(entries):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value < 2**63:
            raise ValueError(f"tokens must be whole numbers >= 1; turn {i} has {shown(value)}; count what was sampled")
    return np.array(entries, dtype=np.int64)


def is_number(value: object) -> bool:
    """Whether it is a real number within bounds; True and False are 1 and 0."""
    own = value.item() if isinstance(value, np.generic) else value  # the bound is too large for single precision
    return isinstance(own, int | float) and -LARGEST <= own <= LARGEST


def shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 333:
        return f"a whole number of {value.bit_length()} bits"
    return str(value)
