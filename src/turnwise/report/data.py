"""What a report needs of a run directory, read without a model.

    config.json      {"format": 1, "config": {"estimator": ..., "seed": ..., ...}}
    metrics.jsonl    one line per step and split: {"step", "split", "wall_s", "metrics": {...}}
    rollouts.jsonl   one line per recorded rollout, with its advantages, baselines and loss mask
    eval-*.json      {"name", "mode", "metrics": {name: {"mean", "low", "high", "n"}}}

Only the first two must be there. A last line that a killed run left half-written is skipped, and
`Run.notes` says so; a damaged line anywhere else is an error.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from turnwise.errors import InputError, RunError
from turnwise.records import bounded_lines, parsed
from turnwise.trust import check_links
from turnwise.types import Rollout, Task, rollout_from_json

T = TypeVar("T")

FORMAT = 1
"""The version of the run directory that this module reads."""
MAX_ROLLOUTS = 2_000
"""How many rollouts a report shows, of all its runs together."""

GroupKey = tuple[int, int, str]
"""Step, group and task of some rollouts: siblings have the same."""


@dataclass(frozen=True, kw_only=True)
class MetricLine:
    """The finite metrics of one step on one split."""

    step: int
    split: str
    wall_s: float | None
    metrics: Mapping[str, float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RolloutLine:
    """One recorded rollout with the credit that its turns were given."""

    step: int
    split: str
    task: Task
    rollout: Rollout
    advantages: tuple[float, ...] | None
    """One per turn; None where the rollout was not trained on."""
    baselines: Mapping[str, tuple[float, ...]]
    """By name, one number per turn; empty where the estimator has none."""
    loss_mask: tuple[bool, ...] | None
    """Whether each turn's tokens enter the loss."""
    token_advantages: tuple[float, ...] | None = None
    """One per sampled token, the turns one after the other; None where a turn's tokens all have the turn's."""
    token_values: tuple[float, ...] | None = None
    """A critic's value of the state before each sampled token, where it was recorded."""

    @property
    def group(self) -> GroupKey:
        return self.step, self.rollout.group, self.rollout.task_id


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the tasks of one evaluation, e.g. `test` decoded greedily."""

    name: str
    mode: str
    means: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a report shows of one training run."""

    path: Path
    estimator: str
    """Its method; of a finished run of a comparison, the arm's name."""
    seed: int
    config: Mapping[str, Any]
    lines: tuple[MetricLine, ...]
    """In order of step; one per step and split."""
    rollouts: tuple[RolloutLine, ...] = ()
    """In order of step: whole groups, evenly spread over the recorded steps."""
    num_recorded: int = 0
    """How many rollouts the directory holds of that split."""
    evaluations: tuple[Evaluation, ...] = ()
    notes: tuple[str, ...] = ()
    """What was skipped, looks odd, or was warned of in training, one sentence each."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line.split for line in self.lines))

    def of_split(self, split: str) -> tuple[MetricLine, ...]:
        return tuple(line for line in self.lines if line.split == split)


@dataclass
class _Reader:
    """Complete lines of one JSON-lines file; `notes` collects what was skipped."""

    path: Path
    notes: list[str] = field(default_factory=list)

    def objects(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """(place for messages, byte offset, object) of each line."""
        offset = 0
        pending: tuple[str, Exception] | None = None
        with self.path.open("rb") as file:
            for number, raw in enumerate(bounded_lines(file, self.path.name), 1):
                if pending is not None:
                    raise _bad_line(*pending) from pending[1]
                place, start = f"{self.path.name}:{number}", offset
                offset += len(raw)
                if not raw.strip():
                    continue
                try:
                    value = parsed(raw.decode())
                except ValueError as error:  # torn if nothing follows, damaged otherwise
                    pending = place, error
                    continue
                if not isinstance(value, dict):
                    raise InputError(
                        f"{place} must hold a JSON object; got {type(value).__name__}; repair or delete the line"
                    )
                yield place, start, value
        if pending is not None:
            self.notes.append(f"{pending[0]}: a half-written last line was skipped.")


def load_run(path: str | Path, *, rollouts: int = MAX_ROLLOUTS) -> Run:
    """The run written in directory `path`, with so many of its `rollouts` at most, but one whole group at least.

    Raises RunError where `path` is no run directory, has another format version or no metrics yet,
    and InputError, with file and line, where a record in it is damaged.
    """
    path = Path(path)
    check_links(path)
    config = _config(path)
    metrics, records = _Reader(path / "metrics.jsonl"), _Reader(path / "rollouts.jsonl")
    try:
        lines = _metric_lines(metrics)
        num_recorded, shown = _rollout_lines(records, rollouts) if records.path.exists() else (0, ())
        evaluations = tuple(_evaluation(p) for p in sorted(path.glob("eval-*.json")))
    except OSError as error:
        raise RunError(f"{path} must be readable; got {error}; check its permissions") from error
    return Run(
        path=path.resolve(),
        estimator=_arm(path) or _field(config, "estimator", str, "config.json"),
        seed=_field(config, "seed", int, "config.json"),
        config=config,
        lines=lines,
        rollouts=shown,
        num_recorded=num_recorded,
        evaluations=evaluations,
        notes=(
            *metrics.notes,
            *records.notes,
            *(f"Warning at step {line.step}: {said}." for line in lines for said in line.warnings),
        ),
    )


def _config(path: Path) -> Mapping[str, Any]:
    if not (path / "config.json").is_file() or not (path / "metrics.jsonl").is_file():
        raise RunError(
            f"{path} must be a run directory, with config.json and metrics.jsonl; "
            f"{'one of them is missing' if path.is_dir() else 'there is no such directory'}; "
            "give a directory that `turnwise train` wrote"
        )
    data = _json_file(path / "config.json")
    if data.get("format") != FORMAT:
        raise RunError(
            f"{path}/config.json must have format {FORMAT}; got {_cut(data.get('format'))}; "
            "read it with the version of turnwise that wrote it"
        )
    return _field(data, "config", dict, "config.json")


def _arm(path: Path) -> str | None:
    """The arm of a comparison that the run is one of, if it is and is finished."""
    record = path / "record.json"
    arm = _json_file(record).get("arm") if record.is_file() else None
    return arm if isinstance(arm, str) else None


def _json_file(path: Path) -> dict[str, Any]:
    try:
        data = parsed(path.read_bytes().decode())
    except ValueError as error:
        raise InputError(f"{path} must be JSON; {error}; repair or delete it") from error
    except OSError as error:
        raise RunError(f"{path} must be readable; got {error}; check its permissions") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object; got {type(data).__name__}; repair it")
    return data


def _metric_lines(reader: _Reader) -> tuple[MetricLine, ...]:
    found: dict[tuple[int, str], MetricLine] = {}
    non_finite = repeated = 0
    for place, _, data in reader.objects():
        line, dropped = _metric_line(data, place)
        non_finite += dropped
        repeated += (line.step, line.split) in found
        found[line.step, line.split] = line
    if not found:
        raise RunError(
            f"{reader.path} must hold at least one line; it has none; wait for the run's first step, or train again"
        )
    if non_finite:
        reader.notes.append(f"metrics.jsonl: {non_finite} values are not finite and left out.")
    if repeated:
        reader.notes.append(f"metrics.jsonl: {repeated} lines stand there again, after a resume; the later counts.")
    return tuple(sorted(found.values(), key=lambda line: line.step))


def _metric_line(data: Mapping[str, Any], place: str) -> tuple[MetricLine, int]:
    """The line, and how many of its values were not finite."""
    metrics: dict[str, float] = {}
    dropped = 0
    for name, value in _field(data, "metrics", dict, place).items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{place}: metrics.{name} must be a number; got {_cut(value)}; repair or delete the line")
        if is_finite(value):
            metrics[name] = float(value)
        else:
            dropped += 1
    wall_s = data.get("wall_s")
    line = MetricLine(
        step=_field(data, "step", int, place),
        split=_field(data, "split", str, place),
        wall_s=float(wall_s) if isinstance(wall_s, int | float) and is_finite(wall_s) else None,
        metrics=metrics,
        warnings=tuple(str(said) for said in data.get("warnings") or ()),
    )
    return line, dropped


def is_finite(value: float) -> bool:
    """Whether a number, which may be a whole one of any length, is a finite float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _rollout_lines(reader: _Reader, limit: int) -> tuple[int, tuple[RolloutLine, ...]]:
    """How many rollouts there are, of training where it was recorded, and those of some groups.

    Two passes, so that a file of many gigabytes needs memory for those groups only.
    """
    where = [
        (place, offset, _field(data, "split", str, place), _group_key(data, place))
        for place, offset, data in reader.objects()
    ]
    split = "train" if any(w[2] == "train" for w in where) else None
    where = [w for w in where if split is None or w[2] == split]
    wanted = spread_groups(Counter(key for _, _, _, key in where), limit)
    lines = []
    with reader.path.open("rb") as file:
        for place, offset, _, key in where:
            if key in wanted:
                file.seek(offset)
                lines.append(_rollout_line(parsed(file.readline()), place))
    return len(where), tuple(sorted(lines, key=lambda line: line.step))


def _group_key(data: Mapping[str, Any], place: str) -> GroupKey:
    rollout = _field(data, "rollout", dict, place)
    return _field(data, "step", int, place), _field(rollout, "group", int, place), str(rollout.get("task_id"))


def spread_groups(sizes: Mapping[GroupKey, int], limit: int) -> set[GroupKey]:
    """Groups of `limit` rollouts at most, or one group: the first ones of as many steps as fit, then the second ones.

    Where the steps are too many, evenly spread from the first to the last.
    """
    by_step: dict[int, list[GroupKey]] = {}
    for key in sizes:
        by_step.setdefault(key[0], []).append(key)
    steps = [by_step[step] for step in sorted(by_step)]
    kept: set[GroupKey] = set()
    for layer in itertools.zip_longest(*steps):
        there = [key for key in layer if key is not None]
        fitting = _evenly(there, sizes, limit - sum(sizes[key] for key in kept))
        kept.update(fitting)
        if len(fitting) < len(there):
            break
    return kept or set(itertools.islice(sizes, 1))


def _evenly(keys: Sequence[GroupKey], sizes: Mapping[GroupKey, int], limit: int) -> list[GroupKey]:
    """As many of `keys` as fit, the first and the last among them."""
    for count in range(min(len(keys), limit), 0, -1):
        found = [keys[round(i * (len(keys) - 1) / max(count - 1, 1))] for i in range(count)]
        if sum(sizes[key] for key in found) <= limit:
            return found
    return []


def _rollout_line(data: dict[str, Any], place: str) -> RolloutLine:
    try:
        task = data["task"]
        rollout = rollout_from_json(json.dumps(data["rollout"]))
        line = RolloutLine(
            step=data["step"],
            split=data["split"],
            task=Task(
                id=str(task["id"]),
                question=str(task["question"]),
                answers=tuple(str(a) for a in task["answers"]),
                kind=str(task.get("kind", "")),
            ),
            rollout=rollout,
            advantages=_numbers(data.get("advantages"), float),
            baselines={
                str(name): tuple(float(v) for v in values) for name, values in (data.get("baselines") or {}).items()
            },
            loss_mask=_numbers(data.get("loss_mask"), bool),
            token_advantages=_numbers(data.get("token_advantages"), float),
            token_values=_numbers(data.get("token_values"), float),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{place} must be a recorded rollout; {type(error).__name__}: {error}; repair or delete the line"
        ) from error
    _check_lengths(line, place)
    return line


def _numbers(values: Sequence[Any] | None, kind: Callable[[Any], T]) -> tuple[T, ...] | None:
    return None if values is None else tuple(kind(v) for v in values)


def _check_lengths(line: RolloutLine, place: str) -> None:
    columns = {"advantages": line.advantages, "loss_mask": line.loss_mask, **line.baselines}
    columns["turn_rewards"] = line.rollout.turn_rewards or None
    for name, values in columns.items():
        if values is not None and len(values) != len(line.rollout.turns):
            raise InputError(
                f"{place}: {name} must have one entry per turn, {len(line.rollout.turns)}; "
                f"got {len(values)}; repair or delete the line"
            )
    tokens = sum(len(turn.action_ids) for turn in line.rollout.turns)
    for name in ("token_advantages", "token_values"):
        values = getattr(line, name)
        if values is not None and len(values) != tokens:
            raise InputError(
                f"{place}: {name} must have one entry per sampled token, {tokens}; got {len(values)}; "
                "repair or delete the line"
            )


def _evaluation(path: Path) -> Evaluation:
    data = _json_file(path)
    try:
        means = {str(n): m["mean"] for n, m in data["metrics"].items()}
        numbers = {n: float(m) for n, m in means.items() if m is not None and is_finite(m)}
        return Evaluation(name=str(data["name"]), mode=str(data["mode"]), means=numbers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} must be the result of an evaluation; {type(error).__name__}: {error}; "
            "delete it and run `turnwise eval` again"
        ) from error


def _field(data: Mapping[str, Any], name: str, kind: type, place: str) -> Any:
    value = data.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        got = "nothing" if value is None else _cut(value)
        raise InputError(f"{place}: {name} must be of type {kind.__name__}; got {got}; repair or delete the line")
    return value


def _cut(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bad_line(place: str, error: Exception) -> InputError:
    return InputError(f"{place} must be one JSON object; {error}; repair or delete the line")
