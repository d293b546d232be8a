"""Attention masks for models whose layers may differ in how far back they see."""

import torch
from transformers import PreTrainedModel

from turnwise.devices import compute_dtype


def sliding_layers(model: PreTrainedModel) -> frozenset[int]:
    """The layers that see the last `sliding_window` tokens alone."""
    kinds = getattr(model.config, "layer_types", None) or ()
    return frozenset(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def attention_masks(
    model: PreTrainedModel, distance: torch.Tensor, near: torch.Tensor | None = None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What `transformers` takes as attention mask: additive (B, 1, T, S), one for each kind of layer of the model.

    `distance` (B, T, S) says how many tokens before a query each key stands; a negative one cannot be seen. Layers with
    sliding attention see distances below `sliding_window`; `near` holds theirs where they are given other keys.
    """
    dtype = compute_dtype(model)
    full = _additive(distance >= 0, dtype)
    if not sliding_layers(model):
        return full
    near = distance if near is None else near
    return {
        "full_attention": full,
        "sliding_attention": _additive((near >= 0) & (near < model.config.sliding_window), dtype),
    }


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, else the most negative number."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
