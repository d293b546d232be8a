"""Rollouts and advantages, packed into padded tensors for the loss. Torch starts here.

A micro-batch keeps the prompts of its groups apart from what follows them: rollouts of one group share their
prompt, so it is computed once and its keys and values serve every row.

    prompts   (P, L)   each different prompt once, right-padded
    ids       (B, T)   what follows the prompt in each rollout, right-padded: actions and replies

Three masks over (B, T) say different things. `attention`: the position holds a token (tool results are visible).
`action`: the policy sampled it. `loss`: it enters the loss.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from turnwise.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence: a prompt, what follows it, and what the loss needs to know of each following token."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    action: np.ndarray
    """bool (T,): which of `ids` the policy sampled."""
    loss: np.ndarray
    """bool (T,): which of `ids` enter the loss."""
    sampling_logprobs: np.ndarray
    """float32 (T,), nats; 0 where not sampled."""
    advantages: np.ndarray
    """float32 (T,); 0 where not sampled."""
    count: int = 1
    """How many rollouts this row stands for."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that are computed together; shapes as in the module's docstring."""

    prompts: torch.Tensor
    prompt_lengths: torch.Tensor
    prompt_of: torch.Tensor
    """int64 (B,): the row of `prompts` that each sequence continues."""
    ids: torch.Tensor
    attention: torch.Tensor
    action: torch.Tensor
    loss: torch.Tensor
    sampling_logprobs: torch.Tensor
    advantages: torch.Tensor
    counts: torch.Tensor
    """float32 (B,): how many rollouts each row stands for."""

    @property
    def num_rows(self) -> int:
        return self.ids.shape[0]


def rollout_row(rollout: Rollout, turn_advantages: Sequence[float], trained: Sequence[bool]) -> Row:
    """A rollout as a row: each turn's advantage on the tokens sampled in that turn, zero elsewhere.

    `trained` says for each turn whether it enters the loss.
    """
    if not len(turn_advantages) == len(trained) == len(rollout.turns):
        raise ValueError(
            f"one advantage and one loss flag per turn: rollout has {len(rollout.turns)} turns, "
            f"got {len(turn_advantages)} and {len(trained)}"
        )
    ids: list[int] = []
    action: list[bool] = []
    loss: list[bool] = []
    logprobs: list[float] = []
    advantages: list[float] = []
    for turn, advantage, in_loss in zip(rollout.turns, turn_advantages, trained, strict=True):
        sampled, appended = len(turn.action_ids), len(turn.reply_ids)
        ids += [*turn.action_ids, *turn.reply_ids]
        action += [True] * sampled + [False] * appended
        loss += [in_loss] * sampled + [False] * appended
        logprobs += [*turn.sampling_logprobs, *[0.0] * appended]
        advantages += [float(advantage)] * sampled + [0.0] * appended
    end = max((i + 1 for i, sampled in enumerate(action) if sampled), default=0)
    return Row(
        prompt_ids=rollout.prompt_ids,
        ids=tuple(ids[:end]),
        action=np.array(action[:end], dtype=bool),
        loss=np.array(loss[:end], dtype=bool),
        sampling_logprobs=np.array(logprobs[:end], dtype=np.float32),
        advantages=np.array(advantages[:end], dtype=np.float32),
    )


def distinct_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows with equal ones merged: rollouts that say the same and earn the same are computed once.

    As a policy becomes sure of itself, most rollouts of a group are equal.
    """
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.prompt_ids, row.ids, row.advantages.tobytes(), row.loss.tobytes())
        found.setdefault(key, []).append(row)
    return [replace(same[0], count=sum(row.count for row in same)) for same in found.values()]


def micro_batches(rows: Sequence[Row], *, max_tokens: int, pad_id: int) -> Iterator[MicroBatch]:
    """The rows in micro-batches of similar length, each within `max_tokens` padded positions.

    A row longer than the budget gets a micro-batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), rows[i].prompt_ids))
    chunk: list[Row] = []
    for i in reversed(order):
        row = rows[i]
        longest = len(chunk[0].ids) if chunk else len(row.ids)
        if chunk and (len(chunk) + 1) * longest > max_tokens:
            yield pack(chunk, pad_id=pad_id)
            chunk = []
        chunk.append(row)
    if chunk:
        yield pack(chunk, pad_id=pad_id)


def pack(rows: Sequence[Row], *, pad_id: int) -> MicroBatch:
    """Rows as one micro-batch."""
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt_ids for row in rows))}
    return MicroBatch(
        prompts=_padded([np.array(p, dtype=np.int64) for p in prompts], pad_id),
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
        prompt_of=torch.tensor([prompts[row.prompt_ids] for row in rows]),
        ids=_padded([np.array(row.ids, dtype=np.int64) for row in rows], pad_id),
        attention=_padded([np.ones(len(row.ids), dtype=bool) for row in rows], False),
        action=_padded([row.action for row in rows], False),
        loss=_padded([row.loss for row in rows], False),
        sampling_logprobs=_padded([row.sampling_logprobs for row in rows], 0.0),
        advantages=_padded([row.advantages for row in rows], 0.0),
        counts=torch.tensor([float(row.count) for row in rows]),
    )


def _padded(arrays: Sequence[np.ndarray], fill: float | bool) -> torch.Tensor:
    out = np.full((len(arrays), max(len(a) for a in arrays)), fill, dtype=arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)
