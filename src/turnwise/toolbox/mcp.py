"""Tools of MCP servers, over a process's stdin and stdout or over streamable HTTP, with the official SDK.

All of it happens on the lasting loop: a session lives as long as the process, or as its rollout, and many calls share
it. A session that breaks is given up; the next call opens another.
"""

import asyncio
import atexit
import contextlib
import functools
import json
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnwise.background import Failure, Gate, lasting_loop, waited_for
from turnwise.errors import ConfigError, InputError, ToolError
from turnwise.toolbox import bounded
from turnwise.tools import TIMEOUT_S, Tool, check_options, tool_mapping
from turnwise.web import MAX_ANSWER_BYTES

CONNECT_S = 30.0
"""Seconds that a server may take to start and to answer the first message."""
CLOSE_S = 10.0
"""Seconds that open sessions have to end when the process does."""
FIELDS = {
    "command": str,
    "args": list,
    "env": dict,
    "cwd": str,
    "url": str,
    "headers": dict,
    "type": str,
    "disabled": bool,
    "tools": list,
    "session": str,
    "timeout_s": int | float,
    "result_cap": int,
    "concurrency": int,
}
"""What an entry of `mcpServers` may hold; those from `tools` on are ours."""
_GONE = (-32000, 32600, -32600)
"""Codes of the SDK for a connection that was closed and a session that the server does not know."""
_DEEPEST = 20


@dataclass(frozen=True, kw_only=True)
class Server:
    """How a server is reached, and how its tools are called."""

    name: str
    command: tuple[str, ...] = ()
    """The process to start; empty where there is a URL."""
    env: tuple[tuple[str, str], ...] = ()
    cwd: str | None = None
    url: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    tools: tuple[str, ...] | None = None
    """The tools to take; None for all."""
    per_rollout: bool = False
    """Each rollout has a session, and of a command a process, of its own; otherwise all share one."""
    timeout_s: float = TIMEOUT_S
    result_cap: int = 2000
    concurrency: int | None = None


# ------------------------------------------------------------------------- naming a server


def server_of_command(line: str) -> Server:
    """The server that a command line starts, or that a URL names."""
    if re.match(r"https?://", line):
        return Server(name=line, url=line)
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ConfigError(
            f"an MCP server must be a command or a URL; got {line!r} ({error}); close the quote"
        ) from error
    if not words:
        raise ConfigError(
            "an MCP server must be a command or a URL; got nothing; write for example mcp:python server.py"
        )
    return Server(name=os.path.basename(words[0]), command=tuple(words))


def servers_of_config(data: Any, source: str) -> list[Server]:
    """The servers of a file's `mcpServers`, without those that are disabled."""
    entries = data.get("mcpServers") if isinstance(data, Mapping) else None
    if not isinstance(entries, Mapping) or not entries:
        raise InputError(f"{source} must hold mcpServers, a table of servers by name; it does not; add one")
    return [
        _server(name, entry, f"server {name!r} in {source}")
        for name, entry in entries.items()
        if not (isinstance(entry, Mapping) and entry.get("disabled") is True)
    ]


def _server(name: str, entry: Any, place: str) -> Server:
    if not isinstance(entry, Mapping) or ("command" in entry) == ("url" in entry):
        raise InputError(f"{place} must have either a command or a url; got {str(entry)[:80]}; give one of them")
    for field, value in entry.items():
        if field not in FIELDS:
            raise InputError(f"{place} must have fields of {', '.join(FIELDS)}; got {field!r}; rename or delete it")
        if not isinstance(value, FIELDS[field]) or (isinstance(value, bool) and field != "disabled"):
            raise InputError(f"{field} of {place} has the wrong type; got {value!r}; correct it")
    if entry.get("type") == "sse":
        raise InputError(f"{place} must speak over stdio or streamable HTTP; got type 'sse'; give its streamable URL")
    if entry.get("session", "shared") not in ("shared", "rollout"):
        raise InputError(f"session of {place} must be 'shared' or 'rollout'; got {entry['session']!r}; take one")
    return Server(
        name=name,
        command=(str(entry["command"]), *map(str, entry.get("args", ()))) if "command" in entry else (),
        env=_filled(entry.get("env", {}), place),
        cwd=entry.get("cwd"),
        url=entry.get("url", ""),
        headers=_filled(entry.get("headers", {}), place),
        tools=tuple(map(str, entry["tools"])) if "tools" in entry else None,
        per_rollout=entry.get("session") == "rollout",
        timeout_s=entry.get("timeout_s", TIMEOUT_S),
        result_cap=entry.get("result_cap", 2000),
        concurrency=entry.get("concurrency"),
    )


def _filled(table: Mapping[str, Any], place: str) -> tuple[tuple[str, str], ...]:
    """A table of texts with `${NAME}` replaced by the environment's variable, so that keys stay out of files."""

    def variable(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise InputError(f"the environment must have {found[1]}, which {place} names; it has not; set it")
        return os.environ[found[1]]

    return tuple((name, re.sub(r"\$\{(\w+)\}", variable, str(value))) for name, value in table.items())


# ------------------------------------------------------------------------------- its tools


def mcp_tools(server: Server) -> list[Tool]:
    """The tools of a server, which is started or asked now. Raises ConfigError where it cannot be or has none."""
    try:
        import mcp  # noqa: F401  # pyright: ignore[reportUnusedImport]

        logging.getLogger("mcp").addHandler(logging.NullHandler())  # its failures come back as results
    except ImportError as error:
        raise ConfigError(
            'tools of MCP servers need the SDK; it is not installed; pip install "turnwise[mcp]"'
        ) from error
    connection = _shared_connection(server)
    listed = waited_for(connection.listed)
    if isinstance(listed, Failure):
        raise ConfigError(
            f"the MCP server {server.name!r} must list its tools; {listed.error}; check it"
        ) from listed.error
    by_name = {entry["name"]: entry for entry in listed}
    missing = [name for name in server.tools or () if name not in by_name]
    if missing or not by_name:
        raise ConfigError(
            f"the MCP server {server.name!r} must have the tool {missing[0] if missing else 'that it is for'}; it has "
            f"{', '.join(by_name) or 'none'}; correct the name"
        )
    if server.per_rollout:
        waited_for(connection.close)
    gates = () if server.concurrency is None else (_gate(server.concurrency, server.name),)
    chosen = by_name if server.tools is None else server.tools
    return list(tool_mapping(_tool(server, connection, by_name[name], gates) for name in chosen).values())


def _gate(places: int, name: str) -> Gate:
    if places < 1:
        raise ConfigError(
            f"concurrency of the MCP server {name!r} must be >= 1; got {places}; leave it out for no limit"
        )
    return Gate(places)


def _tool(server: Server, shared: "Connection", entry: Mapping[str, Any], gates: tuple[Gate, ...]) -> Tool:
    """An entry of the server's list as a tool."""

    async def call(connection: Connection, /, **arguments: Any) -> str:
        return await connection.call(entry["name"], arguments)

    made = Tool(
        name=entry["name"],
        description=" ".join((entry.get("description") or entry.get("title") or entry["name"]).split()),
        parameters=parameters_of(entry.get("inputSchema") or {}),
        function=call if server.per_rollout else functools.partial(call, shared),
        owner=_owner(server) if server.per_rollout else None,
        result_cap=server.result_cap,
        timeout_s=server.timeout_s,
        gates=gates,
    )
    check_options(made)
    return made


@functools.cache
def _owner(server: Server) -> Any:
    """The one maker of a server's connections, which all of its tools share."""

    def make() -> Connection:
        return Connection(server)

    return make


def parameters_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A server's input schema with its definitions written in place, and the keys that every tool's has."""
    definitions = {**schema.get("definitions", {}), **schema.get("$defs", {})}
    whole = _inlined({k: v for k, v in schema.items() if k not in ("$defs", "definitions", "$schema")}, definitions, 0)
    return {**whole, "type": "object", "properties": whole.get("properties", {}), "required": whole.get("required", [])}


def _inlined(schema: Any, definitions: Mapping[str, Any], depth: int) -> Any:
    """A schema without references; what refers to itself is any value from some depth on."""
    if isinstance(schema, list):
        return [_inlined(one, definitions, depth) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    if depth > _DEEPEST:
        return {}
    rest = {k: _inlined(v, definitions, depth + 1) for k, v in schema.items() if k != "$ref"}
    if isinstance(schema.get("$ref"), str):
        named = definitions.get(schema["$ref"].rpartition("/")[2], {})
        return {**_inlined(named, definitions, depth + 1), **rest}
    return rest


def text_of(result: Mapping[str, Any]) -> str:
    """What a call returned, as text. Raises ToolError where the server says that it failed."""
    parts = [_part(content) for content in result.get("content") or ()]
    if not parts and result.get("structuredContent") is not None:
        parts = [json.dumps(result["structuredContent"], ensure_ascii=False)]
    text = "\n".join(parts)
    if result.get("isError"):
        raise ToolError(text or "the server says that the call failed")
    return text


def _part(content: Mapping[str, Any]) -> str:
    """One piece of a result; what is no text is named."""
    kind = content.get("type")
    if kind == "text":
        return content["text"]
    if kind == "resource":
        resource = content["resource"]
        return resource.get("text") or f"[{resource.get('mimeType') or 'data'} at {resource.get('uri')}]"
    if kind == "resource_link":
        return f"[{content.get('name') or 'resource'} at {content.get('uri')}]"
    return f"[{kind}: {content.get('mimeType') or 'data'}]"


# ---------------------------------------------------------------------------- its session


@dataclass(frozen=True, kw_only=True)
class _Live:
    """A session that is open."""

    session: Any
    stop: asyncio.Event
    ended: asyncio.Task[None]


class Connection:
    """A session with a server, opened at the first call and again whenever it broke."""

    fork = None
    """What a server remembers of a session cannot be copied."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._live: _Live | None = None
        self._opening = asyncio.Lock()

    async def listed(self) -> list[dict[str, Any]]:
        """The server's tools, as it describes them."""
        from mcp.types import PaginatedRequestParams

        live = await self._opened()
        found: list[dict[str, Any]] = []
        cursor = None
        while True:
            page = await self._answer(live, live.session.list_tools(params=PaginatedRequestParams(cursor=cursor)))
            found += [entry.model_dump(mode="json", by_alias=True, exclude_none=True) for entry in page.tools]
            cursor = getattr(page, "nextCursor", None) or getattr(page, "next_cursor", None)
            if not cursor:
                return found

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What a tool returns. Raises ToolError where it failed, ConnectionError where the server is gone.

        A call that the server refused because it does not know the session, as after a restart, is made again in a
        new one. A call that was under way when the server ended is not: it may have been carried out.
        """
        for last in (False, True):
            live = await self._opened()
            try:
                result = await self._answer(live, live.session.call_tool(name, dict(arguments)))
                return text_of(result.model_dump(mode="json", by_alias=True, exclude_none=True))
            except _UnknownSession as error:
                live.stop.set()
                if last:
                    raise ConnectionError(f"the MCP server {self._server.name!r} refuses the session") from error
        raise AssertionError

    async def close(self) -> None:
        """Ends the session, and of a command the process."""
        live, self._live = self._live, None
        if live:
            live.stop.set()
            await asyncio.wait({live.ended}, timeout=CLOSE_S)

    async def _answer(self, live: _Live, request: Any) -> Any:
        """The answer to a request, or what became of it instead."""
        asking = asyncio.ensure_future(request)
        try:
            await asyncio.wait({asking, live.ended}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise ConnectionError(f"the MCP server {self._server.name!r} ended during the call")
            return asking.result()
        except ConnectionError:
            raise
        except Exception as error:
            detail = getattr(error, "error", None)
            if detail is None:
                raise ConnectionError(f"the MCP server {self._server.name!r} cannot be used: {error}") from error
            if "session" in detail.message.lower() and detail.code in _GONE:
                raise _UnknownSession from error
            if detail.code in _GONE and "closed" in detail.message.lower():
                live.stop.set()
                raise ConnectionError(f"the MCP server {self._server.name!r} ended during the call") from error
            raise ToolError(detail.message) from error
        finally:
            asking.cancel()

    async def _opened(self) -> _Live:
        async with self._opening:
            if self._live is None or self._live.stop.is_set() or self._live.ended.done():
                self._live = await self._open()
            return self._live

    async def _open(self) -> _Live:
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            ended = asyncio.create_task(self._hold(ready, stop, said))
            ended.add_done_callback(lambda task: task.cancelled() or task.exception())  # it is known by what failed
            await asyncio.wait({ready, ended}, timeout=CONNECT_S, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                return _Live(session=ready.result(), stop=stop, ended=ended)
            reason = _reason(ended, said)
        ended.cancel()
        await asyncio.wait({ended}, timeout=CLOSE_S)
        raise ConnectionError(f"the MCP server {self._server.name!r} could not be reached: {reason}")

    async def _hold(self, ready: asyncio.Future[Any], stop: asyncio.Event, said: Any) -> None:
        """Keeps the session open until `stop`, or until the server ends it. One task must open and close it."""
        from mcp import ClientSession

        async with contextlib.AsyncExitStack() as stack:
            read, write = await stack.enter_async_context(self._transport(said))
            heard = await stack.enter_async_context(_relayed(read, stop))
            session = await stack.enter_async_context(ClientSession(heard, write))
            await session.initialize()
            ready.set_result(session)
            await stop.wait()

    @contextlib.asynccontextmanager
    async def _transport(self, said: Any) -> AsyncIterator[tuple[Any, Any]]:
        server = self._server
        if not server.url:
            from mcp import StdioServerParameters, stdio_client

            within = [str(Path(bounded.__file__)), str(MAX_ANSWER_BYTES)]
            command, *rest = [sys.executable, "-I", *within, *server.command]
            process = StdioServerParameters(command=command, args=rest, env=dict(server.env), cwd=server.cwd)
            async with stdio_client(process, errlog=said) as (read, write, *_):
                yield read, write
            return
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        async with (
            _bounded_client(create_mcp_http_client(headers=dict(server.headers))) as client,
            streamable_http_client(server.url, http_client=client) as (read, write, *_),
        ):
            yield read, write


def _bounded_client(client: Any) -> Any:
    """A client of httpx whose answers break off at a line that is longer than an answer may be, or that is packed."""
    import httpx

    class Bounded(httpx.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            unended = 0
            async for part in self._stream:
                _, newline, tail = part.rpartition(b"\n")
                unended = len(tail) if newline else unended + len(part)
                if unended > MAX_ANSWER_BYTES:
                    raise httpx.ReadError(f"a line of more than {MAX_ANSWER_BYTES} bytes")
                yield part

        async def aclose(self) -> None:
            await self._stream.aclose()

    def limited(handle: Any) -> Any:
        async def answer(request: Any) -> Any:
            response = await handle(request)
            if response.headers.get("content-encoding", "identity") != "identity":
                await response.aclose()
                raise httpx.ReadError("a packed answer, which was not asked for")
            response.stream = Bounded(response.stream)
            return response

        return answer

    client.headers["accept-encoding"] = "identity"
    for transport in filter(None, (client._transport, *client._mounts.values())):
        transport.handle_async_request = limited(transport.handle_async_request)
    return client


class _UnknownSession(Exception):
    """The server does not know the session."""


@contextlib.asynccontextmanager
async def _relayed(read: Any, stop: asyncio.Event) -> AsyncIterator[Any]:
    """A stream with the messages of `read`; `stop` is set when that ends, which a session keeps to itself."""
    import anyio

    send, heard = anyio.create_memory_object_stream[Any](0)

    async def relay() -> None:
        async with send:
            with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                async for message in read:
                    await send.send(message)
        stop.set()

    async with send, heard, anyio.create_task_group() as tasks:
        tasks.start_soon(relay)
        try:
            yield heard
        finally:
            tasks.cancel_scope.cancel()


def _reason(ended: asyncio.Task[None], said: Any) -> str:
    """Why a session did not open: what the process said last, or what the task raised."""
    said.seek(0)
    lines = said.read().strip().splitlines()
    if lines:
        return lines[-1][:200]
    if not ended.done():
        return f"no answer in {CONNECT_S:g} s"
    error = None if ended.cancelled() else ended.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if error else "it ended at once"


_SHARED: dict[Server, Connection] = {}


def _shared_connection(server: Server) -> Connection:
    """The process's one connection to a server."""
    if server not in _SHARED:
        if not _SHARED:
            atexit.register(_close_all)
        _SHARED[server] = Connection(server)
    return _SHARED[server]


def _close_all() -> None:
    async def close() -> None:
        await asyncio.gather(*(connection.close() for connection in _SHARED.values()), return_exceptions=True)

    with contextlib.suppress(Exception):
        asyncio.run_coroutine_threadsafe(close(), lasting_loop()).result(CLOSE_S)
