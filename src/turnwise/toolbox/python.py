"""A Python tool: runs the agent's code in a process of its own, cut off from files, network and other processes.

Where the system does not allow that, the tool is refused with the reason, unless the user accepts code that can do
whatever the user can. What exactly is cut off: docs/tools.md.
"""

import asyncio
import contextlib
import functools
import os
import signal
import sys
import tempfile
from pathlib import Path

from turnwise.background import Failure, waited_for
from turnwise.errors import ConfigError, ToolError
from turnwise.tools import Tool, capped, tool

SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64")
"""What a program needs of the system."""
CHUNK = 65536

_RUNNER = """
import ast, linecache, os, sys, traceback
source = sys.stdin.buffer.read().decode("utf-8", "replace")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
linecache.cache["<code>"] = (len(source), None, source.splitlines(True), "<code>")
space = {"__name__": "__main__"}
try:
    tree = ast.parse(source, "<code>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<code>", "exec"), space)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<code>", "eval"), space)
        if value is not None:
            print(repr(value))
    sys.stdout.flush()
except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<code>"]
    line = error.lineno if isinstance(error, SyntaxError) and not lines else lines[-1] if lines else None
    place = f" in line {line}" if line else ""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    print(f"{type(error).__name__}{place}: {text}", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(1)
"""


def python_tool(
    *,
    timeout_s: float = 10.0,
    memory_mb: int = 512,
    disk_mb: int = 16,
    result_cap: int = 2000,
    concurrency: int | None = None,
    allow_unisolated: bool = False,
) -> Tool:
    """The tool `python(code)`; each call is a new process. Raises ConfigError where it cannot be isolated.

    `memory_mb` is that of one process. As many calls run at once as there are cores, or `concurrency`. With
    `allow_unisolated` the code may read and change what the user may, where isolation is not available.
    """
    if not (0 < timeout_s <= 3600 and 64 <= memory_mb <= 1 << 20 and 1 <= disk_mb <= 1 << 20):
        raise ConfigError(
            "timeout_s, memory_mb and disk_mb of the tool 'python' must be in (0, 3600], >= 64 and >= 1; got "
            f"{timeout_s}, {memory_mb} and {disk_mb}; give such numbers"
        )
    fault = isolation_fault()
    if fault and not allow_unisolated:
        raise ConfigError(
            f"the tool 'python' must have isolation for the code it runs; here {fault}; run where that is allowed, or "
            "accept code that can do whatever you can: python:allow_unisolated (in Python allow_unisolated=True)"
        )

    async def python(code: str) -> str:
        """Runs Python code and returns what it prints, and the value of a last line that is an expression.

        Every call starts afresh; there is the standard library, no network and no file.

        Args:
            code: a whole program
        """
        return await run(
            code, timeout_s=timeout_s, memory_mb=memory_mb, disk_mb=disk_mb, cap=result_cap, isolated=fault is None
        )

    return tool(
        python,
        result_cap=result_cap,
        timeout_s=timeout_s + 30,  # it keeps its own time; this is for a system that is too slow to start it
        concurrency=concurrency or os.cpu_count() or 1,
    )


async def run(code: str, *, timeout_s: float, memory_mb: int, disk_mb: int, cap: int, isolated: bool) -> str:
    """What a program prints. Raises ToolError where it fails, TimeoutError where it takes too long."""
    with tempfile.TemporaryDirectory(prefix="turnwise-python-") as folder:
        bounds = [str(memory_mb), str(int(timeout_s) + 1), str(disk_mb)]
        places = _places() if isolated else []
        process = await asyncio.create_subprocess_exec(
            *_interpreter(), str(Path(__file__).with_name("jail.py")), folder, *bounds, *places, "--",
            *_interpreter(), "-c", _RUNNER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={},
            start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(timeout_s):
                said, wrong, _ = await asyncio.gather(
                    _first(process.stdout, 4 * cap), _first(process.stderr, 4 * cap), _written(process.stdin, code)
                )
                exit_code = await process.wait()
        except TimeoutError:
            raise TimeoutError(f"the code took longer than {timeout_s:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if exit_code:
        raise ToolError(_failure(exit_code, said, wrong, cap))
    return said or "(no output)"


def _failure(exit_code: int, said: str, wrong: str, cap: int) -> str:
    """Why a program failed, first, and what it had printed."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    known = {s.value: s.name for s in signal.Signals}
    reason = wrong.strip() or (
        f"the process was ended by {known[number]}" if number in known else f"the process ended with code {exit_code}"
    )
    return capped(reason, cap) + (f"\nIt had printed:\n{said}" if said.strip() else "")


async def _first(stream: asyncio.StreamReader | None, most: int) -> str:
    """The first `most` bytes of a stream as text; the rest is read and dropped."""
    assert stream is not None
    kept = b""
    while chunk := await stream.read(CHUNK):
        kept += chunk[: most - len(kept)]
    return kept.decode("utf-8", "replace")


async def _written(stream: asyncio.StreamWriter | None, text: str) -> None:
    assert stream is not None
    with contextlib.suppress(ConnectionError):  # of a process that has ended
        stream.write(text.encode("utf-8", "replace"))
        await stream.drain()
        stream.close()
        await stream.wait_closed()


def _interpreter() -> list[str]:
    """This interpreter, not its environment: no packages but its own."""
    return [getattr(sys, "_base_executable", sys.executable), "-I", "-X", "utf8"]


def _places() -> list[str]:
    """The folders that the isolated interpreter sees."""
    prefixes = dict.fromkeys(os.path.realpath(place) for place in (sys.base_prefix, sys.base_exec_prefix))
    own = [place for place in prefixes if place != "/usr" and not place.startswith("/usr/")]
    return [place for place in (*SYSTEM, *own) if os.path.lexists(place)]


@functools.cache
def isolation_fault() -> str | None:
    """Why code cannot be isolated here; None where it can, which is found out by doing it."""
    if sys.platform != "linux":
        return f"there are no namespaces on {sys.platform}"
    bounds = {"timeout_s": 20.0, "memory_mb": 512, "disk_mb": 1, "cap": 400}
    said = waited_for(functools.partial(run, "print(6 * 7)", **bounds, isolated=True))
    if isinstance(said, Failure):
        return " ".join(str(said.error).split())
    return None if said.strip() == "42" else f"a trial printed {said[:60]!r}"
