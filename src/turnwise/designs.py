"""`turnwise compare`: a comparison in one file, its runs, and what they say about each other seed by seed.

    [shared]                        training options of all arms, and of the comparison itself:
    name = "placebo"                name of the result
    seeds = 5                       seeds 0 .. 4
    jobs = 2                        runs at a time, each on one thread
    eval-size = 200                 questions of each final evaluation
    baseline = "as-paid"            the arm that the others are compared with
    thresholds = { exact_match = 0.5 }
    token-budget = 90000

    [as-paid]                       an arm's own training options
    estimator = "mt-grpo"

    [shuffled]
    estimator = "mt-grpo"
    placebo = "turns"

An arm may name another `baseline`. What is compared is shared: start, questions and their order, tools, protocol, and
how long a run is.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnwise.compare import (
    CURVES,
    NAME,
    SHARED,
    Key,
    check_arms,
    evaluation_tables,
    has_collapsed,
    make_folders,
    mean_and_range,
    own_options,
    provenance,
    result_head,
    run_all,
    run_configs,
    write_result,
)
from turnwise.config import TrainConfig, config_from_dict, config_to_dict, read_config_file
from turnwise.errors import ConfigError, InputError, TurnwiseError, unknown_name
from turnwise.paired import (
    FEWEST,
    Interval,
    Time,
    area,
    earlier,
    first_reaching,
    median_time,
    paired,
    proportion_interval,
    sign_test,
)
from turnwise.records import parsed

NUMBERS = {"seeds": 5, "jobs": 2, "eval_size": 200}
"""The whole numbers of a comparison, and what they are unless the file says otherwise."""
OWN = ("name", *NUMBERS, "baseline", "thresholds")
"""What [shared] holds beside training options."""
FIXED = (*SHARED, "steps", "token_budget")
"""The options that no arm can have to itself."""
MEASURED = ("exact_match", "tool_execution")
"""The curves whose areas are compared, beside those with a threshold."""
WINDOW = 3
"""Steps whose mean must be at a threshold."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """A comparison as its file says it."""

    name: str
    arms: Mapping[str, TrainConfig]
    baselines: Mapping[str, str]
    """What each arm is compared with; a baseline with itself."""
    seeds: int
    jobs: int
    eval_size: int
    thresholds: Mapping[str, float]
    """Metrics of training rollouts, and what counts as reached."""

    @property
    def first(self) -> TrainConfig:
        """The configuration of the first arm's baseline, under which the start is evaluated."""
        return self.arms[self.baselines[next(iter(self.arms))]]


def read_design(path: Path, **given: int | None) -> Design:
    """The comparison in a file; numbers that are `given` replace the file's. InputError for what cannot be compared."""
    tables = read_config_file(path)
    for name, options in tables.items():
        if not isinstance(options, dict) or not re.fullmatch(NAME, name):
            raise InputError(
                f"{path} must hold a table [shared] and one for each arm, named by letters, digits and -_.+; got "
                f"{name!r} = {options!r}; write [{name}] and its options below"
            )
    shared = _options(tables.pop("shared", {}), path, "shared", ("seed", "out", "threads"))
    if not tables:
        raise InputError(f"{path} must have arms to compare; it has none; write a table of options for each")
    own = {"name": path.stem, **{name: shared.pop(name) for name in OWN if name in shared}}
    own |= {name: value for name, value in given.items() if value is not None}
    if not isinstance(own["name"], str) or not re.fullmatch(NAME, own["name"]):
        raise ConfigError(f"name in {path} must be letters, digits and -_.+; got {own['name']!r}; give such a name")
    arms: dict[str, TrainConfig] = {}
    named: dict[str, str] = {}
    for name, table in tables.items():
        options = _options(table, path, name, FIXED)
        if "baseline" in options:
            named[name] = options.pop("baseline")
        arms[name] = config_from_dict({**shared, **options}, f"{path}, [{name}]")
    return Design(
        name=own["name"],
        arms=arms,
        baselines=_baselines(arms, named, own.get("baseline", next(iter(arms))), path),
        thresholds=_thresholds(own.get("thresholds", {}), path),
        **{name: _whole(name, own.get(name, default), path) for name, default in NUMBERS.items()},
    )


def _baselines(arms: Mapping[str, Any], named: Mapping[str, str], common: str, path: Path) -> dict[str, str]:
    """What each arm is compared with: what it names, itself where others are compared with it, or the common one."""
    for name in (common, *named.values()):
        if name not in arms:
            raise unknown_name(f"a baseline in {path}", str(name), arms)
    standards = {common, *named.values()}
    return {arm: named.get(arm, arm if arm in standards else common) for arm in arms}


def _options(table: Mapping[str, Any], path: Path, name: str, fixed: Sequence[str]) -> dict[str, Any]:
    """A table's options, spelt with `_`. ConfigError for one that it must not have."""
    found = {option.replace("-", "_"): value for option, value in table.items()}
    for option in fixed:
        if option in found:
            why = "the comparison decides it" if name == "shared" else "arms share it"
            raise ConfigError(f"{path}, [{name}] must not set {option.replace('_', '-')}: {why}; got {found[option]!r}")
    return found


def _whole(name: str, value: Any, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        option = name.replace("_", "-")
        raise ConfigError(f"{option} in {path} must be a whole number of 1 or more; got {value!r}; give one")
    return value


def _thresholds(table: Any, path: Path) -> dict[str, float]:
    if not isinstance(table, dict) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in table.values()
    ):
        raise ConfigError(f"thresholds in {path} must be a table of numbers by metric; got {table!r}; give one")
    for name in table:
        if name not in CURVES:
            raise unknown_name(f"a metric with a threshold in {path}", name, CURVES)
    return {name: float(value) for name, value in table.items()}


def compare(
    design: Design, *, runs: Path, results: Path, look: Callable[[Mapping[Key, TrainConfig]], None] | None = None
) -> Path:
    """Makes every run that is not finished yet, and writes `results/NAME.json` and `results/NAME.md`.

    Stopped and started again, it goes on where it was. `look` is shown the runs' configurations every second or so, to
    say how far they are; without it the runs print lines. Returns the result file.
    """
    check_arms(design.arms.values())
    make_folders(results, runs / design.name)
    jobs = run_configs(design.arms, design.seeds, runs / design.name)
    adopt(jobs, runs, design.eval_size)
    start, records = run_all(
        jobs,
        design.first,
        eval_size=design.eval_size,
        at_once=design.jobs,
        look=(lambda: look(jobs)) if look else None,
    )
    result = design_result(design, start, records)
    return write_result(results, result, design_markdown(result))


def adopt(jobs: Mapping[Key, TrainConfig], runs: Path, eval_size: int) -> None:
    """Links runs that other comparisons in `runs` finished under the same options: anew, they gave the same numbers."""
    from turnwise.rundir import read_config

    finished = {}
    for path in sorted(runs.glob("*/*/record.json")):
        with contextlib.suppress(TurnwiseError, OSError, ValueError, AttributeError):  # a damaged run is nobody's
            if parsed(path.read_text(encoding="utf-8")).get("eval_size") == eval_size:
                finished[_identity(read_config(path.parent))] = path.parent
    for job in jobs.values():
        found = finished.get(_identity(job))
        if job.out.is_symlink() and not job.out.exists():
            job.out.unlink()  # what it was linked to is gone
        if found is not None and not job.out.exists():
            job.out.symlink_to(os.path.relpath(found.resolve(), job.out.parent.resolve()))


def _identity(config: TrainConfig) -> str:
    """What two runs must share to be one: all options but where they are and on how many threads."""
    anywhere = dataclasses.replace(config, reward_weights=dict(config.weights), out=Path(), threads=1)
    return json.dumps(config_to_dict(anywhere), sort_keys=True, default=str)


def design_result(design: Design, start: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the result file holds; numbers only, none of the data's text."""
    head = result_head(design.name, design.jobs, design.first)
    until = design.first.token_budget
    return {
        **head,
        "arms": {name: own_options(arm, design.first) for name, arm in design.arms.items()},
        "start": start,
        "runs": list(records),
        "comparison": compared(records, design.baselines, design.thresholds, token_budget=until),
    }


# ------------------------------------------------------------------------------------- what the runs say


def compared(
    runs: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, str],
    thresholds: Mapping[str, float],
    *,
    token_budget: int | None = None,
) -> dict[str, Any]:
    """Each arm by itself and beside its baseline, in JSON's types.

    Areas are over sampled tokens up to the budget where there is one, else over steps.
    """
    by_arm = {arm: _in_order([run for run in runs if run["arm"] == arm]) for arm in baselines}
    curves = [name for name in dict.fromkeys([*MEASURED, *thresholds]) if all(name in run["curve"] for run in runs)]
    missing = sorted(set(thresholds) - set(curves))
    if missing:
        known = sorted(set.intersection(*(set(run["curve"]) for run in runs)))
        raise unknown_name("a metric with a threshold", missing[0], known)
    found: dict[str, Any] = {}
    for arm, baseline in baselines.items():
        own, other = by_arm[arm], by_arm[baseline]
        lost = sum(has_collapsed(run["curve"]) for run in own)
        found[arm] = {
            "baseline": baseline,
            "seeds": [run["seed"] for run in own],
            "collapsed": {"count": lost, "of": len(own), **_bounds(proportion_interval(lost, len(own)))},
            "cost": {name: [run["cost"][name] for run in own] for name in own[0]["cost"]},
            "area": {name: [_area(run, name, token_budget) for run in own] for name in curves},
            "reached": {
                name: _reached(own, None if arm == baseline else other, name, value)
                for name, value in thresholds.items()
            },
        }
        if arm != baseline:
            found[arm]["differences"] = _differences(own, other, curves, token_budget)
    return found


def _in_order(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(runs, key=lambda run: run["seed"])


def _bounds(interval: Interval) -> dict[str, float]:
    return {"low": round(interval.low, 4), "high": round(interval.high, 4)}


def _area(run: Mapping[str, Any], name: str, token_budget: int | None) -> float:
    values = run["curve"][name]
    if token_budget is None:
        return round(area(values, range(1, len(values) + 1), len(values)), 4)
    return round(area(values, run["curve"]["sampled_tokens"], token_budget), 4)


def _differences(
    own: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    curves: Sequence[str],
    token_budget: int | None,
) -> dict[str, Any]:
    """Paired differences of final evaluations and of areas, by what was measured."""
    measures: dict[str, Callable[[Mapping[str, Any]], float]] = {}
    for evaluation, metrics in own[0]["evaluations"].items():
        for name in metrics:
            if all(name in run["evaluations"][evaluation] for run in (*own, *other)):
                measures[f"{evaluation}/{name}"] = lambda run, e=evaluation, n=name: run["evaluations"][e][n]["mean"]
    for name in curves:
        measures[f"area/{name}"] = lambda run, n=name: _area(run, n, token_budget)
    return {
        name: dataclasses.asdict(paired([measure(run) for run in own], [measure(run) for run in other]))
        for name, measure in measures.items()
    }


def _reached(
    own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]] | None, name: str, threshold: float
) -> dict[str, Any]:
    """When each run reached a threshold, in steps and in sampled tokens, and how often before the baseline."""
    found: dict[str, Any] = {"threshold": threshold, "window": WINDOW}
    for unit in ("steps", "tokens"):
        times = [_time(run, name, threshold, unit) for run in own]
        found[unit] = {
            "by_seed": [dataclasses.asdict(time) for time in times],
            "median": dataclasses.asdict(median_time(times)),
        }
        if other is not None:
            order = [earlier(a, _time(run, name, threshold, unit)) for a, run in zip(times, other, strict=True)]
            wins, losses = order.count(1), order.count(-1)
            found[unit] |= {"earlier": wins, "later": losses, "p": sign_test(wins, losses)}
    return found


def _time(run: Mapping[str, Any], name: str, threshold: float, unit: str) -> Time:
    """When the mean of the last `WINDOW` steps first reached the threshold."""
    values, tokens = run["curve"][name], run["curve"]["sampled_tokens"]
    step = first_reaching(values, threshold, window=WINDOW)
    at = len(values) if step is None else step
    return Time(at=float(at) if unit == "steps" else tokens[at - 1], reached=step is not None)


# ------------------------------------------------------------------------------------------ in Markdown


SHOWN = ("held-out-greedy/exact_match", "held-out-sampled/exact_match", "seen-greedy/exact_match")
"""The differences of evaluations that the page shows; the JSON file has all."""


def design_markdown(result: Mapping[str, Any]) -> str:
    """The result as a page; the tables of evaluations are those of `turnwise reproduce`."""
    arms = result["comparison"]
    lines = [f"# {result['name']}", "", *_differences_table(arms), *_collapse_table(arms), *_threshold_tables(arms)]
    lines += [*_area_table(arms), *_cost_table(arms), *evaluation_tables(result), *_own_options_list(result)]
    lines.append(provenance(result))
    return "\n".join(lines) + "\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _differences_table(arms: Mapping[str, Any]) -> list[str]:
    rows = []
    for arm, found in arms.items():
        for measure, difference in found.get("differences", {}).items():
            if measure in SHOWN or measure.startswith("area/"):
                rows.append([arm, found["baseline"], _measure_title(measure), *_difference_cells(difference)])
    if not rows:
        return []
    seeds = max(len(found["seeds"]) for found in arms.values())
    rule = "Own value minus the baseline's under the same seed; percentile bootstrap over seeds; two-sided sign test."
    note = f" An interval takes {FEWEST} seeds; there are {seeds}." if seeds < FEWEST else ""
    return [
        "## differences, seed by seed",
        "",
        *_table(["arm", "baseline", "of", "mean [95 %]", "by seed", "better : worse", "p (least possible)"], rows),
        rule + note,
        "",
    ]


def _measure_title(measure: str) -> str:
    where, _, name = measure.partition("/")
    name = name.replace("_", " ")
    if where == "area":
        return f"{name} over training"
    population, _, mode = where.rpartition("-")
    return f"{name}, {population} questions, {mode}"


def _difference_cells(found: Mapping[str, Any]) -> list[str]:
    bounds = found["interval"]
    between = f" [{bounds['low']:+.3f}, {bounds['high']:+.3f}]" if bounds else ""
    return [
        f"{found['mean']:+.3f}{between}",
        " ".join(f"{d:+.3f}" for d in found["differences"]),
        f"{found['wins']} : {found['losses']}",
        f"{found['p']:.3f} ({found['least_p']:.3f})",
    ]


def _collapse_table(arms: Mapping[str, Any]) -> list[str]:
    rows = [
        [arm, f"{c['count']} of {c['of']}", f"[{c['low']:.2f}, {c['high']:.2f}]"]
        for arm, found in arms.items()
        for c in [found["collapsed"]]
    ]
    rule = (
        "Collapsed: exact match or tool use of the last fifth of the steps less than half of the best fifth's. 95 % "
        "interval of Clopper and Pearson for the probability."
    )
    return ["## collapses", "", *_table(["arm", "collapsed", "probability between"], rows), rule, ""]


def _threshold_tables(arms: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in next(iter(arms.values()))["reached"]:
        rows = []
        for arm, found in arms.items():
            reached = found["reached"][name]
            steps = [Time(**time) for time in reached["steps"]["by_seed"]]
            order = [
                f"{reached[unit]['earlier']} : {reached[unit]['later']}, p {reached[unit]['p']:.3f}"
                for unit in ("steps", "tokens")
                if "p" in reached[unit]
            ] or ["", ""]
            rows.append(
                [
                    arm,
                    f"{sum(time.reached for time in steps)} of {len(steps)}",
                    " ".join(time.text() for time in steps),
                    *(Time(**reached[unit]["median"]).text() for unit in ("steps", "tokens")),
                    *order,
                ]
            )
        threshold, window = (next(iter(arms.values()))["reached"][name][key] for key in ("threshold", "window"))
        titles = ["arm", "reached", "steps by seed", "median steps", "median tokens"]
        lines += [f"## until {name.replace('_', ' ')} of training rollouts is {threshold:g}", ""]
        lines += _table([*titles, "earlier : later, steps", "earlier : later, tokens"], rows)
        lines += [
            f"Mean of {window} steps. `>` is a run that ended before; it counts as later than any that came by then.",
            "",
        ]
    return lines


def _area_table(arms: Mapping[str, Any]) -> list[str]:
    names = list(next(iter(arms.values()))["area"])
    rows = [[arm, *(mean_and_range(found["area"][name]) for name in names)] for arm, found in arms.items()]
    titles = ["arm", *(name.replace("_", " ") for name in names)]
    return ["## over the whole of training", "", *_table(titles, rows), "Means of curves; lowest and highest seed.", ""]


_COST_TITLES = {
    "sampled_tokens": ("sampled tokens", 1.0, ",.0f"),
    "environment_calls": ("environment calls", 1.0, ",.0f"),
    "update_flops": ("update, 10¹² operations", 1e12, ".3g"),
    "rollout_s": ("rollouts, s", 1.0, ",.0f"),
    "update_s": ("updates, s", 1.0, ",.0f"),
}


def _cost_table(arms: Mapping[str, Any]) -> list[str]:
    rows = []
    for arm, found in arms.items():
        cells = []
        for name, (_, unit, form) in _COST_TITLES.items():
            values = [value / unit for value in found["cost"][name]]
            mean, low, high = (f"{x:{form}}" for x in (sum(values) / len(values), min(values), max(values)))
            cells.append(f"{mean} ({low}-{high})" if len(values) > 1 else mean)
        rows.append([arm, *cells])
    titles = ["arm", *(title for title, _, _ in _COST_TITLES.values())]
    return ["## what a run took", "", *_table(titles, rows), "Means; lowest and highest seed.", ""]


def _own_options_list(result: Mapping[str, Any]) -> list[str]:
    said = {arm: ", ".join(f"{name} {value}" for name, value in own.items()) for arm, own in result["arms"].items()}
    return [*(f"* {arm}: {options}" for arm, options in said.items()), ""]


# ------------------------------------------------------------------------------------------ while they go


STATES = ("training", "evaluating", "waiting", "finished")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    arm: str
    seed: int
    state: str
    """One of `STATES`."""
    step: int = 0
    share: float = 0.0
    """Of its steps or its token budget, whichever is further."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of its last training step."""
    wall_s: float = 0.0


TAIL = 1 << 16
"""The end of a file of metrics that is read for its last line."""


def progress(jobs: Mapping[Key, TrainConfig]) -> list[Progress]:
    """How far each run is, read from its folder; arm by arm."""
    arms = list(dict.fromkeys(arm for arm, _ in jobs))
    return [_progress(*key, jobs[key]) for key in sorted(jobs, key=lambda key: (arms.index(key[0]), key[1]))]


def _progress(arm: str, seed: int, config: TrainConfig) -> Progress:
    last = _last_step(config.out / "metrics.jsonl")
    if last is None:
        begun = (config.out / "config.json").is_file()
        return Progress(arm=arm, seed=seed, state="training" if begun else "waiting")
    share = last["step"] / config.steps
    if config.token_budget:
        share = max(share, last["metrics"]["sampled_tokens"] / config.token_budget)
    finished = (config.out / "record.json").is_file()
    return Progress(
        arm=arm,
        seed=seed,
        state="finished" if finished else "evaluating" if share >= 1 else "training",
        step=last["step"],
        share=min(1.0, share),
        metrics=last["metrics"],
        wall_s=last["wall_s"],
    )


def _last_step(file: Path) -> dict[str, Any] | None:
    """The newest whole line of a training step at the end of a file that is being written."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - TAIL))
            lines = opened.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = parsed(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("split") == "train":
            return record
    return None
