"""Several methods' credit for the same recorded rollouts, side by side: a table for the terminal and a page."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turnwise.errors import RunError
from turnwise.report.page import resource
from turnwise.report.text import escaped, one_line, shortened
from turnwise.report.why import signed
from turnwise.traces import Trace

TEXT_CHARS = 60
PAGE_CHARS = 1200
PAGE_GROUPS = 60


@dataclass(frozen=True, kw_only=True)
class Line:
    """One turn with its credit under every method."""

    trace: Trace
    turn: int
    last: bool
    advantages: Mapping[str, float]

    @property
    def rewards(self) -> str:
        """The turn's rewards, and the outcome's in its rollout's last turn."""
        parts = [f"{one_line(name)} {value:g}" for name, value in self.trace.turns[self.turn].rewards.items()]
        if self.last:
            parts += [f"{one_line(name)} {value:g} (outcome)" for name, value in self.trace.outcome.items()]
        return ", ".join(parts)


def lines_by_group(traces: Sequence[Trace], credit: Mapping[str, np.ndarray]) -> Iterator[tuple[Hashable, list[Line]]]:
    """The turns of each group, rollout by rollout, with one advantage per method.

    `credit` has, by method, one advantage per turn in the order of the rollouts.
    """
    groups: dict[Hashable, list[Line]] = {}
    row = 0
    for trace in traces:
        for turn in range(len(trace.turns)):
            advantages = {method: float(values[row]) for method, values in credit.items()}
            line = Line(trace=trace, turn=turn, last=turn == len(trace.turns) - 1, advantages=advantages)
            groups.setdefault(trace.group, []).append(line)
            row += 1
    yield from groups.items()


def print_side_by_side(
    traces: Sequence[Trace], credit: Mapping[str, np.ndarray], console: Console, *, groups: int
) -> None:
    """Prints the first groups, one table each, and how many follow."""
    found = list(lines_by_group(traces, credit))
    for group, lines in found[:groups]:
        table = Table(title=Text(f"group {one_line(str(group))}"), title_justify="left", box=SIMPLE_HEAD)
        for name in ("rollout, turn", "what it did", "reward", "outcome"):
            table.add_column(name, overflow="fold")
        for method in credit:
            table.add_column(method, justify="right", no_wrap=True)
        number = 0
        for line in lines:
            number += line.turn == 0
            cells = [
                Text(f"{number}, {line.turn + 1}"),
                Text(shortened(one_line(line.trace.turns[line.turn].text), TEXT_CHARS)),
                Text(f"{sum(line.trace.turns[line.turn].rewards.values()):g}"),
                Text(f"{sum(line.trace.outcome.values()):g}" if line.last else ""),
            ]
            table.add_row(*cells, *(_coloured(value) for value in line.advantages.values()))
        console.print(table)
    if len(found) > groups:
        console.print(f"{len(found) - groups} more groups; --groups shows more, the page has {PAGE_GROUPS}.")


def _coloured(value: float) -> Text:
    return Text(signed(value), style="blue" if value > 0 else "dark_orange" if value < 0 else "dim")


def side_by_side_page(traces: Sequence[Trace], credit: Mapping[str, np.ndarray], name: str) -> str:
    """The same as one self-contained HTML page: each cell coloured by its advantage, within its method."""
    found = list(lines_by_group(traces, credit))
    largest = {method: float(np.abs(values).max()) or 1.0 for method, values in credit.items()}
    body = "".join(_group(str(group), lines, largest) for group, lines in found[:PAGE_GROUPS])
    left = f"<p>{len(found) - PAGE_GROUPS} more groups are left out.</p>" if len(found) > PAGE_GROUPS else ""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>Credit of {escaped(name)}</title><link rel="icon" href="data:,">'
        f"<style>{resource('page.css')}</style></head><body>"
        f'<header class="top"><p class="kicker">Turnwise credit</p><h1>The same turns under {len(credit)} methods</h1>'
        f'<p class="lead">{len(traces)} rollouts in {len(found)} groups, from {escaped(name)}. A cell is the advantage '
        "of a turn: blue makes it more likely, orange less; colours are relative to the method's largest.</p></header>"
        f"<main>{body}{left}</main></body></html>\n"
    )


def _group(name: str, lines: Sequence[Line], largest: Mapping[str, float]) -> str:
    head = "".join(f'<th scope="col">{escaped(method)}</th>' for method in largest)
    rows = "".join(_row(line, largest) for line in lines)
    return (
        f"<section><h3>Group {escaped(one_line(name))}</h3>"
        '<div class="scroll"><table class="side"><thead><tr><th scope="col">Rollout</th><th scope="col">Turn</th>'
        f'<th scope="col">What it did</th><th scope="col">Rewards</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div></section>"
    )


def _row(line: Line, largest: Mapping[str, float]) -> str:
    cells = []
    for method, value in line.advantages.items():
        sign = "pos" if value > 0 else "neg" if value < 0 else "none"
        cells.append(f'<td class="{sign}" style="--w:{abs(value) / largest[method]:.3f}">{signed(value)}</td>')
    text = escaped(shortened(line.trace.turns[line.turn].text, PAGE_CHARS))
    first = ' class="first"' if line.turn == 0 else ""
    return (
        f'<tr{first}><th scope="row">{escaped(one_line(line.trace.id)) if line.turn == 0 else ""}</th>'
        f"<td>{line.turn + 1}</td><td><pre>{text}</pre></td><td>{escaped(line.rewards)}</td>{''.join(cells)}</tr>"
    )


def write_side_by_side(traces: Sequence[Trace], credit: Mapping[str, np.ndarray], source: Path, out: Path) -> Path:
    """Writes the page; returns its path."""
    try:
        out.write_text(side_by_side_page(traces, credit, source.name), encoding="utf-8")
    except OSError as error:
        raise RunError(f"{out} must be writable; got {error.strerror}; choose another --out") from error
    return out
