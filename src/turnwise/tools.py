"""Tools: typed Python functions that an agent may call.

A tool's JSON schema comes from its signature and its Google-style docstring. Whatever goes wrong in
a call is an observation for the agent, with an error class; it never ends the run.
"""

import asyncio
import importlib.util
import inspect
import json
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from turnwise.errors import ConfigError, InputError, ToolError
from turnwise.types import Action, ToolCall, ToolResult

Schema = dict[str, Any]
ERROR_PREFIX = "Error: "
"""How the text of every failed call begins."""
CUT_MARK = " …"
"""How a text that was cut to a cap ends."""
ERROR_CAP = 400
"""Most characters of an error's text where no tool's own cap applies."""

_TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields?|Examples?|Notes?|References):\s*$", re.M)
_ARGUMENT = re.compile(r"^(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


class Found(str):
    """A tool's text that also says which articles it holds; the agent sees the text alone."""

    documents: tuple[str, ...]
    """Their ids, best first."""

    def __new__(cls, text: str, documents: Iterable[str]) -> "Found":
        found = super().__new__(cls, text)
        found.documents = tuple(documents)
        return found


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the agent may call, and what the agent is told about it."""

    name: str
    description: str
    parameters: Schema
    """JSON schema of the arguments: an object with `properties` and `required`."""
    function: Callable[..., Any]
    """Called with the arguments as keywords; may be a coroutine function."""
    result_cap: int
    """Most characters of a result; longer ones are cut at a word border."""


# ------------------------------------------------------------------- a tool from a function


def tool(function: Callable[..., Any], *, result_cap: int = 2000) -> Tool:
    """The tool of a typed function; its description is the docstring up to the first section.

    Parameters may be str, int, float, bool, list, dict, Literal, Any, and unions of these; one
    with a default is optional. Raises ConfigError where the signature or docstring lacks something.
    """
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise ConfigError(f"a tool must be a named function; got {function!r}; define it with def")
    if result_cap <= len(CUT_MARK):
        raise ConfigError(
            f"result_cap of tool {name!r} must be > {len(CUT_MARK)}; got {result_cap}; "
            "give the most characters of a result"
        )
    doc = inspect.getdoc(function) if function.__doc__ else None
    description = _description(doc or "")
    if not description:
        raise ConfigError(f"tool {name!r} must have a docstring; got none; say in one line what it returns")
    return Tool(
        name=name,
        description=description,
        parameters=_parameters(function, _argument_texts(doc or "")),
        function=function,
        result_cap=result_cap,
    )


def _description(doc: str) -> str:
    """The docstring's text before its first section, on one line."""
    section = _SECTION.search(doc)
    return " ".join(doc[: section.start() if section else len(doc)].split())


def _argument_texts(doc: str) -> dict[str, str]:
    """What the docstring's Args section says of each argument."""
    texts: dict[str, str] = {}
    section, name, indent = "", "", None
    for line in doc.splitlines():
        header = _SECTION.match(line)
        if header:
            section, name, indent = header[1], "", None
            continue
        if section not in ("Args", "Arguments", "Parameters") or not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        entry = _ARGUMENT.match(line.strip()) if depth <= indent else None
        if entry:
            name = entry[1]
            texts[name] = entry[2]
        elif name:
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    return texts


def _parameters(function: Callable[..., Any], texts: Mapping[str, str]) -> Schema:
    """The JSON schema of a function's arguments."""
    name = function.__name__
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:
        raise ConfigError(
            f"tool {name!r} must have annotations that can be read; got {error}; import the types"
        ) from error
    properties: dict[str, Schema] = {}
    required: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"tool {name!r} must take named parameters only; got {str(parameter)!r}; write each parameter out"
            )
        if parameter.name not in hints:
            raise ConfigError(
                f"parameter {parameter.name!r} of tool {name!r} must have a type annotation; "
                "got none; write for example `query: str`"
            )
        schema = _type_schema(hints[parameter.name], f"parameter {parameter.name!r} of {name!r}")
        if parameter.name in texts:
            schema["description"] = texts[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        else:
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    return {"type": "object", "properties": properties, "required": required}


def _type_schema(hint: Any, where: str) -> Schema:
    """The JSON schema of one annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _TYPE_NAMES:
        return {"type": _TYPE_NAMES[hint]}
    if hint is Any:
        return {}
    if hint is type(None):
        return {"type": "null"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type_schema(a, where) for a in arguments]}
    if list in (hint, origin):
        items = {"items": _type_schema(arguments[0], where)} if arguments else {}
        return {"type": "array", **items}
    if dict in (hint, origin):
        if not arguments:
            return {"type": "object"}
        if arguments[0] is str:
            return {"type": "object", "additionalProperties": _type_schema(arguments[1], where)}
    raise ConfigError(
        f"{where} must be str, int, float, bool, list, dict, Literal, Any or a union of them; "
        f"got {hint}; change the annotation"
    )


# --------------------------------------------------------------------------------- a call


async def call_tools(tools: Mapping[str, Tool], action: Action) -> tuple[ToolResult, ...]:
    """The results of a message's calls, which run at once, in the order of the calls.

    A call that could not be read is answered with the action's error, at the end where it has no name.
    """
    unread = error_result("parse", action.error or "no arguments")
    results = await asyncio.gather(
        *(call_tool(tools, call) for call in action.tool_calls if call.arguments is not None)
    )
    done = iter(results)
    answered = [unread if call.arguments is None else next(done) for call in action.tool_calls]
    return (*answered, *[unread] * (action.num_calls - len(answered)))


async def call_tool(tools: Mapping[str, Tool], call: ToolCall) -> ToolResult:
    """The result of a call; failures come back as results with an error class, never as exceptions.

    A tool that is not a coroutine function runs on the event loop's own thread.
    """
    found = tools.get(call.name)
    if found is None:
        known = ", ".join(sorted(tools)) or "none"
        return error_result("unknown_tool", f"no tool is named {_shown(call.name)}; tools: {known}")
    if call.arguments is None:
        return error_result("parse", f"the arguments of {call.name} could not be read")
    fault = argument_fault(found.parameters, call.arguments)
    if fault:
        return error_result("bad_arguments", f"{call.name}: {fault}")
    documents: tuple[str, ...] | None = None
    start = time.perf_counter()
    try:
        value = found.function(**call.arguments)
        if inspect.isawaitable(value):
            value = await value
        documents = value.documents if isinstance(value, Found) else None
        text, error = capped(_encodable(_text(value)), found.result_cap), None
    except ToolError as raised:
        text, error = str(raised), "exception"
    except (Exception, SystemExit) as raised:  # a tool that calls exit() has failed; it must not end the training
        text, error = f"{type(raised).__name__}: {raised}", "exception"
    duration = time.perf_counter() - start
    if error:
        return error_result(error, text, cap=found.result_cap, duration_s=duration)
    return ToolResult(text=text, duration_s=duration, documents=documents)


def error_result(error: str, text: str, *, cap: int = ERROR_CAP, duration_s: float = 0.0) -> ToolResult:
    """A failed call's result: `Error: ` and the reason, on at most `cap` characters."""
    shown = capped(_encodable(ERROR_PREFIX + text), max(cap, len(ERROR_PREFIX)))
    return ToolResult(text=shown, error=error, duration_s=duration_s)


def capped(text: str, cap: int) -> str:
    """`text` in at most `cap` characters: cut at a word border, the cut marked by ` …`."""
    if len(text) <= cap:
        return text
    room = cap - len(CUT_MARK)
    kept = text[:room]
    if not text[room].isspace():
        words = re.match(r"(?s)(.*\S)\s", kept)
        kept = words[1] if words else kept
    return kept.rstrip() + CUT_MARK


def argument_fault(parameters: Schema, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with the arguments, as advice to the agent; None if nothing is."""
    properties = parameters["properties"]
    takes = ", ".join(properties) or "no arguments"
    missing = [name for name in parameters["required"] if name not in arguments]
    if missing:
        return f"argument {missing[0]!r} is missing; it takes: {takes}"
    for name, value in arguments.items():
        if name not in properties:
            return f"unexpected argument {_shown(name)}; it takes: {takes}"
        if not _fits(properties[name], value):
            wanted = type_text(properties[name])
            return f"argument {name!r} must be {wanted}; got {_shown(value)}"
    return None


def type_text(schema: Schema) -> str:
    """A schema's type in a few words, such as `string`, `array of integer` or `"a" or "b"`."""
    if "anyOf" in schema:
        return " or ".join(type_text(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if "items" in schema:
        return f"array of {type_text(schema['items'])}"
    return schema.get("type", "any value")


def _fits(schema: Schema, value: Any) -> bool:
    """Whether a JSON value fits a schema that `_type_schema` made."""
    if "anyOf" in schema:
        return any(_fits(option, value) for option in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(option) and value == option for option in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items", {})
        return isinstance(value, list) and all(_fits(items, item) for item in value)
    if kind == "object":
        values = schema.get("additionalProperties", {})
        return isinstance(value, dict) and all(_fits(values, item) for item in value.values())
    accepted: dict[str | None, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "null": (type(None),),
        None: (object,),
    }
    if isinstance(value, bool) and kind in ("integer", "number"):
        return False
    return isinstance(value, accepted[kind])


def _text(value: object) -> str:
    """A tool's return value as text: strings as they are, the rest as JSON where it can be."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which no file or tokenizer accepts, replaced by `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _shown(value: object) -> str:
    """A value of the agent's as short JSON."""
    return capped(json.dumps(value, ensure_ascii=False, default=str), 60)


# ------------------------------------------------------------------------ tools from a file


def load_tools(path: str | Path) -> dict[str, Tool]:
    """The tools of a Python file: its list `TOOLS`, or else every public function it defines.

    `TOOLS` may hold functions and `Tool` records. The file is executed. Raises InputError where it
    cannot be, ConfigError where it has no tools or one that lacks annotations or a docstring.
    """
    module = load_module(path)
    listed = getattr(module, "TOOLS", None)
    if listed is not None and not isinstance(listed, list | tuple):
        raise ConfigError(f"TOOLS in {path} must be a list; got {type(listed).__name__}; list the tool functions")
    found = public_functions(module) if listed is None else listed
    tools = tool_mapping(t if isinstance(t, Tool) else tool(t) for t in found)
    if not tools:
        raise ConfigError(
            f"{path} must define at least one tool; got none; write a public function with type "
            "annotations and a docstring"
        )
    return tools


def tool_mapping(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Tools by name; ConfigError where two share a name."""
    mapping: dict[str, Tool] = {}
    for entry in tools:
        if entry.name in mapping:
            raise ConfigError(f"tools must have different names; got two named {entry.name!r}; rename one")
        mapping[entry.name] = entry
    return mapping


def public_functions(module: types.ModuleType) -> list[Callable[..., Any]]:
    """The functions that a module itself defines under public names, in order."""
    return [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def load_module(path: str | Path) -> types.ModuleType:
    """A user's Python file, executed as a module; its folder joins the end of the import path.

    Raises InputError, in one line, where the file is missing, is not Python, or fails.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"{path} must be a Python file; there is no such file; check the path")
    name = f"turnwise_user_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}"
    loader = importlib.util.spec_from_loader(name, loader=None, origin=str(file))
    assert loader is not None
    module = importlib.util.module_from_spec(loader)
    module.__file__ = str(file)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except SyntaxError as error:
        raise InputError(f"{path} must be valid Python; line {error.lineno}: {error.msg}; correct the file") from error
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"{path} must run without error; got {type(error).__name__}: {text}; correct the file"
        ) from error
    return module
