"""The records that everything else passes around: tasks, messages, turns, rollouts.

Facts are written down when they happen and never re-derived from text. Standard library only.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Stop = Literal["answer", "no_action", "done", "max_turns", "max_tokens", "error"]
"""Why a rollout ended. `answer`: the policy gave its final answer. `no_action`: a message with neither a
tool call nor an answer, which ends the rollout as an answer that is absent. `done`: the environment said that the task
is over. `max_turns`: the last granted turn still called a tool, or left the task open. `max_tokens`: a turn or the
context was cut off. `error`: the environment failed."""
TERMINATED: frozenset[str] = frozenset({"answer", "no_action", "done"})
"""The stops by which a rollout ended itself; every other stop is a truncation."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A tool call as the policy wrote it. `arguments` is None where they could not be read."""

    name: str
    arguments: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a conversation, as text; a model's own chat template writes its calls and tools."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls that an assistant's message makes, where they are not in its text."""
    name: str | None = None
    """The tool that a message of role `tool` comes from."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """On a conversation's first message: the JSON schemas of the tools that the policy is told of."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem: a question, the answers that count as right, and what the reports group by.

    An environment that decides by itself what is right needs no answers; what is measured by them is absent then.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    """What a tool call came to. `error` is None or the error class: `parse`, `unknown_tool`,
    `bad_arguments`, `exception`, `timeout`, `bad_result`, or `unavailable`, which ends the rollout as failed."""

    text: str
    error: str | None = None
    duration_s: float = 0.0
    """Seconds from the call to its result, waiting for a place and new tries included."""
    documents: tuple[str, ...] | None = None
    """Ids of the articles that the call returned, best first; None where the tool does not say."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """What the policy's message says under the protocol.

    At most one of `answer` and `tool_calls` is set; `error` says why a tool call could not be read: the one
    without arguments, or one more, after those in `tool_calls`, of which not even the name could be read.
    """

    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    answer: str | None = None
    error: str | None = None

    @property
    def tool_call(self) -> ToolCall | None:
        """The first call, or None without one."""
        return self.tool_calls[0] if self.tool_calls else None

    @property
    def num_calls(self) -> int:
        """How many calls the message makes, one that could not be read included."""
        nameless = self.error is not None and all(call.arguments is not None for call in self.tool_calls)
        return len(self.tool_calls) + nameless


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One uninterrupted block of policy tokens, and the environment's reply to it."""

    action_ids: tuple[int, ...]
    """Sampled token ids, the closing special token included where the policy sampled it."""
    sampling_logprobs: tuple[float, ...]
    """Log-probability of each sampled token, nats, under the distribution it was drawn from."""
    text: str
    """The sampled tokens as text, without special tokens."""
    action: Action
    results: tuple[ToolResult, ...] = ()
    """What the calls came to, in their order; empty where this turn made none, or none was executed."""
    reply_ids: tuple[int, ...] = ()
    """Token ids that the environment appended after this turn (never sampled)."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """What the environment itself paid for this turn, by name; empty where it pays nothing, which is not 0."""

    @property
    def result(self) -> ToolResult | None:
        """The first result, or None without one."""
        return self.results[0] if self.results else None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a judge said of a rollout. What it was not asked for, or gave no valid reply to, is None."""

    turn_scores: tuple[float, ...] | None = None
    """One score per turn, in [-1, 1]."""
    outcome_score: float | None = None
    """The final answer's score, in [0, 1]."""
    cached: bool = False
    """Whether no request was made: the replies are those to equal questions, of this step or kept on disk."""
    retried: int = 0
    """Requests beyond the first ones: after failures of the connection or server, and after unusable replies."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    duration_s: float = 0.0
    """Time from the first request to the last reply, pauses included."""
    error: str | None = None
    """Why something that was asked for is absent; None where all is there."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One finished run of a task: its turns in order, and how it ended."""

    task_id: str
    group: int
    """Which group of the step this rollout belongs to."""
    prompt_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    stop: Stop
    policy_version: int = 0
    error: str | None = None
    """With stop `error`: the exception's class and text."""
    turn_rewards: tuple[Mapping[str, float], ...] = ()
    """Named reward components of each turn; a component that a turn does not have is absent, not 0."""
    outcome_rewards: Mapping[str, float] = field(default_factory=dict)
    nodes: tuple[int, ...] = ()
    """Which node of its group's tree each turn is; rollouts that share a turn name the same node. Empty: no tree."""
    judgement: Judgement | None = None
    """What a judge said of it; None where none was asked."""
    success: bool | None = None
    """Whether the environment says that the task was solved; None where it does not say."""
    states: tuple[str, ...] = ()
    """The environment's name for the state before each turn, equal for equal states; empty where it names none."""

    @property
    def terminated(self) -> bool:
        """Whether the rollout ended itself; otherwise a budget or a failure cut it off."""
        return self.stop in TERMINATED

    @property
    def answer(self) -> str | None:
        """The final answer, or None where the rollout gave none."""
        return self.turns[-1].action.answer if self.turns else None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(t.action_ids) + len(t.reply_ids) for t in self.turns)

    def to_json(self) -> str:
        """The rollout as one line of ASCII JSON; `rollout_from_json` reads it back equal."""
        return json.dumps(dataclasses.asdict(self))


def rollout_from_json(line: str) -> Rollout:
    """The rollout that `Rollout.to_json` wrote."""
    data = json.loads(line)
    turns = tuple(_turn(t) for t in data.pop("turns"))
    data["prompt_ids"] = tuple(data["prompt_ids"])
    data["turn_rewards"] = tuple(data["turn_rewards"])
    for name in ("nodes", "states"):  # records of before there were any have none
        data[name] = tuple(data.get(name, ()))
    judgement = data.pop("judgement", None)
    return Rollout(turns=turns, judgement=_judgement(judgement) if judgement else None, **data)


def _judgement(data: dict[str, Any]) -> Judgement:
    scores = data.pop("turn_scores")
    return Judgement(turn_scores=None if scores is None else tuple(scores), **data)


def _turn(data: dict[str, Any]) -> Turn:
    action = data.pop("action")
    calls = _one_or_several(action, "tool_call")
    results = _one_or_several(data, "result")
    for name in ("action_ids", "sampling_logprobs", "reply_ids"):
        data[name] = tuple(data[name])
    return Turn(
        action=Action(tool_calls=tuple(ToolCall(**call) for call in calls), **action),
        results=tuple(_result(result) for result in results),
        **data,
    )


def _one_or_several(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The list under the plural of `name`; records of before a turn had several have one, or null, under `name`."""
    if name in data:
        one = data.pop(name)
        return [] if one is None else [one]
    return data.pop(f"{name}s")


def _result(data: dict[str, Any]) -> ToolResult:
    documents = data.pop("documents", None)
    return ToolResult(documents=None if documents is None else tuple(documents), **data)
