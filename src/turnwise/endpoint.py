"""An OpenAI-compatible endpoint: chat messages in, text out; asked from several threads, retried where it fails.

Works with whatever speaks OpenAI's chat completions (vLLM, llama.cpp, Ollama, `turnwise serve`, a paid one). The key
comes from an environment variable, and is sent to the endpoint and written nowhere.
"""

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from turnwise.errors import ConfigError
from turnwise.types import ToolCall
from turnwise.web import whole_body

MAX_PAUSE_S = 30.0
"""The longest pause before a request is repeated, whatever the endpoint asks for."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Whom to ask, and how patiently."""

    OPTIONS: ClassVar[Mapping[str, str]] = {"url": "endpoint", "model": "model", "key_env": "key-env"}
    """What the user calls these fields."""

    url: str
    """The endpoint, with or without `/chat/completions`: http://127.0.0.1:8000/v1."""
    model: str
    """The endpoint's name for the model."""
    key_env: str | None = None
    """The environment variable that holds the endpoint's key; None sends none. The key itself is written nowhere."""
    concurrency: int = 8
    """Most requests at once."""
    timeout_s: float = 30.0
    """Seconds that one request may take."""
    attempts: int = 4
    """How often one request is made at most, where the connection or the server fails."""
    backoff_s: float = 0.5
    """The first pause before a request is repeated; each further one is twice as long."""

    def __post_init__(self) -> None:
        _check_url(self.url, self.OPTIONS)
        if not isinstance(self.model, str) or not self.model.strip():
            raise ConfigError(
                f"{self.OPTIONS['model']} must name the endpoint's model; got {self.model!r}; give its name"
            )
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(self.key_env)):
            raise ConfigError(  # it may be the key itself, so it is not repeated
                f"{self.OPTIONS['key_env']} must be the name of an environment variable, not the key; got something "
                "else; put the key into a variable and give the variable's name"
            )
        if self.concurrency < 1 or self.attempts < 1 or not self.timeout_s > 0 or self.backoff_s < 0:
            raise ConfigError(
                "an endpoint's concurrency and attempts must be >= 1, its timeout_s > 0 and backoff_s >= 0; got "
                f"{self.concurrency}, {self.attempts}, {self.timeout_s} and {self.backoff_s}; give such numbers"
            )


def _check_url(url: Any, options: Mapping[str, str]) -> None:
    try:
        parts = urllib.parse.urlsplit(url if isinstance(url, str) and url.isascii() and " " not in url else "")
        host, _ = parts.hostname, parts.port
        fits = parts.scheme in ("http", "https") and host and not (parts.query or parts.fragment or "@" in parts.netloc)
    except ValueError:
        fits = False
    if not fits:
        shown = "one with a name or password" if "@" in str(url) else repr(url)
        raise ConfigError(
            f"{options['url']} must be an http:// or https:// address without a password, ? or #; got {shown}; write "
            f"for example http://127.0.0.1:8000/v1, and name the key's variable with {options['key_env']}"
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the endpoint said, and what it took."""

    text: str
    """Blank where the answer has another shape."""
    finish: str | None
    """`stop`, `length`, or whatever else the endpoint says."""
    prompt_tokens: int
    completion_tokens: int
    retried: int
    """Requests beyond the first one."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls in the endpoint's own shape, where the request named tools; arguments that are no object are None."""


class EndpointFailure(Exception):
    """The endpoint gave no reply."""

    def __init__(self, text: str, *, retried: int = 0, lasting: bool = False, pause_s: float = 0.0) -> None:
        super().__init__(text)
        self.retried = retried
        self.lasting = lasting
        """Whether the same request would fail again."""
        self.pause_s = pause_s
        """How long the endpoint wants to be left alone."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would take the key to another address."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


class Client:
    """One endpoint, used from several threads. ConfigError for a key that cannot be sent."""

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        base = config.url.rstrip("/")
        self.url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self._key = _key(config.key_env, config.OPTIONS["key_env"])
        local = urllib.parse.urlsplit(self.url).hostname in LOCAL_HOSTS
        self._opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if local else []))
        self._lock = threading.Lock()
        self._failed_in_a_row = 0

    def body(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> bytes:
        """The request that asks for the next message of a conversation."""
        return json.dumps({"model": self.config.model, "messages": messages, **fields}).encode()

    def complete(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Reply:
        """The model's next message; failures that may pass are tried again. Raises EndpointFailure.

        Once `concurrency` or more requests in a row (at least 4) have come to nothing, none is made any more.
        """
        body = self.body(messages, **fields)
        for attempt in range(self.config.attempts):
            if self._failed_in_a_row >= max(self.config.concurrency, 4):
                raise EndpointFailure(
                    f"not asked, as {self._failed_in_a_row} requests in a row came to nothing", retried=attempt
                )
            try:
                answer = self._post(body)
            except EndpointFailure as failure:
                failure.retried = attempt
                if failure.lasting:
                    raise
                if attempt + 1 == self.config.attempts:
                    self._count(failed=True)
                    raise
                time.sleep(min(MAX_PAUSE_S, max(failure.pause_s, self.config.backoff_s * 2**attempt)))
            else:
                self._count(failed=False)
                return _reply(answer, attempt)
        raise AssertionError("every attempt returns or raises")

    def _count(self, *, failed: bool) -> None:
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0

    def _post(self, body: bytes) -> Any:
        """The endpoint's answer as JSON, None where it is none. Raises EndpointFailure."""
        headers = {"Content-Type": "application/json", "User-Agent": "turnwise"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, body, headers)
        deadline = time.monotonic() + self.config.timeout_s
        try:
            with self._opener.open(request, timeout=self.config.timeout_s) as response:
                content = whole_body(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from error
        except TimeoutError as error:
            raise EndpointFailure(f"no answer within {self.config.timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise EndpointFailure(f"no answer within {self.config.timeout_s:g} s") from error
            raise EndpointFailure(short(f"no connection: {reason or type(error).__name__}")) from error
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            return None

    def _refused(self, error: urllib.error.HTTPError) -> EndpointFailure:
        """What an error status says, without the key should the endpoint repeat it."""
        try:
            said = error.read1(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, ValueError):
            said = ""
        if self._key:
            said = said.replace(self._key, "***")
        asked = error.headers.get("Retry-After") or ""
        return EndpointFailure(
            f"status {error.code}" + (f": {short(said)}" if said.strip() else ""),
            lasting=error.code != 429 and error.code < 500,
            pause_s=float(asked) if re.fullmatch(r"[0-9]{1,6}", asked) else 0.0,
        )


def short(text: str, length: int = 200) -> str:
    """Text on one line that any terminal can print, cut."""
    line = " ".join(text.split())
    cut = line if len(line) <= length else line[:length] + "..."
    return cut.encode("utf-8", "backslashreplace").decode()


def _key(name: str | None, option: str) -> str | None:
    """The key in an environment variable. ConfigError, without the key, where there is none that can be sent."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        what = "holds characters that cannot be sent" if key else "is not set"
        raise ConfigError(f"{option} must name a variable that holds the key; {name} {what}; set it")
    return key


def _reply(answer: Any, retried: int) -> Reply:
    """The text and token counts in an endpoint's answer; no text where it has another shape."""
    try:
        choice = answer["choices"][0]
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        choice, text, finish = None, "", None
    usage = answer.get("usage") if isinstance(answer, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (n if isinstance(n, int) and n > 0 else 0 for n in counts)
    return Reply(
        text=text if isinstance(text, str) else "",
        finish=finish if isinstance(finish, str) else None,
        prompt_tokens=prompt,
        completion_tokens=completion,
        retried=retried,
        tool_calls=_calls(choice),
    )


def _calls(choice: Any) -> tuple[ToolCall, ...]:
    """The calls in a message; none where they have another shape."""
    try:
        functions = [call["function"] for call in choice["message"].get("tool_calls") or ()]
        return tuple(ToolCall(name=str(f["name"]), arguments=_arguments(f.get("arguments"))) for f in functions)
    except (KeyError, TypeError, AttributeError):
        return ()


def _arguments(given: Any) -> Mapping[str, Any] | None:
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
