"""Rows of a trainer's batch to turn credit and back, whatever the trainer: numpy in, numpy out.

A trainer holds a batch as padded arrays (B, T) with a mask of what the policy sampled, and its rollouts may be spread
over processes. What credit needs of a row is little: its group, its turns' tokens and rewards. So the way is

    arrays → `credit_rows` → (send them to all processes) → `row_credit` → `token_advantages` → (B, T)

Rows of a group need not stand together; a row without any sampled token is padding: it enters no statistics and gets 0.
"""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turnwise.credit import (
    ESTIMATORS,
    NEEDS,
    TOKEN_ESTIMATORS,
    Credit,
    TokenCredit,
    TokenTable,
    TurnTable,
    broadcast,
    diagnostics,
    padded,
    token_table,
    turn_ids_from_mask,
    turn_means,
    turn_table,
    whiten_tokens,
)
from turnwise.errors import ConfigError, InputError, unknown_name

WITHOUT_CRITIC = tuple(name for name in ESTIMATORS if set(NEEDS.get(name, ())) <= {"tokens", "anchor"})
"""The estimators for any trainer's rows: they need no critic, and rollouts that do not branch."""
WITH_CRITIC = (*TOKEN_ESTIMATORS, *(name for name, needs in NEEDS.items() if "values" in needs))
"""Those that need a critic's values at the sampled tokens."""
TREES = tuple(name for name, needs in NEEDS.items() if "node" in needs)
"""Those for rollouts that branch; a trainer that has rows alone cannot use them."""
OUTCOME = "outcome"
"""The component that a dense reward pays in and after a rollout's last turn."""
DENSE = "reward"
"""The component that a dense reward pays in the turns before."""


@dataclass(frozen=True, kw_only=True)
class CreditRow:
    """What credit needs of one rollout: small, and of plain Python, so that processes can send it to each other."""

    group: Hashable
    tokens: tuple[int, ...]
    """How many tokens the policy sampled in each turn."""
    turn_rewards: tuple[Mapping[str, float], ...]
    """Named rewards of each turn; a component that a turn does not have is absent."""
    outcome_rewards: Mapping[str, float]
    anchors: tuple[Hashable, ...] = ()
    """The state before each turn, for estimators that compare turns in equal states; empty: none."""
    values: tuple[float, ...] = ()
    """A critic's value of the state before each sampled token; empty: none."""
    bootstrap: float = 0.0
    """With a critic, the value of the state in which a token budget cut the rollout off; 0 where it ended itself."""


@dataclass(frozen=True, kw_only=True)
class RowCredit:
    """Credit of rows, in their order; empty arrays for padding."""

    table: TurnTable | None
    """The turns of all rows; None where all are padding."""
    turns: Sequence[np.ndarray]
    """Each row's turn advantages; of token methods the means over each turn's tokens."""
    tokens: Sequence[np.ndarray]
    """Each row's token advantages, of its sampled tokens."""
    returns: Sequence[np.ndarray] | None = None
    """With a critic: what its values are to learn at each row's sampled tokens; NaN where there is no target."""

    def metrics(self) -> dict[str, float]:
        """What is told of a batch's credit: `credit.diagnostics`, turns per rollout, each turn reward per rollout."""
        if self.table is None:
            return {}
        table, count = self.table, self.table.num_rollouts
        paid = {f"reward/{name}": float(np.nansum(column)) / count for name, column in table.turn_rewards.items()}
        return {
            "turns": len(table.rollout) / count,
            **paid,
            **diagnostics(table, np.concatenate([turns for turns in self.turns if len(turns)])),
        }


def batch_turn_ids(action: np.ndarray, turn_ids: Sequence[Sequence[int]] | np.ndarray | None = None) -> np.ndarray:
    """Which turn sampled each token (B, T), -1 elsewhere: the runs of the action mask, or `turn_ids` where given.

    Given ones may be ragged and must say of the same tokens that the policy sampled them. Raises InputError.
    """
    from_mask = turn_ids_from_mask(action)
    if turn_ids is None:
        return from_mask
    given: np.ndarray = np.full(from_mask.shape, -1)
    for i, row in enumerate(turn_ids):
        given[i, : len(row)] = np.asarray(row[: given.shape[1]], dtype=np.int64)
    blank = np.all(from_mask < 0, axis=1)  # a trainer masks whole rows out, such as those that were cut off
    odd = np.argwhere(((given >= 0) != (from_mask >= 0)) & ~blank[:, None])
    if len(odd):
        row, at = odd[0].tolist()
        raise InputError(
            f"turn ids must be >= 0 where the action mask is 1 and -1 elsewhere; row {row}, token {at} has turn "
            f"{given[row, at]} and mask {int(from_mask[row, at] >= 0)}; make both of the same tokens"
        )
    given[blank] = -1
    for i, row in enumerate(given):
        steps = np.diff(row[row >= 0], prepend=0)
        if ((steps != 0) & (steps != 1)).any():
            raise InputError(f"turns of a row must go 0, 1, ... without a gap; row {i} has {row[row >= 0].tolist()}")
    return given


def dense_rewards(
    turn_ids: np.ndarray, rewards: np.ndarray
) -> tuple[list[list[Mapping[str, float]]], list[Mapping[str, float]]]:
    """Turn rewards and outcomes of each row, out of one reward per token (B, T).

    A turn is paid what lies from its first token up to the next turn's. From the last turn's first token on it is the
    outcome: a trainer puts that on the last token, which need not be one that the policy sampled, and a last turn's own
    reward would share the place. What lies before the first turn counts for the first.
    """
    if rewards.shape != turn_ids.shape:
        raise InputError(
            f"dense rewards must have the action mask's shape, {turn_ids.shape}; got {rewards.shape}; pad them alike"
        )
    owner = np.maximum(np.maximum.accumulate(turn_ids, 1), 0)
    turns, outcomes = [], []
    for own, row in zip(owner, rewards, strict=True):
        paid = np.bincount(own, weights=row).tolist()
        turns.append([*({DENSE: each} for each in paid[:-1]), {}])
        outcomes.append({OUTCOME: paid[-1]})
    return turns, outcomes


def dense_scores(action: Sequence[int], turn_rewards: Sequence[float], outcome: float) -> np.ndarray:
    """A row's dense rewards (T,), which `dense_rewards` reads: each turn's on the last token that it sampled.

    The outcome is added on the last sampled token of all, where a last turn's own reward lies too. Zeros where no
    token was sampled. Raises InputError for more rewards than turns.
    """
    (own,) = turn_ids_from_mask(np.asarray([action], dtype=np.int64))
    last = np.flatnonzero((own >= 0) & (np.append(own[1:], -1) != own))
    if len(turn_rewards) > max(len(last), 1):
        raise InputError(
            f"there must be at most one turn reward per turn of the mask ({len(last)}); got {len(turn_rewards)}; "
            "append one number per message of the policy"
        )
    scores = np.zeros(len(own), np.float32)
    if len(last):
        scores[last[: len(turn_rewards)]] = turn_rewards
        scores[last[-1]] += outcome
    return scores


def observation_anchors(
    turn_ids: np.ndarray, ids: np.ndarray, present: np.ndarray, prompts: Sequence[Sequence[int]]
) -> list[tuple[Hashable, ...]]:
    """What the environment said last before each turn, as a digest: the prompt, then the tokens between two turns.

    Equal observations are taken for equal states. `present` is 1 where `ids` (B, T) hold a token.
    """
    found = []
    for own, row, there, prompt in zip(turn_ids, ids, np.asarray(present) > 0, prompts, strict=True):
        sampled = np.flatnonzero(own >= 0)
        last = int(sampled[-1]) if len(sampled) else -1
        before = np.maximum.accumulate(own)
        between = (own < 0) & there & (np.arange(len(own)) < last)
        texts = [np.asarray(prompt), *(row[between & (before == k)] for k in range(int(own.max(initial=-1))))]
        found.append(tuple(map(_digest, texts)) if last >= 0 else ())
    return found


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def credit_rows(
    turn_ids: np.ndarray,
    groups: Sequence[Hashable],
    turn_rewards: Sequence[Sequence[Mapping[str, float]]],
    outcome_rewards: Sequence[Mapping[str, float]],
    *,
    anchors: Sequence[Sequence[Hashable]] | None = None,
    values: np.ndarray | None = None,
    bootstrap: Sequence[float] | None = None,
) -> list[CreditRow | None]:
    """What credit needs of each row of a batch; None for padding, whose rewards are not looked at.

    `turn_ids` (B, T) as `batch_turn_ids` has them; `values` (B, T) are a critic's. Raises InputError where a row has
    another number of turn rewards than of turns.
    """
    given = {"groups": groups, "turn_rewards": turn_rewards, "outcome_rewards": outcome_rewards}
    for name, column in given.items():
        if len(column) != len(turn_ids):
            raise InputError(f"{name} must have one entry per row ({len(turn_ids)}); got {len(column)}; give them all")
    rows: list[CreditRow | None] = []
    for i, own in enumerate(turn_ids):
        sampled = own >= 0
        if not sampled.any():
            rows.append(None)
            continue
        tokens = np.bincount(own[sampled]).tolist()
        if len(turn_rewards[i]) != len(tokens):
            raise InputError(
                f"a row must have turn rewards for each of its turns; row {i} has {len(tokens)} turns in its mask; got "
                f"rewards for {len(turn_rewards[i])}; give one mapping per turn, an empty one for a turn without reward"
            )
        rows.append(
            CreditRow(
                group=groups[i],
                tokens=tuple(tokens),
                turn_rewards=tuple(turn_rewards[i]),
                outcome_rewards=outcome_rewards[i],
                anchors=tuple(anchors[i]) if anchors is not None else (),
                values=tuple(values[i][sampled].tolist()) if values is not None else (),
                bootstrap=float(bootstrap[i]) if bootstrap is not None else 0.0,
            )
        )
    return rows


def row_credit(rows: Sequence[CreditRow | None], estimator: str, options: Mapping[str, Any] | None = None) -> RowCredit:
    """The credit of a whole batch's rows, by an estimator's name and its options.

    Every row of every group must be there: call it with those of all processes. `options` are the estimator's own
    parameters, and for those with a critic `whiten`: whether advantages are whitened over the batch's sampled tokens,
    as methods over tokens are unless told otherwise. Raises ConfigError for names and options that do not fit,
    InputError for rewards that do not.
    """
    live = [row for row in rows if row is not None]
    if not live:
        nothing = [np.zeros(0) for _ in rows]
        return RowCredit(table=None, turns=nothing, tokens=nothing)
    options = dict(options or {})
    whiten = bool(options.pop("whiten", estimator in TOKEN_ESTIMATORS)) if estimator in WITH_CRITIC else False
    function = estimator_named(estimator, options)
    try:
        table = rows_table(live)
        returns = None
        if estimator in TOKEN_ESTIMATORS:
            found: TokenCredit = function(table, **options)
            tokens, returns = found.advantages, found.returns
            turns = turn_means(table, tokens)
        else:
            credit: Credit = function(table.turns, **options)
            tokens, turns = broadcast(table, credit.advantages), credit.advantages
            if estimator in WITH_CRITIC and "turn" in credit.streams:
                returns = np.full(len(tokens), np.nan)
                returns[_first_tokens(table)] = credit.streams["turn"].value
        if whiten:
            tokens = whiten_tokens(table, tokens)
            turns = turn_means(table, tokens)
    except ConfigError:
        raise
    except ValueError as error:
        raise InputError(f"the batch must suit {estimator}: {error}") from error
    return RowCredit(
        table=table.turns,
        turns=_split(turns, rows, lambda row: len(row.tokens)),
        tokens=_split(tokens, rows, lambda row: sum(row.tokens)),
        returns=None if returns is None else _split(returns, rows, lambda row: sum(row.tokens)),
    )


def rows_table(rows: Sequence[CreditRow]) -> TokenTable:
    """The token table of rows, of sampled tokens alone; values and anchors where all rows have them."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(row.group for row in rows))}
    turns = turn_table(
        [numbers[row.group] for row in rows],
        [row.turn_rewards for row in rows],
        [row.outcome_rewards for row in rows],
        tokens=[row.tokens for row in rows],
        anchors=[row.anchors for row in rows] if all(row.anchors for row in rows) else None,
        bootstrap=[row.bootstrap for row in rows],
    )
    table = token_table(turns)
    if not all(row.values for row in rows):
        return table
    values = np.array([value for row in rows for value in row.values])
    if len(values) != len(table.turn):
        raise InputError(
            f"values must be those of the sampled tokens, {len(table.turn)}; got {len(values)}; give one per token"
        )
    turns = dataclasses.replace(turns, values=values[_first_tokens(table)])
    return dataclasses.replace(table, turns=turns, values=values)


def token_advantages(turn_ids: np.ndarray, tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Each row's numbers of its sampled tokens in the padded layout (B, T); 0 elsewhere."""
    return padded(np.concatenate([np.zeros(0), *tokens]), turn_ids)


def estimator_named(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The estimator's function. ConfigError for an unknown name, or an option that it does not take."""
    functions: dict[str, Callable[..., Any]] = {**ESTIMATORS, **TOKEN_ESTIMATORS}
    if name not in functions:
        raise unknown_name("estimator", name, functions)
    if name in TREES:
        raise ConfigError(
            f"estimator must be one for rollouts that do not branch; {name} needs trees, whose shared turns a "
            "trainer's rows would count once per leaf; take turn-rloo or mt-grpo"
        )
    takes = [parameter for parameter in inspect.signature(functions[name]).parameters if parameter != "table"]
    for option in options:
        if option not in takes:
            known = ", ".join(takes) or "none"
            raise ConfigError(
                f"options of {name} must be its own, which are {known}; got {option!r}; leave it out or correct it"
            )
    return functions[name]


def check_estimator(name: str, options: Mapping[str, Any], *, critic: bool = False) -> None:
    """ConfigError where a name or an option cannot be used: tried on a batch of two, before any work starts."""
    estimator_named(name, {key: value for key, value in options.items() if key != "whiten"})
    if name in WITH_CRITIC and not critic:
        raise ConfigError(
            f"estimator must need no critic, as this trainer has none; {name} needs its values; take one of "
            f"{', '.join(WITHOUT_CRITIC)}"
        )
    if "whiten" in options and name not in WITH_CRITIC:
        raise ConfigError(f"whiten must go with a method that has a critic; got {name}; leave it out")
    row = CreditRow(
        group=0,
        tokens=(1, 1),
        turn_rewards=({"a": 1.0}, {}),
        outcome_rewards={"b": 1.0},
        anchors=("a", "b"),
        values=(0.0, 0.0),
    )
    # Weights by component are of rewards that are not known yet: gdpo checks their names itself.
    tried = {key: value for key, value in options.items() if key != "weights"}
    try:
        row_credit([row, dataclasses.replace(row, outcome_rewards={"b": 0.0})], name, tried)
    except InputError as error:
        raise ConfigError(f"options must suit {name}; {error}") from error


def _first_tokens(table: TokenTable) -> np.ndarray:
    """The place of each turn's first token, in a table of sampled tokens alone."""
    return np.append(0, table.last[:-1] + 1)


def _split(
    numbers: np.ndarray, rows: Sequence[CreditRow | None], length: Callable[[CreditRow], int]
) -> list[np.ndarray]:
    """Flat numbers of the rows that are no padding, row by row."""
    counts = [length(row) if row else 0 for row in rows]
    return np.split(numbers, np.cumsum(counts)[:-1])
