"""Turn-level credit: advantages from turn rewards and outcomes. Numpy alone."""

from turnwise.credit.estimators import (
    ESTIMATORS,
    Credit,
    Stream,
    group_mean,
    group_std,
    grpo_mr,
    grpo_or,
    mt_grpo,
    reward_to_go,
    turn_index_keys,
    z_score,
)
from turnwise.credit.table import TurnTable, turn_table

__all__ = [
    "ESTIMATORS",
    "Credit",
    "Stream",
    "TurnTable",
    "group_mean",
    "group_std",
    "grpo_mr",
    "grpo_or",
    "mt_grpo",
    "reward_to_go",
    "turn_index_keys",
    "turn_table",
    "z_score",
]
