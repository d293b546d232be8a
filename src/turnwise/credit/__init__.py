"""Turn-level credit: advantages from turn rewards and outcomes. Numpy alone."""

from turnwise.credit.diagnostics import diagnostics
from turnwise.credit.estimators import ESTIMATORS
from turnwise.credit.mt_grpo import mt_grpo, mt_grpo_repo
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
from turnwise.credit.tokens import broadcast, loss_weights, padded, padded_tokens, turn_ids_from_mask
from turnwise.credit.trajectory import (
    dr_grpo,
    gdpo,
    grpo_mr,
    grpo_or,
    informative,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
)

__all__ = [
    "ESTIMATORS",
    "Credit",
    "Stream",
    "TokenTable",
    "TurnTable",
    "broadcast",
    "diagnostics",
    "dr_grpo",
    "gdpo",
    "group_mean",
    "group_std",
    "grpo_mr",
    "grpo_or",
    "informative",
    "leave_one_out_mean",
    "loss_weights",
    "mt_grpo",
    "mt_grpo_repo",
    "padded",
    "padded_tokens",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "reward_to_go",
    "rloo",
    "token_table",
    "turn_ids_from_mask",
    "turn_index_keys",
    "turn_table",
    "whiten",
    "z_score",
]
