"""Attention masks for models whose layers may differ in how far back they see."""

import torch
from transformers import PreTrainedModel


def attention_masks(
    model: PreTrainedModel, visible: torch.Tensor, distance: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What `transformers` takes as attention mask: additive (B, 1, T, S), one for each kind of layer of the model.

    `visible` says which keys a query may see, `distance` how many tokens before it they stand; both (B, T, S). Layers
    with sliding attention see the last `sliding_window` tokens, the query's own included.
    """
    dtype = next(model.parameters()).dtype
    full = _additive(visible, dtype)
    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
        return full
    near = _additive(visible & (distance < model.config.sliding_window), dtype)
    return {"full_attention": full, "sliding_attention": near}


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, else the most negative number."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
