"""Turn rewards and outcomes to turn advantages: pure functions of the turn table.

Every estimator returns a `Credit`: the advantages, and the streams they were made of, so that a reader can be shown
why a turn got what it got. In all of them a group without variance, and a group of one, gives zero, never NaN.
"""

from collections.abc import Callable

import numpy as np

from turnwise.credit.parts import Credit, Stream, group_mean, reward_to_go, turn_index_keys, z_score
from turnwise.credit.table import Rollouts, TurnTable


def _trajectory_credit(table: TurnTable, rewards: Rollouts, *, ddof: int, eps: float) -> Credit:
    """One z-scored number per rollout, on all of its turns."""
    advantage = z_score(rewards, table.rollout_group, ddof=ddof, eps=eps)[table.rollout]
    stream = Stream(
        value=rewards[table.rollout],
        baseline=group_mean(rewards, table.rollout_group)[table.rollout],
        advantage=advantage,
    )
    return Credit(advantages=advantage, streams={"trajectory": stream})


def grpo_or(table: TurnTable, *, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """GRPO on the outcome reward alone: one advantage for the whole rollout.

        Aᵢ = (Rᴼᵢ − mean Rᴼ) / (std Rᴼ + eps)   over the rollouts of the group

    Shao et al. 2024, arXiv 2402.03300; "GRPO-OR" of arXiv 2505.11821.
    """
    return _trajectory_credit(table, table.outcome_reward(), ddof=ddof, eps=eps)


def grpo_mr(table: TurnTable, *, gamma: float = 1.0, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """GRPO on the merged reward: turn rewards and outcome in one sum, one advantage for the whole rollout.

        Rᵢ = Σₖ γ^(k−1) rᵢₖ + γ^(Kᵢ−1) Rᴼᵢ,    Aᵢ = (Rᵢ − mean R) / (std R + eps)

    "GRPO-MR" of arXiv 2505.11821, section 3. `gamma` discounts per turn.
    """
    discount = gamma ** table.index.astype(float)
    merged = np.bincount(table.rollout, weights=discount * table.turn_reward())
    merged = merged + discount[table.last] * table.outcome_reward()
    return _trajectory_credit(table, merged, ddof=ddof, eps=eps)


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
    reward = table.turn_reward()
    keys = turn_index_keys(table)
    own = z_score(reward, keys, ddof=ddof, eps=eps)
    outcome = table.outcome_reward()
    last = z_score(outcome, table.rollout_group, ddof=ddof, eps=eps)
    advantages = reward_to_go(own, last, table, discount=alpha)
    streams = {
        "turn": Stream(value=reward, baseline=group_mean(reward, keys), advantage=own),
        "outcome": Stream(
            value=outcome[table.rollout],
            baseline=group_mean(outcome, table.rollout_group)[table.rollout],
            advantage=last[table.rollout],
        ),
    }
    return Credit(advantages=advantages, streams=streams)


ESTIMATORS: dict[str, Callable[..., Credit]] = {
    "grpo-or": grpo_or,
    "grpo-mr": grpo_mr,
    "mt-grpo": mt_grpo,
}
"""The estimators by their published names."""
