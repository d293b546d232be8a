"""verl itself with turn credit: its compute_advantage, its tool agent, its queue's records, and training on this CPU.

Runs where verl is installed (make test-slow makes an environment for it).
"""

import asyncio
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("verl")
    import torch
    from omegaconf import OmegaConf
    from tensordict import NonTensorStack, TensorDict
    from verl import DataProto
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, DictConfigWrap, ToolListWrap
    from verl.tools.function_tool import function_tool
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.workers.rollout.replica import TokenOutput

    from turnwise.adapters.verl_checks import CHECKS
    from turnwise.adapters.verl_loops import EnvironmentAgentLoop, TurnOutput, TurnToolAgentLoop
    from turnwise.adapters.verl_trainer import check_single_rows, what_else

from adapter_rollouts import awkward_rollouts, critic_values, dense_batch, native_advantages, of_two_numbers, shuffled
from test_adapters_verl import ALONE
from turnwise.adapters.dense import OFFERED, PREFIX, Beside, beside
from turnwise.adapters.doctor import failed, run_check
from turnwise.adapters.rows import WITH_CRITIC
from turnwise.adapters.verl import estimate
from turnwise.chat import load_chat
from turnwise.config import TRAINABLE, TrainConfig
from turnwise.errors import ConfigError, InputError
from turnwise.policy import embedded_checkpoint
from turnwise.setting import make_setting
from turnwise.types import Rollout

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
HERE = Path(__file__).parent


def through_verl(rollouts: list[Rollout], estimator: str, values: np.ndarray | None = None, **layout: Any) -> Any:
    """Each rollout's advantages at its sampled tokens, by verl's own function over its own batch."""
    batch = dense_batch(rollouts, **layout)
    tensors = {
        "token_level_rewards": torch.from_numpy(batch.rewards),
        "response_mask": torch.from_numpy(batch.action),
        **({"values": torch.from_numpy(values)} if values is not None else {}),
    }
    data = DataProto.from_dict(tensors, non_tensors={"uid": np.array(batch.groups, dtype=object)})
    config = OmegaConf.create({"use_kl_in_reward": False, "use_pf_ppo": False})
    found = compute_advantage(data, adv_estimator=estimator, config=config).batch["advantages"].numpy()
    return [row[own > 0] for row, own in zip(found, batch.action, strict=True)][: len(rollouts)]


def assert_alike(found: Any, expected: Any) -> None:
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-6, atol=1e-6)


def test_importing_verl_registered_the_estimators():
    assert {name for name in ADV_ESTIMATOR_REGISTRY if name.startswith(PREFIX)} == {PREFIX + name for name in OFFERED}


@pytest.mark.parametrize("estimator", ALONE)
def test_verls_function_gives_the_native_advantages(estimator: str):
    rollouts = [of_two_numbers(r) for r in shuffled(awkward_rollouts(), 4)]
    expected = native_advantages(rollouts, estimator)
    for layout in ({"padding_rows": 3}, {"at_end": True}):
        assert_alike(through_verl(rollouts, PREFIX + estimator, **layout), expected)


def values_of(rollouts: list[Rollout], estimator: str) -> np.ndarray:
    action = dense_batch(rollouts).action
    values = np.zeros(action.shape, np.float32)
    for i, own in enumerate(critic_values(rollouts, estimator)[0]):
        values[i, action[i] > 0] = own[:, 0]
    return values


@pytest.mark.parametrize("estimator", [name for name in WITH_CRITIC if name in OFFERED and name in TRAINABLE])
def test_verls_function_with_its_critics_values_gives_the_native_advantages(estimator: str):
    rollouts = [dataclasses.replace(of_two_numbers(r), stop="answer") for r in shuffled(awkward_rollouts(), 5)]
    with beside(Beside(values=values_of(rollouts, estimator).astype(float))):
        found = through_verl(rollouts, PREFIX + estimator)
    assert_alike(found, native_advantages(rollouts, estimator))


def test_verls_own_gae_over_turn_rewards_is_mt_ppo():
    rollouts = [dataclasses.replace(of_two_numbers(r), stop="answer") for r in shuffled(awkward_rollouts(), 6)]
    found = through_verl(rollouts, "gae", values_of(rollouts, "mt-ppo"))
    for own, other in zip(found, native_advantages(rollouts, "mt-ppo"), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)


def test_a_configuration_that_mixes_kl_into_rewards_is_refused():
    config = OmegaConf.create({"use_kl_in_reward": True})
    with pytest.raises(ConfigError, match="use_kl_loss"):
        estimate("mt-grpo", torch.zeros(1, 2), torch.ones(1, 2), config, ["a"])


# ------------------------------------------------------------------------------------------- agent loops


def configuration(**change: Any) -> Any:
    """verl's own defaults, as far as an agent loop looks at them."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                "actor_rollout_ref.rollout.name=vllm",
                "actor_rollout_ref.rollout.multi_turn.format=hermes",
                "data.max_prompt_length=1024",
                "data.max_response_length=512",
                "algorithm.adv_estimator=turnwise/mt-grpo",
                *(f"{key}={value}" for key, value in change.items()),
            ],
        )
    return config


class Scripted:
    """An inference server whose replies are written down."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.prompts: list[list[int]] = []

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: Any, **_: Any) -> TokenOutput:
        self.prompts.append(list(prompt_ids))
        ids = [*CHAT.encode_text(self.replies.pop(0)), CHAT.end_id]
        logprobs = [-0.25] * len(ids) if sampling_params.get("logprobs") else None
        return TokenOutput(
            token_ids=ids, log_probs=logprobs, extra_fields={"min_global_steps": 3, "max_global_steps": 3}
        )


CHAT = load_chat(embedded_checkpoint())


def played(kind: Any, server: Any, tools: Any = (), config: Any = None, **row: Any) -> TurnOutput:
    from transformers import AutoTokenizer

    async def run() -> TurnOutput:
        config_ = config or configuration()
        loop = kind(
            trainer_config=DictConfigWrap(config_),
            server_manager=server,
            tokenizer=AutoTokenizer.from_pretrained(embedded_checkpoint()),
            processor=None,
            dataset_cls=None,
            data_config=DictConfigWrap(config_.data),
            hf_model_type="qwen3",
            tools=ToolListWrap(list(tools)),
        )
        return await loop.run({"temperature": 1.0, "logprobs": True}, **row)

    return asyncio.run(run())


def call(city: str) -> str:
    return f'<tool_call>{{"name": "population", "arguments": {{"city": "{city}"}}}}</tool_call>'


@function_tool
def population(city: str) -> tuple[str, float, dict[str, Any]]:
    """How many people live in a city.

    Args:
        city: A name.
    """
    return f"people of {city}: many", 0.5 if city == "Nairobi" else 0.125, {}


def test_verls_tool_agent_pays_each_turn_for_all_of_its_calls():
    from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY

    server = Scripted(call("Nairobi") + call("Lagos"), "Let me see." + call("Cairo"), "Lagos")
    output = played(
        TurnToolAgentLoop,
        server,
        [FUNCTION_TOOL_REGISTRY["population"]],
        configuration(**{"actor_rollout_ref.rollout.multi_turn.max_parallel_calls": 2}),
        raw_prompt=[{"role": "user", "content": "Which city is largest?"}],
    )
    assert output.turn_rewards == [0.625, 0.125]
    output.reward_score = 1.0  # as verl's reward loop does afterwards
    row = output.as_dict()
    mask, scores = row["response_mask"].tolist(), row["rm_scores"].tolist()
    last = [i for i, own in enumerate(mask) if own and (i + 1 == len(mask) or not mask[i + 1])]
    assert [scores[i] for i in last] == [0.625, 0.125, 1.0]
    assert sum(scores) == 1.75
    assert [row["responses"][i].item() for i in last] == [CHAT.end_id] * 3
    assert row["extra_fields"]["max_global_steps"] == 3


def test_our_environment_is_played_through_verls_server():
    setting = make_setting(TrainConfig())
    task = next(t for t in setting.train if "capital" in t.question)
    replies = [
        '<reasoning>\nI look.\n</reasoning>\n<tool>\n{"name": "search", "args": '
        f'{{"query": "{task.question}"}}}}\n</tool>',
        f"<reasoning>\nI read.\n</reasoning>\n<answer>\n{task.answers[0]}\n</answer>",
    ]
    server = Scripted(*replies)
    output = played(EnvironmentAgentLoop, server, raw_prompt=[], extra_info={"task": task.id})
    assert output.prompt_ids == server.prompts[0] == CHAT.prompt_ids(setting.environment(task).start())
    assert server.prompts[1][: len(server.prompts[0])] == server.prompts[0]
    assert output.prompt_ids + output.response_ids == server.prompts[1] + [*CHAT.encode_text(replies[1]), CHAT.end_id]
    extra = output.extra_fields
    assert extra["turn_rewards"][0]["tool_execution"] == 0.2
    assert extra["outcome_rewards"]["exact_match"] == 1.0
    assert extra["max_global_steps"] == 3
    row = output.as_dict()
    assert row["rm_scores"].sum().item() == pytest.approx(sum(output.turn_rewards) + output.reward_score)
    assert row["rm_scores"].count_nonzero() == 2
    assert row["rollout_log_probs"].min().item() == -0.25
    assert row["response_mask"].sum().item() == sum(k >= 0 for k in extra["turn_ids"])


def test_a_row_that_is_no_task_is_said():
    with pytest.raises(InputError, match="write the dataset with"):
        played(EnvironmentAgentLoop, Scripted(), raw_prompt=[], extra_info={"task": "?"})


def test_a_loss_by_sequence_is_refused_before_a_rollout():
    config = configuration(**{"actor_rollout_ref.actor.policy_loss.loss_mode": "gspo"})
    with pytest.raises(ConfigError, match="got 'gspo'"):
        played(EnvironmentAgentLoop, Scripted(), config=config, raw_prompt=[])


# ------------------------------------------------------------------------------------- the trainer's part


def test_the_trainer_reads_rewards_by_name_from_verls_queue():
    rows = [
        TurnOutput(
            prompt_ids=[5, 6],
            response_ids=[7, 2, 9, 10, 2],
            response_mask=[1, 1, 0, 1, 1],
            reward_score=1.0,
            metrics=AgentLoopMetrics(),
            turn_rewards=[0.5],
            extra_fields={
                "turn_ids": [0, 0, -1, 1, 1],
                "turn_rewards": [{"tool": 0.5}, {"form": 0.25}],
                "outcome_rewards": {"exact": 1.0},
            },
        ).as_dict()
        for _ in range(2)
    ]
    padding = {**rows[0], "responses": torch.tensor([2]), "response_mask": torch.tensor([0])}
    rows.append(padding)
    jagged = {
        name: torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged)
        for name in ("prompts", "responses", "response_mask")
    }
    extra = NonTensorStack(*[row["extra_fields"] for row in rows])
    given = what_else(TensorDict({**jagged, "extra_fields": extra}, batch_size=3), "gigpo")
    assert given.turn_ids == [[0, 0, -1, 1, 1], [0, 0, -1, 1, 1], []]
    assert given.turn_rewards == [[{"tool": 0.5}, {"form": 0.25}]] * 2 + [[]]
    assert given.outcome_rewards == [{"exact": 1.0}] * 2 + [{}]
    assert given.anchors[0] == given.anchors[1]
    assert len(given.anchors[0]) == 2
    assert given.anchors[2] == ()


def test_several_rows_per_rollout_are_refused():
    check_single_rows(["a_0_0", "a_1_0", "padding"])
    with pytest.raises(InputError, match="one output per rollout; got a second one, 'a_1_1'"):
        check_single_rows(["a_0_0", "a_1_0", "a_1_1"])


def some_output() -> TurnOutput:
    return TurnOutput(
        prompt_ids=[5],
        response_ids=[7],
        response_mask=[1],
        reward_score=1.0,
        metrics=AgentLoopMetrics(),
        extra_fields={"reward_extra_info": {}},
    )


def test_several_outputs_of_one_rollout_are_refused_where_verl_takes_them(monkeypatch: pytest.MonkeyPatch):
    """verl's own postprocessing, its queue replaced by a list; every rollout is a task, as in its `_run_prompt`."""
    from verl.trainer.ppo.v1 import agent_loop_tq

    put: list[str] = []

    async def kept(keys: list[str], **_: Any) -> None:
        put.extend(keys)

    async def nothing(*_: Any, **__: Any) -> None: ...

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", kept)
    worker: Any = object.__new__(agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class)
    worker._compute_score = worker._compute_teacher_logprobs = nothing
    worker._compute_multi_modal_inputs = lambda output, ids: {}
    worker._compute_position_ids = lambda ids, mask, inputs: torch.zeros_like(ids)

    async def played(outputs: list[list[TurnOutput]]) -> list[Any]:
        tasks = [
            asyncio.create_task(worker._agent_loop_postprocess(own, False, uid="a", session_id=i, global_steps=0))
            for i, own in enumerate(outputs)
        ]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second = asyncio.run(played([[some_output()], [some_output(), some_output()]]))
    assert first is None
    assert put == ["a_0_0"]
    assert isinstance(second, InputError)
    assert "one output per rollout; got several" in str(second)


# ------------------------------------------------------------------------------------------ the whole of it


def test_the_doctor_finds_nothing_to_mend():
    said = [(check.__name__, run_check(check)) for check in CHECKS]
    assert not [name for name, text in said if failed(text)], said


def trained(out: Path, steps: int, *more: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """verl's metrics of each step and the estimator's, of a run of its own main_ppo."""
    command = [sys.executable, str(HERE / "verl_search.py"), str(out), str(steps), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-5000:]
    files = [out / "metrics.jsonl", out / "turns.jsonl"]
    metrics, turns = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return [line["data"] for line in metrics], turns


def test_verls_own_training_teaches_the_tool(tmp_path: Path):
    # Of turn rewards this one alone, so that what verl is paid per turn is the rate; a rollout has one call.
    metrics, turns = trained(tmp_path, 6, "+turnwise.reward_weights={tool_execution: 1.0, exact_match: 1.0}")
    assert len(metrics) == len(turns) == 6
    rates = [line["reward/reward"] for line in turns]
    assert rates[0] < 0.45
    assert np.mean(rates[-2:]) > rates[0] + 0.2
    assert max(line["training/rollout_probs_diff_max"] for line in metrics) < 0.05
    share = sum(line["seconds"] for line in turns) / sum(line["timing_s/step"] for line in metrics)
    assert share < 0.01


def test_verls_critic_and_our_trainer_mode_make_mt_ppo(tmp_path: Path):
    more = ["trainer.val_before_train=True", "data.val_max_samples=16"]
    metrics, turns = trained(tmp_path, 2, "critic", *more)
    before = metrics.pop(0)
    assert before["val-aux/turnwise/tool_execution/mean@1"] < 0.1  # greedy, the start seldom calls
    assert before["val-aux/turnwise/xml_format/mean@1"] > 0.1
    assert [line["estimator"] for line in turns] == ["mt-ppo"] * 2
    for line in metrics:
        assert line["turn_credit/reward/tool_execution"] > 0
        assert line["turn_credit/reward/answer_in_results"] > 0
        assert np.isfinite(line["critic/vf_loss"])
        assert line["critic/advantages/mean"] == pytest.approx(0.0, abs=1e-3)  # whitened
    assert turns[0]["abs_advantage/turn_1"] != turns[0]["abs_advantage/turn_2"]
