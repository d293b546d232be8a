"""SkyRL's estimators and trainer methods: the native advantages, and what is refused; SkyRL itself need not be there.

`StandIn` calls the registry as SkyRL's trainer does; test_adapters_skyrl_live runs the same with SkyRL's own.
"""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from adapter_rollouts import (
    awkward_rollouts,
    critic_values,
    dealt,
    native_advantages,
    of_two_numbers,
    padded_rollouts,
    shuffled,
)
from turnwise.adapters.dense import OFFERED, PREFIX
from turnwise.adapters.rows import WITH_CRITIC, dense_scores
from turnwise.adapters.skyrl import TurnCredit, check, estimate, refusals, register
from turnwise.errors import ConfigError, InputError
from turnwise.types import Rollout


def configuration(estimator: str, **algorithm: Any) -> Any:
    """What the adapter reads of SkyRL's configuration."""
    return SimpleNamespace(
        trainer=SimpleNamespace(
            algorithm=SimpleNamespace(advantage_estimator=PREFIX + estimator, **algorithm),
            critic=SimpleNamespace(model=SimpleNamespace(path="critic" if estimator in WITH_CRITIC else None)),
        ),
        generator=SimpleNamespace(),
    )


class StandIn:
    """SkyRL's trainer as the adapter meets it: what it calls an estimator with, and where the answer goes."""

    def __init__(self, cfg: Any) -> None:
        self.cfg, self.all_metrics = cfg, {}

    def postprocess_generator_output(self, generator_output: Any, uids: Any) -> Any:
        return generator_output, uids

    def compute_advantages_and_returns(self, data: dict[str, Any]) -> dict[str, Any]:
        algorithm = self.cfg.trainer.algorithm
        found = estimate(
            algorithm.advantage_estimator.removeprefix(PREFIX),
            token_level_rewards=data["rewards"],
            response_mask=data["response_mask"],
            index=data["uids"],
            values=data["values"],
            grpo_norm_by_std=True,
            gamma=1.0,
            lambd=1.0,
            config=algorithm,
        )
        return {**data, "advantages": found[0], "returns": found[1]}


class Trainer(TurnCredit, StandIn):
    """The stand-in with turn credit."""


def generated(rollouts: list[Rollout], *, at_end: bool = False) -> dict[str, Any]:
    """The rollouts as SkyRL's generator has them: each turn's reward on its last token, as a step's is.

    `at_end`: the outcome on the last token of all, the environment's or not.
    """
    found: dict[str, list[Any]] = {"prompt_token_ids": [], "response_ids": [], "rewards": [], "loss_masks": []}
    for rollout in rollouts:
        ids = [i for turn in rollout.turns for i in (*turn.action_ids, *turn.reply_ids)]
        mask = [m for turn in rollout.turns for m in [1] * len(turn.action_ids) + [0] * len(turn.reply_ids)]
        outcome = sum(rollout.outcome_rewards.values())
        turns = [sum(turn.values()) for turn in rollout.turn_rewards]
        rewards = dense_scores(mask, turns, 0.0 if at_end else outcome)
        rewards[-1] += outcome if at_end else 0.0
        found["prompt_token_ids"].append(list(rollout.prompt_ids))
        found["response_ids"].append(ids)
        found["rewards"].append(rewards.tolist())
        found["loss_masks"].append(mask)
    return found


def training_batch(rollouts: list[Rollout], estimator: str, *, padding_rows: int = 0, at_end: bool = False) -> Any:
    """SkyRL's tensors: whole sequences padded left, and what is of responses right-aligned."""
    batch = padded_rollouts(rollouts, left=True)
    output = generated(rollouts, at_end=at_end)
    rewards = np.zeros(batch.action.shape, np.float32)
    for row, own in zip(rewards, output["rewards"], strict=True):
        row[len(row) - len(own) :] = own
    whole = [p + r for p, r in zip(output["prompt_token_ids"], output["response_ids"], strict=True)]
    width = max(map(len, whole)) + batch.action.shape[1]
    values = None
    if estimator in WITH_CRITIC:
        values = np.zeros(batch.action.shape, np.float32)
        for row, mask, own in zip(values, batch.action, critic_values(rollouts, estimator)[0], strict=True):
            row[mask > 0] = own[:, 0]
    data = {
        "sequences": torch.tensor([[0] * (width - len(ids)) + ids for ids in whole]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in whole]),
        "response_mask": torch.from_numpy(batch.present),
        "loss_mask": torch.from_numpy(batch.action).float(),
        "rewards": torch.from_numpy(rewards),
        "values": None if values is None else torch.from_numpy(values),
    }
    padded = {  # as SkyRL pads: copies of the first row, which are masked out
        name: x if x is None else torch.cat([x, x[[0] * padding_rows] * (name != "loss_mask")])
        for name, x in data.items()
    }
    return {**padded, "uids": batch.groups + [f"pad{i}" for i in range(padding_rows)]}


def sampled(data: Any, count: int) -> list[np.ndarray]:
    """Each rollout's advantages at its sampled tokens; all others must be 0."""
    found, mask = data["advantages"].numpy(), data["loss_mask"].numpy() > 0
    assert_array_equal(found[~mask], 0.0)
    return [row[own] for row, own in zip(found, mask, strict=True)][:count]


def assert_alike(found: Any, expected: Any) -> None:
    for own, other in zip(found, expected, strict=True):
        assert_allclose(own, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [{}, {"padding_rows": 3}, {"at_end": True}])
@pytest.mark.parametrize("estimator", OFFERED)
def test_skyrls_batch_gets_the_native_advantages(estimator: str, layout: dict[str, Any]):
    """Dealt over workers, so that no group stands together; cut-off rollouts, groups of one, unequal turns."""
    step = [of_two_numbers(r) for part in dealt(shuffled(awkward_rollouts())) for r in part]
    if estimator in WITH_CRITIC:  # SkyRL's critic has no value of the state after a rollout
        step = [dataclasses.replace(r, stop="answer") for r in step]
    trainer = Trainer(configuration(estimator))
    data = trainer.compute_advantages_and_returns(training_batch(step, estimator, **layout))
    expected = native_advantages(step, estimator)
    assert np.ptp(np.concatenate(expected)) > 0.1
    assert_alike(sampled(data, len(step)), expected)
    assert data["advantages"].dtype == torch.float32
    assert trainer.all_metrics["turn_credit/turns"] == pytest.approx(np.mean([len(r.turns) for r in step]))


def test_skyrls_own_mask_is_refused_as_it_hides_the_turns():
    step = [of_two_numbers(r) for r in awkward_rollouts()]
    stock = StandIn(configuration("mt-grpo"))
    with pytest.raises(ConfigError, match=r"every rollout would be one turn; take trainer\.override_entrypoint="):
        stock.compute_advantages_and_returns(training_batch(step, "mt-grpo"))


def test_targets_of_the_critic_are_the_returns():
    # γ = λ = 1: rewards to go, ½ + 1 in turn 1 and 1 in turn 2; where nothing was sampled, its own value.
    data = {
        "rewards": torch.tensor([[0.0, 0.5, 0.0, 1.0]]),
        "response_mask": torch.ones(1, 4),
        "loss_mask": torch.tensor([[1.0, 1.0, 0.0, 1.0]]),
        "values": torch.full((1, 4), 0.25),
        "uids": ["a"],
    }
    found = Trainer(configuration("mt-ppo")).compute_advantages_and_returns(data)
    assert_allclose(found["returns"].numpy(), [[1.5, 1.5, 0.25, 1.0]], atol=1e-6)


def test_options_come_from_the_configuration_and_a_line_goes_to_the_log(tmp_path: Path):
    step = [of_two_numbers(r) for r in awkward_rollouts()]
    log = tmp_path / "turns.jsonl"
    trainer = Trainer(configuration("mt-grpo", turnwise={"alpha": 0.5, "log": str(log)}))
    data = trainer.compute_advantages_and_returns(training_batch(step, "mt-grpo"))
    assert_alike(sampled(data, len(step)), native_advantages(step, "mt-grpo", alpha=0.5))
    assert json.loads(log.read_text())["rows"] == len(step)


def test_an_estimator_of_skyrls_is_left_alone():
    class Plain:
        def __init__(self, cfg: Any) -> None:
            self.cfg = cfg

        def compute_advantages_and_returns(self, data: Any) -> Any:
            return ("untouched", data)

        def postprocess_generator_output(self, output: Any, uids: Any) -> Any:
            return output, uids

    class Mixed(TurnCredit, Plain): ...

    cfg = configuration("x", use_kl_in_reward=True, dynamic_sampling=SimpleNamespace(type="filter"))
    cfg.trainer.algorithm.advantage_estimator = "grpo"
    trainer = Mixed(cfg)
    assert trainer.compute_advantages_and_returns(1) == ("untouched", 1)
    assert trainer.postprocess_generator_output({"rewards": [1.0]}, ["a"]) == ({"rewards": [1.0]}, ["a"])


# ------------------------------------------------------------------------------------------- what is refused


def test_one_number_per_rollout_is_refused_where_credit_is_by_turn():
    output = {"rewards": [[0.0, 1.0], 1.0]}
    with pytest.raises(InputError, match=r"one number per token; got 1\.0, the rollout's sum"):
        Trainer(configuration("mt-grpo")).postprocess_generator_output(output, ["a", "a"])
    assert Trainer(configuration("grpo-mr")).postprocess_generator_output(output, ["a", "a"])[0] == output


BY_TURN = [
    ("generator", {"batched": True}, "plays one turn"),
    ("generator", {"zero_reward_on_non_stop": True}, "would lose what its turns before had earned"),
    ("generator", {"chat_template": {"name_or_path": "qwen3"}}, "keeps the last turn's reward alone"),
    ("algorithm", {"advantage_batch_normalize": True}, "turns without credit get some"),
    ("algorithm", {"dynamic_sampling": {"type": "filter"}}, "equal sums, though their turns differ"),
    ("algorithm", {"zero_variance_filter": True}, "equal sums, though their turns differ"),
    ("algorithm", {"off_policy_correction": {"tis_ratio_type": "sequence"}}, "tis_ratio_type must be 'token'"),
]
ALWAYS = [
    ("algorithm", {"use_kl_in_reward": True}, "use_kl_loss=true"),
    ("generator", {"step_wise_trajectories": True}, "shown the last steps alone"),
    ("algorithm", {"turnwise": {"beta": 1}}, "got 'beta'"),
]


@pytest.mark.parametrize(("node", "change", "said"), BY_TURN + ALWAYS)
def test_what_would_delete_or_distort_turn_credit_is_refused(node: str, change: dict[str, Any], said: str):
    for estimator, refused in (("mt-grpo", True), ("grpo-mr", (node, change, said) in ALWAYS)):
        algorithm = {"advantage_estimator": PREFIX + estimator, **(change if node == "algorithm" else {})}
        cfg = {"trainer": {"algorithm": algorithm}, "generator": change if node == "generator" else {}}
        found = refusals(cfg)
        assert len(found) == refused, (estimator, found)
        assert not refused or said in found[0]
        if refused:
            with pytest.raises(ConfigError, match=r"must|which are"):
                check(cfg)
            with pytest.raises(ConfigError, match=r"must|which are"):
                Trainer(cfg)


def test_a_name_or_a_critic_that_is_not_there_is_refused():
    said = refusals({"trainer": {"algorithm": {"advantage_estimator": "turnwise/mt-grop"}}})
    assert "must be one of" in said[0]
    assert said[0].endswith("got turnwise/mt-grop")
    cfg = configuration("mt-ppo")
    assert refusals(cfg) == []
    cfg.trainer.critic.model.path = None
    assert "set trainer.critic.model.path" in refusals(cfg)[0]


# --------------------------------------------------------------------------------------------- the registry


def test_the_estimators_are_registered_once_and_without_torch(monkeypatch: pytest.MonkeyPatch):
    functions: dict[str, Any] = {}

    class AdvantageEstimatorRegistry:
        @staticmethod
        def list_available() -> list[str]:
            return list(functions)

        @staticmethod
        def register(name: str, function: Any) -> None:
            assert name not in functions
            functions[name] = function

    for name in ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    module = SimpleNamespace(AdvantageEstimatorRegistry=AdvantageEstimatorRegistry)
    monkeypatch.setitem(sys.modules, "skyrl.backends.skyrl_train.utils.ppo_utils", module)
    assert register() == register() == tuple(functions) == tuple(PREFIX + name for name in OFFERED)


def test_the_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import importlib.metadata

    from turnwise.adapters import skyrl_checks
    from turnwise.cli import main

    def without(name: str) -> str:
        if name == "skyrl":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert main(["doctor", "skyrl"]) == 1
    assert capsys.readouterr().out == (
        'FAILED  skyrl is not installed\nto mend it:  pip install "skyrl[skyrl-train]>=0.3,<0.5"\n'
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    assert skyrl_checks.releases().fix == 'pip install "skyrl>=0.3,<0.5"'
