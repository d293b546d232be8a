"""What a terminal shows: training as it goes, evaluations, and an agent at work.

Everything that a policy, a corpus or a question says passes through `visible`, so that no control
character of theirs reaches the terminal.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from turnwise.designs import STATES, Progress
from turnwise.env import Environment, Step, closed, started, stepped
from turnwise.report.text import one_line, visible
from turnwise.types import Message

if TYPE_CHECKING:
    from turnwise.auditing import Audit, Measure

Record = Mapping[str, Any]
"""A line of metrics.jsonl: step, split, wall_s, metrics, and warnings where there are any."""

RATES = {
    "tool_execution": "tool execution",
    "answer_in_results": "answer in results",
    "exact_match": "exact match",
    "success": "success",
    "dead_groups": "dead groups",
    "clip_fraction": "clip fraction",
    "judge/disagreement": "judge disagrees",
}
"""Metrics that are shares of one, as the display calls them."""
NUMBERS = {
    "environment_return": "environment's return",
    "return": "return",
    "explained_variance": "explained variance",
    "entropy": "entropy",
    "kl": "KL",
    "tokens_per_s": "tokens/s",
    "judge/absent": "unjudged",
}
"""The other metrics of the display."""
SHOWN_WARNINGS = 3
"""The panel keeps the last so many warnings in view."""
COMPARED = ("tool_execution", "exact_match", "dead_groups")
"""Metrics of the table of a comparison's runs."""
TRENDS = ("tool_execution", "exact_match", "success")
"""Metrics that are drawn over time."""
BLOCKS = "▁▂▃▄▅▆▇█"
PACE_STEPS = 10
"""The last so many steps decide the time left."""


class Shows(Protocol):
    """Where a run's progress goes."""

    def show(self, record: Record) -> None: ...

    def say(self, text: str) -> None: ...


@contextlib.contextmanager
def training_display(title: str, total: int, console: Console) -> Iterator[Shows]:
    """A live panel on a terminal; elsewhere one line for every record."""
    if not console.is_terminal:
        yield LineDisplay(total, console)
        return
    panel = PanelDisplay(title, total)
    with Live(panel.rendered(), console=console, auto_refresh=False) as live:
        panel.changed = lambda: live.update(panel.rendered(), refresh=True)
        panel.said = lambda text: live.console.print(Text(one_line(text)))  # above the panel
        yield panel


@contextlib.contextmanager
def comparison_display(title: str, console: Console) -> Iterator[Callable[[Sequence[Progress]], None]]:
    """A live table of a comparison's runs; what is given shows them anew."""
    with Live(comparison_table(title, []), console=console, auto_refresh=False) as live:
        yield lambda runs: live.update(comparison_table(title, runs), refresh=True)


def comparison_table(title: str, runs: Sequence[Progress]) -> RenderableType:
    """A line for each run: how far it is, and what its last step's rollouts did."""
    table = Table(title=Text(one_line(title)), box=SIMPLE_HEAD, title_justify="left")
    for name in ("arm", "seed", "", "step", "done", *(RATES[name] for name in COMPARED), "s"):
        table.add_column(name, justify="left" if name in ("arm", "") else "right")
    for run in sorted(runs, key=lambda run: STATES.index(run.state)):  # what goes on stands on top
        rates = [f"{run.metrics[name]:.0%}" if name in run.metrics else "" for name in COMPARED]
        far = [str(run.step), f"{run.share:.0%}"] if run.state != "waiting" else ["", ""]
        took = f"{run.wall_s:.0f}" if run.step else ""
        style = {"finished": "green", "waiting": "dim"}.get(run.state)
        table.add_row(Text(one_line(run.arm)), str(run.seed), run.state, *far, *rates, took, style=style)
    done = sum(run.state == "finished" for run in runs)
    return Group(table, Text(f"{done} of {len(runs)} runs finished"))


class LineDisplay:
    """One line for every record."""

    def __init__(self, total: int, console: Console) -> None:
        self.total = total
        self.console = console

    def show(self, record: Record) -> None:
        """Prints the record's line, and its warnings below."""
        self.console.print(Text(record_line(record, self.total)), soft_wrap=True)
        for warning in record_warnings(record):
            self.console.print(Text(warning, style="yellow"), soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(Text(one_line(text)), soft_wrap=True)


class PanelDisplay:
    """All that the live panel needs to know of a run so far."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.train: list[Record] = []
        self.validation: list[Record] = []
        self.changed: Callable[[], None] = lambda: None
        self.said: Callable[[str], None] = lambda text: None

    def show(self, record: Record) -> None:
        """Takes the record in and draws the panel anew."""
        (self.train if record["split"] == "train" else self.validation).append(record)
        self.changed()

    def say(self, text: str) -> None:
        """Prints a line above the panel."""
        self.said(text)

    def rendered(self) -> RenderableType:
        """The panel as it stands."""
        return progress_panel(self.title, self.total, self.train, self.validation)


# --- training -------------------------------------------------------------------------------------


def record_line(record: Record, total: int) -> str:
    """A record on one line: step, time, and the metrics that it has."""
    metrics = record["metrics"]
    parts = [f"{record['split']:<10} {record['step']:>4}/{total}"]
    for name, title in RATES.items():
        if name in metrics:
            parts.append(f"{title} {metrics[name]:4.0%}")
    for name, title in NUMBERS.items():
        if name in metrics:
            parts.append(f"{title} {number_text(metrics[name])}")
    return "  ".join([*parts, duration(record["wall_s"])])


def record_warnings(record: Record) -> list[str]:
    """What the run warns of at this step, a line each."""
    return [f"warning at step {record['step']}: {one_line(said)}" for said in record.get("warnings", ())]


def progress_panel(title: str, total: int, train: Sequence[Record], validation: Sequence[Record]) -> Panel:
    """A run on a few lines: how far it is, the present metrics, and two of them over time."""
    step = train[-1]["step"] if train else 0
    left = seconds_left(train, total)
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(f"step {step}/{total}", style="bold"),
        ProgressBar(total=total, completed=step, width=30),
        Text(f"{duration(left)} left" if left is not None else "the first step is under way"),
    )
    parts: list[RenderableType] = [head]
    if train or validation:
        parts += [Text(), _metrics_table(train, validation)]
    if len(train) > 1:
        parts += [Text(), _trends(train)]
    warnings = [warning for record in train for warning in record_warnings(record)]
    if warnings:
        parts += [Text(), *(Text(warning, style="yellow") for warning in warnings[-SHOWN_WARNINGS:])]
    hint = "Ctrl-C stops after the step under way and keeps a checkpoint"
    return Panel(Group(*parts), title=Text(one_line(title)), subtitle=Text(hint, style="dim"), expand=False)


def _metrics_table(train: Sequence[Record], validation: Sequence[Record]) -> Table:
    table = Table.grid(padding=(0, 2))
    columns = ("training", "validation", "reward")
    table.add_row("", *(Text(column, style="dim", justify="right") for column in columns))
    now, held = (_last_metrics(records) for records in (train, validation))
    for name, title in {**RATES, **NUMBERS}.items():
        if name not in now and name not in held:
            continue
        cells = [_cell(name, metrics.get(name)) for metrics in (now, held)]
        cells.append(_cell("", now.get(f"reward/{name}")))
        table.add_row(Text(title), *(Text(cell, justify="right") for cell in cells))
    shown = {f"reward/{name}" for name in RATES}
    for name, value in now.items():
        if name.startswith("reward/") and name not in shown:
            title = one_line(name.removeprefix("reward/").replace("_", " "))
            table.add_row(Text(title), "", "", Text(_cell("", value), justify="right"))
    return table


def _last_metrics(records: Sequence[Record]) -> Mapping[str, float]:
    return records[-1]["metrics"] if records else {}


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name in RATES else number_text(value)


def _trends(train: Sequence[Record]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name in TRENDS:
        values = [r["metrics"][name] for r in train if name in r["metrics"]]
        if values:
            table.add_row(Text(RATES[name]), Text(sparkline(values, width=48), style="green"))
    return table


def seconds_left(train: Sequence[Record], total: int) -> float | None:
    """Steps to go times the mean time of the last few; None before the first step."""
    if not train:
        return None
    last = train[-1]
    before = train[-1 - PACE_STEPS :][0]
    if before is last:  # the first step of a run: all its time, the first validation's too
        return (total - last["step"]) * last["wall_s"] / max(1, last["step"])
    pace = (last["wall_s"] - before["wall_s"]) / (last["step"] - before["step"])
    return (total - last["step"]) * pace


def sparkline(values: Sequence[float], *, width: int) -> str:
    """Shares of one as a row of at most `width` blocks, each the mean of neighbouring values."""
    count = min(width, len(values))
    bounds = [i * len(values) // count for i in range(count + 1)] if count else []
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(bounds)]
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(min(1.0, max(0.0, mean)) * top)] for mean in means)


def number_text(value: float) -> str:
    """Three significant digits, or a whole number with its thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 1:05, 2:03:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --- evaluations ----------------------------------------------------------------------------------

EVALUATED = {
    "tool_execution": "tool\nexecution",
    "answer_in_results": "answer in\nresults",
    "exact_match": "exact\nmatch",
    "exact_match_paper": "exact match\n(paper)",
    "f1": "F1",
    "answer_presence": "answer\npresence",
    "xml_format": "format",
    "turns": "turns",
}
"""The columns of an evaluation's table."""
SEARCHED = {
    "tool_execution": "tool\nexecution",
    "well_called": "well\ncalled",
    "gold_found": "gold\nfound",
    "answer_in_results": "answer in\nresults",
    "exact_match": "exact\nmatch",
    "f1": "F1",
    "final_format": "final\nformat",
    "searches": "searches",
    "redundant_searches": "redundant\nsearches",
    "turns": "turns",
}
"""The same where protocol `search` or a model's own format was played; a column that no question has is left out."""
ELSEWHERE = {
    "success": "success",
    "environment_return": "return",
    "exact_match": "exact\nmatch",
    "well_called": "actions\ntaken",
    "terminated": "terminated",
    "turns": "turns",
    "tokens": "tokens",
}
"""The same in an environment from elsewhere."""
COUNTED = ("searches", "redundant_searches", "turns", "environment_return", "tokens")
"""The columns that are no shares."""


def evaluation_table(title: str, evaluation: Mapping[str, Any]) -> Table:
    """The numbers of `evaluation_to_dict`: overall, and by kind where there are several."""
    table = Table(title=Text(one_line(title)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("questions", justify="right")
    means = evaluation["metrics"]
    titles = SEARCHED if "final_format" in means else EVALUATED if "tool_execution" in means else ELSEWHERE
    columns = [name for name in titles if name in means] + [name for name in means if name.startswith("pass@")]
    for name in columns:
        table.add_column(titles.get(name, name), justify="right")
    kinds = evaluation["by_kind"] if len(evaluation["by_kind"]) > 1 else {}
    for kind, estimates in {"all": means, **kinds}.items():
        count = next(iter(estimates.values()))["n"]
        cells = [Text(_estimate(name, estimates[name]) if name in estimates else "-") for name in columns]
        table.add_row(Text(one_line(kind) or "no kind"), Text(str(count)), *cells)
    return table


def _estimate(name: str, estimate: Mapping[str, float]) -> str:
    if name in COUNTED:
        return f"{estimate['mean']:.2f}"
    low, high = estimate["low"], estimate["high"]
    return f"{100 * estimate['mean']:.1f}\n{100 * low:.0f}–{100 * high:.0f}"


def audit_table(run: str, audit: "Audit") -> Table:
    """How each estimator's credit agrees with true advantages."""
    title = f"credit against true advantages under {run}: 95 % interval over groups in brackets"
    table = Table(title=Text(one_line(title)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "rank correlation", "of the ceiling", "same sign"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in audit.estimators.items():
        rank, top = found.rank_correlation, audit.ceiling
        share = f"{rank.value / top.value:.2f}" if rank and top and top.value > 0 else "-"
        table.add_row(*map(Text, (name, _measure(rank), share, _measure(found.sign_agreement))))
    return table


def _measure(measure: "Measure | None") -> str:
    return f"{measure.value:.2f} ({measure.low:.2f} to {measure.high:.2f})" if measure else "-"


# --- an agent at work -----------------------------------------------------------------------------


class Watched:
    """An environment that tells `begin` its first messages, and `watch` every message and what came of it."""

    def __init__(
        self,
        environment: Environment,
        watch: Callable[[str, Step], None],
        begin: Callable[[tuple[Message, ...]], None] = lambda messages: None,
    ) -> None:
        self._environment = environment
        self._watch = watch
        self._begin = begin

    async def start(self) -> tuple[Message, ...]:
        """The environment's first messages, once `begin` has seen them."""
        messages = await started(self._environment)
        self._begin(messages)
        return messages

    async def step(self, text: str) -> Step:
        """The environment's reaction, once `watch` has seen it."""
        step = await stepped(self._environment, text)
        self._watch(text, step)
        return step

    async def close(self) -> None:
        """Closes the environment."""
        await closed(self._environment)


def turn_panel(number: int, text: str, step: Step) -> Table:
    """One turn: reasoning, call and result, or answer; the bare message where it has none."""
    action = step.action
    rows: list[tuple[str, str, str]] = []
    if action.reasoning:
        rows.append(("reasoning", action.reasoning, "dim"))
    if action.error or (not action.tool_calls and action.answer is None):
        rows.append(("message", text, "yellow"))
    else:
        calls = [f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}" for call in action.tool_calls]
        rows += [("call", call, "cyan") for call in calls]
    rows += [("error", result.text, "red") if result.error else ("result", result.text, "") for result in step.results]
    if action.answer is not None:
        rows.append(("answer", action.answer, "bold green"))
    if step.rewards:
        rows.append(("rewards", ", ".join(f"{name} {value:g}" for name, value in step.rewards.items()), "cyan"))
    if step.stop and step.success is not None:
        rows.append(("success", "yes" if step.success else "no", "bold green" if step.success else "red"))
    if not step.results:
        rows += [("reply", message.content, "") for message in step.reply]
    if step.stop == "max_turns" and action.num_calls and not step.results:
        rows.append(("stop", "the last turn must answer; its calls were not executed", "red"))
    table = Table.grid(padding=(0, 2))
    for i, (name, content, style) in enumerate(rows):
        turn = Text(f"turn {number}" if i == 0 else "", style="bold")
        table.add_row(turn, Text(name, style="dim"), Text(visible(content), style=style))
    return table
