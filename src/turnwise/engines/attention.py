"""Attention masks for models whose layers may differ in how far back they see."""

import torch
from transformers import PreTrainedModel

from turnwise.devices import compute_dtype

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
    model: PreTrainedModel, distance: torch.Tensor, near: torch.Tensor | None = None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What `transformers` takes as attention mask: additive (B, 1, T, S), one for each kind of layer of the model.

    `distance` (B, T, S) says how many tokens before a query each key stands; a negative one cannot be seen. Layers with
    sliding attention see distances below `sliding_window`; `near` holds theirs where they are given other keys.
    """
    dtype = compute_dtype(model)
    if not sliding_layers(model):
        return _additive(distance >= 0, dtype)
    near = distance if near is None else near
    sliding = _additive((near >= 0) & (near < model.config.sliding_window), dtype)
    if getattr(model.config, "layer_types", None) is None:
        return sliding
    return {"full_attention": _additive(distance >= 0, dtype), "sliding_attention": sliding}


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, else the most negative number that is one in float32 too, where some models take the softmax."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, max(torch.finfo(dtype).min, torch.finfo(torch.float32).min))[:, None]
