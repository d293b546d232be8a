"""The HTTP server: routes, streams, who may ask, how much at once.

    POST /v1/chat/completions     GET /v1/models     GET /health

Starlette and uvicorn read and write HTTP; everything runs in one event loop with the engine, which draws for all
requests together. A client that goes away cancels its request, and frees its row of the batch.
"""

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from turnwise.config import on_engine
from turnwise.errors import ConfigError, RunError
from turnwise.evaluation import Checkpoint, make_engine, make_engines, rollout_limits, run_policy
from turnwise.serving.shapes import ApiError, ChatRequest, chat_request, model_list, new_head
from turnwise.serving.talk import RAW, Answer, Job, Served, prepared
from turnwise.setting import make_tools, played_protocol
from turnwise.web import check_host, has_token

DEFAULT_PORT = 8000
MAX_BODY_BYTES = 4_000_000
MAX_REQUESTS = 256
"""Most requests under way; more are told to come back."""
MAX_ROWS = 64
"""Most requests that are drawn together; others wait for a row."""
HEAD_TIMEOUT_S = 30.0
"""Seconds from the connection, or the answer before, until a request's head has come whole."""
BODY_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 60.0
"""Seconds that a client may leave what was sent to it unread."""
STOP_S = 10.0
"""How long requests under way may take after Ctrl-C."""

logger = logging.getLogger(__name__)


def load_served(
    run: str | Path,
    *,
    name: str | None = None,
    checkpoint: Checkpoint = "best",
    engine: Literal["hf", "vllm"] = "hf",
) -> Served:
    """The policy of a run with its tools, as `turnwise ask` plays it. ConfigError where it has none."""
    policy, config = run_policy(run, checkpoint)
    if config.environment:
        raise ConfigError(
            f"a served agent must have tools that answer it; {run} plays in {config.environment}, which no client "
            "speaks for; watch it with turnwise ask, or serve the policy alone: turnwise export, then turnwise serve"
        )
    config = on_engine(dataclasses.replace(config, protocol=played_protocol(config)), engine)
    name = Path(run).resolve().name if name is None else name
    if not name or name.endswith(RAW):
        raise ConfigError(f"name must be a model's name that does not end with {RAW}; got {name!r}; give another")
    made = (
        make_engine(policy, max_rows=MAX_ROWS) if engine == "hf" else make_engines(policy, config, max_rows=MAX_ROWS)[0]
    )
    return Served(
        name=name,
        config=config,
        chat=policy.chat,
        engine=made,
        tools=make_tools(config, ()),
        limits=rollout_limits(config, policy),
    )


class Impatient(H11Protocol):
    """A connection of uvicorn's that is dropped where a head does not come, or an answer is not taken, in time.

    uvicorn itself waits for a connection's first head for ever, and for a later one as long as bytes come.
    """

    _head: asyncio.TimerHandle | None = None
    _answer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._head:
            self._head.cancel()

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        if self.cycle is before and not self.transport.is_closing():
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer = self.loop.call_later(ANSWER_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer:
            self._answer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self._head, self._answer)):
            timer.cancel()

    def _await_head(self) -> None:
        if self._head:
            self._head.cancel()
        self._head = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)


def server(app: Starlette) -> uvicorn.Server:
    """The HTTP server over an application; `run(sockets=[...])` starts it."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="off",
            http=Impatient,
            loop="asyncio",
            timeout_graceful_shutdown=int(STOP_S),
        )
    )


def listening(host: str, port: int, *, token: str | None) -> socket.socket:
    """A socket that listens; port 0 takes any free one.

    Raises ConfigError where other machines could ask without a token, RunError where the port cannot be had.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be between 0 and 65535; got {port}; 0 takes any free one")
    check_host(host, token)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except (OSError, UnicodeError) as error:  # a UnicodeError where the host is no name at all
        sock.close()
        at_host = isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL
        raise RunError(
            f"the server must be able to listen on {host}:{port}; got {getattr(error, 'strerror', error)}; choose "
            f"another {'host' if at_host else 'port'}"
        ) from error
    return sock


# ------------------------------------------------------------------------------------------ routes


def make_app(served: Served, *, token: str | None = None) -> Starlette:
    """The application that answers for a policy; with a token, only those who send it."""
    desk, started = _Desk(served, token), int(time.time())

    async def models(request: Request) -> Response:
        desk.check_token(request)
        return JSONResponse(model_list(served.names, started))

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "model": served.name, "requests": desk.open})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", desk.chat, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={ApiError: _refused, HTTPException: _no_route, Exception: _broken},
    )


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path[:100]} is unknown; known: POST /v1/chat/completions, GET /v1/models"
    return JSONResponse(ApiError(error.status_code, text).body(), status_code=error.status_code)


async def _broken(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed; its log says why").body(), status_code=500)


class _Desk:
    """Takes requests in."""

    def __init__(self, served: Served, token: str | None) -> None:
        self.open = 0
        """Requests under way."""
        self._served = served
        self._token = token

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self.check_token(request)
        if self.open >= MAX_REQUESTS:
            raise ApiError(429, f"{MAX_REQUESTS} requests are under way; come back", code="rate_limit_exceeded")
        asked = chat_request(await _json_body(request))
        job = prepared(self._served, asked)
        self.open += 1
        if asked.stream:
            return StreamingResponse(
                self._stream(job, asked), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        try:
            answer = await _unless_gone(job, request)
        finally:
            self.open -= 1
        return JSONResponse(
            new_head(asked.model).completion(answer.message(), answer.finish, answer.usage, answer.extra)
        )

    def check_token(self, request: Request) -> None:
        """ApiError, 401, unless the request has the token, where there is one."""
        if not has_token(request.headers.get("authorization"), self._token):
            raise ApiError(401, "the server's token must be sent as a bearer token", code="invalid_api_key")

    async def _stream(self, job: Job, asked: ChatRequest) -> AsyncIterator[str]:
        """The response in server-sent events."""
        head = new_head(asked.model)
        events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        job.tell = lambda event, value: events.put_nowait((event, value))
        playing = asyncio.create_task(job.run())
        playing.add_done_callback(lambda _: events.put_nowait(("done", None)))
        try:
            yield _event(head.chunk({"role": "assistant", "content": ""}))
            while (event := await events.get())[0] != "done":
                kind, value = event
                if kind == "content":
                    yield _event(head.chunk({"content": value}))
                else:
                    yield _event(head.chunk({}, turnwise={kind: value}))
            answer = await playing
            for delta in _last_deltas(answer):
                yield _event(head.chunk(delta))
            rest = {name: value for name, value in answer.extra.items() if name != "steps"}
            yield _event(head.chunk({}, finish=answer.finish, turnwise=rest))
            if asked.include_usage:
                yield _event(head.chunk(None, usage=answer.usage))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        except Exception:
            logger.exception("a request failed")
            yield _event(ApiError(500, "the server failed; its log says why").body())
        finally:
            self.open -= 1
            playing.cancel()


def _last_deltas(answer: Answer) -> list[dict[str, Any]]:
    """What of a message is sent when it is whole."""
    deltas: list[dict[str, Any]] = []
    if answer.reasoning:
        deltas.append({"reasoning_content": answer.reasoning})
    if answer.tool_calls:
        deltas.append({"tool_calls": [{"index": i, **call} for i, call in enumerate(answer.tool_calls)]})
    return deltas


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _unless_gone(job: Job, request: Request) -> Answer:
    """The answer; the work is dropped where the client has gone."""
    playing = asyncio.create_task(job.run())
    try:
        while not playing.done():
            await asyncio.wait({playing}, timeout=0.5)
            if not playing.done() and await request.is_disconnected():
                raise ApiError(499, "the client has gone")
        return await playing
    finally:
        playing.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await playing


async def _json_body(request: Request) -> Any:
    """The body. ApiError where it is too large, too slow, or no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page in a browser can send to this machine unasked has another type
        raise ApiError(415, "the body must be sent as application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body must hold at most {MAX_BODY_BYTES} bytes")
    except TimeoutError as error:
        raise ApiError(408, f"the body must come within {BODY_TIMEOUT_S:g} seconds") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the body broke off") from error
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body must be JSON") from error
