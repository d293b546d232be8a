"""OpenEnv servers that hang, drop, flood, send no JSON or answer twice: one failed rollout each, and others go on."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from typing import Any

import pytest

pytest.importorskip("openenv", reason='needs openenv: pip install "turnwise[openenv]"')

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from turnwise.chat import byte_chat
from turnwise.engine import ScriptedEngine
from turnwise.envs import load_source
from turnwise.errors import InputError
from turnwise.rollout import Limits, run_groups
from turnwise.types import Rollout

CHAT = byte_chat()
LIMITS = Limits(max_turn_tokens=60, context=4000, max_turns=3)
SCHEMA = {"action": {"properties": {"message": {"type": "string"}}, "required": ["message"]}}
Fault = Callable[[ServerConnection], Awaitable[None]]


def observed(text: str, **fields: Any) -> str:
    return json.dumps({"type": "observation", "data": {"observation": {"text": text}, "reward": 0.5, **fields}})


@contextlib.contextmanager
def serving(fault: Fault, schema: bytes = json.dumps(SCHEMA).encode()) -> Iterator[str]:
    """A server whose first session meets the fault at its first step; later ones end with a reward."""
    started, over = threading.Event(), asyncio.Event()
    told: list[Any] = []
    sessions = iter(range(1000))

    async def session(connection: ServerConnection) -> None:
        first = next(sessions) == 0
        async for message in connection:
            kind = json.loads(message)["type"]
            if kind == "reset":
                await connection.send(observed("go"))
            elif kind == "step" and first:
                first = False
                await fault(connection)
            elif kind == "step":
                await connection.send(observed("right", done=True))

    def plain(_: ServerConnection, request: Request) -> Response | None:
        if request.path == "/ws":
            return None
        return Response(HTTPStatus.OK, "OK", Headers({"Content-Length": str(len(schema))}), schema)

    async def run() -> None:
        async with serve(session, "127.0.0.1", 0, process_request=plain, compression=None) as made:
            told.extend((asyncio.get_running_loop(), made.sockets[0].getsockname()[1]))
            started.set()
            await over.wait()
            made.close(close_connections=True)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield f"http://127.0.0.1:{told[1]}"
    finally:
        told[0].call_soon_threadsafe(over.set)
        thread.join(timeout=20)


async def hang(connection: ServerConnection) -> None:
    await asyncio.sleep(5)


async def drop(connection: ServerConnection) -> None:
    connection.transport.abort()


async def close(connection: ServerConnection) -> None:
    await connection.close()


async def garbage(connection: ServerConnection) -> None:
    await connection.send(bytes(range(256)) * 40)


async def no_json(connection: ServerConnection) -> None:
    await connection.send("<html>")


async def no_object(connection: ServerConnection) -> None:
    await connection.send("[1]")


async def deep(connection: ServerConnection) -> None:
    await connection.send("[" * 200_000)


async def no_websocket(connection: ServerConnection) -> None:
    connection.transport.write(b"\xff" * 1000)


async def flood(connection: ServerConnection) -> None:
    async def pieces():
        while True:
            yield "x" * 65536

    await connection.send(pieces())


async def another_kind(connection: ServerConnection) -> None:
    await connection.send(json.dumps({"type": "state", "data": {"observation": 3}}))


async def nothing_in_it(connection: ServerConnection) -> None:
    await connection.send("{}")


async def no_number(connection: ServerConnection) -> None:
    await connection.send(observed("a", reward="much"))


FAULTS = [hang, drop, close, garbage, no_json, no_object, deep, no_websocket, flood, no_number]


def played(url: str, count: int) -> list[Rollout]:
    source = load_source(f"openenv:{url}?timeout=1")
    says = iter("abc" * count)

    def slowly(_: str) -> str:
        time.sleep(0.1)  # what the server sends meanwhile has arrived
        return next(says)

    engine = ScriptedEngine(slowly, CHAT)
    make = lambda task: source.environment(task, 3)  # noqa: E731
    groups = run_groups([source.task_of("1")], make, engine, CHAT, group_size=count, limits=LIMITS)
    [group] = asyncio.run(groups)
    return group


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_server_that_fails_is_one_failed_rollout_of_its_group(fault: Fault):
    with serving(fault) as url:
        group = played(url, 3)
    assert sorted(rollout.stop for rollout in group) == ["done", "done", "error"]
    [failed] = [rollout for rollout in group if rollout.stop == "error"]
    assert failed.error
    assert "\n" not in failed.error
    assert [dict(r.turns[0].rewards) for r in group if r.stop == "done"] == [{"environment": 0.5}] * 2


@pytest.mark.parametrize("fault", [another_kind, nothing_in_it], ids=lambda f: f.__name__)
def test_an_answer_of_another_shape_pays_nothing(fault: Fault):
    with serving(fault) as url:
        [rollout] = played(url, 1)
    assert not rollout.turns[0].rewards


def test_an_answer_too_many_is_not_taken_for_the_next_ones():
    async def twice(connection: ServerConnection) -> None:
        await connection.send(observed("first"))
        await connection.send(observed("of another"))
        await asyncio.sleep(0.2)

    with serving(twice) as url:
        [rollout] = played(url, 1)
    assert "of another" not in "".join(result.text for turn in rollout.turns for result in turn.results)
    assert rollout.stop == "error"
    assert "ConnectionError: the server answered more often than it was asked" in str(rollout.error)


@pytest.mark.parametrize("schema", [b"", b"[]", b"[" * 200_000, b'{"action": 3}', b"\xff", b"x" * 5_000_000])
def test_a_schema_that_is_none_is_one_line(schema: bytes):
    with serving(hang, schema) as url, pytest.raises(InputError, match="must be an OpenEnv server") as caught:
        load_source(f"openenv:{url}?timeout=2")
    assert "\n" not in str(caught.value)
