"""Attention: masks for layers that differ in how far back they see, and what rows with one beginning read once."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from turnwise.cores import compiled
from turnwise.devices import compute_dtype

UNCOMMON = ("softcap", "s_aux", "position_bias")
"""What some models ask of their attention besides; it is left to transformers then."""

ALL_SLIDING = ("ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2")
"""The kinds of model whose configurations name no layers: where they have a window, every layer has it."""


def sliding_layers(model: PreTrainedModel) -> frozenset[int]:
    """The layers that see the last `sliding_window` tokens alone."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    if kinds is None and config.model_type in ALL_SLIDING and config.sliding_window:
        return frozenset(range(config.num_hidden_layers))
    return frozenset(i for i, kind in enumerate(kinds or ()) if kind == "sliding_attention")


def attention_masks(
    model: PreTrainedModel, queries: torch.Tensor, keys: torch.Tensor, near: torch.Tensor | None = None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What `transformers` takes as attention mask: additive (B, 1, T, S), one for each kind of layer of the model.

    `queries` (B, T) and `keys` (B, S) are the positions of both; -1 is a key that nobody sees. A query sees keys up to
    its own position, and in layers with sliding attention the last `sliding_window` of them. `near` are the keys of
    those layers where they are given others.
    """
    dtype = compute_dtype(model)
    seen = _seen(queries, keys)
    if not sliding_layers(model):
        return _additive(seen, dtype)
    beyond = (queries - model.config.sliding_window)[:, :, None]
    sliding = _additive(
        seen & (keys[:, None] > beyond) if near is None else _seen(queries, near) & (near[:, None] > beyond), dtype
    )
    if getattr(model.config, "layer_types", None) is None:
        return sliding
    return {"full_attention": _additive(seen, dtype), "sliding_attention": sliding}


@compiled
def _seen(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    # int64's largest, which the compiler takes as a literal alone
    return keys.masked_fill(keys < 0, 9223372036854775807).unsqueeze(1) <= queries.unsqueeze(2)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, else the most negative number that is one in float32 too, where some models take the softmax."""
    hidden = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    zero, least = torch.tensor((0.0, hidden), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, least)[:, None]


@dataclass(frozen=True, eq=False)
class Beginnings:
    """Which rows of a batch begin alike, each family of them with the same keys and values."""

    length: int
    """Tokens that the rows of every family have in common."""
    row: torch.Tensor
    """A row of each family, [F]."""
    members: torch.Tensor
    """The rows of each family, [F, n]; the shorter ones repeat one."""
    place: torch.Tensor
    """Where each row of the batch stands in the flattened `members`, [B]; anywhere where nobody looks at it."""
    mask: torch.Tensor | None = None
    """The additive mask [B, 1, 1, S] that goes with them. A model that makes another of it reads every row whole."""


QUERIES = 256
"""About how many of a long stretch's queries are computed at once: they need not see what follows all of them."""
NEAR_QUERIES = 64
"""How many of them are computed at once in a layer that sees a few keys back alone."""


@dataclass(frozen=True, eq=False)
class Stretches:
    """That each row of keys is what its queries continue, in order, and then their own."""

    mask: torch.Tensor
    """The additive mask [B, 1, T, S] that goes with them. A model that makes another of it is left to transformers."""
    near: torch.Tensor | None = None
    """In a layer that sees the last keys alone, the mask of n pieces of a row, [B n, 1, T', S']; see `near_mask`."""


def near_mask(queries: torch.Tensor, keys: torch.Tensor, window: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask for `NEAR_QUERIES` queries at a time with the keys that one of them may see, additive [B n, 1, T', S'].

    `queries` (B, T) and `keys` (B, S) are positions in order, of which the last T keys are the queries' own; -1 is a
    key that nobody sees. None where to part the queries leaves out too little.
    """
    count, size = queries.shape[1], NEAR_QUERIES + window - 1
    pieces = -(-count // NEAR_QUERIES)
    if pieces == 1 or 2 * size > keys.shape[1]:
        return None
    ahead, behind = _near_padding(count, keys.shape[1], size)
    near = torch.nn.functional.pad(keys, (ahead, behind), value=-1).unfold(1, size, NEAR_QUERIES).flatten(0, 1)
    own = torch.nn.functional.pad(queries, (0, behind)).unflatten(1, (pieces, -1)).flatten(0, 1)
    return _additive(_seen(own, near) & (near[:, None] > (own - window)[:, :, None]), dtype)


def _near_padding(queries: int, keys: int, size: int) -> tuple[int, int]:
    """How many keys of no token to put before and behind so that they part into pieces that overlap."""
    return size - NEAR_QUERIES - (keys - queries), -queries % NEAR_QUERIES


def _stretches_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stretches: Stretches, scaling: float | None
) -> torch.Tensor:
    """Attention in pieces, [B, T, H, E]; arguments as of `processor_attention`."""
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scaling, enable_gqa=True)
    count, before = query.shape[2], key.shape[2] - query.shape[2]
    if stretches.near is None:
        pieces = max(1, round(count / QUERIES))
        ends = [count * i // pieces for i in range(pieces + 1)]
        parts = []
        for start, end in itertools.pairwise(ends):
            seen = before + end
            mask = stretches.mask[:, :, start:end, :seen]
            part = attend(query[:, :, start:end], key[:, :, :seen], value[:, :, :seen], attn_mask=mask)
            parts.append(part.transpose(1, 2))
        return torch.cat(parts, 1)
    size = stretches.near.shape[-1]
    ahead, behind = _near_padding(count, key.shape[2], size)
    pad = torch.nn.functional.pad
    own = pad(query, (0, 0, 0, behind)).unflatten(2, (-1, NEAR_QUERIES)).transpose(1, 2).flatten(0, 1)
    keys, values = (
        pad(states, (0, 0, ahead, behind)).unfold(2, size, NEAR_QUERIES).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for states in (key, value)
    )
    attended = attend(own, keys, values, attn_mask=stretches.near)
    return attended.unflatten(0, (len(query), -1)).permute(0, 1, 3, 2, 4).flatten(1, 2)[:, :count]


def processor_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [B, H, T, D] to `key` [B, K, S, D] and `value` [B, K, S, E], which is [B, T, H, E].

    It is transformers' own sdpa but for keys that say `beginnings`, as those of the engine's cache do on a processor,
    or `stretches`, as those of a quick model's update do: there keys are not repeated for the heads that share them,
    and what rows begin with is read once, and what is not seen less often.
    """
    stretches: Stretches | None = getattr(key, "stretches", None)
    special = options.get("dropout") or any(options.get(name) is not None for name in UNCOMMON)
    if stretches is not None and attention_mask is stretches.mask and not special:
        return _stretches_attention(query, key, value, stretches, options.get("scaling")), None
    unmarked = not hasattr(key, "beginnings") or torch.is_grad_enabled()
    if attention_mask is None or unmarked or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    beginnings: Beginnings | None = key.beginnings  # pyright: ignore[reportAttributeAccessIssue]
    scaling = options.get("scaling")
    if beginnings is not None and attention_mask is beginnings.mask:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        family = beginnings.row, beginnings.members, beginnings.place
        return _by_families(query * scale, key, value, attention_mask, beginnings.length, *family), None
    if query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


def _by_family(states: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """[B, K, G, X] as [F, K, n G, X]."""
    return states[members].transpose(1, 2).flatten(2, 3)


def _by_row(states: torch.Tensor, place: torch.Tensor, per_key: int) -> torch.Tensor:
    """And back."""
    return states.unflatten(2, [-1, per_key]).transpose(1, 2).flatten(0, 1)[place]


@compiled
def _by_families(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    size: int,
    row: torch.Tensor,
    members: torch.Tensor,
    place: torch.Tensor,
) -> torch.Tensor:
    """Attention of one scaled query of each row, [B, 1, H, E].

    The queries of a family's rows are those of one product with its beginning of `size` tokens, which all of them see.
    One softmax goes over beginning and rest. The others are as in `Beginnings`.
    """
    rows, heads, _, width = query.shape
    queries = query.reshape(rows, key.shape[1], -1, width)
    per_key = queries.shape[2]
    own = key[:, :, size:]
    begun = _by_row(_by_family(queries, members) @ key[row, :, :size].mT, place, per_key)
    scores = torch.cat((begun, queries @ own.mT + mask[..., size:]), -1)
    weights = scores.softmax(-1)
    attended = _by_row(_by_family(weights[..., :size], members) @ value[row, :, :size], place, per_key)
    attended = attended + weights[..., size:] @ value[:, :, size:]
    return attended.reshape(rows, 1, heads, value.shape[-1])


AttentionInterface.register("sdpa", processor_attention)
