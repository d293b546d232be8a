"""Tools of MCP servers: a real server of the SDK, over stdin and stdout and over HTTP."""

import asyncio
import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from turnwise.errors import ConfigError, InputError, TurnwiseError
from turnwise.tool_objects import ToolSession, check_forkable
from turnwise.toolbox.mcp import Server, mcp_tools, parameters_of, server_of_command, servers_of_config, text_of
from turnwise.toolbox.sources import named_tools
from turnwise.tools import Tool, call_tool, call_tools, tool_mapping
from turnwise.types import Action, ToolCall, ToolResult

pytest.importorskip("mcp")
# The SDK leaves a stream open where an HTTP server cannot be reached.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
SERVER = Path(__file__).with_name("mcp_server.py")
COMMAND = f"{sys.executable} {SERVER}"


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()  # what a test left behind is told here, not in the tests of another file


def called(tools: dict[str, Tool], name: str, **arguments: Any) -> ToolResult:
    return asyncio.run(call_tool(tools, ToolCall(name=name, arguments=arguments)))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(port: int) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, str(SERVER), str(port)], stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.fixture(scope="module")
def stdio() -> dict[str, Tool]:
    return tool_mapping(mcp_tools(server_of_command(COMMAND)))


@pytest.fixture(scope="module")
def over_http() -> Iterator[dict[str, Tool]]:
    port = free_port()
    process = started(port)
    yield tool_mapping(mcp_tools(server_of_command(f"http://127.0.0.1:{port}/mcp")))
    process.kill()
    process.wait()


@pytest.fixture(params=["stdio", "over_http"])
def tools(request: pytest.FixtureRequest) -> dict[str, Tool]:
    return request.getfixturevalue(request.param)


def test_a_servers_tools_are_tools(tools: dict[str, Tool]):
    assert sorted(tools) == ["add", "count", "crash", "doubled", "fail", "picture", "slow"]
    assert tools["add"].description == "Sum of two numbers."
    assert tools["add"].parameters["required"] == ["a"]
    assert called(tools, "add", a=2, b=3).text == "5"
    assert called(tools, "doubled", box={"width": 1.5}).text == "3 m"
    assert called(tools, "picture").text == "a picture:\n[image: image/png]"


def test_arguments_are_checked_here_and_by_the_server(tools: dict[str, Tool]):
    assert called(tools, "add", a="2").text == "Error: add: argument 'a' must be integer; got \"2\""
    assert called(tools, "add", b=2).error == "bad_arguments"
    by_server = called(tools, "doubled", box={"unit": "m"})
    assert by_server.error == "exception"
    assert "width" in by_server.text


def test_a_failing_tool_is_an_observation_and_the_session_goes_on(tools: dict[str, Tool]):
    failed = called(tools, "fail")
    assert failed.error == "exception"
    assert "no such page" in failed.text
    assert called(tools, "add", a=1).text == "2"


def test_calls_share_a_session_and_run_at_once(tools: dict[str, Tool]):
    async def scene() -> float:
        start = time.perf_counter()
        calls = tuple(ToolCall(name="slow", arguments={"seconds": 0.5}) for _ in range(10))
        results = await call_tools(tools, Action(tool_calls=calls))
        assert [result.text for result in results] == ["done"] * 10
        return time.perf_counter() - start

    assert asyncio.run(scene()) < 5 * 0.9  # one after the other they take 5 s
    first, second = called(tools, "count").text.split(), called(tools, "count").text.split()
    assert first[1] == second[1]
    assert int(second[0]) == int(first[0]) + 1


def test_a_call_that_takes_too_long_is_given_up_and_the_session_goes_on():
    quick = tool_mapping(mcp_tools(Server(name="quick", command=(sys.executable, str(SERVER)), timeout_s=0.3)))
    assert called(quick, "slow", seconds=30).error == "timeout"
    assert called(quick, "add", a=1).text == "2"


def test_a_process_that_crashes_fails_its_call_and_is_started_again():
    own = tool_mapping(mcp_tools(Server(name="own", command=(sys.executable, str(SERVER)))))
    before = called(own, "count").text.split()[1]
    crashed = called(own, "crash")
    assert (crashed.error, crashed.text) == (
        "unavailable",
        "Error: ConnectionError: the MCP server 'own' ended during the call",
    )
    count, after = called(own, "count").text.split()
    assert count == "1"
    assert after != before


@pytest.mark.slow
def test_an_http_server_that_comes_back_is_found_again():
    port = free_port()
    process = started(port)
    tools = tool_mapping(mcp_tools(server_of_command(f"http://127.0.0.1:{port}/mcp")))
    assert called(tools, "add", a=1).text == "2"
    process.kill()
    process.wait()
    down = called(tools, "add", a=1)
    assert down.error == "unavailable"
    assert "ConnectionError: the MCP server" in down.text
    process = started(port)
    try:
        assert called(tools, "add", a=1).text == "2"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_session_per_rollout_is_a_process_per_rollout_and_ends_with_it():
    own = tool_mapping(mcp_tools(Server(name="own", command=(sys.executable, str(SERVER)), per_rollout=True)))

    async def counts(session: ToolSession) -> list[str]:
        bound = await session.tools()
        texts = [(await call_tool(bound, ToolCall(name="count", arguments={}))).text for _ in range(2)]
        await session.close()
        return texts

    async def scene() -> list[list[str]]:
        return await asyncio.gather(*(counts(ToolSession(own)) for _ in range(2)))

    (one, two), (three, four) = [[text.split() for text in texts] for texts in asyncio.run(scene())]
    assert [one[0], two[0], three[0], four[0]] == ["1", "2", "1", "2"]
    assert one[1] == two[1] != three[1]
    with pytest.raises(ConfigError, match="branches must go with tools that can be copied; Connection"):
        check_forkable(own)
    for pid in (one[1], three[1]):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


# --------------------------------------------------------------------------- configuration


def test_a_file_in_the_shape_of_other_clients_names_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", "secret")
    entry = {"command": sys.executable, "args": [str(SERVER)], "env": {"KEY": "${A_KEY}"}, "tools": ["add"]}
    off = {"command": "never-started", "disabled": True}
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"one": entry, "off": off}}))
    tools = named_tools(f"{file},calculator", search=lambda: pytest.fail("not asked for"))
    assert list(tools) == ["add", "calculator"]
    assert called(tools, "add", a=1).text == "2"
    (server,) = servers_of_config({"mcpServers": {"one": entry}}, "x")
    assert server.env == (("KEY", "secret"),)
    toml = tmp_path / "servers.toml"
    toml.write_text('[mcpServers.web]\nurl = "http://127.0.0.1:9/mcp"\nsession = "rollout"\ntimeout_s = 5\n')
    (web,) = servers_of_config(tomllib.loads(toml.read_text()), "x")
    assert (web.url, web.per_rollout, web.timeout_s) == ("http://127.0.0.1:9/mcp", True, 5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "must have either a command or a url"),
        ({"command": "a", "url": "b"}, "must have either a command or a url"),
        ({"command": "a", "arg": []}, "got 'arg'"),
        ({"command": "a", "args": "b"}, "args of server 'x' in f has the wrong type; got 'b'"),
        ({"url": "http://a", "type": "sse"}, "got type 'sse'"),
        ({"command": "a", "session": "each"}, "'shared' or 'rollout'; got 'each'"),
        ({"command": "a", "env": {"K": "${NO_SUCH_VARIABLE}"}}, "the environment must have NO_SUCH_VARIABLE"),
    ],
)
def test_an_entry_that_cannot_be_used_is_refused(entry: dict, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        servers_of_config({"mcpServers": {"x": entry}}, "f")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mcp:", "must be a command or a URL; got nothing"),
        ("mcp:'a", "close the quote"),
        ("mcp:no-such-command-here", "could not be reached: FileNotFoundError"),
        (f"mcp:{sys.executable} -c 'raise SystemExit(\"no key\")'", "could not be reached: no key"),
        ("http://127.0.0.1:9/mcp", "could not be reached"),
        ("no_such.json", "there is no such file"),
    ],
)
def test_a_server_that_cannot_be_had_is_one_line_before_work_starts(source: str, message: str):
    with pytest.raises(TurnwiseError, match=message) as raised:
        named_tools(source, search=lambda: pytest.fail("not asked for"))
    assert "\n" not in str(raised.value)


def test_a_tool_that_the_server_does_not_have_is_refused(stdio: dict[str, Tool]):
    with pytest.raises(ConfigError, match="must have the tool subtract; it has add, "):
        mcp_tools(Server(name="x", command=(sys.executable, str(SERVER)), tools=("subtract",)))


def test_references_in_a_schema_are_written_in_place():
    box = {"type": "object", "properties": {"inner": {"$ref": "#/$defs/Box"}, "size": {"type": ["integer", "null"]}}}
    schema = parameters_of({"properties": {"box": {"$ref": "#/$defs/Box"}}, "$defs": {"Box": box}})
    assert (schema["type"], schema["required"]) == ("object", [])
    assert schema["properties"]["box"]["properties"]["inner"]["properties"]["size"] == {"type": ["integer", "null"]}
    assert "$ref" not in json.dumps(schema)


def test_what_is_no_text_is_named():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "audio", "data": "…", "mimeType": "audio/wav"},
        {"type": "resource", "resource": {"uri": "file:///x", "text": "inside"}},
        {"type": "resource_link", "uri": "file:///y", "name": "y"},
    ]
    assert text_of({"content": parts}) == "a\n[audio: audio/wav]\ninside\n[y at file:///y]"
    assert text_of({"content": [], "structuredContent": {"a": 1}}) == '{"a": 1}'
