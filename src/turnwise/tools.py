"""Tools: typed Python functions, or methods of an object per rollout, that an agent may call.

A tool's JSON schema comes from its signature and its Google-style docstring. Whatever goes wrong in
a call is an observation for the agent, with an error class; it never ends the run. How long a call may
take, how many run at once, and what is tried again or remembered stands with the tool.
"""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import re
import sys
import threading
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

from turnwise.background import Failure, Gate, done_beside
from turnwise.errors import ConfigError, InputError, ToolError
from turnwise.types import Action, Task, ToolCall, ToolResult

Schema = dict[str, Any]
ERROR_PREFIX = "Error: "
"""How the text of every failed call begins."""
CUT_MARK = " …"
"""How a text that was cut to a cap ends."""
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
        return functools.partial(_tool, **options)
    return _tool(function, **options)


def _tool(
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
    for parameter in list(inspect.signature(function).parameters.values())[_is_method(function) :]:
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


def _is_method(function: Callable[..., Any]) -> bool:
    """Whether a function is defined in a class, so that its first parameter is the object."""
    return function.__qualname__.rpartition(".")[0].rpartition(".")[2] not in ("", "<locals>")


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
    read = [call for call in action.tool_calls if call.arguments is not None]
    if len(read) == 1:
        results = [await call_tool(tools, read[0])]
    else:
        results = await asyncio.gather(*(call_tool(tools, call) for call in read))
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
            text = capped(_encodable(_text(value)), found.result_cap)
            documents = value.documents if isinstance(value, Found) else None
            return ToolResult(text=text, duration_s=duration_s, documents=documents)
        except Exception as error:  # of no text, or of a value that cannot be written out
            reason = f"{found.name} returned {type(value).__name__}, which is neither text nor JSON ({error})"
            return error_result("bad_result", reason, cap=found.result_cap, duration_s=duration_s)
    error = value.error
    kind = "timeout" if isinstance(error, TimeoutError) else "exception"
    text = _error_text(error) if isinstance(error, ToolError | TimeoutError) else ""
    text = text or f"{type(error).__name__}: {_error_text(error)}"
    return error_result(kind, text, cap=found.result_cap, duration_s=duration_s)


def _error_text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an error class of a tool's own may fail at this, too
        return "no text"


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


def _text(value: object) -> str:
    """A tool's return value as text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which no file or tokenizer accepts, replaced by `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _shown(value: object) -> str:
    """A value of the agent's as short JSON."""
    return capped(json.dumps(value, ensure_ascii=False, default=str), 60)


# ------------------------------------------------------------------- objects of a rollout


def stateful(make: Callable[..., Any]) -> list[Tool]:
    """The public methods of a class, or of what a factory says it returns, as tools; each rollout has its own object.

    A method `close` is called when the rollout is over, and `fork` where rollouts branch, instead of `copy.deepcopy`;
    `fork = None` says that the object cannot be copied. Neither is a tool.
    """
    kind = make if isinstance(make, type) else _returned_class(make)
    members = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
    found = [value for name, value in members.items() if not name.startswith("_") and name not in ("close", "fork")]
    tools: list[Tool] = [
        t if isinstance(t, Tool) else tool(t) for t in found if isinstance(t, Tool | types.FunctionType)
    ]
    if not tools:
        raise ConfigError(f"{kind.__name__} must have a public method to be a tool; got none; write one")
    for entry in tools:
        if entry.cache is not None:
            raise ConfigError(
                f"cache of tool {entry.name!r} must be left out, as its result depends on its object; got True; drop it"
            )
    return [dataclasses.replace(entry, owner=make) for entry in tools]


def _returned_class(make: Callable[..., Any]) -> type:
    try:
        kind = typing.get_type_hints(make).get("return")
    except Exception:
        kind = None
    if not isinstance(kind, type) or kind is type(None):
        raise ConfigError(
            f"a factory of stateful tools must say which class it returns; got {make!r}; write for example "
            "def make() -> Notebook"
        )
    return kind


def check_forkable(tools: Mapping[str, Tool]) -> None:
    """Raises ConfigError where rollouts that branch would have to copy an object that says it cannot be."""
    for entry in tools.values():
        kind = entry.owner if isinstance(entry.owner, type) or entry.owner is None else _returned_class(entry.owner)
        if kind is not None and getattr(kind, "fork", "copied") is None:
            raise ConfigError(
                f"branches must go with tools that can be copied; {kind.__name__}, which has {entry.name!r}, cannot; "
                "leave branches out, or write a method fork"
            )


class ToolSession:
    """The tools of one rollout; those with an owner are bound to an object of its own, made at the first call."""

    def __init__(self, tools: Mapping[str, Tool], task: Task | None = None) -> None:
        self._tools = tools
        self._task = task
        self._objects: dict[Callable[..., Any], Any] = {}
        self._opening: asyncio.Task[None] | None = None
        self._bound: Mapping[str, Tool] | None = None
        if all(entry.owner is None for entry in tools.values()):
            self._bound = tools

    async def tools(self) -> Mapping[str, Tool]:
        """The tools, ready to be called. What the making of an object raises, this raises."""
        if self._bound is None:
            self._opening = self._opening or asyncio.create_task(self._open())
            await asyncio.shield(self._opening)  # an object that is being made when its rollout ends must be closed too
        assert self._bound is not None
        return self._bound

    async def _open(self) -> None:
        for owner in dict.fromkeys(entry.owner for entry in self._tools.values()):
            if owner is not None:
                self._objects[owner] = await self._made(owner)
        self._bind()

    def fork(self) -> "ToolSession":
        """A session that goes on by itself, with copies of the objects as they stand."""
        session = ToolSession(self._tools, self._task)
        if self._objects:
            session._objects = {owner: _copied(found) for owner, found in self._objects.items()}
            session._bind()
        return session

    async def close(self) -> None:
        """Calls the objects' `close`, once; one that fails is warned of. Where it is cancelled, it ends first."""
        if self._opening is None and not self._objects:
            return
        closing = asyncio.create_task(self._close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await closing
            raise

    async def _close(self) -> None:
        if self._opening is not None:
            await asyncio.gather(self._opening, return_exceptions=True)
        objects, self._objects = self._objects, {}
        for found in objects.values():
            close = getattr(found, "close", None)
            failed = await done_beside(close, TIMEOUT_S) if close else None
            if isinstance(failed, Failure):
                reason = f"{type(failed.error).__name__}: {_error_text(failed.error)}"
                warnings.warn(f"{type(found).__name__} was not closed: {reason}", stacklevel=2)

    async def _made(self, owner: Callable[..., Any]) -> Any:
        made = await done_beside(functools.partial(owner, *self._given(owner)), TIMEOUT_S)
        if isinstance(made, Failure):
            reason = f"{type(made.error).__name__}: {_error_text(made.error)}"
            raise ToolError(f"{getattr(owner, '__name__', 'the tools')} could not be made: {reason}") from made.error
        return made

    def _given(self, owner: Callable[..., Any]) -> tuple[Task, ...]:
        """The task, where the owner takes an argument."""
        try:
            needs = [p for p in inspect.signature(owner).parameters.values() if p.default is p.empty]
        except (TypeError, ValueError):
            return ()
        takes = [p for p in needs if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return (self._task,) if takes and self._task is not None else ()

    def _bind(self) -> None:
        """One call at a time on each object, in their order, so that equal turns do equal things."""
        gates = {owner: Gate(1) for owner in self._objects}
        self._bound = {
            name: entry
            if entry.owner is None
            else dataclasses.replace(
                entry,
                function=functools.partial(entry.function, self._objects[entry.owner]),
                gates=(gates[entry.owner], *entry.gates),
                owner=None,
            )
            for name, entry in self._tools.items()
        }


def _copied(found: Any) -> Any:
    if not hasattr(found, "fork"):
        return copy.deepcopy(found)
    if found.fork is None:
        raise ToolError(f"{type(found).__name__} cannot be copied")
    return found.fork()


# ------------------------------------------------------------------------ tools from a file


def load_tools(path: str | Path) -> dict[str, Tool]:
    """The tools of a Python file: its list `TOOLS`, or else every public function it defines.

    `TOOLS` may hold functions, decorated ones included, and classes whose methods are tools of an object
    per rollout (see `stateful`). The file is executed. Raises InputError where it cannot be, ConfigError
    where it has no tools or one that lacks annotations or a docstring.
    """
    module = load_module(path)
    listed = getattr(module, "TOOLS", None)
    if listed is not None and not isinstance(listed, list | tuple):
        raise ConfigError(f"TOOLS in {path} must be a list; got {type(listed).__name__}; list the tool functions")
    found = public_functions(module, Tool) if listed is None else listed
    tools = tool_mapping(entry for given in found for entry in _entries(given))
    if not tools:
        raise ConfigError(
            f"{path} must define at least one tool; got none; write a public function with type "
            "annotations and a docstring, or list a class in TOOLS"
        )
    return tools


def _entries(given: Any) -> list[Tool]:
    """The tools that an entry of TOOLS stands for."""
    if isinstance(given, Tool):
        return [given]
    if isinstance(given, list | tuple):
        return [entry for one in given for entry in _entries(one)]
    return stateful(given) if isinstance(given, type) else [_tool(given)]


def tool_mapping(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Tools by name; ConfigError where two share a name."""
    mapping: dict[str, Tool] = {}
    for entry in tools:
        if entry.name in mapping:
            raise ConfigError(f"tools must have different names; got two named {entry.name!r}; rename one")
        mapping[entry.name] = entry
    return mapping


def public_functions(module: types.ModuleType, decorated: type | tuple[type, ...] = ()) -> list[Any]:
    """The functions that a module itself defines under public names, plain or as a class `decorated`, in order."""

    def is_own(value: Any) -> bool:
        function = value.function if isinstance(value, decorated) else value
        return inspect.isfunction(function) and function.__module__ == module.__name__

    return [value for name, value in vars(module).items() if not name.startswith("_") and is_own(value)]


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
