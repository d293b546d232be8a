"""The search server under load: many and slow clients, bad requests, another corpus while it serves."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from turnwise.errors import ConfigError
from turnwise.search import Article, SearchIndex, remote_search_tool, search_server, server

NUMBERS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def articles(word: str) -> list[Article]:
    return [Article(id=f"{word}-{n}", title=n, text=f"The {n} is {word}.") for n in NUMBERS]


@contextlib.contextmanager
def serving(index: SearchIndex, **options) -> Iterator[server.SearchServer]:
    made = search_server(index, port=0, **options)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def ask(port: int, query: str, token: str = "") -> list[dict]:
    body = json.dumps({"queries": [query], "topk": 1}).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/retrieve", body, headers)
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.loads(response.read())["result"][0]


def raw(port: int, data: bytes) -> bytes:
    """All that the server says to some bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_64_clients_at_once_each_get_their_own_answer():
    with serving(SearchIndex(articles("old"))) as made:
        port = made.server_address[1]
        start = threading.Barrier(64)

        def client(number: int) -> list[str]:
            start.wait()
            return [ask(port, NUMBERS[(number + i) % 8])[0]["id"] for i in range(8)]

        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(client, range(64)))
    assert answers == [[f"old-{NUMBERS[(number + i) % 8]}" for i in range(8)] for number in range(64)]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HT",
        b"POST /retrieve HTTP/1.1\r\nContent-Length: 100\r\n",
        b"POST /retrieve HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
    ],
)
def test_a_client_that_sends_a_byte_at_a_time_is_dropped_and_blocks_nobody(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
):
    monkeypatch.setattr(server, "REQUEST_S", 0.5)
    with serving(SearchIndex(articles("old"))) as made:
        port = made.server_address[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:
            slow.sendall(sent)
            started, said = time.monotonic(), b""
            slow.settimeout(0.05)
            while time.monotonic() - started < 5:
                assert ask(port, "beta")[0]["id"] == "old-beta"
                try:
                    slow.sendall(b" ")
                    part = slow.recv(4096)
                except TimeoutError:
                    continue
                except OSError:
                    break
                said += part
                if not part:
                    break
            assert 0.3 < time.monotonic() - started < 3
    assert said == b"" or b" 408 " in said


def test_more_clients_than_places_are_told_so_and_a_place_comes_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "MAX_CLIENTS", 2)
    with serving(SearchIndex(articles("old"))) as made:
        port = made.server_address[1]
        held = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(2)]
        for connection in held:
            connection.request("GET", "/health")
            assert connection.getresponse().read()
        assert raw(port, b"").startswith(b"HTTP/1.1 503 ")
        for connection in held:
            connection.close()
        for _ in range(100):
            try:
                assert ask(port, "beta")
                break
            except OSError:
                time.sleep(0.02)
        else:
            pytest.fail("no place came free")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /retrieve HTTP/1.1\r\nContent-Length: 5000000000\r\n\r\n", b"413"),
        (b"POST /retrieve HTTP/1.1\r\nContent-Length: 3\r\nConnection: close\r\n\r\n{]}", b"400"),
        (b"POST /retrieve HTTP/1.1\r\nContent-Length: 90000\r\nConnection: close\r\n\r\n" + b"[" * 90000, b"400"),
        (b"POST /retrieve HTTP/1.1\r\nConnection: close\r\n\r\n", b"400"),
        (b"\x00\x01\x02\xff\xfe\r\n\r\n", b"400"),
        (b"GET /search?q=a HTTP/9.9.9\r\n\r\n", b"400"),
        (b"GET http://[ HTTP/1.1\r\nConnection: close\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
        (b"BREW /coffee HTTP/1.1\r\n\r\n", b"501"),
    ],
)
def test_huge_and_malformed_requests_are_refused_in_json_and_the_next_one_is_answered(request_: bytes, status: bytes):
    with serving(SearchIndex(articles("old"))) as made:
        port = made.server_address[1]
        started = time.monotonic()
        said = raw(port, request_)
        assert time.monotonic() - started < 3
        if b"HTTP/" in said[:5]:
            assert said.split(b" ", 2)[1] == status
        head, _, body = said.partition(b"\r\n\r\n")
        assert list(json.loads(body or head)) == ["error"]
        assert ask(port, "beta")[0]["id"] == "old-beta"


def test_an_index_that_is_rebuilt_or_added_to_while_it_serves_answers_from_old_or_new(tmp_path: Path):
    folder, over, seen = tmp_path / "index", threading.Event(), set()
    with serving(SearchIndex.build(articles("old"), folder)) as made:
        port = made.server_address[1]

        def client() -> int:
            count = 0
            while not over.is_set():
                (found,) = ask(port, NUMBERS[count % 8])
                seen.add(found["id"].split("-")[0])
                assert found["id"].split("-")[1] == NUMBERS[count % 8]
                count += 1
            return count

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client) for _ in range(4)]
            try:
                for word in ("new", "newer"):
                    made.index = SearchIndex.build(articles(word), folder)  # the old folder is gone now
                    made.index.add([Article(id=f"more-{word}", title="xylophone", text="It is more.")])
                    time.sleep(0.2)
            finally:
                over.set()
            answered = [client.result() for client in clients]
        assert ask(port, "xylophone")[0]["id"] == "more-newer"
    assert seen == {"old", "new", "newer"} or seen == {"new", "newer"}
    assert min(answered) > 0


def test_hangup_reads_the_corpus_again_and_a_bad_one_leaves_the_old(tmp_path: Path):
    corpus = tmp_path / "corpus.jsonl"

    def write(word: str) -> None:
        lines = [json.dumps({"id": a.id, "title": a.title, "text": a.text}) for a in articles(word)]
        corpus.write_text("\n".join(lines) + "\n")

    write("old")
    command = [sys.executable, "-c", "from turnwise.cli import main; import sys; sys.exit(main(sys.argv[1:]))"]
    process = subprocess.Popen(
        [*command, "serve-search", "--corpus", str(corpus), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    try:
        assert process.stdout
        assert process.stderr
        port = int(process.stdout.readline().split("127.0.0.1:")[1].split(";")[0])
        assert ask(port, "beta")[0]["id"] == "old-beta"
        write("newer")
        assert ask(port, "beta")[0]["id"] == "old-beta"  # not before it is told
        process.send_signal(signal.SIGHUP)
        assert "8 articles are served now" in process.stderr.readline()
        assert ask(port, "beta")[0]["id"] == "newer-beta"
        corpus.write_text("{broken")
        process.send_signal(signal.SIGHUP)
        assert "the index stays as it was" in process.stderr.readline()
        assert ask(port, "beta")[0]["id"] == "newer-beta"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)


def test_other_machines_need_a_token_and_who_has_none_is_refused():
    index = SearchIndex(articles("old"))
    with pytest.raises(ConfigError, match=r"host must be this machine's own.*got '0.0.0.0'.*--token-env"):
        search_server(index, host="0.0.0.0", port=0)
    with serving(index, host="0.0.0.0", token="a-long-token") as made:
        port = made.server_address[1]
        for token in ("", "another-token"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask(port, "beta", token).clear()
        assert ask(port, "beta", "a-long-token")[0]["id"] == "old-beta"
        tool = remote_search_tool(f"http://127.0.0.1:{port}", token="a-long-token")
        assert tool.function(query="beta") == "beta\nThe beta is old."
