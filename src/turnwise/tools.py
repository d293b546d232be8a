"""Tools: typed Python functions, or methods of an object per rollout, that an agent may call.

A tool's JSON schema comes from its signature and its Google-style docstring. Whatever goes wrong in
a call is an observation for the agent, with an error class; it never ends the run. How long a call may
take, how many run at once, and what is tried again or remembered stands with the tool.
"""

import asyncio
import contextlib
import functools
import inspect
import json
import math
import re
import threading
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, overload

from turnwise.background import Failure, Gate, done_beside
from turnwise.errors import ConfigError, ToolError, ToolUnavailable
from turnwise.types import Action, ToolCall, ToolResult

Schema = dict[str, Any]
ERROR_PREFIX = "Error: "
"""How the text of every failed call begins."""
CUT_MARK = " …"
"""How a text that was cut to a cap ends."""
LONGEST_WORD = 80
"""Most characters that are given up to cut a text at the end of a word."""
ERROR_CAP = 400
"""Most characters of an error's text where no tool's own cap applies."""
TIMEOUT_S = 60.0
"""Seconds that a call may take unless its tool says otherwise, and that opening or closing an object may take."""
LONGEST_PAUSE_S = 30.0
"""Seconds between two tries of a call, at most."""
REMEMBERED = 10_000
"""Most results that a tool's cache holds."""

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


class Cache:
    """Results of equal calls of one tool; calls that are equal while the first is under way wait for it."""

    def __init__(self) -> None:
        self._known: dict[str, Future[ToolResult | None]] = {}
        self._lock = threading.Lock()

    async def result(self, key: str, call: Callable[[], Any]) -> ToolResult:
        """The remembered result, or that of `call`, which is remembered unless it failed."""
        while True:
            mine: Future[ToolResult | None] = Future()
            mine.set_running_or_notify_cancel()  # so that who waits for it cannot cancel it
            with self._lock:
                known = self._known.setdefault(key, mine)
                while len(self._known) > REMEMBERED:
                    self._known.pop(next(iter(self._known)))
            if known is mine:
                return await self._called(key, mine, call)
            result = await asyncio.wrap_future(known)
            if result is not None:  # else its rollout was cancelled, and this one calls
                return result

    async def _called(self, key: str, mine: Future[ToolResult | None], call: Callable[[], Any]) -> ToolResult:
        result = None
        try:
            result = await call()
            return result
        finally:
            if result is None or result.error:
                with self._lock:
                    self._known.pop(key, None)
            mine.set_result(result)


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the agent may call, what the agent is told about it, and how a call is made."""

    name: str
    description: str
    parameters: Schema
    """JSON schema of the arguments: an object with `properties` and `required`."""
    function: Callable[..., Any]
    """Called with the arguments as keywords; may be a coroutine function. With `owner`, the object comes first."""
    result_cap: int
    """Most characters of a result; longer ones are cut at a word border."""
    timeout_s: float | None = TIMEOUT_S
    """Seconds that one try may take; None for no limit."""
    retries: int = 0
    """How often a call is tried again after an error of `retry_on`; after `backoff_s`, then twice that, and so on."""
    retry_on: tuple[type[Exception], ...] = (ConnectionError, TimeoutError)
    """The errors after which a try may succeed; a try that ran out of time counts as a TimeoutError."""
    backoff_s: float = 0.5
    inline: bool = False
    """Call the function on the event loop's own thread, without a timeout: for functions of microseconds."""
    owner: Callable[..., Any] | None = None
    """Makes the object that the function is a method of: a new one for each rollout, with the task as argument where
    it takes one. Tools with the same owner share the object."""
    gates: tuple[Gate, ...] = ()
    """Each admits so many calls at once."""
    cache: Cache | None = None
    """Remembers the results of equal calls."""

    def __call__(self, *values: Any, **arguments: Any) -> Any:
        """The function's own value: a decorated function stays one."""
        return self.function(*values, **arguments)

    def __get__(self, instance: object, kind: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self.function, instance)


# ------------------------------------------------------------------- a tool from a function


class CallOptions(TypedDict, total=False):
    """How calls of a tool are made."""

    result_cap: int
    """Most characters of a result; 2000 by default."""
    timeout_s: float | None
    """Seconds that one try may take; `TIMEOUT_S` by default, None for no limit."""
    concurrency: int | None
    """How many calls run at once; no limit by default. 1 for a function that is not thread-safe."""
    retries: int
    """How often a call is tried again; 0 by default."""
    retry_on: type[Exception] | tuple[type[Exception], ...]
    """After which errors; by default ConnectionError and TimeoutError, which is also what a timeout counts as."""
    backoff_s: float
    """Seconds before the first new try, twice that before the second, and so on; 0.5 by default."""
    cache: bool
    """Answer equal calls from memory."""
    inline: bool
    """Call the function on the event loop's own thread, without a timeout: for functions of microseconds."""


@overload
def tool(function: Callable[..., Any], /, **options: Unpack[CallOptions]) -> Tool: ...
@overload
def tool(function: None = None, /, **options: Unpack[CallOptions]) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(function: Callable[..., Any] | None = None, /, **options: Unpack[CallOptions]) -> Any:
    """The tool of a typed function, or with options alone a decorator that makes one.

    The description is the docstring up to the first section. Parameters may be str, int, float, bool, list, dict,
    Literal, Any, and unions of these; one with a default is optional. A coroutine function is awaited; any other is
    called in a thread of its own. Raises ConfigError where the signature or docstring lacks something, or an option
    is out of range.
    """
    if function is None:
        return functools.partial(tool_of, **options)
    return tool_of(function, **options)


def tool_of(
    function: Callable[..., Any],
    *,
    result_cap: int = 2000,
    timeout_s: float | None = TIMEOUT_S,
    concurrency: int | None = None,
    retries: int = 0,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (ConnectionError, TimeoutError),
    backoff_s: float = 0.5,
    cache: bool = False,
    inline: bool = False,
) -> Tool:
    """The tool of a function; `tool` without the decorator's forms."""
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise ConfigError(f"a tool must be a named function; got {function!r}; define it with def")
    doc = inspect.getdoc(function) if function.__doc__ else None
    description = _description(doc or "")
    if not description:
        raise ConfigError(f"tool {name!r} must have a docstring; got none; say in one line what it returns")
    if inline and inspect.iscoroutinefunction(function):
        raise ConfigError(f"inline of tool {name!r} must be left out for a coroutine function, which waits; drop it")
    if concurrency is not None and concurrency < 1:
        raise ConfigError(f"concurrency of tool {name!r} must be >= 1; got {concurrency}; leave it out for no limit")
    made = Tool(
        name=name,
        description=description,
        parameters=_parameters(function, _argument_texts(doc or "")),
        function=function,
        result_cap=result_cap,
        timeout_s=timeout_s,
        retries=retries,
        retry_on=retry_on if isinstance(retry_on, tuple) else (retry_on,),
        backoff_s=backoff_s,
        inline=inline,
        gates=() if concurrency is None else (Gate(concurrency),),
        cache=Cache() if cache else None,
    )
    check_options(made)
    return made


def check_options(made: Tool) -> None:
    """Raises ConfigError for an option of a tool that is out of range."""
    finite = made.timeout_s if made.timeout_s is not None else TIMEOUT_S
    wanted = {
        "result_cap": (f"> {len(CUT_MARK)}", made.result_cap > len(CUT_MARK)),
        "timeout_s": ("> 0, or None", 0 < finite < math.inf),
        "retries": ("in [0, 100]", 0 <= made.retries <= 100),
        "backoff_s": (">= 0", 0 <= made.backoff_s < math.inf),
        "retry_on": ("exception classes", all(map(_is_exception_class, made.retry_on))),
    }
    for option, (must, holds) in wanted.items():
        if not holds:
            raise ConfigError(
                f"{option} of tool {made.name!r} must be {must}; got {getattr(made, option)}; give such a value"
            )


def _is_exception_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Exception)


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
    given = list(inspect.signature(function).parameters.values())
    for parameter in given[1:] if _is_method(function, given, hints) else given:
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
        elif _is_json(parameter.default):
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    return {"type": "object", "properties": properties, "required": required}


def _is_method(function: Callable[..., Any], given: list[inspect.Parameter], hints: Mapping[str, Any]) -> bool:
    """Whether a function's first parameter is the object of the class that it is defined in.

    It is not in a method that is bound to its object already, nor in a static one, whose first parameter has a type.
    """
    in_class = function.__qualname__.rpartition(".")[0].rpartition(".")[2] not in ("", "<locals>")
    if not in_class or inspect.ismethod(function) or not given:
        return False
    return given[0].name == "self" or given[0].name not in hints


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _type_schema(hint: Any, where: str) -> Schema:
    """The JSON schema of one annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _TYPE_NAMES:
        return {"type": _TYPE_NAMES[hint]}
    if hint is Any:
        return {}
    if hint is type(None):
        return {"type": "null"}
    if origin is Literal and all(map(_is_json, arguments)):
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
    read = [call for call in action.tool_calls if call.arguments is not None]
    if len(read) == action.num_calls == 1:
        return (await call_tool(tools, read[0]),)
    results = await asyncio.gather(*(call_tool(tools, call) for call in read))
    unread = error_result("parse", action.error or "no arguments")
    done = iter(results)
    answered = [unread if call.arguments is None else next(done) for call in action.tool_calls]
    return (*answered, *[unread] * (action.num_calls - len(answered)))


async def call_tool(tools: Mapping[str, Tool], call: ToolCall) -> ToolResult:
    """The result of a call; failures come back as results with an error class, never as exceptions.

    Tools with an owner must be bound to its object first: see `ToolSession`.
    """
    found = tools.get(call.name)
    if found is None:
        known = ", ".join(sorted(tools)) or "none"
        return error_result("unknown_tool", f"no tool is named {_shown(call.name)}; tools: {known}")
    if call.arguments is None:
        return error_result("parse", f"the arguments of {call.name} could not be read")
    if found.owner is not None:
        raise ConfigError(f"tool {call.name!r} must be bound to its object; it is not; call it through a ToolSession")
    fault = argument_fault(found.parameters, call.arguments)
    if fault:
        return error_result("bad_arguments", f"{call.name}: {fault}")
    if found.cache is None:
        return await _called(found, call.arguments)
    key = json.dumps(call.arguments, sort_keys=True)
    return await found.cache.result(key, functools.partial(_called, found, call.arguments))


async def _called(found: Tool, arguments: Mapping[str, Any]) -> ToolResult:
    """What a call with good arguments comes to, tried again as its tool says."""
    start = time.perf_counter()
    value = await _one_try(found, arguments)
    for attempt in range(1, found.retries + 1):
        if not (isinstance(value, Failure) and isinstance(value.error, found.retry_on)):
            break
        await asyncio.sleep(pause_s(found.backoff_s, attempt))
        value = await _one_try(found, arguments)
    return _observed(found, value, time.perf_counter() - start)


def pause_s(backoff_s: float, attempt: int) -> float:
    """Seconds before the `attempt`-th new try: the first pause, doubled with each, at most `LONGEST_PAUSE_S`."""
    return min(backoff_s * 2.0 ** (attempt - 1), LONGEST_PAUSE_S)


async def _one_try(found: Tool, arguments: Mapping[str, Any]) -> Any:
    """The function's value or a `Failure`."""
    if found.inline:
        try:
            return found.function(**arguments)
        except (Exception, SystemExit) as error:  # a tool that calls exit() has failed; it must not end the training
            return Failure(error)
    call = functools.partial(found.function, **arguments)
    if not found.gates:
        return await done_beside(call, found.timeout_s)
    async with contextlib.AsyncExitStack() as stack:
        for gate in found.gates:
            await stack.enter_async_context(gate)
        return await done_beside(call, found.timeout_s)


def _observed(found: Tool, value: Any, duration_s: float) -> ToolResult:
    """A function's value, or what it raised, as the agent sees it."""
    if not isinstance(value, Failure):
        try:
            text = _encodable(capped(_text(value, found.result_cap), found.result_cap))
            documents = value.documents if isinstance(value, Found) else None
            return ToolResult(text=text, duration_s=duration_s, documents=documents)
        except Exception as error:  # of no text, or of a value that cannot be written out
            reason = f"{found.name} returned {type(value).__name__}, which is neither text nor JSON ({error})"
            return error_result("bad_result", reason, cap=found.result_cap, duration_s=duration_s)
    error = value.error
    text = error_text(error)
    if not (text and isinstance(error, ToolError | ToolUnavailable | TimeoutError)):
        text = f"{type(error).__name__}: {text[: found.result_cap]}"
    return error_result(_kind(error), text, cap=found.result_cap, duration_s=duration_s)


def _kind(error: BaseException) -> str:
    """The class of an error: a connection that fails is none of the agent's doing."""
    if isinstance(error, ConnectionError):
        return "unavailable"
    return "timeout" if isinstance(error, TimeoutError) else "exception"


def unavailable(results: Iterable[ToolResult]) -> str | None:
    """What the first result says of a tool that is not there; None where all are."""
    lost = next((result for result in results if result.error == "unavailable"), None)
    return None if lost is None else f"{ToolUnavailable.__name__}: {lost.text.removeprefix(ERROR_PREFIX)}"


def error_text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an error class of a tool's own may fail at this, too
        return "no text"


def error_result(error: str, text: str, *, cap: int = ERROR_CAP, duration_s: float = 0.0) -> ToolResult:
    """A failed call's result: `Error: ` and the reason, on at most `cap` characters."""
    cap = max(cap, len(ERROR_PREFIX))
    shown = capped(ERROR_PREFIX + text[: cap + 1], cap)  # gigabytes are cut before they are copied
    return ToolResult(text=_encodable(shown), error=error, duration_s=duration_s)


def capped(text: str, cap: int) -> str:
    """`text` in at most `cap` characters: cut at a word border, if one is near, the cut marked by ` …`."""
    if len(text) <= cap:
        return text
    room = cap - len(CUT_MARK)
    kept = text[:room]
    if not text[room].isspace():
        words = re.match(r"(?s)(.*\S)\s", kept)
        kept = words[1] if words and room - len(words[1]) <= LONGEST_WORD else kept
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


def type_text(schema: Any) -> str:
    """A schema's type in a few words, such as `string`, `array of integer` or `"a" or "b"`."""
    options = _options(schema)
    if options is not None:
        return " or ".join(dict.fromkeys(map(type_text, options)))
    if not isinstance(schema, Mapping):
        return "any value"
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        return " or ".join(json.dumps(value, ensure_ascii=False) for value in values)
    if "items" in schema:
        return f"array of {type_text(schema['items'])}"
    return schema.get("type", "any value")


def _options(schema: Any) -> list[Any] | None:
    """The schemas of which a value must fit one; None where there is no such choice."""
    if not isinstance(schema, Mapping):
        return None
    if isinstance(schema.get("type"), list):
        return [{**schema, "type": kind} for kind in schema["type"]]
    return schema.get("anyOf", schema.get("oneOf"))


_ACCEPTED: Mapping[Any, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def _fits(schema: Any, value: Any) -> bool:
    """Whether a JSON value fits a schema; what `_type_schema` does not write fits always, for the tool to check."""
    options = _options(schema)
    if options is not None:
        return any(_fits(option, value) for option in options)
    if not isinstance(schema, Mapping):  # true, which any value fits
        return True
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        return any(type(value) is type(option) and value == option for option in values)
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items", {})
        return isinstance(value, list) and all(_fits(items, item) for item in value)
    if kind == "object":
        others, known = schema.get("additionalProperties", {}), schema.get("properties", {})
        return isinstance(value, dict) and all(_fits(known.get(name, others), item) for name, item in value.items())
    if isinstance(value, bool) and kind in ("integer", "number"):
        return False
    return isinstance(value, _ACCEPTED.get(kind, (object,)))


def _text(value: object, cap: int) -> str:
    """A tool's return value as text: strings as they are, the rest as JSON, of which no more is written than shows."""
    if isinstance(value, str):
        return value
    written, length = [], 0
    for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
        written.append(part)
        length += len(part)
        if length > cap:
            break
    return "".join(written)


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which no file or tokenizer accepts, replaced by `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _shown(value: object) -> str:
    """A value of the agent's as short JSON."""
    return capped(json.dumps(value, ensure_ascii=False, default=str), 60)


def tool_mapping(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Tools by name; ConfigError where two share a name."""
    mapping: dict[str, Tool] = {}
    for entry in tools:
        if entry.name in mapping:
            raise ConfigError(f"tools must have different names; got two named {entry.name!r}; rename one")
        mapping[entry.name] = entry
    return mapping
