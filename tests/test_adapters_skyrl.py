"""SkyRL's batch gets the native advantages: the estimators alone, and SkyRL's own method where it is installed."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from adapter_rollouts import awkward_rollouts, dense_batch, native_advantages, of_two_numbers, padded_rollouts, shuffled
from turnwise.adapters.rows import WITHOUT_CRITIC
from turnwise.adapters.skyrl import PREFIX, estimate, given_options, refusals, register, turns_of
from turnwise.errors import ConfigError
from turnwise.types import Rollout

needs_skyrl = pytest.mark.skipif(importlib.util.find_spec("skyrl") is None, reason="SkyRL is not installed")
PROMPT = 6


class Batch(dict):
    """What SkyRL's TrainingInputBatch is to an estimator: tensors by name, and metadata."""

    metadata: dict[str, Any]

    def to(self, device: str) -> "Batch":
        return self


def training_batch(rollouts: list[Rollout], padding_rows: int) -> Batch:
    """Prompts and responses at the right end; padding rows are copies of the first that nothing is learned from."""
    dense, padded = dense_batch(rollouts), padded_rollouts(rollouts)
    width = dense.action.shape[1]
    rows = [*range(len(rollouts)), *[0] * padding_rows]
    ids, attention = np.zeros((len(rows), PROMPT + width), int), np.zeros((len(rows), PROMPT + width), int)
    response, loss = np.zeros((len(rows), width), int), np.zeros((len(rows), width), int)
    rewards = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        length, prompt = int(padded.present[row].sum()), padded.prompts[row]
        ids[i, -length:], ids[i, -length - len(prompt) : -length] = padded.ids[row, :length], prompt
        attention[i, -length - len(prompt) :] = 1
        response[i, -length:], rewards[i, -length:] = 1, dense.rewards[row, :length]
        if i < len(rollouts):
            loss[i, -length:] = dense.action[row, :length]
    batch = Batch(
        sequences=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(attention),
        response_mask=torch.from_numpy(response),
        loss_mask=torch.from_numpy(loss),
        rewards=torch.from_numpy(rewards),
        values=None,
    )
    uids = [*map(str, dense.groups), *(f"pad{i}" for i in range(padding_rows))]
    batch.metadata = {"uids": uids, "pad_size": padding_rows, "avg_response_length": 1.0}
    return batch


def sampled(batch: Batch, advantages: torch.Tensor, count: int) -> list[np.ndarray]:
    mask = batch["loss_mask"].numpy() > 0
    return [row[own] for row, own in zip(advantages.numpy()[:count], mask[:count], strict=True)]


def configuration(name: str, **options: Any) -> Any:
    algorithm = {"use_kl_in_reward": False, "zero_variance_filter": False, "policy_loss_type": "regular"}
    algorithm |= {"gamma": 1.0, "lambd": 1.0, "grpo_norm_by_std": True, "advantage_estimator": name}
    steps = {"step_wise_trajectories": options.pop("step_wise_trajectories", False)}
    return SimpleNamespace(
        trainer=SimpleNamespace(algorithm=SimpleNamespace(**algorithm | options)), generator=SimpleNamespace(**steps)
    )


@pytest.mark.parametrize("padding_rows", [0, 3])
@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_the_batch_gets_the_native_advantages(estimator: str, padding_rows: int):
    rollouts = [of_two_numbers(r) for r in shuffled(awkward_rollouts())]
    batch = training_batch(rollouts, padding_rows)
    response = batch["response_mask"]
    with turns_of(batch):
        found, _ = estimate(
            estimator, {}, token_level_rewards=batch["rewards"], response_mask=batch["response_mask"],
            index=batch.metadata["uids"], values=None, gamma=1.0, lambd=1.0, grpo_norm_by_std=True, config=None,
        )  # fmt: skip
    assert batch["response_mask"] is response
    assert not found[len(rollouts) :].any()
    for own, other in zip(sampled(batch, found, len(rollouts)), native_advantages(rollouts, estimator), strict=True):
        assert_allclose(own, other, rtol=1e-6, atol=1e-6)


def test_outside_our_trainer_it_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.override_entrypoint=turnwise\.adapters\.skyrl_trainer"):
        estimate("mt-grpo", {}, torch.zeros(1, 2), torch.ones(1, 2), ["a"])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"step_wise_trajectories": True}, "step_wise_trajectories must be False"),
        ({"use_kl_in_reward": True}, "use_kl_loss=True"),
        ({"zero_variance_filter": True}, "zero_variance_filter must be False"),
    ],
)
def test_what_would_distort_turn_credit_is_refused(option: dict[str, Any], said: str):
    assert refusals(configuration(f"{PREFIX}mt-grpo")) == []
    (refusal,) = refusals(configuration(f"{PREFIX}mt-grpo", **option))
    assert said in refusal
    assert refusals(configuration("grpo", **option)) == []


def test_names_and_options_are_checked():
    assert "turnwise/mt-grpo" in refusals(configuration(f"{PREFIX}mt-gpro"))[0]
    assert "beta" in refusals(configuration(f"{PREFIX}mt-grpo"), {"beta": 1})[0]
    assert given_options(["a.b=1", "turnwise.alpha=0.5", "turnwise.mode=x"]) == (["a.b=1"], {"alpha": 0.5, "mode": "x"})


@needs_skyrl
@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_skyrls_own_method_gives_the_native_advantages(estimator: str):
    from turnwise.adapters.skyrl_trainer import TurnTrainer

    assert f"{PREFIX}{estimator}" in register()
    rollouts = [of_two_numbers(r) for r in shuffled(awkward_rollouts())]
    batch = training_batch(rollouts, 2)
    trainer = TurnTrainer.__new__(TurnTrainer)
    trainer.cfg, trainer.all_metrics = configuration(f"{PREFIX}{estimator}"), {}
    trainer.compute_advantages_and_returns(batch)
    found = sampled(batch, batch["advantages"], len(rollouts))
    for own, other in zip(found, native_advantages(rollouts, estimator), strict=True):
        assert_allclose(own, other, rtol=1e-6, atol=1e-6)
    trainer.cfg.generator.step_wise_trajectories = True
    with pytest.raises(ConfigError, match="step_wise_trajectories"):
        trainer.compute_advantages_and_returns(batch)
