"""The command line. Each command imports what it needs when it runs, so that help comes at once."""

import contextlib
import dataclasses
import errno
import functools
import gc
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import turnwise
from turnwise.commands import converting, playing, reading, training
from turnwise.commands.terminal import INTERRUPTED
from turnwise.errors import ConfigError, TurnwiseError, unknown_name

BROKEN_PIPE = 141
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk says; files of ours have errors of ours, so these are of stdout."""
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors"), "train"),
    **dict.fromkeys(("starlette", "uvicorn"), "serve"),
    "peft": "lora",
}
"""The extra that brings each module."""


def own_process() -> None:
    """Sets up a process that is ours alone; to be called before torch is imported."""
    # torch's threads spin while they wait otherwise, which makes everything several times slower as soon as another
    # process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A thousand rollouts make many objects that stay, and to look for circles among them every 700 objects takes a
    # tenth of the time that they take beside their tools.
    gc.set_threshold(50_000, 20, 20)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code: 0, 2 for input that cannot be used, 130 for Ctrl-C."""
    own_process()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = lambda message, *_, **__: print(f"turnwise: warning: {message}", file=sys.stderr)
    try:
        code = run_command(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in EXTRAS:
            raise
        return _failed(f'this command needs {missing}; install it: pip install "turnwise[{EXTRAS[missing]}]"', 2)
    except (TurnwiseError, ExceptionGroup) as error:
        ours = _first_of_ours(error)
        if ours is None:
            raise
        return _failed(str(ours), 2)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _drop_output()
        return _failed(f"the output must have room; got {error.strerror}; free space, or write it elsewhere", 2)


def _drop_output() -> None:
    """What is still to be written to stdout goes nowhere: the interpreter flushes once more when it ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def run_command(args: list[str]) -> int:
    """The chosen command's exit code. ConfigError, with the nearest names, for an unknown one."""
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"turnwise {turnwise.__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        raise unknown_name("the command", name, COMMANDS)
    import tyro

    command = COMMANDS[name]
    function = command.function or _built(name, rest)

    @functools.wraps(function)
    def chosen(*values: Any, **options: Any) -> Callable[[], int | None]:
        return functools.partial(function, *values, **options)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            call = tyro.cli(chosen, prog=f"turnwise {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:  # after --help, or after tyro has said what is wrong
        if not stop.code:
            return 0
        raise ConfigError(_unboxed(said.getvalue(), name)) from None
    return call() or 0


def _unboxed(text: str, command: str) -> str:
    """What tyro says of wrong options, without its frame: the fault, the nearest options, where the others are."""
    lines = [line.strip("│|+╭╮╰╯ ") for line in text.splitlines()]
    ruled = [line if line.strip("─-") else "" for line in lines]
    after_title = itertools.dropwhile(lambda line: not line, ruled[1:])
    fault = " ".join(itertools.takewhile(bool, after_title))
    fault = re.sub(r"'None', |, 'None'(?=\))", "", fault).rstrip(".")  # an option left out is no choice to name
    options = dict.fromkeys(re.findall(r"^--[a-z][\w.-]*", "\n".join(lines), flags=re.MULTILINE))
    meant = f"; perhaps {' or '.join(list(options)[:3])}" if options and "perhaps" in text.lower() else ""
    return f"{fault}{meant}; `turnwise {command} --help` shows the options"


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: turnwise COMMAND [...]",
            "",
            "Reinforcement learning with turn-level credit for agents that use tools.",
            "",
            *lines,
            "",
            "turnwise COMMAND --help shows a command's options; turnwise --version the version.",
        ]
    )


def _failed(text: str, code: int) -> int:
    """Says on one line of stderr what went wrong."""
    from turnwise.report.text import one_line

    print(f"turnwise: {one_line(text)}", file=sys.stderr)
    return code


def _first_of_ours(error: BaseException) -> TurnwiseError | None:
    """The error itself, or the first of ours in a group that concurrent rollouts raised."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_first_of_ours, error.exceptions)), None)
    return error if isinstance(error, TurnwiseError) else None


# --- the commands ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it does, and its function or, where options need an import, what makes it."""

    summary: str
    function: Callable[..., Any] | None = None
    build: Callable[[Sequence[str]], Callable[..., int]] | None = None


COMMANDS = {
    "train": Command("train a policy and leave a run directory", build=training.train_command),
    "inspect": Command(
        "look at questions as the policy will see them, before training", build=training.inspect_command
    ),
    "eval": Command("measure a policy on questions, with intervals", playing.evaluate),
    "ask": Command("ask a policy a question and watch it work", playing.ask),
    "serve": Command("serve a run's agent as an OpenAI-compatible chat endpoint", playing.serve),
    "export": Command("write a run's policy as a plain checkpoint", converting.export),
    "report": Command("table, curves and the credit of every turn, from runs", reading.report),
    "credit": Command("credit of recorded rollouts by several methods, side by side", reading.credit),
    "audit": Command("compare methods' credit with true advantages under a run's policy", reading.audit),
    "lab": Command("compare estimators with exact gradients on small processes", reading.lab),
    "search": Command("search a corpus as the agent's tool does", converting.search),
    "serve-search": Command("serve a corpus's search over HTTP", converting.serve_search),
    "doctor": Command("check that turn credit works inside another trainer (trl, verl, skyrl)", reading.doctor),
    "convert": Command("make task and corpus files from public question sets", converting.convert),
    "convert-weights": Command("make a checkpoint of llama2.c's weights", converting.convert_weights),
    "warmup": Command("make a starting checkpoint from demonstrations", build=training.warmup_command),
    "compare": Command("compare arms of a design over seeds, seed by seed", training.compare_design),
    "reproduce": Command("compare methods over seeds", build=training.reproduce_command),
}


def _built(name: str, args: Sequence[str]) -> Callable[..., int]:
    build = COMMANDS[name].build
    assert build is not None, f"command {name} has neither a function nor a builder"
    return build(args)


if __name__ == "__main__":
    sys.exit(main())
