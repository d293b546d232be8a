"""The training loop: rollouts, rewards, credit, update; again."""

import contextlib
import dataclasses
import itertools
import json
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

from turnwise.batch import Row
from turnwise.config import CRITIC_METHODS, TrainConfig
from turnwise.cores import parts_at_once
from turnwise.credit import (
    TOKEN_ESTIMATORS,
)
from turnwise.crediting import Credited, credit_rollouts
from turnwise.critic import Critic, make_critic
from turnwise.errors import ConfigError, RunError
from turnwise.evaluation import (
    check_prompts,
    draw,
    make_engines,
    mean_metrics,
    play,
    rollout_limits,
    spread,
)
from turnwise.judge import is_judged, judge_metrics
from turnwise.learning import update
from turnwise.policy import load_policy
from turnwise.rollout import sampled_tokens
from turnwise.rundir import (
    append_lines,
    create_run,
    cut_lines,
    latest_checkpoint,
    load_critic,
    load_optimizer,
    read_config,
    read_lines,
    save_best,
    save_checkpoint,
    write_config,
)
from turnwise.setting import Setting, make_setting
from turnwise.trackers import check_tracker, tracking
from turnwise.types import Rollout, Task
from turnwise.watch import new_warnings

Record = dict[str, Any]


class Display(Protocol):
    """Where progress is shown."""

    def show(self, record: Record) -> None:
        """A line of metrics.jsonl has been written."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a run is, and how far it came."""

    out: Path
    steps: int
    finished: bool
    """False where the run was interrupted; `resume=True` continues it."""
    validation: dict[str, float]
    """The metrics of the last validation."""


def train(
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    display: Display | None = None,
    **options: Any,
) -> TrainResult:
    """Trains a policy and leaves a run directory.

    Options are `TrainConfig`'s fields, given as a record or as keywords. With `resume`, the run in `out` goes on from
    its newest checkpoint to the numbers that it would have reached without a stop, as `resumed_config` says. Ctrl-C
    ends the run after the step under way, with a checkpoint.
    """
    config = dataclasses.replace(config, **options) if config else TrainConfig(**options)
    if resume:
        config = resumed_config(config, given=options)
    check_tracker(config.tracker)
    if config.threads:
        torch.set_num_threads(config.threads)
    setting = make_setting(config)
    config = setting.config
    run = _Run(config, setting)
    if resume:
        run.restore()
        write_config(config.out, config)
    else:
        create_run(config.out, config)
    with tracking(config, after=run.step if resume else None) as tracker, _interruptible() as interrupted:
        return run.play_out(_Displays(tracker, display), interrupted)


class _Displays:
    """Several displays as one; None is none."""

    def __init__(self, *displays: Display | None) -> None:
        self.displays = [display for display in displays if display]

    def show(self, record: Record) -> None:
        """Shows the record everywhere."""
        for display in self.displays:
            display.show(record)


RESUMABLE = ("out", "steps", "token_budget", "threads", "tracker")
"""The options that may change where a run goes on."""


def resumed_config(config: TrainConfig, *, given: Collection[str] = ()) -> TrainConfig:
    """The configuration of the run in `config.out`, with what may change of the options that were asked for.

    Asked for are those in `given` and those that are not at their defaults. A run may go on with more steps, a larger
    token budget, in another place, on other cores, and with another tracker; its other options hold. Raises
    ConfigError for one that differs.
    """
    saved = read_config(config.out)
    defaults = TrainConfig()
    fields = [field.name for field in dataclasses.fields(config)]
    asked = {n: getattr(config, n) for n in fields if n in given or getattr(config, n) != getattr(defaults, n)}
    for name, value in asked.items():
        if name not in RESUMABLE and value != getattr(saved, name):
            raise ConfigError(
                f"a resumed run must keep its options; {name.replace('_', '-')} is {getattr(saved, name)!r} there; got "
                f"{value!r}; leave it out, or start a new run in another --out"
            )
    if asked.get("steps", saved.steps) < saved.steps:
        raise ConfigError(f"steps of a resumed run must be >= its own {saved.steps}; got {asked['steps']}; raise it")
    return dataclasses.replace(saved, **{name: asked[name] for name in RESUMABLE if name in asked})


class _Run:
    """The state of a run in progress."""

    def __init__(self, config: TrainConfig, setting: Setting) -> None:
        self.config = config
        self.setting = setting
        self.policy = load_policy(config.start)
        self.limits = rollout_limits(config, self.policy)
        check_prompts(setting, self.policy, self.limits)
        self.optimizer = self._optimizer()
        self.critic = self._critic()
        self.reference = load_policy(config.start) if config.kl_coef > 0 else None
        self.step = 0
        self.saved_step = 0
        self.best = -1.0
        self.validation: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.wall_s = 0.0
        self.sampled_tokens = 0
        self.is_between_steps = True
        """Whether the weights are those of the last whole step; an update that fails may leave them in between."""
        self.engines = make_engines(self.policy, self.config)

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            self.policy.model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=0.0,
        )

    def _critic(self) -> Critic | None:
        config = self.config
        if config.estimator not in CRITIC_METHODS:
            return None
        return make_critic(
            self.policy,
            config.critic,
            heads=2 if config.estimator == "vetta" else 1,
            learning_rate=config.critic_learning_rate,
            adam_beta2=config.adam_beta2,
        )

    def restore(self) -> None:
        """Goes back to the newest checkpoint, or to the start where none was reached; drops what was logged since."""
        if not any((self.config.out / "checkpoints").glob("step-*")):
            self._cut_logs(after_step=-1)
            return
        folder, state = latest_checkpoint(self.config.out)
        self.policy = load_policy(folder)
        self.optimizer = self._optimizer()
        load_optimizer(self.optimizer, folder)
        self.critic = self._critic()
        if self.critic:
            load_critic(self.critic, folder)
        self.engines = make_engines(self.policy, self.config)
        self.step, self.best, self.wall_s = state["step"], state["best"], state["wall_s"]
        self.validation = state["validation"]
        self.sampled_tokens = state.get("sampled_tokens", 0)  # earlier checkpoints have no count, and no budget
        self.saved_step = self.step
        self._refresh(self.step)
        self._cut_logs(after_step=self.step)

    def _refresh(self, version: int) -> None:
        for engine in self.engines:
            engine.refresh(version)

    def _cut_logs(self, *, after_step: int) -> None:
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            cut_lines(self.config.out / name, after_step=after_step)
        records = read_lines(self.config.out / "metrics.jsonl")
        self.history = [record["metrics"] for record in records if record["split"] == "train"]

    def play_out(self, display: Display | None, interrupted: Callable[[], bool]) -> TrainResult:
        """Steps until the end or an interruption."""
        started = time.perf_counter() - self.wall_s
        try:
            if self.step == 0:
                self._validate(display)
            while not self._is_over() and not interrupted():
                record, rollout_lines = self._train_step()
                self.step += 1
                self.is_between_steps = True
                self.wall_s = time.perf_counter() - started
                self._log(record, display, rollout_lines)
                if self.step % self.config.validate_every == 0 or self._is_over():
                    self._validate(display)
                if self.step % self.config.checkpoint_every == 0:
                    self._checkpoint()
        except BaseException:
            if self.is_between_steps:
                with contextlib.suppress(RunError):  # what went wrong first is what is told
                    self._checkpoint()
            raise
        self._checkpoint()
        return TrainResult(
            out=self.config.out,
            steps=self.step,
            finished=self._is_over(),
            validation=self.validation,
        )

    def _is_over(self) -> bool:
        """Whether the steps are done or the budget of sampled tokens is spent."""
        budget = self.config.token_budget
        return self.step >= self.config.steps or (budget is not None and self.sampled_tokens >= budget)

    def _train_step(self) -> tuple[dict[str, float], list[Record]]:
        config, start = self.config, time.perf_counter()
        tasks = step_tasks(self.setting.train, config, self.step)
        groups = draw(
            tasks,
            self.setting,
            self.engines,
            self.policy.chat,
            limits=self.limits,
            temperature=config.temperature,
            seed=(config.seed, self.step),
            group_size=config.group_size,
            branches=config.branches,
        )
        played = [(task, rollout) for task, group in zip(tasks, groups, strict=True) for rollout in group]
        rollouts = self.setting.all_scored(played)
        rolled = time.perf_counter()
        kept = [r for r in rollouts if r.stop != "error" and is_judged(r)]
        if not kept:
            raise RunError(f"rollouts must not all fail; all of step {self.step} did: {rollouts[0].error}")
        at_once = parts_at_once(self.policy.model, config.threads or torch.get_num_threads())
        credited = credit_rollouts(kept, config, self.critic, pad_id=self.policy.chat.pad_id, at_once=at_once)
        learners = (self.reference, self.critic)
        self.is_between_steps = False
        learning = update(self.policy, self.optimizer, credited.rows, config, self.step, *learners, at_once=at_once)
        self._refresh(self.step + 1)
        ended = time.perf_counter()
        tokens = sum(r.num_tokens for r in kept)
        self.sampled_tokens += sampled_tokens(rollouts)
        by_id = {task.id: task for task in tasks}
        pairs = [(by_id[r.task_id], r) for r in rollouts]
        metrics = {
            **mean_metrics(pairs, config.protocol),
            **judge_metrics(pairs),
            **_reward_means(kept),
            **_credit_metrics(credited),
            **learning,
            "all_turns": float(np.mean([len(r.turns) == config.max_turns for r in kept])),
            "failed_rollouts": sum(r.stop == "error" for r in rollouts) / len(rollouts),
            "tokens": float(np.mean([r.num_tokens for r in kept])),
            "sampled_tokens": float(self.sampled_tokens),
            "tokens_per_s": tokens / (ended - start),
            "rollout_s": rolled - start,
            "update_s": ended - rolled,
        }
        return metrics, _rollout_lines(self.step + 1, by_id, kept, credited, config)

    def _validate(self, display: Display | None) -> None:
        size = self.config.validation_size
        tasks = spread(self.setting.validation, size)
        pairs = play(tasks, self.setting, self.engines, self.policy.chat, limits=self.limits)
        self.validation = {**mean_metrics(pairs, self.config.protocol), **judge_metrics(pairs)}
        self._log(self.validation, display, split="validation")
        if self.validation.get("exact_match", -1.0) > self.best:
            self.best = self.validation["exact_match"]
            save_best(self.config.out, self.policy)

    def _log(
        self,
        metrics: dict[str, float],
        display: Display | None,
        rollout_lines: Sequence[Record] = (),
        split: str = "train",
    ) -> None:
        record = {"step": self.step, "split": split, "wall_s": round(self.wall_s, 3), "metrics": metrics}
        if split == "train":
            self.history.append(metrics)
            warmup = self.config.critic_warmup_steps
            said = new_warnings(self.history, max_turns=self.config.max_turns, critic_warmup_steps=warmup)
            record |= {"warnings": said} if said else {}
        append_lines(self.config.out / "rollouts.jsonl", rollout_lines)
        append_lines(self.config.out / "metrics.jsonl", [record])
        if display:
            display.show(record)

    def _checkpoint(self) -> None:
        if self.step == self.saved_step:
            return
        self.saved_step = self.step
        state = {
            "best": self.best,
            "wall_s": self.wall_s,
            "validation": self.validation,
            "sampled_tokens": self.sampled_tokens,
        }
        save_checkpoint(self.config.out, self.step, self.policy, self.optimizer, state, self.critic)


# --- the parts of a step ----------------------------------------------------------------------------


def step_tasks(tasks: Sequence[Task], config: TrainConfig, step: int) -> list[Task]:
    """A step's questions: the next ones in an order that is shuffled anew for every pass over them.

    A function of the seed and the step alone, so that every method sees the same questions.
    """
    positions = range(step * config.tasks_per_step, (step + 1) * config.tasks_per_step)
    chosen = []
    for epoch, block in itertools.groupby(positions, lambda p: p // len(tasks)):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(tasks))
        chosen += [tasks[order[p % len(tasks)]] for p in block]
    return chosen


# --- what is logged ---------------------------------------------------------------------------------


def _reward_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Each component's mean over rollouts (turns of a rollout summed), and the whole return's."""
    names = dict.fromkeys(n for r in rollouts for part in (*r.turn_rewards, r.outcome_rewards) for n in part)
    totals = {
        name: [sum(turn.get(name, 0.0) for turn in r.turn_rewards) + r.outcome_rewards.get(name, 0.0) for r in rollouts]
        for name in names
    }
    means = {f"reward/{name}": float(np.mean(values)) for name, values in totals.items()}
    return {**means, "return": sum(means.values())}


def _credit_metrics(credited: Credited) -> dict[str, float]:
    table, size = credited.table, np.abs(credited.credit.advantages)
    live = np.bincount(table.group, weights=size)[np.unique(table.group)] > 1e-9
    found = {"dead_groups": float(1 - live.mean())}
    for k in range(min(8, int(table.index.max()) + 1)):
        found[f"abs_advantage/turn_{k + 1}"] = float(size[table.index == k].mean())
    return {**found, **credited.metrics}


def _rollout_lines(
    step: int,
    by_id: dict[str, Task],
    rollouts: Sequence[Rollout],
    credited: Credited,
    config: TrainConfig,
) -> list[Record]:
    """The records of the step's first groups."""
    lines, credit = [], credited.credit
    for i, rollout in enumerate(rollouts):
        if rollout.group >= config.log_groups:
            continue
        rows = credited.table.rollout == i
        task = by_id[rollout.task_id]
        lines.append(
            {
                "step": step,
                "split": "train",
                "group": rollout.group,
                "task": {
                    "id": task.id,
                    "question": task.question,
                    "answers": list(task.answers),
                    "kind": task.kind,
                },
                "rollout": json.loads(rollout.to_json()),
                "advantages": credit.advantages[rows].tolist(),
                "baselines": {name: s.baseline[rows].tolist() for name, s in credit.streams.items()},
                "loss_mask": [True] * len(rollout.turns),
                **_by_token(credited.rows[i][1], config),
            }
        )
    return lines


def _by_token(row: Row, config: TrainConfig) -> Record:
    """Advantages and values of the sampled tokens, of a method that gives each its own."""
    if config.estimator not in TOKEN_ESTIMATORS:
        return {}
    assert row.values is not None, "a method of tokens has a critic"
    columns = {"token_advantages": row.advantages[row.action], "token_values": row.values[row.action, 0]}
    return {name: [round(float(x), 5) for x in column] for name, column in columns.items()}


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C or a termination signal asks the loop to stop after its step; a second one stops at once."""
    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals stay the caller's
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
