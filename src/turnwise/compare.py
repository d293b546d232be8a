"""Methods side by side: the same weights, the same questions in the same order, the same budget, several seeds."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from turnwise.config import ATLAS_HOPS, TrainConfig, config_from_dict, config_to_dict, read_config_file
from turnwise.errors import ConfigError, InputError
from turnwise.records import parsed

METHODS = ("grpo-or", "grpo-mr", "mt-grpo")
NAME = r"[\w+-][\w.+-]*"
SHARED = ("out", "seed", "threads", "policy", "tasks", "validation_tasks", "corpus", "tools", "protocol")
"""The options that one method of a comparison cannot have to itself."""
LAST_STEP_S = 60.0
"""Seconds that a worker may take over its last step once its parent is gone."""
LOOK_S = 1.0
"""Seconds between two looks at the runs."""
_is_stopping = threading.Event()
"""Set in a worker that has been told to stop, or whose parent is gone: it begins nothing more."""
EVALUATED_ROWS = 96
"""Most rollouts alive in a final evaluation: several processes share the memory."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Which runs to make and where their numbers go."""

    name: str = "atlas"
    """Name of the result file."""
    results: Path = Path("results")
    """Folder of result files."""
    runs: Path = Path("runs/reproduce")
    """Folder of the run directories; runs that are there are continued, finished ones are kept."""
    estimators: tuple[str, ...] = METHODS
    """Methods to compare, each with its defaults."""
    arms: Path | None = None
    """A TOML file of methods to compare instead: a table of training options for each, named as the result calls it."""
    seeds: int = 5
    """Seeds 0 .. seeds-1, each used by every method."""
    jobs: int = 2
    """Runs at a time, each with one thread."""
    eval_size: int = 400
    """Questions of each final evaluation."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """What all runs share; estimator, seed and out are filled in."""

    def __post_init__(self) -> None:
        for name in () if self.arms else self.estimators:
            dataclasses.replace(self.train, estimator=name)  # raises where it cannot be trained
        if not re.fullmatch(NAME, self.name):
            raise ConfigError(f"name must be letters, digits and -_.+, as a file is called so; got {self.name!r}")
        for name in ("seeds", "jobs", "eval_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1; got {getattr(self, name)}; give such a value")


def reproduce(config: ReproduceConfig) -> Path:
    """Makes every run that is not finished yet, and writes `results/NAME.json` and `results/NAME.md`.

    Stopped and started again, it goes on where it was. Returns the result file.
    """
    arms = read_arms(config)
    check_arms(arms.values())
    make_folders(config.results, config.runs / config.name)
    jobs = run_configs(arms, config.seeds, config.runs / config.name)
    start, records = run_all(jobs, config.train, eval_size=config.eval_size, at_once=config.jobs)
    return write_results(config, start, records)


Key = tuple[str, int]
"""A run's arm and seed."""


def check_arms(arms: Iterable[TrainConfig]) -> None:
    """Bad input of any arm raises here, before any process starts."""
    from turnwise.policy import load_policy
    from turnwise.setting import make_setting

    starts = {}
    for arm in arms:
        if arm.environment:
            raise ConfigError(
                "environment must be left out of a comparison, whose tables are of searches and answers; got "
                f"{arm.environment}; train each method with turnwise train"
            )
        make_setting(arm)
        starts[arm.start] = None
    for start in starts:
        load_policy(start)


def make_folders(*folders: Path) -> None:
    """Makes folders that are not there. Raises RunError where that cannot be."""
    from turnwise.rundir import writing

    for folder in folders:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)


def run_configs(arms: Mapping[str, TrainConfig], seeds: int, folder: Path) -> dict[Key, TrainConfig]:
    """The configuration of every run, in the order in which they are made: seed by seed, so that pairs end together."""
    return {
        (name, seed): dataclasses.replace(_on_one_thread(arm), seed=seed, out=folder / f"{name}-{seed}")
        for seed in range(seeds)
        for name, arm in arms.items()
    }


def _on_one_thread(config: TrainConfig) -> TrainConfig:
    """As everything in a comparison is computed. No cores share micro-batches, so their size is the fixed one unless
    another is given, and with it the numbers are those of `results/` to the last bit."""
    return dataclasses.replace(config, threads=1, micro_batch_tokens=config.micro_batch_budget)


def run_all(
    jobs: Mapping[Key, TrainConfig],
    shared: TrainConfig,
    *,
    eval_size: int,
    at_once: int,
    look: Callable[[], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The start's record and that of each run, arm by arm; finished runs are kept, others begun or continued.

    Each run is in a process of its own with one thread, `at_once` of them at a time. With `look`, which is called every
    second or so, the runs print nothing themselves. The first that fails ends all.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    records: dict[Key, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=_one_thread) as pool:
        try:
            started = pool.submit(_start_record, shared, eval_size)
            running = {pool.submit(run_one, job, eval_size, key[0], not look): key for key, job in jobs.items()}
            left = {started, *running}
            while left:
                ended, left = wait(left, timeout=LOOK_S if look else None, return_when=FIRST_COMPLETED)
                for done in ended:
                    found = done.result()
                    if done in running:
                        records[running[done]] = found
                if look:
                    look()
            start = started.result()
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()  # a run stops after its step, with a checkpoint
            pool.shutdown(cancel_futures=True)
            raise
    for job in jobs.values():
        _write_evaluations(job.out, start["evaluations"], suffix="-start")
    arms = dict.fromkeys(arm for arm, _ in jobs)
    return start, [{**records[arm, seed], "arm": arm} for arm in arms for own, seed in jobs if own == arm]


def read_arms(config: ReproduceConfig) -> dict[str, TrainConfig]:
    """What is compared, by name: the shared options with each arm's own."""
    if config.arms is None:
        return {name: dataclasses.replace(config.train, estimator=name) for name in config.estimators}
    found = read_config_file(config.arms)
    if not found:
        raise InputError(f"{config.arms} must name methods to compare; it is empty; write a table for each")
    shared = config_to_dict(config.train)
    arms: dict[str, TrainConfig] = {}
    if "shared" in found:
        raise InputError(
            f"{config.arms} must be a file of arms alone; it has a table [shared], as those of turnwise compare have; "
            f"make it so: turnwise compare {config.arms}"
        )
    for name, options in found.items():
        if not isinstance(options, dict) or not re.fullmatch(NAME, name):
            raise InputError(
                f"{config.arms} must hold a table of training options for each method, named by letters, digits and "
                f'-_.+; got {name!r} = {options!r}; write [mt-grpo] and below it estimator = "mt-grpo"'
            )
        own = {option.replace("-", "_"): value for option, value in options.items()}
        fixed = [option for option in own if option in SHARED]
        if fixed:
            raise ConfigError(
                f"{config.arms}, [{name}] must not set {fixed[0]}: what is compared shares it; give --train."
                f"{fixed[0].replace('_', '-')}"
            )
        arms[name] = config_from_dict({**shared, **own}, f"{config.arms}, [{name}]")
    return arms


def _one_thread() -> None:
    """Sets a worker process up."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_stop_with_parent, daemon=True).start()


def _stop(_number: int, _frame: FrameType | None) -> None:
    """Ends what a worker does beside training, which ends itself after a step; what it holds already it drops."""
    _is_stopping.set()
    raise KeyboardInterrupt


def _stop_with_parent() -> None:
    """Ends a worker whose parent is gone, after the step under way."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    _is_stopping.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_STEP_S)
    os._exit(1)


def run_one(config: TrainConfig, eval_size: int, arm: str = "", says: bool = True) -> dict[str, Any]:
    """Trains one run unless it is finished, evaluates its last policy, and returns its record."""
    from turnwise.rundir import latest_checkpoint, write_atomically
    from turnwise.training import train

    if _is_stopping.is_set():
        raise KeyboardInterrupt  # nobody waits for the runs that are still queued
    finished = config.out / "record.json"
    resume = (config.out / "config.json").is_file()
    if resume:
        _check_same(config)
    if finished.is_file():
        record = parsed(finished.read_text(encoding="utf-8"))
        if record.get("eval_size", eval_size) != eval_size:
            raise ConfigError(
                f"eval-size must be that of the finished run in {config.out}, {record['eval_size']}; got {eval_size}; "
                "choose another --runs"
            )
        return record
    if not train(config, resume=resume, display=_Lines(config, arm) if says else None).finished:
        _is_stopping.set()
        raise KeyboardInterrupt  # stopped by a signal: no record of half a run
    folder, state = latest_checkpoint(config.out)
    record = {
        "arm": arm or config.estimator,
        "estimator": config.estimator,
        "seed": config.seed,
        "steps": state["step"],
        "train_s": round(state["wall_s"], 1),
        "eval_size": eval_size,
        "evaluations": evaluations(str(folder), config, eval_size),
        "curve": _curve(config.out),
        "cost": _cost(config.out),
    }
    _write_evaluations(config.out, record["evaluations"])
    write_atomically(finished, json.dumps(record, indent=1) + "\n")
    return record


def _check_same(config: TrainConfig) -> None:
    """Raises ConfigError where the run that is there has other options than are asked for now."""
    from turnwise.rundir import read_config

    saved = read_config(config.out)
    asked = dataclasses.replace(config, reward_weights=dict(config.weights), out=saved.out, threads=saved.threads)
    for name, value in config_to_dict(asked).items():
        there = config_to_dict(saved)[name]
        if value != there:
            raise ConfigError(
                f"{name.replace('_', '-')} must be that of the run in {config.out}, {there!r}; got {value!r}; choose "
                "another --runs, or remove that folder"
            )


def _start_record(config: TrainConfig, eval_size: int) -> dict[str, Any]:
    """The evaluations of the policy that every run starts from, and the raw question's rate as a query."""
    shared = _on_one_thread(config)
    return {
        "evaluations": evaluations(config.start, shared, eval_size),
        "raw_question_answer_in_results": raw_question_rates(shared, eval_size),
    }


def evaluation_tasks(config: TrainConfig, size: int) -> dict[str, Sequence[Any]]:
    """The populations that a comparison reports: questions like the training ones, and held-out ones."""
    from turnwise.evaluation import spread
    from turnwise.setting import make_setting, named_tasks

    setting = make_setting(config)
    held_out = named_tasks(config.tasks, "test") if config.tasks in ATLAS_HOPS else setting.validation
    return {"seen": spread(setting.train, size), "held-out": spread(held_out, size)}


def evaluations(policy: str, config: TrainConfig, size: int) -> dict[str, Any]:
    """Metrics of greedy and of sampled evaluations of both populations."""
    from turnwise.evaluation import evaluation_to_dict, make_engines, place, play, rollout_limits, summarised
    from turnwise.policy import load_policy
    from turnwise.setting import make_setting

    setting = make_setting(config)
    loaded = place(load_policy(policy), config)
    limits = rollout_limits(config, loaded)
    engines = make_engines(loaded, config, max_rows=EVALUATED_ROWS)
    found: dict[str, Any] = {}
    for population, tasks in evaluation_tasks(config, size).items():
        for mode in ("greedy", "sampled"):
            pairs = play(tasks, setting, engines, loaded.chat, limits=limits, mode=mode)
            evaluation = summarised(population, mode, pairs, config.tag_protocol)
            found[f"{population}-{mode}"] = evaluation_to_dict(evaluation)["metrics"]
    return found


def _write_evaluations(out: Path, found: Mapping[str, Any], *, suffix: str = "") -> None:
    """Puts evaluations where the report of a run looks for them."""
    from turnwise.rundir import write_atomically

    for key, metrics in found.items():
        population, _, mode = key.rpartition("-")
        name = f"{population}{suffix}"
        data = {"name": name, "mode": mode, "metrics": metrics}
        write_atomically(out / f"eval-{name}-{mode}.json", json.dumps(data, indent=1) + "\n")


def raw_question_rates(config: TrainConfig, size: int) -> dict[str, float]:
    """How often an accepted answer stands in the search result when the question itself is the query."""
    import asyncio

    from turnwise.metrics import answer_presence
    from turnwise.setting import make_tools
    from turnwise.tools import call_tool
    from turnwise.types import ToolCall

    populations = evaluation_tasks(config, size)
    tools = make_tools(config, [task for tasks in populations.values() for task in tasks])
    if config.tools:
        return {}

    async def found(task: Any) -> float:
        result = await call_tool(tools, ToolCall(name="search", arguments={"query": task.question}))
        return answer_presence(result.text, list(task.answers))

    return {name: sum(asyncio.run(found(task)) for task in tasks) / len(tasks) for name, tasks in populations.items()}


class _Lines:
    """Progress of one of several runs: a line every ten steps."""

    def __init__(self, config: TrainConfig, arm: str = "") -> None:
        self.config = config
        self.name = f"{arm or config.estimator:8} seed {config.seed}"

    def say(self, text: str) -> None:
        print(f"{self.name}  {text}", flush=True)

    def show(self, record: Mapping[str, Any]) -> None:
        step, metrics = record["step"], record["metrics"]
        for warning in record.get("warnings", ()):
            print(f"{self.name}  warning at step {step}: {warning}", flush=True)
        if record["split"] == "train" and step % 10 != 1 and step != self.config.steps:
            return
        print(
            f"{self.name}  {record['split']:10} step {step:3}/{self.config.steps}"
            f"  tool {metrics.get('tool_execution', 0):4.0%}  answer found {metrics.get('answer_in_results', 0):4.0%}"
            f"  exact match {metrics.get('exact_match', 0):4.0%}  {record['wall_s']:5.0f} s",
            flush=True,
        )


CURVES = (
    "tool_execution",
    "answer_in_results",
    "exact_match",
    "return",
    "entropy",
    "dead_groups",
    "searches",
    "useful_searches",
    "redundant_searches",
    "well_called",
    "gold_found",
    "explained_variance",
    "sampled_tokens",
)
"""The metrics of training rollouts that a result keeps of every step, where the run has them."""


def _steps(run: Path) -> list[dict[str, Any]]:
    """The metrics of every training step."""
    from turnwise.rundir import read_lines

    return [line["metrics"] for line in read_lines(run / "metrics.jsonl") if line["split"] == "train"]


COSTS = ("environment_calls", "update_flops", "rollout_s", "update_s")
"""What a step costs beside its sampled tokens, which are counted up to it."""


def _cost(run: Path) -> dict[str, float]:
    """What a run took: sampled tokens, calls, operations of updates, seconds of the halves of its steps."""
    steps = _steps(run)
    summed = {name: round(sum(step.get(name, 0.0) for step in steps), 3) for name in COSTS}
    return {"sampled_tokens": steps[-1].get("sampled_tokens", 0.0), **summed}


def _curve(run: Path) -> dict[str, list[float | None]]:
    """The kept metrics by step; None where a step had none (no live rollout)."""
    steps = _steps(run)
    curve = {name: [round(step[name], 4) if step.get(name) is not None else None for step in steps] for name in CURVES}
    return {name: values for name, values in curve.items() if any(value is not None for value in values)}


# --- the result files -------------------------------------------------------------------------------


def write_results(config: ReproduceConfig, start: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the numbers as JSON and the table as Markdown; numbers only, none of the data's text."""
    result = {
        **result_head(config.name, config.jobs, config.train),
        "arms": {name: own_options(arm, config.train) for name, arm in read_arms(config).items()},
        "start": start,
        "runs": list(records),
    }
    return write_result(config.results, result, markdown(result))


def result_head(name: str, jobs: int, config: TrainConfig) -> dict[str, Any]:
    """What a result says of where it comes from; of files their names alone."""
    import torch

    import turnwise

    shared = config_to_dict(_on_one_thread(config))
    for option in ("out", "estimator", "seed", "threads"):
        del shared[option]
    for option in ("tasks", "corpus", "validation_tasks", "policy"):
        if shared[option]:
            shared[option] = Path(shared[option]).name
    return {
        "name": name,
        "turnwise": turnwise.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jobs} runs at a time, one thread each",
        "date": time.strftime("%Y-%m-%d"),
        "config": shared,
    }


def write_result(folder: Path, result: Mapping[str, Any], text: str) -> Path:
    """Writes a result as JSON and as Markdown, and returns the JSON file."""
    from turnwise.rundir import write_atomically

    make_folders(folder)
    path = folder / f"{result['name']}.json"
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), text)
    return path


def own_options(arm: TrainConfig, shared: TrainConfig) -> dict[str, Any]:
    """The options in which an arm differs from what all runs share."""
    common = config_to_dict(shared)
    return {name: value for name, value in config_to_dict(arm).items() if value != common[name] or name == "estimator"}


_COLUMNS: Mapping[str, Sequence[tuple[str, str]]] = {
    "tools": (
        ("tool execution", "tool_execution"),
        ("answer in results", "answer_in_results"),
        ("XML format", "xml_format"),
        ("exact match", "exact_match"),
        ("F1", "f1"),
    ),
    "search": (
        ("searched", "tool_execution"),
        ("searches called well", "well_called"),
        ("searches", "searches"),
        ("gold articles found", "gold_found"),
        ("final format", "final_format"),
        ("exact match", "exact_match"),
        ("F1", "f1"),
    ),
}
"""What the tables show under each protocol, by title and metric."""


def _columns(protocol: str) -> Sequence[tuple[str, str]]:
    """The columns of a protocol's tables; models' own formats have those of the search protocol."""
    return _COLUMNS.get(protocol, _COLUMNS["search"])


_PROGRESS = (
    ("searches", "searches"),
    ("useful", "useful_searches"),
    ("redundant", "redundant_searches"),
    ("exact match", "exact_match"),
)
EARLY_STEPS = (2, 4, 6, 8, 10, 15, 20, 30, 60, 100, 200)
"""Where the columns of the table over steps end."""
PARTS = 5
COLLAPSED = 0.5
"""A run has collapsed where its last fifth has less than this share of what its best fifth had."""


def markdown(result: Mapping[str, Any]) -> str:
    """The result as Markdown tables: mean over seeds, and the range from the lowest to the highest seed."""
    runs, columns = result["runs"], _columns(result["config"].get("protocol", "tools"))
    methods = list(dict.fromkeys(r["arm"] for r in runs))
    lines = [f"# {result['name']}", "", *evaluation_tables(result)]
    shown = _progress if columns is _COLUMNS["search"] else _early_steps
    lines += shown(methods, runs)
    lines += _collapses(runs)
    if result["config"].get("token_budget"):
        lines += _budgets(methods, result)
    lines.append(provenance(result))
    return "\n".join(lines) + "\n"


def evaluation_tables(result: Mapping[str, Any]) -> list[str]:
    """A table for each evaluation: mean over seeds, and the range from the lowest to the highest seed."""
    runs, columns = result["runs"], _columns(result["config"].get("protocol", "tools"))
    methods = list(dict.fromkeys(r["arm"] for r in runs))
    lines: list[str] = []
    for name in result["start"]["evaluations"]:
        population, _, mode = name.rpartition("-")
        lines += [f"## {population} questions, {mode}", ""]
        lines += ["| method | seeds | " + " | ".join(title for title, _ in columns) + " |"]
        lines += ["|---|---|" + "---|" * len(columns)]
        start = result["start"]["evaluations"][name]
        lines.append(f"| start | | {' | '.join(_cell([start], key) for _, key in columns)} |")
        for method in methods:
            chosen = [r["evaluations"][name] for r in runs if r["arm"] == method]
            cells = [_cell(chosen, key) for _, key in columns]
            lines.append(f"| {method.upper()} | {len(chosen)} | {' | '.join(cells)} |")
        raw = result["start"]["raw_question_answer_in_results"].get(population)
        if raw is not None:
            lines += ["", f"The question itself as query: answer in results {raw:.3f}."]
        lines.append("")
    return lines


def provenance(result: Mapping[str, Any]) -> str:
    """A line that says how long the runs were, and on what they ran."""
    budget = result["config"].get("token_budget")
    length = f"{budget:,} sampled tokens" if budget else f"{result['config']['steps']} steps"
    return (
        f"{length}, {result['config']['tasks_per_step']} questions x "
        f"{result['config']['group_size']} rollouts a step; {result['machine']}; turnwise {result['turnwise']}, torch "
        f"{result['torch']}, {result['date']}."
    )


def _cell(evaluations: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean and range of a metric over evaluations that have it; a dash where none has."""
    found = [evaluation[key]["mean"] for evaluation in evaluations if key in evaluation]
    return mean_and_range(found) if found else "-"


def _early_steps(methods: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of what training rollouts did over the steps, the early ones closely, where runs have equally many."""
    steps = {len(r.get("curve", {}).get("tool_execution", ())) for r in runs}
    if len(steps) != 1 or 0 in steps:
        return []
    ends = [*(edge for edge in EARLY_STEPS if edge < max(steps)), max(steps)]
    starts = [1, *(end + 1 for end in ends[:-1])]
    titles = [f"{first}-{end}" if first < end else str(end) for first, end in zip(starts, ends, strict=True)]
    lines = [
        "## training rollouts, by steps",
        "",
        "| steps | " + " | ".join(titles) + " |",
        "|---|" + "---|" * len(ends),
    ]
    for title, key in (("tool execution", "tool_execution"), ("exact match", "exact_match")):
        for method in methods:
            curves = [r["curve"][key] for r in runs if r["arm"] == method]
            parts = [[c for curve in curves for c in curve[a - 1 : b]] for a, b in zip(starts, ends, strict=True)]
            means = [sum(known) / len(known) for part in parts if (known := [v for v in part if v is not None])]
            lines.append(f"| {title}, {method.upper()} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return [*lines, ""]


def _progress(methods: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of what training rollouts did in the first, the middle and the last fifth of the steps."""
    if not all(key in r.get("curve", {}) for r in runs for _, key in _PROGRESS):
        return []
    titles = [f"{title}, {when}" for title, _ in _PROGRESS for when in ("first", "middle", "last")]
    lines = ["## training rollouts, by fifths of the run", "", "| method | " + " | ".join(titles) + " |"]
    lines.append("|---|" + "---|" * len(titles))
    for method in methods:
        curves = [r["curve"] for r in runs if r["arm"] == method]
        stages = [[_stages(curve[key]) for curve in curves] for _, key in _PROGRESS]
        cells = [f"{sum(values) / len(values):.2f}" for each in stages for values in zip(*each, strict=True)]
        lines.append(f"| {method.upper()} | {' | '.join(cells)} |")
    return [*lines, ""]


def _parts(values: Sequence[float | None]) -> list[float]:
    """The means of a curve's five equal parts; of fewer where it is shorter."""
    known = [value for value in values if value is not None]
    ends = sorted({len(known) * i // PARTS for i in range(PARTS + 1)})
    return [sum(known[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]


def _stages(values: Sequence[float | None]) -> tuple[float, float, float]:
    """The first, the middle and the last part."""
    parts = _parts(values)
    return parts[0], parts[(len(parts) - 1) // 2], parts[-1]


def has_collapsed(curve: Mapping[str, Sequence[float | None]]) -> bool:
    """Whether a run lost, by the last fifth of its steps, half or more of what its best fifth had, in exact match or in
    rollouts that executed the tool."""
    parts = [_parts(curve[name]) for name in ("exact_match", "tool_execution") if name in curve]
    return any(part[-1] < COLLAPSED * max(part) for part in parts if part)


def _collapses(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line that names the runs that collapsed, if there are any."""
    lost = [f"{r['arm'].upper()} seed {r['seed']}" for r in runs if "curve" in r and has_collapsed(r["curve"])]
    if not lost:
        return []
    rule = "exact match or tool use of the last fifth of the steps less than half of the best fifth's"
    return [f"Collapsed ({rule}): {', '.join(lost)}.", ""]


def _budgets(methods: Sequence[str], result: Mapping[str, Any]) -> list[str]:
    """A line for each method that says how far its runs went, and which options were its own."""
    lines = []
    for method in methods:
        curves = [r["curve"] for r in result["runs"] if r["arm"] == method and "sampled_tokens" in r.get("curve", {})]
        if not curves:
            return []
        tokens = sum(curve["sampled_tokens"][-1] for curve in curves) / len(curves)
        steps = sum(len(curve["sampled_tokens"]) for curve in curves) / len(curves)
        explained = [_parts(curve["explained_variance"])[-1] for curve in curves if "explained_variance" in curve]
        critic = f"; explained variance at the end {sum(explained) / len(explained):.2f}" if explained else ""
        own = {name: value for name, value in result.get("arms", {}).get(method, {}).items() if name != "estimator"}
        said = "; " + ", ".join(f"{name} {value}" for name, value in own.items()) if own else ""
        lines.append(f"* {method.upper()}: {steps:.0f} steps, {tokens:,.0f} sampled tokens{critic}{said}")
    return ["Means over seeds; a run ends with the step that reaches its budget.", "", *lines, ""]


def mean_and_range(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else f"{mean:.3f}"
