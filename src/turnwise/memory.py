"""How much memory a training run will take, before it starts.

Weights, gradients and the optimiser's moments are counted. What an update's forward and backward pass hold is found by
making them on shapes alone: torch's fake tensors have sizes and no content, so that the very functions that will train
are run on the largest micro-batch that the options allow, and every tensor is counted while it lives. So it is right
for any architecture, for mixed precision, for recomputation, and for a model of which a part learns (`requires_grad`).
"""

import copy
import dataclasses
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from turnwise.batch import MicroBatch, Row, chunks, pack
from turnwise.config import CRITIC_METHODS, TrainConfig
from turnwise.devices import (
    SMALL,
    chosen_device,
    computing,
    device_memory,
    num_parameters,
    set_computation,
    weight_dtypes,
)
from turnwise.engines.attention import attention_masks, sliding_layers
from turnwise.engines.cache import RowCache
from turnwise.engines.hf import PREFILL_TOKENS
from turnwise.errors import ConfigError
from turnwise.evaluation import opening
from turnwise.logits import logprobs_of
from turnwise.policy import Policy, token_states
from turnwise.rollout import awaited
from turnwise.setting import Setting

ENGINE_ROWS = 256
"""Most rollouts alive at once."""
PROMPTS = 64
"""Questions whose prompts are looked at for the longest one."""
CHARS_PER_TOKEN = 3
"""Of a tool's result, where it cannot be known: fewer than English text has."""
DRAWING_BYTES = 20
"""What drawing a token takes per entry of the vocabulary beside the logits themselves, most of it float64."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long a run's rollouts get at most, tokens."""

    prompt: int
    turn: int
    result: int
    turns: int
    context: int

    @property
    def rollout(self) -> int:
        """A whole conversation."""
        return min(self.context, self.prompt + self.turns * self.turn + (self.turns - 1) * self.result)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes by what they are for, at the fullest moment of each half of a step."""

    held: Mapping[str, int]
    """There from the first step to the last."""
    update: Mapping[str, int]
    rollouts: Mapping[str, int]

    @property
    def total(self) -> int:
        """The fullest moment of all."""
        return sum(self.held.values()) + max(sum(self.update.values()), sum(self.rollouts.values()))

    def text(self) -> str:
        """The estimate as a line."""
        fuller = max(self.update, self.rollouts, key=lambda part: sum(part.values()))
        parts = {**self.held, **fuller}
        return f"memory: about {_gib(self.total)}: " + ", ".join(f"{n} {_gib(b)}" for n, b in parts.items() if b)


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def rollout_lengths(setting: Setting, policy: Policy) -> Lengths:
    """The longest that rollouts get: prompts of the questions, every turn and result as long as allowed."""
    config = setting.config
    tasks = setting.train[:1] if setting.source else setting.train[:: max(1, len(setting.train) // PROMPTS)]
    return Lengths(
        prompt=max(len(policy.chat.prompt_ids(awaited(opening(setting, task)))) for task in tasks),
        turn=config.max_turn_tokens,
        result=-(-config.result_chars // CHARS_PER_TOKEN),
        turns=config.max_turns,
        context=policy.context,
    )


def check_memory(model: PreTrainedModel, config: TrainConfig, lengths: Lengths) -> MemoryEstimate | None:
    """The estimate; None for a small model. Raises ConfigError where the device is known to have less.

    The model may be on any device, and in any dtype: those of the configuration count.
    """
    if num_parameters(model) < SMALL:
        return None
    found = memory_estimate(model, config, lengths)
    device = chosen_device(config.device, model)
    room = device_memory(device)
    if room is None or found.total <= room:
        return found
    saved = {
        option: found.total - memory_estimate(model, other, lengths).total
        for option, other in _smaller(config, model).items()
    }
    ranked = sorted((option for option in saved if saved[option] > 0), key=lambda o: -saved[o])
    advice = ", ".join(f"{option} (saves {_gib(saved[option])})" for option in ranked)
    raise ConfigError(
        f"the run must fit its device ({device}) with {_gib(room)}; it takes {found.text().removeprefix('memory: ')}; "
        f"change, by effect: {advice or 'nothing helps but a smaller policy'}"
    )


def _smaller(config: TrainConfig, model: PreTrainedModel) -> dict[str, TrainConfig]:
    """Changes that may save memory, by the options that make them."""
    critic = config.estimator in CRITIC_METHODS and config.critic == "own"
    half_tokens, half_turn = max(16, config.micro_batch_budget // 2), max(4, config.max_turn_tokens // 2)
    changes: dict[str, dict[str, Any]] = {
        f"--micro-batch-tokens {half_tokens}": {"micro_batch_tokens": half_tokens},
        f"--max-turn-tokens {half_turn}": {"max_turn_tokens": half_turn},
        **({} if config.gradient_checkpointing else {"--gradient-checkpointing": {"gradient_checkpointing": True}}),
        **({} if config.dtype == "bfloat16" else {"--dtype bfloat16": {"dtype": "bfloat16"}}),
        **({"--kl-coef 0": {"kl_coef": 0.0}} if config.kl_coef else {}),
        **({"--critic shared": {"critic": "shared"}} if critic else {}),
        **(
            {f"--group-size {config.group_size // 2}": {"group_size": config.group_size // 2}}
            if config.group_size > 3 and not config.branches
            else {}
        ),
    }
    return {option: dataclasses.replace(config, **change) for option, change in changes.items()}


def memory_estimate(model: PreTrainedModel, config: TrainConfig, lengths: Lengths) -> MemoryEstimate:
    """What the run's weights, rollouts and updates take. Nothing of that size is made."""
    rows = longest_rows(config, lengths)
    batches = [pack(chunk, pad_id=0) for chunk in chunks(rows, max_tokens=config.micro_batch_budget)]
    largest = max(batches, key=lambda batch: sum(level.ids.numel() for level in batch.levels))
    places = torch.unique(largest.place[largest.loss])
    on_processor = chosen_device(config.device, model).type == "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _shapes(model, config)
        weights, learned = _bytes(fake.parameters()), _bytes(p for p in fake.parameters() if p.requires_grad)
        activations, backward = _update_bytes(fake, largest, places, config)
        alive = min(ENGINE_ROWS, _rollouts_per_task(config) * config.tasks_per_step)
        feeding = max(
            _feed_bytes(fake, count, tokens, length, on_processor=on_processor)
            for count, tokens, length in (
                (config.tasks_per_step, lengths.prompt, lengths.prompt),
                (alive, min(max(1, lengths.result), lengths.rollout), lengths.rollout),
            )
        )
    with_critic = config.estimator in CRITIC_METHODS
    own = _bytes(fake.get_decoder().parameters()) if with_critic and config.critic == "own" else 0
    size = {"float32": 4, "mixed": 3, "bfloat16": 2}[config.dtype]  # mixed: keys in float32, values in bfloat16
    vocabulary = fake.get_output_embeddings().weight.shape[0]  # pyright: ignore
    drawing = max(feeding, alive * vocabulary * (size + DRAWING_BYTES))
    return MemoryEstimate(
        held={
            "weights": weights,
            "optimiser": 2 * learned,
            "reference": weights if config.kl_coef and learned == weights else 0,  # of an adapter, the model without
            "critic": 3 * own,
            "sampler": learned if config.ahead else 0,  # a copy; what does not learn is shared
            **_engine_bytes(fake, config, alive * lengths.rollout * cache_bytes(fake.config, size)),
        },
        update={
            "gradients": learned + own,
            "activations": activations,
            "logits and backward": backward,
            "drawing ahead": drawing if config.ahead else 0,
        },
        rollouts={"feeding and drawing": 0 if config.engine == "vllm" else drawing},
    )


def _engine_bytes(model: PreTrainedModel, config: TrainConfig, cache: int) -> dict[str, int]:
    """What the engine keeps: a cache of so many bytes, or vLLM its share of the device, its own weights included."""
    if config.engine == "hf":
        return {"rollout cache": 2 * cache if config.ahead else cache}  # validations have engines of their own then
    return {"vLLM": int(config.vllm_memory_share * (device_memory(chosen_device(config.device, model)) or 0))}


def cache_bytes(config: Any, itemsize: int) -> int:
    """Keys and values of one token in every layer."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * itemsize


def _rollouts_per_task(config: TrainConfig) -> int:
    return int(np.prod(config.branches)) if config.branches else config.group_size


def longest_rows(config: TrainConfig, lengths: Lengths) -> list[Row]:
    """Different rollouts, all as long as can be, as many as a minibatch has or a few micro-batches hold."""
    groups, size = -(-config.tasks_per_step // config.minibatches), _rollouts_per_task(config)
    length = max(1, lengths.rollout - lengths.prompt)
    needed = 2 + 2 * config.micro_batch_budget // length
    action = np.arange(length) % (lengths.turn + lengths.result) < lengths.turn
    action[-1] = True
    zeros = np.zeros(length, np.float32)
    return [
        Row(
            prompt_ids=(i // size, *range(1, lengths.prompt)),
            ids=(i, *range(1, length)),
            action=action,
            loss=action,
            sampling_logprobs=zeros,
            advantages=zeros,
        )
        for i in range(min(groups * size, needed))
    ]


# --- counting on shapes -----------------------------------------------------------------------------


def _shapes(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """The model without content, as it will be placed; to be called where tensors are fake."""
    memo: dict[int, Any] = {}
    for parameter, kept in weight_dtypes(model, config.dtype):
        empty = torch.empty(parameter.shape, dtype=kept)
        memo[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    fake = copy.deepcopy(model, memo).train()
    set_computation(fake, dtype=config.dtype, recompute=config.gradient_checkpointing)
    return fake


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within, as long as they live; views of `there` are none of them."""

    def __init__(self, there: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _update_bytes(
    fake: PreTrainedModel, batch: MicroBatch, places: torch.Tensor, config: TrainConfig
) -> tuple[int, int]:
    """What a micro-batch holds when its hidden states are known, and what its loss and backward pass take besides.

    `places` are those of the trained tokens: how many there are cannot be asked of fake tensors.
    """
    for parameter in fake.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    def logprobs(states: torch.Tensor) -> torch.Tensor:
        head: Any = fake.get_output_embeddings()
        tokens = torch.cat([level.ids.flatten() for level in batch.levels])[places]
        with computing(fake):
            vocabulary = head.weight.shape[0]
            return logprobs_of(head, states[places], tokens, temperature=1.0, vocabulary=vocabulary)[0]

    with Live((*_placed(fake), *(p.grad for p in fake.parameters() if p.grad is not None))) as live:
        states = token_states(fake, batch)
        held = live.now
        loss = logprobs(states).sum()
        if config.kl_coef:
            with torch.no_grad():
                logprobs(token_states(fake, batch))
        if config.estimator in CRITIC_METHODS and config.critic == "own":
            loss = loss + token_states(fake, batch).float().sum()
        loss.backward()
    return held, live.most - held


def _feed_bytes(fake: PreTrainedModel, rows: int, tokens: int, length: int, *, on_processor: bool) -> int:
    """What feeding the last `tokens` of `rows` conversations of a length takes in the engine, beside the cache."""
    rows = max(1, min(rows, PREFILL_TOKENS // tokens))
    cache = RowCache(sliding_layers(fake), on_processor=on_processor)
    cache.reserve(rows, length, max_rows=rows, max_length=length)
    positions = torch.arange(length - tokens, length).expand(rows, tokens)
    write = (torch.arange(rows).repeat_interleave(tokens), positions.flatten())
    decoder: Any = fake.get_decoder()

    def feed() -> None:
        cache.aim(write=write, source=None, read=slice(0, rows), read_length=length)
        masks = attention_masks(fake, positions, torch.arange(length)[None])
        decoder(
            input_ids=positions, attention_mask=masks, position_ids=positions, past_key_values=cache, use_cache=True
        )

    with torch.no_grad(), computing(fake):
        feed()  # makes the cache
        with Live((*_placed(fake), *cache.keys, *cache.values)) as live:
            feed()
    return live.most


def _placed(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """What is there whether anything is computed or not."""
    return itertools.chain(model.parameters(), model.buffers())


def _bytes(tensors: Iterator[torch.nn.Parameter] | Sequence[torch.nn.Parameter]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
