"""The map: how far estimators are from the truth, over problems, their parameters and group sizes."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape

from turnwise.lab.exact import Estimator, group_gradient, metrics, policy_gradient
from turnwise.lab.problems import PROBLEMS

Cell = tuple[str, Mapping[str, int | float]]
"""A problem's name and those of its parameters that are not its defaults."""
Row = dict[str, str | int | float | bool | None]
"""One estimator in one problem at one group size."""

CELLS: tuple[Cell, ...] = (
    *((name, {}) for name in PROBLEMS),
    ("one-decisive-turn", {"turns": 2}),
    ("one-decisive-turn", {"turns": 6}),
    ("stochastic-tool", {"noise": 0.0}),
    ("stochastic-tool", {"noise": 0.4}),
    ("sparse", {"paying": 1}),
    ("sparse", {"paying": 3}),
)
"""Every problem as it is; more and fewer turns, more and less tool noise, less and less sparse rewards."""

METRICS: dict[str, tuple[str, float, float]] = {
    "bias": ("Bias: |E ĝ − ∇J| / |∇J|", 0.0, 1.0),
    "cosine": ("Direction: cosine of E ĝ and ∇J", 1.0, 0.5),
    "variance": ("Variance: trace Cov ĝ / |∇J|²", 0.0, 8.0),
    "mse": ("Squared error: E|ĝ − ∇J|² / |∇J|²", 0.0, 8.0),
    "best_mse": ("Squared error at the best step size: min over c of E|c ĝ − ∇J|² / |∇J|²", 0.0, 1.0),
    "sign_agreement": ("Share of turns whose advantage has the true sign", 1.0, 0.0),
    "rank_correlation": ("Rank correlation of the advantages with the true ones", 1.0, 0.0),
}
"""Title by metric, its best value, and the value from which on the figure shows it at its worst."""


def bias_map(
    estimators: Mapping[str, Estimator],
    *,
    cells: Sequence[Cell] = CELLS,
    group_sizes: Sequence[int] = (2, 4, 8),
    per_group: Collection[str] = (),
    ordered: Collection[str] = (),
    limit: int = 20_000,
    samples: int = 10_000,
    seed: int = 0,
) -> list[Row]:
    """A row for every estimator, problem and group size: what `metrics` says, and whether it is exact.

    `per_group` and `ordered` name the estimators that need these; the rest as in `group_gradient`.
    """
    for name in (*per_group, *ordered):
        if name not in estimators:
            raise ValueError(f"per_group and ordered must name estimators of the map; got {name!r}")
    rows: list[Row] = []
    for problem, parameters in cells:
        if problem not in PROBLEMS:
            raise ValueError(f"cells must name problems, {list(PROBLEMS)}; got {problem!r}")
        process, logits = PROBLEMS[problem](**parameters)
        truth = policy_gradient(process, logits)
        for group_size in group_sizes:
            for name, estimator in estimators.items():
                found = group_gradient(
                    estimator,
                    process,
                    logits,
                    group_size=group_size,
                    per_group=name in per_group,
                    ordered=name in ordered,
                    limit=limit,
                    samples=samples,
                    seed=seed,
                )
                place: Row = {"problem": problem, "parameters": _written(parameters), "group_size": group_size}
                counted: Row = {"exact": found.exact, "num_groups": found.num_groups}
                rows.append({"estimator": name, **place, **counted, **metrics(found, truth)})
    return rows


def _written(parameters: Mapping[str, int | float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in parameters.items())


def json_text(rows: Sequence[Row]) -> str:
    """The rows as JSON, one per line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows) + "\n]\n"


def text_table(rows: Sequence[Row], metric: str = "bias") -> str:
    """One metric as text: a line per problem and group size, a column per estimator; "~" before sampled numbers."""
    _check(rows, metric)
    names, places, found = _grid(rows)
    head = [["problem", "G", *names]]
    body = [[_label(p), str(p[2]), *(_number(found.get((n, p)), metric) for n in names)] for p in places]
    widths = [max(map(len, column)) for column in zip(*head, *body, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in head + body
    ]
    return "\n".join([METRICS[metric][0], "", lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


Place = tuple[str, str, int]
"""Problem, parameters, group size."""


def _grid(rows: Sequence[Row]) -> tuple[list[str], list[Place], dict[tuple[str, Place], Row]]:
    """Estimators and places in their first order, and the row of each pair."""
    found: dict[tuple[str, Place], Row] = {}
    for row in rows:
        place = (str(row["problem"]), str(row["parameters"]), int(row["group_size"] or 0))
        found[str(row["estimator"]), place] = row
    names, places = (list(dict.fromkeys(each)) for each in zip(*found, strict=True))
    return names, places, found


def _check(rows: Sequence[Row], metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {list(METRICS)}; got {metric!r}")
    if not rows:
        raise ValueError("a map must have a row at least; got none; compute it with bias_map")


def _label(place: Place) -> str:
    return f"{place[0]} ({place[1]})" if place[1] else place[0]


def _number(row: Row | None, metric: str) -> str:
    value = None if row is None else row[metric]
    if row is None or value is None:
        return "–"
    written = f"{float(value):.2f}".replace("-0.00", "0.00")
    return written if row["exact"] else f"~{written}"


# ------------------------------------------------------------------------------------------ the figure

WIDE, HIGH, LEFT, TOP = 52, 22, 250, 150
GOOD, MIDDLE, BAD = (247, 251, 255), (244, 165, 96), (122, 28, 32)
"""Colours from the best to the worst value: light to dark, so that they print in grey too."""


def heat_map(rows: Sequence[Row], metric: str = "bias") -> str:
    """One metric as an SVG figure: a line per problem and group size, a column per estimator, numbers in the cells."""
    _check(rows, metric)
    names, places, found = _grid(rows)
    width, height = max(LEFT + WIDE * len(names) + 80, 720), TOP + HIGH * len(places) + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold">{escape(METRICS[metric][0])}</text>',
        *_columns(names),
        *_lines(names, places, found, metric),
        *_legend(TOP + HIGH * len(places) + 22, metric),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _columns(names: Sequence[str]) -> Iterator[str]:
    for i, name in enumerate(names):
        x = LEFT + WIDE * i + WIDE / 2 + 4
        yield f'<text transform="translate({x} {TOP - 8}) rotate(-45)">{escape(name)}</text>'
    yield f'<text x="{LEFT - 10}" y="{TOP - 8}" text-anchor="end" fill="#555">group size</text>'


def _lines(
    names: Sequence[str], places: Sequence[Place], found: Mapping[tuple[str, Place], Row], metric: str
) -> Iterator[str]:
    for j, place in enumerate(places):
        y = TOP + HIGH * j
        if j == 0 or place[:2] != places[j - 1][:2]:
            yield f'<line x1="12" x2="{LEFT + WIDE * len(names)}" y1="{y}" y2="{y}" stroke="#555"/>'
            yield f'<text x="12" y="{y + 15}">{escape(_label(place))}</text>'
        yield f'<text x="{LEFT - 10}" y="{y + 15}" text-anchor="end" fill="#555">{place[2]}</text>'
        for i, name in enumerate(names):
            row = found.get((name, place))
            colour, ink = _colours(None if row is None else row[metric], metric)
            x = LEFT + WIDE * i
            yield f'<rect x="{x}" y="{y + 1}" width="{WIDE - 1}" height="{HIGH - 1}" fill="{colour}"/>'
            yield (
                f'<text x="{x + WIDE / 2}" y="{y + 15}" text-anchor="middle" fill="{ink}">{_number(row, metric)}</text>'
            )


def _colours(value: str | float | None, metric: str) -> tuple[str, str]:
    """A cell's colour, and that of its number."""
    if value is None:
        return "#e4e4e4", "#555"
    _, best, worst = METRICS[metric]
    share = min(max((float(value) - best) / (worst - best), 0.0), 1.0)
    low, high, at = (GOOD, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, BAD, 2 * share - 1)
    red, green, blue = (round(a + at * (b - a)) for a, b in zip(low, high, strict=True))
    return f"rgb({red},{green},{blue})", "white" if share > 0.7 else "black"


def _legend(y: int, metric: str) -> Iterator[str]:
    _, best, worst = METRICS[metric]
    steps = 40
    for i in range(steps):
        colour, _ = _colours(best + (i + 0.5) / steps * (worst - best), metric)
        yield f'<rect x="{12 + 5 * i}" y="{y}" width="5.5" height="12" fill="{colour}"/>'
    yield f'<text x="12" y="{y + 28}">{best:g}, best</text>'
    yield f'<text x="{12 + 5 * steps}" y="{y + 28}" text-anchor="end">{worst:g} or worse</text>'
    yield (
        f'<text x="{40 + 5 * steps}" y="{y + 10}" fill="#555">ĝ: an estimator’s gradient from one group;  '
        "∇J: the true gradient</text>"
    )
    yield (
        f'<text x="{40 + 5 * steps}" y="{y + 28}" fill="#555">“~”: from sampled groups, others exact;  '
        "“–”: does not exist</text>"
    )
