"""Rewards of a rollout: named components per turn and for the outcome.

The built-in components are those of arXiv 2505.11821: of version 1 and appendix E of version 2, with
their constants as `PAPER_WEIGHTS`, and of the search agent in section 5.2 of version 2, with theirs as
`SEARCH_WEIGHTS`. A component pays its value times its weight; all values but `search_penalty`'s lie in
[0, 1]. A user's own are functions in a Python file, named `turn_...` or `outcome_...`. Where a judge was
asked (see `judge`), what it said is the components `judge_turn` and `judge_outcome`. What an environment itself
pays is components by the environment's names, such as `environment`: of a turn where the rollout goes on, of the
outcome where it ends.
"""

import dataclasses
import inspect
import itertools
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from turnwise import metrics
from turnwise.errors import ConfigError, InputError, NotFinite, described, unknown_name
from turnwise.protocols import PROTOCOLS, ProtocolName, TagProtocol, is_well_formed, protocol_named
from turnwise.tool_files import load_module, public_functions
from turnwise.types import Rollout, Task, Turn

RewardFunction = Callable[[Task, Rollout], Any]
"""A user's `turn_...` function gives one number or None per turn, an `outcome_...` one number."""

PAPER_WEIGHTS: Mapping[str, float] = {
    "tool_execution": 0.2,
    "answer_in_results": 0.5,
    "answer_presence": 0.5,
    "exact_match": 1.0,
    "xml_format": 0.2,
    "tag_usage": 0.2,
}
"""The paper's six components and what each is worth; the first two belong to turns."""
SEARCH_WEIGHTS: Mapping[str, float] = {
    "retrieval": 0.3,
    "turn_format": 0.1,
    "turn_format_broken": -0.2,
    "search_penalty": -0.1,
    "correct": 1.0,
    "wrong": 0.2,
    "invalid": -1.0,
}
"""The search agent's seven (version 2, section 5.2); the first four belong to the turns before the last."""
OWN_FORMAT_WEIGHTS: Mapping[str, float] = {
    name: weight for name, weight in PAPER_WEIGHTS.items() if name not in ("xml_format", "tag_usage")
}
"""Those of a model's own format, which has no tags to be paid for."""
DEFAULT_WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "tools": PAPER_WEIGHTS,
    "search": SEARCH_WEIGHTS,
    "native": OWN_FORMAT_WEIGHTS,
    **{name: OWN_FORMAT_WEIGHTS for name, protocol in PROTOCOLS.items() if protocol.own_format},
}
"""What each protocol's rollouts are paid unless the configuration says otherwise."""
BUILT_IN = (*PAPER_WEIGHTS, *SEARCH_WEIGHTS)
"""Every built-in component; each can be had under both protocols."""

JUDGED = ("judge_turn", "judge_outcome")
"""The components that a judge's scores are."""
OF_ENVIRONMENT = ("environment", "success")
"""What an environment pays unless it names it otherwise, and 1 where it says that the task is solved."""
ENVIRONMENT_WEIGHTS: Mapping[str, float] = {"environment": 1.0}
"""What the rollouts of an environment from elsewhere are paid unless the configuration says otherwise."""
OF_RECORDS = ("tool_execution", "answer_in_results", "answer_presence", "exact_match")
"""The built-in components that need no tag protocol."""
_TURN_PREFIX, _OUTCOME_PREFIX = "turn_", "outcome_"


def score(
    task: Task,
    rollout: Rollout,
    weights: Mapping[str, float] | None = None,
    *,
    functions: Mapping[str, RewardFunction] | None = None,
    definition: metrics.Definition = "squad",
    protocol: ProtocolName | None = "tools",
) -> Rollout:
    """The rollout with its rewards: weight times value for every component of a nonzero weight.

    `functions` are a user's own, of weight 1 unless `weights` has their name, and so are the scores
    of the rollout's judgement, if it has one, and what the environment paid by names of its own; what
    the judge or the environment left out is absent, and so is what compares with answers where the task
    has none. A built-in component that `weights` does not name is left out; without `weights` they are
    the protocol's default ones, or the environment's rewards alone where `protocol` is None, which has
    no tags to look for. `definition` is that of exact match. An environment's rewards of the last step
    belong to the outcome, except where a token budget cut the rollout off. A rollout that stopped with
    `error` gets no rewards, since what it would have earned is unknown; one that was cut off is scored as
    it stands. Raises ConfigError for an unknown component.
    """
    functions = functions or {}
    judgement = rollout.judgement
    paid = dict.fromkeys(name for turn in rollout.turns for name in turn.rewards)
    if weights is None:
        weights = DEFAULT_WEIGHTS[protocol] if protocol else ENVIRONMENT_WEIGHTS
    kept = _weights(weights, [*functions, *(JUDGED if judgement else ()), *paid])
    if rollout.stop == "error":
        return dataclasses.replace(rollout, turn_rewards=(), outcome_rewards={})
    by_turn, outcome = _built_in_values(task, rollout, definition, protocol)
    if rollout.success is not None:
        outcome["success"] = float(rollout.success)
    ended = rollout.stop != "max_tokens"
    for name in paid:
        values = [turn.rewards.get(name) for turn in rollout.turns]
        by_turn[name] = [*values[:-1], None] if ended else values
        outcome[name] = values[-1] if ended else None
    if judgement and judgement.turn_scores is not None:
        by_turn["judge_turn"] = judgement.turn_scores
    if judgement and judgement.outcome_score is not None:
        outcome["judge_outcome"] = judgement.outcome_score
    for name, function in functions.items():
        if name not in kept:
            continue
        if name.startswith(_TURN_PREFIX):
            by_turn[name] = _turn_values(name, function, task, rollout)
        else:
            outcome[name] = _outcome_value(name, function, task, rollout)
    return dataclasses.replace(
        rollout,
        turn_rewards=tuple(
            {
                name: kept[name] * value
                for name, values in by_turn.items()
                if name in kept and (value := values[k]) is not None
            }
            for k in range(len(rollout.turns))
        ),
        outcome_rewards={name: kept[name] * v for name, v in outcome.items() if name in kept and v is not None},
    )


def _built_in_values(
    task: Task, rollout: Rollout, definition: metrics.Definition, protocol: ProtocolName | None
) -> tuple[dict[str, Sequence[float | None]], dict[str, float | None]]:
    """The built-in components' values by turn and of the outcome, those that the task and the protocol allow."""
    by_turn: dict[str, Sequence[float | None]] = {"tool_execution": [tool_execution(turn) for turn in rollout.turns]}
    outcome: dict[str, float | None] = {}
    if task.answers:
        by_turn["answer_in_results"] = [answer_in_results(turn, task.answers) for turn in rollout.turns]
        outcome["answer_presence"] = answer_presence(task, rollout)
        outcome["exact_match"] = exact_match(task, rollout, definition)
    if protocol:
        form = protocol_named(protocol)
        by_turn |= _search_turn_values(task, rollout, form)
        outcome |= {"xml_format": xml_format(rollout, form), "tag_usage": tag_usage(rollout, form)}
        outcome |= _search_outcome_values(task, rollout, form, definition)
    return by_turn, outcome


def _weights(weights: Mapping[str, float], own: Sequence[str]) -> dict[str, float]:
    """The nonzero weights, those included of components that weigh 1 unless told otherwise."""
    known = dict.fromkeys([*BUILT_IN, *JUDGED, *OF_ENVIRONMENT, *own])
    for name, weight in weights.items():
        if name not in known:
            raise unknown_name("a reward component", name, known)
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of {name} must be finite; got {weight}; give 0 to leave it out")
    return {n: w for n, w in {**dict.fromkeys(own, 1.0), **weights}.items() if w != 0}


# ---------------------------------------------------------------- components of a turn


def tool_execution(turn: Turn) -> float | None:
    """1 where all of the turn's calls were executed without error, 0 where one was not, None without a call.

    A call that could not be read, or that came in the last granted turn, counts as not executed.
    """
    if not turn.action.num_calls:
        return None
    return float(sum(result.error is None for result in turn.results) == turn.action.num_calls)


def answer_in_results(turn: Turn, golds: Sequence[str]) -> float | None:
    """1 where an accepted answer occurs in what one of the turn's calls returned; None without a call.

    A failed call has none in it, whatever its error text says.
    """
    if not turn.action.num_calls:
        return None
    texts = [result.text for result in turn.results if result.error is None]
    return max((metrics.answer_presence(text, golds) for text in texts), default=0.0)


# ----------------------------------------------------------- components of the outcome


def answer_presence(task: Task, rollout: Rollout) -> float:
    """1 where an accepted answer occurs in the final answer; 0 without an answer."""
    if rollout.answer is None:
        return 0.0
    return metrics.answer_presence(rollout.answer, task.answers)


def exact_match(task: Task, rollout: Rollout, definition: metrics.Definition = "squad") -> float:
    """1 where the final answer equals an accepted one under `definition`; 0 without an answer."""
    if rollout.answer is None:
        return 0.0
    return metrics.exact_match(rollout.answer, task.answers, definition)


def xml_format(rollout: Rollout, protocol: TagProtocol = PROTOCOLS["tools"]) -> float:
    """Mean over the policy's messages of 0.4 presence + 0.2 spacing + 0.2 opening + 0.2 closing.

    With the tags of protocol `tools`:

    * presence: half for a complete reasoning block, half for a complete tool or answer block;
    * spacing: there is a complete block, and each has its two tags on lines of their own;
    * opening, closing: the message begins with <reasoning>, and ends with </tool> or </answer>.
    """
    return _mean([_message_format(turn.text, protocol) for turn in rollout.turns])


def _message_format(text: str, protocol: TagProtocol) -> float:
    thinking, calling, answering = _written_tags(protocol)
    blocks = {tag: re.findall(rf"(?s)<{tag}>(.*?)</{tag}>", text) for tag in _written_tags(protocol)}
    inner = [block for found in blocks.values() for block in found]
    spaced = [re.fullmatch(r"(?s)[ \t]*\n.*\n[ \t]*", block) is not None for block in inner]
    presence = (bool(blocks[thinking]) + bool(blocks[calling] or blocks[answering])) / 2
    opening = text.strip().startswith(f"<{thinking}>")
    closing = text.strip().endswith((f"</{calling}>", f"</{answering}>"))
    return (4 * presence + 2 * (bool(inner) and all(spaced)) + 2 * opening + 2 * closing) / 10


def tag_usage(rollout: Rollout, protocol: TagProtocol = PROTOCOLS["tools"]) -> float:
    """Mean over the policy's messages of the share of used tags that open once and close once.

    Of the policy's three tags, those count of which an opening or closing tag occurs; a message that
    uses none gives 0.
    """
    return _mean([_message_tag_usage(turn.text, protocol) for turn in rollout.turns])


def _message_tag_usage(text: str, protocol: TagProtocol) -> float:
    counts = [(text.count(f"<{tag}>"), text.count(f"</{tag}>")) for tag in _written_tags(protocol)]
    return _mean([float(count == (1, 1)) for count in counts if any(count)])


def _written_tags(protocol: TagProtocol) -> tuple[str, str, str]:
    return protocol.thinking, protocol.calling, protocol.answering


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ------------------------------------------------- the search agent: version 2, section 5.2


def _search_turn_values(task: Task, rollout: Rollout, protocol: TagProtocol) -> dict[str, list[float | None]]:
    """The components of the turns before the last; the last turn has none of them, as it is the outcome's.

    retrieval           1 where an accepted answer stands in what this turn's calls returned
    turn_format         1 where the turn is well formed; turn_format_broken 1 where it is not
    search_penalty      calls so far, this one and those that failed included
    """
    before = rollout.turns[:-1]
    formed = [has_turn_format(turn, protocol) for turn in before]
    found = {"retrieval": [answer_in_results(turn, task.answers) or 0.0 for turn in before]} if task.answers else {}
    columns = {
        **found,
        "turn_format": [float(good) for good in formed],
        "turn_format_broken": [float(not good) for good in formed],
        "search_penalty": list(itertools.accumulate(float(max(turn.action.num_calls, 1)) for turn in before)),
    }
    return {name: [*values, None] for name, values in columns.items()}


def _search_outcome_values(
    task: Task, rollout: Rollout, protocol: TagProtocol, definition: metrics.Definition
) -> dict[str, float]:
    """Of `correct`, `wrong` and `invalid` one is 1: by the final format first, and then by exact match."""
    valid = has_final_format(rollout, protocol)
    if not task.answers:
        return {"invalid": float(not valid)}
    right = exact_match(task, rollout, definition)
    return {"correct": valid * right, "wrong": valid * (1.0 - right), "invalid": float(not valid)}


def has_turn_format(turn: Turn, protocol: TagProtocol) -> bool:
    """Whether a turn is thoughts and a call that can be read, each tag once, thoughts first, and nothing else."""
    return turn.action.error is None and is_well_formed(turn.text, protocol, protocol.calling)


def has_final_format(rollout: Rollout, protocol: TagProtocol) -> bool:
    """Whether the rollout ended with thoughts and an answer, each tag once, thoughts first, and nothing else."""
    return rollout.answer is not None and is_well_formed(rollout.turns[-1].text, protocol, protocol.answering)


# --------------------------------------------------------------------- a user's own


def load_rewards(path: str | Path) -> dict[str, RewardFunction]:
    """The reward functions of a Python file, by name; its other functions are its own business.

    `turn_...(task, rollout)` returns a list with a number or None (absent) for every turn,
    `outcome_...(task, rollout)` a number. The file is executed. Raises InputError where it cannot
    be, ConfigError where it has no such function or one that does not take two arguments.
    """
    functions = {
        function.__name__: function
        for function in public_functions(load_module(path))
        if function.__name__.startswith((_TURN_PREFIX, _OUTCOME_PREFIX))
    }
    if not functions:
        raise ConfigError(
            f"{path} must define a reward function; got none; write a function named "
            f"{_TURN_PREFIX}... or {_OUTCOME_PREFIX}... that takes (task, rollout)"
        )
    for name, function in functions.items():
        try:
            inspect.signature(function).bind(None, None)
        except TypeError as error:
            raise ConfigError(
                f"reward function {name} must take (task, rollout); "
                f"got {inspect.signature(function)}; change its parameters"
            ) from error
    return functions


def _turn_values(name: str, function: RewardFunction, task: Task, rollout: Rollout) -> list[float | None]:
    values = _called(name, function, task, rollout)
    if not isinstance(values, list | tuple) or len(values) != len(rollout.turns):
        came = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)
        raise InputError(
            f"reward function {name} must return one number or None per turn; got {came} for "
            f"{len(rollout.turns)} turns; return a list as long as rollout.turns"
        )
    return [None if value is None else _finite(name, value) for value in values]


def _outcome_value(name: str, function: RewardFunction, task: Task, rollout: Rollout) -> float:
    return _finite(name, _called(name, function, task, rollout))


def _called(name: str, function: RewardFunction, task: Task, rollout: Rollout) -> Any:
    try:
        return function(task, rollout)
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"reward function {name} must not fail; got {type(error).__name__}: {text} on task "
            f"{task.id}; correct the function"
        ) from error


def _finite(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        kind = NotFinite if isinstance(value, numbers.Real) else InputError
        raise kind(
            f"reward function {name} must return finite numbers; got {value!r}; "
            "return a float, or None for a turn without this reward"
        )
    return float(value)


def score_or_fail(scored: Callable[[], Rollout], rollout: Rollout) -> Rollout:
    """What `scored` returns; where a reward is not finite, the rollout as failed, without rewards."""
    try:
        return scored()
    except NotFinite as error:
        return dataclasses.replace(rollout, stop="error", error=described(error), turn_rewards=(), outcome_rewards={})
