"""What a step costs as one thing grows and the rest stays: questions, group size, turns, context, model.

    python benchmarks/scaling.py [--steps 1]

Forced turns of the search agent (`forced`), one thread, CPU seconds, medians over steps. The base is 4 questions x 8
rollouts of 3 turns with short prompts and the embedded model's own shape, three layers of width 128, with random
weights. Each number is printed beside the base's: rollouts, update, and what had to be done, in sampled tokens and in
positions that the update computed.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from forced import context_of, forced_engine, forced_rollouts, forced_setting, learn, long_policy, mean_sampled
from measured import append

TURN_TOKENS = 16
"""Most tokens of a turn: a random model does not end its turns."""


@dataclass(frozen=True)
class Point:
    """One size of everything."""

    questions: int = 4
    group: int = 8
    turns: int = 3
    prompt: int = 0
    hidden: int = 128
    layers: int = 3


BASE = Point()
SWEEPS: dict[str, list[Point]] = {
    "questions": [replace(BASE, questions=n) for n in (2, 8, 16)],
    "group size": [replace(BASE, group=n) for n in (4, 16, 32)],
    "turns": [replace(BASE, turns=n) for n in (2, 5, 8)],
    "context": [replace(BASE, prompt=n) for n in (200, 400, 800)],
    "model": [replace(BASE, hidden=64), replace(BASE, hidden=256), replace(BASE, hidden=256, layers=6)],
}


def said(name: str, point: Point, parameters: int) -> str:
    """What was swept, in words."""
    words = {
        "questions": f"{point.questions} questions",
        "group size": f"groups of {point.group}",
        "turns": f"{point.turns} turns",
        "context": f"prompts of {point.prompt}",
        "model": f"{parameters / 1e6:.2f} M parameters",
    }
    return words.get(name, "base")


def measured(point: Point, steps: int) -> dict[str, float]:
    """Seconds and work of a step."""
    context = context_of(point.turns, point.prompt, TURN_TOKENS)
    policy = long_policy(context, hidden=point.hidden, layers=point.layers)
    setting = forced_setting(
        turns=point.turns,
        tasks=point.questions,
        prompt_tokens=point.prompt,
        chat=policy.chat,
        turn_tokens=TURN_TOKENS,
    )
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
    engine = forced_engine(policy, setting, point.group)
    rows: list[tuple[float, float, float, float]] = []
    for step in range(steps):
        start = time.process_time()
        rollouts = forced_rollouts(policy, setting, engine, point.group, step)
        rolled = time.process_time()
        found: Any = learn(policy, optimizer, setting, rollouts)
        sampled = mean_sampled(rollouts) * len(rollouts)
        rows.append((rolled - start, time.process_time() - rolled, sampled, found["positions"]))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    names = ("rollout_s", "update_s", "sampled", "positions")
    return {**dict(zip(names, medians, strict=True)), "parameters": sum(p.numel() for p in policy.model.parameters())}


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--largest", action="store_true", help="base and largest of each alone")
    parser.add_argument("--json", type=Path, help="file of JSON lines to add to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base: dict[str, float] = {}
    measured(BASE, 1)  # warms up
    for name, points in {"base": [BASE], **SWEEPS}.items():
        for point in points[-1:] if options.largest else points:
            found = measured(point, options.steps)
            base = base or found
            ratios = {f"{key}_ratio": found[key] / base[key] for key in base}
            what = said(name, point, int(found["parameters"]))
            append(options.json, "scaling", {"sweep": name, "point": what}, {**found, **ratios})
            print(
                f"{what:24} rollouts {found['rollout_s']:6.2f} s ({ratios['rollout_s_ratio']:5.2f} x)   "
                f"update {found['update_s']:6.2f} s ({ratios['update_s_ratio']:5.2f} x)   "
                f"sampled {ratios['sampled_ratio']:5.2f} x   positions {ratios['positions_ratio']:5.2f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
