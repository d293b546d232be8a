"""A key-value cache with one sequence per row, which a transformers model fills in place."""

import numpy as np
import torch
from transformers import Cache

from turnwise.cores import compiled
from turnwise.engines.attention import Beginnings

SMALLEST_LENGTH = 64


class RowCache(Cache):
    """Keys and values of every layer, [rows, kv_heads, length, head_dim] each.

    Every row holds one sequence from position 0 on. `aim` says where the next forward pass writes
    and what it reads; the caller's mask hides what lies behind a row's own length. The layers
    `sliding` can be given a few keys of their own to read. On a processor the keys say so to
    their attention (`processor_attention`).
    """

    def __init__(self, sliding: frozenset[int] = frozenset(), *, on_processor: bool = False) -> None:
        super().__init__(layers=[])
        self.sliding = sliding
        self.on_processor = on_processor
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.num_rows = 0
        self.length = 0

    def reserve(self, rows: int, length: int, *, max_rows: int, max_length: int) -> None:
        """Room for `rows` sequences of `length`; both grow by a quarter at least, up to their maximum."""
        if rows > self.num_rows:
            self.num_rows = min(max(rows, 5 * self.num_rows // 4), max_rows)
        if length > self.length:
            self.length = min(max(length, 5 * self.length // 4, SMALLEST_LENGTH), max_length)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old.shape[0] < self.num_rows or old.shape[2] < self.length:
                    tensors[layer] = self._room(old, kept=old)

    def aim(
        self,
        *,
        write: tuple[torch.Tensor, torch.Tensor],
        source: torch.Tensor | None,
        read: slice | torch.Tensor,
        read_length: int,
        near: tuple[torch.Tensor, torch.Tensor] | None = None,
        beginnings: Beginnings | None = None,
    ) -> None:
        """Where the next forward pass writes and reads.

        `write`: row and position of each new token. `source`: which tokens of the flattened batch
        these are (None: all). `read`: the rows of the batch, a slice where they are adjacent.
        `near`: rows [B, 1] and positions [B, w] that sliding layers read, instead of all up to `read_length`.
        `beginnings`: what the rows have in common, which the other layers' keys carry to their attention.
        """
        self._write, self._source, self._read, self._read_length, self._near = write, source, read, read_length, near
        self._beginnings = beginnings

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states; the keys and values of the batch, [B, kv_heads, L, head_dim]."""
        if layer_idx == len(self.keys):
            self.keys.append(self._room(key_states))
            self.values.append(self._room(value_states))
        near = self._near if layer_idx in self.sliding else None
        keys = self._through(self.keys[layer_idx], key_states, near)
        if self.on_processor:
            vars(keys)["beginnings"] = None if layer_idx in self.sliding else self._beginnings
        return keys, self._through(self.values[layer_idx], value_states, near)

    def move(self, target: np.ndarray, source: np.ndarray, length: int) -> None:
        """Copy the first `length` positions of rows `source` to rows `target`; they may overlap.

        On a processor rows are copied one by one, or those that get the same one at once: to gather them first passes
        over all of them twice.
        """
        if self.on_processor and not np.isin(target, source).any():
            borders = np.flatnonzero((np.diff(target) != 1) | (np.diff(source) != 0)) + 1
            runs = [*zip([0, *borders.tolist()], [*borders.tolist(), len(target)], strict=True)]
            copies = [(slice(int(target[i]), int(target[j - 1]) + 1), int(source[i])) for i, j in runs if j]
        else:
            copies = [(torch.from_numpy(target), torch.from_numpy(source))]
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                for there, here in copies:
                    tensor[there, :, :length] = tensor[here, :, :length]

    def wipe(self, rows: torch.Tensor) -> None:
        """Forget rows that hold NaN or infinities, which would reach whoever has the row next (see `_room`)."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[rows] = 0

    def _through(
        self, stored: torch.Tensor, states: torch.Tensor, near: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        _write(stored, states, *self._write, self._source)
        if near is not None:
            return _gathered(stored, *near)
        rows, length = self._read, self._read_length
        if isinstance(rows, slice):
            return stored[rows, :, :length]
        return stored[:, :, :length].index_select(0, rows)

    def _room(self, like: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Zeros beside what is `kept`: a masked position still enters a product, and 0 x NaN is NaN."""
        kept = like[:0, :, :0] if kept is None else kept
        rows, _, length, _ = kept.shape
        room = like.new_empty(self.num_rows, like.shape[1], self.length, like.shape[3])
        room[:rows, :, :length] = kept
        room[:rows, :, length:] = 0
        room[rows:] = 0
        return room


@compiled
def _write(
    stored: torch.Tensor, states: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, source: torch.Tensor | None
) -> None:
    """Puts the states (B, K, T, D), or those at `source` of the flattened batch, where they belong."""
    new = states.transpose(1, 2).flatten(0, 1)
    if source is not None:
        new = new[source]
    stored.transpose(1, 2).index_put_([rows, positions], new)


@compiled
def _gathered(stored: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What rows [B, 1] hold at positions [B, w], [B, K, w, D]; positions must be there, none from the end."""
    _, heads, length, width = stored.shape
    head = torch.arange(heads, device=stored.device)[:, None]
    place = ((rows.unsqueeze(2) * heads + head) * length + positions.unsqueeze(1)).flatten()
    return stored.view(-1, width).index_select(0, place).view(len(positions), heads, -1, width)
