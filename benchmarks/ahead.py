"""What drawing ahead saves: steps of the embedded policy with and without it, in turn, in one process.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/ahead.py [--steps 6] [--threads 2] [--latency-ms 0 50 1000]

Both ways have the same questions and options; of 0 ms it is the atlas's own search, else one that sleeps for so long
before it answers. A step's time is from one record to the next, without validations; medians leave out the first step,
which draws first in both ways, and the last, beside which nothing is drawn.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import itertools
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from turnwise.training import train

TOOLS = '''
import time

def search(query: str) -> str:
    """Searches."""
    time.sleep({latency_s})
    return "Nothing was found about " + query
'''


def step_times(run: Path) -> dict[str, float]:
    """Medians of a run's steps in seconds: the whole step, its drawing and its update."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["split"] == "train"]
    walls = [later["wall_s"] - earlier["wall_s"] for earlier, later in itertools.pairwise(steps)]
    found = {"step": statistics.median(walls[:-1])}
    for name in ("rollout_s", "update_s"):
        found[name] = statistics.median(step["metrics"][name] for step in steps[1:-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="at least 4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 50.0, 1000.0])
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.steps} steps of", end=" "
    )
    print(f"{options.tasks} x {options.group_size} rollouts")
    print("tools, ms  way          step, s  drawing, s  update, s")
    for latency in options.latency_ms:
        found = {}
        for way in ("drawing first", "ahead"):
            with tempfile.TemporaryDirectory() as folder:
                tools = Path(folder) / "tools.py"
                tools.write_text(TOOLS.format(latency_s=latency / 1000))
                own: dict[str, Any] = {"tools": str(tools)} if latency else {}
                run = Path(folder) / "run"
                train(
                    out=run,
                    ahead=way == "ahead",
                    steps=options.steps,
                    tasks_per_step=options.tasks,
                    group_size=options.group_size,
                    threads=options.threads,
                    validate_every=options.steps,
                    validation_size=1,
                    **own,
                )
                found[way] = times = step_times(run)
            columns = f"{times['step']:7.2f}  {times['rollout_s']:10.2f}  {times['update_s']:9.2f}"
            print(f"{latency:9.0f}  {way:13}{columns}", flush=True)
        print(f"{'':9}  drawing first / ahead: {found['drawing first']['step'] / found['ahead']['step']:.2f}")


if __name__ == "__main__":
    main()
