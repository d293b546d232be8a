"""Log-probabilities of tokens out of hidden states, in pieces: all logits at once are the largest tensor of an update.

With a vocabulary of 150,000, the logits of 16,000 tokens are 9 GiB, and their softmax, its gradient and the like as
much each. Pieces are computed one after the other, and again in the backward pass, so that one piece's are there at a
time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

PIECE = 2**25
"""Logits in a piece: in float32, 128 MiB."""

Head = Callable[[torch.Tensor], torch.Tensor]


def logprobs_of(
    head: Head, states: torch.Tensor, tokens: torch.Tensor, *, temperature: float, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `tokens` (N,) and entropies (nats) of their distributions, float32 (N,) each.

        log softmax(head(states) / temperature)

    `head` turns hidden states (N, d) into logits (N, vocabulary).
    """
    size = max(1, PIECE // vocabulary)
    if len(tokens) <= size:
        return _whole(head, states, tokens, temperature)
    parts = [
        checkpoint(_whole, head, some, own, temperature, use_reentrant=False, preserve_rng_state=False)
        for some, own in zip(states.split(size), tokens.split(size), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)  # pyright: ignore[reportGeneralTypeIssues]
    return torch.cat(logprobs), torch.cat(entropies)


def _whole(
    head: Head, states: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = head(states).float()
    return _LogSoftmax.apply(logits if temperature == 1 else logits / temperature, tokens)  # pyright: ignore


class _LogSoftmax(torch.autograd.Function):
    """Log-probabilities and entropies, for whose backward pass one tensor of the logits' size is kept, not three."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = logits.log_softmax(-1)
        entropy = -logprobs.exp().mul_(logprobs).sum(-1)
        ctx.save_for_backward(logprobs, tokens, entropy)
        ctx.set_materialize_grads(False)
        return logprobs.gather(-1, tokens[:, None])[:, 0], entropy

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        """∂ log p_x / ∂z = 1_x − p,  ∂H / ∂z = − p (log p + H)."""
        logprobs, tokens, entropy = ctx.saved_tensors
        of_logprob, of_entropy = slopes
        found = torch.zeros_like(entropy) if of_logprob is None else -of_logprob
        gradient = logprobs.exp()
        if of_entropy is None:
            gradient.mul_(found[:, None])
        else:
            gradient.mul_(found[:, None] - of_entropy[:, None] * (logprobs + entropy[:, None]))
        if of_logprob is not None:
            gradient.scatter_add_(-1, tokens[:, None], of_logprob[:, None])
        return gradient, None
