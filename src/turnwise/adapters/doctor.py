"""What a trainer's adapter needs, checked one thing after the other, each failure with the line that mends it.

A trainer has a module with `CHECKS`, functions that return a finding. It is imported when it is asked for, and imports
its trainer inside the checks: what is missing is a finding, not a crash.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping
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

TRAINERS: Mapping[str, str] = {name: f"turnwise.adapters.{name}_checks" for name in ("trl", "verl", "skyrl")}
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


def installed(packages: Iterable[str], *, install: str) -> Finding:
    """Whether packages are installed, with their releases; `install` brings what is missing."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return Finding(what=f"{name} is not installed", fix=install)
    return Finding(what=", ".join(f"{name} {version}" for name, version in versions.items()))


def of_release(package: str, low: str, below: str) -> Finding:
    """Whether the release of a package is one that its adapter is for: from `low` on and below `below`."""
    from packaging.version import Version

    found, span = Version(importlib.metadata.version(package)), f">={low},<{below}"
    if not Version(low) <= found < Version(below):
        return Finding(what=f"{package} is {found}; the adapter is for {span}", fix=f'pip install "{package}{span}"')
    return Finding(what=f"{package} {found} is in {span}")


def failed(finding: Finding) -> bool:
    return finding.fix is not None
