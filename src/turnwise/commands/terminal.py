"""What commands have in common: the terminal that they print to, and where they write."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from turnwise.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the signal's number."""


def open_console() -> "Console":
    """A terminal that takes no text as markup, and is not narrowed where there is none."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # to `main`, instead of ending the process here

    width = None if sys.stdout.isatty() else 110
    return Terminal(markup=False, highlight=False, emoji=False, width=width)


def check_place(name: str | None, out: Path | None) -> None:
    """Whether files can be called so, and their folder is one. ConfigError or RunError where not."""
    if name is not None and not re.fullmatch(r"[\w][\w.-]*", name):
        raise ConfigError(f"name must be letters, digits, '-', '_' or '.'; got {name!r}; rename it")
    if out and not out.is_dir():
        raise RunError(f"out must be a folder; {out} is none; make it, or choose another")
