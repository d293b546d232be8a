"""What the engine and the update must know of a family of models: its logits, its context, what it is refused for.

Both call the decoder themselves, with a cache and masks of their own, and then the output layer. What a family computes
inside its decoder (partial rotary embeddings, norms of queries and keys, scaled embeddings, capped attention) comes
along; what it does around the decoder stands here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from turnwise.engines.attention import ALL_SLIDING
from turnwise.errors import ConfigError

LAYERS = ("full_attention", "sliding_attention")
GROWING_ROPES = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies change once a sequence is longer than those the model began with."""


def output_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of last hidden states (..., hidden), as the model's own forward pass gives them.

    Cohere multiplies the output layer's by `logit_scale`, Granite divides them by `logits_scaling`, and Gemma 2 caps
    them softly: cap x tanh(logits / cap).
    """
    head: Any = model.get_output_embeddings()
    logits, config = head(states), model.config
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def longest_context(config: Any) -> int:
    """The longest sequence that the model takes while its rotary frequencies stay what they are, tokens."""
    sizes = [int(config.max_position_embeddings)]
    sizes += [int(rope["original_max_position_embeddings"]) for rope in _ropes(config) if _kind(rope) == "longrope"]
    return min(sizes)


def check_model(model: PreTrainedModel, *, context: int | None = None) -> None:
    """Raises ConfigError, with the reason, for a model whose tokens would come out wrong, or would beyond `context`."""
    config = model.config
    if model.get_output_embeddings() is None or not getattr(config, "max_position_embeddings", None):
        raise ConfigError(
            "a policy must have an output layer, and say in max_position_embeddings how long a sequence it takes; "
            f"{config.model_type} does not; take another model"
        )
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    odd = sorted(set(kinds or ()) - set(LAYERS))
    unnamed = kinds is None and getattr(config, "sliding_window", None) and config.model_type not in ALL_SLIDING
    if odd or unnamed:
        raise ConfigError(
            "a policy must have full or sliding attention in every layer, and say which; got "
            f"{', '.join(odd) or 'a sliding_window without layer_types'} ({config.model_type}); take another model"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ConfigError(
            "a policy's tokens must see only those before them; got use_bidirectional_attention; take a model that "
            "generates, not one that embeds"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"a policy must be loaded with attn_implementation 'sdpa' or 'eager'; got "
            f"{config._attn_implementation!r}; load it with 'sdpa'"
        )
    growing = [kind for kind in map(_kind, _ropes(config)) if kind in GROWING_ROPES]
    if growing and context is not None and context > longest_context(config):
        raise ConfigError(
            "a policy's rotary frequencies must not depend on the length of the sequence; beyond "
            f"{longest_context(config)} tokens those of rope_type {growing[0]!r} do; got a context of {context}; "
            "lower it"
        )


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of the rotary embeddings: one mapping, or one for each kind of layer."""
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [rope for rope in ropes.values() if isinstance(rope, Mapping)]
    return nested or [ropes]


def _kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", "default")
