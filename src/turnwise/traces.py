"""Recorded rollouts as a turn table: a run's own, and a plain JSON-lines format that any tool can write.

One line is one rollout:

    {"group": "q1", "turns": [{"rewards": {"found": 0.5}, "text": "search(...)"}, {}], "outcome": {"right": 1}}

`group` and `turns` must be there; `outcome` holds the named rewards of the whole rollout. A turn may have `rewards`,
`text`, `tokens` (how many the policy sampled), `value` (a critic's, of the state before it), `token_values` (the same
before each sampled token), `anchor` (equal for turns taken in equal states) and `node` (equal for turns that rollouts
of a tree share). A rollout may have `id` and `bootstrap` (the value of the state in which it was cut off). A run's
rollouts.jsonl is read as it is, and so are the traces of verifiers 0.4 (`verifiers.v1`, a `Trace.to_record()` a line):
every sampled message is a turn, rewards are the outcome, named `turn_rewards` in the trace's `info`, one object or null
per turn, those of turns, and credit that its nodes have, one number per sampled token, is kept. Credit can be written
back into them.
"""

import itertools
import json
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turnwise.credit import ESTIMATORS, NEEDS, TOKEN_ESTIMATORS, TokenTable, TurnTable, turn_means, turn_table
from turnwise.credit.table import LARGEST, Turns
from turnwise.errors import InputError
from turnwise.records import Record, read_lines, record_of_line

TURN_FIELDS = ("rewards", "text", "tokens", "value", "token_values", "anchor", "node")
VERIFIERS_FIELDS = ("nodes", "task", "rewards")
"""The fields by which a line is a trace of verifiers."""
RUN_FIELDS = ("step",)
RUN_ROLLOUT_FIELDS = ("task_id", "group", "prompt_ids", "turns", "turn_rewards", "outcome_rewards")
ROLLOUT_FIELDS = ("group", "id", "turns", "outcome", "bootstrap")


@dataclass(frozen=True, kw_only=True)
class TracedTurn:
    """One turn of a recorded rollout; what was not recorded is None."""

    rewards: Mapping[str, float]
    text: str = ""
    tokens: int | None = None
    value: float | None = None
    token_values: tuple[float, ...] | None = None
    anchor: Hashable = None
    node: Hashable = None
    token_advantages: tuple[float, ...] | None = None
    """The credit that the tool which recorded it gave its sampled tokens."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One recorded rollout."""

    id: str
    group: Hashable
    turns: tuple[TracedTurn, ...]
    outcome: Mapping[str, float]
    bootstrap: float | None = None


def read_traces(path: Path) -> list[Trace]:
    """The rollouts of a file, in its order.

    A run's rollouts that failed are left out, and a last line that a killed run left half-written with a warning.
    Raises InputError, with line and field, for a file that cannot be read, holds no rollout, or holds something else.
    """
    traces = []
    for number, record in _whole_records(path):
        place = f"{path.name}:{number}"
        if not has_failed(record):
            traces.append(trace_of(record, place))
    return traces


def has_failed(record: Record) -> bool:
    """Whether a line is a run's rollout that failed: what it would have earned is not known."""
    rollout = record.get("rollout")
    return isinstance(rollout, dict) and rollout.get("stop") == "error" and record.get("advantages") is None


def trace_of(record: Record, place: str) -> Trace:
    """The rollout of a line; `place` names it in errors. Raises InputError where it is none."""
    if "rollout" in record:
        return _of_run(record, place)
    return _of_verifiers(record, place) if is_verifiers(record) else _trace(record, place)


def is_verifiers(record: Record) -> bool:
    """Whether a line is a trace of verifiers."""
    return all(name in record for name in VERIFIERS_FIELDS)


def _whole_records(path: Path) -> Iterator[tuple[int, Record]]:
    """The numbered JSON objects of a file without a last line that is no JSON, where others stand before it."""
    torn, found = None, False
    for number, text in read_lines(path):
        if torn:
            raise torn[1]
        try:
            record = record_of_line(f"{path}:{number}", text)
        except InputError as error:
            if error.__cause__ is None:  # JSON, but no object
                raise
            torn = number, error
            continue
        found = True
        yield number, record
    if torn and found:
        warnings.warn(f"{path.name}:{torn[0]}: a half-written last line was skipped", stacklevel=2)
    elif torn:
        raise torn[1]
    elif not found:
        raise InputError(f"{path} must hold one JSON object a line; it is empty; fill the file")


def traces_table(traces: Sequence[Trace]) -> TurnTable:
    """The turn table of recorded rollouts, with each optional column that all of their turns have."""
    groups: dict[Hashable, int] = {}

    def column(name: str) -> list[list[Any]] | None:
        found = [[getattr(turn, name) for turn in trace.turns] for trace in traces]
        return None if any(entry is None for turns in found for entry in turns) else found

    nodes = column("node")
    if nodes is not None:  # a name counts within its group
        nodes = [[(trace.group, node) for node in found] for trace, found in zip(traces, nodes, strict=True)]
    try:
        return _table(traces, groups, nodes, column)
    except (ValueError, OverflowError) as error:
        raise InputError(f"the rollouts must make a turn table; {error}; rows count the file's turns from 0") from error


def lacking(name: str, traces: Sequence[Trace]) -> list[str]:
    """The fields that a method needs and some turn does not have."""
    if name in TOKEN_ESTIMATORS:
        fields = ["token_values", *(["value"] if name == "vetta" else [])]
    else:
        fields = ["value" if column == "values" else column for column in NEEDS.get(name, ())]
    return [field for field in fields if any(getattr(t, field) is None for trace in traces for t in trace.turns)]


def traces_credit(name: str, traces: Sequence[Trace], table: TurnTable) -> Turns:
    """The advantage of each turn under a method; of methods with one per token the mean over the turn's tokens.

    Raises InputError where the method refuses the rollouts.
    """
    try:
        return _traces_credit(name, traces, table)
    except ValueError as error:
        raise InputError(f"the rollouts must suit {name}; {error}; or leave the method out") from error


def all_credit(traces: Sequence[Trace], table: TurnTable) -> tuple[dict[str, Turns], list[str]]:
    """The advantages under each method whose fields are there, and a note for each that refuses the rollouts."""
    found: dict[str, Turns] = {}
    refused = []
    for name in (*ESTIMATORS, *TOKEN_ESTIMATORS):
        if lacking(name, traces):
            continue
        try:
            found[name] = traces_credit(name, traces, table)
        except InputError as error:
            refused.append(f"{name} is left out: {error}")
    return found, refused


def _traces_credit(name: str, traces: Sequence[Trace], table: TurnTable) -> Turns:
    if name in ESTIMATORS:
        return ESTIMATORS[name](table).advantages
    values = [turn.token_values or () for trace in traces for turn in trace.turns]
    tokens = TokenTable(
        turns=table,
        turn=np.repeat(np.arange(len(values)), [len(own) for own in values]),
        values=np.array([value for own in values for value in own]),
    )
    return turn_means(tokens, TOKEN_ESTIMATORS[name](tokens).advantages)


def recorded_credit(traces: Sequence[Trace]) -> Turns | None:
    """The credit that rollouts were recorded with, a mean over each turn's tokens; None unless all turns have it."""
    given = [turn.token_advantages for trace in traces for turn in trace.turns]
    return None if any(own is None for own in given) else np.array([np.mean(own) for own in given if own is not None])


def verifiers_lines(source: Path, name: str) -> list[str]:
    """The traces of verifiers in a file once more, a line each, with the credit of a method in their sampled nodes.

    Every sampled token has its turn's advantage (`MessageNode.advantages`); nothing else is changed. Raises InputError
    for other rollouts, or where the method cannot take them.
    """
    records = [record for _, record in _whole_records(source)]
    others = [k for k, record in enumerate(records, start=1) if not is_verifiers(record)]
    if others:
        raise InputError(f"{source} must hold traces of verifiers, to write credit into; rollout {others[0]} is none")
    traces = read_traces(source)
    advantages = iter(traces_credit(name, traces, traces_table(traces)).tolist())
    for record, trace in zip(records, traces, strict=True):
        nodes = [node for node in record["nodes"] if node.get("sampled")]
        for node, turn in zip(nodes, trace.turns, strict=True):
            node["advantages"] = [next(advantages)] * (turn.tokens or 0)
    return [json.dumps(record) for record in records]


def _table(
    traces: Sequence[Trace],
    groups: dict[Hashable, int],
    nodes: list[list[Any]] | None,
    column: Callable[[str], list[list[Any]] | None],
) -> TurnTable:
    return turn_table(
        [groups.setdefault(trace.group, len(groups)) for trace in traces],
        [[turn.rewards for turn in trace.turns] for trace in traces],
        [trace.outcome for trace in traces],
        values=column("value"),
        bootstrap=[trace.bootstrap or 0.0 for trace in traces],
        anchors=column("anchor"),
        nodes=nodes,
        tokens=column("tokens"),
    )


def _trace(record: Mapping[str, Any], place: str) -> Trace:
    _check_fields(record, ROLLOUT_FIELDS, place)
    group = record.get("group")
    if isinstance(group, bool) or not isinstance(group, str | int):
        raise _wrong(place, "group", "a text or a whole number", group)
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise _wrong(place, "turns", "a list of at least one turn", turns)
    bootstrap = record.get("bootstrap")
    return Trace(
        id=str(record.get("id", place)),
        group=group,
        turns=tuple(_turn(turn, f"{place}, turn {k}") for k, turn in enumerate(turns)),
        outcome=_rewards(record.get("outcome"), f"{place}, outcome"),
        bootstrap=None if bootstrap is None else _number(bootstrap, place, "bootstrap"),
    )


def _turn(record: Any, place: str) -> TracedTurn:
    if not isinstance(record, dict):
        raise _wrong(place, "a turn", "a JSON object", record)
    _check_fields(record, TURN_FIELDS, place)
    tokens, value, values = record.get("tokens"), record.get("value"), _token_values(record, place)
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise _wrong(place, "tokens", "a whole number of at least 1", tokens)
    for name in ("anchor", "node"):
        if isinstance(record.get(name), bool) or not isinstance(record.get(name), str | int | None):
            raise _wrong(place, name, "a text or a whole number", record[name])
    return TracedTurn(
        rewards=_rewards(record.get("rewards"), f"{place}, rewards"),
        text=str(record.get("text", "")),
        tokens=tokens if values is None else len(values),
        value=None if value is None else _number(value, place, "value"),
        token_values=values,
        anchor=record.get("anchor"),
        node=record.get("node"),
    )


def _token_values(record: Mapping[str, Any], place: str) -> tuple[float, ...] | None:
    values, tokens = record.get("token_values"), record.get("tokens")
    if values is None:
        return None
    if not isinstance(values, list) or not values:
        raise _wrong(place, "token_values", "a list of a number for each sampled token", values)
    if tokens is not None and tokens != len(values):
        raise _wrong(place, "token_values", f"as many numbers as tokens, {tokens}", len(values))
    return tuple(_number(value, place, "token_values") for value in values)


def _of_run(record: Mapping[str, Any], place: str) -> Trace:
    """A line of a run's rollouts.jsonl."""
    rollout = record["rollout"]
    if not isinstance(rollout, dict):
        raise _wrong(place, "rollout", "a JSON object", rollout)
    for where, found, fields in (("line", record, RUN_FIELDS), ("rollout", rollout, RUN_ROLLOUT_FIELDS)):
        lost = [field for field in fields if field not in found]
        if lost:
            raise InputError(
                f"{place} must be a rollout that a run recorded; its {where} has no field {lost[0]!r}; repair it"
            )
    try:
        replies = [rollout["prompt_ids"], *(turn["reply_ids"] for turn in rollout["turns"][:-1])]
        seen = rollout.get("states") or [tuple(ids) for ids in replies]  # equal observations are taken for equal states
        nodes = rollout.get("nodes") or [None] * len(seen)
        values = record.get("baselines", {}).get("value") or [None] * len(seen)
        hash((record["step"], rollout["group"], *seen, *nodes))  # a TypeError where one is a list or an object
        return Trace(
            id=f"{rollout['task_id']} #{place.rpartition(':')[2]}",
            group=(record["step"], rollout["group"]),
            turns=tuple(
                TracedTurn(
                    rewards=_rewards(rewards, place),
                    text=turn["text"],
                    tokens=len(turn["action_ids"]),
                    anchor=observed,
                    node=node,
                    value=None if value is None else _number(value, place, "value"),
                    token_values=token_values,
                )
                for turn, rewards, observed, node, value, token_values in zip(
                    rollout["turns"],
                    rollout["turn_rewards"],
                    seen,
                    nodes,
                    values,
                    _by_turn(record.get("token_values"), rollout, place),
                    strict=True,
                )
            ),
            outcome=_rewards(rollout["outcome_rewards"], place),
        )
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{place} must be a rollout that a run recorded; {type(error).__name__}: {error}; repair or delete the line"
        ) from error


def _of_verifiers(record: Mapping[str, Any], place: str) -> Trace:
    """A trace of verifiers: its sampled messages in their order."""
    try:
        task, nodes = record["task"], record["nodes"]
        sampled = [k for k, node in enumerate(nodes) if node.get("sampled")]
        paid = (record.get("info") or {}).get("turn_rewards") or [None] * len(sampled)
        if len(paid) != len(sampled):
            raise InputError(
                f"{place}: turn_rewards must be one per sampled node, {len(sampled)}; got {len(paid)}; repair the line"
            )
        outcome = {
            name: reward["score"] * reward.get("weight", 1.0)
            for name, reward in record["rewards"].items()
            if reward is not None
        }
        return Trace(
            id=str(record.get("id", place)),
            group=str(task.get("key") or task.get("hash") or json.dumps(task["data"], sort_keys=True)),
            turns=tuple(
                _verifiers_turn(nodes, k, rewards, f"{place}, node {k}")
                for k, rewards in zip(sampled, paid, strict=True)
            ),
            outcome=_rewards(outcome, f"{place}, rewards"),
        )
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{place} must be a trace of verifiers; {type(error).__name__}: {error}; repair or delete the line"
        ) from error


def _verifiers_turn(nodes: Sequence[Mapping[str, Any]], k: int, rewards: Any, place: str) -> TracedTurn:
    node, before = nodes[k], nodes[k].get("parent")
    tokens = sum(node.get("mask") or ())
    if not tokens:
        raise InputError(f"{place} must have a mask of its sampled tokens; it has none; record the traces for training")
    given = node.get("advantages")
    if given is not None and len(given) != tokens:
        raise _wrong(place, "advantages", f"a list of a number for each of {tokens} sampled tokens", given)
    return TracedTurn(
        rewards=_rewards(rewards, place),
        text=_message_text(node["message"]),
        tokens=tokens,
        anchor="" if before is None else json.dumps([nodes[before]["message"][name] for name in ("role", "content")]),
        token_advantages=None if given is None else tuple(_number(value, place, "advantages") for value in given),
    )


def _message_text(message: Mapping[str, Any]) -> str:
    """What a message says, and which tools it calls."""
    calls = [f"{call['name']}({call['arguments']})" for call in message.get("tool_calls") or ()]
    return "\n".join([message["content"] or "", *calls]).strip()


def _by_turn(values: Any, rollout: Mapping[str, Any], place: str) -> list[tuple[float, ...] | None]:
    """A number for each sampled token of a run's rollout, cut into its turns; None where there are none."""
    counts = [len(turn["action_ids"]) for turn in rollout["turns"]]
    if values is None:
        return [None] * len(counts)
    if not isinstance(values, list) or len(values) != sum(counts):
        raise _wrong(place, "token_values", f"a list of a number for each of {sum(counts)} sampled tokens", values)
    ends = itertools.accumulate(counts)
    numbers = [_number(value, place, "token_values") for value in values]
    return [tuple(numbers[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def _rewards(found: Any, place: str) -> dict[str, float]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise _wrong(place, "rewards", "an object of names and numbers", found)
    return {name: _number(value, place, name) for name, value in found.items()}


def _number(value: Any, place: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
        raise _wrong(place, name, f"a finite number within ±{LARGEST:g}", value)
    return float(value)


def _check_fields(record: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    unknown = [name for name in record if name not in known]
    if unknown:
        raise InputError(f"{place} must have fields of {', '.join(known)}; got {unknown[0]!r}; rename or delete it")


def _wrong(place: str, name: str, wanted: str, got: Any) -> InputError:
    return InputError(f"{place}: {name} must be {wanted}; got {json.dumps(got)[:80]}; repair the line")
