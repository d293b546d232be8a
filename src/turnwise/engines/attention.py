"""Attention: masks for layers that differ in how far back they see, and what rows with one beginning read once."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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


def _seen(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    never = torch.iinfo(keys.dtype).max
    return keys.masked_fill(keys < 0, never)[:, None] <= queries[:, :, None]


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


def processor_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [B, H, T, D] to `key` [B, K, S, D] and `value` [B, K, S, E], which is [B, T, H, E].

    It is transformers' own sdpa but for keys that say `beginnings`, as those of the engine's cache do on a processor:
    there keys are not repeated for the heads that share them, and what rows begin with is read once.
    """
    unmarked = not hasattr(key, "beginnings") or torch.is_grad_enabled()
    special = options.get("dropout") or any(options.get(name) is not None for name in UNCOMMON)
    if attention_mask is None or unmarked or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    beginnings: Beginnings | None = key.beginnings  # pyright: ignore[reportAttributeAccessIssue]
    scaling = options.get("scaling")
    if beginnings is not None and attention_mask is beginnings.mask:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _by_families(query * scale, key, value, attention_mask, beginnings), None
    if query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


def _by_families(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, beginnings: Beginnings
) -> torch.Tensor:
    """Attention of one scaled query of each row, [B, 1, H, E].

    The queries of a family's rows are those of one product with its beginning, which all of them see. One softmax goes
    over beginning and rest.
    """
    size, (rows, heads) = beginnings.length, query.shape[:2]
    queries = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    per_key = queries.shape[2]

    def by_family(states: torch.Tensor) -> torch.Tensor:  # [B, K, G, X] to [F, K, n G, X]
        return states[beginnings.members].transpose(1, 2).flatten(2, 3)

    def by_row(states: torch.Tensor) -> torch.Tensor:  # and back
        return states.unflatten(2, (-1, per_key)).transpose(1, 2).flatten(0, 1)[beginnings.place]

    begun, own = key[beginnings.row, :, :size], key[:, :, size:]
    scores = torch.cat((by_row(by_family(queries) @ begun.mT), queries @ own.mT + mask[..., size:]), -1)
    weights = scores.softmax(-1)
    attended = by_row(by_family(weights[..., :size]) @ value[beginnings.row, :, :size])
    attended = attended + weights[..., size:] @ value[:, :, size:]
    return attended.reshape(rows, 1, heads, value.shape[-1])


AttentionInterface.register("sdpa", processor_attention)
