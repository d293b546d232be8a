"""Tools: schemas from signatures, argument checks, failures as observations, tools from a file."""

import asyncio
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.errors import ConfigError, InputError, ToolError
from turnwise.tool_files import load_tools
from turnwise.tools import CUT_MARK, Found, Tool, call_tool, call_tools, capped, tool, tool_mapping
from turnwise.types import Action, ToolCall, ToolResult


def search(
    query: str,
    k: int = 3,
    kind: Literal["article", "title"] = "article",
    only: list[str] | None = None,
) -> str:
    """Passages that best match
    the query.

    Longer text stays in the description.

    Args:
        query: what to look for,
            in a few words
        k (int): how many
    Returns:
        kind: not an argument here
    """
    return f"{k} of {kind} for {query} in {only}"


def convert(amount: float, exact: bool, options: dict[str, int], extra: Optional[dict] = None):  # noqa: UP045
    """Amount in another unit."""
    return {"amount": amount, "exact": exact, "options": options, "extra": extra}


async def later(seconds: float) -> float:
    """The seconds, after other coroutines had their turn."""
    await asyncio.sleep(0)
    return seconds * 2


def failing(kind: str) -> str:
    """Fails in the way that is asked for."""
    if kind == "tool":
        raise ToolError("the index has no such page")
    if kind == "exit":
        sys.exit(3)
    if kind == "text":
        return "Error: no such page"  # a text that a tool returns is no failure
    raise KeyError(kind)


TOOLS = {f.__name__: tool(f) for f in (search, convert, later, failing)}


def called(name: str, **arguments: Any) -> ToolResult:
    return asyncio.run(call_tool(TOOLS, ToolCall(name=name, arguments=arguments)))


# ----------------------------------------------------------------------------- the schema


def test_the_schema_comes_from_signature_and_docstring():
    made = tool(search)
    assert made.name == "search"
    assert made.description == ("Passages that best match the query. Longer text stays in the description.")
    assert made.parameters == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "what to look for, in a few words"},
            "k": {"type": "integer", "description": "how many", "default": 3},
            "kind": {"enum": ["article", "title"], "default": "article"},
            "only": {
                "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                "default": None,
            },
        },
        "required": ["query"],
    }


def test_numbers_booleans_and_objects_have_their_json_types():
    properties = tool(convert).parameters["properties"]
    assert properties == {
        "amount": {"type": "number"},
        "exact": {"type": "boolean"},
        "options": {"type": "object", "additionalProperties": {"type": "integer"}},
        "extra": {"anyOf": [{"type": "object"}, {"type": "null"}], "default": None},
    }


def test_any_fits_every_value():
    result = asyncio.run(
        call_tool(
            tool_mapping([tool(anything)]),
            ToolCall(name="anything", arguments={"x": None, "several": [1, "a", {}]}),
        )
    )
    assert result.text == "(None, [1, 'a', {}])"


def pick(level: Literal[1, 2]) -> int:
    """The level.

    Args:
        level: how deep to go, where
            note: deeper is slower
    """
    return level


def test_an_indented_line_with_a_colon_continues_its_argument():
    text = tool(pick).parameters["properties"]["level"]["description"]
    assert text == "how deep to go, where note: deeper is slower"


@pytest.mark.parametrize("level", [True, 1.0, "1"])
def test_a_literal_wants_its_own_type(level: object):
    call = ToolCall(name="pick", arguments={"level": level})
    assert asyncio.run(call_tool({"pick": tool(pick)}, call)).error == "bad_arguments"


def no_doc(x: str) -> str:
    return x


def empty_doc(x: str) -> str:
    """Args:
    x: a text
    """
    return x


def no_annotation(x) -> str:
    """Has no annotation."""
    return x


def odd_type(x: set[str]) -> str:
    """Takes a set."""
    return str(x)


def anything(x: Any, several: list[Any]) -> str:
    """Takes any value."""
    return str((x, several))


def odd_key(x: dict[int, str]) -> str:
    """Takes integers as keys."""
    return str(x)


def open_ended(*x: str) -> str:
    """Takes any number."""
    return str(x)


def unknown_annotation(x: "Missing") -> str:  # noqa: F821 # pyright: ignore
    """Has an annotation that nobody defined."""
    return x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_doc, "'no_doc' must have a docstring"),
        (empty_doc, "'empty_doc' must have a docstring"),
        (no_annotation, "'x' of tool 'no_annotation' must have a type annotation"),
        (odd_type, r"'x' of 'odd_type' must be str, .*got set\[str\]"),
        (odd_key, r"got dict\[int, str\]"),
        (open_ended, r"must take named parameters only; got '\*x: str'"),
        (unknown_annotation, "must have annotations that can be read"),
        (lambda x: x, "must be a named function"),
    ],
)
def test_a_function_that_cannot_be_described_is_refused(function: Callable, message: str):
    with pytest.raises(ConfigError, match=message):
        tool(function)


# --------------------------------------------------------------------------------- a call


def test_a_call_returns_text_and_its_duration():
    result = called("search", query="Kenya", only=["Africa"])
    assert result.text == "3 of article for Kenya in ['Africa']"
    assert result.error is None
    assert result.duration_s > 0


def test_what_is_not_text_comes_back_as_json():
    result = called("convert", amount=2, exact=True, options={"é": 1})
    assert result.text == '{"amount": 2, "exact": true, "options": {"é": 1}, "extra": null}'


def test_a_coroutine_function_is_awaited():
    assert called("later", seconds=1.5).text == "3.0"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "search",
            {},
            "Error: search: argument 'query' is missing; it takes: query, k, kind, only",
        ),
        ("search", {"query": "a", "top": 3}, 'Error: search: unexpected argument "top"; it takes:'),
        ("search", {"query": 7}, "Error: search: argument 'query' must be string; got 7"),
        ("search", {"query": None}, "must be string; got null"),
        ("search", {"query": "a", "k": "3"}, "argument 'k' must be integer; got \"3\""),
        ("search", {"query": "a", "k": True}, "argument 'k' must be integer; got true"),
        ("search", {"query": "a", "k": 3.0}, "argument 'k' must be integer; got 3.0"),
        ("search", {"query": "a", "kind": "book"}, 'must be "article" or "title"; got "book"'),
        ("search", {"query": "a", "only": ["b", 1]}, "must be array of string or null; got"),
        ("convert", {"amount": "1", "exact": True, "options": {}}, "'amount' must be number"),
        ("convert", {"amount": 1, "exact": 1, "options": {}}, "'exact' must be boolean; got 1"),
        (
            "convert",
            {"amount": 1, "exact": True, "options": {"a": "b"}},
            "'options' must be object",
        ),
    ],
)
def test_arguments_are_checked_before_the_call_with_advice(name, arguments, message):
    result = called(name, **arguments)
    assert result.error == "bad_arguments"
    assert result.text.startswith("Error: ")
    assert message in result.text


def test_an_unknown_tool_is_answered_with_the_known_ones():
    result = called("serach", query="Kenya")
    assert result.error == "unknown_tool"
    assert result.text == ('Error: no tool is named "serach"; tools: convert, failing, later, search')


def test_arguments_that_could_not_be_read_are_a_parse_error():
    result = asyncio.run(call_tool(TOOLS, ToolCall(name="search", arguments=None)))
    assert result.error == "parse"


def test_exceptions_are_results_and_only_they_are_failures():
    result = called("failing", kind="tool")
    assert result.text == "Error: the index has no such page"
    assert result.error == "exception"
    assert result.duration_s > 0
    assert called("failing", kind="x").text == "Error: KeyError: 'x'"
    assert called("failing", kind="x").error == "exception"
    assert called("failing", kind="text").error is None


def test_a_tool_that_exits_has_failed_and_ends_nothing_else():
    assert called("failing", kind="exit").text == "Error: SystemExit: 3"
    assert called("failing", kind="exit").error == "exception"


def test_long_results_and_long_errors_are_cut_at_a_word():
    def echo(text: str) -> str:
        """The text."""
        if text.startswith("!"):
            raise ToolError(text)
        return text

    tools = tool_mapping([tool(echo, result_cap=20)])

    def echoed(text: str) -> str:
        return asyncio.run(call_tool(tools, ToolCall(name="echo", arguments={"text": text}))).text

    assert echoed("Nairobi is in Kenya.") == "Nairobi is in Kenya."  # 20 characters exactly
    assert echoed("Nairobi is inside Kenya.") == "Nairobi is inside …"
    assert echoed("!Nairobi is in Kenya") == "Error: !Nairobi is …"
    assert echoed("lone \ud800 half") == "lone ? half"


def test_a_long_result_without_words_is_kept_up_to_the_cap():
    assert capped('{"page": "' + "A" * 500, 200) == '{"page": "' + "A" * 188 + CUT_MARK


def test_what_json_cannot_write_stays_out_of_the_schema():
    nothing = object()

    def find(query: str, key: Any = nothing, most: float = math.inf) -> str:
        """Finds."""
        return f"{query} {most}"

    def pick(one: Literal[b"a"]) -> str:
        """Picks."""
        return str(one)

    parameters = tool(find).parameters
    assert json.loads(json.dumps(parameters, allow_nan=False)) == parameters
    assert parameters["required"] == ["query"]
    with pytest.raises(ConfigError, match=r"must be str, int, .* or a union of them; got typing.Literal\[b'a'\]"):
        tool(pick)


@settings(deadline=None)
@given(st.text(alphabet="ab \n\u2003", max_size=30), st.integers(3, 25))
def test_a_cut_text_is_within_the_cap_and_ends_with_a_whole_word(text: str, cap: int):
    cut = capped(text, cap)
    assert len(cut) <= cap
    if len(text) <= cap:
        assert cut == text
        return
    kept = cut.removesuffix(CUT_MARK)
    assert text.startswith(kept)
    assert cut.endswith(CUT_MARK)
    words = text.split()
    head = text[: cap - len(CUT_MARK)]
    if len(head.split()) > 1:
        assert kept.split() == words[: len(kept.split())]


# --------------------------------------------------------------------- several calls at once


def test_calls_of_one_message_run_at_once_and_answer_in_their_order():
    arrived: list[str] = []

    async def meet(name: str) -> str:
        """The names of both, once both have come."""
        arrived.append(name)
        while len(arrived) < 2:  # only a second call under way can end this
            await asyncio.sleep(0)
        return f"{name} of {arrived}"

    calls = tuple(ToolCall(name="meet", arguments={"name": name}) for name in "ab")
    work = call_tools({"meet": tool(meet)}, Action(tool_calls=calls))
    results = asyncio.run(asyncio.wait_for(work, 10))
    assert [result.text[0] for result in results] == ["a", "b"]


def test_calls_that_could_not_be_read_are_answered_in_their_place():
    good, unread = ToolCall(name="search", arguments={"query": "x"}), ToolCall(name="search", arguments=None)

    def errors(*calls: ToolCall, error: str | None = None) -> list[str | None]:
        results = asyncio.run(call_tools(TOOLS, Action(tool_calls=calls, error=error)))
        return [result.error for result in results]

    assert errors(good, unread, good, error="no object") == [None, "parse", None]
    assert errors(good, error="a call without a name") == [None, "parse"]
    assert errors(error="no JSON") == ["parse"]
    assert errors() == []


# ------------------------------------------------------------------------ tools from a file


def written(folder: Path, text: str) -> Path:
    file = folder / "my_tools.py"
    file.write_text(text, encoding="utf-8")
    return file


def test_public_functions_of_a_file_are_its_tools(tmp_path: Path):
    file = written(
        tmp_path,
        "from __future__ import annotations\n"
        "from json import dumps\n"
        "def _helper(x): return x\n"
        "def add(a: int, b: int) -> int:\n"
        '    """The sum of two numbers."""\n'
        "    return _helper(a + b)\n",
    )
    tools = load_tools(file)
    assert list(tools) == ["add"]
    result = asyncio.run(call_tool(tools, ToolCall(name="add", arguments={"a": 2, "b": 3})))
    assert result.text == "5"


def test_a_list_named_tools_says_which_functions_count(tmp_path: Path):
    file = written(
        tmp_path,
        "from turnwise.tools import tool\n"
        "def untyped(x): return x\n"
        'def one() -> str:\n    """One."""\n    return "1"\n'
        'def two() -> str:\n    """Two."""\n    return "2"\n'
        "TOOLS = [two, tool(one, result_cap=9)]\n",
    )
    tools = load_tools(file)
    assert list(tools) == ["two", "one"]
    assert tools["one"].result_cap == 9


def test_a_file_may_import_its_neighbours(tmp_path: Path):
    (tmp_path / "neighbour_of_tools.py").write_text("VALUE = 41\n")
    file = written(
        tmp_path,
        "from neighbour_of_tools import VALUE\n"
        'def next_value() -> int:\n    """The next value."""\n    return VALUE + 1\n',
    )
    assert list(load_tools(file)) == ["next_value"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("def f(:\n", InputError, "must be valid Python; line 1: "),
        ("x = 1\n\nimport no_such_module_here\n", InputError, "got ModuleNotFoundError: No module"),
        ("raise ValueError('two\\nlines')\n", InputError, "got ValueError: two lines;"),
        ("import sys\nsys.exit(5)\n", InputError, "must run without error; got SystemExit: 5;"),
        ("x = 1\n", ConfigError, "must define at least one tool"),
        ("TOOLS = []\n", ConfigError, "must define at least one tool"),
        ("TOOLS = 3\n", ConfigError, "must be a list; got int"),
        ("TOOLS = [3]\n", ConfigError, "must be a named function; got 3"),
        ("def f(x): return x\n", ConfigError, "must have a docstring"),
        (
            'def f() -> str:\n    """F."""\n    return ""\nTOOLS = [f, f]\n',
            ConfigError,
            "two named 'f'",
        ),
    ],
)
def test_a_file_without_usable_tools_is_refused_in_one_line(tmp_path, text, error, message):
    with pytest.raises(error, match=message) as raised:
        load_tools(written(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="there is no such file"):
        load_tools(tmp_path / "absent.py")
    file = tmp_path / "binary.py"
    file.write_bytes(b"\x00\xff\xfe")
    with pytest.raises(InputError, match=r"binary\.py must "):
        load_tools(file)


def test_a_cap_without_room_for_the_mark_is_refused():
    with pytest.raises(ConfigError, match="result_cap of tool 'search' must be > 2"):
        tool(search, result_cap=2)
    assert isinstance(tool(search, result_cap=3), Tool)


def test_a_tool_may_say_which_articles_its_text_holds():
    def search(query: str) -> str:
        """Looks up a query."""
        return Found(f"about {query}", ["a", "b"])

    def other(query: str) -> str:
        """Says a query."""
        return query

    tools = tool_mapping([tool(search), tool(other)])

    def documents(name: str, **arguments: str):
        return asyncio.run(call_tool(tools, ToolCall(name=name, arguments=arguments))).documents

    assert documents("search", query="x") == ("a", "b")
    assert documents("other", query="x") is None
    assert documents("search", q="x") is None
