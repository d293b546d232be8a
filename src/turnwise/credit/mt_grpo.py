"""MT-GRPO, arXiv 2505.11821, as chains: groups by turn index. The tree form is in `trees`."""

import numpy as np

from turnwise.credit.parts import (
    Credit,
    check_number,
    check_unit,
    on_turns,
    reward_to_go,
    turn_index_keys,
    z_score,
    z_stream,
)
from turnwise.credit.table import TurnTable
from turnwise.credit.trajectory import rollout_rewards, rollout_sums


def mt_grpo(table: TurnTable, *, alpha: float = 1.0, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """MT-GRPO: a turn is credited with its own reward, those after it, and the outcome.

        Aᴵᵢₖ = z-score of rᵢₖ over the rollouts of the group that took a turn k
        Aᴼᵢ  = z-score of Rᴼᵢ over the rollouts of the group
        Aᵢₖ  = Aᴵᵢₖ + α Aᵢ,ₖ₊₁,    Aᵢ,Kᵢ = Aᴵᵢ,Kᵢ + Aᴼᵢ

    Zeng et al. 2025, arXiv 2505.11821, appendix D, as chains: groups by turn index instead of by identical state. The
    paper leaves groups with unequal numbers of turns open. Here a turn without a turn reward (a rollout that answers
    where its siblings search) enters the statistics of its index with reward 0 and receives that Aᴵ too; so its one
    turn gets Aᴵ + Aᴼ. Where all rollouts have equally many turns and the last has no turn reward, Aᴵ of the last
    turn is 0 and the paper's form remains.
    """
    check_unit(alpha=alpha)
    reward, outcome, keys = table.turn_reward(), table.outcome_reward(), turn_index_keys(table)
    own = z_stream(reward, keys, ddof=ddof, eps=eps)
    last = z_stream(outcome, table.rollout_group, ddof=ddof, eps=eps)
    return Credit(
        advantages=reward_to_go(own.advantage, last.advantage, table, discount=alpha),
        streams={"turn": own, "outcome": on_turns(last, table)},
    )


def grpo_decoupled(table: TurnTable, *, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """MT-GRPO without its causality: every turn is credited with all turn rewards of its rollout and the outcome.

        Aᵢ = Σₖ Aᴵᵢₖ + Aᴼᵢ   with Aᴵ and Aᴼ as in `mt_grpo`

    Ours, as one corner of a square. From `grpo_mr`, MT-GRPO differs in two things: each stream is normalised on its
    own, and no turn is credited with what was paid before it. This has the first alone; `gtpo` with γ = 1 has the
    second alone. `gdpo` decouples by component rather than by turn, and whitens over the step.
    """
    found = mt_grpo(table, ddof=ddof, eps=eps)
    return Credit(advantages=np.repeat(found.advantages[table.first], table.lengths), streams=found.streams)


def mt_grpo_repo(table: TurnTable, *, coef: float = 1.0, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """The two-turn form of the authors' code, which differs from their paper.

        with a second turn:     Aᵢ₁ = Aᴼᵢ + c Aᴵᵢ on the first turn,    Aᵢₖ = Aᴼᵢ on all later ones
        without one:            Aᵢ₁ = z-score of the merged reward rᵢ + Rᴼᵢ, as GRPO-MR

    Aᴵ is the z-score, over all rollouts of the group, of a rollout's turn rewards summed; rollouts without a second
    turn count with what they have. Code of arXiv 2505.11821 (`SiliangZeng/Multi-Turn-RL-Agent`, June 2025). One group
    so mixes two estimators. Equal to `mt_grpo` where all rollouts have two turns, the first alone is paid, c = α = 1.
    """
    check_number("coef", coef, 0.0)
    group = table.rollout_group
    own = z_score(rollout_sums(table, table.turn_reward()), group, ddof=ddof, eps=eps)
    outcome = z_score(table.outcome_reward(), group, ddof=ddof, eps=eps)
    merged = z_score(rollout_rewards(table, "merged"), group, ddof=ddof, eps=eps)
    advantages = np.repeat(outcome, table.lengths)
    advantages[table.first] = np.where(table.lengths > 1, outcome + coef * own, merged)
    return Credit(advantages=advantages)
