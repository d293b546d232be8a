"""All measurements of speed as one command: JSON lines, and one table of them.

    python benchmarks/all.py --data ../shared/data/trivia --trl-python .venv-trl-1.16.0/bin/python [--quick]

Runs, one after the other and on one thread each, `trl_step.py` (in the environment that has TRL), `engine.py`,
`search.py`, `floor.py` and `scaling.py`, each of which compares what it compares within one run. Every line goes to
`results/performance.json` as soon as it is measured, and the table to `results/performance.md` after each of them.
`--quick` measures fewer and smaller cases, for a look. `--only` takes some of the five and keeps the others' lines;
`--table` writes the table anew and measures nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measured import circumstances

HERE = Path(__file__).parent
Line = Mapping[str, Any]
Commands = Mapping[str, Sequence[Sequence[str]]]
"""The calls of each benchmark: a script's name and its options."""

FULL: Commands = {
    "step": [["trl_step.py", "--steps", "1", "--tasks", "8", "--group-size", "12"]],
    "engine": [
        ["engine.py", "--groups", "4", "--group-size", "8", "--turns", "3", "--rounds", "1"],
        ["engine.py", "--groups", "4", "--group-size", "8", "--turns", "8", "--prompt-tokens", "400", "--rounds", "1"],
    ],
    "search": [["search.py", "--others"]],
    "floor": [["floor.py", "--steps", "2"]],
    "scaling": [["scaling.py"]],
}
QUICK: Commands = {
    "step": [["trl_step.py", "--steps", "1", "--turns", "3", "--tasks", "2", "--group-size", "4"]],
    "engine": [["engine.py", "--groups", "2", "--group-size", "4", "--turns", "3", "--rounds", "1"]],
    "search": [["search.py", "--others", "--questions", "400"]],
    "floor": [["floor.py", "--shapes", "8x12", "--steps", "2", "--taught", "4"]],
    "scaling": [["scaling.py", "--largest"]],
}


def read(file: Path) -> list[Line]:
    """The lines of a file of measurements; none where there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def write(file: Path, lines: Iterable[Line]) -> None:
    """A file of measurements."""
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def run(name: str, calls: Sequence[Sequence[str]], options: argparse.Namespace, file: Path) -> None:
    """Runs a benchmark's calls; its lines replace those of before."""
    write(file, [line for line in read(file) if name not in (line["benchmark"], line.get("of"))])
    start = time.perf_counter()
    for script, *arguments in calls:
        python = options.trl_python if script == "trl_step.py" and options.trl_python else Path(sys.executable)
        data = ["--data", str(options.data)] if script == "search.py" else []
        command = [str(python), str(HERE / script), *arguments, *data, "--json", str(file)]
        print(f"\n$ {script} {' '.join(arguments)}", flush=True)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
    shown = "; ".join(" ".join(call) for call in calls)
    about = {
        "benchmark": "about",
        "of": name,
        "commands": shown,
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    write(file, [*read(file), {**about, **circumstances(1), "trl": trl_release(options.trl_python)}])


def trl_release(python: Path | None) -> str | None:
    """The release of TRL in another environment."""
    if python is None:
        return None
    code = "import importlib.metadata as m; print(m.version('trl'))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# ------------------------------------------------------------------------------------------------ the table


def page(lines: Sequence[Line]) -> str:
    """Everything that was measured as one Markdown page."""
    parts = [
        "# Speed",
        "`make bench`, one thread; seconds are CPU time. What it means: [docs/performance.md](../docs/performance.md).",
    ]
    for name, title, rows in (
        ("step", "A training step and its rollouts, against `generate` and TRL's tool loop", step_rows),
        ("engine", "Rollouts of fixed lengths, against feeding every turn anew and `generate`", engine_rows),
        ("search", "Search, on TriviaQA's questions", search_rows),
        ("floor", "The parts of a step, and their floors", floor_rows),
        ("scaling", "What a step costs as one thing grows", scaling_rows),
    ):
        own = [line for line in lines if line["benchmark"] == name]
        about = [line for line in lines if line.get("of") == name]
        if own:
            parts += [f"## {title}", *map(said, about), table(*rows(own))]
    return "\n\n".join(parts) + "\n"


def said(about: Line) -> str:
    """What a benchmark was run with, as a sentence."""
    versions = {**about["versions"], **({"trl": about["trl"]} if about.get("trl") and about["of"] == "step" else {})}
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    machine = f"{about['processor']}, {about['cores']} cores, {about['threads']} thread, load {about['load']:.1f}"
    return f"`{about['commands']}` on {about['date']}: {machine}; {used}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, whose columns after the first are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def step_rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """One row for each way of each case; ratios are over the native one."""
    head = ["turns, prompts", "way", "turns played", "tokens a rollout", "step, s", "x", "rollouts, s", "x"]
    rows = []
    for line in lines:
        prompts = f"{line['prompt_tokens']} tokens" if line["prompt_tokens"] else "short"
        rows.append(
            [
                f"{line['turns']}, {prompts}, {line['tasks']} x {line['group_size']}",
                line["way"],
                f"{line['turns_a_rollout']:.2f}",
                f"{line['sampled_a_rollout']:.0f}",
                f"{line['step_s']:.2f}",
                f"{line['step_ratio']:.2f}",
                f"{line['rollout_s']:.2f}",
                f"{line['rollout_ratio']:.2f}",
            ]
        )
    return head, rows


def engine_rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """One row for each way of each case."""
    head = ["turns, prompts", "way", "CPU s", "x", "tokens"]
    return head, [
        [
            f"{line['turns']}, {line['prompt_tokens']} tokens, {line['rollouts']} rollouts",
            line["way"],
            f"{line['cpu_s']:.2f}",
            f"{line['cpu_ratio']:.2f}",
            str(line["tokens"]),
        ]
        for line in lines
    ]


def search_rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """One row for each engine."""
    head = ["engine", "questions", "hit@1", "hit@3", "hit@5", "queries/s", "of plain tantivy"]
    return head, [
        [
            line["engine"],
            str(line["questions"]),
            *(f"{100 * line[f'hit@{k}']:.2f} %" for k in (1, 3, 5)),
            f"{line['queries_per_s']:.0f}",
            f"{line['speed_ratio']:.2f}",
        ]
        for line in lines
    ]


def floor_rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """One row for each part of each shape, the longest part first."""
    head = ["step, part", "ms", "share", "what had to be done", "floor, ms", "x"]
    rows = []
    for line in sorted(lines, key=lambda line: (line["shape"], line["part"] != "all", -line["seconds"])):
        floor = line["floor_s"]
        rows.append(
            [
                f"{line['shape']}, {line['part']}",
                f"{1000 * line['seconds']:.1f}",
                f"{100 * line['share']:.1f} %" if "share" in line else "",
                f"{line['amount']:.3g} {line['unit']}" if line.get("amount") else "",
                f"{1000 * floor:.2f}" if floor else "",
                f"{line['seconds'] / floor:.1f}" if floor else "",
            ]
        )
    return head, rows


def scaling_rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """One row for each point; ratios are over the base."""
    head = ["swept: point", "rollouts, s", "x", "update, s", "x", "sampled tokens, x", "computed positions, x"]
    return head, [
        [
            line["point"] if line["sweep"] == "base" else f"{line['sweep']}: {line['point']}",
            f"{line['rollout_s']:.2f}",
            f"{line['rollout_s_ratio']:.2f}",
            f"{line['update_s']:.2f}",
            f"{line['update_s_ratio']:.2f}",
            f"{line['sampled_ratio']:.2f}",
            f"{line['positions_ratio']:.2f}",
        ]
        for line in lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/trivia"), help="TriviaQA and its passages")
    parser.add_argument("--trl-python", type=Path, help="the Python that has TRL")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--only", nargs="+", choices=list(FULL), default=list(FULL))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    file = options.results / "performance.json"
    for name in () if options.table else options.only:
        if name == "search" and not options.data.is_dir():
            print(f"\nsearch is left out: there is no folder {options.data}")
            continue
        run(name, (QUICK if options.quick else FULL)[name], options, file)
        (options.results / "performance.md").write_text(page(read(file)), encoding="utf-8")
    (options.results / "performance.md").write_text(page(read(file)), encoding="utf-8")


if __name__ == "__main__":
    main()
