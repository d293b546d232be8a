"""Between turns and tokens: padded arrays to tables, turn advantages to tokens, and what a token weighs in the loss.

Padded arrays are what trainers hold: one row per rollout, (B, T), with `turn_ids` that say which turn sampled a token
and -1 for padding and for tokens that the policy did not write. The side on which a row is padded does not matter.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from turnwise.credit.parts import check_number, require, require_length
from turnwise.credit.table import LARGEST, Rollouts, Tokens, TokenTable, Turns, TurnTable

Padded = Float[np.ndarray, "B T"]
PaddedKeys = Int[np.ndarray, "B T"]
PaddedFlags = Bool[np.ndarray, "B T"]
PaddedMask = Shaped[np.ndarray, "B T"]
Aggregation = Literal["token-mean", "sequence-mean", "turn-mean", "constant"]


def turn_ids_from_mask(action: PaddedMask) -> PaddedKeys:
    """Which turn each token belongs to, where turns are the runs of sampled tokens between others; -1 elsewhere.

    The mask is 1 or True at sampled tokens and 0 or False elsewhere, of any dtype. ValueError for anything else.
    """
    found = np.asarray(action)
    if found.ndim != 2 or found.dtype.kind not in "fiub" or not ((found == 0) | (found == 1)).all():
        raise ValueError(
            f"a mask must be (B, T) of 0 and 1; got {found.dtype} of shape {found.shape}; give such a mask"
        )
    sampled = found == 1
    starts = sampled & ~np.pad(sampled, ((0, 0), (1, 0)))[:, :-1]
    return np.where(sampled, starts.cumsum(1) - 1, -1)


def padded_tokens(
    turn_ids: PaddedKeys,
    groups: Sequence[int],
    *,
    turn_rewards: Mapping[str, Padded] | None = None,
    outcome_rewards: Mapping[str, Rollouts] | None = None,
    values: Padded | None = None,
    bootstrap: Rollouts | None = None,
) -> TokenTable:
    """The token table, and in it the turn table, of padded arrays.

    `turn_rewards` hold rewards at tokens, NaN where there is none: a turn with NaN alone does not have the component. A
    reward counts for the turn in which it lies; one that lies on a token which the policy did not write counts for the
    turn before it, or for the first turn where none came before: none is dropped. `values` are a critic's at every
    token. Raises ValueError for rollouts without turns, turns out of order, and arrays of other shapes.
    """
    if turn_ids.ndim != 2 or len(groups) != len(turn_ids):
        raise ValueError(
            f"turn_ids must be (B, T) with one group per row; got shape {turn_ids.shape} and {len(groups)} groups"
        )
    if not np.issubdtype(turn_ids.dtype, np.integer) or not np.issubdtype(np.asarray(groups).dtype, np.integer):
        raise ValueError("turn_ids and groups must be whole numbers; got others; number them")
    if values is not None and values.shape != turn_ids.shape:
        raise ValueError(f"values must have the shape of turn_ids, {turn_ids.shape}; got {values.shape}")
    written = turn_ids >= 0
    _check_padded(turn_ids, written)
    counts = turn_ids.max(1) + 1
    offsets = np.cumsum(counts) - counts
    row = np.where(written, turn_ids + offsets[:, None], -1)
    before = np.maximum.accumulate(np.where(written, row, -1), 1)
    owner = np.where(before < 0, offsets[:, None], before)
    total = int(counts.sum())
    turns = TurnTable(
        rollout=np.repeat(np.arange(len(counts)), counts),
        index=np.arange(total) - np.repeat(offsets, counts),
        group=np.repeat(np.asarray(groups, dtype=np.int64), counts),
        turn_rewards={name: _per_turn(name, found, owner, total) for name, found in (turn_rewards or {}).items()},
        outcome_rewards=dict(outcome_rewards or {}),
        bootstrap=bootstrap,
        tokens=np.bincount(row[written], minlength=total),
    )
    kept = written if values is None else written & (np.abs(values.astype(float)) <= LARGEST)
    if values is not None and (kept != written).any():
        at = np.argwhere(kept != written)[0].tolist()
        raise ValueError(
            f"values must be finite and within ±{LARGEST:g} at every token that the policy wrote; row {at[0]}, token "
            f"{at[1]} is not"
        )
    return TokenTable(turns=turns, turn=row[written], values=None if values is None else values[written])


def _check_padded(turn_ids: PaddedKeys, written: PaddedFlags) -> None:
    empty = np.flatnonzero(~written.any(1))
    if len(empty):
        raise ValueError(f"a rollout must have at least one turn; row {empty[0]} has none")
    highest = np.maximum.accumulate(np.where(written, turn_ids, -1), 1)
    earlier = np.pad(highest, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    step = turn_ids - earlier
    wrong = np.argwhere(written & (step != 0) & (step != 1))
    if len(wrong):
        row, at = wrong[0].tolist()
        raise ValueError(
            f"turns of a row must go 0, 1, ... without a gap; row {row} has turn {turn_ids[row, at]} at token {at} "
            f"after turn {earlier[row, at]}"
        )


def _per_turn(name: str, rewards: Padded, owner: PaddedKeys, total: int) -> Turns:
    if rewards.shape != owner.shape:
        raise ValueError(f"turn rewards {name!r} must have the shape of turn_ids, {owner.shape}; got {rewards.shape}")
    if np.isinf(rewards).any():
        row, at = np.argwhere(np.isinf(rewards))[0].tolist()
        raise ValueError(f"turn rewards must be finite; {name!r} is infinite in row {row}, token {at}")
    there = ~np.isnan(rewards)
    summed = np.bincount(owner[there], weights=rewards[there], minlength=total)
    return np.where(np.bincount(owner[there], minlength=total) > 0, summed, np.nan)


def padded(values: Tokens, turn_ids: PaddedKeys) -> Padded:
    """One number per written token back in the padded layout; exactly 0 elsewhere."""
    written = turn_ids >= 0
    out = np.zeros(turn_ids.shape)
    out[written] = require("values", values, int(written.sum()), what="written token")
    return out


def broadcast(table: TokenTable, advantages: Turns) -> Tokens:
    """Each token the advantage of its turn; exactly 0 for tokens that the policy did not write."""
    found = require("advantages", advantages, len(table.turns.rollout))
    return np.where(table.turn >= 0, found[table.turn], 0.0)


def turn_means(table: TokenTable, tokens: Tokens) -> Turns:
    """The mean over the tokens that the policy wrote in each turn."""
    require_length("tokens", tokens, len(table.turn), what="token")
    turn, found = table.turn[table.written], require("tokens", tokens[table.written], len(table.written), what="token")
    return np.bincount(turn, weights=found) / np.bincount(turn)


def loss_weights(table: TokenTable, aggregation: Aggregation, *, length: int | None = None) -> Tokens:
    """What each token's term weighs in the loss; 0 for tokens that the policy did not write.

    token-mean      1 / N                    N sampled tokens of the step; DAPO, arXiv 2503.14476
    sequence-mean   1 / (R · nᵢ)             R rollouts, nᵢ tokens of rollout i; GRPO, arXiv 2402.03300
    turn-mean       1 / (M · nₖ)             M turns, nₖ tokens of turn k: a turn weighs the same, long or short
    constant        1 / (R · length)         Dr. GRPO, arXiv 2503.20783
    """
    written = table.turn >= 0
    turn = table.turn[written]
    rollout = table.turns.rollout[turn]
    rollouts = table.turns.num_rollouts
    match aggregation:
        case "token-mean":
            found = np.full(len(turn), 1 / len(turn))
        case "sequence-mean":
            found = 1 / (rollouts * np.bincount(rollout)[rollout])
        case "turn-mean":
            found = 1 / (len(table.turns.rollout) * np.bincount(turn)[turn])
        case "constant":
            if length is None:
                raise ValueError("aggregation 'constant' needs a length >= 1, tokens; got None; give it")
            check_number("length", length, 1, whole=True)
            found = np.full(len(turn), 1 / (rollouts * length))
        case _:
            raise ValueError(
                f"aggregation must be a known name; got {aggregation!r}; take one of {Aggregation.__args__}"
            )
    weights = np.zeros(len(table.turn))
    weights[written] = found
    return weights
