"""The training loop: rollouts, rewards, credit, update; again."""

import contextlib
import dataclasses
import itertools
import json
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

from turnwise.ahead import Sampler
from turnwise.batch import Row
from turnwise.compute import update_flops
from turnwise.config import CRITIC_METHODS, TrainConfig
from turnwise.controls import learned_from
from turnwise.cores import parts_at_once
from turnwise.correction import corrected
from turnwise.credit import TOKEN_ESTIMATORS, sign_flips
from turnwise.crediting import Credited, credit_rollouts, has_signal
from turnwise.critic import Critic, make_critic
from turnwise.devices import SMALL, check_device, num_parameters
from turnwise.engine import PolicyEngine
from turnwise.errors import ConfigError, RunError
from turnwise.evaluation import (
    check_prompts,
    draw,
    make_engines,
    mean_metrics,
    place,
    play,
    rollout_limits,
    spread,
)
from turnwise.judge import is_judged, judge_metrics
from turnwise.learning import Skipped, update
from turnwise.lora import add_lora, is_adapted
from turnwise.memory import MemoryEstimate, check_memory, memory_estimate, rollout_lengths
from turnwise.policy import Policy, load_policy, named_folder
from turnwise.protocols import NATIVE
from turnwise.rollout import sampled_tokens, turns_once
from turnwise.rundir import (
    append_lines,
    create_run,
    cut_lines,
    drop_after,
    latest_checkpoint,
    load_critic,
    load_optimizer,
    load_sampler,
    missing_lines,
    read_config,
    read_lines,
    save_bad_batch,
    save_best,
    save_checkpoint,
    write_config,
)
from turnwise.setting import Setting, make_setting, played_protocol
from turnwise.trackers import check_tracker, tracking
from turnwise.types import Rollout, Task
from turnwise.watch import new_warnings

Record = dict[str, Any]


class Display(Protocol):
    """Where progress is shown."""

    def show(self, record: Record) -> None:
        """A line of metrics.jsonl has been written."""
        ...

    def say(self, text: str) -> None:
        """A line about the run as a whole."""
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
        run.start_engines()
        write_config(config.out, config)
    else:
        run.start_engines()
        create_run(config.out, config)
    if display and run.memory:
        display.say(run.memory.text())
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

    def say(self, text: str) -> None:
        """Says the line everywhere."""
        for display in self.displays:
            display.say(text)


def planned_memory(config: TrainConfig) -> MemoryEstimate:
    """What a run with this configuration would take, without starting it."""
    check_tracker(config.tracker)
    setting = make_setting(config)
    check_device(config.device)
    policy = start_policy(setting.config)
    check_prompts(setting, policy, rollout_limits(setting.config, policy))
    lengths = rollout_lengths(setting, policy)
    found = check_memory(policy.model, setting.config, lengths)
    return found or memory_estimate(policy.model, setting.config, lengths)


FAILING_STEPS = 5
"""Over how many steps the share of failed rollouts is taken."""
RESUMABLE = (
    "out",
    "steps",
    "token_budget",
    "threads",
    "device",
    "tracker",
    "checkpoint_every",
    "skip_limit",
    "max_failed_share",
)
"""The options that may change where a run goes on."""


def resumed_config(config: TrainConfig, *, given: Collection[str] = ()) -> TrainConfig:
    """The configuration of the run in `config.out`, with what may change of the options that were asked for.

    Asked for are those in `given` and those that are not at their defaults. A run may go on with more steps, a larger
    token budget, in another place, on other cores or another device, with another tracker, other checkpoints and
    another limit of skipped steps; its other options hold.
    Raises ConfigError for one that differs.
    """
    saved = read_config(config.out, plays=True)
    defaults = TrainConfig()
    fields = [field.name for field in dataclasses.fields(config)]
    asked = {n: getattr(config, n) for n in fields if n in given or getattr(config, n) != getattr(defaults, n)}
    if asked.get("protocol") == NATIVE:  # the run's own has the format's name
        asked["protocol"] = played_protocol(dataclasses.replace(saved, protocol=NATIVE))
    for name, value in asked.items():
        if name not in RESUMABLE and value != getattr(saved, name):
            raise ConfigError(
                f"a resumed run must keep its options; {name.replace('_', '-')} is {getattr(saved, name)!r} there; got "
                f"{value!r}; leave it out, or start a new run in another --out"
            )
    if asked.get("steps", saved.steps) < saved.steps:
        raise ConfigError(f"steps of a resumed run must be >= its own {saved.steps}; got {asked['steps']}; raise it")
    return dataclasses.replace(saved, **{name: asked[name] for name in RESUMABLE if name in asked})


JUDGED_BY = ("exact_match", "success", "environment_return")
"""By which metric of a validation the best checkpoint is chosen: the first that there is."""


def rating(validation: Mapping[str, float]) -> tuple[int, float]:
    """How good a validation is: what has an earlier metric of `JUDGED_BY` is better whatever the numbers."""
    for rank, name in enumerate(JUDGED_BY):
        if name in validation:
            return -rank, validation[name]
    return -len(JUDGED_BY), 0.0


def start_policy(config: TrainConfig) -> Policy:
    """The policy that a run begins with, with a fresh adapter where LoRA is asked for."""
    policy = load_policy(config.start)
    if is_adapted(policy.model):
        raise ConfigError(
            f"policy must be a plain checkpoint to start from; {config.start} is an adapter; make one of it: turnwise "
            f"export {config.start} --out FOLDER"
        )
    if config.lora_rank:
        folder, revision = named_folder(config.start)
        add_lora(
            policy.model,
            rank=config.lora_rank,
            alpha=config.lora_alpha or 2 * config.lora_rank,
            targets=config.lora_targets,
            seed=config.seed,
            base=config.start if revision else str(folder.resolve()),
            revision=revision,
        )
    return policy


class _Run:
    """The state of a run in progress."""

    def __init__(self, config: TrainConfig, setting: Setting) -> None:
        self.config = config
        self.setting = setting
        check_device(config.device)
        self.policy = start_policy(config)
        self.limits = rollout_limits(config, self.policy)
        check_prompts(setting, self.policy, self.limits)
        self.memory = check_memory(self.policy.model, config, rollout_lengths(setting, self.policy))
        place(self.policy, config)
        self.optimizer = self._optimizer()
        self.critic = self._critic()
        self.reference = self._reference()
        self.step = 0
        self.saved_step = 0
        self.best = rating({})
        self.validation: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.wall_s = 0.0
        self.sampled_tokens = 0
        self.failures: dict[str, int] = {}
        """Of the last step's rollouts, how many failed with which class of error."""
        self.drawn_tasks = 0
        self.skipped_in_a_row = 0
        """Optimiser steps, up to the last one."""
        self.unwritten: dict[str, list[Record]] = {"rollouts.jsonl": [], "metrics.jsonl": []}
        """Records that could not be written yet, by file."""
        self.is_between_steps = True
        """Whether the weights are those of the last whole step; an update that fails may leave them in between."""
        self.engines: Sequence[PolicyEngine] = ()
        self.sampler: Sampler[_Drawn] | None = None
        """Who draws the rollouts where that is not the policy itself."""
        self.sampled_with: Mapping[str, torch.Tensor] | None = None
        """The weights that draw the next step's rollouts, of the checkpoint that the run goes on from."""

    def start_engines(self) -> None:
        """Makes the engines, once, over the policy that the run goes on with: one of vLLM fills its share of a GPU."""
        self.engines = make_engines(self.policy, self.config)
        if self.config.ahead:
            self.sampler = Sampler(self.policy, self.config)
        if self.step:
            self._refresh(self.step)
        if self.sampler and self.sampled_with:
            self.sampler.follow(self.sampled_with, self.step - 1)
            self.sampled_with = None

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            self.policy.learned,
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=0.0,
        )

    def _reference(self) -> Policy | None:
        """What the policy is held to: its start, which a policy with an adapter is without it."""
        if self.config.kl_coef == 0:
            return None
        return self.policy if self.config.lora_rank else place(load_policy(self.config.start), self.config)

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
            drop_after(self.config.out, 0)
            self._cut_logs(after_step=-1)
            return
        folder, state = latest_checkpoint(self.config.out)
        drop_after(self.config.out, state["step"])
        self.policy = place(load_policy(folder, verified=True), self.config)
        if self.config.lora_rank:
            self.reference = self._reference()
        self.optimizer = self._optimizer()
        load_optimizer(self.optimizer, folder)
        self.critic = self._critic()
        if self.critic:
            load_critic(self.critic, folder)
        if self.config.ahead:
            self.sampled_with = load_sampler(folder)
        self.step, self.wall_s = state["step"], state["wall_s"]
        self.best = state.get("best_rank", 0), state["best"]  # earlier checkpoints have the number alone
        self.validation = state["validation"]
        self.sampled_tokens = state.get("sampled_tokens", 0)  # earlier checkpoints have no count, and no budget
        self.drawn_tasks = state.get("drawn_tasks", self.step * self.config.tasks_per_step)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.saved_step = self.step
        self._cut_logs(after_step=self.step)
        waiting: Mapping[str, list[Record]] = state.get("unwritten", {})
        self._write({name: missing_lines(self.config.out / name, records) for name, records in waiting.items()})

    def _refresh(self, version: int) -> None:
        for engine in self.engines:
            engine.refresh(version)

    def _cut_logs(self, *, after_step: int) -> None:
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            cut_lines(self.config.out / name, after_step=after_step)

    def _write(self, records: Mapping[str, Sequence[Record]]) -> None:
        """Adds records to files, after those that could not be written before; what fails is kept for later."""
        for name, new in records.items():
            self.unwritten[name] += new
        for name, waiting in self.unwritten.items():
            append_lines(self.config.out / name, waiting)
            waiting.clear()

    def _lacks_validation(self) -> bool:
        """Whether the step that the run stands at is to be validated, and was not."""
        if self.step and self.step % self.config.validate_every and not self._is_over():
            return False
        records = read_lines(self.config.out / "metrics.jsonl")
        return (self.step, "validation") not in {(r["step"], r["split"]) for r in records}

    def play_out(self, display: Display | None, interrupted: Callable[[], bool]) -> TrainResult:
        """Steps until the end or an interruption."""
        started = time.perf_counter() - self.wall_s
        records = read_lines(self.config.out / "metrics.jsonl")
        self.history = [record["metrics"] for record in records if record["split"] == "train"]
        try:
            with self._cores_shared():
                if self._lacks_validation():
                    self._validate(display)
                while not self._is_over() and not interrupted():
                    record, rollout_lines = self._train_step()
                    self.step += 1
                    self.is_between_steps = True
                    self.wall_s = time.perf_counter() - started
                    self._log(record, display, rollout_lines)
                    if self.step % self.config.validate_every == 0 or self._is_over():
                        self._validate(display)
                    self._check_skipped()
                    if self.step % self.checkpoint_every == 0:
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

    @contextlib.contextmanager
    def _cores_shared(self) -> Iterator[None]:
        """Within, torch leaves cores to a sampler that draws ahead; at the end the sampler stops."""
        if self.sampler is None:
            yield
            return
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(self.sampler.threads)
            yield
        finally:
            self.sampler.close()
            torch.set_num_threads(before)

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints: the option, or by the size of the policy."""
        return self.config.checkpoint_every or (1 if num_parameters(self.policy.model) < SMALL else 20)

    def _skip(self, skipped: Skipped | None) -> None:
        """Counts an optimiser step that was not taken, and writes its batch down; None is one that was taken."""
        if skipped is None:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        folder = save_bad_batch(
            self.config.out,
            self.step + 1,
            skipped.place,
            skipped.rows,
            {"fault": skipped.fault, "found": {name: str(value) for name, value in skipped.found.items()}},
        )
        kept = f"its batch is in {folder}" if folder else "batches of earlier ones are there to look at"
        warnings.warn(
            f"an optimiser step of step {self.step + 1} was skipped, as {skipped.fault}; {kept}; a lower "
            "--learning-rate or --max-grad-norm helps where training diverges",
            stacklevel=2,
        )

    def _check_skipped(self) -> None:
        """RunError after too many skipped optimiser steps in a row; the weights are those of before them."""
        if self.skipped_in_a_row >= self.config.skip_limit:
            raise RunError(
                f"optimiser steps must not be skipped {self.config.skip_limit} times in a row; the last "
                f"{self.skipped_in_a_row} up to step {self.step} were, as loss or gradient was not finite; see "
                f"{self.config.out / 'bad'}, and start anew with a lower --learning-rate; the last weights are whole, "
                "and --resume goes on from them"
            )

    def _is_over(self) -> bool:
        """Whether the steps are done or the budget of sampled tokens is spent."""
        return self._would_end(self.step, self.sampled_tokens)

    def _would_end(self, step: int, sampled: int) -> bool:
        budget = self.config.token_budget
        return step >= self.config.steps or (budget is not None and sampled >= budget)

    def _train_step(self) -> tuple[dict[str, float], list[Record]]:
        config, start = self.config, time.perf_counter()
        drawn = self._batch()
        rollouts = [rollout for group in drawn.played for _, rollout in group]
        rolled = time.perf_counter()
        kept = [r for group in drawn.kept for r in group]
        failures = _failures(rollouts)
        self._check_failures(rollouts, failures)
        sampled = self.sampled_tokens + sum(sampled_tokens([r for _, r in group]) for group in drawn.played)
        if self.sampler:
            self.is_between_steps = False
            self.sampler.follow(dict(self.policy.model.named_parameters()), self.step)
            if not self._would_end(self.step + 1, sampled):
                self.sampler.begin(self._drawing(self.step + 1, self.drawn_tasks + len(drawn.played)))
        kept = learned_from(kept, config, self.step)
        at_once = 1 if config.gradient_checkpointing else parts_at_once(self.policy.model, self._cores())
        credited = credit_rollouts(kept, config, self.critic, pad_id=self.policy.chat.pad_id, at_once=at_once)
        rows, mismatch = credited.rows, {}
        if config.sampler_correction != "none":
            rows, mismatch = corrected(self.policy, rows, config, at_once=at_once)
        learners = (self.reference, self.critic)
        self.is_between_steps = False
        learning = update(
            self.policy, self.optimizer, rows, config, self.step, *learners, at_once=at_once, skipped=self._skip
        )
        self._refresh(self.step + 1)
        ended = time.perf_counter()
        finished = [r for r in rollouts if _is_usable(r)]
        tokens = sum(r.num_tokens for r in finished)
        self.sampled_tokens = sampled
        self.drawn_tasks += len(drawn.played)
        pairs = [pair for group in drawn.played for pair in group]
        by_id = {task.id: task for task, _ in pairs}
        metrics = {
            **mean_metrics(pairs, config.tag_protocol),
            **judge_metrics(pairs),
            **_reward_means(finished),
            **_credit_metrics(credited),
            **mismatch,
            **{name: value for name, value in learning.items() if name != "positions"},
            **(drawn.metrics() if config.dynamic_sampling else {}),
            **({"updates_behind": _updates_behind(self.step, finished)} if config.ahead else {}),
            "turn_tokens": _turn_tokens(finished),
            "cut_unpaid": float(np.mean([_is_cut_unpaid(r) for r in finished])),
            "all_turns": float(np.mean([len(r.turns) == config.max_turns for r in finished])),
            "failed_rollouts": sum(r.stop == "error" for r in rollouts) / len(rollouts),
            "tokens": float(np.mean([r.num_tokens for r in finished])),
            "sampled_tokens": float(self.sampled_tokens),
            "environment_calls": float(_environment_calls(drawn.played, config)),
            "update_flops": update_flops(self.policy, self.critic, learning["positions"], config, self.step),
            "tokens_per_s": tokens / (ended - start),
            "rollout_s": drawn.seconds,
            "update_s": ended - rolled,
        }
        self.failures = failures
        lines = _rollout_lines(self.step + 1, by_id, kept, credited, config)
        return metrics, lines + _failed_lines(self.step + 1, drawn, config)

    def _check_failures(self, rollouts: Sequence[Rollout], failures: Mapping[str, int]) -> None:
        """RunError where nothing is left to learn from, or where more rollouts fail than the run may lose."""
        recent = [_left_out(metrics) for metrics in self.history[1 - FAILING_STEPS :]]
        recent.append(sum(failures.values()) / len(rollouts))
        share, most = sum(recent) / len(recent), self.config.max_failed_share
        if recent[-1] < 1 and share <= most:
            return
        what, number = next(iter(failures.items()))
        raise RunError(
            f"rollouts must not fail more often than max-failed-share, {most:.0%}; of the last {len(recent)} steps' "
            f"{share:.0%} did, of step {self.step}'s {recent[-1]:.0%}, most often with {what} ({number}): "
            f"{_first_failure(rollouts, what)}; mend it, then go on with --resume"
        )

    def _cores(self) -> int:
        """How many cores the update may use."""
        if self.sampler:
            return self.sampler.cores
        return self.config.threads or torch.get_num_threads()

    def _batch(self) -> "_Drawn":
        """The step's rollouts: drawn now, or ahead, while the step before it was learned from."""
        draw = self._drawing(self.step, self.drawn_tasks)
        return self.sampler.take(draw) if self.sampler else draw()

    def _drawing(self, step: int, first: int) -> "Callable[[], _Drawn]":
        """Draws a step's rollouts, of the tasks from place `first` of the order on."""
        engines = self.sampler.engines if self.sampler else self.engines
        return lambda: self._drawn(step, first, engines)

    def _drawn(self, step: int, first: int, engines: Sequence[PolicyEngine]) -> "_Drawn":
        """A step's rollouts. With dynamic sampling, groups without a signal make room for further tasks.

        What is still missing is drawn in each extra round; when the rounds are spent, groups without a signal fill the
        step up, the first ones first.
        """
        config, start = self.config, time.perf_counter()
        played: list[list[tuple[Task, Rollout]]] = []
        live: list[int] = []
        rounds = 0
        while True:
            missing = config.tasks_per_step - len(live)
            played += self._round(step, first + len(played), missing, rounds, engines)
            live = [i for i, group in enumerate(played) if not config.dynamic_sampling or self._is_live(group)]
            if len(live) == config.tasks_per_step or rounds == config.dynamic_sampling:
                break
            rounds += 1
        dead = [i for i in range(len(played)) if i not in set(live)]
        chosen = sorted([*live, *dead[: config.tasks_per_step - len(live)]])
        kept = [
            [dataclasses.replace(r, group=number) for _, r in played[i] if _is_usable(r)]
            for number, i in enumerate(chosen)
        ]
        return _Drawn(played=played, kept=kept, rounds=rounds, seconds=time.perf_counter() - start)

    def _round(
        self, step: int, first: int, count: int, number: int, engines: Sequence[PolicyEngine]
    ) -> list[list[tuple[Task, Rollout]]]:
        """Scored rollouts of the `count` tasks from place `first` on; the draws of a round are its own."""
        config = self.config
        tasks = ordered_tasks(self.setting.train, config.seed, first, count)
        groups = draw(
            tasks,
            dataclasses.replace(self.setting, tool_failures=config.tool_failures),
            engines,
            self.policy.chat,
            limits=self.limits,
            temperature=config.temperature,
            seed=(config.seed, step, number) if number else (config.seed, step),
            group_size=config.group_size,
            branches=config.branches,
        )
        played = [(task, rollout) for task, group in zip(tasks, groups, strict=True) for rollout in group]
        scored = iter(self.setting.all_scored(played))
        return [[(task, next(scored)) for _ in group] for task, group in zip(tasks, groups, strict=True)]

    def _is_live(self, group: Sequence[tuple[Task, Rollout]]) -> bool:
        usable = [r for _, r in group if _is_usable(r)]
        return bool(usable) and has_signal(usable, self.config)

    def _validate(self, display: Display | None) -> None:
        """Plays with the weights of the last update; after what is drawn ahead, as a user's tools are called alone."""
        if self.sampler:
            self.sampler.rest()
        size = self.config.validation_size
        tasks = spread(self.setting.validation, size)
        pairs = play(tasks, self.setting, self.engines, self.policy.chat, limits=self.limits)
        self.validation = {**mean_metrics(pairs, self.config.tag_protocol), **judge_metrics(pairs)}
        found = rating(self.validation)
        if found > self.best:
            save_best(self.config.out, self.policy)
            self.best = found
        self._log(self.validation, display, split="validation")

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
            said = new_warnings(
                self.history,
                max_turns=self.config.max_turns,
                critic_warmup_steps=warmup,
                weights=self.config.weights,
            )
            record |= {"warnings": said} if said else {}
            record |= {"failures": self.failures} if self.failures else {}
        self._write({"rollouts.jsonl": rollout_lines, "metrics.jsonl": [record]})
        if display:
            display.show(record)

    def _checkpoint(self) -> None:
        if self.step == self.saved_step:
            return
        state = {
            "best_rank": self.best[0],
            "best": self.best[1],
            "wall_s": self.wall_s,
            "validation": self.validation,
            "sampled_tokens": self.sampled_tokens,
            "drawn_tasks": self.drawn_tasks,
            "skipped_in_a_row": self.skipped_in_a_row,
            "unwritten": self.unwritten,
        }
        sampler = self.sampler.weights if self.sampler else None
        save_checkpoint(self.config.out, self.step, self.policy, self.optimizer, state, self.critic, sampler)
        self.saved_step = self.step


# --- the parts of a step ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """What a step has drawn."""

    played: list[list[tuple[Task, Rollout]]]
    """Every group, in the order of the tasks."""
    kept: list[list[Rollout]]
    """The groups that the step learns from, numbered anew, without the rollouts that failed."""
    rounds: int
    seconds: float
    """How long drawing and scoring took."""

    def metrics(self) -> dict[str, float]:
        """How much was drawn beside what the step learns from."""
        return {"dropped_groups": float(len(self.played) - len(self.kept)), "extra_rounds": float(self.rounds)}


def _environment_calls(played: Sequence[Sequence[tuple[Task, Rollout]]], config: TrainConfig) -> int:
    """Tool calls that were answered, with an error too; messages to an environment that has no calls of its own."""
    turns = [turn for group in played for turn in turns_once([r for _, r in group])]
    return sum(len(turn.results) for turn in turns) if config.tag_protocol else len(turns)


def _updates_behind(step: int, rollouts: Sequence[Rollout]) -> float:
    """How many steps older the weights are that drew a step's rollouts than those that it begins with."""
    return float(np.mean([step - rollout.policy_version for rollout in rollouts]))


def _is_usable(rollout: Rollout) -> bool:
    """Whether neither the environment nor the judge failed."""
    return rollout.stop != "error" and is_judged(rollout)


def _failures(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """How many rollouts failed with which class of error, the commonest first."""
    return dict(Counter(_failure(r)[0] for r in rollouts if not _is_usable(r)).most_common())


def _failure(rollout: Rollout) -> tuple[str, str]:
    """The class of what made a rollout unusable, and what was said of it."""
    if rollout.stop != "error":
        return "Judge", str(rollout.judgement and rollout.judgement.error)
    kind, _, text = (rollout.error or "").partition(": ")
    return kind, text


def _first_failure(rollouts: Sequence[Rollout], kind: str) -> str:
    found = (_failure(r) for r in rollouts if not _is_usable(r))
    return next(text for name, text in found if name == kind)[:300]


def _left_out(metrics: Mapping[str, float]) -> float:
    """The share of a step's rollouts that failed, or that the judge did not score."""
    failed, absent = metrics.get("failed_rollouts", 0.0), metrics.get("judge/absent", 0.0)
    asked = absent + metrics.get("judge/judged", 0.0)
    return failed + ((1 - failed) * absent / asked if asked else 0.0)


def ordered_tasks(tasks: Sequence[Task], seed: int, first: int, count: int) -> list[Task]:
    """`count` questions from place `first` on, in an order that is shuffled anew for every pass over them.

    A function of the seed and the place alone, so that every method sees the same questions.
    """
    chosen = []
    for epoch, block in itertools.groupby(range(first, first + count), lambda p: p // len(tasks)):
        order = np.random.default_rng([seed, epoch]).permutation(len(tasks))
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


def _turn_tokens(rollouts: Sequence[Rollout]) -> float:
    """The mean number of sampled tokens in a turn."""
    return float(np.mean([len(turn.action_ids) for r in rollouts for turn in r.turns]))


def _is_cut_unpaid(rollout: Rollout) -> bool:
    """Whether a budget cut the rollout off and its outcome paid nothing."""
    return not rollout.terminated and sum(rollout.outcome_rewards.values()) <= 0


def _credit_metrics(credited: Credited) -> dict[str, float]:
    table, size = credited.table, np.abs(credited.credit.advantages)
    live = np.bincount(table.group, weights=size)[np.unique(table.group)] > 1e-9
    found = {"dead_groups": float(1 - live.mean())}
    for k in range(min(8, int(table.index.max()) + 1)):
        found[f"abs_advantage/turn_{k + 1}"] = float(size[table.index == k].mean())
    flips = sign_flips(table, credited.credit.advantages)
    return {**found, **({} if flips is None else {"sign_flips": flips}), **credited.metrics}


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
        lines.append(
            {
                **_line_head(step, by_id[rollout.task_id], rollout),
                "advantages": credit.advantages[rows].tolist(),
                "baselines": {name: s.baseline[rows].tolist() for name, s in credit.streams.items()},
                "loss_mask": [True] * len(rollout.turns),
                **_by_token(credited.rows[i][1], config),
            }
        )
    return lines


def _line_head(step: int, task: Task, rollout: Rollout) -> Record:
    """What every record of a rollout begins with."""
    return {
        "step": step,
        "split": "train",
        "group": rollout.group,
        "task": {"id": task.id, "question": task.question, "answers": list(task.answers), "kind": task.kind},
        "rollout": json.loads(rollout.to_json()),
    }


def _failed_lines(step: int, drawn: _Drawn, config: TrainConfig) -> list[Record]:
    """The records of rollouts that failed in the step's first groups: without credit."""
    return [
        {
            **_line_head(step, task, rollout),
            "advantages": None,
            "baselines": {},
            "loss_mask": [False] * len(rollout.turns),
        }
        for group in drawn.played[: config.log_groups]
        for task, rollout in group
        if rollout.stop == "error"
    ]


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
