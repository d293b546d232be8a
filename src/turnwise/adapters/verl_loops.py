"""Agent loops for verl that pay every turn on its last sampled token, where our estimators find it again.

`turnwise/tool_agent` is verl's own tool agent: the rewards of a turn's tool calls are summed; what verl scores is the
outcome. `turnwise/environment` plays our environments: questions, tools, protocol and rewards as in `turnwise train`.
verl imports this where `actor_rollout_ref.model.external_lib` names it. Needs verl.
"""

import asyncio
import dataclasses
import functools
import json
import tempfile
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from omegaconf import OmegaConf
from pydantic import Field
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register
from verl.experimental.agent_loop.tool_agent_loop import AgentData, AgentState, ToolAgentLoop

from turnwise.adapters.dense import PREFIX
from turnwise.adapters.rows import dense_scores
from turnwise.adapters.verl import loop_refusals
from turnwise.chat import Chat, load_chat
from turnwise.config import TrainConfig
from turnwise.engine import Completion, Sampling
from turnwise.errors import ConfigError, InputError, unknown_name
from turnwise.rollout import Limits, run_rollout
from turnwise.setting import Setting, make_setting
from turnwise.types import Rollout, Task


class TurnOutput(AgentLoopOutput):
    """What an agent loop hands to verl, with rewards per turn; `reward_score` is the outcome alone."""

    turn_rewards: list[float] = Field(default_factory=list)
    """One number per turn; turns at the end that have none may be left out."""

    def as_dict(self) -> dict[str, Any]:
        """verl's fields, with `rm_scores` as `rows.dense_scores` lays them out.

        InputError for too many rewards, and for a second output of one rollout.
        """
        _check_single(self)
        output = super().as_dict()
        paid = output.pop("turn_rewards", [])
        scores = dense_scores(self.response_mask, paid, self.reward_score or 0.0)
        output["rm_scores"] = torch.from_numpy(scores)
        return output


_taken: WeakKeyDictionary[asyncio.Task[Any], AgentLoopOutput] = WeakKeyDictionary()
"""What each rollout's task has handed to verl's queue: verl plays every rollout in a task of its own."""


def _check_single(output: AgentLoopOutput) -> None:
    """InputError where the rollout that this task plays has handed over another output."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # outside of verl's workers
        return
    if task is not None and _taken.setdefault(task, output) is not output:
        raise InputError(
            "an agent loop must return one output per rollout; got several: verl makes each a row of the same group, "
            "where its turns would count as another rollout's; return one, with all turns in its mask"
        )


class _Checked:
    """What both loops have in common: they look at the configuration before they start."""

    def __init__(self, trainer_config: Any, *args: Any, **options: Any) -> None:
        for refusal in loop_refusals(trainer_config.config):
            raise ConfigError(refusal)
        super().__init__(trainer_config, *args, **options)


@register(PREFIX + "tool_agent")
class TurnToolAgentLoop(_Checked, ToolAgentLoop):
    """verl's tool agent loop with the rewards of each turn's tool calls, summed, as that turn's reward."""

    async def run(self, sampling_params: dict[str, Any], **options: Any) -> TurnOutput:
        """A rollout as verl's loop makes it."""
        output = await super().run(sampling_params, **options)
        known = {name: getattr(output, name) for name in output.model_fields_set}
        return TurnOutput(**known, turn_rewards=[float(x) for x in output.extra_fields["turn_scores"]])

    async def _handle_processing_tools_state(self, agent_data: AgentData) -> AgentState:
        """verl's step from a turn's calls to the next turn; notes what the calls earned."""
        before = len(agent_data.tool_rewards)
        state = await super()._handle_processing_tools_state(agent_data)
        agent_data.turn_scores.append(sum(agent_data.tool_rewards[before:]))
        return state


# ---------------------------------------------------------------------------------- our environments in verl


@register(PREFIX + "environment")
class EnvironmentAgentLoop(_Checked, AgentLoopBase):
    """One of our environments, played through verl's inference server; scored with our rewards.

    The node `turnwise` of verl's configuration holds options of `turnwise train`: tasks, corpus, tools, rewards,
    protocol, max_turns, ... The dataset is that of `verl_data.write_dataset`, made of the same options; the context is
    data.max_prompt_length + data.max_response_length. A rollout whose environment failed is one token that was not
    sampled: it enters no statistics.
    """

    async def run(self, sampling_params: dict[str, Any], **options: Any) -> TurnOutput:
        """A rollout of the row's task. InputError where the row is no task of the setting."""
        setting, tasks = setting_of(self.config)
        chat = tokenizer_chat(self.tokenizer)
        task = _task(tasks, options)
        engine = ServerEngine(self.server_manager, sampling_params, chat.stop_ids)
        rollout = await run_rollout(
            task,
            setting.environment(task),
            engine,
            chat,
            limits=Limits(
                max_turn_tokens=setting.config.max_turn_tokens,
                context=int(self.rollout_config.prompt_length + self.rollout_config.response_length),
                max_turns=setting.config.max_turns,
            ),
            temperature=float(sampling_params.get("temperature", 1.0)),
        )
        (scored,) = await asyncio.to_thread(setting.all_scored, [(task, rollout)])  # a judge takes its time
        names = [name for name, weight in setting.config.weights.items() if weight]
        return rollout_output(scored, chat, engine.told, with_logprobs=engine.has_logprobs, names=names)


def setting_of(config: Any) -> tuple[Setting, Mapping[str, Task]]:
    """The setting that the node `turnwise` of verl's configuration stands for, and its tasks; read once per process."""
    node = OmegaConf.select(config, "turnwise")
    options = {} if node is None else OmegaConf.to_container(node, resolve=True)
    return _setting(json.dumps(options, sort_keys=True))


@functools.cache
def _setting(options: str) -> tuple[Setting, Mapping[str, Task]]:
    given = json.loads(options)
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in given:
        if name not in known:
            raise unknown_name("an option of the node `turnwise`", name, known)
    setting = make_setting(TrainConfig(**given))
    return setting, {task.id: task for task in (*setting.train, *setting.validation)}


def _task(tasks: Mapping[str, Task], row: Mapping[str, Any]) -> Task:
    """The task of a dataset's row."""
    name = (row.get("extra_info") or {}).get("task")
    task = tasks.get(name)
    if task is None:
        raise InputError(
            f"a row's extra_info['task'] must be a task of the node `turnwise`; got {name!r}; write the dataset with "
            "turnwise.adapters.verl_data.write_dataset, from the same options"
        )
    return task


@functools.cache
def tokenizer_chat(tokenizer: Any) -> Chat:
    """Our chat over verl's tokenizer, in its own chat template if it has one. Raises RunError where it cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return load_chat(Path(folder))


class ServerEngine:
    """verl's inference server as an engine for one rollout."""

    policy_version = 0

    def __init__(self, server: Any, sampling_params: Mapping[str, Any], stop_ids: Sequence[int]) -> None:
        self._server, self._sampling, self._stop_ids = server, sampling_params, stop_ids
        self._request = uuid4().hex
        self.has_logprobs = False
        """Whether the server told them, which it does with `rollout.calculate_log_probs`."""
        self.told: dict[str, Any] = {}
        """What the server says beside the tokens: the versions of the weights, which verl wants back."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: Hashable) -> Completion:
        """A completion, drawn with verl's sampling options; the seed is the server's."""
        output = await self._server.generate(
            request_id=self._request,
            prompt_ids=list(prompt_ids),
            sampling_params={**self._sampling, "max_tokens": sampling.max_tokens},
        )
        newest = output.extra_fields.get("max_global_steps")
        self.told = {**output.extra_fields, **self.told}
        if newest is not None:
            self.told["max_global_steps"] = newest
        ids = tuple(output.token_ids)[: sampling.max_tokens]
        self.has_logprobs = output.log_probs is not None
        logprobs = tuple(output.log_probs)[: len(ids)] if output.log_probs is not None else (0.0,) * len(ids)
        ended = bool(ids) and ids[-1] in self._stop_ids
        return Completion(token_ids=ids, logprobs=logprobs, finish="stop" if ended else "length")

    def release(self, session: Hashable) -> None:
        """The server forgets by itself."""


def rollout_output(
    rollout: Rollout,
    chat: Chat,
    told: Mapping[str, Any],
    *,
    with_logprobs: bool = False,
    names: Iterable[str] = (),
) -> TurnOutput:
    """A scored rollout as verl takes it: tokens after the prompt, what was sampled, rewards per turn.

    What each reward came to, summed over turns, is in `reward_extra_info`, which verl's validation averages: 0 for
    those of `names` that it did not have. The rewards by name and turn are in `extra_fields`, for a trainer that reads
    those.
    """
    counted = rollout.turns if rollout.stop != "error" else ()
    ids: list[int] = []
    turn_ids: list[int] = []
    logprobs: list[float] = []
    for k, turn in enumerate(counted):
        reply = turn.reply_ids if k + 1 < len(counted) else ()
        ids += [*turn.action_ids, *reply]
        turn_ids += [k] * len(turn.action_ids) + [-1] * len(reply)
        logprobs += [*turn.sampling_logprobs, *[0.0] * len(reply)]
    if not ids:
        ids, turn_ids, logprobs = [chat.end_id], [-1], [0.0]
    turns = [dict(turn) for turn in rollout.turn_rewards] if counted else []
    outcome = dict(rollout.outcome_rewards) if counted else {}
    named = {name: sum(turn.get(name, 0.0) for turn in turns) for name in sorted({n for turn in turns for n in turn})}
    return TurnOutput(
        prompt_ids=list(rollout.prompt_ids) or [chat.start_id],
        response_ids=ids,
        response_mask=[int(k >= 0) for k in turn_ids],
        response_logprobs=logprobs if with_logprobs else None,
        reward_score=float(sum(outcome.values())),
        num_turns=2 * len(counted),
        metrics=AgentLoopMetrics(),
        turn_rewards=[float(sum(turn.values())) for turn in turns],
        extra_fields={
            **told,
            "reward_extra_info": {**dict.fromkeys(names, 0.0), **named, **outcome},
            "turn_ids": turn_ids,
            "turn_rewards": turns,
            "outcome_rewards": outcome,
        },
    )
