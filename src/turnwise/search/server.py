"""A small HTTP server over a search index, which also speaks Search-R1's retrieval format.

    GET  /search?q=capital+of+Kenya&k=3   {"query": ..., "hits": [{"id", "title", "text", "score"}]}
    POST /retrieve                        {"queries": [...], "topk": 3, "return_scores": true}
    GET  /health                          {"status": "ok", "articles": 1000}

`/retrieve` answers `{"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}`, one list
a query, and without `return_scores` the documents alone; `contents` is the quoted title, a newline
and the text (the format of `search_r1/search/retrieval_server.py` and of the corpora it serves).
Errors are `{"error": ...}` with status 400, 401, 404, 405, 408, 413, 414, 431, 500 or 503.

It listens on this machine alone unless there is a token, which clients then send as `Authorization: Bearer TOKEN`.
What a client may take is bounded: its request in bytes and seconds, and how many there are at once. Another index
takes the place of the one that is served between two requests; a request is answered from one of them.
"""

import collections
import contextlib
import errno
import io
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from turnwise.errors import ConfigError, RunError, TurnwiseError
from turnwise.search.corpus import joined_contents
from turnwise.search.index import Hit, SearchIndex
from turnwise.web import check_host, has_token

DEFAULT_PORT = 8765
MAX_BODY_BYTES = 1_000_000
MAX_QUERIES = 1024
MAX_K = 100
REQUEST_S = 30.0
"""Seconds from the end of the answer before, or from the connection, until a request has come whole."""
ANSWER_S = 60.0
"""Seconds that a client may take to read its answer."""
MAX_CLIENTS = 256
"""Most connections at once; more are told to come back."""
_DIGITS = 20
"""A number of so many digits is too large for anything here; Python refuses to read one of thousands."""

logger = logging.getLogger(__name__)


class RequestError(Exception):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def serve_search(
    index: SearchIndex, *, host: str = "127.0.0.1", port: int = DEFAULT_PORT, k: int = 3, token: str | None = None
) -> None:
    """Answers searches until interrupted; RunError where the port cannot be had."""
    with search_server(index, host=host, port=port, k=k, token=token) as server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            logger.info("search server stopped")


class SearchServer(ThreadingHTTPServer):
    """A thread for each of at most `MAX_CLIENTS` connections. `index` may be replaced while it runs."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], index: SearchIndex, k: int, token: str | None) -> None:
        self.index = index
        self.k = k
        self.token = token
        self.asked: collections.deque[Callable[[], None]] = collections.deque()
        """What signals asked for; `serve_forever` does it between two requests."""
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread, or says that there are too many."""
        if self._places.acquire(blocking=False):
            return super().process_request(request, client_address)
        with contextlib.suppress(OSError):
            request.settimeout(0)  # who does not take even this is not waited for
            request.send(_FULL)
        self.shutdown_request(request)

    def service_actions(self) -> None:
        """Does what was asked for."""
        while self.asked:
            self.asked.popleft()()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The life of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is the client's affair."""
        logger.debug("a connection broke", exc_info=True)


_FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"


def search_server(
    index: SearchIndex, *, host: str = "127.0.0.1", port: int = DEFAULT_PORT, k: int = 3, token: str | None = None
) -> SearchServer:
    """The server of `serve_search`, bound but not yet running; port 0 takes any free one.

    `k` is the number of hits where a request names none. Raises ConfigError for a host of other machines' reach without
    a token.
    """
    if not 1 <= k <= MAX_K:
        raise ConfigError(f"k must be between 1 and {MAX_K}; got {k}; give the number of hits")
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be between 0 and 65535; got {port}; 0 takes any free one")

    check_host(host, token)
    try:
        return SearchServer((host, port), index, k, token)
    except (OSError, UnicodeError) as error:  # a UnicodeError where the host is no name at all
        at_host = isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL
        raise RunError(
            f"the search server must be able to listen on {host}:{port}; got {getattr(error, 'strerror', error)}; "
            f"choose another {'host' if at_host else 'port'}"
        ) from error


def heed_signals(server: SearchServer, opened: Callable[[], SearchIndex]) -> None:
    """Lets SIGINT end `serve_forever` with KeyboardInterrupt, and SIGHUP replace the served index by `opened()`.

    An index that cannot be had leaves the old one, with a warning. The handlers only ask: a signal may come while the
    interpreter holds a lock, or cleans up and loses what is raised.
    """

    def reload() -> None:
        try:
            server.index = opened()
            logger.warning("%s articles are served now", len(server.index))
        except TurnwiseError as error:
            logger.warning("the index stays as it was: %s", error)

    def begin() -> None:
        threading.Thread(target=reload, daemon=True).start()

    def stop() -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, lambda *_: server.asked.append(stop))
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: server.asked.append(begin))


# --------------------------------------------------------------------------- what is answered


def retrieve_answer(index: SearchIndex, request: Any, default_k: int) -> dict[str, Any]:
    """The answer to the JSON body of `POST /retrieve`; RequestError where it is malformed."""
    if not isinstance(request, dict):
        raise RequestError(400, "the body must be a JSON object with 'queries'")
    queries = request.get("queries")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RequestError(400, "field 'queries' must be a list of strings")
    if len(queries) > MAX_QUERIES:
        raise RequestError(400, f"field 'queries' must hold at most {MAX_QUERIES}")
    with_scores = request.get("return_scores", False)
    if not isinstance(with_scores, bool):
        raise RequestError(400, "field 'return_scores' must be true or false")
    k = _checked_k(request.get("topk") or default_k, "field 'topk'")
    found = [index.search(query, k) for query in queries]
    return {"result": [[_entry(hit, with_scores) for hit in hits] for hits in found]}


def search_answer(index: SearchIndex, query_string: str, default_k: int) -> dict[str, Any]:
    """The answer to `GET /search`; RequestError where `q` is missing or `k` is no number."""
    fields = parse_qs(query_string)
    if "q" not in fields:
        raise RequestError(400, "parameter 'q' must be given: /search?q=words&k=3")
    given = fields.get("k", [str(default_k)])[-1]
    k = _checked_k(int(given) if given.isdecimal() and len(given) < _DIGITS else given, "parameter 'k'")
    hits = index.search(fields["q"][-1], k)
    return {"query": fields["q"][-1], "hits": [asdict(hit) for hit in hits]}


def _entry(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = {"id": hit.id, "contents": joined_contents(hit)}
    return {"document": document, "score": hit.score} if with_score else document


def _checked_k(value: object, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_K:
        return value
    raise RequestError(400, f"{name} must be a whole number from 1 to {MAX_K}")


# ------------------------------------------------------------------------------------- HTTP


class _Incoming(io.RawIOBase):
    """What a client sends, up to a deadline that does not move with each byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline = time.monotonic() + REQUEST_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request came too slowly")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, answers with JSON."""

    server: SearchServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version = "turnwise"

    def setup(self) -> None:
        super().setup()
        self._incoming = _Incoming(self.connection)
        self.rfile = io.BufferedReader(self._incoming)

    def handle_one_request(self) -> None:
        self._incoming.deadline = time.monotonic() + REQUEST_S
        super().handle_one_request()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The standard library's refusals of a request that is none, in our shape."""
        self.close_connection = True
        self._send(int(code), json.dumps({"error": message or "the request must be HTTP"}).encode())

    def do_GET(self) -> None:
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self.close_connection = True  # its body is not read, and would be taken for the next request
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._post)

    def _get(self) -> dict[str, Any]:
        url = self._url()
        if url.path == "/health":
            return {"status": "ok", "articles": len(self.server.index)}
        if url.path == "/search":
            return search_answer(self.server.index, url.query, self.server.k)
        if url.path == "/retrieve":
            raise RequestError(405, "/retrieve must be called with POST")
        raise RequestError(404, "unknown path; known: /search, /retrieve, /health")

    def _post(self) -> dict[str, Any]:
        body = self._body()
        path = self._url().path
        if path in ("/search", "/health"):
            raise RequestError(405, f"{path} must be called with GET")
        if path != "/retrieve":
            raise RequestError(404, "unknown path; known: /search, /retrieve, /health")
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, "the body must be JSON") from error
        return retrieve_answer(self.server.index, request, self.server.k)

    def _url(self) -> SplitResult:
        try:
            return urlsplit(self.path)
        except ValueError as error:
            raise RequestError(400, "the path must be that of a URL") from error

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise RequestError(400, "header Content-Length must give the body's size in bytes")
        if len(length) >= _DIGITS or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise RequestError(413, f"the body must hold at most {MAX_BODY_BYTES} bytes")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError as error:
            self.close_connection = True
            raise RequestError(408, f"the request must come within {REQUEST_S:g} seconds") from error
        if len(body) < int(length):
            self.close_connection = True
            raise RequestError(400, "the body broke off")
        return body

    def _respond(self, answer: Any) -> None:
        try:
            if not has_token(self.headers.get("Authorization"), self.server.token):
                self.close_connection = True
                raise RequestError(401, "the server's token must be sent as a bearer token")
            status, content = 200, answer()
        except RequestError as error:
            status, content = error.status, {"error": str(error)}
        except Exception:
            logger.exception("search request failed: %s", self.path[:200])
            status, content = 500, {"error": "the search failed; the server's log says why"}
        body = json.dumps(content).encode()
        try:
            self._send(status, body)
        except OSError:
            self.close_connection = True  # the client has gone, or does not read; nobody waits for the rest

    def _send(self, status: int, body: bytes) -> None:
        self.connection.settimeout(ANSWER_S)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
