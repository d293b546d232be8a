"""The training loop: rollouts, rewards, credit, update; again."""

import contextlib
import dataclasses
import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

from turnwise.batch import MicroBatch, Row, distinct_rows, micro_batches, rollout_row
from turnwise.config import TrainConfig
from turnwise.credit import ESTIMATORS, Credit, TurnTable, turn_table
from turnwise.errors import RunError
from turnwise.evaluation import (
    check_prompts,
    make_engine,
    mean_metrics,
    play,
    rollout_limits,
    spread,
)
from turnwise.loss import Ratio, policy_loss, rollout_mean_weights
from turnwise.policy import Policy, load_policy, token_logprobs
from turnwise.rollout import awaited, rollout_seed, run_groups
from turnwise.rundir import (
    append_lines,
    create_run,
    cut_lines,
    latest_checkpoint,
    load_optimizer,
    read_config,
    save_best,
    save_checkpoint,
    write_config,
)
from turnwise.setting import Setting, make_setting
from turnwise.types import Rollout, Task

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
    its newest checkpoint to the numbers that it would have reached without a stop; its own configuration holds, and
    only `steps` may be raised. Ctrl-C ends the run after the step under way, with a checkpoint.
    """
    config = dataclasses.replace(config, **options) if config else TrainConfig(**options)
    if resume:
        config = _resumed_config(config, options.get("steps"))
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
    with _interruptible() as interrupted:
        return run.play_out(display, interrupted)


def _resumed_config(config: TrainConfig, asked_steps: int | None) -> TrainConfig:
    saved = read_config(config.out)
    steps = asked_steps or (config.steps if config.steps != TrainConfig.steps else saved.steps)
    return dataclasses.replace(saved, out=config.out, steps=max(steps, saved.steps), threads=config.threads)


class _Run:
    """The state of a run in progress."""

    def __init__(self, config: TrainConfig, setting: Setting) -> None:
        self.config = config
        self.setting = setting
        self.policy = load_policy(config.policy)
        self.limits = rollout_limits(config, self.policy)
        check_prompts(setting, self.policy, self.limits)
        self.optimizer = torch.optim.AdamW(
            self.policy.model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=0.0,
        )
        self.reference = load_policy(config.policy) if config.kl_coef > 0 else None
        self.step = 0
        self.saved_step = 0
        self.best = -1.0
        self.validation: dict[str, float] = {}
        self.wall_s = 0.0
        self.engine = make_engine(self.policy)

    def restore(self) -> None:
        """Goes back to the newest checkpoint, or to the start where none was reached; drops what was logged since."""
        if not any((self.config.out / "checkpoints").glob("step-*")):
            self._cut_logs(after_step=-1)
            return
        folder, state = latest_checkpoint(self.config.out)
        self.policy = load_policy(folder)
        self.optimizer = torch.optim.AdamW(
            self.policy.model.parameters(),
            lr=self.config.learning_rate,
            betas=(0.9, self.config.adam_beta2),
            weight_decay=0.0,
        )
        load_optimizer(self.optimizer, folder)
        self.engine = make_engine(self.policy)
        self.step, self.best, self.wall_s = state["step"], state["best"], state["wall_s"]
        self.validation = state["validation"]
        self.saved_step = self.step
        self.engine.refresh(self.step)
        self._cut_logs(after_step=self.step)

    def _cut_logs(self, *, after_step: int) -> None:
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            cut_lines(self.config.out / name, after_step=after_step)

    def play_out(self, display: Display | None, interrupted: Callable[[], bool]) -> TrainResult:
        """Steps until the end or an interruption."""
        started = time.perf_counter() - self.wall_s
        if self.step == 0:
            self._validate(display)
        while self.step < self.config.steps and not interrupted():
            record, rollout_lines = self._train_step()
            self.step += 1
            self.wall_s = time.perf_counter() - started
            self._log(record, display, rollout_lines)
            if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                self._validate(display)
            if self.step % self.config.checkpoint_every == 0:
                self._checkpoint()
        self._checkpoint()
        return TrainResult(
            out=self.config.out,
            steps=self.step,
            finished=self.step >= self.config.steps,
            validation=self.validation,
        )

    def _train_step(self) -> tuple[dict[str, float], list[Record]]:
        config, start = self.config, time.perf_counter()
        tasks = step_tasks(self.setting.train, config, self.step)
        groups = awaited(
            run_groups(
                tasks,
                self.setting.environment,
                self.engine,
                self.policy.chat,
                group_size=config.group_size,
                limits=self.limits,
                temperature=config.temperature,
                seed=(config.seed, self.step),
            )
        )
        rolled = time.perf_counter()
        rollouts = [
            self.setting.scored(task, rollout) for task, group in zip(tasks, groups, strict=True) for rollout in group
        ]
        kept = [r for r in rollouts if r.stop != "error"]
        if not kept:
            raise RunError(f"rollouts must not all fail; all of step {self.step} did: {rollouts[0].error}")
        table = rollout_table(kept)
        credit = estimate(config, table)
        rows = training_rows(kept, table, credit)
        learning = update(self.policy, self.optimizer, rows, config, self.step, self.reference)
        self.engine.refresh(self.step + 1)
        ended = time.perf_counter()
        tokens = sum(r.num_tokens for r in kept)
        by_id = {task.id: task for task in tasks}
        metrics = {
            **mean_metrics([(by_id[r.task_id], r) for r in rollouts], config.protocol),
            **_reward_means(kept),
            **_credit_metrics(table, credit),
            **learning,
            "failed_rollouts": (len(rollouts) - len(kept)) / len(rollouts),
            "tokens": float(np.mean([r.num_tokens for r in kept])),
            "tokens_per_s": tokens / (ended - start),
            "rollout_s": rolled - start,
            "update_s": ended - rolled,
        }
        return metrics, _rollout_lines(self.step + 1, by_id, kept, table, credit, config)

    def _validate(self, display: Display | None) -> None:
        size = self.config.validation_size
        tasks = spread(self.setting.validation, size)
        pairs = play(tasks, self.setting, self.engine, self.policy.chat, limits=self.limits)
        self.validation = mean_metrics(pairs, self.config.protocol)
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
        append_lines(self.config.out / "rollouts.jsonl", rollout_lines)
        append_lines(self.config.out / "metrics.jsonl", [record])
        if display:
            display.show(record)

    def _checkpoint(self) -> None:
        if self.step == self.saved_step:
            return
        self.saved_step = self.step
        state = {"best": self.best, "wall_s": self.wall_s, "validation": self.validation}
        save_checkpoint(self.config.out, self.step, self.policy, self.optimizer, state)


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


def rollout_table(rollouts: Sequence[Rollout]) -> TurnTable:
    """The turn table of scored rollouts, with token counts and anchors.

    A turn's anchor is what the environment said last before it: equal observations are taken for equal states.
    """
    return turn_table(
        [r.group for r in rollouts],
        [r.turn_rewards for r in rollouts],
        [r.outcome_rewards for r in rollouts],
        tokens=[[len(turn.action_ids) for turn in r.turns] for r in rollouts],
        anchors=[[r.prompt_ids, *(turn.reply_ids for turn in r.turns[:-1])] for r in rollouts],
    )


def estimate(config: TrainConfig, table: TurnTable) -> Credit:
    """The configured estimator's credit."""
    discount = {"gamma": config.gamma}
    parameters = {"grpo-mr": discount, "turn-rloo": discount, "mt-grpo": {"alpha": config.alpha}}
    return ESTIMATORS[config.estimator](table, **parameters.get(config.estimator, {}))


def training_rows(rollouts: Sequence[Rollout], table: TurnTable, credit: Credit) -> list[tuple[int, Row]]:
    """Each rollout's group and its row."""
    by_rollout = np.split(credit.advantages, np.cumsum(np.bincount(table.rollout))[:-1])
    return [
        (r.group, rollout_row(r, advantages.tolist(), [True] * len(r.turns)))
        for r, advantages in zip(rollouts, by_rollout, strict=True)
    ]


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[tuple[int, Row]],
    config: TrainConfig,
    step: int,
    reference: Policy | None = None,
) -> dict[str, float]:
    """`passes` times `minibatches` optimiser steps over a step's rollouts; means of what they saw."""
    groups = sorted({group for group, _ in rows})
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    seen: list[dict[str, float]] = []
    for repeat in range(config.passes):
        order = np.random.default_rng(rollout_seed(config.seed, step, repeat)).permutation(len(groups))
        for part in np.array_split(order, config.minibatches):
            chosen = {groups[i] for i in part}
            minibatch = [row for group, row in rows if group in chosen]
            if minibatch:
                seen.append(_optimise(policy, optimizer, minibatch, config, reference))
    names = dict.fromkeys(name for s in seen for name in s)
    return {name: float(np.mean([s[name] for s in seen if name in s])) for name in names}


def _optimise(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    config: TrainConfig,
    reference: Policy | None,
) -> dict[str, float]:
    """One optimiser step. Rows without any credit have no gradient; without a KL term they are not computed.

    Entropy, clip fraction and shift are means over the computed rows, absent where there are none.
    """
    live = distinct_rows(row for row in rows if reference or np.any(row.advantages[row.loss]))
    sums: dict[str, float] = dict.fromkeys(("loss", "kl", "clip_fraction", "policy_shift", "entropy"), 0.0)
    weighed = 0.0
    for batch in micro_batches(live, max_tokens=config.micro_batch_tokens, pad_id=policy.chat.pad_id):
        for name, value in _backward(policy, batch, len(rows), config, reference).items():
            sums[name] += value
        weighed += float(batch.counts.sum()) / len(rows)
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    if not math.isfinite(norm):
        raise RunError(
            f"the gradient must be finite; its norm is {float(norm)}; lower --learning-rate, and --resume from the "
            "last checkpoint or start anew"
        )
    if live:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for name in ("entropy", "clip_fraction", "policy_shift"):
        mean = sums.pop(name)
        if live:
            sums[name] = mean / weighed
    if reference is None:
        del sums["kl"]
    return {**sums, "grad_norm": float(norm), "live_rollouts": weighed, "computed_rows": len(live) / len(rows)}


def loss_segments(batch: MicroBatch, ratio: Ratio) -> torch.Tensor:
    """Which ratio each token takes part in, (B, T): one number per turn, or per rollout."""
    rows = torch.arange(batch.num_rows)[:, None].expand_as(batch.action)
    if ratio == "sequence":
        return rows
    starts = batch.action & ~torch.nn.functional.pad(batch.action, (1, 0))[:, :-1]
    return rows * batch.action.shape[1] + starts.cumsum(1)


def _backward(
    policy: Policy, batch: MicroBatch, num_rows: int, config: TrainConfig, reference: Policy | None
) -> dict[str, float]:
    """Adds a micro-batch's gradient; its share of the step's sums."""
    logprobs, entropy = token_logprobs(policy.model, batch, batch.loss, temperature=config.temperature)
    weights = (batch.counts[:, None] * rollout_mean_weights(batch.loss, num_rows))[batch.loss]
    ref_logprobs = None
    if reference:
        with torch.no_grad():
            ref_logprobs, _ = token_logprobs(reference.model, batch, batch.loss, temperature=config.temperature)
    segments = None if config.ratio == "token" else loss_segments(batch, config.ratio)[batch.loss]
    parts = policy_loss(
        logprobs,
        batch.sampling_logprobs[batch.loss],
        batch.advantages[batch.loss],
        weights,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        ref_logprobs=ref_logprobs,
        kl_coef=config.kl_coef,
        segments=segments,
    )
    parts.loss.backward()
    return {
        "loss": float(parts.loss.detach()),
        "kl": float(parts.kl),
        "clip_fraction": float(parts.clipped),
        "policy_shift": float(parts.shift),
        "entropy": float((weights * entropy.detach()).sum()),
    }


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


def _credit_metrics(table: TurnTable, credit: Credit) -> dict[str, float]:
    size = np.abs(credit.advantages)
    live = np.bincount(table.group, weights=size)[np.unique(table.group)] > 1e-9
    found = {"dead_groups": float(1 - live.mean())}
    for k in range(min(8, int(table.index.max()) + 1)):
        found[f"abs_advantage/turn_{k + 1}"] = float(size[table.index == k].mean())
    return found


def _rollout_lines(
    step: int,
    by_id: dict[str, Task],
    rollouts: Sequence[Rollout],
    table: TurnTable,
    credit: Credit,
    config: TrainConfig,
) -> list[Record]:
    """The records of the step's first groups."""
    lines = []
    for i, rollout in enumerate(rollouts):
        if rollout.group >= config.log_groups:
            continue
        rows = table.rollout == i
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
            }
        )
    return lines


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
