"""The count of an update's operations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from turnwise.batch import rollout_row
from turnwise.compute import multiplying_weights, update_flops
from turnwise.config import TrainConfig
from turnwise.critic import make_critic
from turnwise.learning import update
from turnwise.policy import Policy, tiny_policy
from turnwise.types import Action, Rollout, Turn

CONFIG = TrainConfig(minibatches=1, tasks_per_step=1)


@pytest.fixture
def policy(bpe_chat) -> Policy:
    return tiny_policy(bpe_chat, seed=1, hidden=16, layers=2)


def rollout(tokens: tuple[int, ...], prompt: tuple[int, ...] = tuple(range(20, 30))) -> Rollout:
    turn = Turn(action_ids=tokens, sampling_logprobs=(-1.0,) * len(tokens), text="", action=Action())
    return Rollout(task_id="q", group=0, prompt_ids=prompt, turns=(turn,), stop="answer")


def positions(policy: Policy, rollouts: list[Rollout], advantages: list[float], config: TrainConfig = CONFIG) -> float:
    rows = [(0, rollout_row(r, [a], [True])) for r, a in zip(rollouts, advantages, strict=True)]
    return update(policy, torch.optim.SGD(policy.learned, lr=0.0), rows, config, 0)["positions"]


def test_positions_are_those_that_are_computed(policy: Policy):
    long, short = rollout((1, 2, 3, 4)), rollout((5, 6))
    assert positions(policy, [long, short], [1.0, -1.0]) == 10 + 4 + 2  # one prompt, for both
    assert positions(policy, [long, short], [1.0, 0.0]) == 10 + 4  # without credit nothing is computed
    assert positions(policy, [long, long, short], [1.0, 1.0, -1.0]) == 10 + 4 + 2  # equal ones once
    assert positions(policy, [long, short], [1.0, -1.0], replace(CONFIG, passes=3)) == 3 * (10 + 4 + 2)
    other = rollout((5, 6), prompt=tuple(range(40, 47)))
    assert positions(policy, [long, other], [1.0, -1.0]) == 10 + 4 + 7 + 2


def test_operations_are_six_for_each_weight_and_position(policy: Policy):
    n = sum(p.numel() for p in policy.model.parameters())
    assert multiplying_weights(policy.model) == n  # the embedding is the output layer's matrix too
    assert update_flops(policy, None, 16.0, CONFIG, 0) == 6 * n * 16
    assert update_flops(policy, None, 16.0, replace(CONFIG, kl_coef=0.1), 0) == 8 * n * 16
    assert update_flops(policy, None, 16.0, replace(CONFIG, gradient_checkpointing=True), 0) == 8 * n * 16


def test_a_critic_adds_its_own(policy: Policy):
    n = sum(p.numel() for p in policy.model.parameters())
    warming = replace(CONFIG, estimator="mt-ppo", critic_warmup_steps=1)
    own, shared = make_critic(policy, "own"), make_critic(policy, "shared")
    assert update_flops(policy, own, 10.0, CONFIG, 5) == (6 + 6 + 2) * n * 10
    assert update_flops(policy, own, 10.0, replace(CONFIG, passes=2), 5) == (6 + 6 + 1) * n * 10
    assert update_flops(policy, shared, 10.0, CONFIG, 5) == (6 + 2) * n * 10
    assert update_flops(policy, own, 10.0, warming, 0) == (6 + 2) * n * 10
    assert update_flops(policy, shared, 10.0, warming, 0) == (2 + 2) * n * 10


def test_the_count_is_near_what_torch_counts(bpe_chat):
    """Its counter sees every multiplication, attention's and padding's too, and the output layer at sampled tokens."""
    policy = tiny_policy(bpe_chat, seed=1, hidden=64, layers=3)
    rng = np.random.default_rng(0)
    rollouts = [rollout(tuple(rng.integers(20, 300, 24).tolist())) for _ in range(4)]
    with FlopCounterMode(display=False) as counter:
        found = positions(policy, rollouts, [1.0, -1.0, 0.5, -0.5])
    assert found == 10 + 4 * 24
    assert update_flops(policy, None, found, CONFIG, 0) == pytest.approx(counter.get_total_flops(), rel=0.25)
