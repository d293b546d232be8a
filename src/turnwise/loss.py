"""The clipped policy-gradient loss, its pieces as pure functions of flat tensors of trained tokens."""

from dataclasses import dataclass
from typing import Literal

import torch

Ratio = Literal["token", "turn", "sequence"]


@dataclass(frozen=True)
class LossParts:
    """What a loss is made of, each a scalar summed with the token weights."""

    loss: torch.Tensor
    kl: torch.Tensor
    """Estimated divergence from the reference policy, nats per token; 0 without one."""
    clipped: torch.Tensor
    """Share of tokens whose ratio the clip holds."""
    shift: torch.Tensor
    """Estimated divergence from the policy that sampled, nats per token."""


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, *, clip_low: float, clip_high: float
) -> torch.Tensor:
    """The pessimistic objective per token.

        min( ρ A,  clip(ρ, 1 − low, 1 + high) A )

    Schulman et al. 2017, arXiv 1707.06347, eq. 7; separate bounds as in arXiv 2503.14476.
    """
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def reference_kl(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """An estimate per token of KL(π‖π_ref) that is never negative.

        exp(ref − policy) − (ref − policy) − 1

    Schulman 2020 ("k3"); used by GRPO, arXiv 2402.03300, eq. 4.
    """
    delta = ref_logprobs - policy_logprobs
    return delta.exp() - delta - 1


def policy_loss(
    policy_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    segments: torch.Tensor | None = None,
) -> LossParts:
    """The loss over (N,) trained tokens.

        − Σ w · [ min(ρ A, clip(ρ) A) − β KL ],    ρ = exp(policy − sampling)

    `weights` carry the aggregation: 1 / (rollouts × tokens of the rollout) is GRPO's mean of per-rollout means. With
    `segments`, a whole number per token, tokens of one segment have one ratio, as `segment_ratio` says.
    """
    shifts = policy_logprobs - sampling_logprobs
    ratio = shifts.exp() if segments is None else segment_ratio(shifts, segments)
    surrogate = clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    zero = policy_logprobs.new_zeros(())
    kl = (weights * reference_kl(policy_logprobs, ref_logprobs)).sum() if ref_logprobs is not None else zero
    held = (ratio * advantages > surrogate).float()
    shift = reference_kl(sampling_logprobs, policy_logprobs)
    return LossParts(
        loss=-(weights * surrogate).sum() + kl_coef * kl,
        kl=kl.detach(),
        clipped=(weights * held).sum().detach(),
        shift=(weights * shift).sum().detach(),
    )


def segment_ratio(shifts: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The importance ratio of each token's segment: a turn, or a whole rollout; (N,).

        ρ_s = exp( mean over the tokens t of segment s of (policy_t − sampling_t) )

    Over rollouts this is GSPO's sequence ratio, arXiv 2507.18071, eq. 7; over turns its turn form, as in arXiv
    2601.04767. Gradients of a segment's terms are spread evenly over its tokens.
    """
    _, place, counts = torch.unique(segments, return_inverse=True, return_counts=True)
    means = shifts.new_zeros(len(counts)).index_add(0, place, shifts) / counts
    return means.exp()[place]


@dataclass(frozen=True)
class ValueParts:
    """What a critic's loss is made of, each a scalar summed with the weights."""

    loss: torch.Tensor
    clipped: torch.Tensor
    """Share of values that the clip holds."""


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor, *, clip: float
) -> ValueParts:
    """The critic's loss over (N,) values, clipped around those from before the update.

        Σ w · ½ max( (V − R)²,  (V_old + clip(V − V_old, −ε, ε) − R)² )

    The value loss of PPO trainers, as in the code of Schulman et al. 2017, arXiv 1707.06347: a value that has gone
    further than ε has no gradient, unless it went away from its target.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, held = (values - returns) ** 2, (near - returns) ** 2
    return ValueParts(
        loss=(weights * torch.maximum(plain, held)).sum() / 2,
        clipped=(weights * (held > plain).float()).sum().detach(),
    )
