"""The environment of one rollout: it speaks first, reads the policy's messages and answers them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from turnwise.errors import ConfigError
from turnwise.protocols import ProtocolName, protocol_named, reply_text
from turnwise.tools import Tool, call_tools
from turnwise.types import Action, Message, Stop, Task, ToolResult


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the environment made of one message of the policy."""

    action: Action
    results: tuple[ToolResult, ...] = ()
    """What the calls came to, in their order; empty where none was executed."""
    reply: tuple[Message, ...] = ()
    """Messages to append before the policy's next turn."""
    stop: Stop | None = None
    """Why the rollout is over; None while it goes on."""

    @property
    def result(self) -> ToolResult | None:
        """The first result, or None without one."""
        return self.results[0] if self.results else None


class Environment(Protocol):
    """One task, played once, in messages; tokens are none of its business.

    Where rollouts branch, an environment is copied between two steps: by its method `fork() -> Environment` where it
    has one, else by `copy.deepcopy`. What one copy does afterwards must not show in another.
    """

    def start(self) -> tuple[Message, ...]:
        """The messages that the policy sees before its first turn."""
        ...

    async def step(self, text: str) -> Step:
        """The environment's reaction to the policy's next message."""
        ...


def forked(environment: Environment) -> Environment:
    """A copy of an environment as it stands, which goes on by itself."""
    fork = getattr(environment, "fork", None)
    return copy.deepcopy(environment) if fork is None else fork()


class ToolEnvironment:
    """Tool calls and then an answer, in the tags of a protocol, within `max_turns` turns.

    Every turn counts, the answering one included, so a rollout can use `max_turns` - 1 calls. A
    call that fails or cannot be read is answered by an error result and costs its turn. A call in
    the last turn is not executed: the rollout stops with `max_turns`. Protocol `search` says before
    the last turn that it must answer.
    """

    def __init__(
        self, task: Task, tools: Mapping[str, Tool], *, max_turns: int = 2, protocol: ProtocolName = "tools"
    ) -> None:
        if max_turns < 1:
            raise ConfigError(f"max_turns must be >= 1; got {max_turns}; 2 allows one tool call and an answer")
        self._protocol = protocol_named(protocol)
        self._protocol.check_tools(tools)
        self._task = task
        self._tools = tools
        self._turns_left = max_turns

    def start(self) -> tuple[Message, ...]:
        """The rules as system message, the question as user message."""
        return (
            Message(role="system", content=self._protocol.system_prompt(self._tools)),
            Message(role="user", content=self._task.question),
        )

    async def step(self, text: str) -> Step:
        """Read the message; run its tool calls, all at once, if a later turn can use the results."""
        if self._turns_left == 0:
            raise RuntimeError("an environment plays one rollout; this one has stopped")
        self._turns_left -= 1
        action = self._protocol.parse(text)
        stop = _stop(action, last=self._turns_left == 0)
        if stop:
            self._turns_left = 0
            return Step(action=action, stop=stop)
        results = await call_tools(self._tools, action)
        reply = reply_text(self._protocol, results, last=self._turns_left == 1)
        return Step(action=action, results=results, reply=(Message(role="user", content=reply),))

    def fork(self) -> "ToolEnvironment":
        """A copy with its own state and the same tools: what a tool itself remembers, all copies see."""
        return copy.deepcopy(self, {id(shared): shared for shared in (self._task, self._tools)})


def _stop(action: Action, *, last: bool) -> Stop | None:
    """Why an action ends the rollout, if it does."""
    if action.answer is not None:
        return "answer"
    if not action.num_calls:
        return "no_action"
    return "max_turns" if last else None
