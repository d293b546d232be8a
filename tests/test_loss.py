"""The clipped loss: numbers a reader can redo, and the gradient it stands for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from turnwise.loss import clipped_surrogate, policy_loss, reference_kl, segment_ratio, value_loss

logprob = st.floats(-20, 0, width=32)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.5, 2.0, 1.2 * 2, 0.0),  # better than before and rewarded: held at 1 + 0.2
        (1.5, -2.0, 1.5 * -2, -2.0),  # likelier though punished: the full loss counts
        (0.5, 2.0, 0.5 * 2, 2.0),  # rarer though rewarded: the full gain counts
        (0.5, -2.0, 0.7 * -2, 0.0),  # rarer and punished: held at 1 − 0.3
        (1.1, 2.0, 1.1 * 2, 2.0),  # within the bounds
        (0.9, -2.0, 0.9 * -2, -2.0),
    ],
)
def test_the_clip_holds_only_what_has_gone_far_enough(ratio, advantage, objective, slope):
    x = torch.tensor([ratio], requires_grad=True)
    value = clipped_surrogate(x, t(advantage), clip_low=0.3, clip_high=0.2)
    value.sum().backward()
    assert_close(value.detach(), t(objective))
    assert_close(x.grad, t(slope))


def test_the_loss_and_its_parts():
    # ratios 2 and ½, advantages 1 and 1, weights ¼ and ¾, clip 0.2:
    #   loss = −(¼ · 1.2 + ¾ · ½) = −0.675;   the first token is held: ¼
    #   shift: x − ln x − 1 at 2 and ½: 2 − ln 2 − 1 and ½ + ln 2 − 1
    log2 = math.log(2)
    parts = policy_loss(t(log2 - 1, -log2 - 1), t(-1.0, -1.0), t(1.0, 1.0), t(0.25, 0.75))
    assert_close(parts.loss, torch.tensor(-0.675))
    assert_close(parts.clipped, torch.tensor(0.25))
    assert_close(parts.shift, torch.tensor(0.25 * (1 - log2) + 0.75 * (log2 - 0.5)))
    assert parts.kl == 0


def test_the_kl_term_is_added_with_its_coefficient():
    # policy −1, reference −1 + ln 2: 2 − ln 2 − 1 nats; without advantages the loss is the KL term alone
    log2 = math.log(2)
    parts = policy_loss(t(-1.0), t(-1.0), t(0.0), t(1.0), ref_logprobs=t(-1 + log2), kl_coef=0.1)
    assert_close(parts.kl, torch.tensor(1 - log2))
    assert_close(parts.loss, torch.tensor(0.1 * (1 - log2)))


@given(st.lists(st.tuples(logprob, logprob), min_size=1, max_size=8))
def test_the_kl_estimate_is_never_negative_and_zero_at_equality(pairs):
    policy, ref = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    assert (reference_kl(policy, ref) >= 0).all()
    assert (reference_kl(policy, policy) == 0).all()


def test_the_kl_estimate_is_unbiased_and_so_is_its_direction():
    # Σ π (r − ln r − 1) with r = ref/π is KL(π‖ref)
    policy, ref = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    expected = (policy.exp() * (policy - ref)).sum()
    assert_close((policy.exp() * reference_kl(policy, ref)).sum(), expected)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    # autograd of the loss = −Σ w A ∇ log π, here by a finite sum over a softmax's logits
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([0, 3, 6, 2, 2])
    advantages = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    policy_loss(logprobs, logprobs.detach(), advantages, weights).loss.backward()
    one_hot = torch.nn.functional.one_hot(chosen, 7)
    scores = one_hot - logits.detach().softmax(-1)  # ∂ log π(chosen) / ∂ logits
    assert_close(logits.grad, -(weights * advantages)[:, None] * scores)


def test_the_value_loss_and_its_parts():
    # Old value 1, clip ½, weights ¼ each:
    #   V = 1.2, R = 3: within the clip, ½ · 1.8²
    #   V = 2,   R = 3: gone further than ½ towards its target: held at 1.5, ½ · 1.5², no slope
    #   V = 2,   R = 0: gone further away from it: counted in full, ½ · 2²
    #   V = 0,   R = 3: the same below: ½ · 3²
    values = t(1.2, 2.0, 2.0, 0.0).requires_grad_()
    parts = value_loss(values, t(1.0, 1.0, 1.0, 1.0), t(3.0, 3.0, 0.0, 3.0), t(0.25, 0.25, 0.25, 0.25), clip=0.5)
    parts.loss.backward()
    assert_close(parts.loss.detach(), torch.tensor((1.8**2 + 1.5**2 + 2**2 + 3**2) / 8))
    assert_close(parts.clipped, torch.tensor(0.25))
    assert_close(values.grad, t(-1.8 / 4, 0.0, 2 / 4, -3 / 4))


# ------------------------------------------------------------------------------ ratios of segments


def test_a_segments_ratio_is_the_geometric_mean_of_its_tokens():
    # segment 7: shifts ln 2 and ln 8, mean ln 4; segment 3: ln ½
    found = segment_ratio(t(math.log(2), math.log(0.5), math.log(8)), torch.tensor([7, 3, 7]))
    assert_close(found, t(4.0, 0.5, 4.0))


def test_one_token_segments_are_token_ratios():
    policy, sampling = t(-1.0, -2.0, -0.5), t(-1.5, -1.0, -0.7)
    advantages, weights = t(1.0, -2.0, 0.5), t(0.2, 0.3, 0.5)
    usual = policy_loss(policy, sampling, advantages, weights)
    alone = policy_loss(policy, sampling, advantages, weights, segments=torch.arange(3))
    together = policy_loss(policy, sampling, advantages, weights, segments=torch.zeros(3, dtype=torch.int64))
    assert_close(alone.loss, usual.loss)
    assert (together.loss - usual.loss).abs() > 0.01


def gradient_at_one(segments: torch.Tensor | None) -> torch.Tensor:
    """The loss's slope in four tokens' log-probabilities, on policy; two turns of advantages 1 and −1."""
    policy = torch.tensor([-1.0, -2.0, -0.5, -0.1], requires_grad=True)
    weights = torch.full((4,), 0.25)
    policy_loss(policy, policy.detach(), t(1, 1, -1, -1), weights, segments=segments).loss.backward()
    assert policy.grad is not None
    return policy.grad


def test_on_policy_turn_ratios_have_the_gradient_of_token_ratios():  # identity 34
    by_token, by_turn = gradient_at_one(None), gradient_at_one(torch.tensor([0, 0, 1, 1]))
    assert_close(by_token, t(-0.25, -0.25, 0.25, 0.25))
    assert_close(by_turn, by_token)


def test_off_policy_turn_ratios_have_another_gradient():  # identity 34, broken
    # shifts ln 1.1 and -ln 1.1 in one turn: its ratio is 1, its tokens' are 1.1 and 1/1.1
    shift = math.log(1.1)
    slopes = []
    for segments in (None, torch.tensor([0, 0])):
        policy = torch.tensor([-1.0, -2.0], requires_grad=True)
        sampling = policy.detach() - t(shift, -shift)
        policy_loss(policy, sampling, t(1, 1), t(0.5, 0.5), segments=segments).loss.backward()
        slopes.append(policy.grad)
    assert_close(slopes[0], t(-0.5 * 1.1, -0.5 / 1.1))
    assert_close(slopes[1], t(-0.5, -0.5))


def test_a_sequence_ratio_deletes_turn_credit():  # identity 34, broken: turns of different advantages
    # the two turns' advantages cancel in the sum, which is all that the shared ratio lets through
    assert_close(gradient_at_one(torch.zeros(4, dtype=torch.int64)), torch.zeros(4))
