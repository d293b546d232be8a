"""What the benchmarks have in common: one JSON line per measurement, and what it was measured on."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "tantivy", "bm25s", "tokenizers")
"""Those whose releases are noted, where they are installed."""


def processor() -> str:
    """The processor's own name, or its architecture where the system does not say."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def circumstances(threads: int) -> dict[str, object]:
    """When, on what and with which releases something is measured."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def append(file: Path | None, benchmark: str, case: Mapping[str, object], values: Mapping[str, object]) -> None:
    """One more line: what was measured (`case` says of what) with its numbers rounded to four digits."""
    if file is None:
        return
    line = {"benchmark": benchmark, **case, **{name: rounded(value) for name, value in values.items()}}
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def rounded(value: object) -> object:
    """A number with four digits that count; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of all of the process's threads: what others do on a busy machine is not in it."""
    start = time.process_time()
    work()
    return time.process_time() - start
