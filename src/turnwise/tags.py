"""The tag protocol of arXiv 2505.11821: reasoning, tool, result and answer.

A message of the policy holds a reasoning block and then either a tool block or an answer block,
each tag on its own line. What a tool returns comes back in a result block, in a user message.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.tools import Tool, type_text
from turnwise.types import Action, ToolCall, ToolResult

TAGS = ("reasoning", "tool", "result", "answer")
"""The protocol's tags; `result` is the environment's."""

MAX_DEPTH = 64
"""How deep the JSON of a call may be nested: records are copied and written recursively."""

_ANY_TAG = re.compile(rf"<(\s*(?:/\s*)?(?:{'|'.join(TAGS)})\s*)>", re.I)
_DECODER = json.JSONDecoder()
_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
_FORM = '{"name": ..., "args": {...}}'


def system_prompt(tools: Mapping[str, Tool]) -> str:
    """The rules of the protocol and the tools, one line of JSON each."""
    listed = "\n".join(_tool_line(tool) for tool in tools.values())
    return (
        f"Tools:\n{listed}\n"
        "Work in five steps, in this order:\n"
        "1. think in <reasoning>\n"
        '2. call one tool, once, in <tool>: JSON {"name": ..., "args": {...}}\n'
        "3. read its <result>\n"
        "4. think in <reasoning>\n"
        "5. give a short answer in <answer>\n"
        "Close every tag. If the result does not help, answer from what you know."
    )


def _tool_line(tool: Tool) -> str:
    """A tool as one line of JSON: name, description, and each argument's type."""
    args = {name: _argument_text(schema) for name, schema in tool.parameters["properties"].items()}
    line = {"name": tool.name, "description": tool.description, "args": args}
    return json.dumps(line, ensure_ascii=False)


def _argument_text(schema: dict) -> str:
    default = json.dumps(schema["default"], default=str) if "default" in schema else None
    return type_text(schema) + (f", default {default}" if default else "")


def parse(text: str) -> Action:
    """What the policy's message says; never raises.

    The text inside complete reasoning blocks is not looked at. Of the first tool block and the
    first complete answer block, the one that opens first counts. A tool block that is not closed,
    or does not hold JSON with a name and an args object, gives `error`; an answer that is not
    closed is none.
    """
    thoughts = first_block(text, "reasoning")
    reasoning = None if thoughts is None else thoughts.strip()
    acting = without_blocks(text, "reasoning")
    answer = first_block(acting, "answer")
    tool_at = acting.find("<tool>")
    if answer is not None and not 0 <= tool_at < acting.find("<answer>"):
        return Action(reasoning=reasoning, answer=answer.strip())
    if tool_at < 0:
        return Action(reasoning=reasoning)
    call, error = _tool_call(acting[tool_at + len("<tool>") :])
    return Action(reasoning=reasoning, tool_calls=(call,) if call else (), error=error)


def _tool_call(rest: str) -> tuple[ToolCall | None, str | None]:
    """The call in the text that follows a `<tool>`, and why it could not be read."""
    body, closing, _ = rest.partition("</tool>")
    if not closing:
        return None, f"<tool> must be closed by </tool> after {_FORM}"
    body = body.strip(" \t\r\n")
    found = json_value(body, 0)
    if found is None or found[1] != len(body):
        return None, f"the text in <tool> must be JSON of the form {_FORM}"
    data = found[0]
    if not isinstance(data, dict):
        return None, f"the JSON in <tool> must be an object of the form {_FORM}"
    name, args = data.get("name"), data.get("args")
    if not isinstance(name, str):
        return None, f'"name" in <tool> must be a tool\'s name, as in {_FORM}'
    if not isinstance(args, dict):
        return ToolCall(name=name, arguments=None), f'"args" in <tool> must be an object: {_FORM}'
    return ToolCall(name=name, arguments=args), None


def calls_text(calls: Sequence[ToolCall]) -> str:
    """Calls as the policy writes them, a block each."""
    written = ({"name": call.name, "args": dict(call.arguments or {})} for call in calls)
    return "\n".join(f"<tool>\n{json.dumps(call, ensure_ascii=False)}\n</tool>" for call in written)


def first_block(text: str, tag: str) -> str | None:
    """The text in the first complete block of a tag; None without one."""
    _, opened, rest = text.partition(f"<{tag}>")
    inner, closed, _ = rest.partition(f"</{tag}>")
    return inner if opened and closed else None


def blocks(text: str, tag: str) -> list[tuple[int, int]]:
    """Where the complete blocks of a tag stand, their tags included."""
    found: list[tuple[int, int]] = []
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.find(opening)
    while start >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            break
        found.append((start, end + len(closing)))
        start = text.find(opening, found[-1][1])
    return found


def without_blocks(text: str, tag: str) -> str:
    """`text` with a space for every complete block of a tag."""
    kept, end = [], 0
    for start, after in blocks(text, tag):
        kept.append(text[end:start])
        end = after
    return " ".join([*kept, text[end:]])


def json_value(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value that begins at `at`, and where it ends; None where there is none that can be kept.

    It is written to files and tokenised later: no NaN, no infinity, no lone surrogates, no nesting beyond `MAX_DEPTH`.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
        _ENCODER.encode(value).encode()
    except (ValueError, RecursionError):
        return None
    may_be_deep = text.count("{", at, end) + text.count("[", at, end) > MAX_DEPTH
    return None if may_be_deep and _depth(value) > MAX_DEPTH else (value, end)


def _depth(value: Any) -> int:
    """How many objects and lists stand in one another, counted up to one more than `MAX_DEPTH`."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inner = [v for v in level if isinstance(v, dict | list)]
        depth += bool(inner)
        level = [w for v in inner for w in (v.values() if isinstance(v, dict) else v)]
    return depth


def result_text(result: ToolResult) -> str:
    """The environment's message about a tool call.

    Tags of the protocol inside the tool's text get square brackets, so that they mean nothing.
    """
    return "<result>\n" + _ANY_TAG.sub(r"[\1]", result.text) + "\n</result>"
