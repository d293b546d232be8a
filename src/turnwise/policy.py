"""The policy: a Hugging Face causal language model with its chat, and log-probabilities under it."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from turnwise.batch import MicroBatch
from turnwise.chat import CHAT_TEMPLATE, BPETokenizer, Chat, load_chat
from turnwise.engines.attention import attention_masks, sliding_layers
from turnwise.errors import InputError, RunError

EMBEDDED = {"embedded": "policy", "embedded-search": "policy-search"}
"""The checkpoints that ship with the package, by name: for the protocols `tools` and `search`; and their folders."""


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

    The first layer attends to a token and the two before it alone (Qwen3's sliding attention with a window of 3). That
    is half of an induction head: with it so small a model learns to copy in some 300 steps, without it not in 400
    (`benchmarks/copying.py`). Two tokens rather than one, because between the words of a name stands a space. Wide
    heads let one head carry a whole token.
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
        sliding_window=3,
        bos_token_id=chat.start_id,
        eos_token_id=chat.end_id,
        pad_token_id=chat.pad_id,
    )
    config._attn_implementation = "sdpa"
    return Policy(Qwen3ForCausalLM(config), chat)


def embedded_checkpoint(name: str = "embedded") -> Path:
    """The folder of a warmed-up checkpoint that ships with the package."""
    return Path(__file__).parent / "data" / EMBEDDED[name]


def load_policy(source: str | Path) -> Policy:
    """The policy in a checkpoint folder, or one that ships with the package (see `EMBEDDED`).

    Raises RunError where the folder is not a checkpoint or is damaged.
    """
    folder = embedded_checkpoint(str(source)) if str(source) in EMBEDDED else Path(source)
    with _without_bars():
        return _loaded(source, folder)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers from drawing a progress bar for a file that is read in a moment."""
    drawn = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            transformers_logging.enable_progress_bar()


def _loaded(source: str | Path, folder: Path) -> Policy:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"policy must be {' or '.join(EMBEDDED)}, or a checkpoint folder with config.json; got {str(source)!r}"
        )
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
    with _without_bars():
        policy.model.save_pretrained(folder)
    tokenizer = policy.chat.tokenizer
    assert isinstance(tokenizer, BPETokenizer), "only a real tokenizer can be saved"
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class _AncestorCache(Cache):
    """Keys and values of what each stretch continues, put before its own. Gradients flow through."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx in self.before:
            keys, values = self.before[layer_idx]
            key_states, value_states = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def descend(self, parent: torch.Tensor, near: torch.Tensor, sliding: frozenset[int]) -> None:
        """To the next level, whose row i continues row `parent[i]`. Sliding layers keep the keys `near` (N, S)."""
        for layer, seen in self.seen.items():
            keys, values = (states.index_select(0, parent) for states in seen)
            if layer in sliding:
                at = near[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
                keys, values = keys.gather(2, at), values.gather(2, at)
            self.before[layer] = (keys, values)
        self.seen = {}


def token_states(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Last hidden states from which each token is predicted, (M, hidden).

    M places as `batch.place` numbers them; each holds the state *before* its token: for a stretch's first token the
    last one of the stretch that it continues, and zeros where there is none.
    """
    decoder = model.get_decoder()
    cache, sliding = _AncestorCache(), sliding_layers(model)
    window = model.config.sliding_window if sliding else 0
    found: list[torch.Tensor] = []
    before = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype)
    start = torch.zeros(1, dtype=torch.int64)
    full = near = torch.empty(1, 0, dtype=torch.int64)  # positions of the keys in view; -1 is padding
    for depth, level in enumerate(batch.levels):
        if depth:
            kept = near.topk(min(window - 1, near.shape[1])) if sliding else near.topk(0)
            cache.descend(level.parent, kept.indices[level.parent], sliding)
            full, near = full[level.parent], kept.values[level.parent]
        start = start[level.parent]
        steps = torch.arange(level.ids.shape[1])
        positions = start[:, None] + steps
        own = positions.masked_fill(steps >= level.lengths[:, None], -1)
        full, near = torch.cat([full.expand(len(own), -1), own], 1), torch.cat([near.expand(len(own), -1), own], 1)
        masks = attention_masks(model, _distance(positions, full), _distance(positions, near))
        states = decoder(
            input_ids=level.ids,
            attention_mask=masks,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        found.append(torch.cat([before[level.parent], states[:, :-1]], 1).flatten(0, 1))
        before = states[torch.arange(len(states)), level.lengths - 1][:, None]
        start = start + level.lengths
    return torch.cat(found)


def _distance(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """How far before each query each key stands, (N, T, S); -1 for padding."""
    return (queries[:, :, None] - keys[:, None, :]).masked_fill(keys[:, None, :] < 0, -1)


def token_logprobs(
    model: PreTrainedModel,
    batch: MicroBatch,
    where: torch.Tensor,
    *,
    temperature: float = 1.0,
    states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (nats) of the tokens at `where` (B, T), each (N,) in row-major order.

    Under the distribution softmax(logits / temperature), which is the one that was sampled from. The vocabulary
    projection runs at these tokens alone, and once for those that rollouts have in common. `states` are the batch's
    `token_states`, where they have been computed.
    """
    places, inverse = torch.unique(batch.place[where], return_inverse=True)
    tokens = torch.cat([level.ids.flatten() for level in batch.levels])[places]
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output layer"
    states = token_states(model, batch) if states is None else states
    logits = head(states[places]).float() / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0][inverse], entropy[inverse]
