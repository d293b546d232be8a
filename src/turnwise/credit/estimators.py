"""The estimators by their published names, and what each needs beside rewards.

Names collide in this field; the docstrings and `docs/credit.md` have the arXiv ids.
"""

from collections.abc import Callable

from turnwise.credit.gae import (
    TokenCredit,
    bi_level_gae,
    mt_ppo,
    mt_ppo_paid_at_end,
    ppo_mr,
    ppo_or,
    step_ppo,
    turn_ppo,
    vetta,
)
from turnwise.credit.grouped import gagpo, gigpo, gtpo, hgpo, hgpo_code, irc_hybrid, matchtir, turn_rloo
from turnwise.credit.mt_grpo import grpo_decoupled, mt_grpo, mt_grpo_repo
from turnwise.credit.parts import Credit
from turnwise.credit.trajectory import dr_grpo, gdpo, grpo_mr, grpo_or, reinforce_pp, reinforce_pp_baseline, rloo
from turnwise.credit.trees import carl_edges, mt_grpo_tree, slate, tree_grpo, treerl, vineppo

ESTIMATORS: dict[str, Callable[..., Credit]] = {
    "grpo-or": grpo_or,
    "grpo-mr": grpo_mr,
    "dr-grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_pp,
    "reinforce++-baseline": reinforce_pp_baseline,
    "gdpo": gdpo,
    "grpo-decoupled": grpo_decoupled,
    "mt-grpo": mt_grpo,
    "mt-grpo-repo": mt_grpo_repo,
    "turn-rloo": turn_rloo,
    "gtpo": gtpo,
    "matchtir": matchtir,
    "irc-hybrid": irc_hybrid,
    "gigpo": gigpo,
    "hgpo": hgpo,
    "hgpo-code": hgpo_code,
    "gagpo": gagpo,
    "turn-ppo": turn_ppo,
    "step-ppo": step_ppo,
    "mt-grpo-tree": mt_grpo_tree,
    "treerl": treerl,
    "carl": carl_edges,
    "tree-grpo": tree_grpo,
    "slate": slate,
    "vineppo": vineppo,
}
"""One advantage per turn, from the turn table."""

TOKEN_ESTIMATORS: dict[str, Callable[..., TokenCredit]] = {
    "ppo-or": ppo_or,
    "ppo-mr": ppo_mr,
    "mt-ppo": mt_ppo,
    "mt-ppo-paid-at-end": mt_ppo_paid_at_end,
    "bi-level-gae": bi_level_gae,
    "vetta": vetta,
}
"""One advantage per token, from the token table with a critic's values."""

NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("reinforce++", "reinforce++-baseline"), ("tokens",)),
    **dict.fromkeys(("gigpo", "hgpo", "hgpo-code", "gagpo"), ("anchor",)),
    **dict.fromkeys(("turn-ppo", "step-ppo", "vineppo"), ("values",)),
    **dict.fromkeys(("mt-grpo-tree", "treerl", "carl", "tree-grpo", "slate"), ("node",)),
}
"""The optional columns of the turn table that a method needs; those that are not named need none."""

WHOLE_STEP = ("reinforce++", "reinforce++-baseline", "gdpo", "step-ppo")
"""Those that whiten over the whole step: what a turn gets depends on the other groups."""

ONE_PER_ROLLOUT = (
    *("grpo-or", "grpo-mr", "dr-grpo", "rloo", "reinforce++", "reinforce++-baseline", "gdpo", "grpo-decoupled"),
    "tree-grpo",
)
"""Those that give all turns of a rollout the same advantage."""
