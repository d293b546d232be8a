"""Rollouts and advantages, packed into padded tensors for the loss. Torch starts here.

Rollouts of one group begin alike: they share their prompt, most share the first call and its result. A micro-batch
keeps each different beginning once. Its *levels* are what all prompts begin with (the system message), then the rests
of the prompts, then what follows them up to where rollouts part, and so on; a stretch of tokens at one level continues
a stretch of the level before. Rollouts part only between turns.

    levels[k].ids   (N, T)   each different stretch that continues one of the level before
    ids             (B, T)   what follows the prompt in each rollout: actions and replies
    place           (B, T)   where each of these tokens stands in the levels, flattened one after the other

Everything is right-padded. Three masks over (B, T) say different things. `attention`: the position holds a token (tool
results are visible). `action`: the policy sampled it. `loss`: it enters the loss.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from turnwise.credit import loss_weights, padded, padded_tokens, turn_ids_from_mask
from turnwise.credit.tokens import Aggregation
from turnwise.types import Rollout

LIKE_LENGTH = 32
"""Stretches after prompts whose lengths differ by less, tokens, count as equally long."""
WHOLE_TOKENS = 1000
"""Rows of fewer positions are one micro-batch: two would cost what a second core gains."""
MOST_MORE = 1.1
"""By how much even micro-batches may have more positions than plain ones, which hold more of what begins alike."""


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
    values: np.ndarray | None = None
    """float32 (T, heads): a critic's values of the state before each token, from before the update; 0 where the policy
    did not sample. None without a critic."""
    returns: np.ndarray | None = None
    """float32 (T, heads): what the critic's values are to learn; NaN where a head has no target."""
    weights: np.ndarray | None = None
    """float32 (T,): what each token's term weighs in the loss, as `weighted` fills in."""
    share: float = 1.0
    """What the rollout counts for in the loss beside the others."""
    count: int = 1
    """How many rollouts this row stands for."""

    def turns(self) -> list[tuple[int, ...]]:
        """The tokens of each turn with the reply to it."""
        starts = [0, *(np.flatnonzero(self.action[1:] & ~self.action[:-1]) + 1).tolist(), len(self.ids)]
        return [self.ids[a:b] for a, b in itertools.pairwise(starts)]


@dataclass(frozen=True, kw_only=True)
class Level:
    """Different stretches of tokens that stand equally deep."""

    ids: torch.Tensor
    lengths: torch.Tensor
    """int64 (N,)."""
    parent: torch.Tensor
    """int64 (N,): the row of the level before that each stretch continues; 0 at the first level."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that are computed together; shapes as in the module's docstring."""

    levels: tuple[Level, ...]
    place: torch.Tensor
    ids: torch.Tensor
    attention: torch.Tensor
    action: torch.Tensor
    loss: torch.Tensor
    sampling_logprobs: torch.Tensor
    advantages: torch.Tensor
    values: torch.Tensor | None
    """float32 (B, T, heads), as are `returns`, NaN where there is no target; None where a row has none."""
    returns: torch.Tensor | None
    weights: torch.Tensor | None
    counts: torch.Tensor
    """float32 (B,): how many rollouts each row stands for."""

    @property
    def num_rows(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device) -> "MicroBatch":
        """The micro-batch on a device; itself where it is there."""
        if self.ids.device == device:
            return self
        levels = tuple(Level(**{name: x.to(device) for name, x in vars(level).items()}) for level in self.levels)
        own = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, levels=levels, **own)


def rollout_row(
    rollout: Rollout,
    turn_advantages: Sequence[float],
    trained: Sequence[bool],
    *,
    share: float = 1.0,
) -> Row:
    """A rollout as a row: each turn's advantage on the tokens sampled in that turn, zero elsewhere.

    `trained` says for each turn whether it enters the loss, `share` what the rollout counts for beside the others.
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
        share=share,
    )


def on_sampled(row: Row, numbers: np.ndarray, *, fill: float = 0.0) -> np.ndarray:
    """Numbers (n, ...) of the row's sampled tokens at their places, float32 (T, ...); `fill` elsewhere."""
    out = np.full((len(row.ids), *numbers.shape[1:]), fill, dtype=np.float32)
    out[row.action] = numbers
    return out


def weighted(rows: Sequence[Row], aggregation: Aggregation, *, length: int | None = None) -> list[Row]:
    """The rows with what their tokens weigh in the loss over all these rows, `credit.loss_weights`.

    0 outside the loss mask. To be called with every row of a minibatch, so that its micro-batches add up to its loss.
    A row counts as `share` rows.
    """
    turn_ids = turn_ids_from_mask(_filled([row.loss for row in rows], False))
    table = padded_tokens(turn_ids, [0] * len(rows))
    found = padded(loss_weights(table, aggregation, length=length), turn_ids)
    shares = np.array([row.share for row in rows])
    found *= shares[:, None]
    if aggregation in ("sequence-mean", "constant"):
        found *= len(rows) / shares.sum()
    else:
        found /= found.sum()
    found = found.astype(np.float32)
    return [replace(row, weights=weights[: len(row.ids)]) for row, weights in zip(rows, found, strict=True)]


def distinct_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows with equal ones merged: rollouts that say the same and earn the same are computed once.

    Equal in all that the loss reads: tokens, advantages, weights, and with a critic old values and targets. As a policy
    becomes sure of itself, most rollouts of a group are equal.
    """
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        read = (row.advantages, row.loss, row.values, row.returns, row.weights)
        key = (row.prompt_ids, row.ids, *(None if column is None else column.tobytes() for column in read))
        found.setdefault(key, []).append(row)
    return [replace(same[0], count=sum(row.count for row in same)) for same in found.values()]


def _parted(rows: Sequence[Row]) -> list[list[tuple[int, ...]]]:
    """Each row cut where another one parts from it or ends: what all prompts begin with, the prompt's rest, and the
    stretches after it."""
    shared = _shared_length({row.prompt_ids for row in rows})
    nodes: dict[tuple[int, tuple[int, ...]], int] = {}
    children: dict[int, set[int]] = {}
    paths = []
    for row in rows:
        path, node = [], -1
        for tokens in (row.prompt_ids, *row.turns()):
            child = nodes.setdefault((node, tokens), len(nodes))
            children.setdefault(node, set()).add(child)
            path.append((child, tokens))
            node = child
        children.setdefault(node, set()).add(-1)  # a row ends here
        paths.append(path)
    parted = []
    for (_, prompt), *path in paths:
        stretches, stretch = [prompt[:shared], prompt[shared:]] if shared else [prompt], ()
        for node, tokens in path:
            stretch += tokens
            if children[node] == {-1} or len(children[node]) > 1:
                stretches.append(stretch)
                stretch = ()
        parted.append(stretches)
    return parted


def _shared_length(prompts: set[tuple[int, ...]]) -> int:
    """How many tokens several prompts begin with alike, leaving one of each at least; 0 for fewer than two."""
    if len(prompts) < 2:
        return 0
    pairs = zip(min(prompts), max(prompts), strict=False)  # what these two share, all between them share
    return min(
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)), *(len(p) - 1 for p in prompts)
    )


class _Tree:
    """The different beginnings of rows: for each level, the stretches with the ones they continue."""

    def __init__(self) -> None:
        self.levels: list[dict[tuple[int, tuple[int, ...]], int]] = []
        self.longest: list[int] = []

    def add(self, stretches: Iterable[tuple[int, ...]]) -> list[int]:
        """The stretches' places, level by level."""
        path, parent = [], 0
        for depth, stretch in enumerate(stretches):
            if depth == len(self.levels):
                self.levels.append({})
                self.longest.append(1)
            level = self.levels[depth]
            parent = level.setdefault((parent, stretch), len(level))
            self.longest[depth] = max(self.longest[depth], len(stretch))
            path.append(parent)
        return path

    @property
    def size(self) -> int:
        """Positions, padding included."""
        return sum(len(level) * longest for level, longest in zip(self.levels, self.longest, strict=True))


def micro_batches(rows: Sequence[Row], *, max_tokens: int, pad_id: int, even: bool = False) -> Iterator[MicroBatch]:
    """The rows in micro-batches, each within `max_tokens` padded positions of its levels; see `chunks`."""
    for chunk in chunks(rows, max_tokens=max_tokens, even=even):
        yield pack(chunk, pad_id=pad_id)


def chunks(rows: Sequence[Row], *, max_tokens: int, even: bool = False) -> Iterator[list[Row]]:
    """The rows of each micro-batch; if they are to be `even`, an even number of like size, which cores share.

    Rows whose first stretches are of like length stand together, and among them those that begin alike. A row longer
    than the budget gets a micro-batch of its own.
    """
    ordered = _in_order(rows)
    for chunk, _ in _cut(ordered, _even_tokens(ordered, max_tokens) if even else max_tokens):
        yield chunk


def _even_tokens(ordered: Sequence[tuple[Row, list[tuple[int, ...]]]], max_tokens: int) -> int:
    """The least budget that makes as many micro-batches as `max_tokens` does, and one more where that number is odd.

    It is `max_tokens` where one holds them all in less than `WHOLE_TOKENS`, and where to cut what they begin with alike
    once more costs more than `MOST_MORE`. The number of cores changes nothing, as it would change how sums round.
    """
    sizes = [size for _, size in _cut(ordered, max_tokens)]
    if sum(sizes) < WHOLE_TOKENS:
        return max_tokens
    count = len(sizes) + len(sizes) % 2
    low, high = 0, max_tokens
    while high - low > 16:
        middle = (low + high) // 2
        fits = sum(1 for _ in _cut(ordered, middle)) <= count
        low, high = (low, middle) if fits else (middle, high)
    positions = sum(size for _, size in _cut(ordered, high))
    return high if positions <= MOST_MORE * sum(sizes) else max_tokens


def _in_order(rows: Sequence[Row]) -> list[tuple[Row, list[tuple[int, ...]]]]:
    """The rows with their stretches, as they are to stand in micro-batches."""
    found = list(zip(rows, _parted(rows), strict=True))
    found.sort(key=lambda each: (_first_length(*each) // LIKE_LENGTH, each[1]), reverse=True)
    return found


def _cut(ordered: Iterable[tuple[Row, list[tuple[int, ...]]]], max_tokens: int) -> Iterator[tuple[list[Row], int]]:
    """The rows of each micro-batch, and its padded positions."""
    chunk: list[Row] = []
    tree, size = _Tree(), 0
    for row, stretches in ordered:
        tree.add(stretches)
        if chunk and tree.size > max_tokens:
            yield chunk, size
            chunk, tree = [], _Tree()
            tree.add(stretches)
        chunk.append(row)
        size = tree.size
    if chunk:
        yield chunk, size


def _first_length(row: Row, stretches: Sequence[tuple[int, ...]]) -> int:
    """Tokens of the first stretch after the prompt."""
    depth, length = 0, 0
    while length < len(row.prompt_ids):
        length += len(stretches[depth])
        depth += 1
    return len(stretches[depth])


def pack(rows: Sequence[Row], *, pad_id: int) -> MicroBatch:
    """Rows as one micro-batch."""
    tree, parted = _Tree(), _parted(rows)
    paths = [tree.add(stretches) for stretches in parted]
    sizes = [len(level) * longest for level, longest in zip(tree.levels, tree.longest, strict=True)]
    offsets = np.cumsum([0, *sizes])
    places = []
    for row, path, stretches in zip(rows, paths, parted, strict=True):
        own = [
            offsets[depth] + node * tree.longest[depth] + np.arange(len(stretch))
            for depth, (node, stretch) in enumerate(zip(path, stretches, strict=True))
        ]
        places.append(np.concatenate(own)[len(row.prompt_ids) :])
    return MicroBatch(
        levels=tuple(_level(level, pad_id) for level in tree.levels),
        place=_padded(places, 0),
        ids=_padded([np.array(row.ids, dtype=np.int64) for row in rows], pad_id),
        attention=_padded([np.ones(len(row.ids), dtype=bool) for row in rows], False),
        action=_padded([row.action for row in rows], False),
        loss=_padded([row.loss for row in rows], False),
        sampling_logprobs=_padded([row.sampling_logprobs for row in rows], 0.0),
        advantages=_padded([row.advantages for row in rows], 0.0),
        values=_optional([row.values for row in rows], 0.0),
        returns=_optional([row.returns for row in rows], np.nan),
        weights=_optional([row.weights for row in rows], 0.0),
        counts=torch.tensor([float(row.count) for row in rows]),
    )


def _level(stretches: Iterable[tuple[int, tuple[int, ...]]], pad_id: int) -> Level:
    parents, tokens = zip(*stretches, strict=True)
    return Level(
        ids=_padded([np.array(stretch, dtype=np.int64) for stretch in tokens], pad_id),
        lengths=torch.tensor([len(stretch) for stretch in tokens]),
        parent=torch.tensor(parents),
    )


def _optional(arrays: Sequence[np.ndarray | None], fill: float) -> torch.Tensor | None:
    """The arrays padded; None where one is missing."""
    there = [array for array in arrays if array is not None]
    return _padded(there, fill) if len(there) == len(arrays) else None


def _padded(arrays: Sequence[np.ndarray], fill: float | bool) -> torch.Tensor:
    return torch.from_numpy(_filled(arrays, fill))


def _filled(arrays: Sequence[np.ndarray], fill: float | bool) -> np.ndarray:
    """Arrays (T, ...) of different lengths in one, (B, longest T, ...)."""
    out = np.full((len(arrays), max(len(a) for a in arrays), *arrays[0].shape[1:]), fill, dtype=arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out
