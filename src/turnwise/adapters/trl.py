"""Turn credit inside TRL: its GRPO trainer with an advantage per turn, for its own tools and for our environments.

`TurnGRPOTrainer` replaces the advantages (B,) that TRL computes by (B, T), which TRL's loss takes as they are.
Everything else is TRL's: the loss, the optimiser, the distribution, vLLM, the loggers. Turn rewards come from functions
like TRL's reward functions that return one number per turn, or from a `rollout_func` such as `EnvironmentRollouts`.

Group statistics need every rollout of a group, and TRL may spread a group over processes: what credit needs of each
rollout is gathered first. Needs TRL; `turnwise doctor trl` says what is missing.
"""

import asyncio
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer

from turnwise import search_tags
from turnwise.adapters.rows import (
    CreditRow,
    RowCredit,
    batch_turn_ids,
    check_estimator,
    credit_rows,
    observation_anchors,
    row_credit,
    token_advantages,
)
from turnwise.chat import CHAT_TEMPLATE, END, START, BPETokenizer, Chat
from turnwise.credit import NEEDS, ONE_PER_ROLLOUT
from turnwise.engine import Completion, Sampling
from turnwise.engines.hf import HFEngine
from turnwise.env import Environment
from turnwise.errors import ConfigError, InputError
from turnwise.protocols import ProtocolName, protocol_named
from turnwise.rollout import Limits, awaited, rollout_seed, run_rollout
from turnwise.setting import Setting
from turnwise.types import Rollout, Task

OLDEST, BELOW = Version("1.8"), Version("2")
"""The releases of TRL that this is for, the second one not included."""
KEEPS_TURNS = ("cispo", "vespo")
"""The losses whose sequence-level ratio only weighs tokens, and is no gradient's path."""
Ends = Literal["own", "trl"]
TurnRewards = Callable[..., Sequence[Sequence[float | None]]]
"""Like TRL's reward functions, but one number or None per turn of each completion."""


# ------------------------------------------------------------------------- what cannot carry turn credit


def refusals(args: GRPOConfig, estimator: str, trainer: type[GRPOTrainer] = GRPOTrainer) -> list[str]:
    """Why a configuration would delete or distort turn credit; empty where it would not."""
    found = []
    version = Version(importlib.metadata.version("trl"))
    if not OLDEST <= version < BELOW:
        found.append(f'trl must be >={OLDEST},<{BELOW}; got {version}; pip install "trl>={OLDEST},<{BELOW}"')
    by_turn = estimator not in ONE_PER_ROLLOUT and args.loss_type not in KEEPS_TURNS
    if by_turn and args.importance_sampling_level != "token":
        found.append(
            f"importance_sampling_level must be 'token' with {estimator}; got {args.importance_sampling_level!r}: one "
            "ratio per rollout has the same gradient at all of its tokens, so that only the sum over turns counts and "
            "turn credit is lost; leave it out of GRPOConfig"
        )
    if any(base.__name__ == "GMPOTrainer" for base in trainer.__mro__):
        found.append(
            "the trainer must not be GMPO's: its loss is one geometric mean per rollout and takes no advantage per "
            "token; derive from TurnGRPOTrainer alone"
        )
    if args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
        found.append(
            "use_liger_kernel must be False: liger's fused loss of this TRL takes one advantage per rollout; leave it "
            "out of GRPOConfig"
        )
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    if corrected and args.vllm_importance_sampling_mode.startswith("sequence"):
        found.append(
            f"vllm_importance_sampling_mode must be 'token_truncate' or 'token_mask'; got "
            f"{args.vllm_importance_sampling_mode!r} (TRL's default): one ratio over all turns of a rollout, so that "
            "one turn's mismatch rescales or deletes the credit of the others; set it to 'token_truncate'"
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        found.append(
            f"multi_objective_aggregation must be 'sum_then_normalize', TRL's default; got "
            f"{args.multi_objective_aggregation!r}, which would not be looked at; take estimator gdpo instead"
        )
    return found


# --------------------------------------------------------------------------------------------- the trainer


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """What a batch's rollouts earned on this process, as TRL's own reward step saw it."""

    turn_rewards: list[list[dict[str, float]] | None]
    """None where neither functions nor rollouts gave any."""
    outcome_rewards: list[Mapping[str, float]]
    turn_ids: list[Sequence[int]] | None
    tasks: list[Hashable]
    """What each row asks: equal within a group."""


class TurnGRPOTrainer(GRPOTrainer):
    """TRL's GRPO trainer with turn credit; all of its arguments, and three more.

    `estimator` and `estimator_options` name how rewards become advantages (`turnwise.credit`); those that need no
    critic are offered. `turn_reward_funcs` are functions `turn_...(prompts, completions, **columns)`, called as TRL
    calls `reward_funcs`, that return one number or None for every turn of every completion. A turn is an assistant
    message; tool messages belong to the turn before them (`completion_turns` cuts a completion so). A `rollout_func`
    may give rewards itself: `turn_rewards`, a list of mappings per rollout, and `outcome_rewards`, a mapping per
    rollout, which then stands for what `reward_funcs` say; and `turn_ids`, per token, -1 where it did not sample.

    Raises ConfigError for what would delete or distort turn credit, with the reason.
    """

    def __init__(
        self,
        *args: Any,
        estimator: str = "mt-grpo",
        estimator_options: Mapping[str, Any] | None = None,
        turn_reward_funcs: TurnRewards | Sequence[TurnRewards] = (),
        **options: Any,
    ) -> None:
        given = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **options).arguments
        functions = [turn_reward_funcs] if callable(turn_reward_funcs) else list(turn_reward_funcs)
        check_estimator(estimator, estimator_options or {})
        _check_functions(functions)
        if not functions and given.get("rollout_func") is None and estimator not in ONE_PER_ROLLOUT:
            raise ConfigError(
                f"{estimator} must have turn rewards; there are no turn_reward_funcs, and no rollout_func to give "
                "them; give functions that return one number per turn"
            )
        config = given.get("args") or GRPOConfig("trl")
        for refusal in refusals(config, estimator, type(self)):
            raise ConfigError(refusal)
        self.estimator, self.estimator_options = estimator, dict(estimator_options or {})
        self.turn_reward_funcs = functions
        self._scored: _Scored | None = None
        super().__init__(*args, **options)
        if isinstance(self.rollout_func, EnvironmentRollouts):
            self.rollout_func.prepare(self)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """TRL's outcome rewards, unchanged; notes what each row earned, per turn too."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = self._noted(inputs, prompts, completions, completion_ids_list, rewards)
        return rewards

    def _noted(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any, rewards: Any) -> _Scored:
        """What this process's rollouts earned."""
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
        columns |= {"completion_ids": completion_ids, "trainer_state": self.state}
        if self.environments is not None:
            columns["environments"] = self.environments
        own = self.accelerator.process_index * len(prompts)
        weighted = (rewards * self.reward_weights.to(rewards.device)).tolist()[own : own + len(prompts)]
        names = _distinct(self.reward_func_names)
        paid = [{name: x for name, x in zip(names, row, strict=True) if x == x} for row in weighted]  # NaN: absent
        said = [row.get("turn_rewards") for row in inputs]
        return _Scored(
            turn_rewards=_merged(said, self._turn_values(prompts, completions, columns)),
            outcome_rewards=[row.get("outcome_rewards", by_trl) for row, by_trl in zip(inputs, paid, strict=True)],
            turn_ids=[row["turn_ids"] for row in inputs] if "turn_ids" in inputs[0] else None,
            tasks=[repr(row.get("prompt")) for row in inputs],
        )

    def _turn_values(self, prompts: Any, completions: Any, columns: Mapping[str, Any]) -> list[list[dict[str, float]]]:
        """Each completion's turns with what the functions gave them; empty lists without functions."""
        turns: list[list[dict[str, float]]] = [[] for _ in completions]
        for name, function in zip(_function_names(self.turn_reward_funcs), self.turn_reward_funcs, strict=True):
            values = function(prompts=prompts, completions=completions, **columns)
            if len(values) != len(completions):
                raise InputError(
                    f"turn reward function {name} must return one list per completion ({len(completions)}); got "
                    f"{len(values)}; return a list of lists"
                )
            for own, found in zip(turns, values, strict=True):
                own += [{} for _ in range(len(found) - len(own))]
                if len(found) != len(own):
                    raise InputError(
                        f"turn reward functions must agree in the number of turns; {name} gave {len(found)}, others "
                        f"{len(own)}; return one number or None per assistant message"
                    )
                for turn, value in zip(own, found, strict=True):
                    if value is not None:
                        turn[name] = float(value)
        return turns

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch with advantages per token (B, T) instead of per rollout."""
        return self._with_turn_credit(super()._generate_and_score_completions(inputs))

    def _with_turn_credit(self, batch: dict[str, Any]) -> dict[str, Any]:
        turn_ids, rows = self._credit_rows(batch)
        gathered: list[CreditRow | None] = gather_object(rows)
        credit = row_credit(gathered, self.estimator, self.estimator_options)
        first = self.accelerator.process_index * len(rows)
        found = token_advantages(turn_ids, credit.tokens[first : first + len(rows)])
        old = batch["advantages"]
        self._log_credit(credit)
        self._scored = None
        return {**batch, "advantages": torch.as_tensor(found, dtype=old.dtype, device=old.device)}

    def _credit_rows(self, batch: Mapping[str, Any]) -> tuple[np.ndarray, list[CreditRow | None]]:
        """This process's rows for credit; TRL's groups are the runs of `num_generations` over all processes."""
        scored = self._scored
        assert scored is not None, "TRL computes rewards before it returns a batch"
        present = batch["completion_mask"].cpu().numpy()
        action = present * (batch["tool_mask"].cpu().numpy() if "tool_mask" in batch else 1)
        turn_ids = batch_turn_ids(action, scored.turn_ids)
        size = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(action)
        anchors = None
        if "anchor" in NEEDS.get(self.estimator, ()):
            prompts = [
                ids[mask > 0]
                for ids, mask in zip(*(batch[k].cpu().numpy() for k in ("prompt_ids", "prompt_mask")), strict=True)
            ]
            anchors = observation_anchors(turn_ids, batch["completion_ids"].cpu().numpy(), present, prompts)
        return turn_ids, credit_rows(
            turn_ids,
            [((first + i) // size, task) for i, task in enumerate(scored.tasks)],
            self._known_turn_rewards(turn_ids, scored.turn_rewards),
            scored.outcome_rewards,
            anchors=anchors,
        )

    def _known_turn_rewards(
        self, turn_ids: np.ndarray, given: Sequence[list[dict[str, float]] | None]
    ) -> list[list[dict[str, float]]]:
        """Turn rewards of every row; of a method that has one number per rollout, none where none were given."""
        if all(row is not None for row in given):
            return [row for row in given if row is not None]
        if self.estimator not in ONE_PER_ROLLOUT:
            raise InputError(
                f"{self.estimator} must have turn rewards; the rollouts have none; return `turn_rewards` from "
                "rollout_func, one list of mappings per rollout, or give turn_reward_funcs"
            )
        return [[{} for _ in range(int(row.max()) + 1)] for row in turn_ids]

    def _log_credit(self, credit: RowCredit) -> None:
        """Turn-level metrics to TRL's loggers, and each rollout's advantages to its table of completions."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in credit.metrics().items():
            metrics[f"turn_credit/{name}"].append(value)
        means = [float(tokens.mean()) if len(tokens) else 0.0 for tokens in credit.tokens]
        logged = self._logs["advantages"]
        for _ in range(min(len(means), len(logged))):
            logged.pop()  # TRL's own, which were not used
        logged.extend(means)
        self._logs["extra"]["turn_advantages"].extend(" ".join(f"{x:+.3f}" for x in turns) for turns in credit.turns)


def completion_turns(completion: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """A completion's messages turn by turn: each assistant message with the tool messages that answer it."""
    turns: list[list[Mapping[str, Any]]] = []
    for message in completion:
        if message["role"] == "assistant" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _check_functions(functions: Sequence[Any]) -> None:
    for function in functions:
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise ConfigError(
                f"turn_reward_funcs must be plain functions; got {function!r}; give one that returns a list of lists"
            )


def _function_names(functions: Sequence[Any]) -> list[str]:
    return _distinct([getattr(function, "__name__", type(function).__name__) for function in functions])


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with numbers where one comes again."""
    return [name if name not in names[:i] else f"{name}_{i}" for i, name in enumerate(names)]


def _merged(
    said: Sequence[Sequence[Mapping[str, float]] | None], computed: Sequence[list[dict[str, float]]]
) -> list[list[dict[str, float]] | None]:
    """What rollouts brought along and what functions gave, turn by turn; None where there is neither."""
    found: list[list[dict[str, float]] | None] = []
    for own, more in zip(said, computed, strict=True):
        if own is None:
            found.append(more or None)
        elif more and len(more) != len(own):
            raise InputError(
                f"turn reward functions must give one number per turn of the rollout ({len(own)}); got {len(more)}; "
                "with a rollout_func, let the rollouts bring their turn rewards"
            )
        else:
            found.append([{**turn, **add} for turn, add in zip(own, more or [{}] * len(own), strict=True)])
    return found


# ------------------------------------------------------------------ our environments inside TRL's trainer


class EnvironmentRollouts:
    """A `rollout_func` for TRL that plays our environments, and brings turn rewards and outcomes along.

    `engine="own"` draws with the in-process engine, which keeps what it computed across turns: for models of the
    Llama and Qwen families whose weights are whole on every process. `engine="trl"` draws with TRL's own generation,
    thus with vLLM where GRPOConfig says so, under FSDP and under DeepSpeed; all processes then take turns together.

    Prompts are matched to tasks by the messages that the environment starts with: the dataset must hold those
    (`task_rows`). A rollout whose environment failed is one token that does not count.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        make_environment: Callable[[Task], Environment],
        score: Callable[[Task, Rollout], Rollout],
        *,
        max_turn_tokens: int,
        max_turns: int,
        engine: Ends = "own",
        seed: int = 0,
    ) -> None:
        if engine not in ("own", "trl"):
            raise ConfigError(f"engine must be 'own' or 'trl'; got {engine!r}; give one of them")
        self.make_environment, self.score = make_environment, score
        self.max_turn_tokens, self.max_turns = max_turn_tokens, max_turns
        self.engine, self.seed = engine, seed
        self.calls = 0
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            other = self._tasks.setdefault(_prompt_key(task_messages(make_environment(task))), task)
            if other.id != task.id and other.answers != task.answers:
                raise InputError(
                    f"tasks must differ in what their environments say first; {other.id!r} and {task.id!r} do not, and "
                    "have other answers; leave one out"
                )
        self._engine: Any = None
        self._chat: Chat | None = None

    def __call__(self, prompts: Sequence[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's keys for these prompts, one rollout each."""
        tasks = [self._task(prompt) for prompt in prompts]
        if self._chat is None:
            self.prepare(trainer)
        assert self._chat is not None
        if isinstance(self._engine, HFEngine):
            self._engine.refresh(trainer.state.global_step)
        rollouts = awaited(self._played(tasks, trainer))
        self.calls += 1
        scored = [self.score(task, rollout) for task, rollout in zip(tasks, rollouts, strict=True)]
        return rollout_columns(scored, self._chat, logprobs=trainer.use_vllm)

    def prepare(self, trainer: GRPOTrainer) -> None:
        """Makes the engine over the trainer's model. ConfigError where it would draw from another policy."""
        chat = trainer_chat(trainer)
        if self.engine == "trl":
            self._engine = TRLEngine(trainer, chat.end_id)
        else:
            _check_own_engine(trainer)
            model: Any = trainer.accelerator.unwrap_model(trainer.model)
            context = int(model.config.max_position_embeddings)
            self._engine = HFEngine(model, stop_ids=[chat.end_id], max_context=context)
        self._chat = chat

    def _task(self, prompt: Any) -> Task:
        task = self._tasks.get(_prompt_key(prompt))
        if task is None:
            raise InputError(
                f"a prompt must be the messages that an environment of one of the tasks starts with; got "
                f"{str(prompt)[-120:]!r}; make the dataset of `task_rows`"
            )
        return task

    async def _played(self, tasks: Sequence[Task], trainer: GRPOTrainer) -> list[Rollout]:
        assert self._chat is not None
        chat, first = self._chat, trainer.accelerator.process_index * len(tasks)
        config: Any = trainer.accelerator.unwrap_model(trainer.model).config
        limits = Limits(
            max_turn_tokens=self.max_turn_tokens,
            context=int(config.get_text_config().max_position_embeddings),
            max_turns=self.max_turns,
        )
        jobs = [
            run_rollout(
                task,
                self.make_environment(task),
                self._engine,
                chat,
                limits=limits,
                temperature=trainer.temperature,
                seed=rollout_seed(self.seed, trainer.state.global_step, self.calls, first + i),
            )
            for i, task in enumerate(tasks)
        ]
        together = asyncio.gather(*jobs)
        if isinstance(self._engine, TRLEngine):
            return await self._engine.with_others(together)
        return await together


def rollout_columns(rollouts: Sequence[Rollout], chat: Chat, *, logprobs: bool = False) -> dict[str, Any]:
    """What a `rollout_func` of TRL returns for these rollouts, and what `TurnGRPOTrainer` reads beside it.

    A rollout without turns, or that failed, becomes one token that the policy did not sample: padding for credit.
    """
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            "prompt_ids",
            "completion_ids",
            "logprobs",
            "env_mask",
            "turn_ids",
            "turn_rewards",
            "outcome_rewards",
        )
    }
    for rollout in rollouts:
        ids, turn_ids, drawn = [], [], []
        counted = rollout.stop != "error"
        turns = rollout.turns if counted else ()
        for k, turn in enumerate(turns):
            reply = turn.reply_ids if k + 1 < len(turns) else ()
            ids += [*turn.action_ids, *reply]
            turn_ids += [k] * len(turn.action_ids) + [-1] * len(reply)
            drawn += [*turn.sampling_logprobs, *[0.0] * len(reply)]
        if not ids:
            ids, turn_ids, drawn = [chat.end_id], [-1], [0.0]
        columns["prompt_ids"].append(list(rollout.prompt_ids) or [chat.start_id])
        columns["completion_ids"].append(ids)
        columns["logprobs"].append(drawn)
        columns["env_mask"].append([int(k >= 0) for k in turn_ids])
        columns["turn_ids"].append(turn_ids)
        columns["turn_rewards"].append([dict(turn) for turn in rollout.turn_rewards] if turns else [])
        columns["outcome_rewards"].append(dict(rollout.outcome_rewards))
    return {**columns, "logprobs": columns["logprobs"] if logprobs else None}


def rollout_return(prompts: Sequence[Any], **columns: Any) -> list[float]:
    """A reward function for TRL's logs: each rollout's turn rewards and outcome in one sum."""
    none: list[Any] = [{}] * len(prompts)
    turns, outcomes = columns.get("turn_rewards", [()] * len(prompts)), columns.get("outcome_rewards", none)
    return [
        sum(x for turn in own for x in turn.values()) + sum(outcome.values())
        for own, outcome in zip(turns, outcomes, strict=True)
    ]


def task_messages(environment: Environment) -> list[dict[str, str]]:
    """What an environment says first, as the messages of a TRL dataset."""
    return [{"role": message.role, "content": message.content} for message in environment.start()]


def task_rows(tasks: Sequence[Task], make_environment: Callable[[Task], Environment]) -> Dataset:
    """TRL's dataset of tasks: prompt, id, and the accepted answers for reward functions."""
    return Dataset.from_list(
        [
            {"prompt": task_messages(make_environment(task)), "task": task.id, "answers": list(task.answers)}
            for task in tasks
        ]
    )


def environment_arguments(setting: Setting, *, engine: Ends = "own", tasks: int | None = None) -> dict[str, Any]:
    """A setting's questions, environments and rewards as arguments of `TurnGRPOTrainer`.

    `tasks` takes the first so many training questions.
    """
    config, chosen = setting.config, setting.train[:tasks]
    return {
        "train_dataset": task_rows(chosen, setting.environment),
        "reward_funcs": [rollout_return],
        "rollout_func": EnvironmentRollouts(
            chosen,
            setting.environment,
            setting.scored,
            max_turn_tokens=config.max_turn_tokens,
            max_turns=config.max_turns,
            engine=engine,
            seed=config.seed,
        ),
    }


def trainer_chat(trainer: GRPOTrainer) -> Chat:
    """Our chat over a copy of the trainer's tokenizer. Raises RunError where it is not ChatML's."""
    from tokenizers import Tokenizer as Backend

    backend = getattr(trainer.processing_class, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            "the tokenizer must be a fast one (tokenizer.json); the trainer's is not; take a checkpoint that has it"
        )
    return Chat(BPETokenizer(Backend.from_str(backend.to_str())))


def _prompt_key(prompt: Any) -> str:
    """Messages as a text that is equal for equal ones."""
    return (
        repr([(message["role"], message["content"]) for message in prompt]) if not isinstance(prompt, str) else prompt
    )


def _check_own_engine(trainer: GRPOTrainer) -> None:
    """ConfigError where the in-process engine would draw from something else than the policy that TRL trains."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "engine 'own' must have whole weights on every process; FSDP and DeepSpeed do not; take engine='trl'"
        )
    if trainer.use_vllm:
        raise ConfigError("engine 'own' must go without vLLM; use_vllm is on; take engine='trl', or set it to False")
    altered = {"top_p": (1.0, trainer.top_p), "repetition_penalty": (1.0, trainer.repetition_penalty)}
    altered |= {"top_k": (0, trainer.top_k or 0), "min_p": (0.0, trainer.min_p or 0.0)}
    for name, (plain, value) in altered.items():
        if value != plain:
            raise ConfigError(
                f"engine 'own' must draw from the policy's distribution; {name} is {value}; set it to {plain}, or take "
                "engine='trl'"
            )


class TRLEngine:
    """TRL's own generation as an engine for our rollouts: `generate`, or vLLM where the trainer has it.

    Requests that wait at the same time are one batch. Generation is collective under vLLM, FSDP and DeepSpeed: every
    process takes part in every batch until none has rollouts left, with a prompt of its own that is thrown away.
    """

    policy_version = 0

    def __init__(self, trainer: GRPOTrainer, end_id: int) -> None:
        self.trainer, self.end_id = trainer, end_id
        own = inspect.signature(trainer._generate_single_turn).parameters
        self._options = {"num_generations": 1} if "num_generations" in own else {}
        if not self._options and trainer.use_vllm and trainer.vllm_mode == "server":
            raise ConfigError(
                "engine 'trl' must have vllm_mode='colocate' with this release of TRL, whose server mode takes every "
                "num_generations-th prompt of a turn alone; set it, or pip install -U trl"
            )
        self._waiting: list[tuple[list[int], Sampling, asyncio.Future[Completion]]] = []
        self._filler: list[int] = [end_id]

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: Hashable) -> Completion:
        """A completion, drawn with the trainer's sampling options; the seed is TRL's."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((list(prompt_ids), sampling, future))
        return await future

    def release(self, session: Hashable) -> None:
        """Nothing is kept between turns."""

    async def with_others(self, rollouts: "asyncio.Future[list[Rollout]]") -> list[Rollout]:
        """The rollouts' results; draws batch after batch, together with the other processes."""
        while True:
            await self._settled(rollouts)
            active = [bool(self._waiting)]
            if not any(gather_object(active)):
                return await rollouts
            self._draw()

    async def _settled(self, rollouts: "asyncio.Future[list[Rollout]]") -> None:
        """Until no rollout comes with a further request by itself; tools that take time are waited for a little."""
        quiet = 0
        while not rollouts.done() and (quiet < 3 or not self._waiting):
            before = len(self._waiting)
            await asyncio.sleep(0.001 if not self._waiting else 0)
            quiet = quiet + 1 if len(self._waiting) == before else 0

    def _draw(self) -> None:
        batch, self._waiting = self._waiting, []
        prompts = [ids for ids, _, _ in batch] or [self._filler]
        self._filler = prompts[0]
        budget = max((sampling.max_tokens for _, sampling, _ in batch), default=1)
        drawn, logprobs = self._generated(prompts, budget)
        for i, (_, sampling, future) in enumerate(batch):
            ids = tuple(drawn[i])[: sampling.max_tokens]
            own = tuple(logprobs[i])[: len(ids)] if logprobs else (0.0,) * len(ids)
            ended = bool(ids) and ids[-1] == self.end_id
            future.set_result(Completion(token_ids=ids, logprobs=own, finish="stop" if ended else "length"))

    def _generated(self, prompts: list[list[int]], budget: int) -> tuple[list[list[int]], list[list[float]] | None]:
        """TRL's completions, with a turn's budget in the place of a whole completion's."""
        trainer: Any = self.trainer
        holder = trainer.vllm_generation if trainer.use_vllm else trainer.generation_config
        name = "max_completion_length" if trainer.use_vllm else "max_new_tokens"
        whole = getattr(holder, name)
        setattr(holder, name, budget)
        try:
            return trainer._generate_single_turn(prompts, None, {}, **self._options)[:2]
        finally:
            setattr(holder, name, whole)


# ----------------------------------------------------------------- the policies that ship, with TRL's own tools


def response_template(protocol: ProtocolName) -> dict[str, Any]:
    """How transformers reads a message of a tag protocol, so that TRL's own tool loop finds its calls.

    A call that cannot be read is text to TRL, and ends the rollout; our environments answer it with an error.
    """
    form = protocol_named(protocol)
    called: dict[str, Any] = {"name": "{content.name}", "arguments": "{content.args}"}
    if protocol == "search":
        called = {"name": search_tags.TOOL_NAME, "arguments": {search_tags.ARGUMENT: "{content}"}}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": f"{START}assistant\n",
        "fields": {
            "reasoning_content": {
                "open": f"<{form.thinking}>",
                "close_pattern": rf"</{form.thinking}>\s*",
                "content": "text",
            },
            "tool_calls": {
                "open": f"<{form.calling}>",
                "close_pattern": rf"</{form.calling}>\s*",
                "repeats": True,
                "content": "json" if protocol == "tools" else "text",
                "transform": {"type": "function", "function": called},
            },
            "content": {"close_pattern": rf"{re.escape(END)}\s*", "content": "text"},
        },
    }


def tool_tokenizer(folder: Any, *, protocol: ProtocolName = "tools") -> Any:
    """The tokenizer of a checkpoint of ours for TRL's own tool loop, in a tag protocol."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, padding_side="left", local_files_only=True, trust_remote_code=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("result>", f"{protocol_named(protocol).returned}>")
    tokenizer.response_template = response_template(protocol)
    return tokenizer
