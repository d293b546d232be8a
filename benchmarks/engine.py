"""How fast the in-process engine draws rollouts of several turns, as ratios within one run.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 python benchmarks/engine.py [--turns 2] [--prompt-tokens 120]

The same 256 rollouts (16 prompts, 16 each, ragged turns, ragged tool results), a random Qwen3 model
of about a million parameters, three ways, one after the other in every round:

* `engine`: sessions live across turns; only new text is fed.
* `re-prefill`: the same engine, but every turn is a session of its own, so that its whole
  conversation is fed again.
* `model.generate`: transformers' own sampling, each turn as one left-padded batch.

Every rollout draws a fixed number of tokens per turn (no stop token), so that all three do the same
work; `model.generate` cannot let a finished rollout leave the batch, and goes on to the longest.
"""

import asyncio
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from measured import append
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from turnwise.engine import Sampling
from turnwise.engines.hf import HFEngine

VOCAB = 1300


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every contender has to do."""

    prompts: list[list[int]]
    """First prompt of each rollout; the rollouts of a group have equal ones."""
    results: list[list[list[int]]]
    """What the tool answers after each turn."""
    lengths: np.ndarray
    """Tokens to draw, [rollouts, turns]."""

    @property
    def context(self) -> int:
        """The length of the longest rollout."""
        return max(
            len(prompt) + sum(map(len, own)) + int(drawn.sum())
            for prompt, own, drawn in zip(self.prompts, self.results, self.lengths, strict=True)
        )

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


def workload(groups: int, group_size: int, *, turns: int, prompt_tokens: int) -> Workload:
    """Prompts of `prompt_tokens` tokens and up to 30 more, results of 40-80, turns of 15-45 tokens."""
    random = np.random.default_rng(0)
    prompts = [_ids(random, prompt_tokens, prompt_tokens + 30) for _ in range(groups)]
    count = groups * group_size
    return Workload(
        prompts=[prompts[i // group_size] for i in range(count)],
        results=[[_ids(random, 40, 80) for _ in range(turns)] for _ in range(count)],
        lengths=random.integers(15, 46, (count, turns)),
    )


def _ids(random: np.random.Generator, low: int, high: int) -> list[int]:
    return random.integers(1, VOCAB, random.integers(low, high + 1)).tolist()


def demo_model(kv_heads: int = 4) -> Qwen3ForCausalLM:
    """A random model of the size of the embedded policy."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def with_engine(model: Qwen3ForCausalLM, work: Workload, *, keep: bool) -> HFEngine:
    """Draw all rollouts through the engine; without `keep`, each turn is fed from its beginning."""
    engine = HFEngine(model, stop_ids=(), max_rows=len(work.prompts), max_context=work.context)

    async def rollout(i: int) -> None:
        prompt = work.prompts[i]
        for turn in range(work.lengths.shape[1]):
            sampling = Sampling(max_tokens=int(work.lengths[i, turn]), seed=work.lengths.shape[1] * i + turn)
            completion = await engine.generate(prompt, sampling, session=i)
            prompt = [*prompt, *completion.token_ids, *work.results[i][turn]]
            if not keep:
                engine.release(i)
        engine.release(i)

    async def everything() -> None:
        await asyncio.gather(*(rollout(i) for i in range(len(work.prompts))))

    asyncio.run(everything())
    assert engine.stats.decoded_tokens == work.num_tokens
    return engine


def with_generate(model: Qwen3ForCausalLM, work: Workload) -> None:
    """Draw all rollouts with `model.generate`, one padded batch per turn."""
    prompts = work.prompts
    for turn in range(work.lengths.shape[1]):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        longest = int(work.lengths[:, turn].max())
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            min_new_tokens=longest,
            max_new_tokens=longest,
            pad_token_id=0,
            eos_token_id=None,
        )
        drawn = output[:, width:].tolist()
        prompts = [
            [*prompt, *ids[:n], *results[turn]]
            for prompt, ids, n, results in zip(prompts, drawn, work.lengths[:, turn], work.results, strict=True)
        ]


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time of all threads; the second is right on a busy machine, too."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def main(
    groups: int = 16,
    group_size: int = 16,
    kv_heads: int = 4,
    turns: int = 2,
    prompt_tokens: int = 120,
    json: Annotated[Path | None, tyro.conf.arg(help="File of JSON lines to add to.")] = None,
    rounds: Annotated[int, tyro.conf.arg(help="Rounds; the table has medians over them.")] = 3,
) -> None:
    logging.set_verbosity_error()
    model, work = demo_model(kv_heads), workload(groups, group_size, turns=turns, prompt_tokens=prompt_tokens)
    contenders: dict[str, Callable[[], object]] = {
        "engine": lambda: with_engine(model, work, keep=True),
        "re-prefill": lambda: with_engine(model, work, keep=False),
        "model.generate": lambda: with_generate(model, work),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(seconds(run))
    stats = with_engine(model, work, keep=True).stats
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, float32"
    )
    print(
        f"{len(work.prompts)} rollouts in {groups} groups, {turns} turns, {work.num_tokens} tokens, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {rounds} rounds"
    )
    print(
        f"engine: {stats.prefilled_tokens} tokens prefilled, {stats.decode_steps} decode steps, "
        f"{stats.seconds / stats.decode_steps * 1e3:.1f} ms each with their share of prefill\n"
    )
    print(f"{'medians':16}{'wall s':>9}{'tokens/s':>10}{'CPU s':>9}{'wall ratio':>12}{'CPU ratio':>11}")
    for name, pairs in times.items():
        wall, processor = (statistics.median(p[k] for p in pairs) for k in (0, 1))
        ratios = [statistics.median(b[k] / a[k] for a, b in zip(times["engine"], pairs, strict=True)) for k in (0, 1)]
        case = {"turns": turns, "prompt_tokens": prompt_tokens, "way": name}
        values = {"rollouts": len(work.prompts), "cpu_s": processor, "cpu_ratio": ratios[1], "tokens": work.num_tokens}
        append(json, "engine", case, values)
        print(f"{name:16}{wall:9.2f}{work.num_tokens / wall:10.0f}{processor:9.2f}{ratios[0]:12.2f}{ratios[1]:11.2f}")


if __name__ == "__main__":
    tyro.cli(main)
