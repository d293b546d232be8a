"""One request, played: by the whole agent, with its tools; by the policy, whose calls the client executes; or bare.

A policy is served under two names. NAME is the agent. Without tools in the request it works as in training: its own
tools, executed here, as many turns as it was trained with, and then the answer. With tools in the request it takes one
turn, and its calls go back to the client. NAME:raw is the policy alone, one turn, its text as it wrote it: for a
harness that has an environment of its own, such as `turnwise eval --endpoint`.
"""

import dataclasses
import json
import re
import secrets
import uuid
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from turnwise.chat import Chat
from turnwise.config import TrainConfig
from turnwise.conversations import written
from turnwise.engine import Completion, Sampling, WatchedEngine
from turnwise.env import Step, ToolEnvironment
from turnwise.errors import TurnwiseError
from turnwise.protocols import TagProtocol, opening, protocol_named, read_message
from turnwise.rollout import Limits, rollout_seed, run_rollout
from turnwise.serving.shapes import ApiError, ChatRequest, Usage
from turnwise.serving.shown import shown
from turnwise.tools import Tool
from turnwise.types import Action, Message, Rollout, Task, ToolCall, ToolResult

RAW = ":raw"
UNFINISHED = "\ufffd"
"""What a character decodes to whose last bytes are still to come."""

THOUGHTS = re.compile(r"<think>\n(.*?)\n</think>\n\n", re.S)
"""How `read_messages` writes an assistant's `reasoning_content` before its content."""

Tell = Callable[[str, Any], None]
"""Told `content` with a text to append, and `step` with a turn whose calls were executed."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A policy, ready to be asked."""

    name: str
    config: TrainConfig
    chat: Chat
    engine: WatchedEngine
    tools: Mapping[str, Tool]
    limits: Limits

    @property
    def names(self) -> tuple[str, str]:
        """The agent's and the bare policy's."""
        return self.name, self.name + RAW

    @property
    def protocol(self) -> TagProtocol:
        return protocol_named(self.config.protocol)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request came to."""

    content: str
    finish: Literal["stop", "length", "tool_calls"]
    usage: Usage
    reasoning: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """The assistant's message."""
        return {
            "role": "assistant",
            "content": self.content if self.content or not self.tool_calls else None,
            **({"reasoning_content": self.reasoning} if self.reasoning else {}),
            **({"tool_calls": list(self.tool_calls)} if self.tool_calls else {}),
        }


@dataclass(kw_only=True)
class Job:
    """A request that can be played: its prompt fits. `tell` hears of what happens, and must not block."""

    served: Served
    request: ChatRequest
    prompt: tuple[Message, ...]
    prompt_ids: list[int]
    seed: int
    tell: Tell | None = None

    async def run(self) -> Answer:
        """Plays the request. ApiError, 500, where the policy or a tool's environment fails."""
        try:
            if self.request.model.endswith(RAW):
                return await self._one_turn(None)
            if self.request.tools:
                return await self._one_turn(self.served.protocol)
            return await self._agent()
        except TurnwiseError as error:
            raise ApiError(500, f"the policy failed: {error}") from error

    def _line(self, protocol: TagProtocol | None, *, budget: int) -> "_Line":
        return _Line(self.served.engine, self.served.chat, protocol, budget=budget, tell=self.tell)

    @property
    def _temperature(self) -> float:
        asked = self.request.temperature
        return self.served.config.temperature if asked is None else asked

    async def _one_turn(self, protocol: TagProtocol | None) -> Answer:
        """The policy's next message; its calls are the client's affair."""
        limits = self.served.limits
        room = limits.context - len(self.prompt_ids)
        asked = self.request.max_tokens or limits.max_turn_tokens
        line, session = self._line(protocol, budget=min(asked, room)), object()
        sampling = Sampling(temperature=self._temperature, max_tokens=room, seed=rollout_seed(self.seed, 0))
        try:
            completion = await line.generate(self.prompt_ids, sampling, session=session)
        finally:
            line.release(session)
        text = self.served.chat.decode(completion.token_ids)
        usage = Usage(prompt_tokens=len(self.prompt_ids), completion_tokens=len(completion.token_ids))
        if protocol is None:
            return Answer(content=line.close(text, unread=True), finish=completion.finish, usage=usage)
        action = read_message(protocol, text, self.request.tools)
        called = bool(action.tool_calls) and action.error is None and completion.finish == "stop"
        return Answer(
            content=line.close(text, unread=not called),
            finish="tool_calls" if called else completion.finish,
            usage=usage,
            reasoning=action.reasoning,
            tool_calls=[_call(call) for call in action.tool_calls] if called else (),
            extra={"answer": action.answer},
        )

    async def _agent(self) -> Answer:
        """The agent's work up to its answer, in the environment of training."""
        served, config = self.served, self.served.config
        task = Task(id="request", question="", answers=())
        limits = served.limits
        line = self._line(served.protocol, budget=self.request.max_tokens or limits.max_turns * limits.max_turn_tokens)
        environment = _Conversation(
            ToolEnvironment(task, served.tools, max_turns=config.max_turns, protocol=config.protocol),
            self.prompt,
            line,
        )
        rollout = await run_rollout(
            task, environment, line, served.chat, limits=limits, temperature=self._temperature, seed=self.seed
        )
        if rollout.stop == "error":
            raise ApiError(500, f"the agent's tools failed: {rollout.error}")
        last = rollout.turns[-1]
        if rollout.stop == "max_tokens":  # a turn that was cut off is not put to the environment
            line.close(last.text, unread=True)
        return Answer(
            content=line.content,
            finish="stop" if rollout.terminated else "length",
            usage=_usage(rollout),
            reasoning=last.action.reasoning,
            extra={
                "stop": rollout.stop,
                "answer": rollout.answer,
                "steps": [_step(t.text, t.action, t.results) for t in rollout.turns],
            },
        )


def prepared(served: Served, request: ChatRequest) -> Job:
    """The request with its prompt. ApiError where the model is unknown, or the conversation does not fit it."""
    if request.model not in served.names:
        raise ApiError(
            404, f"the model {request.model[:60]!r} does not exist; there is {' and '.join(served.names)}",
            param="model", code="model_not_found",
        )  # fmt: skip
    raw = request.model.endswith(RAW)
    try:
        if request.tools and not raw:
            served.protocol.check_tools(request.tools)
        prompt = _prompt(served, request, raw=raw)
        ids = served.chat.prompt_ids(prompt)
    except TurnwiseError as error:
        raise ApiError(400, str(error), param="messages") from error
    needed = 1 if raw or request.tools else served.limits.max_turn_tokens
    if len(ids) + needed > served.limits.context:
        raise ApiError(
            400,
            f"the conversation has {len(ids)} tokens and must leave room for {needed} in a context of "
            f"{served.limits.context}; shorten it",
            param="messages",
            code="context_length_exceeded",
        )
    seed = secrets.randbelow(2**63) if request.seed is None else request.seed % 2**64
    return Job(served=served, request=request, prompt=tuple(prompt), prompt_ids=ids, seed=seed)


def _prompt(served: Served, request: ChatRequest, *, raw: bool) -> Sequence[Message]:
    """The conversation as the policy sees it; the agent sees the rules and tools that it was trained with."""
    protocol, messages = served.protocol, request.messages
    if raw:
        if request.tools or any(message.role == "tool" or message.tool_calls for message in messages):
            raise ApiError(
                400, f"{request.model} takes text alone; ask {served.name} for calls of tools", param="tools"
            )
        return messages
    messages = [_as_written(protocol, message) for message in messages]
    if request.tools:
        return written(protocol, messages, request.tools)
    rules, *_ = opening(protocol, served.tools, "")
    said = [message.content for message in messages if message.role == "system"]
    rest = [message for message in messages if message.role != "system"]
    if not rest:
        raise ApiError(400, "'messages' must hold a message of a user", param="messages")
    return [dataclasses.replace(rules, content="\n\n".join([rules.content, *said])), *written(protocol, rest, {})]


def _as_written(protocol: TagProtocol, message: Message) -> Message:
    """A message that the client sends back, as the policy wrote it: in a protocol of tags with its own."""
    if protocol.own_format or message.role != "assistant":
        return message
    found = THOUGHTS.match(message.content)
    thoughts, content = (found[1], message.content[found.end() :]) if found else (None, message.content)
    blocks = [(protocol.thinking, thoughts), (protocol.answering, None if message.tool_calls else content)]
    text = "\n".join(f"<{tag}>\n{inside}\n</{tag}>" for tag, inside in blocks if inside is not None)
    return dataclasses.replace(message, content=text)


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments or {}), ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _step(text: str, action: Action, results: Sequence[ToolResult]) -> dict[str, Any]:
    """A turn, as it is reported."""
    return {
        "text": text,
        "reasoning": action.reasoning,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in action.tool_calls],
        "results": [{"text": result.text, "error": result.error} for result in results],
    }


def _usage(rollout: Rollout) -> Usage:
    sampled = sum(len(turn.action_ids) for turn in rollout.turns)
    return Usage(prompt_tokens=rollout.num_tokens - sampled, completion_tokens=sampled)


class _Conversation:
    """The environment of training in a conversation that has begun already; reports each turn to the line."""

    def __init__(self, environment: ToolEnvironment, prompt: tuple[Message, ...], line: "_Line") -> None:
        self._environment = environment
        self._prompt = prompt
        self._line = line

    def start(self) -> tuple[Message, ...]:
        return self._prompt

    async def step(self, text: str) -> Step:
        step = await self._environment.step(text)
        readable = bool(step.action.tool_calls) and step.action.error is None
        self._line.close(text, unread=not readable and step.stop is not None)
        if step.results:
            self._line.say("step", _step(text, step.action, step.results))
        return step


class _Line:
    """The engine as one request sees it: with a budget of tokens over all turns, and an ear to what is drawn."""

    def __init__(
        self, engine: WatchedEngine, chat: Chat, protocol: TagProtocol | None, *, budget: int, tell: Tell | None
    ) -> None:
        self.policy_version = engine.policy_version
        self.content = ""
        self._engine = engine
        self._chat = chat
        self._protocol = protocol
        self._budget = budget
        self._tell = tell
        self._drawn: list[int] = []
        self._given = ""
        """What of the present turn's content has been told."""
        self._thinking = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: Hashable) -> Completion:
        """A turn within what is left of the budget; an empty one where nothing is."""
        if self._budget == 0:
            return Completion(token_ids=(), logprobs=(), finish="length")
        self._drawn, self._given = [], ""
        self._thinking = self._protocol is not None and self._opens_thoughts(prompt_ids)
        sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, self._budget))
        watch = self._hear if self._tell else None
        completion = await self._engine.generate(prompt_ids, sampling, session=session, watch=watch)
        self._budget -= len(completion.token_ids)
        return completion

    def release(self, session: Hashable) -> None:
        self._engine.release(session)

    def close(self, text: str, *, unread: bool) -> str:
        """The content so far, once a turn is over; with `unread`, calls that nobody executes are shown as written."""
        content, calls = self._shown(text, done=True)
        self._give("\n".join(part for part in (content, calls if unread else "") if part))
        return self.content

    def say(self, event: str, value: Any) -> None:
        if self._tell:
            self._tell(event, value)

    def _opens_thoughts(self, prompt_ids: Sequence[int]) -> bool:
        assert self._protocol is not None
        return self._chat.decode(prompt_ids[-16:]).rstrip().endswith(f"<{self._protocol.thinking}>")

    def _shown(self, text: str, *, done: bool) -> tuple[str, str]:
        if self._protocol is None:
            return text, ""
        return shown(self._protocol, text, done=done, thinking=self._thinking)

    def _hear(self, token: int) -> None:
        """A token is drawn: tell what of the content is certain now."""
        self._drawn.append(token)
        text = self._chat.decode(self._drawn)
        self._give(self._shown(text.rstrip(UNFINISHED), done=False)[0])

    def _give(self, content: str) -> None:
        """Append what is new of the turn's content; a blank line stands between those of two turns."""
        new = content[len(self._given) :]
        if not new:
            return
        if not self._given and self.content:
            new = f"\n\n{new}"
        self._given = content
        self.content += new
        self.say("content", new)
