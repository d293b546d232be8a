"""Turn advantages without a critic: a turn's return against the returns of turns like it.

Like it is, in the first half, a turn of the same group at the same index; in the second half, a turn of the same group
in the same anchor state. A turn's return is its own reward and the discounted rest of its rollout, outcome included.
The columns `values` and `bootstrap` are not read: what a rollout that was cut off would still have earned counts 0.
"""

import math
from typing import Literal

import numpy as np
from jaxtyping import Bool

from turnwise.credit.parts import (
    Credit,
    Stream,
    check_flag,
    check_number,
    check_scale,
    check_unit,
    group_mean,
    group_sizes,
    group_sum,
    in_stds,
    leave_one_out_mean,
    numbered,
    paired,
    reward_to_go,
    turn_index_keys,
    varied,
    z_score,
    z_stream,
)
from turnwise.credit.table import LARGEST, TurnKeys, Turns, TurnTable
from turnwise.credit.trajectory import dr_grpo, grpo_mr, grpo_or
from turnwise.credit.transforms import after_turns

TurnFlags = Bool[np.ndarray, "N"]
Scale = Literal["std", "one"]
Singleton = Literal["zero", "raw"]


# ------------------------------------------------------------------------------- groups by turn index


def turn_rloo(table: TurnTable, *, gamma: float = 1.0) -> Credit:
    """Each turn's return minus the mean return of the group's other rollouts at that turn: unbiased.

        Gᵢₖ = rᵢₖ + γ Gᵢ,ₖ₊₁,    Gᵢ,Kᵢ = rᵢ,Kᵢ + Rᴼᵢ
        bᵢₖ = mean of Gⱼₖ over the j ≠ i that took a turn k;   if none did, mean of Gⱼ,Kⱼ over all j ≠ i
        Aᵢₖ = Gᵢₖ − bᵢₖ

    Ours: REINFORCE with reward-to-go, and leave-one-out baselines (RLOO, arXiv 2402.14740) per turn index. A baseline
    is made of other rollouts alone, so with γ = 1 the mean over rollouts of Σₖ Aᵢₖ ∇log π is the exact gradient of
    E[Σₖ rₖ + Rᴼ], however many turns the rollouts take. A turn that nobody else reached is compared with how the
    others ended. A rollout alone in its group has baseline 0: its advantages are its returns. `gamma` discounts per
    turn.
    """
    check_unit(gamma=gamma)
    returns, keys = _returns(table, gamma), turn_index_keys(table)
    endings = np.repeat(leave_one_out_mean(returns[table.last], table.rollout_group), table.lengths)
    baseline = np.where(group_sizes(keys) > 1, leave_one_out_mean(returns, keys), endings)
    return _credit(Stream(value=returns, baseline=baseline, advantage=returns - baseline))


def gtpo(table: TurnTable, *, gamma: float = 0.9, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """GTPO: the z-score of each turn's discounted return among the group's turns at its index.

        Gᵢₖ = Σ_{l ≥ k} γ^(l−k) rᵢₗ, the last with Rᴼᵢ,    Aᵢₖ = z-score of Gᵢₖ over the rollouts that took a turn k

    Ding et al. 2025, arXiv 2511.14846; without its reward shaping, which comes before. Where rollouts differ in their
    number of turns, index k compares those that took a turn k, whether or not it was their last; a turn that no other
    rollout reached gets 0. `gamma` discounts per turn.
    """
    check_unit(gamma=gamma)
    returns, keys = _returns(table, gamma), turn_index_keys(table)
    return _credit(z_stream(returns, keys, ddof=ddof, eps=eps))


def matchtir(table: TurnTable, *, gamma: float = 0.9, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """MatchTIR: half the rollout's advantage, half the turn's.

        Aᵢₖ = ½ (z-score of Σₗ rᵢₗ + Rᴼᵢ over the group  +  z-score of Gᵢₖ over the group's turns at index k)

    arXiv 2601.10712; without its matching of tool calls, which makes the turn rewards. The first term is `grpo_mr`,
    undiscounted; the second is `gtpo`, ragged groups included: a turn that no other rollout reached keeps the first
    term's half. `gamma` discounts per turn.
    """
    check_unit(gamma=gamma)
    whole = grpo_mr(table, ddof=ddof, eps=eps)
    turn = gtpo(table, gamma=gamma, ddof=ddof, eps=eps)
    return Credit(advantages=(whole.advantages + turn.advantages) / 2, streams={**whole.streams, **turn.streams})


def irc_hybrid(table: TurnTable, *, gamma: float = 0.9, lam: float = 0.3, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """The hybrid of MT-GRPO and GTPO: the z-score of the turn's return, plus some of the outcome's.

        Aᵢₖ = z-score of Gᵢₖ over the group's turns at index k  +  λ · z-score of Rᴼᵢ over the group
        Gᵢₖ = Σ_{l ≥ k} γ^(l−k) rᵢₗ + γ^(Kᵢ−k) Rᴼᵢ

    arXiv 2604.02869; without its calibration of rewards, which comes before. The first z-score is over the rollouts
    that took a turn k, as in GTPO, from which the paper has the term: all turns of a group together would compare
    returns that are discounted over different distances. Ragged groups: a turn that no other rollout reached gets the
    second term alone. λ = 0 is `gtpo`. `gamma` discounts per turn.
    """
    check_unit(gamma=gamma)
    check_number("lam", lam, 0.0)
    turn = gtpo(table, gamma=gamma, ddof=ddof, eps=eps)
    outcome = grpo_or(table, ddof=ddof, eps=eps)
    streams = {**turn.streams, "outcome": outcome.streams["trajectory"]}
    return Credit(advantages=turn.advantages + lam * outcome.advantages, streams=streams)


# ------------------------------------------------------------------------------ groups by anchor state


def anchor_keys(table: TurnTable, *, history: int = 0) -> TurnKeys:
    """A key per turn that is shared by the turns of one group with equal last `history` + 1 anchors.

        with history j:   (anchor of turn k−j, ..., anchor of turn k−1, anchor of turn k)

    All anchors are those of the turn's own rollout. A turn with fewer than j turns before it has a key of its own,
    below zero.
    """
    check_number("history", history, 0, whole=True)
    keys = _histories(table, history)[-1]
    return np.where(table.index >= history, keys, -1 - np.arange(len(keys))) if history else keys


def gigpo(
    table: TurnTable,
    *,
    omega: float = 1.0,
    gamma: float = 0.95,
    scale: Scale = "std",
    singleton: Singleton = "zero",
    own: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Credit:
    """GiGPO: the rollout's advantage, plus that of the turn's return among the turns in its anchor state.

        Aᵢₖ = (Rᵢ − mean R) / F  +  ω (Gᵢₖ − mean G) / F
        Rᵢ = Σₖ rᵢₖ + Rᴼᵢ over the group;   G: returns with γ, over the group's turns in the anchor state of turn k
        F = std + eps, or 1

    Feng et al. 2025, arXiv 2505.10978; mean and std of R are over rollouts (the authors' code takes them over turns
    unless told otherwise). `scale` chooses F. A turn whose state nobody else was in gets 0 for its second term, or
    with `singleton="raw"` its return. With `own` a rollout that comes back to a state is compared with itself too, as
    published, which is biased; without, the second mean is over other rollouts alone (std stays over all), and a
    state that only one rollout was in is a singleton.
    """
    check_unit(gamma=gamma)
    check_number("omega", omega, 0.0)
    whole = grpo_mr(table, ddof=ddof, eps=eps) if scale == "std" else dr_grpo(table)
    returns, keys = _returns(table, gamma), anchor_keys(table)
    turn, _ = _compared(returns, keys, table.rollout, scale=scale, singleton=singleton, own=own, ddof=ddof, eps=eps)
    return Credit(advantages=whole.advantages + omega * turn.advantage, streams={**whole.streams, "turn": turn})


def hgpo(
    table: TurnTable,
    *,
    history: int = 2,
    alpha: float = 1.0,
    gamma: float = 0.95,
    scale: Scale = "std",
    own: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Credit:
    """HGPO: the turn's return among turns with equal last states, averaged over how many states are looked at.

        Aᵢₖ = Σⱼ wⱼ Aᵢₖⱼ / Σⱼ wⱼ,    wⱼ = (j+1)^α
        Aᵢₖⱼ = (Gᵢₖ − mean G) / F   over the group's turns with the same state and the same last j states

    j goes from 0 to `history`; a j at which the turn has nobody to compare with, or fewer than j turns before it, is
    left out of both sums, and where all are, the advantage is 0. He et al. 2026, arXiv 2602.22817. `scale` and `own`
    as in `gigpo`. The authors' code differs: `hgpo_code`.
    """
    _check_weights(history, alpha)
    levels = _levels(table, history, gamma=gamma, scale=scale, own=own, ddof=ddof, eps=eps)
    weights = [(j + 1.0) ** alpha * met for j, (_, met) in enumerate(levels)]
    return _averaged([level for level, _ in levels], weights, eps=0.0)


def hgpo_code(
    table: TurnTable,
    *,
    history: int = 2,
    alpha: float = 1.0,
    gamma: float = 0.95,
    scale: Scale = "std",
    own: bool = True,
    ddof: int = 0,
    eps: float = 1e-6,
) -> Credit:
    """HGPO as its authors' code has it, which differs from their paper.

        Aᵢₖ = Σⱼ wⱼ Aᵢₖⱼ / (Σⱼ wⱼ + eps),    wⱼ = (j+2)^α where Aᵢₖⱼ ≠ 0,  0 elsewhere

    A turn that did exactly as well as its comrades counts as one that has none, so a 0 at one j does not pull the
    others down; weights grow from 2, since the code counts the present state as history; std has ddof 0. Code of
    arXiv 2602.22817 (`langfengQ/verl-agent`, recipe `hgpo`, June 2026), without its optional trajectory term.
    """
    _check_weights(history, alpha)
    levels = _levels(table, history, gamma=gamma, scale=scale, own=own, ddof=ddof, eps=eps)
    weights = [(j + 2.0) ** alpha * (level.advantage != 0) for j, (level, _) in enumerate(levels)]
    return _averaged([level for level, _ in levels], weights, eps=eps)


def gagpo(
    table: TurnTable,
    *,
    gamma: float = 0.95,
    lam: float = 0.95,
    own: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Credit:
    """GAGPO: GAE over turns, where the value of a state is the mean return of the group's turns in it.

        V(s) = mean of G over the group's turns in anchor state s;   0 after the last turn
        δₖ = rₖ + γ V(sₖ₊₁) − V(sₖ),    Âₖ = δₖ + γλ Âₖ₊₁      r of the last turn includes Rᴼ
        Aₖ = (Âₖ − mean Â) / (std Â + eps)   over all turns of the group

    arXiv 2605.13217. The stream holds Â. With `own` V is of all turns, as published; without, of other rollouts'
    turns, and 0 in a state that only one rollout was in. The defaults of γ and λ are ours. `gamma` discounts per turn.
    """
    check_unit(gamma=gamma, lam=lam)
    check_flag("own", own)
    returns, keys = _returns(table, gamma), anchor_keys(table)
    values = _baseline(returns, keys, table.rollout, own=own)
    if not own:
        values = np.where(_met(keys, table.rollout, own=own), values, 0.0)
    deltas = table.reward() + gamma * after_turns(values, np.zeros(table.num_rollouts), table) - values
    found = reward_to_go(deltas, np.zeros(table.num_rollouts), table, discount=gamma * lam)
    return Credit(
        advantages=z_score(found, table.group, ddof=ddof, eps=eps),
        streams={"turn": Stream(value=found + values, baseline=values, advantage=found)},
    )


# ------------------------------------------------------------------------------------------- helpers


def _returns(table: TurnTable, gamma: float) -> Turns:
    return reward_to_go(table.turn_reward(), table.outcome_reward(), table, discount=gamma)


def _check_weights(history: int, alpha: float) -> None:
    """ValueError for histories that are no whole number, and powers of them that are not finite."""
    check_number("history", history, 0, whole=True)
    check_number("alpha", alpha, 0.0, math.floor(math.log(LARGEST) / math.log(history + 2.0)))


def _histories(table: TurnTable, longest: int) -> list[TurnKeys]:
    """Keys like those of `anchor_keys` for histories of 0 to `longest`; all 0 or more."""
    table.need("anchor")
    assert table.anchor is not None
    anchor = paired(table.group, table.anchor)
    out = [anchor]
    for j in range(1, longest + 1):
        before = np.roll(out[-1], 1)  # of the same rollout wherever the turn has j turns before it
        keys = paired(before, anchor)
        alone = int(keys.max()) + 1 + np.arange(len(keys))
        out.append(numbered(np.where(table.index >= j, keys, alone))[0])
    return out


def _credit(turn: Stream) -> Credit:
    return Credit(advantages=turn.advantage, streams={"turn": turn})


def _met(keys: TurnKeys, rollout: TurnKeys, *, own: bool) -> TurnFlags:
    """Which rows have another to be compared with: any with the same key, or without `own` one of another rollout."""
    return group_sizes(keys) > (1 if own else group_sizes(paired(keys, rollout)))


def _baseline(values: Turns, keys: TurnKeys, rollout: TurnKeys, *, own: bool) -> Turns:
    """The mean over the rows with the same key, without `own` over those of other rollouts, where there are any.

    Exact where all rows with the key are equal.
    """
    if own:
        mean = group_mean(values, keys)
    else:
        mine = paired(keys, rollout)
        others = group_sizes(keys) - group_sizes(mine)
        mean = (group_sum(values, keys) - group_sum(values, mine)) / np.maximum(others, 1)
    return np.where(varied(values, keys), mean, values)


def _compared(
    values: Turns,
    keys: TurnKeys,
    rollout: TurnKeys,
    *,
    scale: Scale,
    singleton: Singleton,
    own: bool,
    ddof: int,
    eps: float,
) -> tuple[Stream, TurnFlags]:
    """Values against the mean of their key, in units of its standard deviation or as they are; and which have one."""
    if scale not in ("std", "one"):
        raise ValueError(f"scale must be 'std' or 'one'; got {scale!r}; give one of them")
    if singleton not in ("zero", "raw"):
        raise ValueError(f"singleton must be 'zero' or 'raw'; got {singleton!r}; give one of them")
    check_flag("own", own)
    check_scale(ddof=ddof, eps=eps)
    met = _met(keys, rollout, own=own)
    if own and scale == "std":
        found = z_stream(values, keys, ddof=ddof, eps=eps)
        mean, advantage = found.baseline, found.advantage
    else:
        mean = _baseline(values, keys, rollout, own=own)
        advantage = values - mean
        advantage = in_stds(advantage, values, keys, ddof=ddof, eps=eps) if scale == "std" else advantage
    alone = values if singleton == "zero" else np.zeros(len(values))
    baseline, advantage = np.where(met, mean, alone), np.where(met, advantage, values - alone)
    return Stream(value=values, baseline=baseline, advantage=advantage), met


def _levels(
    table: TurnTable, history: int, *, gamma: float, scale: Scale, own: bool, ddof: int, eps: float
) -> list[tuple[Stream, TurnFlags]]:
    """For each length of history from 0: the turns compared, and which had another to be compared with."""
    check_unit(gamma=gamma)
    returns, rollout, out = _returns(table, gamma), table.rollout, []
    for keys in _histories(table, history):
        out.append(_compared(returns, keys, rollout, scale=scale, singleton="zero", own=own, ddof=ddof, eps=eps))
    return out


def _averaged(levels: list[Stream], weights: list[Turns], *, eps: float) -> Credit:
    total, summed = np.zeros(len(weights[0])), np.zeros(len(weights[0]))
    for weight, level in zip(weights, levels, strict=True):
        total += weight
        summed += weight * level.advantage
    advantages = np.where(total > 0, summed / (total + np.where(total > 0, eps, 1.0)), 0.0)
    return Credit(advantages=advantages, streams={f"history {j}": level for j, level in enumerate(levels)})
