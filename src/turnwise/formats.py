"""The models' own formats of tool calls: how each is written and read.

    hermes        <tool_call>⏎{"name": ..., "arguments": {...}}⏎</tool_call>            Hermes, Qwen2.5, Qwen3
    llama3        {"name": ..., "parameters": {...}}, alone or after <|python_tag|>     Llama 3.1, 3.2, 3.3
    qwen3-coder   <tool_call>⏎<function=...>⏎<parameter=...>⏎value⏎</parameter>⏎</function>⏎</tool_call>

Thoughts stand before `</think>`. A message without a call is the answer: the text in its <answer> block where it has
one, else all of it. The parsers take any text, never raise, and read each character a bounded number of times.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.tags import first_block, json_value
from turnwise.tools import Schema, Tool, argument_fault
from turnwise.types import Action, ToolCall

THINK, CALL, RESPONSE, ANSWER = "think", "tool_call", "tool_response", "answer"
"""The tags of Hermes, Qwen and Qwen3-Coder, and that of an answer, which is ours."""
PYTHON_TAG = "<|python_tag|>"
"""What Llama 3 may put before a call."""
MOST_LINES = 32
"""In how many lines of JSON a call of Llama 3 is looked for, below other text."""

_OPEN, _CLOSE = f"<{CALL}>", f"</{CALL}>"
_END_THINK = f"</{THINK}>"
_SPACE = re.compile(r"\s*")
_HERMES_FORM = f'{_OPEN}{{"name": ..., "arguments": {{...}}}}{_CLOSE}'
_LLAMA_FORM = '{"name": ..., "parameters": {...}}'
_CODER_FORM = f"{_OPEN}<function=name><parameter=key>value</parameter></function>{_CLOSE}"

Calls = tuple[tuple[ToolCall, ...], str | None]
"""The calls that could be read, up to the first that could not, and why that one could not."""


def system_prompt(tools: Mapping[str, Tool]) -> str:
    """What the system message says under a model's own format; its chat template adds the tools."""
    search = "Look up what you do not know with the tools. " if tools else ""
    return f"Answer the question. {search}When you know it, give a short answer in <{ANSWER}> and </{ANSWER}>."


def tool_schemas(tools: Mapping[str, Tool]) -> tuple[dict[str, Any], ...]:
    """The tools as chat templates take them."""
    return tuple(
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": _plain(tool.parameters)},
        }
        for tool in tools.values()
    )


def _plain(schema: Schema) -> Any:
    """A schema in JSON's types: a default of another type becomes its text."""
    return json.loads(json.dumps(schema, default=str))


# ---------------------------------------------------------------------------- thoughts and answers


def thoughts_and_rest(text: str) -> tuple[str | None, str]:
    """The thoughts, and what follows them. Thoughts that are not closed are all there is.

    The opening tag may be missing: some templates write it themselves.
    """
    before, closed, rest = text.partition(_END_THINK)
    opening = f"<{THINK}>"
    if not closed and not text.lstrip().startswith(opening):
        return None, text
    return before.lstrip().removeprefix(opening).strip() or None, rest


def answer_in(text: str) -> str | None:
    """The answer that a message without calls gives; None where it is blank."""
    block = first_block(text, ANSWER)
    return block.strip() if block is not None else text.strip() or None


def _action(reasoning: str | None, rest: str, calls: Calls) -> Action:
    found, error = calls
    answer = None if found or error else answer_in(rest)
    return Action(reasoning=reasoning, tool_calls=found, answer=answer, error=error)


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _named(data: Any, keys: Sequence[str], form: str) -> tuple[ToolCall | None, str | None]:
    """The call in a JSON value whose arguments are under one of `keys`, and why it is none."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return None, f'a call must be an object with the "name" of a tool: {form}'
    arguments = next((data[key] for key in keys if key in data), None)
    if not isinstance(arguments, dict):
        return ToolCall(name=data["name"], arguments=None), f'"{keys[0]}" must be an object: {form}'
    return ToolCall(name=data["name"], arguments=arguments), None


# ------------------------------------------------------------------------------------------ Hermes


def hermes_parse(text: str) -> Action:
    """What a message says in the format of Hermes and Qwen; never raises.

    Every `<tool_call>` holds one JSON object; the last may end with the message instead of its closing tag. What
    stands between the blocks is not looked at.
    """
    reasoning, rest = thoughts_and_rest(text)
    return _action(reasoning, rest, _hermes_calls(rest))


def _hermes_calls(text: str) -> Calls:
    calls: list[ToolCall] = []
    at = text.find(_OPEN)
    while at >= 0:
        found = json_value(text, _skip_space(text, at + len(_OPEN)))
        if found is None:
            return tuple(calls), f"the text in {_OPEN} must be JSON: {_HERMES_FORM}"
        data, end = found
        end = _skip_space(text, end)
        if not (text.startswith(_CLOSE, end) or end == len(text)):
            return tuple(calls), f"{_OPEN} must hold one JSON object and be closed: {_HERMES_FORM}"
        call, error = _named(data, ("arguments",), _HERMES_FORM)
        calls += [call] if call else []
        if error:
            return tuple(calls), error
        at = text.find(_OPEN, end)
    return tuple(calls), None


def hermes_text(calls: Sequence[ToolCall]) -> str:
    """Calls in the format of Hermes and Qwen."""
    return "\n".join(f"{_OPEN}\n{_call_json(call, 'arguments')}\n{_CLOSE}" for call in calls)


def _call_json(call: ToolCall, key: str) -> str:
    arguments = json.dumps(dict(call.arguments or {}), ensure_ascii=False)
    return f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "{key}": {arguments}}}'


# ----------------------------------------------------------------------------------------- Llama 3

_BUILT_IN = re.compile(r"\s*([A-Za-z_]\w*)\.call\(")
_BUILT_IN_ARGUMENT = re.compile(r'([A-Za-z_]\w*)="')


def llama3_parse(text: str) -> Action:
    """What a message says in the format of Llama 3; never raises.

    A call is a JSON object that begins the message or a line of it; calls follow one another, with `;` between them or
    not, up to the end. After `<|python_tag|>`, `name.call(key="value")` is a call too. A message that begins with `{`
    and is no call gives `error`; such a line further down is text.
    """
    reasoning, rest = thoughts_and_rest(text)
    at = rest.find(PYTHON_TAG)
    if at >= 0:
        body = rest[at + len(PYTHON_TAG) :]
        built_in = _built_in_call(body)
        return _action(reasoning, rest, ((built_in,), None) if built_in else _llama_calls(body, 0))
    start = _skip_space(rest, 0)
    if rest.startswith("{", start):
        return _action(reasoning, rest, _llama_calls(rest, start))
    at = _call_line(rest)
    return _action(reasoning, rest, _llama_calls(rest, at) if at >= 0 else ((), None))


def _call_line(text: str) -> int:
    """Where the first line stands that begins with a whole call; -1 where none of the first with a `{` does."""
    at = text.find("\n{")
    for _ in range(MOST_LINES):
        if at < 0:
            break
        found = json_value(text, at + 1)
        if found is not None and _named(found[0], ("parameters", "arguments"), "")[1] is None:
            return at + 1
        at = text.find("\n{", found[1] if found else at + 1)
    return -1


def _llama_calls(text: str, at: int) -> Calls:
    calls: list[ToolCall] = []
    while True:
        found = json_value(text, _skip_space(text, at))
        if found is None:
            return tuple(calls), f"a call must be JSON alone: {_LLAMA_FORM}"
        call, error = _named(found[0], ("parameters", "arguments"), _LLAMA_FORM)
        calls += [call] if call else []
        if error:
            return tuple(calls), error
        at = _skip_space(text, found[1])
        if text.startswith(";", at):
            at = _skip_space(text, at + 1)
        if at == len(text):
            return tuple(calls), None


def _built_in_call(text: str) -> ToolCall | None:
    """The call in `name.call(key="value", ...)`, whose values are not escaped; None where it is none."""
    opening = _BUILT_IN.match(text)
    body = text.rstrip()
    if opening is None or not body.endswith(")"):
        return None
    arguments: dict[str, str] = {}
    at, end = opening.end(), len(body) - 1
    while at < end:
        key = _BUILT_IN_ARGUMENT.match(body, at, end)
        if key is None:
            return None
        stop = _value_end(body, key.end(), end)
        if stop < 0:
            return None
        arguments[key[1]] = body[key.end() : stop]
        at = stop + len('", ')
    return ToolCall(name=opening[1], arguments=arguments) if _encodable(arguments) else None


def _value_end(body: str, at: int, end: int) -> int:
    """Where an unescaped value ends: before the quote that another argument or the end follows; -1 without one."""
    stop = body.find('", ', at, end)
    while stop >= 0 and not _BUILT_IN_ARGUMENT.match(body, stop + len('", '), end):
        stop = body.find('", ', stop + 1, end)
    if stop >= 0:
        return stop
    return end - 1 if end > at and body[end - 1] == '"' else -1


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


def llama3_text(calls: Sequence[ToolCall]) -> str:
    """Calls in the format of Llama 3."""
    return "; ".join(_call_json(call, "parameters") for call in calls)


# ------------------------------------------------------------------------------------- Qwen3-Coder

_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_VALUE_ENDS = re.compile("|".join((_END_PARAMETER, _PARAMETER, _END_FUNCTION, _CLOSE)))


def coder_parse(text: str) -> Action:
    """What a message says in the format of Qwen3-Coder; never raises. Arguments are texts (see `typed_call`).

    A call may lack its `<tool_call>`, and at the end of the message any of its closing tags. A value ends before the
    next tag of the format; a line break at each end of it is the format's. What stands between calls is not looked at.
    """
    reasoning, rest = thoughts_and_rest(text)
    return _action(reasoning, rest, _coder_calls(rest))


def _coder_calls(text: str) -> Calls:
    calls: list[ToolCall] = []
    at, bare = text.find(_FUNCTION), text.find(_OPEN)
    while at >= 0:
        if 0 <= bare < at and _skip_space(text, bare + len(_OPEN)) != at:
            break  # a <tool_call> before this one that holds no function
        call, at, error = _coder_call(text, at + len(_FUNCTION))
        calls += [call] if call else []
        if error:
            return tuple(calls), error
        at, bare = text.find(_FUNCTION, at), text.find(_OPEN, at)
    return tuple(calls), f"{_OPEN} must hold a function: {_CODER_FORM}" if bare >= 0 else None


def _coder_call(text: str, at: int) -> tuple[ToolCall | None, int, str | None]:
    """The call whose name begins at `at`, where it ends, and why it could not be read."""
    name, at = _until(text, at, ">")
    if not name.strip() or not _encodable(name):
        return None, at, f"a function must have a name: {_CODER_FORM}"
    arguments: dict[str, str] = {}
    at = _skip_space(text, at)
    while text.startswith(_PARAMETER, at):
        key, at = _until(text, at + len(_PARAMETER), ">")
        end, after = _parameter_end(text, at)
        arguments[key.strip()] = text[at:end].removeprefix("\n").removesuffix("\n")
        at = _skip_space(text, after)
    call = ToolCall(name=name.strip(), arguments=arguments)
    if not _encodable(arguments):
        return ToolCall(name=name.strip(), arguments=None), at, "the arguments must be text without lone surrogates"
    if text.startswith(_END_FUNCTION, at):
        return call, at + len(_END_FUNCTION), None
    if text.startswith(_CLOSE, at) or at == len(text):
        return call, at, None
    return ToolCall(name=name.strip(), arguments=None), at, f"a function must hold parameters alone: {_CODER_FORM}"


def _until(text: str, at: int, end: str) -> tuple[str, int]:
    """The text from `at` to `end`, or to the end of its line, and where what follows begins."""
    line = text.find("\n", at)
    line = len(text) if line < 0 else line
    found = text.find(end, at, line)
    return (text[at:found], found + len(end)) if found >= 0 else (text[at:line], line)


def _parameter_end(text: str, at: int) -> tuple[int, int]:
    """Where a parameter's value ends, and where what follows its closing tag begins."""
    found = _VALUE_ENDS.search(text, at)
    if found is None:
        return len(text), len(text)
    return found.start(), found.end() if found[0] == _END_PARAMETER else found.start()


def coder_text(calls: Sequence[ToolCall]) -> str:
    """Calls in the format of Qwen3-Coder: strings as they are, everything else as JSON."""
    return "\n".join(_coder_text(call) for call in calls)


def _coder_text(call: ToolCall) -> str:
    lines = [_OPEN, f"{_FUNCTION}{call.name}>"]
    for key, value in (call.arguments or {}).items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"{_PARAMETER}{key}>", shown, _END_PARAMETER]
    return "\n".join([*lines, _END_FUNCTION, _CLOSE])


def typed_call(call: ToolCall, parameters: Schema) -> ToolCall:
    """A call whose arguments are texts, with those that its tool does not want as strings in their types.

    A text that can be read as the wanted type becomes its value; any other stays, for the tool's check to refuse.
    """
    if call.arguments is None:
        return call
    schemas = parameters.get("properties", {})
    typed = {key: _typed(value, schemas.get(key, {"type": "string"})) for key, value in call.arguments.items()}
    return ToolCall(name=call.name, arguments=typed)


def _typed(text: Any, schema: Schema) -> Any:
    """The value of a text under a schema; JSON first, and Python's names for what templates print so."""
    if not isinstance(text, str):
        return text
    wanted = {"properties": {"value": schema}, "required": []}
    stripped = text.strip()
    named = {"None": None, "True": True, "False": False}
    candidates = [named[stripped]] if stripped in named else []
    found = json_value(stripped, 0)
    if found is not None and found[1] == len(stripped):
        candidates.append(found[0])
    for value in candidates:
        if not isinstance(value, str) and argument_fault(wanted, {"value": value}) is None:
            return value
    return text
