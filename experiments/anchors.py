"""Where anchor-state credit pays: TextWorld games of up to 20 turns, in which rollouts come to the same rooms again.

    python experiments/anchors.py --games 10

The table policy of examples/textworld_player.py learns each game by itself. Every method gets the same games, steps and
rollouts, and the learning rate that is best for it on four other games. Writes results/anchors.json and .md.
"""

import argparse
import dataclasses
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

import turnwise
from turnwise.compare import write_result
from turnwise.paired import paired

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from textworld_player import play  # pyright: ignore[reportMissingImports]

BASELINE = "grpo-mr"
METHODS = (BASELINE, "rloo", "mt-grpo", "turn-rloo", "gigpo")
RATES = (0.25, 0.5, 1.0, 2.0)
TUNED_ON = range(4)
STEPS = 16


def won(method: str, game: int, rate: float, games: int) -> float:
    """The share of all rollouts of a training that were won: the area under its curve."""
    spec = f"textworld:?rooms=3&objects=4&quest=3&quests=2&games={len(TUNED_ON) + games}"
    share = float(np.mean(play(spec, method, steps=STEPS, game=game, rate=rate, seed=game)))
    print(f"{method:10} game {game:2}  rate {rate:<4}  won {share:.3f}", flush=True)
    return share


def markdown(result: dict) -> str:
    shown = f"Share of won rollouts over {STEPS} steps of 8, mean of {result['games']} games of TextWorld,"
    lines = [
        "# anchors",
        "",
        f"{shown} and each method minus `{BASELINE}` on the same game.",
        "",
        "| method | learning rate | won | mean difference [95 %] | better : worse, p |",
        "|---|---|---|---|---|",
    ]
    for name, found in result["methods"].items():
        beside = found["beside"]
        if beside is None:
            compared = "| |"
        else:
            low, high = beside["interval"]["low"], beside["interval"]["high"]
            sides = f"{beside['wins']} : {beside['losses']}, {beside['p']:.3f}"
            compared = f"{beside['mean']:+.3f} [{low:+.3f}, {high:+.3f}] | {sides} |"
        lines.append(f"| `{name}` | {found['rate']} | {np.mean(found['won']):.3f} | {compared}")
    tuning = f"The rate is the best of {', '.join(map(str, RATES))} on {len(TUNED_ON)} other games."
    made = f"turnwise {result['turnwise']}, {result['machine']}, {result['date']}."
    return "\n".join([*lines, "", tuning, "", f"`python experiments/anchors.py --games {result['games']}`; {made}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    methods, reported = {}, range(len(TUNED_ON), len(TUNED_ON) + options.games)
    for name in METHODS:
        tuning = {rate: [won(name, game, rate, options.games) for game in TUNED_ON] for rate in RATES}
        best = max(tuning, key=lambda rate: float(np.mean(tuning[rate])))
        shares = [won(name, game, best, options.games) for game in reported]
        beside = None if name == BASELINE else dataclasses.asdict(paired(shares, methods[BASELINE]["won"]))
        methods[name] = {"rate": best, "tuning": tuning, "won": shares, "beside": beside}
    result = {
        "name": "anchors",
        "turnwise": turnwise.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "games": options.games,
        "methods": methods,
    }
    print(write_result(options.results, result, markdown(result)).with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
