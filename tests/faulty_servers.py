"""A server on loopback that fails in a chosen way, for the clients' fault tests."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

Behaviour = Callable[[socket.socket, threading.Event], None]


@contextlib.contextmanager
def faulty(behaviour: Behaviour) -> Iterator[str]:
    """The address of a server that reads a request on each connection and then behaves so."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            read_request(connection)
            behaviour(connection, over)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def read_request(connection: socket.socket) -> bytes:
    """Header and body of a request."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return body


def response(content: object, length: int | None = None) -> bytes:
    """A whole answer of status 200, or one that claims another length."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body) if length is None else length, body)


def hang(connection: socket.socket, over: threading.Event) -> None:
    """Never answers."""
    over.wait(30)


def drip(connection: socket.socket, over: threading.Event) -> None:
    """Answers a byte at a time, so that no single wait is long."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not over.wait(0.05):
        connection.sendall(b"[")


def flood(connection: socket.socket, over: threading.Event) -> None:
    """Answers without end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
    while not over.is_set():
        connection.sendall(b"1," * 32768)


def drop(connection: socket.socket, over: threading.Event) -> None:
    """Closes the connection instead of an answer."""


def break_off(connection: socket.socket, over: threading.Event) -> None:
    """Closes in the middle of an answer."""
    connection.sendall(response(b'{"result": [', 1000))


def garbage(connection: socket.socket, over: threading.Event) -> None:
    """Answers with bytes that are no HTTP."""
    connection.sendall(bytes(range(256)) * 40)


def garbage_body(connection: socket.socket, over: threading.Event) -> None:
    """Answers with a body that is no JSON."""
    connection.sendall(response(b"\xff\xfe" * 500))


def deep(connection: socket.socket, over: threading.Event) -> None:
    """Answers with JSON too deep to be read."""
    connection.sendall(response(b"[" * 200_000))


def of_another(connection: socket.socket, over: threading.Event) -> None:
    """Answers two queries where one was asked."""
    document = {"document": {"id": "1", "contents": "Kenya\nA country."}}
    connection.sendall(response({"result": [[document], [document]]}))


FAULTS = (hang, drip, flood, drop, break_off, garbage, garbage_body, deep, of_another)
