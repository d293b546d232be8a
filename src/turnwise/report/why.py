"""Why a turn has its advantage, in one sentence, computed from what the group's rollouts earned.

The estimators are those of arXiv 2505.11821: every advantage is a sum of comparisons, each of one
reward stream with the group's mean of it. A sentence says "=" only where these comparisons,
recomputed from the recorded rewards, give the recorded advantages of the whole group.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turnwise.report.data import RolloutLine

Term = tuple[Hashable, float]
"""A reward stream and the weight of its comparison in one turn's advantage."""
Streams = Mapping[Hashable, Mapping[int, float]]
"""What each rollout (by its place in the group) earned in each stream."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One stream's part in one turn's advantage."""

    label: str
    own: float
    mean: float
    spread: float
    weight: float

    @property
    def part(self) -> float:
        return self.weight * (self.own - self.mean) / self.spread


Comparisons = Sequence[Comparison | None]
"""The comparisons behind one turn's advantage."""


def turn_reward(line: RolloutLine, turn: int) -> float:
    """Sum of the reward components of one turn; 0 where it has none."""
    rewards = line.rollout.turn_rewards
    return math.fsum(rewards[turn].values()) if turn < len(rewards) else 0.0


def outcome_reward(line: RolloutLine) -> float:
    return math.fsum(line.rollout.outcome_rewards.values())


def total_reward(line: RolloutLine, gamma: float = 1.0) -> float:
    """The return of the rollout, discounted per turn: Σ γ^(k−1) r_k + γ^(K−1) R^O."""
    turns = range(len(line.rollout.turns))
    outcome = gamma ** max(0, len(turns) - 1) * outcome_reward(line)
    return outcome + math.fsum(gamma**k * turn_reward(line, k) for k in turns)


def reasons(group: Sequence[RolloutLine], config: Mapping[str, Any]) -> list[list[str]]:
    """A sentence per rollout of one group and turn; `config` is the run's."""
    table, estimator = _explanation(group, config), str(config.get("estimator"))
    return [
        [
            _facts(line, k) if table is None else _equation(line, k, table[i][k], estimator)
            for k in range(len(line.rollout.turns))
        ]
        for i, line in enumerate(group)
    ]


def _explanation(group: Sequence[RolloutLine], config: Mapping[str, Any]) -> Sequence[Sequence[Comparisons]] | None:
    """The comparisons of each rollout and turn; None where they do not give the advantages."""
    terms = _TERMS.get(str(config.get("estimator")))
    if terms is None:
        return None
    alpha, gamma = (1.0 if (v := config.get(n)) is None else float(v) for n in ("alpha", "gamma"))
    streams = _streams(group, gamma)
    for scale in (_sample_std, _population_std, _no_std):
        table = [
            [
                [_comparison(i, term, streams, scale) for term in terms(line, k, alpha)]
                for k in range(len(line.rollout.turns))
            ]
            for i, line in enumerate(group)
        ]
        if _explains(table, group):
            return table
    return None


def _streams(group: Sequence[RolloutLine], gamma: float) -> dict[Hashable, dict[int, float]]:
    """Rewards by stream: a failed rollout is in none, and none is in turns that it did not take."""
    streams: dict[Hashable, dict[int, float]] = {"outcome": {}, "all": {}}
    for i, line in enumerate(group):
        if line.rollout.stop == "error":
            continue
        streams["outcome"][i] = outcome_reward(line)
        streams["all"][i] = total_reward(line, gamma)
        for k in range(len(line.rollout.turns)):
            streams.setdefault(k, {})[i] = turn_reward(line, k)
    return streams


def _outcome_terms(line: RolloutLine, turn: int, alpha: float) -> list[Term]:
    return [("outcome", 1.0)]


def _merged_terms(line: RolloutLine, turn: int, alpha: float) -> list[Term]:
    return [("all", 1.0)]


def _turn_terms(line: RolloutLine, turn: int, alpha: float) -> list[Term]:
    """A_k = Σ_{l=k..K} α^(l−k) A^I_l + α^(K−k) A^O, the sum of arXiv 2505.11821, appendix D.

    The last turn's own stream counts where other rollouts of the group called a tool at its place;
    it is 0 otherwise.
    """
    last = len(line.rollout.turns) - 1
    own: list[Term] = [(k, alpha ** (k - turn)) for k in range(turn, last + 1)]
    return [*own, ("outcome", alpha ** (last - turn))]


_TERMS: dict[str, Callable[[RolloutLine, int, float], list[Term]]] = {
    "grpo-or": _outcome_terms,
    "grpo-mr": _merged_terms,
    "mt-grpo": _turn_terms,
}


def _sample_std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def _population_std(values: np.ndarray) -> float:
    return float(values.std())


def _no_std(values: np.ndarray) -> float:
    return 1.0


def _comparison(i: int, term: Term, streams: Streams, scale: Callable[[np.ndarray], float]) -> Comparison | None:
    """Rollout `i` compared in one stream; None where the whole group has the same there."""
    stream, weight = term
    values = streams.get(stream, {})
    if i not in values:
        return None
    array = np.array(list(values.values()))
    if array.size < 2 or np.ptp(array) < 1e-9:
        return None
    return Comparison(
        label=_label(stream),
        own=values[i],
        mean=float(array.mean()),
        spread=scale(array),
        weight=weight,
    )


def _label(stream: Hashable) -> str:
    if stream == "outcome":
        return "outcome"
    if stream == "all":
        return "all rewards"
    assert isinstance(stream, int)
    return f"turn {stream + 1}’s own reward"


def _explains(table: Sequence[Sequence[Comparisons]], group: Sequence[RolloutLine]) -> bool:
    for row, line in zip(table, group, strict=True):
        if line.advantages is None:
            return False
        for comparisons, advantage in zip(row, line.advantages, strict=True):
            total = math.fsum(c.part for c in comparisons if c is not None)
            if not abs(total - advantage) <= 0.02 * max(1.0, abs(advantage)):  # NaN fails too
                return False
    return True


def _equation(line: RolloutLine, turn: int, comparisons: Comparisons, estimator: str) -> str:
    head = signed(line.advantages[turn]) if line.advantages else "–"
    if line.rollout.stop == "error":
        return f"{head}: the environment failed, so this rollout is left out."
    parts = [c for c in comparisons if c is not None]
    tail = "" if estimator == "mt-grpo" else " Every turn gets the same."
    if not parts:
        return f"{head}: the whole group earned the same, nothing to compare.{tail}"
    if len(parts) == 1:
        return f"{head} = {_fraction(parts[0])}.{tail}"
    total = signed(parts[0].part) + "".join(_added(c.part) for c in parts[1:])
    return "\n".join([f"{head} = {total}", *(f"{signed(c.part)}: {_fraction(c)}" for c in parts)])


def _added(value: float) -> str:
    return f" {'−' if value < 0 else '+'} {abs(value):.2f}"


def _fraction(c: Comparison) -> str:
    """(outcome 1.90 − mean 1.65) / 0.58, the spread left out where nothing is divided by it."""
    weight = "" if c.weight == 1 else f"{number(c.weight)} × "
    spread = "" if c.spread == 1 else f" / {number(c.spread)}"
    return f"{weight}({c.label} {number(c.own)} − mean {number(c.mean)}){spread}"


def _facts(line: RolloutLine, turn: int) -> str:
    """What is known of a turn whose advantage is not recomputed: its rewards and its baselines."""
    rest = outcome_reward(line) + math.fsum(turn_reward(line, k) for k in range(turn, len(line.rollout.turns)))
    own = f"own reward {number(turn_reward(line, turn))}, from here on {number(rest)}"
    bases = [f"baseline {name} {number(values[turn])}" for name, values in line.baselines.items()]
    head = "" if line.advantages is None else f"{signed(line.advantages[turn])}: "
    return f"{head}{'; '.join([own, *bases])}."


def signed(value: float) -> str:
    """Two decimals with a sign: +0.83, −0.40, 0.00."""
    if not math.isfinite(value):
        return str(value)
    text = f"{abs(value):.2f}"
    if text == "0.00":
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def number(value: float) -> str:
    """Two decimals with a true minus sign."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
