"""One number per rollout, on all of its turns: GRPO and its relatives.

Each takes the rollout's reward as `rewards` says: "outcome" alone, or "merged", which is turn rewards and outcome in
one sum. The suffixes -OR and -MR of arXiv 2505.11821 stand for these two.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Bool

from turnwise.credit.parts import (
    Credit,
    Stream,
    check_number,
    check_scale,
    check_unit,
    group_mean,
    group_sizes,
    leave_one_out_mean,
    on_turns,
    varied,
    z_stream,
)
from turnwise.credit.table import Rollouts, Turns, TurnTable, without_absent

Merging = Literal["outcome", "merged"]
RolloutFlags = Bool[np.ndarray, "R"]


def rollout_rewards(table: TurnTable, rewards: Merging, *, gamma: float = 1.0) -> Rollouts:
    """Each rollout's one reward.

    outcome:  Rᴼᵢ            merged:  Σₖ γ^(k−1) rᵢₖ + γ^(Kᵢ−1) Rᴼᵢ
    """
    check_unit(gamma=gamma)
    if rewards == "outcome":
        return table.outcome_reward()
    if rewards != "merged":
        raise ValueError(f"rewards must be 'outcome' or 'merged'; got {rewards!r}; give one of them")
    if gamma == 1:
        return rollout_sums(table, table.turn_reward()) + table.outcome_reward()
    discount = gamma ** np.arange(int(table.index.max()) + 1.0)
    merged = rollout_sums(table, discount[table.index] * table.turn_reward())
    return merged + discount[table.index[table.last]] * table.outcome_reward()


def rollout_sums(table: TurnTable, turns: Turns) -> Rollouts:
    """The sum over each rollout's turns."""
    return np.add.reduceat(turns, table.first, dtype=float)


def grpo_or(table: TurnTable, *, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """GRPO on the outcome reward alone: one advantage for the whole rollout.

        Aᵢ = (Rᴼᵢ − mean Rᴼ) / (std Rᴼ + eps)   over the rollouts of the group

    Shao et al. 2024, arXiv 2402.03300; "GRPO-OR" of arXiv 2505.11821.
    """
    return _grpo(table, rollout_rewards(table, "outcome"), ddof=ddof, eps=eps)


def grpo_mr(table: TurnTable, *, gamma: float = 1.0, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """GRPO on the merged reward: turn rewards and outcome in one sum, one advantage for the whole rollout.

        Rᵢ = Σₖ γ^(k−1) rᵢₖ + γ^(Kᵢ−1) Rᴼᵢ,    Aᵢ = (Rᵢ − mean R) / (std R + eps)

    "GRPO-MR" of arXiv 2505.11821, section 3. `gamma` discounts per turn.
    """
    return _grpo(table, rollout_rewards(table, "merged", gamma=gamma), ddof=ddof, eps=eps)


def _grpo(table: TurnTable, rewards: Rollouts, *, ddof: int, eps: float) -> Credit:
    return _spread(table, z_stream(rewards, table.rollout_group, ddof=ddof, eps=eps))


def dr_grpo(table: TurnTable, *, rewards: Merging = "merged") -> Credit:
    """GRPO without the division by the standard deviation.

        Aᵢ = Rᵢ − mean R   over the rollouts of the group

    Liu et al. 2025, arXiv 2503.20783. The expected gradient is (G−1)/G times the true one: the mean contains the
    rollout's own reward.
    """
    found = rollout_rewards(table, rewards)
    baseline = group_mean(found, table.rollout_group)
    return _spread(table, Stream(value=found, baseline=baseline, advantage=found - baseline))


def rloo(table: TurnTable, *, rewards: Merging = "merged", singleton: Literal["zero", "raw"] = "zero") -> Credit:
    """REINFORCE with the mean of the group's other rollouts as baseline.

        Aᵢ = Rᵢ − mean over j ≠ i of Rⱼ = G/(G−1) (Rᵢ − mean R)

    Ahmadian et al. 2024, arXiv 2402.14740. Unbiased. A group of one has nothing to compare with: it gets 0, or with
    `singleton="raw"` its reward.
    """
    found = rollout_rewards(table, rewards)
    group = table.rollout_group
    baseline = leave_one_out_mean(found, group)
    if singleton == "zero":
        baseline = np.where(group_sizes(group) > 1, baseline, found)
    elif singleton != "raw":
        raise ValueError(f"singleton must be 'zero' or 'raw'; got {singleton!r}; give one of them")
    return _spread(table, Stream(value=found, baseline=baseline, advantage=found - baseline))


def reinforce_pp(
    table: TurnTable, *, rewards: Merging = "merged", over: Literal["tokens", "rollouts"] = "tokens", eps: float = 1e-8
) -> Credit:
    """REINFORCE++: the rollout's reward, whitened over the whole step rather than its group.

        Aᵢ = (Rᵢ − μ) / (σ + eps)   with μ, σ over all rollouts of the step

    Hu 2025, arXiv 2501.03262, without its KL term in the reward. `over="tokens"` weighs each rollout by its sampled
    tokens, as whitening a padded token array does; it needs the column `tokens`.
    """
    check_number("eps", eps, 0.0)
    found = rollout_rewards(table, rewards)
    mean, std = _step_moments(found, _weights(table, over))
    baseline = np.full(len(found), mean)
    return _spread(table, Stream(value=found, baseline=baseline, advantage=_scaled(found - mean, std, eps)))


def reinforce_pp_baseline(
    table: TurnTable, *, rewards: Merging = "merged", over: Literal["tokens", "rollouts"] = "tokens", eps: float = 1e-8
) -> Credit:
    """REINFORCE++-baseline: the group's mean is taken off first, then the step is whitened.

        Dᵢ = Rᵢ − mean R over the group,    Aᵢ = (Dᵢ − μ) / (σ + eps)   with μ, σ of D over the step

    Hu 2025, arXiv 2501.03262. `over` as in `reinforce_pp`.
    """
    check_number("eps", eps, 0.0)
    found = rollout_rewards(table, rewards)
    baseline = group_mean(found, table.rollout_group)
    centred = found - baseline
    mean, std = _step_moments(centred, _weights(table, over))
    return _spread(table, Stream(value=found, baseline=baseline, advantage=_scaled(centred - mean, std, eps)))


def gdpo(table: TurnTable, *, weights: Mapping[str, float] | None = None, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """GDPO: every reward component is normalised on its own, then they are summed.

        Sᵢ = Σ_c w_c · z-score of R_c,ᵢ over the group,    Aᵢ = (Sᵢ − mean S) / (std S + eps)   over the step

    arXiv 2601.05242. Components are those of the outcome, and those of the turns summed over a rollout; `weights` are
    1 unless given by name. A component that a rollout does not have counts 0. `eps` is added to the standard deviation
    over all rollouts of the step too, whose ddof is 1 whatever `ddof` says of the groups.
    """
    check_scale(ddof=ddof, eps=eps)
    for name, weight in (weights or {}).items():
        check_number(f"weights[{name!r}]", weight, 0.0)
    components = {**table.outcome_rewards}
    for name, column in table.turn_rewards.items():
        total = rollout_sums(table, without_absent(column))
        components[name] = without_absent(components[name]) + total if name in components else total
    unknown = sorted(set(weights or {}) - set(components))
    if unknown:
        raise ValueError(f"weights must name reward components, {sorted(components)}; got {unknown[0]!r}")
    summed, streams = np.zeros(table.num_rollouts), {}
    for name, column in components.items():
        own = z_stream(without_absent(column), table.rollout_group, ddof=ddof, eps=eps)
        own = replace(own, advantage=(weights or {}).get(name, 1.0) * own.advantage)
        streams[name] = on_turns(own, table)
        summed += own.advantage
    mean, std = _step_moments(summed, np.ones(len(summed)))
    return Credit(advantages=np.repeat(_scaled(summed - mean, std, eps), table.lengths), streams=streams)


def informative(table: TurnTable, *, rewards: Merging = "merged") -> RolloutFlags:
    """Which rollouts are in a group whose rewards differ: DAPO's filter, which draws other questions for the rest.

    Yu et al. 2025, arXiv 2503.14476, section 3.2.
    """
    return varied(rollout_rewards(table, rewards), table.rollout_group)


def _spread(table: TurnTable, trajectory: Stream) -> Credit:
    """One number per rollout, on all of its turns."""
    stream = on_turns(trajectory, table)
    return Credit(advantages=stream.advantage, streams={"trajectory": stream})


def _weights(table: TurnTable, over: str) -> Rollouts:
    if over == "rollouts":
        return np.ones(table.num_rollouts)
    if over != "tokens":
        raise ValueError(f"over must be 'tokens' or 'rollouts'; got {over!r}; give one of them")
    table.need("tokens")
    assert table.tokens is not None
    return rollout_sums(table, table.tokens.astype(float))


def _step_moments(values: Rollouts, weights: Rollouts) -> tuple[float, float]:
    """Weighted mean and standard deviation (ddof 1, in units of weight); exactly 0 where all values are equal."""
    total = weights.sum()
    mean = float((weights * values).sum() / total)
    if values.min() == values.max():
        return float(values[0]), 0.0
    return mean, float(np.sqrt((weights * (values - mean) ** 2).sum() / max(total - 1, 1)))


def _scaled(centred: Rollouts, std: float, eps: float) -> Rollouts:
    return centred / (std + eps) if std > 0 else np.zeros(len(centred))
