"""The errors a user can meet.

    TurnwiseError
    ├── InputError       a file, record or value that the user gave (also a ValueError)
    │   ├── ConfigError  an option out of range or unknown
    │   └── NotFinite    a number of one rollout, NaN or infinite: that rollout failed
    ├── RunError         a run directory, checkpoint or index that cannot be used (also an OSError)
    ├── ToolError        raised by a tool's author: its text goes back to the agent
    └── ToolUnavailable  what a tool needs is not there: its rollout fails and is not learned from (a ConnectionError)

Each message says what must hold, then what came, then what to do. The command line turns these into one
line and exit code 2; any other exception is a bug of ours.
"""

import difflib
from collections.abc import Iterable


class TurnwiseError(Exception):
    """Base of every error that turnwise raises on purpose."""


class InputError(TurnwiseError, ValueError):
    """A file, record or value from the user does not hold what it must."""


class ConfigError(InputError):
    """An option is unknown or out of range."""


class NotFinite(InputError):
    """A logit or a reward of one rollout is NaN or infinite; the rollout failed, and others are not concerned."""


class RunError(TurnwiseError, OSError):
    """A run directory, checkpoint or index cannot be read or written."""


class ToolError(TurnwiseError):
    """A tool could not do what it was asked; the agent sees the text as an error result."""


class ToolUnavailable(TurnwiseError, ConnectionError):
    """What a tool needs, such as a server, is not there: no fault of the agent's, whose rollout ends as failed."""


def described(error: BaseException) -> str:
    """An exception's class and text on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """A ConfigError for a name that is none of `known`, with the nearest of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of: {', '.join(names)}"
    return ConfigError(f"{what} must be a known name; got {name!r}; {hint}")
