"""Playing tasks in messages: an environment, and a speaker that knows no token ids, make a rollout.

The environment is the one of training, and so is the record; what is absent are tokens and log-probabilities. Such a
rollout can be scored, judged and reported, and not learned from. Rollouts to learn from are those of
`turnwise.rollout`, whose tokens are exactly those that were sampled.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from turnwise.endpoint import Client, EndpointFailure, Reply
from turnwise.env import Environment, Step
from turnwise.rollout import MakeEnvironment, described, rollout_seed, together
from turnwise.types import Action, Message, Rollout, Stop, Task, Turn


class Speaker(Protocol):
    """Anything that says a conversation's next message."""

    async def say(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, seed: int) -> Reply:
        """The next message of the assistant. Raises EndpointFailure where there is none."""
        ...


class EndpointSpeaker:
    """The model behind an endpoint. `replies` are all that it has said, for their costs."""

    def __init__(self, client: Client, pool: ThreadPoolExecutor) -> None:
        self._client = client
        self._pool = pool
        self.replies: list[Reply] = []

    async def say(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, seed: int) -> Reply:
        """One request, made in a thread of the pool. Seeds are cut to 31 bits, which every server takes."""
        reply = await asyncio.get_running_loop().run_in_executor(
            self._pool,
            lambda: self._client.complete(
                [{"role": message.role, "content": message.content} for message in messages],
                temperature=temperature,
                max_tokens=max_tokens,
                seed=seed % 2**31,
            ),
        )
        self.replies.append(reply)
        return reply


async def run_dialogue(
    task: Task,
    environment: Environment,
    speaker: Speaker,
    *,
    max_turn_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    group: int = 0,
) -> Rollout:
    """One task played to its end, without token ids.

    A failure of the environment, or of the speaker, is recorded in the rollout: stop `error`. A message that the
    speaker had to cut off stops it with `max_tokens`.
    """
    turns: list[Turn] = []
    stop: Stop | None = None
    error: str | None = None
    try:
        messages = list(environment.start())
        while stop is None:
            reply = await speaker.say(
                messages, temperature=temperature, max_tokens=max_turn_tokens, seed=rollout_seed(seed, len(turns))
            )
            step = Step(action=Action(), stop="max_tokens")
            if reply.finish != "length":
                try:
                    step = await environment.step(reply.text)
                except Exception as failure:  # whatever a user's environment raises is a fact about this rollout
                    step, error = Step(action=Action(), stop="error"), described(failure)
            stop = step.stop
            messages += [Message(role="assistant", content=reply.text), *step.reply]
            turns.append(_turn(reply, step))
    except EndpointFailure as failure:
        stop, error = "error", f"the endpoint gave no reply: {failure}"
    except Exception as failure:
        stop, error = "error", described(failure)
    assert stop is not None
    return Rollout(task_id=task.id, group=group, prompt_ids=(), turns=tuple(turns), stop=stop, error=error)


def _turn(reply: Reply, step: Step) -> Turn:
    return Turn(action_ids=(), sampling_logprobs=(), text=reply.text, action=step.action, results=step.results)


async def run_dialogues(
    tasks: Sequence[Task],
    make_environment: MakeEnvironment,
    speaker: Speaker,
    *,
    samples: int,
    max_turn_tokens: int,
    temperature: float,
    seed: Sequence[int] = (0,),
    told: Callable[[Rollout], None] = lambda rollout: None,
) -> list[list[Rollout]]:
    """`samples` rollouts of every task, all at once; one list per task. `told` hears of each as it ends."""

    async def one(task: Task, group: int, member: int) -> Rollout:
        rollout = await run_dialogue(
            task,
            make_environment(task),
            speaker,
            max_turn_tokens=max_turn_tokens,
            temperature=temperature,
            seed=rollout_seed(*seed, group, member),
            group=group,
        )
        told(rollout)
        return rollout

    done = await together([one(task, g, member) for g, task in enumerate(tasks) for member in range(samples)])
    return [done[i : i + samples] for i in range(0, len(done), samples)]
