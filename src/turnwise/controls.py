"""Controls: rewards that are disturbed before a step learns from them, to see what their content and place are worth.

A placebo keeps how dense turn rewards are and takes away what they say: a method that does as well with it does not
live of their content. Noise on the outcome asks how much a wrong verdict costs each method. The run's seed and the step
decide every draw, so that arms of a comparison are disturbed alike. Metrics are of the rewards as they were earned;
`rollouts.jsonl` shows those that the step learned from.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from turnwise.config import TrainConfig
from turnwise.credit import TurnTable, pay_at_the_end, shuffle_across_rollouts, shuffle_in_rollouts
from turnwise.crediting import rollout_table
from turnwise.rollout import rollout_seed
from turnwise.types import Rollout

NOISE = "outcome_noise"
"""The component of the outcome that noise is."""
_DRAWS = {"placebo": 1, NOISE: 2}
"""What tells the draws of a step apart."""


def learned_from(rollouts: Sequence[Rollout], config: TrainConfig, step: int) -> Sequence[Rollout]:
    """The scored rollouts with the rewards that the step learns from: their own, unless a control is set."""
    if config.placebo:
        rng = np.random.default_rng(rollout_seed(config.seed, step, _DRAWS["placebo"]))
        rollouts = with_rewards_of(_placebo(rollout_table(rollouts), config.placebo, rng), rollouts)
    if config.outcome_noise:
        rng = np.random.default_rng(rollout_seed(config.seed, step, _DRAWS[NOISE]))
        noise = rng.normal(0.0, config.outcome_noise, len(rollouts))
        rollouts = [
            dataclasses.replace(r, outcome_rewards={**r.outcome_rewards, NOISE: float(x)})
            for r, x in zip(rollouts, noise, strict=True)
        ]
    return rollouts


def _placebo(table: TurnTable, name: str, rng: np.random.Generator) -> TurnTable:
    if name == "end":
        return pay_at_the_end(table)
    return {"turns": shuffle_in_rollouts, "rollouts": shuffle_across_rollouts}[name](table, rng)


def with_rewards_of(table: TurnTable, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with a table's rewards; what is absent there is absent here."""

    def row(columns: dict[str, np.ndarray], i: int) -> dict[str, float]:
        return {name: float(column[i]) for name, column in columns.items() if not np.isnan(column[i])}

    turns, outcomes = dict(table.turn_rewards), dict(table.outcome_rewards)
    return [
        dataclasses.replace(
            rollout,
            turn_rewards=tuple(row(turns, int(first) + k) for k in range(len(rollout.turns))),
            outcome_rewards=row(outcomes, i),
        )
        for i, (rollout, first) in enumerate(zip(rollouts, table.first, strict=True))
    ]
