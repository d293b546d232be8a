"""Log-probabilities of tokens out of hidden states, in pieces: all logits at once are the largest tensor of an update.

With a vocabulary of 150,000, the logits of 16,000 tokens are 9 GiB, and their softmax, its gradient and the like as
much each. Pieces are computed one after the other, and again in the backward pass, so that one piece's are there at a
time.
"""

from collections.abc import Callable

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
    logprobs = (head(states).float() / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy
