"""SkyRL's own code with turn credit: its generator over a gym environment, its trainer's methods, losses, registry.

Methods on a CPU: no model is trained, no engine draws. Runs where SkyRL is installed (make test-skyrl).
"""

import asyncio
import dataclasses
import sys
import typing
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("skyrl")
    import typing_extensions

    if sys.version_info < (3, 12):  # SkyRL's pydantic models of typed dictionaries want it so
        typing.TypedDict = typing_extensions.TypedDict
    import skyrl_gym
    import torch
    from loguru import logger
    from skyrl.backends.skyrl_train.training_batch import pad_training_input_batch
    from skyrl.backends.skyrl_train.utils import ppo_utils
    from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
    from skyrl.train.trainer import RayPPOTrainer
    from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
    from transformers import AutoTokenizer

    from turnwise.adapters.skyrl_checks import CHECKS, bare_trainer
    from turnwise.adapters.skyrl_trainer import OVERRIDE, TurnExp, TurnPPOTrainer, configured

from adapter_rollouts import awkward_rollouts, critic_values, native_advantages, of_two_numbers, shuffled
from test_adapters_skyrl import assert_alike, generated, sampled
from turnwise.adapters.dense import OFFERED, PREFIX
from turnwise.adapters.doctor import failed, run_check
from turnwise.adapters.rows import WITH_CRITIC
from turnwise.errors import ConfigError, InputError
from turnwise.policy import embedded_checkpoint
from turnwise.types import Rollout

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
logger.disable("skyrl")


def trainer_for(estimator: str, count: int, *more: str) -> Any:
    """Our subclass of SkyRL's trainer, without models and engines."""
    critic = [f"trainer.critic.model.path={embedded_checkpoint()}"] if estimator in WITH_CRITIC else []
    sizes = [
        f"trainer.{name}={count}" for name in ("train_batch_size", "policy_mini_batch_size", "critic_mini_batch_size")
    ]
    chosen = [f"trainer.algorithm.advantage_estimator={PREFIX}{estimator}", "generator.n_samples_per_prompt=1"]
    return bare_trainer([*chosen, *sizes, *critic, *more])


def through_skyrl(rollouts: list[Rollout], estimator: str, *, padding_rows: int = 0, at_end: bool = False) -> Any:
    """SkyRL's batch of these rollouts with its advantages, from the generator's output on."""
    trainer = trainer_for(estimator, len(rollouts))
    output, uids = trainer.postprocess_generator_output(
        generated(rollouts, at_end=at_end), [r.task_id for r in rollouts]
    )
    # Its mini-batches and metrics want groups that stand together: their places are not looked at here.
    places = [str(i) for i in range(len(uids))]
    data = trainer.convert_to_training_input(output, places)
    data.metadata["uids"] = list(uids)
    data["values"] = None
    if estimator in WITH_CRITIC:
        data["values"] = torch.zeros_like(data["loss_mask"])
        for row, mask, own in zip(
            data["values"], data["loss_mask"], critic_values(rollouts, estimator)[0], strict=True
        ):
            row[mask > 0] = torch.from_numpy(own[:, 0])
    if padding_rows:
        data = pad_training_input_batch(data, padding_rows)
    return trainer, trainer.compute_advantages_and_returns(data)


@pytest.mark.parametrize("layout", [{}, {"padding_rows": 3}, {"at_end": True}])
@pytest.mark.parametrize("estimator", OFFERED)
def test_skyrls_trainer_gives_the_native_advantages(estimator: str, layout: dict[str, Any]):
    step = [of_two_numbers(r) for r in shuffled(awkward_rollouts())]
    if estimator in WITH_CRITIC:
        step = [dataclasses.replace(r, stop="answer") for r in step]
    trainer, data = through_skyrl(step, estimator, **layout)
    assert_alike(sampled(data, len(step)), native_advantages(step, estimator))
    assert trainer.all_metrics["turn_credit/turns"] == pytest.approx(np.mean([len(r.turns) for r in step]))


def test_skyrls_trainer_alone_would_see_one_turn():
    """Why its mask is refused: with it, every token of the response is one turn."""
    step = [of_two_numbers(r) for r in awkward_rollouts()]
    trainer, data = through_skyrl(step, "mt-grpo")
    assert int((data["response_mask"] > 0).sum()) > int((data["loss_mask"] > 0).sum())
    for own in data["response_mask"]:
        assert int((own.diff() > 0).sum()) <= 1, "one run of ones, of however many turns"
    with pytest.raises(ConfigError, match="every rollout would be one turn"):
        RayPPOTrainer.compute_advantages_and_returns(trainer, data)


def test_turns_keep_their_credit_through_the_loss_reduction():
    step = [of_two_numbers(r) for r in awkward_rollouts()]
    trainer, data = through_skyrl(step, "mt-grpo")
    before = data["advantages"].clone()
    data = trainer._normalize_advantages(data, [(0, len(step))])  # the mean over the batch's sampled tokens
    torch.testing.assert_close(data["advantages"], before / data["loss_mask"].sum())


def losses(kind: str) -> torch.Tensor:
    """The gradient at four tokens, two of them of a turn with +1, two of one with -1."""
    cfg = configured([f"trainer.algorithm.policy_loss_type={kind}"]).trainer.algorithm
    now = torch.full((1, 4), -1.0, requires_grad=True)
    loss, _ = ppo_utils.PolicyLossRegistry.get(kind)(
        now,
        now.detach() + 0.05,
        torch.tensor([[1.0, 1.0, -1.0, -1.0]]),
        config=cfg,
        loss_mask=torch.ones(1, 4),
        rollout_logprobs=now.detach(),
    )
    loss.backward()
    assert now.grad is not None
    return now.grad[0]


@pytest.mark.parametrize("kind", ["regular", "dual_clip", "gspo", "cispo"])
def test_skyrls_losses_keep_turns_apart(kind: str):
    """Its gspo too: one ratio weighs all tokens, but each keeps its own advantage."""
    found = losses(kind).numpy()
    np.testing.assert_allclose(found / abs(found[0]), [-1, -1, 1, 1], rtol=1e-5)
    assert 0.9 < abs(found[0]) <= 1.0, "a ratio of exp(-0.05) at all tokens"


def test_normalising_over_the_batch_gives_credit_to_turns_without():
    """Why it is refused."""
    step = [of_two_numbers(r) for r in awkward_rollouts()]
    trainer, data = through_skyrl(step, "mt-grpo")
    none = (data["advantages"] == 0) & (data["loss_mask"] > 0)
    assert bool(none.any()), "the group whose rewards are equal"
    trainer.cfg.trainer.algorithm.advantage_batch_normalize = True
    data["advantages"] += 0.1  # estimators without a baseline do not sum to zero
    moved = trainer._normalize_advantages(data, [(0, len(step))])["advantages"]
    assert float(moved[none].abs().min()) > 0
    with pytest.raises(ConfigError, match="turns without credit get some"):
        trainer_for("mt-grpo", 4, "trainer.algorithm.advantage_batch_normalize=true")


# ------------------------------------------------------------------------ from a gym environment's step rewards


class Echo(BaseTextEnv):
    """Pays what the task says for each step, and is done when there is no more."""

    def __init__(self, env_config: Any = None, extras: Any = None) -> None:
        super().__init__()
        self.pays = list((extras or {})["pays"])

    def step(self, action: str) -> BaseTextEnvStepOutput:
        reward, done = self.pays.pop(0), not self.pays
        said = [] if done else [{"role": "user", "content": f"{len(self.pays)} more"}]
        return BaseTextEnvStepOutput(observations=said, reward=reward, done=done, metadata={})


class Client:
    """An inference server that says the same few tokens every turn."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    async def generate(self, engine_input: Any, model: Any = None) -> dict[str, Any]:
        return {
            "responses": ["so"],
            "response_ids": [list(self.ids)],
            "stop_reasons": ["stop"],
            "response_logprobs": [[-0.5] * len(self.ids)],
        }

    async def finish_session(self, session_id: str) -> None: ...


def played(pays: list[list[float]], *arguments: str) -> dict[str, Any]:
    """SkyRL's generator's output for rollouts of one question that are paid so."""
    if "turnwise-echo" not in skyrl_gym.envs.registration.registry:
        skyrl_gym.register("turnwise-echo", entry_point=Echo)
    tokenizer = AutoTokenizer.from_pretrained(embedded_checkpoint())
    cfg = configured(["generator.max_turns=5", "environment.skyrl_gym.max_env_workers=0", *arguments])
    ids = [*tokenizer.encode("so", add_special_tokens=False), tokenizer.eos_token_id]
    client: Any = Client(ids)
    generator = SkyRLGymGenerator(cfg.generator, cfg.environment.skyrl_gym, client, tokenizer)
    made = {
        "prompts": [[{"role": "user", "content": "What is the capital of Kenya?"}]] * len(pays),
        "env_classes": ["turnwise-echo"] * len(pays),
        "env_extras": [{"pays": own} for own in pays],
        "sampling_params": None,
        "trajectory_ids": None,
    }
    return asyncio.run(generator.generate(made, disable_tqdm=True))


def test_step_rewards_of_a_gym_environment_become_the_turns_credit():
    pays = [[0.5, 0.0, 1.0], [0.0, 0.0, 1.0], [0.25, 0.0]]
    output = played(pays)
    trainer = trainer_for("mt-grpo", 1, "generator.n_samples_per_prompt=3")
    output, uids = trainer.postprocess_generator_output(output, ["a"] * 3)
    data = trainer.convert_to_training_input(output, uids)
    data["values"] = None
    data = trainer.compute_advantages_and_returns(data)
    # Turn 1: z of ½, 0, ¼ is 1, -1, 0; outcomes 1, 1, 0 have z = 1/√3, 1/√3, -2/√3. Turns 2 and 3 earned nothing else.
    assert [len(own) for own in turns_of(data)] == [3, 3, 2]
    won, lost = 1 / np.sqrt(3), -2 / np.sqrt(3)
    first = [own[0] for own in sampled(data, 3)]
    last = [own[-1] for own in sampled(data, 3)]
    np.testing.assert_allclose(first, [1 + won, -1 + won, lost], atol=1e-3)
    np.testing.assert_allclose(last, [won, won, lost], atol=1e-3)


def turns_of(data: Any) -> list[list[list[int]]]:
    """The sampled tokens of each row by runs of the mask."""
    found = []
    for ids, mask in zip(data["sequences"][:, -data["loss_mask"].shape[1] :], data["loss_mask"], strict=True):
        runs: list[list[int]] = []
        before = 0.0
        for token, own in zip(ids.tolist(), mask.tolist(), strict=True):
            if own and not before:
                runs.append([])
            if own:
                runs[-1].append(token)
            before = own
        found.append(runs)
    return found


def test_a_template_of_its_own_leaves_the_last_reward_alone():
    """Why it is refused."""
    paid, ids = [(0.5, 1), (1.0, 3)], [7, 8, 9, 2]
    own: Any = SimpleNamespace(custom_chat_template=None)
    assert SkyRLGymGenerator._build_per_token_rewards(own, paid, ids, False) == [0.0, 0.5, 0.0, 1.0]
    own.custom_chat_template = "{{ messages }}"
    assert SkyRLGymGenerator._build_per_token_rewards(own, paid, ids, False) == 1.0
    with pytest.raises(ConfigError, match="the last turn's reward alone"):
        trainer_for("mt-grpo", 1, "generator.chat_template.name_or_path=qwen3_without_thinking")


def test_a_generator_that_sums_is_an_error():
    with pytest.raises(InputError, match="in which mt-grpo finds no turns"):
        trainer_for("mt-grpo", 1).postprocess_generator_output({"rewards": [1.0], "response_ids": [[1]]}, ["a"])


# -------------------------------------------------------------------------------- registry, entry point, doctor


def test_the_registry_has_all_and_skyrls_validation_takes_them():
    assert {PREFIX + name for name in OFFERED} < set(ppo_utils.AdvantageEstimatorRegistry.list_available())


def test_options_and_the_override_come_from_the_command_line():
    cfg = configured(
        [
            OVERRIDE + "turnwise.adapters.skyrl_trainer",
            "trainer.algorithm.advantage_estimator=turnwise/mt-grpo",
            "trainer.algorithm.turnwise.alpha=0.5",
        ]
    )
    assert dict(cfg.trainer.algorithm.turnwise) == {"alpha": 0.5}
    with pytest.raises(ConfigError, match="got 'beta'"):
        configured(["trainer.algorithm.advantage_estimator=turnwise/mt-grpo", "trainer.algorithm.turnwise.beta=1"])


def test_what_goes_to_rays_workers_comes_back_the_same():
    """The configuration and an estimator, pickled as Ray and SkyRL's registry do."""
    from ray import cloudpickle

    cfg = configured(["trainer.algorithm.advantage_estimator=turnwise/mt-grpo", "trainer.algorithm.turnwise.alpha=0.5"])
    again = cloudpickle.loads(cloudpickle.dumps(cfg))
    assert again.trainer.algorithm.turnwise == {"alpha": 0.5}
    assert again.trainer.algorithm.advantage_estimator == "turnwise/mt-grpo"
    function = ppo_utils.AdvantageEstimatorRegistry.get("turnwise/mt-grpo")
    assert cloudpickle.loads(cloudpickle.dumps(function)).args == ("mt-grpo",)


def test_the_experiment_makes_our_trainer(monkeypatch: pytest.MonkeyPatch):
    made: dict[str, Any] = {}
    monkeypatch.setattr(RayPPOTrainer, "__init__", lambda self, cfg, **given: made.update(given, cfg=cfg))
    cfg = configured(["trainer.algorithm.advantage_estimator=turnwise/mt-grpo"])
    names = ("tracker", "tokenizer", "train_dataset", "eval_dataset", "inference_engine_client", "generator")
    exp: Any = SimpleNamespace()
    trainer = TurnExp.get_trainer(exp, cfg=cfg, colocate_pg=None, **dict.fromkeys(names))
    assert isinstance(trainer, TurnPPOTrainer)
    assert made["cfg"] is cfg


def test_the_doctor_finds_nothing_to_mend():
    said = [(check.__name__, run_check(check)) for check in CHECKS]
    assert not [name for name, text in said if failed(text)], said
