"""The report of one or more runs as a single HTML page that asks nothing of the network.

Curves and tables are readable without its script, which adds the readout under the pointer and shows the rollouts: they
are data in the page, and the script writes them as text. A content security policy names that script by its hash, so no
text from a rollout could run.
"""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from turnwise.errors import InputError, RunError
from turnwise.report import curves
from turnwise.report.data import Run
from turnwise.report.rollouts import OUTCOMES, page_data, shown_rollouts
from turnwise.report.tables import (
    COLUMNS,
    PLAIN,
    Cell,
    Row,
    columns_of,
    estimator_order,
    estimator_title,
    number_text,
    paper_table,
    table_notes,
)
from turnwise.report.text import embedded_json, escaped, one_line
from turnwise.report.why import worded

SCRIPTS = ("elements.js", "charts.js", "rollout.js", "group.js", "browser.js")
"""The page's script in its order."""
OF_A_RUN = ("estimator", "out", "seed", "threads")
"""The options that say nothing of how arms differ."""
METHODS = {
    "grpo-or": "is paid for the outcome alone. Every turn gets the same advantage.",
    "grpo-mr": "adds the turns’ rewards to the outcome. Every turn still gets the same advantage.",
    "mt-grpo": "credits every turn for its own reward and for what follows from it.",
}


def write_report(runs: Sequence[Run], out: str | Path) -> Path:
    """Write the page about `runs` to the file `out`, whole or not at all; returns its path.

    Raises InputError without runs, RunError where the file cannot be written.
    """
    out = Path(out)
    text = page(runs)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"{out} must be writable; got {error}; choose another --out") from error
    return out


def page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    if not runs:
        raise InputError("a report needs at least one run; got none; give run directories")
    charts, shown = curves.charts(runs), page_data(shown_rollouts(runs))
    script = '"use strict";\n(() => {\n' + "\n".join(resource(name) for name in SCRIPTS) + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(resource("page.html")).substitute(
        digest=digest,
        style=resource("page.css"),
        script=script,
        data=embedded_json({"charts": curves.hover_data(charts), "outcomes": OUTCOMES, **shown}),
        overview=escaped(_overview(runs)),
        methods=_methods(runs),
        tables=_tables(paper_table(runs), curves.styles(runs)),
        notes=_notes(table_notes(runs)),
        arms=curves.toggles(runs),
        charts=curves.figures(charts) or "<p>No metric of these runs has a chart.</p>",
        browser=resource("browser.html") if shown["rollouts"] else "<p>These runs recorded no rollouts.</p>",
        scope=escaped(_scope(runs, len(shown["rollouts"]))),
    )


def resource(name: str) -> str:
    """A file that lies beside this module."""
    return (resources.files("turnwise.report") / name).read_text(encoding="utf-8")


def _overview(runs: Sequence[Run]) -> str:
    methods = ", ".join(estimator_title(name) for name in estimator_order(runs))
    last = max(run.lines[-1].step for run in runs)
    text = f"{_count(len(runs), 'run')} of {methods}, up to step {last}"
    tasks, size = ({run.config.get(n) for run in runs} for n in ("tasks_per_step", "group_size"))
    if len(tasks) == len(size) == 1 and None not in tasks | size:
        text += f"; each step takes {tasks.pop()} questions, {size.pop()} rollouts of each"
    return f"{text}."


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _methods(runs: Sequence[Run]) -> str:
    configs = {run.estimator: run.config for run in reversed(runs)}
    items = "".join(
        f"<div><dt>{curves.swatch(style)}{escaped(estimator_title(name))}</dt>"
        f"<dd>{escaped(_method(name, configs))}</dd></div>"
        for name, style in curves.styles(runs).items()
    )
    return f'<dl class="methods">{items}</dl>'


def _method(name: str, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """What a method does; of an arm of a comparison, its estimator and the options in which the arms differ."""
    config = configs[name]
    estimator = str(config.get("estimator", name))
    does = METHODS.get(estimator, "is described in docs/credit.md.")
    said = does if estimator == name else f"is {estimator_title(estimator)}, which {does}"
    options = [o for o in config if o not in OF_A_RUN and len({repr(c.get(o)) for c in configs.values()}) > 1]
    if options:
        said += f" With {', '.join(f'{worded(option)} {config[option]}' for option in options)}."
    if config.get("placebo"):
        said += " Its turn rewards are dealt out anew: what the page shows as dealt is what it learned from."
    return one_line(said)


def _tables(rows: Sequence[Row], styles: dict[str, int]) -> str:
    if not rows:
        return "<p>These runs have neither validation nor evaluation results.</p>"
    out = []
    for population in dict.fromkeys(row.population for row in rows):
        caption = escaped(one_line(population).capitalize())
        columns = columns_of([row for row in rows if row.population == population])
        head = "".join(f'<th scope="col">{escaped(COLUMNS[metric])}</th>' for metric in columns)
        body = "".join(
            f'<tr><th scope="row">{curves.swatch(styles[r.estimator])}{escaped(r.title)}</th>'
            f'<td class="seeds">{len(r.seeds)}</td>'
            f"{''.join(_cell(r.cells[m], m, styles[r.estimator]) for m in columns)}</tr>"
            for r in rows
            if r.population == population
        )
        out.append(
            f'<div class="scroll"><table class="results"><caption>{caption}</caption><thead><tr>'
            f'<th scope="col">Method</th><th scope="col">Seeds</th>{head}'
            f"</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return "".join(out)


def _cell(cell: Cell | None, metric: str, style: int) -> str:
    name = escaped(COLUMNS[metric])
    if cell is None:
        return f'<td data-label="{name}"><span class="num">–</span></td>'
    low, mean, high = (min(100.0, max(0.0, 100 * v)) for v in (cell.low, cell.mean, cell.high))
    spread = "one run"
    if cell.num_runs > 1:
        spread = f"{number_text(metric, cell.low)} to {number_text(metric, cell.high)}"
    bar = (
        f'<svg class="bar s{style}" viewBox="-3 0 106 8" aria-hidden="true">'
        f'<path class="track" d="M0 4H100"/><path class="spread" d="M{low:.1f} 4H{high:.1f}"/>'
        f'<circle cx="{mean:.1f}" cy="4" r="3"/></svg>'
    )
    return (
        f'<td data-label="{name}"><span class="num">{number_text(metric, cell.mean)}</span>'
        f'{"" if metric == PLAIN else bar}<span class="spread">{spread}</span></td>'
    )


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _scope(runs: Sequence[Run], shown: int) -> str:
    """Which of the recorded rollouts the page holds."""
    recorded = sum(run.num_recorded for run in runs)
    if not recorded:
        return ""
    text = f"The page holds {shown:,} rollouts"
    return f"{text} of {recorded:,}, evenly from all runs and over their steps." if recorded > shown else f"{text}."
