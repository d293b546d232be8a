"""Drawing one token per row from logits."""

import torch

from turnwise.cores import compiled


@compiled
def drawn_tokens(
    logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of `logits` [B, V] and its log-probability, both [B].

        x = min { v : Σ_{w ≤ v} p_w > u },    p = softmax(logits / temperature)

    the inverse of the cumulative distribution, summed in float64, at `uniforms` [B] in [0, 1).
    Temperature 0 takes the most probable token, with its log-probability at temperature 1. Where
    the logits hold NaN or +inf, the log-probability is NaN.
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    scale = torch.where(temperatures > 0, temperatures, torch.ones_like(temperatures))
    logprobs = torch.log_softmax(exact / scale[:, None].to(exact.dtype), dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    point = uniforms[:, None] * cumulative[:, -1:]
    # Rounding can put the point on the total, and NaN sorts last: stay in range.
    tokens = torch.searchsorted(cumulative, point, right=True).clamp_(max=logits.shape[1] - 1)
    # That token, or one where a parallel sum is not monotonic, may have probability 0: not that one.
    greedy = (temperatures == 0)[:, None] | logprobs.gather(1, tokens).isneginf()
    if greedy.any():
        tokens = torch.where(greedy, logits.argmax(dim=-1, keepdim=True), tokens)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]
