"""Learning curves as inline SVG: a chart per metric, a colour per estimator, a line per seed.

The line is the mean over an estimator's runs, at the steps that all of them logged; the band
reaches from the smallest to the largest run; markers are validation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turnwise.report.data import Run
from turnwise.report.tables import PAPER_NAMES, estimator_order, estimator_title
from turnwise.report.text import escaped

Points = tuple[tuple[float, float], ...]
"""(step, value) in order of step."""
Place = Callable[[float, float], tuple[float, float]]
"""From (step, value) to the drawing's coordinates."""

WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 38, 4, 8, 22
MAX_POINTS = 240
"""Longer curves are averaged over consecutive steps, so that the page stays small."""
MAX_TURNS = 4
STYLES = 6
"""How many estimator colours the style sheet has; further estimators repeat them."""

CHARTS: dict[str, tuple[str, str]] = {
    "tool_execution": ("Tool execution", "Share of rollouts whose tool call ran"),
    "exact_match": ("Exact match", "Share of rollouts whose answer is right"),
    "answer_in_results": ("Answer in results", "Share of rollouts whose search found an answer"),
    "success": ("Success", "Share of rollouts that the environment calls solved"),
    "environment_return": ("Environment’s return", "Sum of what the environment pays a rollout, unweighted"),
    "return": ("Return", "Sum of all rewards of a rollout"),
    "entropy": ("Entropy", "Of the policy’s next token, in nats"),
    "kl": ("KL to the start", "How far the policy has moved, in nats per token"),
    "explained_variance": ("Explained variance", "Share of the returns’ variance that the critic’s values explain"),
    "dead_groups": ("Dead groups", "Share of groups without any difference to learn from"),
}
"""Title and explanation by metric, in reading order."""
RATES = frozenset({"tool_execution", "exact_match", "answer_in_results", "success", "dead_groups"})


@dataclass(frozen=True, kw_only=True)
class Series:
    """One estimator in one chart."""

    style: int
    arm: int
    """Its place among the estimators of the page."""
    title: str
    seeds: tuple[Points, ...]
    mean: Points
    low: Points
    high: Points
    validation: Points

    @property
    def values(self) -> list[float]:
        return [v for points in (*self.seeds, self.validation) for _, v in points]


@dataclass(frozen=True, kw_only=True)
class Chart:
    metric: str
    title: str
    about: str
    series: tuple[Series, ...]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts that these runs have data for."""
    titles = dict(CHARTS)
    seen = {name for run in runs for line in run.lines for name in line.metrics}
    for k in range(1, MAX_TURNS + 1):
        titles[f"abs_advantage/turn_{k}"] = f"|Advantage|, turn {k}", "Mean size of the credit"
    out = []
    for metric, (title, about) in titles.items():
        if metric in seen:
            series = tuple(_series(runs, metric, n, style, arm) for arm, (n, style) in enumerate(styles(runs).items()))
            series = tuple(s for s in series if s.values)
            if series:
                out.append(Chart(metric=metric, title=title, about=about, series=series))
    return out


def styles(runs: Sequence[Run]) -> dict[str, int]:
    """The colour of each estimator; the paper's three always have the same."""
    paper = list(PAPER_NAMES)
    others = [name for name in estimator_order(runs) if name not in paper]
    return {
        name: paper.index(name) if name in paper else len(paper) + others.index(name) % (STYLES - len(paper))
        for name in estimator_order(runs)
    }


def _series(runs: Sequence[Run], metric: str, estimator: str, style: int, arm: int) -> Series:
    ours = [run for run in runs if run.estimator == estimator]
    seeds = tuple(p for run in ours if (p := _points(run, metric, "train")))
    checks = tuple(p for run in ours if (p := _points(run, metric, "validation")))
    return Series(
        style=style,
        arm=arm,
        title=estimator_title(estimator),
        seeds=tuple(binned(p) for p in seeds),
        mean=binned(_over_runs(seeds, np.mean)),
        low=binned(_over_runs(seeds, np.min)),
        high=binned(_over_runs(seeds, np.max)),
        validation=binned(_over_runs(checks, np.mean)),
    )


def _points(run: Run, metric: str, split: str) -> Points:
    return tuple((x.step, x.metrics[metric]) for x in run.of_split(split) if metric in x.metrics)


def _over_runs(runs: Sequence[Points], reduce: Callable[[np.ndarray], Any]) -> Points:
    """`reduce` over the runs, at the steps that all of them have."""
    if not runs:
        return ()
    by_step = [dict(points) for points in runs]
    shared = sorted(set.intersection(*(set(d) for d in by_step)))
    return tuple((step, float(reduce(np.array([d[step] for d in by_step])))) for step in shared)


def binned(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most `limit` points, each the mean of consecutive ones."""
    if len(points) <= limit:
        return points
    parts = np.array_split(np.array(points), limit)
    return tuple((float(p[-1, 0]), float(p[:, 1].mean())) for p in parts)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def value_range(group: Sequence[Chart]) -> tuple[float, float]:
    """The axis that these charts share: 0 to 1 for rates, else 0 and all values with room."""
    if all(chart.metric in RATES for chart in group):
        return 0.0, 1.0
    values = [v for chart in group for s in chart.series for v in s.values]
    low, high = min(0.0, *values), max(0.0, *values)
    if high == low:
        return low, low + 1.0
    return low - 0.05 * (high - low) * (low < 0), high + 0.05 * (high - low) * (high > 0)


def figures(all_charts: Sequence[Chart]) -> str:
    """The charts as HTML figures; charts of one metric by turn share their axis."""
    series = [s for chart in all_charts for s in chart.series]
    steps = [x for s in series for points in (*s.seeds, s.validation) for x, _ in points]
    end = max(steps, default=1.0) or 1.0
    by_turn = [c for c in all_charts if "/turn_" in c.metric]
    return "".join(_figure(c, value_range(by_turn if c in by_turn else [c]), end) for c in all_charts)


def hover_data(all_charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """What the page's script reads out under the pointer: plain numbers only."""
    return [
        {
            "rate": chart.metric in RATES,
            "series": [
                {
                    "x": [x for x, _ in s.mean],
                    "mean": [_round(v) for _, v in s.mean],
                    "low": [_round(v) for _, v in s.low],
                    "high": [_round(v) for _, v in s.high],
                    "runs": len(s.seeds),
                    "vx": [x for x, _ in s.validation],
                    "vy": [_round(v) for _, v in s.validation],
                }
                for s in chart.series
            ],
        }
        for chart in all_charts
    ]


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def toggles(runs: Sequence[Run]) -> str:
    """A check box per estimator, which the page's script listens to; nothing where there is one estimator."""
    named = styles(runs)
    if len(named) < 2:
        return ""
    boxes = "".join(
        f'<label><input type="checkbox" value="{arm}" checked>{swatch(style)}{escaped(estimator_title(name))}</label>'
        for arm, (name, style) in enumerate(named.items())
    )
    return f'<fieldset class="arms" hidden><legend>Methods in the charts</legend>{boxes}</fieldset>'


def swatch(style: int) -> str:
    """The key of one estimator: its line and its validation marker."""
    return (
        f'<svg class="swatch s{style}" viewBox="0 0 30 12" aria-hidden="true">'
        f'<path class="mean" d="M1 6H29"/>{_marker(style, 15, 6)}</svg>'
    )


def _figure(chart: Chart, axis: tuple[float, float], end: float) -> str:
    low, high = axis

    def at(x: float, y: float) -> tuple[float, float]:
        px = LEFT + (WIDTH - LEFT - RIGHT) * x / end
        return px, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    drawn = "".join(_drawn(s, at) for s in reversed(chart.series))
    label = f"{chart.title} by training step; the last values stand above the chart"
    rows = "".join(_readout(s, chart.metric in RATES) for s in chart.series)
    return (
        f'<figure class="chart"><figcaption><b>{escaped(chart.title)}</b>'
        f"<span>{escaped(chart.about)}</span></figcaption>"
        f'<table class="readout">{_readout_head(chart)}<tbody>{rows}</tbody></table>'
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'data-end="{end:g}" aria-label="{escaped(label)}">'
        f"{_axes(axis, end, at, chart.metric in RATES)}{drawn}"
        f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/></svg></figure>'
    )


def _axes(axis: tuple[float, float], end: float, at: Place, rate: bool) -> str:
    out = []
    for value in ticks(*axis):
        _, y = at(0, value)
        zero = " zero" if abs(value) < 1e-12 else ""
        out.append(f'<path class="grid{zero}" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        text = f"{100 * value:.0f}%" if rate else f"{value:.4g}".replace("-", "−")
        out.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{text}</text>')
    marks = ticks(0, end)
    for value in marks:
        x, _ = at(value, axis[0])
        text = f"step {value:g}" if value == marks[-1] else f"{value:g}"
        anchor = "end" if x > WIDTH - RIGHT - 16 else "middle"
        out.append(f'<text class="x {anchor}" x="{x:.1f}" y="{HEIGHT - 6}">{text}</text>')
    return "".join(out)


def _drawn(s: Series, at: Place) -> str:
    parts = []
    if len(s.seeds) > 1 and len(s.mean) > 1:
        edge = [at(*p) for p in s.high] + [at(*p) for p in reversed(s.low)]
        parts.append(f'<path class="band" d="{_path(edge)}Z"/>')
        parts += [f'<path class="seed" d="{_path([at(*p) for p in seed])}"/>' for seed in s.seeds]
    lines = [s.mean] if s.mean else list(s.seeds)
    parts += [f'<path class="mean" d="{_path([at(*p) for p in line])}"/>' for line in lines if line]
    parts += [_marker(s.style, *at(*p)) for p in s.validation]
    return f'<g class="s{s.style}" data-arm="{s.arm}">{"".join(parts)}</g>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return line if len(points) > 1 else f"{line}h0"  # a dot, drawn by the round line cap


def _marker(style: int, x: float, y: float) -> str:
    """Circle, square, triangle, diamond: the shape tells estimators apart without colour."""
    shapes: Mapping[int, str] = {
        0: f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6Z",
        1: f"M{x:.1f} {y - 4:.1f}l4 7h-8Z",
        2: f"M{x - 3.4:.1f} {y:.1f}a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0Z",
        3: f"M{x:.1f} {y - 4.4:.1f}l4.4 4.4l-4.4 4.4l-4.4 -4.4Z",
    }
    return f'<path class="mark" d="{shapes[style % len(shapes)]}"/>'


def _readout_head(chart: Chart) -> str:
    checked = "validation" if any(s.validation for s in chart.series) else ""
    return (
        '<thead><tr><th class="at" scope="col">at the end</th><th scope="col">mean</th>'
        f'<th class="spread" scope="col">runs</th><th class="checked" scope="col">{checked}</th>'
        "</tr></thead>"
    )


def _readout(s: Series, rate: bool) -> str:
    """One line of the table above a chart: the last values, until the pointer asks for others."""
    value, spread, checked = "–", "", ""
    if s.mean:
        value = value_text(s.mean[-1][1], rate)
        if len(s.seeds) > 1:
            spread = f"{value_text(s.low[-1][1], rate)} to {value_text(s.high[-1][1], rate)}"
    if s.validation:
        checked = value_text(s.validation[-1][1], rate)
    return (
        f'<tr data-arm="{s.arm}"><th scope="row">{swatch(s.style)}{escaped(s.title)}</th><td>{value}</td>'
        f'<td class="spread">{spread}</td><td class="checked">{checked}</td></tr>'
    )


def value_text(value: float, rate: bool) -> str:
    """A rate in per cent, anything else with three significant digits."""
    return f"{100 * value:.0f}%" if rate else f"{value:.3g}".replace("-", "−")
