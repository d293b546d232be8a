"""The paper's table (arXiv 2505.11821, table 5) from runs: one row per estimator, over its seeds.

Rates stand as rates (1 = always), not multiplied by the reward's weight as in the paper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turnwise.report.data import Run
from turnwise.report.text import one_line

PAPER_NAMES = {"grpo-or": "GRPO-OR", "grpo-mr": "GRPO-MR", "mt-grpo": "MT-GRPO"}
"""The names that the paper writes, in its order."""
COLUMNS = {
    "tool_execution": "Tool execution",
    "answer_in_results": "Answer in results",
    "xml_format": "Format",
    "exact_match_start": "Exact match, start",
    "exact_match": "Exact match, end",
    "success_start": "Success, start",
    "success": "Success, end",
    "environment_return": "Return",
}
"""Column titles by metric."""
ELSEWHERE = ("success_start", "success", "environment_return")
"""Those that only runs in environments from elsewhere have."""
PLAIN = "environment_return"
"""The one number that is no rate."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric over the runs of one estimator."""

    mean: float
    low: float
    high: float
    num_runs: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One estimator on one population of questions."""

    population: str
    """`validation`, or an evaluation such as `test, greedy`."""
    estimator: str
    seeds: tuple[int, ...]
    cells: dict[str, Cell | None]
    """By the names of COLUMNS; None where no run of the row has the number."""

    @property
    def title(self) -> str:
        return estimator_title(self.estimator)


def estimator_title(name: str) -> str:
    """The estimator as the paper writes it, or its own name on one line."""
    return PAPER_NAMES.get(name, one_line(name))


def estimator_order(runs: Sequence[Run]) -> tuple[str, ...]:
    """The estimators of `runs`: the paper's in its order, then others by name."""
    present = {run.estimator for run in runs}
    return (*(n for n in PAPER_NAMES if n in present), *sorted(present - set(PAPER_NAMES)))


def paper_table(runs: Sequence[Run]) -> list[Row]:
    """Rows by population, then estimator: mean, smallest and largest value over the runs.

    `validation` rows hold the last validation line of each run, and as `exact_match_start` that of
    the first. Evaluations follow, one population per name and mode; their start is the evaluation
    named `NAME-start` of the same mode, where a run has one. Populations are never mixed.
    """
    numbers = [_numbers_of_run(run) for run in runs]
    populations = sorted({p for by in numbers for p in by}, key=lambda p: (p != "validation", p))
    rows = []
    for population in populations:
        for estimator in estimator_order(runs):
            ours = [
                (run.seed, by[population])
                for run, by in zip(runs, numbers, strict=True)
                if run.estimator == estimator and population in by
            ]
            if ours:
                rows.append(_row(population, estimator, ours))
    return rows


def _numbers_of_run(run: Run) -> dict[str, dict[str, float]]:
    """Metrics of one run by population, the start's exact match among them."""
    out: dict[str, dict[str, float]] = {}
    for split in run.splits:
        if split == "train":
            continue
        lines = run.of_split(split)
        out[split] = dict(lines[-1].metrics)
        if len(lines) > 1:
            out[split] |= _as_start(lines[0].metrics)
    by_key = {(e.name, e.mode): e.means for e in run.evaluations}
    for (name, mode), means in by_key.items():
        if name.endswith("-start"):
            continue
        numbers = dict(means)
        out[f"{name}, {mode}"] = numbers | _as_start(by_key.get((f"{name}-start", mode), {}))
    return out


def _as_start(metrics: Mapping[str, float]) -> dict[str, float]:
    """The start's numbers, by the names of their columns."""
    return {f"{name}_start": metrics[name] for name in ("exact_match", "success") if name in metrics}


def _row(population: str, estimator: str, ours: list[tuple[int, dict[str, float]]]) -> Row:
    def cell(metric: str) -> Cell | None:
        values = np.array([numbers[metric] for _, numbers in ours if metric in numbers])
        if not values.size:
            return None
        return Cell(
            mean=float(values.mean()),
            low=float(values.min()),
            high=float(values.max()),
            num_runs=values.size,
        )

    return Row(
        population=population,
        estimator=estimator,
        seeds=tuple(sorted(seed for seed, _ in ours)),
        cells={metric: cell(metric) for metric in COLUMNS},
    )


def table_notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the table must know: missing numbers, repeated seeds, skipped lines."""
    notes = [f"{one_line(run.name)}: {one_line(note)}" for run in runs for note in run.notes]
    for estimator in estimator_order(runs):
        ours, title = [r for r in runs if r.estimator == estimator], estimator_title(estimator)
        seeds = [r.seed for r in ours]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{title}: some runs share a seed, so the range is not over seeds alone.")
        if any(len(r.of_split("validation")) < 2 for r in ours):
            notes.append(f"{title}: a run has fewer than two validation lines, so no start or no end.")
    ends = {run.lines[-1].step for run in runs}
    if len(ends) > 1:
        notes.append(f"The runs end at different steps, {min(ends)} to {max(ends)}.")
    for row in paper_table(runs):
        for metric, cell in row.cells.items():
            if cell is not None and cell.num_runs < len(row.seeds):
                notes.append(
                    f"{row.title}, {row.population}: {COLUMNS[metric]} comes from "
                    f"{cell.num_runs} of {len(row.seeds)} runs."
                )
    return notes


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The metrics that a table of these rows shows: the paper's, or those that runs in environments elsewhere have."""
    known = {metric for row in rows for metric, cell in row.cells.items() if cell}
    return [m for m in COLUMNS if m in known or not (m in ELSEWHERE or known & set(ELSEWHERE))]


def percent(value: float) -> str:
    """A rate in per cent with one decimal, without the sign: 0.4567 is 45.7."""
    return f"{100 * value:.1f}"


def number_text(metric: str, value: float) -> str:
    """A rate in per cent; what is none as it is."""
    return f"{value:.2f}" if metric == PLAIN else percent(value)


def cell_text(metric: str, cell: Cell | None) -> str:
    """`45.7 (41.0–50.2)`; the range only where there are several runs; – without a number."""
    if cell is None:
        return "–"
    mean, low, high = (number_text(metric, value) for value in (cell.mean, cell.low, cell.high))
    return mean if cell.num_runs == 1 else f"{mean} ({low}–{high})"


def _short_cell(metric: str, cell: Cell | None) -> str:
    """The mean, and below it the range in whole per cent, to fit 80 columns."""
    if cell is None or cell.num_runs == 1 or metric == PLAIN:
        return cell_text(metric, cell)
    return f"{percent(cell.mean)}\n{100 * cell.low:.0f}–{100 * cell.high:.0f}"


def _unit(columns: Sequence[str]) -> str:
    return "per cent, the return as it is" if PLAIN in columns else "per cent"


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print `rows` to the terminal, one table per population."""
    console = console or Console()
    for population in dict.fromkeys(row.population for row in rows):
        columns = columns_of([row for row in rows if row.population == population])
        title = Text(f"{one_line(population)}: {_unit(columns)}, mean over seeds (min–max)")
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        table.add_column("Method")
        table.add_column("Seeds", justify="right")
        for metric in columns:
            table.add_column(COLUMNS[metric], justify="right")
        for row in rows:
            if row.population == population:
                values = [Text(_short_cell(metric, row.cells[metric])) for metric in columns]
                table.add_row(Text(row.title), Text(str(len(row.seeds))), *values)
        console.print(table)


def markdown_table(rows: Sequence[Row]) -> str:
    """`rows` as Markdown, one table per population, per cent, mean over seeds (min–max)."""
    blocks = []
    for population in dict.fromkeys(row.population for row in rows):
        columns = columns_of([row for row in rows if row.population == population])
        head = ["Method", "Seeds", *(COLUMNS[metric] for metric in columns)]
        lines = [f"**{_cell(population)}** ({_unit(columns)}, mean over seeds, min–max)", "", _line(head)]
        lines.append("|---|" + "---:|" * (len(head) - 1))
        lines += [
            _line([_cell(r.title), str(len(r.seeds)), *(cell_text(metric, r.cells[metric]) for metric in columns)])
            for r in rows
            if r.population == population
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Untrusted text inside a Markdown cell."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + c if c in "\\|`*_[]" else c for c in text)
