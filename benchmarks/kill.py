"""Breaks a tiny training run again and again, resumes it, and counts how often that ends where it should.

    python benchmarks/kill.py --points 200 --kills 40 --seed 0

Each point is an operation on a file of the run and a fault that it meets; each kill comes at a random time. The faults
and the comparison are those of `tests/faults.py`.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> int:
    """Prints the counts; 1 where a run did not survive."""
    from conftest import bpe_backend  # pyright: ignore[reportMissingImports]
    from faults import Forks, left, operations, survived  # pyright: ignore[reportMissingImports]
    from small_runs import small_world  # pyright: ignore[reportMissingImports]
    from test_survival import REWARDS, SHAPE, points  # pyright: ignore[reportMissingImports]
    from turnwise.chat import BPETokenizer, Chat
    from turnwise.policy import save_policy, tiny_policy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200, help="faults at chosen operations; 0 takes every one")
    parser.add_argument("--kills", type=int, default=40, help="kills at random times")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, began = random.Random(given.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_policy(tiny_policy(Chat(BPETokenizer(bpe_backend())), seed=0, hidden=16, layers=2), folder / "policy")
        options = {**small_world(folder, folder / "policy", (f"q{i}" for i in range(5)), REWARDS), **SHAPE}
        forks = Forks(folder)
        taken = operations(forks, folder / "whole", options)
        started = time.perf_counter()
        assert operations(forks, folder / "again", options) == taken
        length, whole = time.perf_counter() - started, left(folder / "whole")
        assert left(folder / "again") == whole, "two runs differ"
        every = points(taken)
        chosen = rng.sample(every, min(given.points or len(every), len(every)))
        orders = [{"fault": fault, "at": at} for fault, at in chosen]
        orders += [{"kill_after_s": rng.uniform(0, length)} for _ in range(given.kills)]
        ends: Counter[tuple[str, str]] = Counter()
        for number, order in enumerate(orders):
            kind = order.get("fault", "random time")
            try:
                ends[kind, survived(forks, folder / f"run{number}", options, whole, **order)] += 1
            except AssertionError as error:
                ends[kind, "FAILED"] += 1
                place = taken[order["at"] - 1] if "at" in order else ""
                print(f"{order} {place}: {' '.join(str(error).split())[:300]}")
        forks.close()
    failed = sum(count for (_, end), count in ends.items() if end == "FAILED")
    print(
        f"{len(taken)} operations on files in a run of {SHAPE['steps']} steps; {len(every)} faults that they can meet"
    )
    for (kind, end), count in sorted(ends.items()):
        print(f"  {kind:12} {end:22} {count}")
    print(f"{len(orders)} runs broken and resumed, {failed} failures, {time.perf_counter() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
