"""Logits in pieces: the same numbers, in less memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from turnwise import logits
from turnwise.logits import logprobs_of
from turnwise.memory import Live


def computed(weight: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies, and the gradients of a sum that has both."""
    weight, states = weight.clone().requires_grad_(), states.clone().requires_grad_()
    found, entropy = logprobs_of(
        lambda x: torch.nn.functional.linear(x, weight), states, tokens, temperature=0.7, vocabulary=len(weight)
    )
    loss = (found * torch.linspace(-1, 2, len(tokens))).sum() + 0.3 * (entropy**2).sum()
    return found.detach(), entropy.detach(), *torch.autograd.grad(loss, (weight, states))


def plain(weight: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same by torch's own softmax, all logits at once, in float64."""
    weight, states = weight.double().requires_grad_(), states.double().requires_grad_()
    logprobs = (states @ weight.T / 0.7).log_softmax(-1)
    found, entropy = logprobs[torch.arange(len(tokens)), tokens], -(logprobs.exp() * logprobs).sum(-1)
    loss = (found * torch.linspace(-1, 2, len(tokens))).sum() + 0.3 * (entropy**2).sum()
    return found.detach(), entropy.detach(), *torch.autograd.grad(loss, (weight, states))


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(50, 8), torch.randn(23, 8), torch.randint(0, 50, (23,))


@pytest.mark.parametrize("piece", [1, 50, 350, 22 * 50, 2**25])
def test_pieces_give_the_values_and_gradients_of_the_plain_way(monkeypatch: pytest.MonkeyPatch, piece: int):
    # 50 tokens in the vocabulary: pieces of 1, 1, 7 and 22 of the 23 tokens, and one piece
    monkeypatch.setattr(logits, "PIECE", piece)
    for found, expected in zip(computed(*drawn()), plain(*drawn()), strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("piece", [50, 2**25])
def test_the_slope_of_log_probabilities_alone_is_that_of_the_plain_way(monkeypatch: pytest.MonkeyPatch, piece: int):
    monkeypatch.setattr(logits, "PIECE", piece)
    weight, states, tokens = drawn()
    slopes, head = [], torch.nn.functional.linear
    for exact in (states.clone().requires_grad_(), states.double().requires_grad_()):
        if exact.dtype == torch.float32:
            found, _ = logprobs_of(lambda x: head(x, weight), exact, tokens, temperature=1.0, vocabulary=50)
        else:
            found = head(exact, weight.double()).log_softmax(-1)[torch.arange(23), tokens]
        slopes.append(torch.autograd.grad(found.sum(), exact)[0])
    assert (slopes[0] - slopes[1]).norm() <= 1e-6 * slopes[1].norm()


def test_logits_in_bfloat16_have_log_probabilities_in_float32():
    weight, states, tokens = (x.bfloat16() if x.is_floating_point() else x for x in drawn())
    found, entropy = logprobs_of(lambda x: x @ weight.T, states, tokens, temperature=1.0, vocabulary=50)
    assert found.dtype == entropy.dtype == torch.float32
    exact = (states @ weight.T).float().log_softmax(-1)
    assert_close(found, exact[torch.arange(23), tokens])


def test_16_000_tokens_of_a_vocabulary_of_150_000_fit(monkeypatch: pytest.MonkeyPatch):
    # 16,000 x 150,000 x 4 bytes are 8.9 GiB a tensor, of which one piece has three at once; counted on shapes
    peaks = {}
    for name, piece in (("pieces", logits.PIECE), ("one piece", 2**40)):
        monkeypatch.setattr(logits, "PIECE", piece)
        with FakeTensorMode(), Live() as live:
            weight, states = torch.empty(150_000, 64, requires_grad=True), torch.empty(16_000, 64, requires_grad=True)
            head = lambda x, weight=weight: torch.nn.functional.linear(x, weight)  # noqa: E731
            tokens = torch.empty(16_000, dtype=torch.int64)
            found, _ = logprobs_of(head, states, tokens, temperature=1.0, vocabulary=150_000)
            found.sum().backward()
        peaks[name] = live.most / 2**30
    assert peaks["pieces"] < 1 < 25 < peaks["one piece"]
