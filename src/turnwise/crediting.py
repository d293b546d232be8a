"""Credit for a step's rollouts: the tables that estimators read, and the rows that the update learns from."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from turnwise.batch import Row, on_sampled, rollout_row
from turnwise.config import DISCOUNTED, TrainConfig
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
from turnwise.critic import Critic, step_values
from turnwise.errors import InputError, RunError
from turnwise.rewards import JUDGED
from turnwise.types import Rollout

PAID_AT_END = ("ppo-mr", "mt-ppo-paid-at-end")
"""The methods that pay turn rewards at a rollout's end."""


def rollout_table(rollouts: Sequence[Rollout]) -> TurnTable:
    """The turn table of scored rollouts, with token counts and anchors, and with nodes where they are leaves of trees.

    A turn's anchor is the environment's name of the state before it; where it names none, what it said last: equal
    observations are taken for equal states.
    """
    return turn_table(
        [r.group for r in rollouts],
        [r.turn_rewards for r in rollouts],
        [r.outcome_rewards for r in rollouts],
        tokens=[[len(turn.action_ids) for turn in r.turns] for r in rollouts],
        anchors=[r.states or [r.prompt_ids, *(turn.reply_ids for turn in r.turns[:-1])] for r in rollouts],
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


def has_signal(group: Sequence[Rollout], config: TrainConfig) -> bool:
    """Whether a group's rollouts, compared with each other alone, get any credit."""
    return bool(np.abs(estimate(config, rollout_table(group)).advantages).max() > 1e-9)


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
    values, after = step_values(critic, rows, cut, max_tokens=config.micro_batch_budget, pad_id=pad_id, at_once=at_once)
    if not all(np.isfinite(own).all() for own in (*values, after)):
        raise RunError(
            "the critic's values must be finite; some are not; --resume from the last checkpoint, or start anew with a "
            "lower --critic-learning-rate"
        )
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
