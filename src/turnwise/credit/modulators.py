"""Advantages in, advantages out: scaled turn by turn with what is known about the turn."""

import numpy as np

from turnwise.credit.parts import (
    check_flag,
    check_number,
    check_scale,
    check_unit,
    group_mean,
    require,
    reward_to_go,
    z_score,
)
from turnwise.credit.table import Rollouts, Turns, TurnTable
from turnwise.credit.transforms import after_turns


def empg(
    advantages: Turns,
    entropies: Turns,
    table: TurnTable,
    *,
    kappa: float = 1.0,
    kappa_next: float = 1.0,
    zeta: float = 0.1,
    centre: bool = True,
    eps: float = 1e-8,
) -> Turns:
    """EMPG: sure turns count more than unsure ones, and turns that lead to sure ones get a bonus.

        h   = (H − min H) / (max H − min H + eps)          over all turns of the step
        g   = exp(−κ h) / mean of exp(−κ h)
        A'ₖ = Aₖ g(hₖ) + ζ exp(−κ' hₖ₊₁),                  without the bonus on a rollout's last turn
        A   = A' − mean A'                                 with `centre`

    Wang et al. 2025, arXiv 2509.09265. `entropies` has each turn's mean entropy per token. Means are over turns.
    The scaling of H and the defaults follow the authors' project page.
    """
    for name, number in (("kappa", kappa), ("kappa_next", kappa_next), ("zeta", zeta), ("eps", eps)):
        check_number(name, number, 0.0)
    check_flag("centre", centre)
    advantages = require("advantages", advantages, len(table.rollout))
    entropies = require("entropies", entropies, len(table.rollout))
    low, high = entropies.min(), entropies.max()
    unsure = (entropies - low) / (high - low + eps) if high > low else np.zeros(len(entropies))
    scale = np.exp(-kappa * unsure)
    bonus = after_turns(np.exp(-kappa_next * unsure), np.zeros(table.num_rollouts), table)
    out = advantages * (scale / scale.mean()) + zeta * bonus
    return out - out.mean() if centre else out


def agent_opsd(
    advantages: Turns,
    evidence: Turns,
    success: Rollouts,
    table: TurnTable,
    *,
    lam: float,
    bound: float = 0.2,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Turns:
    """AgentOPSD: turns that a teacher finds helpful take more of a good advantage and less of a bad one.

        logit Vₖ = logit V₀ + Σ_{l ≤ k} δ_l        with V₀ the group's share of success
        qₖ = Vₖ − Vₖ₋₁,    zₖ = z-score of qₖ within the rollout
        mₖ = clip(1 + b · sign(A) · zₖ, 1 − b, 1 + b)
        A'ₖ = Aₖ ((1 − λ) + λ mₖ)

    arXiv 2608.05987. `evidence` is δ: the teacher's log-probability of the turn's tokens minus the policy's, summed;
    `success` is each rollout's, in [0, 1]. With b < 1 and λ in [0, 1] no advantage changes its sign. Where all or none
    of a group succeed, and in rollouts of one turn, nothing changes.
    """
    check_unit(lam=lam, bound=bound)
    check_scale(ddof=ddof, eps=eps)
    advantages = require("advantages", advantages, len(table.rollout))
    evidence = require("evidence", evidence, len(table.rollout))
    success = require("success", success, table.num_rollouts, what="rollout")
    outside = (success < 0) | (success > 1)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(f"success must be in [0, 1]; rollout {row} has {success[row]}; scale it")
    prior = group_mean(success, table.rollout_group)[table.rollout]
    to_come = reward_to_go(evidence, np.zeros(table.num_rollouts), table, discount=1.0)
    so_far = to_come[table.index == 0][table.rollout] - to_come
    gain = _updated(prior, so_far + evidence) - _updated(prior, so_far)
    helpful = z_score(gain, table.rollout, ddof=ddof, eps=eps)
    factor = np.clip(1 + bound * np.sign(advantages) * helpful, 1 - bound, 1 + bound)
    return advantages * ((1 - lam) + lam * factor)


def _updated(prior: Turns, evidence: Turns) -> Turns:
    """The probability whose logit is the prior's plus the evidence; priors of 0 and 1 stay."""
    odds = np.exp(-np.abs(evidence))  # never overflows: the larger of the two weights is 1
    yes = prior * np.where(evidence >= 0, 1.0, odds)
    no = (1 - prior) * np.where(evidence >= 0, odds, 1.0)
    return np.divide(yes, yes + no, out=prior.copy(), where=yes + no > 0)
