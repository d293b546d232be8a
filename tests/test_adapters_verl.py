"""verl's estimators over dense rewards: the native advantages, and what is refused; verl itself need not be there."""

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
    dense_batch,
    native_advantages,
    of_two_numbers,
    shuffled,
)
from turnwise.adapters.dense import OFFERED, PREFIX, Beside, beside
from turnwise.adapters.rows import TREES, WITH_CRITIC, WITHOUT_CRITIC, dense_rewards, dense_scores, observation_anchors
from turnwise.adapters.verl import estimate, loop_refusals, refusals
from turnwise.config import TRAINABLE
from turnwise.credit import NEEDS
from turnwise.errors import ConfigError, InputError
from turnwise.types import Rollout

ALONE = tuple(name for name in WITHOUT_CRITIC if "anchor" not in NEEDS.get(name, ()))
"""What needs nothing but verl's own arguments."""


def through_estimate(rollouts: list[Rollout], estimator: str, given: Beside | None = None, **layout: Any) -> Any:
    """Each rollout's advantages at its sampled tokens, from verl's estimator."""
    batch = dense_batch(rollouts, **layout)
    with beside(given or Beside()):
        found, returns = estimate(
            estimator,
            token_level_rewards=torch.from_numpy(batch.rewards),
            response_mask=torch.from_numpy(batch.action),
            index=np.array(batch.groups, dtype=object),
        )
    assert found.shape == returns.shape == batch.action.shape
    assert found.dtype == torch.float32
    assert_array_equal(found.numpy()[batch.action == 0], 0.0)
    return [row[own > 0] for row, own in zip(found.numpy(), batch.action, strict=True)][: len(rollouts)]


def assert_alike(found: Any, expected: Any) -> None:
    for own, other in zip(found, expected, strict=True):
        assert_allclose(own, other, rtol=1e-6, atol=1e-6)


def test_every_estimator_is_in_the_registry_or_said_not_to_fit():
    assert {*OFFERED, "vetta", "vineppo", *TREES} == {*WITHOUT_CRITIC, *WITH_CRITIC, *TREES}


@pytest.mark.parametrize("layout", [{}, {"padding_rows": 3}, {"at_end": True}])
@pytest.mark.parametrize("estimator", ALONE)
def test_dense_rewards_get_the_native_advantages(estimator: str, layout: dict[str, Any]):
    rollouts = [of_two_numbers(r) for r in shuffled(awkward_rollouts())]
    expected = native_advantages(rollouts, estimator)
    assert np.ptp(np.concatenate(expected)) > 0.1
    assert_alike(through_estimate(rollouts, estimator, **layout), expected)


@pytest.mark.parametrize("estimator", ALONE)
def test_a_group_whose_rows_come_from_several_workers_is_one_group(estimator: str):
    """verl credits on the driver, over the whole batch: workers of agent loops deal rows, ranks split later."""
    rollouts = [r for part in dealt([of_two_numbers(r) for r in awkward_rollouts()], 3) for r in part]
    assert_alike(through_estimate(rollouts, estimator), native_advantages(rollouts, estimator))


def beside_of(rollouts: list[Rollout], estimator: str, *, critic: bool = False) -> Beside:
    """What the trainer of `verl_trainer` finds beside rewards and mask."""
    from adapter_rollouts import padded_rollouts
    from turnwise.adapters.rows import batch_turn_ids

    batch = padded_rollouts(rollouts)
    turn_ids = batch_turn_ids(batch.action)
    given = Beside(
        turn_ids=[row.tolist() for row in turn_ids],
        turn_rewards=[list(turns) for turns in batch.turn_rewards],
        outcome_rewards=list(batch.outcome_rewards),
        anchors=observation_anchors(turn_ids, batch.ids, batch.present, batch.prompts),
    )
    if critic:
        given.values = np.zeros(turn_ids.shape)
        for i, own in enumerate(critic_values(rollouts, estimator)[0]):
            given.values[i, turn_ids[i] >= 0] = own[:, 0]
    return given


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_with_rewards_by_name_all_are_native(estimator: str):
    rollouts = [r for part in dealt(shuffled(awkward_rollouts(), 2)) for r in part]
    given = beside_of(rollouts, estimator)
    assert_alike(through_estimate(rollouts, estimator, given), native_advantages(rollouts, estimator))
    assert given.metrics["turns"] == pytest.approx(np.mean([len(r.turns) for r in rollouts]))


@pytest.mark.parametrize("estimator", [name for name in WITH_CRITIC if name in OFFERED and name in TRAINABLE])
def test_with_values_critic_methods_are_native_but_for_the_bootstrap(estimator: str):
    # verl's critic has no value of the state after a rollout: one that was cut off ends like any other.
    rollouts = [dataclasses.replace(r, stop="answer") for r in shuffled(awkward_rollouts(), 3)]
    given = beside_of(rollouts, estimator, critic=True)
    assert_alike(through_estimate(rollouts, estimator, given), native_advantages(rollouts, estimator))


def test_turns_that_touch_are_parted_where_the_agent_loop_recorded_them():
    mask, rewards = torch.ones(2, 3), torch.zeros(2, 3)
    given = Beside(
        turn_ids=[[0, 0, 1]] * 2,
        turn_rewards=[[{"tool": x}, {}] for x in (1.0, 0.0)],
        outcome_rewards=[{"exact": 1.0}] * 2,
    )
    with beside(given):
        found, _ = estimate("mt-grpo", rewards, mask, index=["a", "a"])
    z = 0.5 / (np.sqrt(0.5) + 1e-4)
    assert_allclose(found.numpy(), [[z, z, 0], [-z, -z, 0]], atol=1e-6)


def test_targets_of_a_critic_are_returns_where_there_are_any():
    rewards = torch.tensor([[0.0, 0.5, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1]])
    with beside(Beside(values=np.full((2, 4), 0.25))):
        _, returns = estimate("mt-ppo", rewards, mask, index=["a", "a"])
        _, starts = estimate(
            "turn-ppo", rewards, mask, index=["a", "a"], config={"turnwise": {"gamma": 1.0, "lam": 1.0}}
        )
    assert_allclose(returns[0].numpy(), [1.5, 1.5, 0.25, 1.0], atol=1e-6)
    # Turn by turn: targets at the first tokens; elsewhere the value itself, from which nothing is learnt.
    assert_allclose(starts[0].numpy(), [1.5, 0.25, 0.25, 1.0], atol=1e-6)


def test_options_come_from_the_configuration_and_a_line_goes_to_the_log(tmp_path: Path):
    rollouts = [of_two_numbers(r) for r in awkward_rollouts()]
    batch = dense_batch(rollouts)
    config = {"turnwise": {"alpha": 0.5, "log": str(tmp_path / "turns.jsonl")}}
    found, _ = estimate(
        "mt-grpo", torch.from_numpy(batch.rewards), torch.from_numpy(batch.action), config, batch.groups, more=1
    )
    own = [row[mask > 0] for row, mask in zip(found.numpy(), batch.action, strict=True)]
    assert_alike(own, native_advantages(rollouts, "mt-grpo", alpha=0.5))
    line = json.loads((tmp_path / "turns.jsonl").read_text())
    assert line["rows"] == len(rollouts)
    assert line["reward/reward"] == pytest.approx(
        sum(sum(t.values()) for r in rollouts for t in r.turn_rewards) / len(rollouts)
    )
    assert 0 < line["seconds"] < 5


def test_dense_scores_lie_on_the_last_token_of_each_turn():
    mask = [1, 1, 0, 0, 1, 0]
    scores = dense_scores(mask, [0.25], 1.0)
    assert_array_equal(scores, [0.0, 0.25, 0.0, 0.0, 1.0, 0.0])
    assert_array_equal(dense_scores(mask, [0.25, 0.5], 1.0), [0.0, 0.25, 0.0, 0.0, 1.5, 0.0])
    assert_array_equal(dense_scores([0, 0], [], 1.0), [0.0, 0.0])
    turns, outcomes = dense_rewards(np.array([[0, 0, -1, -1, 1, -1]]), scores[None].astype(float))
    assert (turns, outcomes) == ([[{"reward": 0.25}, {}]], [{"outcome": 1.0}])
    with pytest.raises(InputError, match=r"at most one turn reward per turn of the mask \(2\); got 3"):
        dense_scores(mask, [1.0, 1.0, 1.0], 0.0)


@pytest.mark.parametrize(
    ("estimator", "config", "said"),
    [
        ("mt-grpo", {"use_kl_in_reward": True}, "actor.use_kl_loss=True"),
        ("mt-grpo", {"turnwise": {"beta": 1}}, "which are alpha, ddof, eps; got 'beta'"),
        ("mt-grpo", {"rollout_correction": {"rollout_rs": "token_k1"}}, "holes in the mask"),
        ("mt-grpo", {"rollout_correction": {"rollout_is": "sequence"}}, "rollout_is must be 'token'"),
        ("mt-ppo", {}, "algorithm.adv_estimator=gae with our agent loop is the same method"),
        ("gigpo", {}, "hands its estimators no tokens; take trainer.v1.trainer_mode=turnwise"),
    ],
)
def test_what_would_distort_turn_credit_is_refused(estimator: str, config: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        estimate(estimator, torch.zeros(2, 3), torch.ones(2, 3), config, ["a", "a"])


def test_a_sequence_weight_may_stay_where_a_rollout_has_one_number():
    assert refusals({"rollout_correction": {"rollout_is": "sequence"}}, "grpo-mr") == []


def test_rows_without_a_group_are_refused():
    with pytest.raises(InputError, match="must have `uid`"):
        estimate("mt-grpo", torch.zeros(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainer": {"use_v1": False}}, "the old trainer keeps one number per rollout"),
        ({"actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "gspo"}}}}, "got 'gspo': one ratio"),
        ({"reward": {"reward_model": {"enable": True}}}, "resource pool of its own"),
        ({"algorithm": {"adv_estimator": "turnwise/mt-grop"}}, "turnwise/mt-grpo, "),
        ({"algorithm": {"adv_estimator": "turnwise/mt-ppo"}}, "the critic's values"),
    ],
)
def test_a_whole_configuration_is_looked_at_before_a_rollout_starts(change: dict[str, Any], said: str):
    config = {"algorithm": {"adv_estimator": "turnwise/mt-grpo"}, **change}
    assert any(said in refusal for refusal in loop_refusals(config))
    assert loop_refusals({"algorithm": {"adv_estimator": "turnwise/mt-grpo"}}) == []
    assert loop_refusals({"algorithm": {"adv_estimator": "gae"}}) == []
    for v1 in ({"trainer_mode": "turnwise"}, {"trainer_mode": "sync", "turnwise": True}):
        by_trainer = {"trainer": {"v1": v1}, "critic": {"enable": True}}
        assert loop_refusals({"algorithm": {"adv_estimator": "turnwise/mt-ppo"}, **by_trainer}) == []


def test_the_plugin_registers_once_and_needs_no_torch(monkeypatch: pytest.MonkeyPatch):
    registry: dict[str, Any] = {}

    def register_adv_est(name: str) -> Any:
        assert name not in registry
        return lambda function: registry.setdefault(name, function)

    core = SimpleNamespace(ADV_ESTIMATOR_REGISTRY=registry, register_adv_est=register_adv_est)
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", core)
    from turnwise.adapters.verl import register

    assert register() == register()
    assert set(registry) == {PREFIX + name for name in OFFERED}


def test_importing_the_adapter_is_light():
    import subprocess

    code = (
        "import turnwise.adapters.verl, sys; print([n for n in ('torch', 'verl', 'ray', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_rows_of_the_dataset_name_their_task():
    from turnwise.adapters.verl_data import task_row
    from turnwise.types import Task

    row = task_row(Task(id="a", question="What is the capital of Kenya?", answers=("Nairobi",)), 7)
    assert row["prompt"] == [{"role": "user", "content": "What is the capital of Kenya?"}]
    assert row["extra_info"] == {"index": 7, "task": "a"}
    assert row["agent_name"] == "turnwise/environment"


# --------------------------------------------------------------------------------------------- the doctor


def test_the_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import importlib.metadata

    from turnwise.cli import main

    def without(name: str) -> str:
        if name in ("TransferQueue", "verl"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert main(["doctor", "verl"]) == 1
    assert (
        capsys.readouterr().out == 'FAILED  TransferQueue is not installed\nto mend it:  pip install "turnwise[verl]"\n'
    )


def test_a_release_or_an_entry_point_that_is_not_there_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    import importlib.metadata

    from turnwise.adapters import verl_checks

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.0")
    assert verl_checks.releases().fix == 'pip install "verl>=0.9,<0.10"'
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    assert "no entry point" in verl_checks.entry_point().what
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    assert "unset VERL_USE_EXTERNAL_PLUGINS" in (verl_checks.entry_point().fix or "")
