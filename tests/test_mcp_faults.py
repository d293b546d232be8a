"""MCP servers that hang, crash, flood, answer late, to another call or in no JSON; after each the next works."""

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import faulty_servers as faults
from turnwise.chat import byte_chat
from turnwise.engine import ScriptedEngine
from turnwise.env import ToolEnvironment
from turnwise.errors import ConfigError
from turnwise.rollout import Limits, run_groups
from turnwise.toolbox import bounded
from turnwise.toolbox.mcp import Server, mcp_tools
from turnwise.tools import Tool
from turnwise.types import Rollout, Task

pytest.importorskip("mcp")
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
CHAT = byte_chat()
LIMITS = Limits(max_turn_tokens=120, context=8000, max_turns=2)
TASK = Task(id="1", question="What?", answers=("a",))
CALL = '<reasoning>\nx\n</reasoning>\n<tool>\n{"name": "look", "args": {}}\n</tool>'
ANSWER = "<reasoning>\nx\n</reasoning>\n<answer>\na\n</answer>"


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def faulty_tool(fault: str, timeout_s: float = 1.0) -> Tool:
    command = (sys.executable, str(Path(__file__).with_name("faulty_mcp.py")), fault)
    [entry] = mcp_tools(Server(name=fault, command=command, timeout_s=timeout_s))
    return entry


def played(entry: Tool) -> Rollout:
    make = lambda task: ToolEnvironment(task, {"look": entry})  # noqa: E731
    engine = ScriptedEngine([CALL, ANSWER], CHAT)
    [[rollout]] = asyncio.run(run_groups([TASK], make, engine, CHAT, group_size=1, limits=LIMITS))
    return rollout


@pytest.mark.parametrize(
    ("fault", "stop", "error"),
    [
        ("hang", "answer", "timeout"),
        ("garbage", "error", "unavailable"),
        ("flood_of_lines", "answer", "timeout"),
        ("deep", "answer", "timeout"),
        ("foreign", "answer", "timeout"),
        ("crash", "error", "unavailable"),
        ("drop", "error", "unavailable"),
        ("flood", "error", "unavailable"),
        ("shapeless", "error", "unavailable"),
    ],
)
def test_a_server_that_fails_is_recorded_and_the_next_rollout_works(fault: str, stop: str, error: str):
    entry = faulty_tool(fault, timeout_s=20 if error == "unavailable" else 1.0)
    rollout = played(entry)
    [result] = rollout.turns[0].results
    assert (rollout.stop, result.error) == (stop, error)
    assert "another call" not in result.text
    good = played(faulty_tool("none"))
    assert (good.stop, good.turns[0].results[0].text[:6]) == ("answer", "answer")


def test_a_late_answer_is_not_that_of_the_next_call():
    entry = faulty_tool("late", timeout_s=0.5)
    assert played(entry).turns[0].results[0].error == "timeout"
    time.sleep(0.7)
    assert played(entry).turns[0].results[0].text == "answer 2"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_flood_takes_no_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    entry = faulty_tool("flood", timeout_s=20)
    before = resident()
    for _ in range(3):
        assert "ended during the call" in str(played(entry).error)
    assert resident() - before < 60_000_000


def test_what_is_passed_on_is_what_was_written_until_a_line_is_too_long():
    def ran(code: str, most: int = 1000) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-I", bounded.__file__, str(most), sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, input=b"heard", timeout=60)

    lines = ran("import sys; print(sys.stdin.read()); print('x' * 900); print('é' * 400); sys.exit(4)")
    assert (lines.returncode, lines.stdout) == (4, b"heard\n" + b"x" * 900 + b"\n" + "é".encode() * 400 + b"\n")
    long = ran("print('a\\n' + 'x' * 100_000_000)")
    assert (long.returncode, len(long.stdout) < 200_000) == (1, True)
    assert long.stderr == b"a line of more than 1000 bytes\n"
    assert ran("print('x' * 999 + '\\n', end='')").returncode == 0


@pytest.mark.parametrize("fault", [*faults.FAULTS[:-1]], ids=lambda f: f.__name__)
def test_a_server_of_http_that_is_none_is_one_line_before_work_starts(fault, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.toolbox.mcp.CONNECT_S", 1.0)
    started = time.monotonic()
    with faults.faulty(fault) as url, pytest.raises(ConfigError) as caught:
        mcp_tools(Server(name=fault.__name__, url=f"{url}/mcp"))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20
