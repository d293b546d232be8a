"""The policy: a Hugging Face causal language model with its chat, and log-probabilities under it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import Cache

from turnwise.batch import MicroBatch
from turnwise.chat import BPETokenizer, Chat, load_chat
from turnwise.engines.attention import attention_masks
from turnwise.errors import InputError, RunError

EMBEDDED = "embedded"
"""The name of the checkpoint that ships with the package."""


@dataclass(frozen=True)
class Policy:
    """A model and the chat that speaks its tokens."""

    model: PreTrainedModel
    chat: Chat

    @property
    def context(self) -> int:
        """The longest sequence that the model takes, tokens."""
        return int(self.model.config.max_position_embeddings)


def tiny_policy(chat: Chat, *, seed: int, hidden: int = 128, layers: int = 3) -> Policy:
    """A fresh Qwen3 of about a million parameters.

    The first layer attends to a token and the one before it alone (Qwen3's sliding attention with a window of 2). That
    is half of an induction head: with it so small a model learns to copy in some 300 steps, without it not in 400
    (`benchmarks/copying.py`). Wide heads let one head carry a whole token.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=chat.tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,
        layer_types=["sliding_attention", *["full_attention"] * (layers - 1)],
        use_sliding_window=True,
        sliding_window=2,
        bos_token_id=chat.start_id,
        eos_token_id=chat.end_id,
        pad_token_id=chat.pad_id,
    )
    config._attn_implementation = "sdpa"
    return Policy(Qwen3ForCausalLM(config), chat)


def embedded_checkpoint() -> Path:
    """The folder of the warmed-up checkpoint that ships with the package."""
    return Path(__file__).parent / "data" / "policy"


def load_policy(source: str | Path) -> Policy:
    """The policy in a checkpoint folder, or the embedded one for the name "embedded".

    Raises RunError where the folder is not a checkpoint or is damaged.
    """
    folder = embedded_checkpoint() if str(source) == EMBEDDED else Path(source)
    if not (folder / "config.json").is_file():
        raise InputError(f"policy must be {EMBEDDED!r} or a checkpoint folder with config.json; got {str(source)!r}")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
        model, loading = loaded
    except Exception as error:  # safetensors, json and transformers each raise their own
        raise RunError(
            f"checkpoint {folder} must hold a whole model; it cannot be read "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); use another checkpoint of the run"
        ) from error
    if loading["missing_keys"]:
        raise RunError(
            f"checkpoint {folder} must hold a whole model; it lacks {sorted(loading['missing_keys'])[0]} and "
            f"{len(loading['missing_keys']) - 1} other tensors; use another checkpoint of the run"
        )
    policy = Policy(model, load_chat(folder))
    rows = model.get_input_embeddings().weight.shape[0]
    if policy.chat.tokenizer.vocab_size > rows:
        raise RunError(
            f"the tokenizer of checkpoint {folder} must fit its model, which has {rows} tokens; it has "
            f"{policy.chat.tokenizer.vocab_size}; use the tokenizer.json that belongs to the model"
        )
    return policy


def save_policy(policy: Policy, folder: Path) -> None:
    """Writes weights (safetensors), configuration and tokenizer; `transformers` loads the folder as it is."""
    policy.model.save_pretrained(folder)
    tokenizer = policy.chat.tokenizer
    assert isinstance(tokenizer, BPETokenizer), "only a real tokenizer can be saved"
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class _PrefixCache(Cache):
    """Keys and values of the prompts, put before each row's own. Gradients flow through."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.prompt_of: torch.Tensor | None = None

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.prompt_of is None:
            self.prompt[layer_idx] = (key_states, value_states)
            return key_states, value_states
        keys, values = (x.index_select(0, self.prompt_of) for x in self.prompt[layer_idx])
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


def token_states(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Last hidden states from which each following token is predicted, (B, T, hidden).

    Position (b, t) holds the state *before* `ids[b, t]`: the prompt's last one for t = 0.
    """
    decoder = model.get_decoder()
    cache = _PrefixCache()
    num_prompts, prompt_length = batch.prompts.shape
    at = torch.arange(prompt_length)
    back = (at[:, None] - at[None, :]).expand(num_prompts, -1, -1)
    prompt_states = decoder(
        input_ids=batch.prompts,
        attention_mask=attention_masks(model, back >= 0, back),
        position_ids=at[None].expand(num_prompts, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    last = prompt_states[torch.arange(num_prompts), batch.prompt_lengths - 1]
    first = last[batch.prompt_of][:, None]
    length = batch.ids.shape[1] - 1
    if length == 0:
        return first
    cache.prompt_of = batch.prompt_of
    lengths = batch.prompt_lengths[batch.prompt_of]
    steps = torch.arange(length)
    positions = lengths[:, None] + steps[None]
    in_prompt = (at[None, :] < lengths[:, None])[:, None, :].expand(-1, length, -1)
    to_prompt = positions[:, :, None] - at[None, None, :]
    back = (steps[:, None] - steps[None, :]).expand(batch.num_rows, -1, -1)
    states = decoder(
        input_ids=batch.ids[:, :-1],
        attention_mask=attention_masks(model, torch.cat([in_prompt, back >= 0], 2), torch.cat([to_prompt, back], 2)),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first, states], 1)


def token_logprobs(
    model: PreTrainedModel, batch: MicroBatch, where: torch.Tensor, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (nats) of the tokens at `where` (B, T), each (N,) in row-major order.

    Under the distribution softmax(logits / temperature), which is the one that was sampled from. The vocabulary
    projection runs at these positions alone.
    """
    states = token_states(model, batch)[where]
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output layer"
    logits = head(states).float() / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, batch.ids[where][:, None])[:, 0], entropy
