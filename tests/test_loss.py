"""The clipped loss: numbers a reader can redo, and the gradient it stands for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from turnwise.loss import clipped_surrogate, policy_loss, reference_kl, rollout_mean_weights, segment_ratio

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


def test_weights_are_the_mean_over_rollouts_of_each_ones_token_mean():
    # 4 rollouts in the step, two of them here with 1 and 3 trained tokens: ¼ · 1 and ¼ · ⅓; none trained: 0
    mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    expected = torch.tensor([[1 / 4, 0, 0], [1 / 12, 1 / 12, 1 / 12], [0, 0, 0]])
    assert_close(rollout_mean_weights(mask, 4), expected)


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


def test_a_sequence_ratio_deletes_turn_credit():
    # the two turns' advantages cancel in the sum, which is all that the shared ratio lets through
    assert_close(gradient_at_one(torch.zeros(4, dtype=torch.int64)), torch.zeros(4))


def test_a_turn_that_two_rollouts_share_weighs_as_much_as_each_of_their_own():
    # Two rollouts of 2 shared and 2 own tokens: shares ½ ½ 1 1, which sum to 3, so 1/6 and 1/3, over 2 rollouts.
    # Third rollout: 1 token, 1/3. Per turn: shared 2·2·(1/6)/3... each token of the shared turn 2 · 1/18 = 1/9.
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    share = torch.tensor([[0.5, 0.5, 1, 1], [0.5, 0.5, 1, 1], [1, 0, 0, 0]])
    weights = rollout_mean_weights(mask, 3, share)
    torch.testing.assert_close(weights[0], torch.tensor([1 / 18, 1 / 18, 1 / 9, 1 / 9]))
    torch.testing.assert_close(weights[2], torch.tensor([1 / 3, 0, 0, 0]))
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_shares_of_one_change_nothing_and_a_row_without_trained_tokens_weighs_nothing():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    assert torch.equal(rollout_mean_weights(mask, 3, torch.ones(3, 3)), rollout_mean_weights(mask, 3))
    assert not rollout_mean_weights(mask, 3, torch.zeros(3, 3)).any()
