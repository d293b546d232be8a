"""The built-in tools: a calculator, Python in a process of its own, and where tools come from."""

import asyncio
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.config import BRANCHING, TrainConfig
from turnwise.errors import ConfigError, InputError, ToolError
from turnwise.setting import make_tools
from turnwise.toolbox import jail
from turnwise.toolbox.calculator import calculator, calculator_tool, value_of
from turnwise.toolbox.python import isolation_fault, python_tool, run
from turnwise.toolbox.sources import named_tools
from turnwise.tools import Tool, call_tool
from turnwise.types import ToolCall, ToolResult

# ------------------------------------------------------------------------------ calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(3 + 4.5) * 2", "15"),
        ("2^10 + 1", "1025"),  # ^ binds as ** does
        ("-2 ** 2", "-4"),
        ("7 // 2 + 7 % 4", "6"),
        ("1 / 3", "0.333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("3 × 4 ÷ 6 − 1 =", "1"),
        ("2 ** 100", "1267650600228229401496703205376"),
        ("2 ** -1", "0.5"),
        ("sqrt(2) ** 2", "2"),
        ("max(1, 2.5, abs(-3))", "3"),
        ("round(2.71828, 2) + floor(e) - ceil(0.2)", "3.72"),
        ("factorial(5) + comb(5, 2) + gcd(12, 18)", "136"),
        ("log(e) + log10(1000) + log2(8) + log(8, 2)", "10"),
        ("1e300 * 10", "1e+301"),
        ("sin(pi / 2)", "1"),
    ],
)
def test_the_calculator_works_out_arithmetic(expression: str, value: str):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "must be arithmetic such as"),
        ("2 +", "must be arithmetic such as"),
        ("1,000 + 1", "numbers, operators and functions alone; got"),
        ("__import__('os').system('id')", "alone; got __import__"),
        ("(1).__class__", "alone; got"),
        ("open('x')", "no function open"),
        ("[1][0]", "alone; got"),
        ("'a' * 3", "a real number; got a"),
        ("True + 1", "a real number; got True"),
        ("1j", "a real number; got 1j"),
        ("(-8) ** 0.5", "a real number"),
        ("x + 1", "alone; got x"),
        ("cosh(1)", "there is no function cosh; there are: abs, "),
        ("1 / 0", "division by zero"),
        ("sqrt(-1)", "sqrt has no value at -1"),
        ("sqrt(1, 2)", "sqrt cannot take 1, 2"),
        ("9 ** 9 ** 9", "must stay below 2"),
        ("10 ** 1300", "must stay below 2"),
        ("2 ** 4000 * 2 ** 4000", "must stay below 2"),
        ("1e308 * 10", "must stay below 2"),
        ("factorial(10 ** 6)", "factorial must have a whole number from 0 to 500"),
        ("factorial(0.5)", "factorial must have a whole number"),
        ("comb(10 ** 9, 5 * 10 ** 8)", "comb must have whole numbers"),
        ("round(5, -10 ** 9)", "round must have digits from -20 to 20"),
        ("(" * 240 + "1" + ")" * 240, "must be arithmetic such as"),
        ("1" * 501, "at most 500 characters; it has 501"),
    ],
)
def test_the_calculator_refuses_all_else_with_a_reason(expression: str, message: str):
    with pytest.raises(ToolError, match=message):
        calculator(expression)


def test_the_limit_of_whole_numbers_is_exact():
    assert value_of("2 ** 4095") == 2**4095
    assert value_of("2 ** 2000 * 2 ** 2095") == 2**4095
    for over in ("2 ** 4096", "2 ** 2000 * 2 ** 2096"):
        with pytest.raises(ToolError, match="must stay below"):
            value_of(over)


@settings(deadline=2000, max_examples=300)
@given(st.text(alphabet="0123456789.+-*/%^() ,esqrtminx", max_size=40))
def test_no_expression_does_anything_but_give_a_number_or_a_reason(expression: str):
    try:
        value = float(calculator(expression))
    except ToolError:
        value = 0.0  # a reason
    assert math.isfinite(value)


def test_the_calculator_is_a_tool():
    result = asyncio.run(
        call_tool({"calculator": calculator_tool()}, ToolCall(name="calculator", arguments={"expression": "6*7"}))
    )
    assert (result.text, result.error) == ("42", None)


# -------------------------------------------------------------------------- the Python tool

needs_isolation = pytest.mark.skipif(isolation_fault() is not None, reason=f"no isolation: {isolation_fault()}")


def ran(code: str, made: Tool | None = None) -> ToolResult:
    tools = {"python": made or python_tool(allow_unisolated=True)}
    return asyncio.run(call_tool(tools, ToolCall(name="python", arguments={"code": code})))


def test_code_gives_what_it_prints_and_the_value_of_its_last_line():
    assert ran("x = 6\nprint('x is', x)\nx * 7").text == "x is 6\n42\n"
    assert ran("x = 1").text == "(no output)"
    assert ran("import math\nmath.comb(5, 2)").text == "10\n"


def test_a_failure_comes_first_with_its_line_and_then_what_was_printed():
    failed = ran("print('so far')\ndef f():\n    return 1 / 0\nf()")
    assert failed.error == "exception"
    assert failed.text == "Error: ZeroDivisionError in line 3: division by zero\nIt had printed:\nso far\n"
    assert ran("def f(:").text.startswith("Error: SyntaxError in line 1: ")
    assert ran("import sys; sys.exit(3)").text == "Error: the process ended with code 3"


def test_code_that_takes_too_long_is_ended_with_all_that_it_started():
    quick = python_tool(timeout_s=1, allow_unisolated=True)
    mark = f"{time.time():.6f}"
    result = ran(f"import subprocess\nsubprocess.run(['sleep', '6{mark[-5:]}'])", quick)
    assert (result.error, result.text) == ("timeout", "Error: the code took longer than 1 s")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert f"sleep 6{mark[-5:]}" not in listed


def test_output_and_memory_are_bounded():
    small = python_tool(memory_mb=128, result_cap=100, allow_unisolated=True)
    assert len(ran("print('a' * 10 ** 8)", small).text) <= 100
    assert ran("x = bytearray(10 ** 9)", small).text.startswith("Error: MemoryError")


@needs_isolation
def test_isolated_code_sees_no_file_no_network_no_process_and_cannot_write(tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    tried = {
        f"open({str(secret)!r})": "FileNotFoundError",
        "open(os.path.join(os.sep, 'etc', 'passwd'))": "FileNotFoundError",
        "open(os.path.join(os.sep, 'proc', '1', 'status'))": "FileNotFoundError",
        "socket.create_connection(('127.0.0.1', 80), 2)": "OSError: [Errno 101] Network is unreachable",
        "open(os.path.dirname(os.__file__) + os.sep + 'x', 'w')": "OSError: [Errno 30] Read-only file system",
        "open(os.sep + 'x', 'w')": "OSError: [Errno 30] Read-only file system",
        "open(own + 'x', 'w').write('1')": "1",
        "open(own + 'y', 'wb').write(b'a' * (20 << 20))": "OSError: [Errno 2",
        "os.listdir(own)": "['x', 'y']",
    }
    code = (
        "import os, socket, tempfile\nown = tempfile.gettempdir() + os.sep\n"
        f"for text in {list(tried)}:\n"
        "    try:\n        print(sorted(eval(text)) if 'listdir' in text else eval(text))\n"
        "    except OSError as error:\n        print(f'{type(error).__name__}: {error}')\n"
    )
    said = ran(code).text.splitlines()
    assert len(said) == len(tried)
    for (text, expected), line in zip(tried.items(), said, strict=True):
        assert line.startswith(expected), (text, line)
    assert ran("import os, tempfile\nos.listdir(tempfile.gettempdir())").text == "[]\n"  # each call starts afresh


@needs_isolation
def test_isolated_code_has_no_rights_and_none_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_SECRET", "secret")
    assert ran("import os\n'A_SECRET' in os.environ, os.getuid(), os.getpid()").text == "(False, 65534, 1)\n"
    mount = (
        "import ctypes, tempfile\nctypes.CDLL(None).mount(b'none', tempfile.gettempdir().encode(), b'tmpfs', 0, None)"
    )
    assert ran(mount).text == "-1\n"


@needs_isolation
def test_isolated_code_does_not_reach_the_process_that_runs_it():
    name = f"\0turnwise-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(name)
        own.listen()
        tried = {
            f"open('/proc/{os.getpid()}/mem')": "FileNotFoundError",
            f"open('/proc/{os.getpid()}/environ')": "FileNotFoundError",
            f"os.kill({os.getpid()}, 0)": "ProcessLookupError",
            f"ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0)": "-1",
            f"socket.socket(socket.AF_UNIX).connect({name!r})": "ConnectionRefusedError",
            "os.listdir('/dev/shm')": "FileNotFoundError",
            "sorted(os.listdir('/dev'))": "['null', 'urandom', 'zero']",
            "os.setuid(0)": "PermissionError",
        }
        code = (
            f"import ctypes, os, socket\nfor text in {list(tried)}:\n    try:\n        print(eval(text))\n"
            "    except OSError as error:\n        print(type(error).__name__)\n"
        )
        assert ran(code).text.splitlines() == list(tried.values())


@needs_isolation
@pytest.mark.skipif(
    not os.path.isdir("/proc/sys/user") or bool(os.statvfs("/proc/sys/user").f_flag & os.ST_RDONLY),
    reason="the system shows its settings read-only",
)
def test_isolated_code_makes_no_namespaces_in_which_it_would_be_root():
    assert ran("import ctypes\nctypes.CDLL(None).unshare(0x10000000)").text == "-1\n"


@needs_isolation
def test_isolated_code_has_at_most_so_many_processes_also_where_root_runs_it():
    code = (
        "import os, time\nstarted = 0\ntry:\n    while started < 100:\n        if os.fork() == 0:\n"
        "            time.sleep(60)\n        started += 1\nexcept OSError:\n    print(started)\n"
    )
    assert int(ran(code).text) < jail.PROCESSES


def test_where_namespaces_are_refused_nothing_has_run(tmp_path: Path):
    """A process in which unshare fails: the jail says so with its own exit code."""
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import jail\n"
        "def refuse(): raise OSError(1, 'unshare: Operation not permitted')\n"
        "jail._unshare = refuse\n"
        f"sys.exit(jail.main({str(tmp_path)!r}, '512', '5', '1', sys.prefix, '--', sys.executable, '-c', 'print(1)'))"
    )
    folder = Path(jail.__file__).parent
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (jail.NO_ISOLATION, "")
    assert "must be allowed namespaces of its own; got unshare: Operation not permitted" in done.stderr


def test_without_isolation_the_tool_is_refused_unless_accepted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.toolbox.python.isolation_fault", lambda: "there are no namespaces")
    with pytest.raises(ConfigError, match=r"must have isolation .*; here there are no namespaces; .*allow_unisolated"):
        python_tool()
    assert ran("1 + 1", python_tool(allow_unisolated=True)).text == "2\n"


def test_unaccepted_bounds_are_refused():
    with pytest.raises(ConfigError, match=r"must be in \(0, 3600\], >= 64 and >= 1; got 0, 512 and 16"):
        python_tool(timeout_s=0)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    asyncio.run(run("1", timeout_s=20, memory_mb=512, disk_mb=1, cap=100, isolated=isolation_fault() is None))
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------- sources


def test_several_sources_make_one_set_of_tools(tmp_path: Path):
    file = tmp_path / "my_tools.py"
    file.write_text('def area(width: float) -> float:\n    """Area."""\n    return width\n')
    config = TrainConfig(tools=f"search, calculator,{file}")
    assert list(make_tools(config, ())) == ["search", "calculator", "area"]
    assert list(make_tools(TrainConfig(), ())) == ["search"]


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ("calculator,", ConfigError, "parted by commas; got 'calculator,'"),
        ("calculater", ConfigError, "got 'calculater'; did you mean calculator"),
        ("calculator,calculator", ConfigError, "two named 'calculator'"),
        ("absent.py", InputError, "there is no such file"),
        ("servers.toml", InputError, "there is no such file"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(sources: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        named_tools(sources, search=calculator_tool)


def test_objects_that_cannot_be_copied_do_not_go_with_branches(tmp_path: Path):
    file = tmp_path / "browser_tools.py"
    file.write_text(
        "class Browser:\n    fork = None\n    def visit(self, url: str) -> str:\n"
        '        """Visits."""\n        return url\nTOOLS = [Browser]\n'
    )
    with pytest.raises(ConfigError, match="branches must go with tools that can be copied"):
        make_tools(TrainConfig(tools=str(file), estimator=BRANCHING[0], branches=(2,)), ())
