"""What commands have in common: the terminal that they print to."""

import sys
from typing import TYPE_CHECKING

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
