"""What a trainer's adapter needs, checked one thing after the other, each failure with the line that mends it.

A trainer has a module with `CHECKS`, functions that return a finding. It is imported when it is asked for, and imports
its trainer inside the checks: what is missing is a finding, not a crash.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from turnwise.errors import described, unknown_name


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check came to."""

    what: str
    """What was looked at, and what was found."""
    fix: str | None = None
    """The line to run or to write where something is wrong; None where all is well."""


Check = Callable[[], Finding]

TRAINERS: Mapping[str, str] = {"trl": "turnwise.adapters.trl_checks", "verl": "turnwise.adapters.verl_checks"}
"""The module of each trainer's checks."""


def examine(trainer: str) -> Iterator[Finding]:
    """The findings of a trainer's checks, as they come; the first that fails is the last: later ones build on it.

    ConfigError for a trainer that there is no adapter for.
    """
    if trainer not in TRAINERS:
        raise unknown_name("the trainer", trainer, TRAINERS)
    for check in importlib.import_module(TRAINERS[trainer]).CHECKS:
        finding = run_check(check)
        yield finding
        if failed(finding):
            return


def run_check(check: Check) -> Finding:
    """The check's finding; whatever it raises is one too."""
    try:
        return check()
    except (Exception, SystemExit) as error:
        text = described(error)[:300]
        title = (check.__doc__ or check.__name__).splitlines()[0]
        return Finding(what=f"{title} Failed: {text}", fix="report this, with the output of `pip freeze`")


def failed(finding: Finding) -> bool:
    return finding.fix is not None
