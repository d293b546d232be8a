"""What a step's credit looks like: where it is dead, lonely, or of the sign opposite to its reward."""

from collections.abc import Mapping

import numpy as np

from turnwise.credit.parts import group_mean, require, turn_index_keys, varied
from turnwise.credit.table import Turns, TurnTable
from turnwise.credit.trajectory import rollout_sums

NOTHING = 1e-9
"""An advantage smaller than this is none."""
SHOWN_TURNS = 8


def diagnostics(table: TurnTable, advantages: Turns) -> Mapping[str, float]:
    """Shares and means over a step, by name.

    `zero_variance_groups`, `singleton_groups`, `dead_groups` (no advantage on any turn): shares of the groups.
    `dead_turns`: share of turns without any advantage. `sign_mismatch`: share of the turns with a turn reward and an
    advantage whose signs are opposite; 0 without any such turn. `effective_sample_size`: (Σ|A|)² / Σ A² over turns, as
    a share of the turns; 0 where all are dead. `abs_advantage/turn_K`: mean |A| at turn index K, from 1. With token
    counts, `weight/short_turns` is the share of all |A|·tokens that the shorter half of the turns carries.
    """
    advantages = require("advantages", advantages, len(table.rollout))
    groups, sizes = np.unique(table.rollout_group, return_counts=True)
    reward = table.turn_reward()
    total = rollout_sums(table, reward) + table.outcome_reward()
    varies = varied(total, table.rollout_group)
    size = np.abs(advantages)
    largest = np.zeros(len(groups))
    np.maximum.at(largest, np.searchsorted(groups, table.group), size)
    paid = (reward != 0) & (size > NOTHING)
    found = {
        "zero_variance_groups": 1 - len(np.unique(table.rollout_group[varies])) / len(groups),
        "singleton_groups": float((sizes == 1).mean()),
        "dead_groups": float((largest <= NOTHING).mean()),
        "dead_turns": float((size <= NOTHING).mean()),
        "sign_mismatch": float((np.sign(reward) != np.sign(advantages))[paid].mean()) if paid.any() else 0.0,
        "effective_sample_size": float(size.sum() ** 2 / (size**2).sum() / len(size)) if size.max() > NOTHING else 0.0,
    }
    for k in range(min(SHOWN_TURNS, int(table.index.max()) + 1)):
        found[f"abs_advantage/turn_{k + 1}"] = float(size[table.index == k].mean())
    if table.tokens is not None and size.max() > NOTHING:
        weight = size * table.tokens
        short = np.argsort(table.tokens, kind="stable")[: len(size) // 2]
        found["weight/short_turns"] = float(weight[short].sum() / weight.sum())
    return found


def sign_flips(table: TurnTable, advantages: Turns) -> float | None:
    """The share of turns that credit judges against their own reward; None where there is nothing to compare.

    Looked at are turns whose turn reward differs from the mean of the turns at the same place of their group's
    rollouts, and which have an advantage: is one positive and the other negative?
    """
    advantages = require("advantages", advantages, len(table.rollout))
    reward = table.turn_reward()
    better = reward - group_mean(reward, turn_index_keys(table))
    there = (np.abs(better) > NOTHING) & (np.abs(advantages) > NOTHING)
    return float((better * advantages < 0)[there].mean()) if there.any() else None
