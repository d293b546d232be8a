"""How right credit is under a real policy: rank correlation and sign agreement with each turn's true advantage.

The truth is drawn (see `truth`), so it has noise of its own, which bounds what the best credit could reach:

    reliability = 1 - mean s² / Var Â,    ceiling = √reliability

with Â the drawn advantage of each turn and s its standard error. Intervals are over groups, resampled whole.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turnwise import atlas
from turnwise.config import ATLAS_HOPS, without_judge
from turnwise.cores import in_parallel
from turnwise.credit import ESTIMATORS, TOKEN_ESTIMATORS
from turnwise.engine import Engine
from turnwise.errors import ConfigError, InputError, RunError, unknown_name
from turnwise.evaluation import (
    Checkpoint,
    check_prompts,
    is_run,
    make_engines,
    rollout_limits,
    run_policy,
    to_play,
)
from turnwise.lab import rank_correlation, sign_agreement
from turnwise.policy import Policy
from turnwise.records import parsed, read_lines, record_of_line
from turnwise.rollout import Limits, awaited, run_groups
from turnwise.rundir import append_lines, write_atomically, writing
from turnwise.setting import Setting, make_setting
from turnwise.traces import Trace, has_failed, lacking, trace_of, traces_credit, traces_table
from turnwise.truth import group_returns
from turnwise.types import Task, rollout_from_json

METHODS = ("grpo-or", "grpo-mr", "mt-grpo", "turn-rloo")
"""What is audited unless told otherwise, beside the run's own method."""
RECORDED = "recorded"
"""The name of the credit that saved rollouts were trained with."""
RESAMPLES = 1000
CLEAR = 2.0
"""A drawn advantage has a sign where it is so many standard errors from 0."""
EXACT = 1e-9
"""A drawn advantage nearer to 0 is none."""

Record = dict[str, Any]
Numbers = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number with its 95 % bootstrap interval over groups."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How an estimator's credit agrees with the truth; None where it cannot be said, as of credit that is all alike."""

    rank_correlation: Measure | None
    """Spearman's, over all turns."""
    sign_agreement: Measure | None
    """The share of turns with a clear truth whose credit has its sign; credit of 0 has none."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Credit beside the truth."""

    estimators: Mapping[str, Agreement]
    ceiling: Measure | None
    """What rank correlation a perfect estimator would have about, as the truth is drawn; None for a truth that is the
    same everywhere."""
    standard_error: float
    """Of the truth of one turn: the root of its mean square."""
    groups: int
    rollouts: int
    turns: int
    """With a truth; those without are left out."""
    clear_turns: int
    continuations: int
    """Rollouts played on."""
    tokens: int
    """Sampled in them."""
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What there is to say beside the estimators."""
        of = "the same everywhere" if self.ceiling is None else f"at most about {self.ceiling.value:.2f} can be reached"
        return [
            f"{self.turns} turns of {self.rollouts} rollouts in {self.groups} groups; {self.clear_turns} turns have a "
            f"truth that is more than {CLEAR:g} standard errors from 0",
            f"the truth: {self.continuations:,} rollouts played on, {self.tokens:,} tokens sampled; its standard error "
            f"{self.standard_error:.3f}; {of}",
            *self.notes,
        ]


# --- the comparison -------------------------------------------------------------------------------


def drawn_advantages(turns: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Numbers, Numbers]:
    """Each turn's advantage and its standard error, of the returns `before` and `after` it; NaN with fewer than two.

    Â = mean after − mean before,    s² = Var after / n + Var before / n
    """
    sides = {side: [np.array(turn[side], dtype=float) for turn in turns] for side in ("before", "after")}
    mean = {side: np.array([x.mean() if len(x) > 1 else np.nan for x in found]) for side, found in sides.items()}
    variance = sum(np.array([_variance_of_mean(x) for x in found]) for found in sides.values())
    return mean["after"] - mean["before"], np.sqrt(variance)


def _variance_of_mean(values: Numbers) -> float:
    """Exactly 0 where all values are equal; NaN with fewer than two."""
    if len(values) < 2:
        return np.nan
    return float(values.var(ddof=1) / len(values)) if np.ptp(values) else 0.0


def agreement(
    credit: Mapping[str, Numbers], truth: Numbers, error: Numbers, groups: Sequence[int], *, seed: int = 0
) -> tuple[dict[str, Agreement], Measure | None]:
    """Each estimator's agreement with the truth of the same turns, and the ceiling, with intervals over groups."""
    _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES)
    weights = [np.ones(len(truth)), *draws[:, place].astype(float)]
    clear = np.where(np.abs(truth) > np.maximum(CLEAR * error, EXACT), truth, 0.0)
    found = {
        name: Agreement(
            rank_correlation=_measure(rank_correlation, values, truth, weights),
            sign_agreement=_measure(sign_agreement, values, clear, weights),
        )
        for name, values in credit.items()
    }
    return found, _measure(lambda errors, truths, w: _ceiling(truths, errors, w), error, truth, weights)


def _measure(
    statistic: Callable[[Numbers, Numbers, Numbers], float | None],
    values: Numbers,
    truth: Numbers,
    weights: Sequence[Numbers],
) -> Measure | None:
    """A statistic under weights of 1, and its interval under those of resamples in which it can be said."""
    value, *others = (_said(statistic, values, truth, w) for w in weights)
    said = [other for other in others if other is not None]
    if value is None or not said:
        return None
    low, high = np.percentile(said, [2.5, 97.5])
    return Measure(value=value, low=float(low), high=float(high))


def _said(
    statistic: Callable[[Numbers, Numbers, Numbers], float | None], values: Numbers, truth: Numbers, weights: Numbers
) -> float | None:
    there = weights > 0
    return statistic(values[there], truth[there], weights[there])


def _ceiling(truth: Numbers, error: Numbers, weights: Numbers) -> float | None:
    """√(1 − mean s² / Var Â), 0 where the noise is larger than all there is; None for a truth without differences."""
    spread = np.average((truth - np.average(truth, weights=weights)) ** 2, weights=weights)
    if spread <= EXACT**2:
        return None
    return float(np.sqrt(max(0.0, 1 - np.average(error**2, weights=weights) / spread)))


# --- the audit of a run ---------------------------------------------------------------------------


def audit(
    run: str | Path = "embedded",
    tasks: str | Path | Sequence[Task] | None = None,
    *,
    methods: Sequence[str] = (),
    groups: int = 16,
    group_size: int = 8,
    continuations: int = 16,
    rollouts: str | Path | None = None,
    checkpoint: Checkpoint = "best",
    split: atlas.Split | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    name: str = "audit",
    say: Callable[[str], None] = lambda text: None,
) -> Audit:
    """How estimators' credit agrees with true advantages under a run's policy.

    Draws `groups` groups of `group_size` rollouts of questions (by default training ones), or takes the last `groups`
    of a file of saved ones, `rollouts`; and from both ends of every turn `continuations` more. `methods` are names of
    estimators, or "recorded" for the credit that saved rollouts have; by default the run's own and the best known.
    Everything drawn goes to NAME.jsonl in `out` (by default the run directory), group by group: what is there already
    is not drawn again, other methods cost nothing more. The numbers go to NAME.json. Raises RunError where NAME.jsonl
    is of another audit.
    """
    for method in methods:
        if method not in (*ESTIMATORS, *TOKEN_ESTIMATORS, RECORDED):
            raise unknown_name("methods", method, (*ESTIMATORS, *TOKEN_ESTIMATORS, RECORDED))
    for option, number, least in (
        ("groups", groups, 1),
        ("group-size", group_size, 1),
        ("continuations", continuations, 2),
    ):
        if number < least:
            raise ConfigError(f"{option} must be >= {least}; got {number}; give a larger number")
    if rollouts is not None and (tasks is not None or split is not None):
        raise ConfigError("tasks and split must be left out with rollouts, which are of tasks already; leave them out")
    folder = Path(out) if out else Path(run) if is_run(Path(run)) else None
    if rollouts is None:
        named = tasks is None or str(tasks) in ATLAS_HOPS
        policy, setting = to_play(
            run, tasks, split=split or ("train" if named else None), limit=groups, checkpoint=checkpoint
        )
        saved = None
    else:
        policy, config = run_policy(run, checkpoint)
        setting = make_setting(without_judge(config))
        saved = _saved_groups(Path(rollouts), setting, groups)
    drawing = _Drawing(
        policy=policy,
        setting=setting,
        limits=rollout_limits(setting.config, policy),
        group_size=group_size,
        continuations=continuations,
        seed=seed,
        saved=saved,
    )
    lines = _drawn_lines(drawing, folder / f"{name}.jsonl" if folder else None, say)
    own = setting.config.estimator
    found = audited(lines, methods or tuple(dict.fromkeys((own, *METHODS))), only=bool(methods))
    if folder:
        write_atomically(folder / f"{name}.json", json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    return found


def audited(lines: Sequence[Record], methods: Sequence[str], *, only: bool = True) -> Audit:
    """The audit of drawn groups. Methods that cannot take the rollouts raise InputError, or are noted if not `only`."""
    records = [record for line in lines for record in line["rollouts"]]
    traces = [trace_of(record, f"rollout {k}") for k, record in enumerate(records, start=1)]
    credit, notes = _credits(traces, records, methods, only=only)
    turns = [turn for line in lines for rollout in line["turns"] for turn in rollout]
    truth, error = drawn_advantages(turns)
    group = np.array([k for k, line in enumerate(lines) for rollout in line["turns"] for _ in rollout])
    there = ~np.isnan(truth)
    if not there.any():
        raise RunError("rollouts that are played on must not all fail; all did; mend the environment or tools")
    strayed = sum(line["strayed"] for line in lines)
    if not there.all():
        notes.append(f"{(~there).sum()} of {len(there)} turns are left out: nearly all rollouts played on there failed")
    if strayed:
        notes.append(
            f"{strayed} states could not be made again: the environment answered in another way each time; the saved "
            "answers stood, which is right only where it keeps no state"
        )
    truth, error, group = truth[there], error[there], group[there]
    estimators, ceiling = agreement({n: values[there] for n, values in credit.items()}, truth, error, group.tolist())
    return Audit(
        estimators=estimators,
        ceiling=ceiling,
        standard_error=float(np.sqrt(np.mean(error**2))),
        groups=len(lines),
        rollouts=len(records),
        turns=len(truth),
        clear_turns=int((np.abs(truth) > np.maximum(CLEAR * error, EXACT)).sum()),
        continuations=sum(line["continuations"] for line in lines),
        tokens=sum(line["tokens"] for line in lines),
        notes=tuple(notes),
    )


def _credits(
    traces: Sequence[Trace], records: Sequence[Record], methods: Sequence[str], *, only: bool
) -> tuple[dict[str, Numbers], list[str]]:
    """Each method's credit of all turns, and a note for each that cannot take them."""
    table, notes, found = traces_table(traces), [], {}
    given = [record.get("advantages") for record in records]
    if RECORDED not in methods and not only and None not in given:
        methods = (RECORDED, *methods)
    for method in methods:
        try:
            if method == RECORDED:
                if None in given:
                    raise InputError(
                        "rollouts must have been saved with credit for recorded; they were not; name another"
                    )
                found[method] = np.array([value for values in given for value in values or ()], dtype=float)
            elif missing := " and ".join(lacking(method, traces)):
                raise InputError(
                    f"rollouts must have {missing} in every turn for {method}; they have not; leave it out"
                )
            else:
                found[method] = traces_credit(method, traces, table)
        except InputError as error:
            if only:
                raise
            notes.append(f"{method} is left out: {error}")
    return found, notes


# --- what is drawn --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """What decides every draw."""

    policy: Policy
    setting: Setting
    limits: Limits
    group_size: int
    continuations: int
    seed: int
    saved: Sequence[tuple[Task, Sequence[Record]]] | None

    def head(self) -> Record:
        """By what a file of another audit is known."""
        tasks = [task.id for task, _ in self.saved] if self.saved else [task.id for task in self.setting.validation]
        return {
            "audit": 1,
            "policy": f"{sum(float(p.detach().double().sum()) for p in self.policy.model.parameters()):.9g}",
            "tasks": tasks,
            "saved": self.saved is not None,
            "group_size": self.group_size,
            "continuations": self.continuations,
            "seed": self.seed,
        }

    def __len__(self) -> int:
        return len(self.setting.validation if self.saved is None else self.saved)

    def line(self, number: int, engine: Engine) -> Record:
        """Group `number`, with the returns behind its turns."""
        return awaited(self._line(number, engine))

    async def _line(self, number: int, engine: Engine) -> Record:
        task, records = await self._fresh(number, engine) if self.saved is None else self.saved[number]
        if not records:
            raise RunError(f"the rollouts of a group must not all fail; those of task {task.id!r} did; mend the tools")
        found = await group_returns(
            task,
            [rollout_from_json(json.dumps(record["rollout"])) for record in records],
            self.setting.environment,
            engine,
            self.policy.chat,
            scored=self.setting.scored,
            limits=self.limits,
            continuations=self.continuations,
            temperature=self.setting.config.temperature,
            seed=(self.seed, 1),
            group=number,
            forks=self.setting.source is None or self.setting.source.forks,
        )
        return {"group": number, "rollouts": list(records), **dataclasses.asdict(found)}

    async def _fresh(self, number: int, engine: Engine) -> tuple[Task, Sequence[Record]]:
        """A group drawn now, scored; without the rollouts in which the environment failed."""
        task = self.setting.validation[number]
        [group] = await run_groups(
            [task],
            self.setting.environment,
            engine,
            self.policy.chat,
            group_size=self.group_size,
            limits=self.limits,
            temperature=self.setting.config.temperature,
            seed=(self.seed, 0),
            first_group=number,
        )
        scored = [self.setting.scored(task, rollout) for rollout in group if rollout.stop != "error"]
        return task, [{"step": 0, "rollout": parsed(rollout.to_json())} for rollout in scored]


def _saved_groups(path: Path, setting: Setting, groups: int) -> list[tuple[Task, list[Record]]]:
    """The last groups of a run's rollouts.jsonl with their tasks, those of the newest step last."""
    known = {task.id: task for task in (*setting.train, *setting.validation)}
    found: dict[Hashable, list[Record]] = {}
    for number, text in read_lines(path):
        place = f"{path.name}:{number}"
        record = record_of_line(f"{path}:{number}", text)
        if "rollout" not in record:
            raise InputError(
                f"{place} must be a rollout that a run recorded, to be played on; it is none; take a run's"
            )
        if has_failed(record):
            continue
        trace_of(record, place)  # which says what is wrong with it
        found.setdefault((record["step"], record["rollout"]["group"]), []).append(record)
    if not found:
        raise InputError(f"{path} must hold rollouts; it is empty; train with --log-groups 1 or more")
    return [(_task(records[0], known), records) for records in list(found.values())[-groups:]]


def _task(record: Record, known: Mapping[str, Task]) -> Task:
    """The task of a saved rollout: the run's own of that id, else what was recorded of it."""
    task_id = record["rollout"]["task_id"]
    recorded = record.get("task") or {}
    if task_id not in known and "question" not in recorded:
        raise InputError(f"rollouts must be of the run's tasks; {task_id!r} is none; name the run that they are of")
    return known.get(task_id) or Task(
        id=task_id,
        question=recorded["question"],
        answers=tuple(recorded.get("answers", ())),
        kind=recorded.get("kind", ""),
    )


def _drawn_lines(drawing: _Drawing, path: Path | None, say: Callable[[str], None]) -> list[Record]:
    """Every group's line: those in the file, and the others, which are added to it as they are drawn."""
    head = drawing.head()
    lines = _kept_lines(path, head) if path else []
    total, left = len(drawing), range(len(lines), len(drawing))
    if lines:
        say(f"{len(lines)} of {total} groups are there already")
    if not left:
        return lines
    if drawing.saved is None:
        check_prompts(drawing.setting, drawing.policy, drawing.limits)
    engines = make_engines(drawing.policy, drawing.setting.config)
    if path and not lines:
        with writing(path):
            write_atomically(path, json.dumps(head) + "\n")
    for first in left[:: len(engines)]:
        numbers = range(first, min(first + len(engines), total))
        new = list(
            in_parallel(lambda n, first=first: drawing.line(n, engines[n - first]), numbers, at_once=len(engines))
        )
        if path:
            append_lines(path, new)
        lines += new
        say(f"{len(lines)} of {total} groups, {sum(line['tokens'] for line in lines):,} tokens")
    return lines


def _kept_lines(path: Path, head: Record) -> list[Record]:
    """The whole lines of a file of this audit; a line that a stopped audit left half-written is dropped."""
    if not path.is_file():
        return []
    kept = list(_whole(path))
    if not kept or kept[0] != head:
        raise RunError(
            f"{path} must be of this audit, to go on with it; it is of another policy or other options; give another "
            "--name, or delete it"
        )
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept[1:]


def _whole(path: Path) -> Iterator[Record]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            yield parsed(text)
