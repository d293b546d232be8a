"""The comparisons that each method's advantages are sums of, in words: what is compared, and with whom.

The numbers are the method's own streams; a recipe adds which of them a turn gets, with which weight, and how many
siblings stand behind each baseline.
"""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from turnwise.credit import Credit, Stream, TurnTable, anchor_keys, turn_index_keys
from turnwise.credit.grouped import irc_hybrid
from turnwise.credit.parts import group_sizes, on_turns, z_stream
from turnwise.credit.trajectory import rollout_rewards, rollout_sums
from turnwise.credit.trees import states
from turnwise.report.text import one_line

OUTCOME, ALL, RETURN = "outcome", "all rewards", "return from here on"
Parts = list["Part"]
Source = Callable[[int], str]
"""In words, what a row's baseline is."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison in one turn's advantage."""

    what: str
    value: float
    baseline: float | None
    """None where the value is taken as it is."""
    source: str
    """What the baseline is."""
    advantage: float
    """What it adds to the sum."""
    weight: float = 1.0

    @property
    def spread(self) -> float:
        """What the weighted difference is divided by; 1 where nothing is."""
        difference = self.weight * (self.value - (self.baseline or 0.0))
        return 1.0 if abs(self.advantage) < 1e-9 else difference / self.advantage


@dataclass(frozen=True)
class Step:
    """Rollouts that were credited together."""

    table: TurnTable
    credit: Credit
    alpha: float = 1.0
    """The weight of later turns in earlier ones, of methods that have one."""

    @cached_property
    def in_group(self) -> np.ndarray:
        """How many rollouts are in each row's group."""
        return np.repeat(group_sizes(self.table.rollout_group), self.table.lengths)

    @cached_property
    def at_turn(self) -> np.ndarray:
        """How many rollouts of the group took each row's turn."""
        return group_sizes(turn_index_keys(self.table))

    @cached_property
    def in_state(self) -> np.ndarray:
        """How many turns of the group were taken in each row's anchor state."""
        return group_sizes(anchor_keys(self.table))

    @cached_property
    def from_state(self) -> np.ndarray:
        """How many different turns of a tree were taken in the state of each row's."""
        before, after = states(self.table)
        different = np.unique(np.stack([before, after]), axis=1)
        return np.bincount(different[0], minlength=before.max() + 1)[before]

    def of_group(self, row: int) -> str:
        return f"the mean of the group’s {self.in_group[row]} rollouts"

    def of_others(self, row: int) -> str:
        return f"the mean of {siblings(self.in_group[row] - 1)}"

    def of_turn(self, row: int) -> str:
        return with_siblings(self.at_turn[row] - 1, f"at turn {self.table.index[row] + 1}")

    def of_others_at_turn(self, row: int) -> str:
        others = self.at_turn[row] - 1
        if others:
            return f"the mean of {siblings(others)} at this turn"
        rest = self.in_group[row] - 1
        return f"how {siblings(rest)} ended, as none took this turn" if rest else "0, as it has no sibling"

    def of_state(self, row: int) -> str:
        count = self.in_state[row]
        return f"the mean of the group’s {count} turns in this state" if count > 1 else "its own: no other was there"

    def of_branches(self, row: int) -> str:
        return f"the mean of the {self.from_state[row]} turns taken in the same state"

    def parts(self, stream: Stream, what: str, source: Source, weight: float | np.ndarray = 1.0) -> list[Parts]:
        """One comparison per row; each adds the stream's advantage times its weight."""
        weights = np.broadcast_to(weight, len(self.table.rollout)).tolist()
        return [
            [
                Part(
                    what=what.format(turn=self.table.index[row] + 1),
                    value=float(stream.value[row]),
                    baseline=float(stream.baseline[row]),
                    source=source(row),
                    advantage=float(stream.advantage[row]) * own,
                    weight=own,
                )
            ]
            for row, own in enumerate(weights)
        ]

    def stream(self, name: str, what: str, source: Source, weight: float | np.ndarray = 1.0) -> list[Parts]:
        """The comparisons of one of the method's streams."""
        return self.parts(self.credit.streams[name], what, source, weight)


def siblings(count: int) -> str:
    return f"{count} sibling{'' if count == 1 else 's'}"


def with_siblings(others: int, where: str) -> str:
    return f"the mean of it and {siblings(others)} {where}" if others else f"its own: no sibling was {where}"


def _both(*rows: list[Parts]) -> list[Parts]:
    return [list(itertools.chain(*parts)) for parts in zip(*rows, strict=True)]


def _whole(step: Step) -> list[Parts]:
    return step.stream("trajectory", ALL, step.of_group)


def _before_whitening(step: Step) -> list[Parts]:
    """The difference alone, of a method that scales it over the step."""
    found = step.credit.streams["trajectory"]
    return step.parts(replace(found, advantage=found.value - found.baseline), ALL, step.of_group)


def _as_it_is(step: Step) -> list[Parts]:
    found = step.credit.streams["trajectory"]
    parts = step.parts(replace(found, advantage=found.value), ALL, step.of_group)
    return [[replace(part, baseline=None) for part in row] for row in parts]


def _by_component(step: Step) -> list[Parts]:
    return _both(*(step.stream(n, one_line(n).replace("_", " "), step.of_group) for n in step.credit.streams))


def _along(step: Step, source: Source, *, causal: bool = True) -> list[Parts]:
    """Own rewards of this turn and those after it (of all where not `causal`), each α times the one before; outcome."""
    own = step.stream("turn", "turn {turn}’s own reward", source)
    last = step.stream("outcome", OUTCOME, step.of_group)
    out = []
    for row, rollout in enumerate(step.table.rollout):
        first, end = int(step.table.first[rollout]), int(step.table.last[rollout])
        weights = {k: step.alpha ** (k - row) if causal else 1.0 for k in range(row if causal else first, end + 1)}
        parts = [_times(own[k][0], weight) for k, weight in weights.items()]
        out.append([*parts, _times(last[row][0], weights[end])])
    return out


def _times(part: Part, weight: float) -> Part:
    return replace(part, advantage=weight * part.advantage, weight=weight)


def _as_the_code(step: Step) -> list[Parts]:
    """mt-grpo-repo, which has no streams: the first of several turns has turn rewards too, a lone one the sum."""
    table = step.table
    sums = {
        OUTCOME: table.outcome_reward(),
        "turn rewards": rollout_sums(table, table.turn_reward()),
        ALL: rollout_rewards(table, "merged"),
    }
    found = {
        what: step.parts(on_turns(z_stream(values, table.rollout_group), table), what, step.of_group)
        for what, values in sums.items()
    }
    several = np.repeat(table.lengths > 1, table.lengths)
    return [
        (found[OUTCOME][row] + (found["turn rewards"][row] if table.index[row] == 0 else []))
        if several[row]
        else found[ALL][row]
        for row in range(len(table.rollout))
    ]


def _by_history(step: Step) -> list[Parts]:
    """hgpo: a mean over how many states are looked at, of those that somebody else met too."""
    met = [group_sizes(anchor_keys(step.table, history=j)) > 1 for j in range(len(step.credit.streams))]
    return _weighted_histories(step, [(j + 1.0) * there for j, there in enumerate(met)])


def _by_history_of_code(step: Step) -> list[Parts]:
    levels = step.credit.streams.values()
    return _weighted_histories(step, [(j + 2.0) * (level.advantage != 0) for j, level in enumerate(levels)])


def _weighted_histories(step: Step, weights: list[np.ndarray]) -> list[Parts]:
    total = np.maximum(sum(weights, np.zeros(len(step.table.rollout))), 1.0)

    def source(j: int) -> Source:
        keys = group_sizes(anchor_keys(step.table, history=j))
        before = f" and the same {j} before it" if j else ""
        return lambda row: f"the mean of the group’s {keys[row]} turns in this state{before}"

    return _both(
        *(step.stream(name, RETURN, source(j), weights[j] / total) for j, name in enumerate(step.credit.streams))
    )


def _to_root_and_parent(step: Step) -> list[Parts]:
    value = "value of the state it led to"
    return _both(
        step.stream("root", value, lambda row: "the value of the question’s start"),
        step.stream("edge", value, lambda row: "the value of the state before it"),
    )


_LAM = inspect.signature(irc_hybrid).parameters["lam"].default

RECIPES: dict[str, Callable[[Step], list[Parts]]] = {
    "grpo-or": lambda step: step.stream("trajectory", OUTCOME, step.of_group),
    "grpo-mr": _whole,
    "dr-grpo": _whole,
    "rloo": lambda step: step.stream("trajectory", ALL, step.of_others),
    "reinforce++": _as_it_is,
    "reinforce++-baseline": _before_whitening,
    "gdpo": _by_component,
    "grpo-decoupled": lambda step: _along(step, step.of_turn, causal=False),
    "mt-grpo": lambda step: _along(step, step.of_turn),
    "mt-grpo-repo": _as_the_code,
    "turn-rloo": lambda step: step.stream("turn", RETURN, step.of_others_at_turn),
    "gtpo": lambda step: step.stream("turn", RETURN, step.of_turn),
    "matchtir": lambda step: _both(
        step.stream("trajectory", ALL, step.of_group, 0.5), step.stream("turn", RETURN, step.of_turn, 0.5)
    ),
    "irc-hybrid": lambda step: _both(
        step.stream("turn", RETURN, step.of_turn), step.stream("outcome", OUTCOME, step.of_group, _LAM)
    ),
    "gigpo": lambda step: _both(_whole(step), step.stream("turn", RETURN, step.of_state)),
    "hgpo": _by_history,
    "hgpo-code": _by_history_of_code,
    "gagpo": lambda step: step.stream("turn", "what followed", step.of_state),
    "mt-grpo-tree": lambda step: _along(step, step.of_branches),
    "treerl": _to_root_and_parent,
    "carl": lambda step: step.stream("edge", "value of the state it led to", lambda row: "the value of the one before"),
    "tree-grpo": lambda step: _both(
        step.stream("tree", ALL, lambda row: "the mean of its tree’s leaves"),
        step.stream("group", ALL, step.of_group),
    ),
    "slate": lambda step: step.stream("siblings", "own reward", step.of_branches),
}
"""Of each method without a critic, the comparisons of every turn."""
