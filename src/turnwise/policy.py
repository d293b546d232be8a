"""The policy: a Hugging Face causal language model with its chat, and log-probabilities under it."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from turnwise.batch import MicroBatch, Row, pack
from turnwise.chat import Chat, load_chat, save_chat
from turnwise.checksums import damage
from turnwise.cores import fuse_norms
from turnwise.devices import computing, recomputing
from turnwise.engines.attention import Stretches, attention_masks, near_mask, sliding_layers
from turnwise.engines.families import check_model, longest_context, output_logits
from turnwise.errors import ConfigError, InputError, RunError
from turnwise.logits import logprobs_of
from turnwise.lora import load_adapter
from turnwise.quick import is_quick
from turnwise.records import parsed
from turnwise.sources import adapter_base, check_code, handed_on, is_adapter, policy_folder

EMBEDDED = {"embedded": "policy", "embedded-search": "policy-search"}
"""The checkpoints that ship with the package, by name: for the protocols `tools` and `search`; and their folders."""
MOST_OFF = {True: 1e-2, False: 0.2}
"""How far apart two ways to compute the same logits may be, of their size: with four bytes a number, and with two."""


@dataclass(frozen=True)
class Policy:
    """A model and the chat that speaks its tokens."""

    model: PreTrainedModel
    chat: Chat
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The tokenizer's files, the chat template and the generation configuration that it came with, by name."""

    @property
    def context(self) -> int:
        """The longest sequence that the model takes, tokens."""
        return longest_context(self.model.config)

    @property
    def learned(self) -> list[torch.nn.Parameter]:
        """What training changes: the adapter alone, where there is one."""
        return [p for p in self.model.parameters() if p.requires_grad]


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


def load_policy(source: str | Path, *, verified: bool = False) -> Policy:
    """The policy in a checkpoint folder, of the Hugging Face hub (owner/name), or of the package (see `EMBEDDED`).

    A folder may hold an adapter alone, which names its base model. Raises InputError where there is no such policy,
    ConfigError for a model that cannot be trained here, and RunError where files are damaged or do not fit each other.
    Files that were written with checksums are held to them, unless the caller has `verified` that.
    """
    folder, _ = named_folder(source)
    fault = None if verified else damage(folder)
    if fault:
        raise RunError(f"checkpoint {folder} must be as it was written; {fault}; use another checkpoint")
    with _without_bars():
        if is_adapter(folder):
            return _adapted(folder)
        return _loaded(folder)


def named_folder(source: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a policy's files, downloaded from the hub if need be, and its revision where it is of the hub."""
    if str(source) in EMBEDDED:
        return embedded_checkpoint(str(source)), None
    return policy_folder(source, names=" or ".join(EMBEDDED), revision=revision)


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


def _adapted(folder: Path) -> Policy:
    """An adapter in its base model, with the tokenizer that was saved beside the adapter."""
    check_code(folder)
    base, revision = adapter_base(folder)
    try:
        policy = _loaded(named_folder(base, revision)[0])
    except InputError as error:
        raise RunError(f"adapter {folder} must find its base model, {base}; {error}") from error
    load_adapter(policy.model, folder, base=base)
    own = handed_on(folder)
    chat = load_chat(folder) if "tokenizer.json" in own else policy.chat
    return Policy(policy.model, chat, {**policy.files, **own})


def _loaded(folder: Path) -> Policy:
    _check_config(folder)
    check_code(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, loading = loaded
    except Exception as error:  # safetensors, json and transformers each raise their own
        raise _unreadable(folder, error) from error
    if loading["missing_keys"]:
        raise RunError(
            f"checkpoint {folder} must hold a whole model; it lacks {sorted(loading['missing_keys'])[0]} and "
            f"{len(loading['missing_keys']) - 1} other tensors; use another checkpoint"
        )
    check_model(model)
    _check_computed(model)
    fuse_norms(model)
    policy = Policy(model, load_chat(folder), handed_on(folder))
    rows = model.get_input_embeddings().weight.shape[0]
    if policy.chat.tokenizer.vocab_size > rows:
        raise RunError(
            f"the tokenizer of checkpoint {folder} must fit its model, which has {rows} tokens; it has "
            f"{policy.chat.tokenizer.vocab_size}; use the tokenizer.json that belongs to the model"
        )
    return policy


def _unreadable(folder: Path, error: Exception) -> RunError:
    return RunError(
        f"checkpoint {folder} must hold a whole model in safetensors; it cannot be read "
        f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); use another checkpoint"
    )


def _check_config(folder: Path) -> None:
    """Before any weight is read: RunError for a damaged configuration, ConfigError for another kind of model."""
    try:
        record = parsed((folder / "config.json").read_text(encoding="utf-8"))
        kind = record.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(folder, error) from error
    if kind is None and isinstance(record.get("config"), dict) and "turnwise" in record:
        raise ConfigError(
            f"a policy must be a checkpoint; {folder} is a run; take the best or newest of its own, such as "
            f"{folder / 'best'}"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = (
            "code of its own, which is not run" if "auto_map" in record else "no causal language model of transformers"
        )
        raise ConfigError(
            f"a policy must be a causal language model that transformers knows; {folder} is {kind!r}: {own}; take "
            "another model, or a later transformers"
        )
    if record.get("is_encoder_decoder") or "text_config" in record:
        reason = "has an encoder" if record.get("is_encoder_decoder") else "takes more than text"
        raise ConfigError(f"a policy must be a decoder of text alone; {folder} ({kind}) {reason}; take another model")
    if record.get("quantization_config"):
        raise ConfigError(
            f"a policy's weights must be plain numbers; those of {folder} are quantised "
            f"({record['quantization_config'].get('quant_method', 'unknown method')}); take the original checkpoint"
        )


def _check_computed(model: PreTrainedModel) -> None:
    """ConfigError where the model's own forward pass and ours, with cache, masks and shared beginnings, disagree.

    For any family that `transformers` has or will have: two rows of twelve tokens that share eight, in the update's way
    and by the model's own.
    """
    embeddings: Any = model.get_input_embeddings()
    vocab = int(embeddings.weight.shape[0])
    tokens = [(7 * i * vocab // 89 + i) % vocab for i in range(16)]
    rows = [_plain_row(tokens[:4], [*tokens[4:8], *end]) for end in (tokens[8:12], tokens[12:16])]
    batch = pack(rows, pad_id=0)
    try:
        with torch.no_grad():
            found = output_logits(model, token_states(model, batch)[batch.place]).float()
            ids = torch.tensor([[*row.prompt_ids, *row.ids] for row in rows], device=model.device)
            expected = model(input_ids=ids).logits[:, 3:-1].float()
    except Exception as error:  # whatever a model does that knows no cache or mask of ours
        raise ConfigError(
            f"a policy's decoder must take a cache and masks as Llama's does; that of {model.config.model_type} does "
            f"not ({type(error).__name__}: {' '.join(str(error).split())[:200]}); take another model"
        ) from error
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    off = float((found - expected).norm() / spread)
    if not off < MOST_OFF[model.dtype.itemsize > 2]:
        raise ConfigError(
            f"a policy must compute the same with a cache and masks of ours as by itself; the logits of "
            f"{model.config.model_type} are {off:.2g} of their size apart (weights that are no numbers, or a family "
            "that needs care that it does not get here); take another model"
        )


def _plain_row(prompt: list[int], ids: list[int]) -> Row:
    """A row of two turns, of which nothing but the tokens matters."""
    zeros, action = np.zeros(len(ids), np.float32), np.arange(len(ids)) % 4 > 0
    action[0] = True
    return Row(
        prompt_ids=tuple(prompt), ids=tuple(ids), action=action, loss=action, sampling_logprobs=zeros, advantages=zeros
    )


def save_policy(policy: Policy, folder: Path) -> None:
    """Writes weights (safetensors), configuration, tokenizer and chat template; `transformers` loads the folder.

    Of a policy with an adapter the adapter alone is written, which names its base model. The files that the policy came
    with are kept as they were.
    """
    with _without_bars():
        policy.model.save_pretrained(folder)
    for name, content in policy.files.items():
        (folder / name).write_bytes(content)
    if not policy.files:
        save_chat(policy.chat, folder)


class _AncestorCache(Cache):
    """Keys and values of what each stretch continues, put before its own. Gradients flow through."""

    def __init__(self, before: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        super().__init__(layers=[])
        self.before = before or {}
        self.stretches: dict[int, Stretches] = {}
        """What the keys of a layer tell their attention."""
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx in self.before:
            keys, values = self.before[layer_idx]
            key_states, value_states = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        self.seen.setdefault(layer_idx, (key_states, value_states))  # a layer that is computed again adds nothing
        if layer_idx in self.stretches:
            vars(key_states)["stretches"] = self.stretches[layer_idx]
        return key_states, value_states

    def descended(self, parent: torch.Tensor, near: torch.Tensor, sliding: frozenset[int]) -> "_AncestorCache":
        """That of the next level, whose row i continues row `parent[i]`. Sliding layers keep the keys `near` (N, S)."""
        before = {}
        for layer, seen in self.seen.items():
            keys, values = (states.index_select(0, parent) for states in seen)
            if layer in sliding:
                at = near[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
                keys, values = keys.gather(2, at), values.gather(2, at)
            before[layer] = (keys, values)
        return _AncestorCache(before)


def token_states(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Last hidden states from which each token is predicted, (M, hidden).

    M places as `batch.place` numbers them; each holds the state *before* its token: for a stretch's first token the
    last one of the stretch that it continues, and zeros where there is none. A quick model reads long stretches in
    pieces (`Stretches`).
    """
    decoder, quick = model.get_decoder(), is_quick(model)
    cache, sliding = _AncestorCache(), sliding_layers(model)
    window = model.config.sliding_window if sliding else 0
    found: list[torch.Tensor] = []
    device = batch.ids.device
    before = torch.empty(0, device=device)  # the states that the level's first tokens are predicted from
    start = torch.zeros(1, dtype=torch.int64, device=device)
    full = near = torch.empty(1, 0, dtype=torch.int64, device=device)  # positions of the keys in view; -1 is padding
    for depth, level in enumerate(batch.levels):
        if depth:
            positions, places = near.topk(min(window - 1, near.shape[1]) if sliding else 0)
            if quick:  # in order, as `near_mask` takes them
                positions, places = positions.flip(1), places.flip(1)
            cache = cache.descended(level.parent, places[level.parent], sliding)
            full, near = full[level.parent], positions[level.parent]
        start = start[level.parent]
        steps = torch.arange(level.ids.shape[1], device=device)
        positions = start[:, None] + steps
        own = positions.masked_fill(steps >= level.lengths[:, None], -1)
        full, near = torch.cat([full.expand(len(own), -1), own], 1), torch.cat([near.expand(len(own), -1), own], 1)
        masks = attention_masks(model, positions, full, near)
        if quick:
            cache.stretches = _stretches(model, masks, positions, near)
        with computing(model), recomputing(model):
            states = decoder(
                input_ids=level.ids,
                attention_mask=masks,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        before = before if depth else states.new_zeros(1, 1, states.shape[-1])
        found.append(torch.cat([before[level.parent], states[:, :-1]], 1).flatten(0, 1))
        before = states[torch.arange(len(states), device=device), level.lengths - 1][:, None]
        start = start + level.lengths
    return torch.cat(found)


def _stretches(
    model: PreTrainedModel, masks: torch.Tensor | dict[str, torch.Tensor], queries: torch.Tensor, near: torch.Tensor
) -> dict[int, Stretches]:
    """What each layer's attention is told of queries at positions (B, T) with keys at `near` (B, S) in sliding ones."""
    layers, sliding = range(model.config.num_hidden_layers), sliding_layers(model)
    full = masks["full_attention"] if isinstance(masks, dict) else masks
    found = dict.fromkeys(layers, Stretches(full))
    if sliding:
        own = masks["sliding_attention"] if isinstance(masks, dict) else masks
        part = near_mask(queries, near, model.config.sliding_window, own.dtype)
        found |= dict.fromkeys(sliding, Stretches(own, part))
    return found


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
    states = token_states(model, batch) if states is None else states
    head = functools.partial(output_logits, model)
    with computing(model):
        embeddings: Any = model.get_input_embeddings()
        vocabulary = int(embeddings.weight.shape[0])
        logprobs, entropy = logprobs_of(head, states[places], tokens, temperature=temperature, vocabulary=vocabulary)
    return logprobs[inverse], entropy[inverse]
