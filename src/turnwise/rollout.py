"""Playing tasks: an environment and an engine make a rollout; many run at once.

Tokens go in and tokens come out. What was sampled is kept as it was sampled; the environment's text is tokenised
once, when it arrives, and appended.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from turnwise.chat import Chat
from turnwise.engine import Completion, Engine, Sampling
from turnwise.env import Environment, Step
from turnwise.errors import InputError
from turnwise.types import Action, Rollout, Stop, Task, Turn

T = TypeVar("T")

MakeEnvironment = Callable[[Task], Environment]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Budgets of a rollout, in tokens."""

    max_turn_tokens: int = 96
    """Most sampled tokens of one turn."""
    context: int
    """Most tokens of the whole conversation."""
    max_turns: int = 1
    """Turns that are granted; replies leave room for those still to come."""


def rollout_seed(*parts: int) -> int:
    """A seed for one rollout's sampling out of the run's seed, the step, the task and the rollout's number.

    Equal parts give equal seeds on every machine, so two runs that differ in their estimator draw alike.
    """
    # The length comes first because numpy draws alike from (1,) and (1, 0).
    return int(np.random.SeedSequence([len(parts), *parts]).generate_state(1, np.uint64)[0])


async def run_rollout(
    task: Task,
    environment: Environment,
    engine: Engine,
    chat: Chat,
    *,
    limits: Limits,
    temperature: float = 1.0,
    seed: int = 0,
    group: int = 0,
) -> Rollout:
    """One task played to its end.

    A failure of the environment is recorded in the rollout (stop `error`, without turns where it could not start); a
    failure of the engine is raised. Every granted turn has room for `max_turn_tokens`: a reply that would take it is
    cut. Raises InputError where the prompt leaves no room for one turn.
    """
    session = object()
    try:
        prompt = tuple(chat.prompt_ids(environment.start()))
    except Exception as failure:  # whatever a user's environment raises is a fact about this rollout
        return Rollout(
            task_id=task.id,
            group=group,
            prompt_ids=(),
            turns=(),
            stop="error",
            error=_described(failure),
            policy_version=engine.policy_version,
        )
    if len(prompt) + limits.max_turn_tokens > limits.context:
        raise InputError(
            f"the prompt of task {task.id!r} must leave room for a turn of {limits.max_turn_tokens} tokens in a "
            f"context of {limits.context}; it has {len(prompt)} tokens; shorten it, or lower max_turn_tokens"
        )
    ids = list(prompt)
    turns: list[Turn] = []
    stop: Stop | None = None
    error: str | None = None
    try:
        while stop is None:
            sampling = Sampling(
                temperature=temperature,
                max_tokens=limits.max_turn_tokens,
                seed=rollout_seed(seed, len(turns)),
            )
            completion = await engine.generate(ids, sampling, session=session)
            text = chat.decode(completion.token_ids)
            if completion.finish == "length":
                turns.append(_turn(completion, text, Step(action=Action())))
                stop = "max_tokens"
                break
            try:
                step = await environment.step(text)
            except Exception as failure:
                turns.append(_turn(completion, text, Step(action=Action())))
                stop, error = "error", _described(failure)
                break
            reply: list[int] = []
            stop = step.stop
            if stop is None:
                used = len(ids) + len(completion.token_ids)
                room = limits.context - used - _reserved(chat, limits, len(turns) + 1)
                reply = chat.reply_ids(step.reply, max_ids=room)
                stop = "max_tokens" if len(reply) > room else None
            turns.append(_turn(completion, text, step, reply if stop is None else []))
            ids += [*completion.token_ids, *reply]
    finally:
        engine.release(session)
    return Rollout(
        task_id=task.id,
        group=group,
        prompt_ids=prompt,
        turns=tuple(turns),
        stop=stop,
        error=error,
        policy_version=engine.policy_version,
    )


def _reserved(chat: Chat, limits: Limits, turns: int) -> int:
    """Tokens for the turns that are granted after `turns` of them, one at least, with empty replies between."""
    to_come = max(1, limits.max_turns - turns)
    return to_come * limits.max_turn_tokens + (to_come - 1) * chat.empty_reply_length


def _described(failure: Exception) -> str:
    """An exception's class and text on one line."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())


def _turn(completion: Completion, text: str, step: Step, reply: Sequence[int] = ()) -> Turn:
    return Turn(
        action_ids=completion.token_ids,
        sampling_logprobs=completion.logprobs,
        text=text,
        action=step.action,
        result=step.result,
        reply_ids=tuple(reply),
    )


def awaited(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, waited for; also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def run_groups(
    tasks: Sequence[Task],
    make_environment: MakeEnvironment,
    engine: Engine,
    chat: Chat,
    *,
    group_size: int,
    limits: Limits,
    temperature: float = 1.0,
    seed: Sequence[int] = (0,),
) -> list[list[Rollout]]:
    """`group_size` rollouts of every task, all at once; one list per task."""
    environments = [[make_environment(task) for _ in range(group_size)] for task in tasks]
    jobs = [
        run_rollout(
            task,
            environments[group][member],
            engine,
            chat,
            limits=limits,
            temperature=temperature,
            seed=rollout_seed(*seed, group, member),
            group=group,
        )
        for group, task in enumerate(tasks)
        for member in range(group_size)
    ]
    try:
        async with asyncio.TaskGroup() as running:
            started = [running.create_task(job) for job in jobs]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    done = [task.result() for task in started]
    return [done[i : i + group_size] for i in range(0, len(done), group_size)]
