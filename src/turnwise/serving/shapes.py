"""OpenAI's chat completions: requests checked, responses and errors in their shape. Knows no policy and no server.

What a request asks for and the server cannot do is refused, never ignored: a client that sets `stop` or `top_p` would
otherwise believe that they hold. Fields that do not touch the text (`user`, `metadata`, ...) are let pass.
"""

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turnwise.conversations import read_messages, read_tools
from turnwise.errors import InputError
from turnwise.tools import Tool
from turnwise.types import Message

MAX_MESSAGES = 1000
MAX_TOOLS = 128
MAX_TEMPERATURE = 2.0
MAX_SEED = 2**63
READ = ("model", "messages", "tools", "temperature", "max_tokens", "max_completion_tokens", "seed", "stream")
"""The fields that are read here."""
DEFAULTS: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([], ""),
    "logit_bias": ({},),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
}
"""Fields of which only these values are possible, as the policy is sampled as it was trained; null is one too."""
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options")
"""Fields that do not touch the text. Of `stream_options`, `include_usage` is read."""


class ApiError(Exception):
    """A request that is refused: HTTP status, and the error's fields as OpenAI names them."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What a client asks for; None is what it leaves to the server."""

    model: str
    messages: Sequence[Message]
    tools: Mapping[str, Tool]
    temperature: float | None
    max_tokens: int | None
    seed: int | None
    stream: bool
    include_usage: bool
    """Whether a stream ends with the number of tokens."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that the policy read and wrote; those that tools answered in the course of the request are read ones."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        """As OpenAI counts them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def chat_request(body: Any) -> ChatRequest:
    """The request in a JSON body. ApiError, 400, where it is malformed or asks for what cannot be had."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object with 'model' and 'messages'")
    _check_fields(body)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError(400, "'model' must be the name of a model; /v1/models lists them", param="model")
    return ChatRequest(
        model=model,
        messages=_messages(body.get("messages")),
        tools=_tools(body.get("tools")),
        temperature=_number(body, "temperature", 0, MAX_TEMPERATURE),
        max_tokens=_max_tokens(body),
        seed=_whole(body, "seed", -MAX_SEED, MAX_SEED - 1),
        stream=_flag(body, "stream"),
        include_usage=_flag(_options(body), "include_usage"),
    )


def _check_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in READ or name in IGNORED or value is None:
            continue
        if name not in DEFAULTS:
            raise ApiError(400, f"unrecognized request argument: {name[:60]!r}", param=name[:60])
        if not any(type(value) in (type(one), int, float) and value == one for one in DEFAULTS[name]):
            only = " or ".join(map(repr, DEFAULTS[name]))
            raise ApiError(
                400,
                f"{name!r} must be {only} or left out; this server cannot do otherwise",
                param=name,
                code="unsupported",
            )


def _messages(data: Any) -> Sequence[Message]:
    if isinstance(data, list) and len(data) > MAX_MESSAGES:
        raise ApiError(400, f"'messages' must be at most {MAX_MESSAGES}; got {len(data)}", param="messages")
    try:
        return read_messages(data)
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from error


def _tools(data: Any) -> Mapping[str, Tool]:
    if isinstance(data, list) and len(data) > MAX_TOOLS:
        raise ApiError(400, f"'tools' must be at most {MAX_TOOLS}; got {len(data)}", param="tools")
    try:
        return read_tools(data)
    except InputError as error:
        raise ApiError(400, str(error), param="tools") from error


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    given = [_whole(body, name, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")]
    return next((number for number in given if number is not None), None)


def _options(body: Mapping[str, Any]) -> Mapping[str, Any]:
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "'stream_options' must be an object", param="stream_options")
    return options


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name!r} must be true or false", param=name)
    return bool(value)


def _number(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (math.isfinite(value) and low <= value <= high)
    ):
        raise ApiError(400, f"{name!r} must be a number from {low:g} to {high:g}", param=name)
    return float(value)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ApiError(400, f"{name!r} must be a whole number from {low} to {high}", param=name)
    return value


# ------------------------------------------------------------------------------------- responses


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all parts of one response have in common."""

    id: str
    created: int
    model: str

    def completion(
        self, message: Mapping[str, Any], finish: str, usage: Usage, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A whole response. `extra` stands under `turnwise`, which OpenAI's clients let pass."""
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, "message": dict(message), "finish_reason": finish, "logprobs": None}],
            "usage": usage.body(),
            "turnwise": dict(extra),
        }

    def chunk(
        self, delta: Mapping[str, Any] | None, *, finish: str | None = None, usage: Usage | None = None, **fields: Any
    ) -> dict[str, Any]:
        """A part of a streamed response; that with the usage has no delta and no choice."""
        choices = [] if delta is None else [{"index": 0, "delta": dict(delta), "finish_reason": finish}]
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **({"usage": usage.body()} if usage else {}),
            **fields,
        }


def new_head(model: str) -> Head:
    """The head of a new response."""
    return Head(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=model)


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    """The models that are served."""
    entries = [{"id": name, "object": "model", "created": created, "owned_by": "turnwise"} for name in names]
    return {"object": "list", "data": entries}
