import asyncio
import contextlib
import gzip
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from turnwise.errors import ConfigError, InputError, RunError
from turnwise.search import (
    Article,
    SearchIndex,
    hits_text,
    load_corpus,
    open_index,
    remote_search_tool,
    search_server,
    search_tool,
    serve_search,
)
from turnwise.search.corpus import passages
from turnwise.search.index import MANIFEST
from turnwise.tasks import load_tasks
from turnwise.tools import call_tool
from turnwise.types import ToolCall, ToolResult

DATA = Path(__file__).parents[2] / "shared/data"


def article(name: str, text: str, title: str = "") -> Article:
    return Article(id=name, title=title, text=text)


KENYA = article("a1", "It is a country. The capital is Nairobi.", "Kenya")
PERU = article("a2", "It is a country. The capital is Lima.", "Peru")
BAND = article("a3", "An English rock band with four members.", "The Who")
WORLD = [KENYA, PERU, BAND]


def found(index: SearchIndex, query: str, k: int = 5) -> list[str]:
    return [hit.id for hit in index.search(query, k)]


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------- corpora


def test_json_lines_may_lack_titles_and_may_have_contents_instead(tmp_path):
    records = [
        {"id": "1", "title": "Kenya", "text": "A country."},
        {"id": 2, "text": "No title."},
        {"id": "3", "contents": '"Peru"\nA country.\nIn the Andes.'},
        {"id": "4", "contents": "one line"},
    ]
    expected = [
        article("1", "A country.", "Kenya"),
        article("2", "No title."),
        article("3", "A country.\nIn the Andes.", "Peru"),
        article("4", "one line"),
    ]
    plain = lines(tmp_path / "c.jsonl", *records)
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(load_corpus(str(plain))) == expected
    assert list(load_corpus(packed)) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"title": "x", "text": "y"}, ":2: field 'id' must be a string that is not blank"),
        ({"id": "2", "title": "x"}, ":2: field 'text' must be a string that is not blank; it is m"),
        ({"id": "2", "text": " "}, ":2: field 'text' must be a string that is not blank; got"),
        ({"id": "2", "text": "y", "title": 3}, ":2: field 'title' must be a string; got 3"),
        ({"id": "2", "contents": None}, ":2: field 'contents' must be a string"),
        ({"id": "1", "text": "y"}, ":2: field 'id' must be unique; got '1', which "),
        ("words", ":2: each line must be one JSON object"),
    ],
)
def test_a_malformed_article_is_named_with_file_line_and_field(tmp_path, record, expected):
    path = lines(tmp_path / "c.jsonl", {"id": "1", "text": "x"}, record)
    with pytest.raises(InputError) as caught:
        list(load_corpus(path))
    assert f"{path}{expected}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_corpus_is_refused_at_once_and_an_empty_one_on_reading(tmp_path):
    with pytest.raises(InputError, match="got 'altas', which does not exist"):
        load_corpus("altas")
    with pytest.raises(InputError, match="must hold text files"):
        load_corpus(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match="every file in it is empty"):
        list(load_corpus(tmp_path))
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(InputError, match="it is empty"):
        list(load_corpus(tmp_path / "c.jsonl"))


def test_a_folder_named_like_a_text_is_no_text_and_a_link_to_nothing_is_named(tmp_path):
    texts = tmp_path / "texts"
    (texts / "more.txt").mkdir(parents=True)
    (texts / "more.txt/a.md").write_text("Lake Turkana is salty.")
    assert [a.id for a in load_corpus(texts)] == ["more.txt/a.md#0"]
    (texts / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    for reader in (load_corpus, open_index):
        with pytest.raises(InputError, match=r"gone\.txt must be a text file; it is a link to nothing"):
            reader(texts)


def test_a_folder_gives_titled_passages_of_its_text_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/no.txt").write_text("unseen")
    (tmp_path / "data.csv").write_text("unseen")
    (tmp_path / "rift_valley-lakes.txt").write_text("# Lake Turkana is salty.")
    words = " ".join(["word"] * 59) + "."
    (tmp_path / "deep/kenya.md").write_text(f"intro\n\n## Kenya ##\n\n{words} {words}\n")
    got = list(load_corpus(tmp_path))
    # 1 + 59 words fill the first passage; 59 more would make 119 > 100, so they are the second
    assert [(a.id, a.title, len(a.text.split())) for a in got] == [
        ("deep/kenya.md#0", "Kenya", 60),
        ("deep/kenya.md#1", "Kenya", 59),
        ("rift_valley-lakes.txt#0", "rift valley lakes", 5),
    ]
    assert [a.id for a in load_corpus(tmp_path / "deep/kenya.md")] == ["kenya.md#0", "kenya.md#1"]


def test_a_sentence_that_is_too_long_is_cut_and_no_word_is_lost():
    text = " ".join(map(str, range(25))) + ". Short one."
    cut = passages(text, max_words=10)
    assert [len(p.split()) for p in cut] == [10, 10, 7]  # 25 words = 10 + 10 + 5, and 5 + 2 = 7
    assert " ".join(cut) == text


# ---------------------------------------------------------------------------------- queries


def test_raw_questions_with_any_signs_are_accepted():
    index = SearchIndex(WORLD)
    assert found(index, "What's the capital of Kenya?")[0] == "a1"
    for query in ('title:"Kenya" AND (', "Kenya^2 -Peru +*?", "KENYA!", "kényà", "Kenya\ud800\0"):
        assert found(index, query)[0] == "a1"


def test_words_are_matched_by_their_stem():
    assert found(SearchIndex(WORLD), "countries") == ["a1", "a2"]


def test_stop_and_question_words_leave_the_query_unless_nothing_else_is_in_it():
    index = SearchIndex(WORLD)
    assert index.query_terms("Which are the capitals of the world?") == ["capit", "world"]
    assert index.query_terms("Who is it?") == ["who", "is", "it"]
    assert found(index, "The Who")[0] == "a3"
    assert "a3" not in found(index, "who has Lima as the capital")


def test_a_query_without_words_or_without_matches_finds_nothing():
    index = SearchIndex(WORLD)
    assert index.search("?!…", 3) == []
    assert index.search("xylophone", 3) == []


def test_equal_scores_stand_in_order_of_id_whatever_the_order_of_the_articles():
    names = [f"n{i:03}" for i in range(40)]
    ways = (names, names[::-1], names[20:] + names[:20])
    for way in ways:
        index = SearchIndex(article(name, "the same words") for name in way)
        assert found(index, "same words", 3) == ["n000", "n001", "n002"]


def test_the_title_boost_prefers_the_article_whose_whole_title_is_in_the_query():
    articles = [
        article("1", "Red planet, red planet, red planet Mars, Mars.", "Colours"),
        article("2", "It has two moons and a red dust bar, a red air bar, in it.", "Mars"),
        article("3", "A short sweet bar that one bites into, with milk and malt.", "Mars Bars"),
    ]
    assert found(SearchIndex(articles, title_boost=0.0), "Is Mars a red planet?")[0] == "1"
    boosted = SearchIndex(articles, title_boost=20.0)
    assert found(boosted, "Is Mars a red planet?")[0] == "2"
    assert found(boosted, "Is a MARS bar red?")[0] == "3"  # not "2": its title is in a longer one


def test_hits_carry_the_article_and_falling_scores():
    first, second = SearchIndex(WORLD).search("capital of Peru", 2)
    assert (first.id, first.title, first.text) == ("a2", "Peru", PERU.text)
    assert first.score > second.score > 0


def test_options_out_of_range_are_refused():
    index = SearchIndex(WORLD)
    with pytest.raises(ConfigError, match="k must be >= 1; got 0"):
        index.search("Kenya", 0)
    with pytest.raises(ConfigError, match="title_boost must be >= 0"):
        SearchIndex(WORLD, title_boost=-1.0)
    with pytest.raises(ConfigError, match="title_boost must be >= 0"):
        SearchIndex(WORLD, title_boost=float("nan"))


# ------------------------------------------------------------------------ building and adding


def test_articles_can_be_added_and_are_found_at_once():
    index = SearchIndex([KENYA])
    assert found(index, "Lima") == []
    index.add([PERU, BAND])
    assert len(index) == 3
    assert found(index, "Lima") == ["a2"]


def test_an_id_that_is_there_already_is_refused_and_nothing_is_added():
    index = SearchIndex([KENYA])
    for more in ([PERU, KENYA], [PERU, PERU]):
        with pytest.raises(InputError, match="must be unique in the index"):
            index.add(more)
        assert len(index) == 1
    with pytest.raises(InputError, match="'a1' twice"):
        SearchIndex([KENYA, KENYA])
    with pytest.raises(InputError, match="must have articles"):
        SearchIndex([])


def test_an_index_on_disk_is_opened_again_with_what_was_added(tmp_path):
    index = SearchIndex.build([KENYA], tmp_path / "deep/index")
    index.add([PERU])
    again = SearchIndex.open(tmp_path / "deep/index")
    assert len(again) == 2
    assert found(again, "Lima") == ["a2"]
    assert again.search("capital", 2) == SearchIndex([KENYA, PERU]).search("capital", 2)


def test_a_build_that_fails_leaves_the_old_index_and_no_rubbish(tmp_path):
    folder = tmp_path / "index"
    SearchIndex.build([KENYA], folder)
    with pytest.raises(InputError, match="twice"):
        SearchIndex.build([PERU, PERU], folder)
    assert found(SearchIndex.open(folder), "Nairobi") == ["a1"]
    assert list(tmp_path.iterdir()) == [folder]
    SearchIndex.build([PERU], folder)
    assert found(SearchIndex.open(folder), "capital") == ["a2"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="it holds something else"):
        SearchIndex.build([KENYA], tmp_path)
    with pytest.raises(RunError, match="can be written"):
        SearchIndex.build([KENYA], tmp_path / "letter.txt/index")
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("suffix", [".store", ".idx", ".term", "meta.json", MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_index_is_a_one_line_error_that_names_the_remedy(tmp_path, suffix, damage):
    folder = tmp_path / "index"
    SearchIndex.build(WORLD, folder)
    (file,) = (f for f in folder.iterdir() if f.name.endswith(suffix))
    content = file.read_bytes()
    middle = len(content) // 2
    file.unlink()  # a new file, since tantivy may still have the old one in its memory map
    if damage == "cut":
        file.write_bytes(content[:middle])
    elif damage == "changed":
        file.write_bytes(content[:middle] + b"\x00\xff" + content[middle + 2 :])
    with pytest.raises(RunError) as caught:
        SearchIndex.open(folder).search("Kenya")
    assert "build it again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_single_changed_letter_of_a_stored_text_is_noticed(tmp_path):
    SearchIndex.build(WORLD, tmp_path / "index")
    (store,) = (tmp_path / "index").glob("*.store")
    content = store.read_bytes()
    assert content.count(b"Nairobi") == 1
    store.unlink()
    store.write_bytes(content.replace(b"Nairobi", b"Nairobo"))
    with pytest.raises(RunError, match=r"\.store has changed; build it again"):
        SearchIndex.open(tmp_path / "index")


# ---------------------------------------------------------------------------------- the cache


@pytest.fixture
def corpus(tmp_path) -> Path:
    return lines(tmp_path / "world.jsonl", *[vars(a) for a in WORLD])


def test_the_index_of_a_corpus_is_built_once_and_reused(tmp_path, corpus):
    cache = tmp_path / "cache"
    open_index(corpus, cache=cache)
    (folder,) = cache.iterdir()
    manifest = folder / MANIFEST
    before = manifest.stat()
    assert found(open_index(corpus, cache=cache), "Nairobi") == ["a1"]
    assert manifest.stat().st_ino == before.st_ino
    assert manifest.stat().st_mtime_ns == before.st_mtime_ns


def test_a_changed_corpus_replaces_its_index(tmp_path, corpus):
    cache = tmp_path / "cache"
    open_index(corpus, cache=cache)
    lines(corpus, vars(PERU))
    assert len(open_index(corpus, cache=cache)) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_touched_file_of_a_folder_replaces_the_index(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("Nairobi")
    open_index(texts, cache=tmp_path / "cache")
    (texts / "b.txt").write_text("Lima")
    assert found(open_index(texts, cache=tmp_path / "cache"), "Lima") == ["b.txt#0"]


@pytest.mark.parametrize("name", [".store", "meta.json", MANIFEST])
def test_a_damaged_index_in_the_cache_is_built_anew_with_a_notice(tmp_path, corpus, caplog, name):
    cache = tmp_path / "cache"
    open_index(corpus, cache=cache)
    (folder,) = cache.iterdir()
    (file,) = (f for f in folder.iterdir() if f.name.endswith(name))
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-20])
    assert found(open_index(corpus, cache=cache), "Nairobi") == ["a1"]
    assert "building the search index anew" in caplog.text


def test_an_index_of_another_format_is_built_anew(tmp_path, corpus):
    cache = tmp_path / "cache"
    open_index(corpus, cache=cache)
    (folder,) = cache.iterdir()
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 0}))
    with pytest.raises(RunError, match="of format 1; got 0"):
        SearchIndex.open(folder)
    assert len(open_index(corpus, cache=cache)) == 3


def test_an_index_of_the_cache_refuses_additions(tmp_path, corpus):
    for _ in range(2):  # just built, and opened again
        index = open_index(corpus, cache=tmp_path / "cache")
        with pytest.raises(RunError, match="add them to the corpus"):
            index.add([article("a4", "more")])


def test_the_cache_is_the_users_unless_a_folder_is_given(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    open_index(corpus)
    assert len(list((tmp_path / "home/turnwise").iterdir())) == 1


def test_the_atlas_is_indexed_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    index = open_index("atlas")
    assert index.search("Mercury", 1)[0].title.endswith("Mercury")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------- the agent's tool


def called(tool, **arguments) -> ToolResult:
    return asyncio.run(call_tool({tool.name: tool}, ToolCall(name="search", arguments=arguments)))


def test_the_tool_takes_one_query_and_gives_title_and_text():
    tool = search_tool(SearchIndex(WORLD))
    assert tool.name == "search"
    assert tool.parameters["required"] == ["query"]
    assert list(tool.parameters["properties"]) == ["query"]
    assert called(tool, query="Kenya").text == f"Kenya\n{KENYA.text}"
    assert called(tool, q="Kenya").error == "bad_arguments"


def test_a_result_names_the_articles_that_it_shows():
    index = SearchIndex(WORLD)
    assert called(search_tool(index), query="Kenya").documents == ("a1",)
    assert called(search_tool(index, k=2), query="the capital").documents == ("a1", "a2")
    assert called(search_tool(index), query="xylophone").documents == ()
    # "1. Kenya\nIt is a country. The capital is Nairobi.\n\n" is 51 characters: the second begins after them.
    assert len(f"1. Kenya\n{KENYA.text}\n\n") == 51
    assert called(search_tool(index, k=2, cap=51), query="the capital").documents == ("a1",)
    assert called(search_tool(index, k=2, cap=52), query="the capital").documents == ("a1", "a2")
    assert called(search_tool(index), q="Kenya").documents is None


def test_several_hits_are_numbered_and_none_is_no_error():
    tool = search_tool(SearchIndex(WORLD), k=2)
    assert called(tool, query="the capital").text == (f"1. Kenya\n{KENYA.text}\n\n2. Peru\n{PERU.text}")
    nothing = called(tool, query="xylophone")
    assert (nothing.text, nothing.error) == ("No results.", None)
    assert hits_text([article("1", "no title")]) == "no title"


def test_a_long_result_is_cut_at_a_word_border():
    tool = search_tool(SearchIndex([article("1", "alpha beta gamma delta", "T")]), cap=15)
    text = called(tool, query="alpha").text
    assert text == "T\nalpha beta …"
    assert len(text) <= 15


# ---------------------------------------------------------------------------------- the server


@contextlib.contextmanager
def running(server) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def url() -> Iterator[str]:
    with running(search_server(SearchIndex(WORLD), port=0, k=2)) as address:
        yield address


def answer(address: str, body: object = None) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data)) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_retrieve_answers_in_the_format_of_search_r1(url):
    request = {"queries": ["capital of Kenya", "xylophone"], "topk": 1, "return_scores": True}
    status, content = answer(f"{url}/retrieve", request)
    assert status == 200
    ((hit,), nothing) = content["result"]
    assert hit["document"] == {"id": "a1", "contents": f'"Kenya"\n{KENYA.text}'}
    assert hit["score"] > 0
    assert nothing == []


def test_without_scores_the_documents_stand_alone_and_topk_has_a_default(url):
    for request in ({"queries": ["capital"]}, {"queries": ["capital"], "topk": None}):
        _, content = answer(f"{url}/retrieve", request)
        assert [document["id"] for document in content["result"][0]] == ["a1", "a2"]


def test_search_and_health_answer_get(url):
    status, content = answer(f"{url}/search?q=capital+of+Peru%3F&k=1")
    assert status == 200
    assert content["query"] == "capital of Peru?"
    assert [hit["id"] for hit in content["hits"]] == ["a2"]
    assert len(answer(f"{url}/search?q=capital")[1]["hits"]) == 2
    assert answer(f"{url}/health") == (200, {"status": "ok", "articles": 3})


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/retrieve", b"{", 400),
        ("/retrieve", b"\xff", 400),
        ("/retrieve", [], 400),
        ("/retrieve", {}, 400),
        ("/retrieve", {"queries": "Kenya"}, 400),
        ("/retrieve", {"queries": [1]}, 400),
        ("/retrieve", {"queries": ["x"] * 1025}, 400),
        ("/retrieve", {"queries": ["x"], "topk": "3"}, 400),
        ("/retrieve", {"queries": ["x"], "topk": -1}, 400),
        ("/retrieve", {"queries": ["x"], "topk": 101}, 400),
        ("/retrieve", {"queries": ["x"], "return_scores": "yes"}, 400),
        ("/retrieve", None, 405),
        ("/search", None, 400),
        ("/search?q=x&k=0", None, 400),
        ("/search?q=x&k=many", None, 400),
        ("/search?q=x&k=" + "9" * 5000, None, 400),
        ("/search?q=x", {}, 405),
        ("/nowhere", None, 404),
        ("/nowhere", {}, 404),
    ],
)
def test_a_malformed_request_is_refused_with_a_reason(url, path, body, status):
    got, content = answer(url + path, body)
    assert got == status
    assert list(content) == ["error"]
    assert answer(f"{url}/health")[0] == 200


def test_a_body_that_is_too_large_or_of_no_length_is_not_read(url):
    for header, status in (("1000001", 413), ("9" * 5000, 413), ("many", 400)):
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.putrequest("POST", "/retrieve")
        connection.putheader("Content-Length", header)
        connection.endheaders()
        with contextlib.closing(connection):
            assert connection.getresponse().status == status


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"Content-Length": "3"}, 200),
        ("GET", {"Transfer-Encoding": "chunked"}, 200),
        ("POST", {"Transfer-Encoding": "chunked", "Content-Length": "3"}, 400),
    ],
)
def test_a_body_that_is_not_read_ends_the_connection(url, method, headers, status):
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    with contextlib.closing(connection):
        connection.request(method, "/health", headers=headers)
        response = connection.getresponse()
        assert (response.status, response.getheader("Connection")) == (status, "close")


def test_a_port_that_is_taken_or_impossible_is_refused(url):
    port = int(url.rsplit(":", 1)[1])
    with pytest.raises(RunError, match="choose another port"):
        serve_search(SearchIndex(WORLD), port=port)
    for host in ("999.1.1.1", "a..b"):
        with pytest.raises(RunError, match=f"able to listen on {host}:0; got .*; choose another host"):
            search_server(SearchIndex(WORLD), host=host, port=0, token="a-long-token")
    with pytest.raises(ConfigError, match="port must be between"):
        search_server(SearchIndex(WORLD), port=70000)
    with pytest.raises(ConfigError, match="k must be between"):
        search_server(SearchIndex(WORLD), port=0, k=0)


def test_the_remote_tool_says_what_the_local_one_says(url):
    local = search_tool(SearchIndex(WORLD), k=2)
    for address in (url, f"{url}/", f"{url}/retrieve"):
        remote = remote_search_tool(address, k=2)
        assert (remote.name, remote.description) == (local.name, local.description)
        assert remote.parameters == local.parameters
        for query in ("the capital", "xylophone", "Kenya?"):
            one, other = called(remote, query=query), called(local, query=query)
            assert (one.text, one.documents) == (other.text, other.documents)


def answering(status: int, body: bytes) -> type[BaseHTTPRequestHandler]:
    """A server that answers every request alike."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Answering


def test_a_server_that_gives_no_ids_leaves_the_documents_unknown():
    body = b'{"result": [[{"document": {"contents": "Kenya\\nA country."}}]]}'
    with running(HTTPServer(("127.0.0.1", 0), answering(200, body))) as address:
        result = called(remote_search_tool(address, timeout_s=5.0), query="Kenya")
    assert (result.text, result.error, result.documents) == ("Kenya\nA country.", None, None)


def test_a_search_server_that_is_down_is_an_error_result():
    server = search_server(SearchIndex(WORLD), port=0)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    server.server_close()
    result = called(remote_search_tool(address, timeout_s=2.0), query="Kenya")
    assert result.error == "unavailable"
    assert "the search server gave no answer" in result.text


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (500, b"{}", "status 500"),
        (200, b"<html>", "gave no answer"),
        (200, b"[]", "holds no list of articles"),
        (200, b'{"result": []}', "holds no list of articles"),
        (200, b'{"result": [[{"document": {"id": "1"}}]]}', "holds no list of articles"),
        (200, b'{"result": [["words"]]}', "holds no list of articles"),
    ],
)
def test_a_search_server_that_answers_nonsense_is_an_error_result(status, body, expected):
    with running(HTTPServer(("127.0.0.1", 0), answering(status, body))) as address:
        result = called(remote_search_tool(address, timeout_s=5.0), query="Kenya")
    assert result.error == "unavailable"
    assert expected in result.text


def test_a_url_that_is_none_is_refused_before_any_search():
    for address in ("localhost:8765", "file:///etc/passwd", "http://"):
        with pytest.raises(ConfigError, match="must begin with http"):
            remote_search_tool(address)


# ----------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
@pytest.mark.slow
def test_raw_trivia_questions_find_an_answer_in_about_half_of_all_first_passages(tmp_path):
    index = open_index(DATA / "trivia/wikipedia.jsonl.gz", cache=tmp_path)
    assert len(index) == 40_708
    tasks = load_tasks(DATA / "trivia/validation.jsonl")
    first = [index.search(task.question, 1) for task in tasks]
    held = [
        any(answer.lower() in f"{hit.title} {hit.text}".lower() for answer in task.answers)
        for task, hits in zip(tasks, first, strict=True)
        for hit in hits
    ]
    assert sum(held) / len(tasks) > 0.5
    assert os.listdir(tmp_path)[0].startswith("wikipedia-")
