"""A tiny random model of each family, for the tests of the engine and the update."""

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 50
WINDOW = {"sliding_window": 3}
SLIDING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama 3": ("LlamaForCausalLM", {"rope_parameters": LLAMA_3}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3 with a sliding layer": ("Qwen3ForCausalLM", {"use_sliding_window": True, **SLIDING}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral, all sliding": ("MistralForCausalLM", WINDOW),
    "gemma": ("GemmaForCausalLM", {"head_dim": 8}),
    "gemma 2": (
        "Gemma2ForCausalLM",
        {"head_dim": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0, **SLIDING},
    ),
    "gemma 3": ("Gemma3ForCausalLM", {"head_dim": 8, "query_pre_attn_scalar": 16, **SLIDING}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "phi": ("PhiForCausalLM", {"partial_rotary_factor": 0.5}),
    "phi 3": ("Phi3ForCausalLM", {"pad_token_id": 0, **WINDOW}),
    "phi 3, longrope": (
        "Phi3ForCausalLM",
        {"pad_token_id": 0, "rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "granite": (
        "GraniteForCausalLM",
        {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.5},
    ),
    "cohere 2": ("Cohere2ForCausalLM", {"logit_scale": 0.25, **SLIDING}),
    "olmo 2": ("Olmo2ForCausalLM", {}),
    "olmo 3": ("Olmo3ForCausalLM", SLIDING),
    "starcoder 2": ("Starcoder2ForCausalLM", WINDOW),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": None}),
    "gpt-oss": ("GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 8, **SLIDING}),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "gpt 2": ("GPT2LMHeadModel", {"n_inner": 48}),
}
"""Families by name: their class in `transformers`, and what is special about the model."""
RARER = (
    *("llama 3", "mistral", "phi 3, longrope", "olmo 2", "olmo 3"),
    *("starcoder 2", "mixtral", "gpt-oss", "gpt-neox", "gpt 2"),
)
EACH_FAMILY = [pytest.param(name, marks=pytest.mark.slow if name in RARER else ()) for name in FAMILIES]
"""What tests of every family are parametrised with; the rarer ones, and those that differ little, are slow tests."""


def tiny(
    family: str = "qwen3",
    *,
    kv_heads: int = 2,
    tied: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attention: str | None = None,
    vocab: int = VOCAB,
    **options: Any,
) -> PreTrainedModel:
    """A random model of two layers; large initial weights, so that nothing it says is flat."""
    name, special = FAMILIES[family]
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    config = kind.config_class(
        **{
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "tie_word_embeddings": tied,
            **special,
            **options,
        }
    )
    config._attn_implementation = attention or ("sdpa" if kind._supports_sdpa else "eager")
    config._experts_implementation = "eager"  # the others have no float64
    return kind(config).to(dtype).eval()
