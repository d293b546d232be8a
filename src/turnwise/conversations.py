"""Conversations in the shape of OpenAI's API, as messages that a chat frames.

    read_messages(data)                  messages of a request or of a demonstration, checked
    read_tools(data)                     its tools
    written(protocol, messages, tools)   the messages as the policy's chat takes them

`protocol` is a `TagProtocol`, as `turnwise.protocols.protocol_named` gives it. Under a protocol of tags the tools,
calls and results become text here; under a model's own format its chat template writes them.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from turnwise import formats
from turnwise.errors import InputError
from turnwise.protocols import TagProtocol, reply_text, said_text
from turnwise.tags import json_value
from turnwise.tools import Tool, tool_mapping
from turnwise.types import Message, Role, ToolCall, ToolResult

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""The roles of OpenAI's API, and ours."""


# ------------------------------------------------------------------------------------- reading


def read_messages(data: Any, *, where: str = "messages") -> list[Message]:
    """The messages of a list in the shape of OpenAI's API. InputError, which begins with `where`, for another shape.

    Contents are texts, or lists of parts with text; a call's arguments an object, or the JSON text of one; an
    assistant's `reasoning_content` becomes thoughts before its content. Results stand in the order of the calls that
    they name, as the policy is shown no names.
    """
    if not isinstance(data, list) or not data:
        raise InputError(f"{where} must be a list of messages; got {_shown(data)}; give one message at least")
    messages: list[Message] = []
    names: dict[str, str] = {}
    for number, entry in enumerate(data):
        messages.append(_message(entry, names, f"{where}[{number}]"))
    return _in_order_of_calls(data, messages, where)


def _in_order_of_calls(data: Sequence[Any], messages: Sequence[Message], where: str) -> list[Message]:
    """The messages, with results in the order of their calls. InputError where one is missing between others."""
    out: list[Message] = []
    places: dict[str, int] = {}
    for is_tool, run in itertools.groupby(range(len(messages)), lambda i: messages[i].role == "tool"):
        if not is_tool:
            numbers = list(run)
            out += [messages[i] for i in numbers]
            made = [call.get("id") for call in data[numbers[-1]].get("tool_calls") or ()]
            places = {str(name): k for k, name in enumerate(made) if name}
            continue
        found = sorted((places.get(str(data[i].get("tool_call_id")), len(places)), i) for i in run)
        named = [place for place, _ in found if place < len(places)]
        if named != list(range(len(named))):
            raise InputError(
                f"{where} up to [{max(i for _, i in found)}] must have one result for each call, in any order; got "
                f"those of calls {', '.join(str(place + 1) for place in named)}; correct tool_call_id, or add a result"
            )
        out += [messages[i] for _, i in found]
    return out


def _message(entry: Any, names: dict[str, str], where: str) -> Message:
    """One message; `names` has the names of the calls so far, by their ids."""
    if not isinstance(entry, dict) or entry.get("role") not in ROLES:
        known = ", ".join(ROLES)
        raise InputError(f"{where} must be an object with a role ({known}); got {_shown(entry)}; correct it")
    role = ROLES[entry["role"]]
    given = entry.get("tool_calls") or []
    if not isinstance(given, list) or (given and role != "assistant"):
        raise InputError(f"{where}.tool_calls must be a list, of an assistant; got {_shown(given)}; correct it")
    calls = tuple(_call(call, names, f"{where}.tool_calls[{k}]") for k, call in enumerate(given))
    content = _content(entry.get("content"), where, absent=bool(calls))
    thoughts = entry.get("reasoning_content")
    if role == "assistant" and isinstance(thoughts, str) and thoughts.strip():
        content = f"<{formats.THINK}>\n{thoughts.strip()}\n</{formats.THINK}>\n\n{content}"
    name = entry.get("name") or names.get(str(entry.get("tool_call_id"))) if role == "tool" else None
    return Message(role=role, content=content, tool_calls=calls, name=name if isinstance(name, str) else None)


def _content(content: Any, where: str, *, absent: bool) -> str:
    if content is None and absent:
        return ""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if isinstance(content, str):
        return content
    raise InputError(
        f"{where}.content must be text, or parts with text; got {_shown(content)}; leave out anything else"
    )


def _call(entry: Any, names: dict[str, str], where: str) -> ToolCall:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{where} must have a function with a name; got {_shown(entry)}; correct it")
    if entry.get("id"):
        names[str(entry["id"])] = function["name"]
    given = function.get("arguments", {})
    found = (given, 0) if isinstance(given, dict) else json_value(given.strip(), 0) if isinstance(given, str) else None
    if found is None or not isinstance(found[0], dict) or (isinstance(given, str) and found[1] != len(given.strip())):
        raise InputError(f"{where}.function.arguments must be a JSON object; got {_shown(given)}; correct it")
    return ToolCall(name=function["name"], arguments=found[0])


def read_tools(data: Any, *, where: str = "tools") -> dict[str, Tool]:
    """The tools of a list in the shape of OpenAI's API, by name, to be described, not called. InputError as above."""
    if data is None:
        return {}
    if not isinstance(data, list):
        raise InputError(f"{where} must be a list of tools; got {_shown(data)}; correct it")
    return tool_mapping(_tool(entry, f"{where}[{number}]") for number, entry in enumerate(data))


def _tool(entry: Any, where: str) -> Tool:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{where} must have a function with a name; got {_shown(entry)}; correct it")
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties", {}) if isinstance(parameters, dict) else None
    if not isinstance(properties, dict) or not all(isinstance(schema, dict) for schema in properties.values()):
        raise InputError(
            f"{where}.function.parameters must be a JSON schema of an object; got {_shown(parameters)}; correct it"
        )
    return Tool(
        name=function["name"],
        description=str(function.get("description") or ""),
        parameters={"type": "object", "required": [], **parameters, "properties": properties},
        function=_not_here,
        result_cap=2000,
    )


def _not_here(**_: Any) -> str:
    raise RuntimeError("a tool of a request is called by who sent it")


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


# ------------------------------------------------------------------------------------ prompts


def written(protocol: TagProtocol, messages: Sequence[Message], tools: Mapping[str, Tool]) -> list[Message]:
    """The conversation as its chat takes it: with the tools, and under a protocol of tags as text alone.

    There the rules and the tools stand in the system message, above what it says already, calls in the assistant's
    text, and results in a user's message.
    """
    if protocol.own_format:
        first, *rest = messages
        return [dataclasses.replace(first, tools=formats.tool_schemas(tools)), *rest]
    return _merged(protocol, _with_rules(protocol, messages, tools))


def _with_rules(protocol: TagProtocol, messages: Sequence[Message], tools: Mapping[str, Tool]) -> list[Message]:
    if not tools:
        return list(messages)
    rules, (first, *rest) = protocol.system_prompt(tools), messages
    if first.role == "system":
        return [Message(role="system", content=f"{rules}\n\n{first.content}"), *rest]
    return [Message(role="system", content=rules), *messages]


def _merged(protocol: TagProtocol, messages: Sequence[Message]) -> list[Message]:
    """The messages as text, with the results of one turn in one message."""
    out: list[Message] = []
    results: list[ToolResult] = []
    for message, after in zip(messages, [*messages[1:], None], strict=True):
        if message.role == "tool":
            results.append(ToolResult(text=message.content))
            if after is None or after.role != "tool":
                out.append(Message(role="user", content=reply_text(protocol, results, last=False)))
                results = []
        else:
            out.append(Message(role=message.role, content=said_text(protocol, message)))
    return out
