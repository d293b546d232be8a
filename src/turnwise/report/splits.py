"""What a turn's advantage is made of: its method run again on the recorded rewards, comparison by comparison.

A split is claimed only where its parts give the recorded advantages: of the whole group, or of all recorded rollouts of
the step where the method whitens over the step. The mean and spread of such a step, of which a run records a part, are
read off the recorded advantages, which must lie on one line.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turnwise.config import CRITIC_METHODS, DISCOUNTED
from turnwise.credit import (
    ESTIMATORS,
    TOKEN_ESTIMATORS,
    WHOLE_STEP,
    Stream,
    TokenTable,
    TurnTable,
    token_table,
    turn_means,
    turn_table,
)
from turnwise.report.data import GroupKey, RolloutLine
from turnwise.report.recipes import RECIPES, Part, Step

TOLERANCE = 0.01
"""How far parts may be off the recorded advantage, of 1 or of the advantage where that is larger."""
FITTED = 3
"""So many different sums must lie on one line before a mean and a spread are read off."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One turn's advantage as a sum of parts, or as (sum − centre) / spread."""

    parts: tuple[Part, ...]
    total: float
    centre: float = 0.0
    spread: float = 1.0
    over: str = ""
    """What centre and spread are of; empty where the sum is the advantage."""


def splits(lines: Sequence[RolloutLine], config: Mapping[str, Any]) -> list[list[Split] | None]:
    """Of each of a step's rollouts its turns' splits; None where the recorded advantages are not met.

    `config` is the run's.
    """
    known = _known(lines, config)
    by_group: dict[GroupKey, list[int]] = {}
    for i in known:
        by_group.setdefault(lines[i].group, []).append(i)
    whole = whitened(config)
    out: list[list[Split] | None] = [None] * len(lines)
    for rows in [list(known)] if whole else by_group.values():
        recorded = np.array([a for i in rows for a in lines[i].advantages or ()])
        totals = np.array([sum(part.advantage for part in parts) for i in rows for parts in known[i]])
        found = _over_step(totals, recorded) if whole else _over_group(totals, config)
        if found is None or not _met(totals, recorded, *found):
            continue
        each = iter(totals.tolist())
        over = "the step’s" if whole else "the group’s" if config.get("estimator") == "gagpo" else ""
        for i in rows:
            out[i] = [
                Split(parts=tuple(parts), total=next(each), centre=found[0], spread=found[1], over=over)
                for parts in known[i]
            ]
    return out


def whitened(config: Mapping[str, Any]) -> bool:
    """Whether the run's method whitens advantages over the whole step."""
    name, asked = config.get("estimator"), config.get("whiten")
    if name not in CRITIC_METHODS:
        return name in WHOLE_STEP
    return name in WHOLE_STEP or (name in TOKEN_ESTIMATORS if asked is None else bool(asked))


def _known(lines: Sequence[RolloutLine], config: Mapping[str, Any]) -> dict[int, list[list[Part]]]:
    """The parts of each turn, before any whitening, of the rollouts that they can be computed for."""
    name, parameters = str(config.get("estimator")), _parameters(config)
    rows = [i for i, line in enumerate(lines) if line.advantages and line.rollout.turns]
    if name in CRITIC_METHODS:  # a rollout that was cut off goes on with a value that is not recorded
        rows = [i for i in rows if lines[i].rollout.stop != "max_tokens"]
    if not rows or name not in (*RECIPES, *CRITIC_METHODS):
        return {}
    chosen = [lines[i] for i in rows]
    try:
        if name in CRITIC_METHODS:
            table = _table(chosen, with_values=True)
            parts = _of_critic(chosen, table, name, parameters)
        else:
            table = _table(chosen)
            credit = ESTIMATORS[name](table, **parameters)
            parts = RECIPES[name](Step(table=table, credit=credit, alpha=parameters.get("alpha", 1.0)))
    except ValueError:  # rewards that the method refuses, or columns that the run did not record
        return {}
    ends = itertools.accumulate(table.lengths.tolist())
    counts = zip(rows, ends, table.lengths.tolist(), strict=True)
    return {i: parts[end - count : end] for i, end, count in counts}


def _parameters(config: Mapping[str, Any]) -> dict[str, float]:
    """What training gave the method, as `crediting` does."""
    name = config.get("estimator")
    taken = ("alpha",) if name in ("mt-grpo", "mt-grpo-tree") else ("gamma", "lam") if name in DISCOUNTED else ()
    given = {key: config.get(key) for key in taken if (key, name) != ("lam", name) or name in CRITIC_METHODS}
    return {key: float(value) for key, value in given.items() if isinstance(value, int | float)}


def _table(lines: Sequence[RolloutLine], *, with_values: bool = False) -> TurnTable:
    """The turn table that the step was credited with; ValueError where the records lack a part of it."""
    rollouts, numbers = [line.rollout for line in lines], {}
    tokens = [[len(turn.action_ids) for turn in r.turns] for r in rollouts]
    values = [line.baselines.get("value", ()) for line in lines]
    return turn_table(
        [numbers.setdefault(line.group, len(numbers)) for line in lines],
        [r.turn_rewards or ({},) * len(r.turns) for r in rollouts],
        [r.outcome_rewards for r in rollouts],
        values=values if with_values else None,
        tokens=tokens if all(n for each in tokens for n in each) else None,
        anchors=[r.states or [r.prompt_ids, *(turn.reply_ids for turn in r.turns[:-1])] for r in rollouts],
        nodes=[[(*line.group, node) for node in line.rollout.nodes] for line in lines]
        if any(r.nodes for r in rollouts)
        else None,
    )


def _of_critic(
    lines: Sequence[RolloutLine], table: TurnTable, name: str, parameters: Mapping[str, float]
) -> list[list[Part]]:
    """One part per turn: what followed, with the critic's values, against its value before."""
    if name in TOKEN_ESTIMATORS:
        values = np.array([value for line in lines for value in line.token_values or ()])
        tokens = TokenTable(turns=table, turn=token_table(table).turn, values=values)
        found = turn_means(tokens, TOKEN_ESTIMATORS[name](tokens, **parameters).advantages)
        own = turn_means(tokens, values)
        stream = Stream(value=own + found, baseline=own, advantage=found)
    else:
        stream = ESTIMATORS[name](table, **parameters).streams["turn"]
    counts = np.ones(len(table.rollout)) if table.tokens is None else table.tokens
    by_token = name in TOKEN_ESTIMATORS
    return [
        [
            Part(
                what="what followed",
                value=float(stream.value[row]),
                baseline=float(stream.baseline[row]),
                source=f"the critic’s value{f', means over {counts[row]} tokens' if by_token else ''}",
                advantage=float(stream.advantage[row]),
            )
        ]
        for row in range(len(table.rollout))
    ]


def _over_step(totals: np.ndarray, recorded: np.ndarray) -> tuple[float, float] | None:
    """(centre, spread) of recorded = (total − centre) / spread, by least squares; None where too few sums differ."""
    if len(np.unique(totals.round(6))) < FITTED or not np.isfinite(recorded).all():
        return None
    away = totals - totals.mean()
    slope = float(away @ recorded / (away @ away))
    return (float(totals.mean() - recorded.mean() / slope), 1 / slope) if slope > 1e-9 else None


def _over_group(totals: np.ndarray, config: Mapping[str, Any]) -> tuple[float, float]:
    """(centre, spread) of a group's sums: those of gagpo are z-scores once more."""
    if config.get("estimator") != "gagpo" or np.ptp(totals) < 1e-9:
        return 0.0, 1.0
    return float(totals.mean()), float(totals.std(ddof=1))


def _met(totals: np.ndarray, recorded: np.ndarray, centre: float, spread: float) -> bool:
    off = np.abs((totals - centre) / spread - recorded)
    return bool((off <= TOLERANCE * np.maximum(1.0, np.abs(recorded))).all())  # NaN is not met
