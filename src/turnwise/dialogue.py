"""Playing tasks in messages: an environment, and a speaker that knows no token ids, make a rollout.

The environment is the one of training, and so is the record; what is absent are tokens and log-probabilities. Such a
rollout can be scored, judged and reported, and not learned from. Rollouts to learn from are those of
`turnwise.rollout`, whose tokens are exactly those that were sampled.
"""

import asyncio
import functools
import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from turnwise.chat import call_id
from turnwise.endpoint import Client, EndpointFailure, Reply
from turnwise.env import Environment, Step, closed, started, stepped
from turnwise.errors import described
from turnwise.protocols import TagProtocol, said_text
from turnwise.rollout import MakeEnvironment, finite_rewards, rollout_seed, together
from turnwise.types import Action, Message, Rollout, Stop, Task, ToolCall, Turn


@dataclass(frozen=True, kw_only=True)
class Said:
    """The assistant's next message."""

    message: Message
    """As it stands in the conversation."""
    text: str
    """As the environment reads it: with its calls as the protocol writes them."""
    cut: bool = False
    """Whether a budget of tokens cut it off."""


class Speaker(Protocol):
    """Anything that says a conversation's next message."""

    async def say(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, seed: int) -> Said:
        """The next message of the assistant. Raises EndpointFailure where there is none."""
        ...


class EndpointSpeaker:
    """The model behind an endpoint. `replies` are all that it has said, for their costs.

    Under a protocol of tags everything is text. Under a model's own format the endpoint is told of the tools, and its
    calls come and go in OpenAI's shape.
    """

    def __init__(self, client: Client, pool: ThreadPoolExecutor, protocol: TagProtocol) -> None:
        self._client = client
        self._pool = pool
        self._protocol = protocol
        self.replies: list[Reply] = []

    async def say(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, seed: int) -> Said:
        """One request, made in a thread of the pool. Seeds are cut to 31 bits, which every server takes."""
        tools = [schema for message in messages for schema in message.tools]
        fields = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed % 2**31}
        request = functools.partial(
            self._client.complete, _openai_messages(messages), **fields, **({"tools": tools} if tools else {})
        )
        reply = await asyncio.get_running_loop().run_in_executor(self._pool, request)
        self.replies.append(reply)
        message = Message(role="assistant", content=reply.text, tool_calls=reply.tool_calls if tools else ())
        return Said(message=message, text=said_text(self._protocol, message), cut=reply.finish == "length")


def _openai_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation in OpenAI's shape. A result that answers no call, such as an error's, is the user's."""
    entries: list[dict[str, Any]] = []
    number, waiting = 0, deque[str]()
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            waiting = deque(call_id(number + k) for k in range(len(message.tool_calls)))
            number += len(waiting)
            entry["tool_calls"] = [_call(name, call) for name, call in zip(waiting, message.tool_calls, strict=True)]
        elif message.role == "tool":
            entry |= {"tool_call_id": waiting.popleft()} if waiting else {"role": "user"}
        entries.append(entry)
    return entries


def _call(name: str, call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments or {}), ensure_ascii=False)
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments}}


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
    success: bool | None = None
    error: str | None = None
    try:
        messages = list(await started(environment))
        while stop is None:
            said = await speaker.say(
                messages, temperature=temperature, max_tokens=max_turn_tokens, seed=rollout_seed(seed, len(turns))
            )
            step = Step(action=Action(), stop="max_tokens")
            if not said.cut:
                try:
                    step = await stepped(environment, said.text)
                except Exception as failure:  # whatever a user's environment raises is a fact about this rollout
                    step, error = Step(action=Action(), stop="error"), described(failure)
            error = error or step.error
            stop, success = step.stop, success if step.success is None else step.success
            messages += [said.message, *step.reply]
            turns.append(_turn(said.text, step))
    except EndpointFailure as failure:
        stop, error = "error", f"the endpoint gave no reply: {failure}"
    except Exception as failure:
        stop, error = "error", described(failure)
    finally:
        await closed(environment)
    assert stop is not None
    return Rollout(
        task_id=task.id, group=group, prompt_ids=(), turns=tuple(turns), stop=stop, error=error, success=success
    )


def _turn(text: str, step: Step) -> Turn:
    return Turn(
        action_ids=(),
        sampling_logprobs=(),
        text=text,
        action=step.action,
        results=step.results,
        rewards=finite_rewards(step.rewards),
    )


async def run_dialogues(
    tasks: Sequence[Task],
    make_environment: MakeEnvironment,
    speaker: Speaker,
    *,
    samples: int,
    max_turn_tokens: int,
    temperature: float,
    seed: Sequence[int] = (0,),
) -> list[list[Rollout]]:
    """`samples` rollouts of every task, all at once; one list per task."""
    done = await together(
        [
            run_dialogue(
                task,
                make_environment(task),
                speaker,
                max_turn_tokens=max_turn_tokens,
                temperature=temperature,
                seed=rollout_seed(*seed, group, member),
                group=group,
            )
            for group, task in enumerate(tasks)
            for member in range(samples)
        ]
    )
    return [done[i : i + samples] for i in range(0, len(done), samples)]
