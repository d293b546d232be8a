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

from turnwise.batch import Row, on_sampled, rollout_row
from turnwise.config import CRITIC_METHODS, DISCOUNTED, TrainConfig
from turnwise.cores import parts_at_once
from turnwise.credit import (
    ESTIMATORS,
    TOKEN_ESTIMATORS,
    Credit,
    Stream,
    TokenTable,
    TurnTable,
    broadcast,
    leaf_weights,
    token_table,
    turn_ppo,
    turn_table,
    whiten_tokens,
)
from turnwise.critic import Critic, make_critic, step_values
from turnwise.errors import ConfigError, InputError, RunError
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
from turnwise.rewards import JUDGED
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


RESUMABLE = ("out", "steps", "token_budget", "threads")
"""The options that may change where a run goes on."""


def resumed_config(config: TrainConfig, *, given: Collection[str] = ()) -> TrainConfig:
    """The configuration of the run in `config.out`, with what may change of the options that were asked for.

    Asked for are those in `given` and those that are not at their defaults. A run may go on with more steps, a larger
    token budget, in another place, and on other cores; its other options hold. Raises ConfigError for one that differs.
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


def rollout_table(rollouts: Sequence[Rollout]) -> TurnTable:
    """The turn table of scored rollouts, with token counts and anchors, and with nodes where they are leaves of trees.

    A turn's anchor is what the environment said last before it: equal observations are taken for equal states.
    """
    return turn_table(
        [r.group for r in rollouts],
        [r.turn_rewards for r in rollouts],
        [r.outcome_rewards for r in rollouts],
        tokens=[[len(turn.action_ids) for turn in r.turns] for r in rollouts],
        anchors=[[r.prompt_ids, *(turn.reply_ids for turn in r.turns[:-1])] for r in rollouts],
        nodes=[[(r.group, node) for node in r.nodes] for r in rollouts] if any(r.nodes for r in rollouts) else None,
    )


def estimate(config: TrainConfig, table: TurnTable) -> Credit:
    """The credit of an estimator that needs no critic. Raises InputError where the method cannot take the rewards."""
    takes_alpha = config.estimator in ("mt-grpo", "mt-grpo-tree")
    parameters = _discounts(config) | ({"alpha": config.alpha} if takes_alpha else {})
    try:
        return ESTIMATORS[config.estimator](table, **parameters)
    except ValueError as error:  # such as a user's turn reward that differs between rollouts that share the turn
        raise InputError(f"the step's rewards must suit {config.estimator}: {error}") from error


def _discounts(config: TrainConfig) -> dict[str, float]:
    """Those that were given, for a method that takes them."""
    given = {"gamma": config.gamma, "lam": config.lam} if config.estimator in DISCOUNTED else {}
    return {name: value for name, value in given.items() if value is not None}


def training_rows(rollouts: Sequence[Rollout], table: TurnTable, credit: Credit) -> list[tuple[int, Row]]:
    """Each rollout's group and its row; leaves of trees count by `leaf_weights`, other rollouts alike."""
    by_rollout = np.split(credit.advantages, np.cumsum(np.bincount(table.rollout))[:-1])
    shares = np.ones(len(rollouts)) if table.node is None else leaf_weights(table)
    return [
        (r.group, rollout_row(r, advantages.tolist(), [True] * len(r.turns), share=float(share)))
        for r, advantages, share in zip(rollouts, by_rollout, shares, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Credited:
    """A step's credit: what the update learns from, and what is told of it."""

    table: TurnTable
    credit: Credit
    """Per turn; of a method with a critic the means over each turn's tokens, and the values as a stream."""
    rows: list[tuple[int, Row]]
    """Each rollout's group and its row."""
    metrics: dict[str, float]
    """What is told of the critic."""


def credit_rollouts(
    rollouts: Sequence[Rollout],
    config: TrainConfig,
    critic: Critic | None = None,
    *,
    pad_id: int = 0,
    at_once: int = 1,
) -> Credited:
    """The configured method's credit for scored rollouts."""
    if critic is None:
        table = rollout_table(rollouts)
        credit = estimate(config, table)
        return Credited(table=table, credit=credit, rows=training_rows(rollouts, table, credit), metrics={})
    rows = [rollout_row(r, [0.0] * len(r.turns), [True] * len(r.turns)) for r in rollouts]
    cut = [r.stop == "max_tokens" for r in rollouts]
    values, after = step_values(critic, rows, cut, max_tokens=config.micro_batch_tokens, pad_id=pad_id, at_once=at_once)
    tokens = critic_table(rollouts, values, after, at_end=config.estimator in PAID_AT_END)
    found = critic_credit(config, tokens, np.concatenate(values).astype(float))
    bounds = np.cumsum([len(own) for own in values])[:-1]
    parts = zip(rollouts, rows, values, *(np.split(x, bounds) for x in (found.advantages, found.returns)), strict=True)
    return Credited(
        table=tokens.turns,
        credit=found.turns,
        rows=[
            (
                rollout.group,
                dataclasses.replace(
                    row,
                    advantages=on_sampled(row, advantages),
                    values=on_sampled(row, own),
                    returns=on_sampled(row, returns, fill=np.nan),
                ),
            )
            for rollout, row, own, advantages, returns in parts
        ],
        metrics={**found.metrics, "bootstrapped": float(np.mean(cut))},
    )


PAID_AT_END = ("ppo-mr", "mt-ppo-paid-at-end")
"""The methods that pay turn rewards at a rollout's end."""


def _paid_when_cut(rollout: Rollout, *, at_end: bool) -> Rollout:
    """A rollout that a token budget cut off, with what it has been paid by then.

    Not the outcome, nor a judge's score of the turn that was cut, which is of how it ended; and nothing where turn
    rewards are paid at the end, which the value of the last state stands for.
    """
    *before, last = rollout.turn_rewards
    earned = (*before, {name: value for name, value in last.items() if name not in JUDGED})
    return dataclasses.replace(rollout, turn_rewards=({},) * len(earned) if at_end else earned, outcome_rewards={})


def critic_table(
    rollouts: Sequence[Rollout], values: Sequence[np.ndarray], after: np.ndarray, *, at_end: bool = False
) -> TokenTable:
    """The token table of scored rollouts with a critic's values, and in it the turn table with its own.

    `values` (n, heads) are those of each rollout's sampled tokens, `after` (R, heads) those of the states in which
    rollouts were cut off; `at_end` says that turn rewards are paid at the end. The first head values tokens, the last
    one turns, at their first tokens. A rollout that a token budget cut off goes on with the value of its last state and
    is not paid its outcome: what it would have earned is unknown, and a limit that the policy cannot see must not be
    taken for the end of the task (Pardo et al. 2018, arXiv 1712.00378). One that used up its turns is paid and does not
    go on: that limit is part of the task.
    """
    paid = [_paid_when_cut(r, at_end=at_end) if r.stop == "max_tokens" else r for r in rollouts]
    tokens = token_table(rollout_table(paid))
    own = np.concatenate(values).astype(float)
    turns = dataclasses.replace(
        tokens.turns, values=own[_first_tokens(tokens), -1], bootstrap=after[:, 0].astype(float)
    )
    return dataclasses.replace(tokens, turns=turns, values=own[:, 0])


def _first_tokens(table: TokenTable) -> np.ndarray:
    """The place of each turn's first token, in a table of sampled tokens alone."""
    return np.append(0, table.last[:-1] + 1)


@dataclass(frozen=True, kw_only=True)
class CriticCredit:
    """What a method with a critic gives the sampled tokens of a step."""

    turns: Credit
    advantages: np.ndarray
    """(M,)"""
    returns: np.ndarray
    """(M, heads): value targets; NaN where a head has none."""
    metrics: dict[str, float]


def critic_credit(config: TrainConfig, table: TokenTable, values: np.ndarray) -> CriticCredit:
    """The configured method's credit of a table of sampled tokens, whose values by head are `values` (M, heads).

    Methods over turns have value targets at the turns' first tokens; vetta there for its second head.
    """
    name, first, parameters = config.estimator, _first_tokens(table), _discounts(config)
    returns = np.full(values.shape, np.nan)
    if name == "vetta":
        parameters = {"gamma": 0.95, "lam": 0.95, **parameters}  # its turn level, whose targets are wanted as well
        returns[first, 1] = turn_ppo(table.turns, **parameters).streams["turn"].value
    if name in TOKEN_ESTIMATORS:
        found = TOKEN_ESTIMATORS[name](table, **parameters)
        advantages, returns[:, 0] = found.advantages, found.returns
    else:
        credit = ESTIMATORS[name](table.turns, **parameters)
        advantages, returns[first, 0] = broadcast(table, credit.advantages), credit.streams["turn"].value
    if config.whiten or (config.whiten is None and name in TOKEN_ESTIMATORS):
        advantages = whiten_tokens(table, advantages)
    counts = np.bincount(table.turn)
    target, value = returns[first, -1], values[first, -1]
    stream = Stream(value=target, baseline=value, advantage=target - value)
    return CriticCredit(
        turns=Credit(advantages=np.bincount(table.turn, weights=advantages) / counts, streams={"value": stream}),
        advantages=advantages,
        returns=returns,
        metrics=_value_metrics(values[:, 0], returns[:, 0]),
    )


def _value_metrics(values: np.ndarray, returns: np.ndarray) -> dict[str, float]:
    """The mean value, and 1 − Var(returns − values) / Var(returns), where there are targets and they vary."""
    there = ~np.isnan(returns)
    values, returns = values[there], returns[there]
    found = {"mean_value": float(values.mean())}
    if returns.var() > 1e-12:
        found["explained_variance"] = float(1 - (returns - values).var() / returns.var())
    return found


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
