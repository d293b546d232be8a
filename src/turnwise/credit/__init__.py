"""Turn-level credit: advantages from turn rewards and outcomes. Numpy alone."""

from turnwise.credit.estimators import ESTIMATORS, grpo_mr, grpo_or, mt_grpo
from turnwise.credit.parts import (
    Credit,
    Stream,
    group_mean,
    group_std,
    leave_one_out_mean,
    reward_to_go,
    turn_index_keys,
    whiten,
    z_score,
)
from turnwise.credit.table import TokenTable, TurnTable, token_table, turn_table

__all__ = [
    "ESTIMATORS",
    "Credit",
    "Stream",
    "TokenTable",
    "TurnTable",
    "group_mean",
    "group_std",
    "grpo_mr",
    "grpo_or",
    "leave_one_out_mean",
    "mt_grpo",
    "reward_to_go",
    "token_table",
    "turn_index_keys",
    "turn_table",
    "whiten",
    "z_score",
]
