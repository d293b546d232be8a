"""Runs of a tiny policy in processes of their own, whose writes fail or kill them at a chosen operation.

As a program it imports everything once and then forks a process for every order that it reads, so that a run takes a
part of a second. In a fork every operation that changes a file below the run directory is counted, and the n-th one
meets a fault. `survived` plays one such fault through: break a run, read what it left, resume it, compare it with a
run that nothing broke.
"""

import builtins
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "full": errno.ENOSPC}
"""Faults that the system reports: once, or with `full` from the operation on for good."""
FAULTS = ("enospc", "eio", "full", "short", "torn", "before", "after")
"""`short`: half of a write is taken, and the next one finds the disk full. `torn`: half is written, then the process is
killed. `before`, `after`: it is killed there."""
TIMES = ("tokens_per_s", "rollout_s", "update_s")


class Operations:
    """Counts operations on files below a folder, and lets the n-th one meet a fault."""

    def __init__(self, root: Path, fault: str | None, at: int) -> None:
        self.root, self.fault, self.at = f"{root}/", fault, at
        self.log: list[str] = []
        self.is_full = False

    def meet(self, name: str, path: Any, act: Any, size: int = 0, half: Any = None) -> Any:
        """Does one operation, unless it meets its fault. `half` does half of a write of `size` bytes."""
        if not f"{path}/".startswith(self.root):
            return act()
        self.log.append(f"{name} {str(path)[len(self.root) :]}")
        grows = name in ("write", "open", "mkdir", "save")
        if self.is_full and grows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if len(self.log) != self.at or self.fault is None:
            return act()
        if self.fault == "full" or (self.fault == "short" and not half):
            self.is_full = True
            return act() if not grows else self._fail("full", path)
        if self.fault in ERRORS:
            self._fail(self.fault, path)
        if self.fault == "before":
            kill()
        if self.fault in ("short", "torn"):
            done = half() if half else None
            if self.fault == "torn":
                kill()
            self.is_full = True
            return done
        found = act()
        kill()
        return found

    def _fail(self, fault: str, path: Any) -> None:
        number = ERRORS[fault]
        raise OSError(number, os.strerror(number), str(path))


def kill() -> None:
    """As a power switch: no handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch(seen: Operations) -> None:  # noqa: C901
    """Puts `seen` before every function that changes files."""

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            half = len(data) // 2
            part = lambda: io.FileIO.write(self, bytes(data)[:half])  # noqa: E731
            return seen.meet("write", self.name, lambda: io.FileIO.write(self, data), len(data), part if half else None)

    real_open = builtins.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, encoding=None, errors=None, newline=None, *rest) -> Any:
        if not isinstance(file, str | os.PathLike) or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, encoding, errors, newline, *rest)
        plain = mode.replace("b", "").replace("t", "")
        raw = seen.meet("open", os.fspath(file), lambda: Raw(file, plain))
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    builtins.open = io.open = opened  # type: ignore[assignment]

    def where(path: Any, folder: int | None) -> str:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if folder is not None else os.fspath(path)

    for name in ("replace", "rename", "mkdir", "unlink", "rmdir", "fsync"):
        real = getattr(os, name)

        def act(path: Any, *args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{path}") if name == "fsync" else where(path, options.get("dir_fd"))
            return seen.meet(name, place, lambda: real(path, *args, **options))

        setattr(os, name, act)

    import transformers.modeling_utils as modeling

    import turnwise.rundir as rundir

    real_save = rundir.save_file

    def save(tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
        """Weights are written by compiled code: one operation, of which half may be left."""

        def half() -> None:
            real_save(tensors, filename, *args, **options)
            os.truncate(filename, os.path.getsize(filename) // 2)
            if seen.fault == "short":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(filename))

        seen.meet("save", filename, lambda: real_save(tensors, filename, *args, **options), half=half)

    rundir.save_file = save
    for name in ("safe_save_file", "save_file"):
        if hasattr(modeling, name):
            setattr(modeling, name, save)


def trained(order: dict[str, Any]) -> int:
    """What the command line would do with an order: 0, or 2 and one line."""
    from turnwise.errors import TurnwiseError
    from turnwise.training import train

    options, out = order["options"], Path(order["out"])
    seen = Operations(out, order.get("fault"), order.get("at", 0))
    watch(seen)
    try:
        train(**({} if order["resume"] else options), out=out, resume=order["resume"])
    except TurnwiseError as error:
        print(error, file=sys.stderr)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        if order.get("log"):
            Path(order["log"]).write_text("\n".join(seen.log))
    return 0


def serve() -> None:
    """Forks a process for each order on standard input, and answers with how it ended and what it said."""
    import turnwise.training  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 2)
            os.dup2(2, 1)
            code = 1
            try:
                code = trained(order)
                sys.stderr.flush()
            finally:
                os._exit(code)
        if order.get("kill_after_s") is not None:
            time.sleep(order["kill_after_s"])
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Forks:
    """The program of this module, running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def train(self, out: Path, options: dict[str, Any], *, resume: bool = False, **order: Any) -> tuple[int, str]:
        """How a run ended, as an exit code or minus a signal, and what it said."""
        assert self.process.stdin
        assert self.process.stdout
        said = self.folder / "said.txt"
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        whole = {"out": str(out), "options": plain, "resume": resume, "said": str(said), **order}
        print(json.dumps(whole), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline()), said.read_text()

    def close(self) -> None:
        """Ends it."""
        self.process.communicate()


def operations(forks: Forks, out: Path, options: dict[str, Any]) -> list[str]:
    """Runs to the end; the operations on files that this took."""
    log = forks.folder / "log.txt"
    code, said = forks.train(out, options, log=str(log))
    assert code == 0, said
    return log.read_text().splitlines()


def left(run: Path) -> dict[str, Any]:
    """Everything that must be equal in runs: numbers without clock times, rollouts, and the bytes of all weights."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in (*TIMES, "wall_s", "duration_s", "unwritten")}
        return [timeless(each) for each in value] if isinstance(value, list) else value

    found: dict[str, Any] = {}
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        found[name] = [timeless(json.loads(line)) for line in (run / name).read_text().splitlines()]
    for file in sorted([*run.glob("checkpoints/*/*"), *run.glob("best/*")]):
        name = str(file.relative_to(run))
        if file.name == "state.json":
            found[name] = timeless(json.loads(file.read_text()))
        elif file.name != "SHA256SUMS":
            found[name] = file.read_bytes()
    found["folders"] = sorted(entry.name for entry in [*run.iterdir(), *run.glob("checkpoints/*")])
    return found


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file up to one that is torn."""
    found = []
    for line in file.read_text().split("\n") if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def survived(forks: Forks, run: Path, options: dict[str, Any], whole: dict[str, Any], **fault: Any) -> str:
    """Breaks a run, reads it, resumes it: how it was broken. AssertionError where it did not survive."""
    from turnwise.errors import TurnwiseError
    from turnwise.report.data import load_run

    code, said = forks.train(run, options, **fault)
    lines = [line for line in said.splitlines() if line]
    assert code in (0, 2, -signal.SIGKILL), said
    assert code != 2 or len(lines) == 1, said
    logged = [line["step"] for line in whole_lines(run / "metrics.jsonl") if line["split"] == "train"]
    saved = [int(folder.name[-6:]) for folder in run.glob("checkpoints/step-*")]
    assert max(logged, default=0) - max(saved, default=0) <= 1, "more than the step in progress is lost"
    try:
        load_run(run)
    except TurnwiseError:
        assert not saved, "a run that took a step can be read"
    begun = (run / "config.json").is_file()
    again, told = forks.train(run, options, resume=begun)
    assert again == 0, told
    found = left(run)
    assert found.keys() == whole.keys(), found.keys() ^ whole.keys()
    differing = [name for name in whole if found[name] != whole[name]]
    assert not differing, differing
    return {0: "went on", 2: "stopped with one line"}.get(code, "was killed")


if __name__ == "__main__":
    serve()
