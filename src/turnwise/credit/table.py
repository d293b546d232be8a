"""The turn table: one row per turn over a whole step, columns as flat arrays.

Rollouts may differ in their number of turns; nothing is padded. A reward component that a turn or rollout does not
have is *absent* (NaN inside the table), which is not the same as 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

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

    def __post_init__(self) -> None:
        turns = len(self.rollout)
        if turns == 0:
            raise ValueError("a turn table must hold at least one turn; got none")
        for name, column in (("index", self.index), ("group", self.group), *self.turn_rewards.items()):
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
        for name, column in self.outcome_rewards.items():
            if len(column) != self.num_rollouts:
                raise ValueError(
                    f"outcome {name!r} must have one entry per rollout ({self.num_rollouts}); got {len(column)}"
                )
        for name, column in (*self.turn_rewards.items(), *self.outcome_rewards.items()):
            if np.isinf(column).any():
                raise ValueError(f"rewards must be finite; {name!r} is infinite in row {np.isinf(column).argmax()}")

    @property
    def num_rollouts(self) -> int:
        return int(self.rollout[-1]) + 1

    @property
    def last(self) -> RolloutKeys:
        """The row of each rollout's last turn."""
        return np.append(np.flatnonzero(np.diff(self.rollout)), len(self.rollout) - 1)

    @property
    def rollout_group(self) -> RolloutKeys:
        """The group of each rollout."""
        return self.group[self.last]

    def turn_reward(self) -> Turns:
        """The sum of each turn's components; absent ones add nothing."""
        return _summed(self.turn_rewards, len(self.rollout))

    def outcome_reward(self) -> Rollouts:
        """The sum of each rollout's components; absent ones add nothing."""
        return _summed(self.outcome_rewards, self.num_rollouts)


def _summed(columns: Mapping[str, np.ndarray], length: int) -> np.ndarray:
    total = np.zeros(length)
    for column in columns.values():
        total += np.nan_to_num(column, nan=0.0)
    return total


def turn_table(
    groups: Sequence[int],
    turn_rewards: Sequence[Sequence[Mapping[str, float]]],
    outcome_rewards: Sequence[Mapping[str, float]],
) -> TurnTable:
    """The table of rollouts given as plain lists.

    `groups` has one number per rollout, `turn_rewards` one mapping per turn of each rollout, `outcome_rewards` one
    mapping per rollout. A name that is missing from a mapping is absent there. Raises ValueError for a rollout without
    turns, lists of different lengths, and rewards that are not finite.
    """
    if not len(groups) == len(turn_rewards) == len(outcome_rewards):
        raise ValueError(
            "groups, turn_rewards and outcome_rewards must have one entry per rollout; got "
            f"{len(groups)}, {len(turn_rewards)} and {len(outcome_rewards)}"
        )
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
    )


def _columns(rows: Sequence[Mapping[str, float]], what: str) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.full(len(rows), np.nan) for name in names}
    for i, row in enumerate(rows):
        for name, value in row.items():
            if not np.isfinite(value):
                raise ValueError(f"rewards must be finite; {name!r} of {what} {i} is {value}")
            columns[name][i] = value
    return columns
