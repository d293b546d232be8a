"""The environment of one rollout: it speaks first, reads the policy's messages and answers them."""

import contextlib
import copy
import dataclasses
import inspect
import random
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from turnwise.errors import ConfigError
from turnwise.protocols import ProtocolName, opening, protocol_named, read_message, reply_messages
from turnwise.tool_objects import ToolSession
from turnwise.tools import Tool, call_tools, capped, error_result, unavailable
from turnwise.types import Action, Message, Stop, Task, ToolResult

LOST = error_result("exception", "the tool did not answer; try again")
"""What the agent sees of a call whose result is lost."""
MOST_CHARS = 1_000_000
"""Most characters of a message or result of an environment; more is cut."""


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
    error: str | None = None
    """With stop `error`: what failed."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """What the environment itself pays for the message, by name, such as `environment`; absent is not 0."""
    success: bool | None = None
    """Whether the task is solved as things stand; None where the environment does not say. A rollout has the last."""

    @property
    def result(self) -> ToolResult | None:
        """The first result, or None without one."""
        return self.results[0] if self.results else None


class Environment(Protocol):
    """One task, played once, in messages; tokens are none of its business.

    It may have four methods more. `use_seed(seed: int)`: called before `start` with the rollout's seed, for what an
    environment draws by chance. `fork() -> Environment`: where rollouts branch, an environment is copied between two
    steps, by this method or else by `copy.deepcopy`; what one copy does afterwards must not show in another.
    `state_key() -> str`: a name of the state that it is in, equal for equal states, for methods that compare turns
    taken in the same state; without it equal replies are taken for equal states. `close()`, async or not: called once
    the rollout is over, however it ended, perhaps more than once.
    """

    def start(self) -> tuple[Message, ...] | Awaitable[tuple[Message, ...]]:
        """The messages that the policy sees before its first turn."""
        ...

    def step(self, text: str) -> Step | Awaitable[Step]:
        """The environment's reaction to the policy's next message."""
        ...


def forked(environment: Environment) -> Environment:
    """A copy of an environment as it stands, which goes on by itself."""
    fork = getattr(environment, "fork", None)
    with _staying():
        return copy.deepcopy(environment) if fork is None else fork()


async def started(environment: Environment) -> tuple[Message, ...]:
    """An environment's first messages, awaited where they must be. TypeError where it says anything else."""
    with _staying():
        messages: Any = environment.start()
        messages = await messages if inspect.isawaitable(messages) else messages
    if not (isinstance(messages, list | tuple) and all(isinstance(message, Message) for message in messages)):
        raise TypeError(f"start() must return a tuple of Message records; got {_shown(messages)}")
    return _bounded(messages)


async def stepped(environment: Environment, text: str) -> Step:
    """An environment's answer to a message, awaited where it must be. TypeError where it is no `Step`."""
    with _staying():
        step: Any = environment.step(text)
        step = await step if inspect.isawaitable(step) else step
    if not isinstance(step, Step):
        raise TypeError(f"step() must return a Step; got {_shown(step)}")
    texts = (*(result.text for result in step.results), *(message.content for message in step.reply))
    if isinstance(step.results, tuple) and isinstance(step.reply, tuple) and all(len(t) <= MOST_CHARS for t in texts):
        return step  # as nearly every one is
    results = tuple(dataclasses.replace(r, text=capped(r.text, MOST_CHARS)) for r in step.results)
    return dataclasses.replace(step, results=results, reply=_bounded(step.reply))


def _bounded(messages: Iterable[Message]) -> tuple[Message, ...]:
    """The messages, each with at most `MOST_CHARS` characters, before anything else is made of them."""
    return tuple(
        dataclasses.replace(m, content=capped(m.content, MOST_CHARS)) if len(m.content) > MOST_CHARS else m
        for m in messages
    )


@contextlib.contextmanager
def _staying() -> Iterator[None]:
    """An environment that calls exit() has failed; it must not end the training."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"it called exit({error.code!r})") from error


def _shown(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


async def closed(environment: Environment) -> None:
    """Lets an environment give back what it holds; that this fails changes nothing of what was played."""
    with contextlib.suppress(Exception):
        done = getattr(environment, "close", lambda: None)()
        if inspect.isawaitable(done):
            await done


def seeded(environment: Environment, seed: int) -> None:
    """Gives an environment its rollout's seed, if it wants one."""
    getattr(environment, "use_seed", lambda seed: None)(seed)


def state_of(environment: Environment) -> str | None:
    """The environment's name of its state, or None where it has none."""
    return getattr(environment, "state_key", lambda: None)()


class TurnLimit:
    """An environment that is left after `max_turns` turns, with stop `max_turns` where it would go on."""

    def __init__(self, environment: Environment, max_turns: int) -> None:
        self._environment = environment
        self._turns_left = max_turns

    def use_seed(self, seed: int) -> None:
        """Hands the rollout's seed on."""
        seeded(self._environment, seed)

    def start(self) -> tuple[Message, ...] | Awaitable[tuple[Message, ...]]:
        """The environment's first messages."""
        return self._environment.start()

    async def step(self, text: str) -> Step:
        """The environment's step, the last one if it is the last that is granted."""
        step = await stepped(self._environment, text)
        self._turns_left -= 1
        return step if step.stop or self._turns_left > 0 else dataclasses.replace(step, stop="max_turns", reply=())

    def fork(self) -> "TurnLimit":
        """A copy with as many turns left."""
        return TurnLimit(forked(self._environment), self._turns_left)

    def state_key(self) -> str | None:
        """The environment's name of its state."""
        return state_of(self._environment)

    async def close(self) -> None:
        """Closes the environment."""
        await closed(self._environment)


class ToolEnvironment:
    """Tool calls and then an answer, in the tags of a protocol, within `max_turns` turns.

    Every turn counts, the answering one included, so a rollout can use `max_turns` - 1 calls. A
    call that fails or cannot be read is answered by an error result and costs its turn. A call in
    the last turn is not executed: the rollout stops with `max_turns`. Protocol `search` says before
    the last turn that it must answer. Each call's result is lost with probability `failures`, by the rollout's seed.
    """

    def __init__(
        self,
        task: Task,
        tools: Mapping[str, Tool],
        *,
        max_turns: int = 2,
        protocol: ProtocolName = "tools",
        failures: float = 0.0,
    ) -> None:
        if max_turns < 1:
            raise ConfigError(f"max_turns must be >= 1; got {max_turns}; 2 allows one tool call and an answer")
        self._protocol = protocol_named(protocol)
        self._protocol.check_tools(tools)
        self._task = task
        self._tools = tools
        self._session = ToolSession(tools, task)
        self._turns_left = max_turns
        self._failures = failures
        self._chance = random.Random(0) if failures else None

    def use_seed(self, seed: int) -> None:
        """What fails by chance is drawn from this seed."""
        self._chance = random.Random(seed) if self._failures else None

    def start(self) -> tuple[Message, ...]:
        """The rules as system message, the question as user message."""
        return opening(self._protocol, self._tools, self._task.question)

    async def step(self, text: str) -> Step:
        """Read the message; run its tool calls, all at once, if a later turn can use the results."""
        if self._turns_left == 0:
            raise RuntimeError("an environment plays one rollout; this one has stopped")
        self._turns_left -= 1
        action = read_message(self._protocol, text, self._tools)
        stop = _stop(action, last=self._turns_left == 0)
        if stop:
            self._turns_left = 0
            return Step(action=action, stop=stop)
        results = self._received(await call_tools(await self._session.tools(), action))
        if lost := unavailable(results):
            self._turns_left = 0
            return Step(action=action, results=results, stop="error", error=lost)
        reply = reply_messages(self._protocol, action, results, last=self._turns_left == 1)
        return Step(action=action, results=results, reply=reply)

    def _received(self, results: tuple[ToolResult, ...]) -> tuple[ToolResult, ...]:
        """The results without those that are lost."""
        chance = self._chance
        if chance is None:
            return results
        return tuple(LOST if chance.random() < self._failures else result for result in results)

    def fork(self) -> "ToolEnvironment":
        """A copy with its own state, and copies of the objects of its tools; what a function remembers, all see."""
        shared = {id(one): one for one in (self._task, self._tools)}
        return copy.deepcopy(self, {**shared, id(self._session): self._session.fork()})

    async def close(self) -> None:
        """Closes the objects of its tools."""
        await self._session.close()


def _stop(action: Action, *, last: bool) -> Stop | None:
    """Why an action ends the rollout, if it does."""
    if action.answer is not None:
        return "answer"
    if not action.num_calls:
        return "no_action"
    return "max_turns" if last else None
