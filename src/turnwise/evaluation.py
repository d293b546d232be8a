"""Playing questions without learning from them: metrics with confidence intervals, and a record per question."""

import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from turnwise import atlas, metrics
from turnwise.chat import Chat
from turnwise.config import (
    ATLAS,
    ATLAS_HOPS,
    TOOL_OPTIONS,
    TrainConfig,
    config_from_dict,
    on_engine,
    read_config_file,
    without_branches,
    without_judge,
)
from turnwise.cores import in_parallel, parts_at_once
from turnwise.devices import is_offered, placed
from turnwise.dialogue import EndpointSpeaker, run_dialogues
from turnwise.endpoint import Client, EndpointConfig, Reply
from turnwise.engine import Engine, PolicyEngine
from turnwise.engines.hf import HFEngine
from turnwise.engines.vllm import VLLMEngine
from turnwise.env import closed, started
from turnwise.errors import ConfigError, InputError, RunError, TurnwiseError, described, unknown_name
from turnwise.judge import check_judge, judge_metrics
from turnwise.policy import EMBEDDED, Policy, load_policy
from turnwise.protocols import NATIVE, ProtocolName, protocol_named
from turnwise.quick import quicken
from turnwise.records import HUB
from turnwise.rewards import (
    answer_presence,
    has_final_format,
    has_turn_format,
    load_rewards,
    tag_usage,
    xml_format,
)
from turnwise.rollout import Limits, awaited, run_groups, run_trees
from turnwise.rundir import chosen_checkpoint, read_config, write_atomically
from turnwise.setting import (
    Setting,
    environment_source,
    environment_tasks,
    make_setting,
    make_tools,
    played_protocol,
)
from turnwise.sources import is_hub_name
from turnwise.tasks import load_tasks
from turnwise.types import Message, Rollout, Task, ToolResult

Mode = Literal["greedy", "sampled"]

FRAME = 32
"""More tokens than the frame of a message has."""
SEARCH_TURNS = 4
"""The turns of the embedded agent that searches several times, where no run says otherwise."""
RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""


def rollout_metrics(task: Task, rollout: Rollout, protocol: ProtocolName | None = "tools") -> dict[str, float]:
    """What is reported of one rollout, by name; `docs/run-format.md` says what each is.

    A metric that a rollout cannot have is absent: `tokens` without token ids; `well_called` without calls; the four
    about searches where the task names no gold articles (its metadata's `articles`) or a tool does not say what it
    returned; the format measures of the other protocol, and with those of tools those of both where `protocol` is None;
    what compares with answers where the task has none; what an environment pays and says where it does not.
    """
    results = [result for turn in rollout.turns for result in turn.results if not result.error]
    tokens = sum(len(turn.action_ids) for turn in rollout.turns)
    return {
        **({"tool_execution": float(bool(results))} if protocol else {}),
        **(_answer_metrics(task, rollout, results) if task.answers else {}),
        **(_format_metrics(rollout, protocol) if protocol else {}),
        **_environment_metrics(rollout),
        "terminated": float(rollout.terminated),
        "turns": float(len(rollout.turns)),
        **({"tokens": float(tokens)} if tokens or not rollout.turns else {}),
        **_call_metrics(task, rollout),
    }


def _answer_metrics(task: Task, rollout: Rollout, results: Sequence[ToolResult]) -> dict[str, float]:
    """How answer and results compare with the task's answers."""
    answer, golds = rollout.answer, list(task.answers)
    said = answer if answer is not None else ""
    return {
        "answer_in_results": max((metrics.answer_presence(r.text, golds) for r in results), default=0.0),
        "exact_match": 0.0 if answer is None else metrics.exact_match(said, golds),
        "exact_match_paper": 0.0 if answer is None else metrics.exact_match(said, golds, "paper"),
        "f1": 0.0 if answer is None else metrics.f1(said, golds),
        "answer_presence": answer_presence(task, rollout),
        "answered": float(answer is not None),
    }


def _environment_metrics(rollout: Rollout) -> dict[str, float]:
    """The unweighted sum of what the environment paid as `environment`, and whether it says that the task is solved."""
    paid = [turn.rewards["environment"] for turn in rollout.turns if "environment" in turn.rewards]
    solved = {} if rollout.success is None else {"success": float(rollout.success)}
    return {**({"environment_return": sum(paid)} if paid else {}), **solved}


def _format_metrics(rollout: Rollout, protocol: ProtocolName) -> dict[str, float]:
    """The paper's two measures of version 1 for protocol `tools`, its two rules of version 2 for the others."""
    form = protocol_named(protocol)
    if protocol == "tools":
        return {"xml_format": xml_format(rollout, form), "tag_usage": tag_usage(rollout, form)}
    before = rollout.turns[:-1]
    final = has_final_format(rollout, form)
    formed = [has_turn_format(turn, form) for turn in before] + [final] * bool(rollout.turns)
    return {"turn_format": sum(formed) / len(formed) if formed else 0.0, "final_format": float(final)}


def _call_metrics(task: Task, rollout: Rollout) -> dict[str, float]:
    """How the calls went, and which articles they brought."""
    calls = sum(turn.action.num_calls for turn in rollout.turns)
    executed = [result for turn in rollout.turns for result in turn.results if not result.error]
    found = {"well_called": len(executed) / calls} if calls else {}
    gold = set(task.metadata.get("articles") or ())
    brought = [result.documents for result in executed if result.documents is not None]
    if not gold or len(brought) < len(executed):
        return found
    seen: set[str] = set()
    useful = redundant = 0
    for documents in brought:
        new = set(documents) - seen
        useful += bool(new & gold)
        redundant += not new
        seen |= new
    return {
        **found,
        "searches": float(len(executed)),
        "gold_found": len(gold & seen) / len(gold),
        "useful_searches": float(useful),
        "redundant_searches": float(redundant),
    }


def mean_metrics(pairs: Sequence[tuple[Task, Rollout]], protocol: ProtocolName | None = "tools") -> dict[str, float]:
    """Each metric's mean over the rollouts that have it; those that an environment's failure ended are left out."""
    rows = [rollout_metrics(task, rollout, protocol) for task, rollout in pairs if rollout.stop != "error"]
    return {name: float(np.mean(values)) for name, values in _columns(rows).items()}


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Each name's values, of the rows that have it; where some are solved, those that do not say so are not."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, 0.0) for row in rows if name in row or name == "success"] for name in names}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with a 95 % bootstrap interval over questions."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation: overall, by question kind, and question by question."""

    name: str
    mode: Mode
    metrics: Mapping[str, Estimate]
    by_kind: Mapping[str, Mapping[str, Estimate]]
    records: Sequence[tuple[Task, Rollout]]
    judge: Mapping[str, float] = field(default_factory=dict)
    """Cost and disagreement of the judge (see `judge_metrics`); empty without one."""
    protocol: ProtocolName | None = "tools"
    """The tags in which the questions were played; None in an environment that has none."""
    endpoint: Mapping[str, float] = field(default_factory=dict)
    """Requests to an endpoint and what they took; empty for a policy of our own."""


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean and percentile bootstrap interval of values, one per question (Efron 1979)."""
    array = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(1), [2.5, 97.5])
    return Estimate(mean=float(array.mean()), low=float(low), high=float(high), n=len(array))


def draw(
    tasks: Sequence[Task],
    setting: Setting,
    engines: Sequence[Engine],
    chat: Chat,
    *,
    limits: Limits,
    temperature: float,
    seed: Sequence[int],
    group_size: int = 1,
    branches: Sequence[int] = (),
) -> list[list[Rollout]]:
    """Each task's group of rollouts, or its tree where there are `branches`; not scored.

    Several engines each play a share of the tasks, at the same time.
    """
    ends = [len(tasks) * i // len(engines) for i in range(len(engines) + 1)]
    shape = {"branches": branches} if branches else {"group_size": group_size}
    run: Any = run_trees if branches else run_groups

    def share(i: int) -> list[list[Rollout]]:
        first, end = ends[i], ends[i + 1]
        options = {"limits": limits, "temperature": temperature, "seed": seed, "first_group": first, **shape}
        return awaited(run(tasks[first:end], setting.environment, engines[i], chat, **options))

    return [group for part in in_parallel(share, range(len(engines)), at_once=len(engines)) for group in part]


def play(
    tasks: Sequence[Task],
    setting: Setting,
    engines: Sequence[Engine],
    chat: Chat,
    *,
    limits: Limits,
    mode: Mode = "greedy",
    seed: Sequence[int] = (0,),
    samples: int = 1,
) -> list[tuple[Task, Rollout]]:
    """`samples` rollouts of each question, scored; judged too where the setting has a judge."""
    temperature = 0.0 if mode == "greedy" else setting.config.temperature
    groups = draw(tasks, setting, engines, chat, limits=limits, temperature=temperature, seed=seed, group_size=samples)
    return _scored(tasks, groups, setting)


def play_endpoint(
    tasks: Sequence[Task],
    setting: Setting,
    endpoint: EndpointConfig,
    *,
    max_turn_tokens: int,
    mode: Mode = "greedy",
    seed: Sequence[int] = (0,),
    samples: int = 1,
) -> tuple[list[tuple[Task, Rollout]], dict[str, float]]:
    """As `play`, by the model behind an endpoint; and what that took."""
    client, started = Client(endpoint), time.perf_counter()
    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        speaker = EndpointSpeaker(client, pool, protocol_named(setting.config.protocol))
        groups = awaited(
            run_dialogues(
                tasks,
                setting.environment,
                speaker,
                samples=samples,
                max_turn_tokens=max_turn_tokens,
                temperature=0.0 if mode == "greedy" else setting.config.temperature,
                seed=seed,
            )
        )
    return _scored(tasks, groups, setting), _costs(speaker.replies, time.perf_counter() - started)


def _scored(tasks: Sequence[Task], groups: Sequence[Sequence[Rollout]], setting: Setting) -> list[tuple[Task, Rollout]]:
    """The rollouts of each task, with their rewards, in one list."""
    played = [(task, rollout) for task, group in zip(tasks, groups, strict=True) for rollout in group]
    return list(zip([task for task, _ in played], setting.all_scored(played), strict=True))


def _costs(replies: Sequence[Reply], seconds: float) -> dict[str, float]:
    return {
        "requests": float(len(replies)),
        "retried": float(sum(reply.retried for reply in replies)),
        "prompt_tokens": float(sum(reply.prompt_tokens for reply in replies)),
        "completion_tokens": float(sum(reply.completion_tokens for reply in replies)),
        "seconds": round(seconds, 3),
    }


def summarised(
    name: str,
    mode: Mode,
    pairs: Sequence[tuple[Task, Rollout]],
    protocol: ProtocolName | None = "tools",
    *,
    pass_at: Sequence[int] = (),
    endpoint: Mapping[str, float] | None = None,
) -> Evaluation:
    """The evaluation of played questions. Rollouts of one question are its samples; intervals are over questions.

    A metric `pass@K` is added for each K in `pass_at`: of exact match, over the questions with so many samples.
    """
    counted = [(task, rollout) for task, rollout in pairs if rollout.stop != "error"]
    kinds = dict.fromkeys(task.kind for task, _ in counted)
    return Evaluation(
        name=name,
        mode=mode,
        metrics=_estimates(counted, protocol, pass_at),
        by_kind={kind: _estimates([p for p in counted if p[0].kind == kind], protocol, pass_at) for kind in kinds},
        records=pairs,
        judge=judge_metrics(pairs),
        protocol=protocol,
        endpoint=endpoint or {},
    )


def _estimates(
    pairs: Sequence[tuple[Task, Rollout]], protocol: ProtocolName | None, pass_at: Sequence[int]
) -> dict[str, Estimate]:
    """Each metric's estimate, from every question's mean over its samples."""
    by_question: dict[str, list[dict[str, float]]] = {}
    for task, rollout in pairs:
        by_question.setdefault(task.id, []).append(rollout_metrics(task, rollout, protocol))
    questions = [_question_metrics(rows, pass_at) for rows in by_question.values()]
    return {name: bootstrap(values) for name, values in _columns(questions).items()}


def _question_metrics(rows: Sequence[Mapping[str, float]], pass_at: Sequence[int]) -> dict[str, float]:
    """Means over a question's samples, and the chances that one of k of them passes: by exact match, or by success."""
    correct = round(sum(row.get("exact_match", row.get("success", 0.0)) for row in rows))
    passed = {f"pass@{k}": metrics.pass_at(k, samples=len(rows), correct=correct) for k in pass_at if k <= len(rows)}
    return {**{name: float(np.mean(values)) for name, values in _columns(rows).items()}, **passed}


def evaluation_to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation's numbers in JSON's types, without the records."""

    def plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: vars(estimate) for name, estimate in estimates.items()}

    return {
        "name": evaluation.name,
        "mode": evaluation.mode,
        "metrics": plain(evaluation.metrics),
        "by_kind": {kind: plain(found) for kind, found in evaluation.by_kind.items()},
        **({"judge": dict(evaluation.judge)} if evaluation.judge else {}),
        **({"endpoint": dict(evaluation.endpoint)} if evaluation.endpoint else {}),
    }


# --- a run or a checkpoint, played ------------------------------------------------------------------

Checkpoint = Literal["best", "last"]
_NAMES = {"mode": get_args(Mode), "checkpoint": get_args(Checkpoint), "split": get_args(atlas.Split)}


def evaluate(
    run: str | Path = "embedded",
    tasks: str | Path | Sequence[Task] | None = None,
    *,
    split: atlas.Split | None = None,
    mode: Mode = "greedy",
    limit: int | None = None,
    checkpoint: Checkpoint = "best",
    seed: int = 0,
    name: str | None = None,
    judge: bool = True,
    samples: int = 1,
    pass_at: Sequence[int] = (),
    endpoint: EndpointConfig | None = None,
    engine: Literal["hf", "vllm"] | None = None,
    max_turn_tokens: int | None = None,
    environment: str | None = None,
    max_turns: int | None = None,
) -> Evaluation:
    """How well a policy answers questions, with bootstrap intervals.

    `run` is a run directory, a checkpoint folder, a file of options (whose policy plays before any training),
    "embedded" or "embedded-search"; it plays with its run's tools and rewards. `tasks` are questions, a file of them,
    "atlas" or "atlas-two-hop"; by default those of the run, of which `split` chooses (by default "test" of the atlas
    and "validation" of a file). `limit` takes that many, evenly spaced.
    A run's judge is asked too, unless `judge` is False. With `environment` it plays there instead, see
    `docs/environments.md`, on that environment's tasks, and for `max_turns` turns where that is given. Raises RunError
    where every rollout failed.

    Each question is played `samples` times; `pass_at` names the k of pass@k. `engine` and `max_turn_tokens` replace the
    run's own. With `endpoint`, the model there plays in the place of the run's policy, and `engine` and `checkpoint`
    must be left out.
    """
    _check_names(mode=mode, checkpoint=checkpoint, split=split)
    _check_samples(samples, pass_at, mode)
    if endpoint and (engine is not None or checkpoint != "best"):
        raise ConfigError(
            "engine and checkpoint must be left out with an endpoint, whose own model plays; "
            f"got {f'engine {engine}' if engine else f'checkpoint {checkpoint}'}; leave it out"
        )
    policy, config = (None, _spoken(run_config(run))) if endpoint else run_policy(run, checkpoint)
    if engine is not None:
        config = on_engine(config, engine)
    if max_turn_tokens is not None:
        config = dataclasses.replace(config, max_turn_tokens=max_turn_tokens)
    if not judge:
        config = without_judge(config)
    config = elsewhere(config, environment, max_turns)
    if config.judge:
        check_judge(config.judge, "leave it out with --no-judge (in Python judge=False)")
    chosen, called = _chosen_tasks(config, tasks, split)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be >= 1; got {limit}; leave it out to play every question")
    setting = _setting(config, spread(chosen, limit or len(chosen)))
    how: Any = {"mode": mode, "seed": (seed,), "samples": samples}
    costs: Mapping[str, float] = {}
    if endpoint:
        called = f"{called}-{re.sub(r'[^a-zA-Z0-9.]+', '-', endpoint.model).strip('-.')}"
        pairs, costs = play_endpoint(
            setting.validation, setting, endpoint, max_turn_tokens=config.max_turn_tokens, **how
        )
    else:
        assert policy is not None
        limits = rollout_limits(config, policy)
        check_prompts(setting, policy, limits)
        engines = make_engines(policy, config)
        pairs = play(setting.validation, setting, engines, policy.chat, limits=limits, **how)
    protocol = setting.config.tag_protocol
    evaluation = summarised(name or called, mode, pairs, protocol, pass_at=pass_at, endpoint=costs)
    if not evaluation.metrics:
        mended = "endpoint or the tools" if endpoint else "environment" if config.environment else "tools"
        raise RunError(f"rollouts must not all fail; all {len(pairs)} did: {pairs[0][1].error}; mend the {mended}")
    return evaluation


def _spoken(config: TrainConfig) -> TrainConfig:
    """The configuration for an endpoint, whose calls are in OpenAI's shape: what protocol records them is no matter."""
    return dataclasses.replace(config, protocol="hermes") if config.protocol == NATIVE else config


def _check_samples(samples: int, pass_at: Sequence[int], mode: Mode) -> None:
    """Raises ConfigError for numbers of samples that there cannot be, or that would all be alike."""
    if samples < 1 or any(not 1 <= k <= samples for k in pass_at):
        raise ConfigError(
            f"samples must be >= 1, and pass-at between 1 and samples; got {samples} and "
            f"{', '.join(map(str, pass_at)) or 'none'}; draw at least as many samples as the largest pass-at"
        )
    if samples > 1 and mode == "greedy":
        raise ConfigError("samples must go with mode sampled: greedy ones are all alike; give mode sampled")


def rollouts(
    run: str | Path = "embedded",
    tasks: str | Path | Sequence[Task] | None = None,
    *,
    group_size: int = 8,
    mode: Mode = "sampled",
    checkpoint: Checkpoint = "best",
    seed: int = 0,
    **options: Any,
) -> list[list[Rollout]]:
    """`group_size` scored rollouts of every task, one list per task.

    `run` and `tasks` are as in `evaluate`; `options` are fields of `TrainConfig` that replace the run's own, such as
    `tools`, `corpus` or `max_turns`. A run's judge is not asked.
    """
    if group_size < 1:
        raise ConfigError(f"group_size must be >= 1; got {group_size}; give the number of rollouts per task")
    _check_names(mode=mode, checkpoint=checkpoint)
    policy, config = run_policy(run, checkpoint)
    config = without_judge(dataclasses.replace(config, **options))
    setting = _setting(config, _chosen_tasks(config, tasks, None)[0])
    limits = rollout_limits(config, policy)
    check_prompts(setting, policy, limits)
    groups = draw(
        setting.validation,
        setting,
        make_engines(policy, config),
        policy.chat,
        group_size=group_size,
        limits=limits,
        temperature=0.0 if mode == "greedy" else config.temperature,
        seed=(seed,),
    )
    return [
        [setting.scored(task, rollout) for rollout in group]
        for task, group in zip(setting.validation, groups, strict=True)
    ]


def to_play(
    run: str | Path,
    tasks: str | Path | Sequence[Task] | None = None,
    *,
    split: atlas.Split | None = None,
    limit: int | None = None,
    checkpoint: Checkpoint = "best",
) -> tuple[Policy, Setting]:
    """A run's policy, and the questions that `evaluate` would play with it; without the run's judge."""
    _check_names(checkpoint=checkpoint, split=split)
    policy, config = run_policy(run, checkpoint)
    config = without_judge(config)
    chosen, _ = _chosen_tasks(config, tasks, split)
    return policy, _setting(config, spread(chosen, limit or len(chosen)))


def elsewhere(config: TrainConfig, environment: str | None, max_turns: int | None) -> TrainConfig:
    """The configuration in another environment, which pays what it pays by default, and with other `max_turns`."""
    if max_turns is not None:
        config = dataclasses.replace(without_branches(config), max_turns=max_turns)
    if environment is None:
        return config
    given = {name: getattr(TrainConfig, name) for name in (*TOOL_OPTIONS, "tasks", "validation_tasks", "rewards")}
    return dataclasses.replace(
        without_branches(without_judge(config)), **given, reward_weights=None, environment=environment
    )


def _check_names(**given: str | None) -> None:
    """Raises ConfigError for an option that is none of the names that it can be; None is no choice."""
    for option, name in given.items():
        if name is not None and name not in _NAMES[option]:
            raise unknown_name(option, name, _NAMES[option])


def run_policy(run: str | Path, checkpoint: Checkpoint = "best") -> tuple[Policy, TrainConfig]:
    """A run's policy and configuration.

    Of a checkpoint folder inside a run, the run's configuration; of any other checkpoint, a model of the hub, and
    "embedded", the default one; of "embedded-search", that of an agent that searches several times. Of a file of
    options, the policy that training would start from. Raises InputError or RunError where there is no such run or it
    has no such checkpoint.
    """
    _check_names(checkpoint=checkpoint)
    folder = Path(run)
    if str(run) in EMBEDDED or is_hub_name(run) or folder.is_file():
        config = TrainConfig(policy=str(run)) if is_hub_name(run) else run_config(run)
        return place(load_policy(config.start), config), config
    if not folder.is_dir():
        raise InputError(
            f"a run must be a run directory, a checkpoint folder, a file of options or {' or '.join(EMBEDDED)}; "
            f"{str(run)!r} is none; check the path"
        )
    if is_run(folder):
        config = read_config(folder, plays=True)
        source = chosen_checkpoint(folder, best=checkpoint == "best")
        return place(load_policy(source, verified=True), config), config
    if _is_begun(folder):
        raise RunError(
            f"{run} must be a run with metrics; it has a configuration but no metrics.jsonl, as its training stopped "
            f"before the first validation, or the file is lost; train it: turnwise train --resume --out {run}"
        )
    above = [parent for parent in folder.resolve().parents[:2] if is_run(parent)]
    config = read_config(above[0], plays=True) if above else TrainConfig(policy=str(folder))
    return place(load_policy(folder), config), config


def _embedded_config(name: str) -> TrainConfig:
    if name == "embedded-search":
        return TrainConfig(protocol="search", tasks="atlas-two-hop", max_turns=SEARCH_TURNS)
    return TrainConfig()


def run_config(source: str | Path) -> TrainConfig:
    """The configuration of a run, without its policy: of a run directory, an embedded policy, or a file of options."""
    if str(source) in EMBEDDED:
        return _embedded_config(str(source))
    path = Path(source)
    if path.is_file():
        return config_from_dict(read_config_file(path), str(path))
    if not (path / "config.json").is_file():
        raise InputError(
            f"a run must be a run directory, a file of options or {' or '.join(EMBEDDED)}; got {str(source)!r}; check "
            "the path"
        )
    return read_config(path, plays=True)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory; a checkpoint has a config.json too, but no metrics."""
    return (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()


def _is_begun(folder: Path) -> bool:
    """Whether the config.json of a folder is a run's, and not a model's."""
    try:
        read_config(folder)
    except TurnwiseError:
        return False
    return True


def write_evaluation(run: Path, evaluation: Evaluation) -> Path:
    """Writes `eval-NAME-MODE.json` (the numbers, which is returned) and `.jsonl` (a line per question) to a run."""
    path = run / f"eval-{evaluation.name}-{evaluation.mode}.json"
    lines = [
        json.dumps(
            {
                "task": dataclasses.asdict(task),
                "metrics": rollout_metrics(task, rollout, evaluation.protocol),
                "rollout": dataclasses.asdict(rollout),
            },
            ensure_ascii=False,
        )
        for task, rollout in evaluation.records
    ]
    write_atomically(path.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))
    write_atomically(path, json.dumps(evaluation_to_dict(evaluation), indent=1) + "\n")
    return path


def _chosen_tasks(
    config: TrainConfig, tasks: str | Path | Sequence[Task] | None, split: atlas.Split | None
) -> tuple[Sequence[Task], str]:
    """The questions to play, and what they are called."""
    source = environment_source(config)
    if source and (tasks is None or isinstance(tasks, str)) and (tasks or config.tasks) == ATLAS:
        split = split or "test"
        return environment_tasks(source, ATLAS, split), split
    if tasks is None and config.tasks not in ATLAS_HOPS:
        setting = make_setting(without_judge(config))
        if split == "test":
            raise ConfigError(
                "split of a run on your own questions must be train or validation; got 'test'; name a file as tasks"
            )
        return (setting.train, "train") if split == "train" else (setting.validation, "validation")
    tasks = config.tasks if tasks is None else tasks
    if not isinstance(tasks, str | Path):
        if not tasks:
            raise InputError("tasks must be at least one; got none; give questions, or leave tasks out for the run's")
        return tasks, "tasks"
    hops = ATLAS_HOPS.get(str(tasks))
    if hops:
        split = split or "test"
        return atlas.tasks(split, hops=hops), split if hops == 1 else f"two-hop-{split}"
    if split:
        raise ConfigError(f"split must be left out where tasks are a file, all of which is played; got {split!r}")
    own = str(tasks) in (config.tasks, config.validation_tasks)
    columns = config.column_names if own else None
    found = load_tasks(tasks, columns=columns, split="test", answered=source is None)
    return found, source_name(str(tasks))


def source_name(source: str) -> str:
    """What a source of tasks is called in the name of a file."""
    name = source.removeprefix(HUB) if source.startswith(HUB) else Path(source).name
    return re.sub(r"[^\w.-]+", "-", re.sub(r"\.(jsonl?|parquet)(\.gz)?$", "", name)).strip("-.") or "tasks"


def _setting(config: TrainConfig, tasks: Sequence[Task]) -> Setting:
    """A configuration's tools and rewards with other questions."""
    config = dataclasses.replace(config, protocol=played_protocol(config))
    source = environment_source(config)
    return Setting(
        config=config,
        train=(),
        validation=tasks,
        tools={} if source else make_tools(config, tasks if any(task.answers for task in tasks) else ()),
        rewards=load_rewards(config.rewards) if config.rewards else {},
        source=source,
    )


def rollout_limits(config: TrainConfig, policy: Policy) -> Limits:
    """The budgets of a rollout of this policy."""
    return Limits(
        max_turn_tokens=config.max_turn_tokens,
        context=policy.context,
        max_turns=config.max_turns,
    )


def place(policy: Policy, config: TrainConfig) -> Policy:
    """The policy on the configuration's device and in its dtype; where there is no such device, on another.

    A small one on a processor is made quick, unless `micro_batch_tokens` is set.
    """
    device = config.device if is_offered(config.device) else "auto"
    placed(policy.model, device=device, dtype=config.dtype, recompute=config.gradient_checkpointing)
    if config.micro_batch_tokens is None:
        quicken(policy.model)
    return policy


def make_engine(policy: Policy, *, max_rows: int = 256) -> HFEngine:
    """The in-process engine over a policy. Its memory grows with the rollouts alive at once, `max_rows` at most."""
    return HFEngine(policy.model, stop_ids=policy.chat.stop_ids, max_rows=max_rows, max_context=policy.context)


def make_engines(policy: Policy, config: TrainConfig, *, max_rows: int = 256) -> list[PolicyEngine]:
    """As many engines as play at the same time: one per thread for a small policy, with `max_rows` in all.

    With a user's tools, and in environments from elsewhere, there is one engine, so that what is called inline is
    called from one thread alone. vLLM is one, too.
    """
    if config.engine == "vllm":
        return [
            VLLMEngine(
                policy.model,
                stop_ids=policy.chat.stop_ids,
                max_rows=max_rows,
                max_context=policy.context,
                memory_share=config.vllm_memory_share,
            )
        ]
    own = config.tools or config.environment
    count = 1 if own else parts_at_once(policy.model, config.threads or torch.get_num_threads())
    return [make_engine(policy, max_rows=-(-max_rows // count)) for _ in range(count)]


def spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """At most `count` tasks, evenly spaced over the whole list."""
    if len(tasks) <= count:
        return list(tasks)
    return [tasks[i * len(tasks) // count] for i in range(count)]


def check_prompts(setting: Setting, policy: Policy, limits: Limits) -> None:
    """Raises ConfigError where prompt and turns together cannot fit the policy's context.

    Of an environment from elsewhere the first tasks are looked at alone, since starting it may take long. Raises
    InputError where it does not start.
    """
    turns, chat = limits.max_turns, policy.chat
    replies = (turns - 1) * chat.empty_reply_length
    reserved = turns * limits.max_turn_tokens + replies
    tasks = (*setting.train, *setting.validation)
    for task in (*setting.train[:1], *setting.validation[:1]) if setting.source else tasks:
        messages = awaited(opening(setting, task))
        most = sum(len(m.content.encode()) for m in messages) + len(messages) * FRAME
        if chat.template is None and most + reserved <= limits.context:
            continue  # no text has more tokens than bytes
        length = len(chat.prompt_ids(messages))
        needed = length + turns * limits.max_turn_tokens + replies
        if needed > limits.context:
            raise ConfigError(
                f"prompt and turns must fit the policy's context of {limits.context} tokens; task {task.id!r} needs "
                f"{length} + {turns} x {limits.max_turn_tokens} + {replies} = {needed}; shorten the question, or "
                "lower max-turn-tokens or max-turns"
            )


async def opening(setting: Setting, task: Task) -> tuple[Message, ...]:
    """The first messages of a task."""
    environment = setting.environment(task)
    try:
        return await started(environment)
    except Exception as error:
        if setting.source is None:
            raise
        raise InputError(
            f"the environment {setting.source.name} must start; got {described(error)} for task {task.id!r}; mend it, "
            "or the task"
        ) from error
    finally:
        await closed(environment)
