"""Objects of a rollout whose methods are tools: made at the first call, copied where it branches, closed at its end."""

import asyncio
import copy
import dataclasses
import functools
import inspect
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from turnwise.background import Failure, Gate, done_beside
from turnwise.errors import ConfigError, ToolError
from turnwise.tools import TIMEOUT_S, Tool, error_text, tool
from turnwise.types import Task


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
                reason = f"{type(failed.error).__name__}: {error_text(failed.error)}"
                warnings.warn(f"{type(found).__name__} was not closed: {reason}", stacklevel=2)

    async def _made(self, owner: Callable[..., Any]) -> Any:
        made = await done_beside(functools.partial(owner, *self._given(owner)), TIMEOUT_S)
        if isinstance(made, Failure):
            reason = f"{type(made.error).__name__}: {error_text(made.error)}"
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
