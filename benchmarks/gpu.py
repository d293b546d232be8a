"""A training step of a half-billion-parameter policy: how fast, how near the device's own rate, in how much memory.

    python benchmarks/gpu.py [--device cuda] [--rounds 3] [--tiny]

Random weights in the shape of Qwen2.5-0.5B, bfloat16; 16 x 8 rollouts of three turns, whose lengths are drawn
beforehand so that everybody draws the same number of tokens. In one run, after each other: `transformers`' own
`generate` (a padded batch per turn, whole conversations fed again), then for all weights and for LoRA adapters alone
the engine's rollouts and one update. Shares are of the rate at which the device multiplies square bfloat16 matrices,
measured here; counted are 2 operations per weight and token forward, 4 more backward, 2 more where the weights do not
learn. `--tiny` is for a processor and shows only that everything runs.
"""

import argparse
import asyncio
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from turnwise.batch import Row, micro_batches, rollout_row
from turnwise.config import TrainConfig
from turnwise.devices import placed
from turnwise.engine import Completion, Sampling
from turnwise.engines.hf import HFEngine
from turnwise.learning import update
from turnwise.memory import Lengths, memory_estimate
from turnwise.policy import Policy
from turnwise.types import Action, Rollout, Turn

TURNS = 3
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Work:
    """What everybody has to do."""

    prompts: list[list[int]]
    """The first prompt of each rollout; those of a group are equal."""
    results: list[list[list[int]]]
    """What the environment answers after each turn but the last."""
    turns: np.ndarray
    """Tokens to draw, (rollouts, TURNS)."""
    group_size: int

    @property
    def lengths(self) -> Lengths:
        prompt, result = max(map(len, self.prompts)), max(len(r) for own in self.results for r in own)
        turn = int(self.turns.max())
        return Lengths(
            prompt=prompt, turn=turn, result=result, turns=TURNS, context=prompt + TURNS * turn + (TURNS - 1) * result
        )


class NoChat:
    """The one thing that an update asks of a chat."""

    pad_id = 0


def workload(vocabulary: int, *, tiny: bool) -> Work:
    random = np.random.default_rng(0)
    groups, size = (2, 3) if tiny else (16, 8)
    scale = 20 if tiny else 1

    def ids(low: int, high: int) -> list[int]:
        return random.integers(1, vocabulary, random.integers(low, high + 1) // scale).tolist()

    prompts = [ids(200, 300) for _ in range(groups)]
    return Work(
        prompts=[prompts[i // size] for i in range(groups * size)],
        results=[[ids(100, 200) for _ in range(TURNS - 1)] for _ in range(groups * size)],
        turns=random.integers(30, 100, (groups * size, TURNS)) // min(scale, 8),
        group_size=size,
    )


def random_model(*, tiny: bool) -> Qwen2ForCausalLM:
    """Qwen2.5-0.5B's shape, or a tiny one."""
    torch.manual_seed(0)
    shape: dict[str, Any] = (
        {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        if tiny
        else {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    )
    heads = {"num_attention_heads": 4 if tiny else 14, "num_key_value_heads": 2}
    config = Qwen2Config(**shape, **heads, tie_word_embeddings=True, max_position_embeddings=4096)
    config._attn_implementation = "sdpa"
    return Qwen2ForCausalLM(config)


def with_lora(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """The model with adapters of rank 16 on every linear layer of its blocks, which alone learn."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=targets), model)
    return model


def with_engine(model: Qwen2ForCausalLM, work: Work) -> tuple[list[Rollout], HFEngine]:
    """All rollouts through the engine, each drawing the tokens that it was given."""
    engine = HFEngine(model, stop_ids=(), max_context=work.lengths.context + 1)

    async def rollout(i: int) -> Rollout:
        ids, turns = [*work.prompts[i]], []
        for k in range(TURNS):
            sampling = Sampling(max_tokens=int(work.turns[i, k]), seed=TURNS * i + k)
            done: Completion = await engine.generate(ids, sampling, session=i)
            reply = work.results[i][k] if k < TURNS - 1 else []
            ids += [*done.token_ids, *reply]
            turns.append(
                Turn(
                    action_ids=done.token_ids,
                    sampling_logprobs=done.logprobs,
                    text="",
                    action=Action(),
                    reply_ids=tuple(reply),
                )
            )
        engine.release(i)
        prompt = tuple(work.prompts[i])
        return Rollout(task_id="t", group=i // work.group_size, prompt_ids=prompt, turns=tuple(turns), stop="max_turns")

    async def everything() -> list[Rollout]:
        return await asyncio.gather(*(rollout(i) for i in range(len(work.prompts))))

    return asyncio.run(everything()), engine


def with_generate(model: Qwen2ForCausalLM, work: Work) -> None:
    """All rollouts with `model.generate`, one left-padded batch per turn that goes on to its longest member."""
    prompts = work.prompts
    for turn in range(TURNS):
        width, longest = max(map(len, prompts)), int(work.turns[:, turn].max())
        padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        drawn = model.generate(
            input_ids=padded,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            min_new_tokens=longest,
            max_new_tokens=longest,
            pad_token_id=0,
            eos_token_id=None,
        )
        new = [row[:n] for row, n in zip(drawn[:, width:].tolist(), work.turns[:, turn], strict=True)]
        replies = [own[turn] if turn < TURNS - 1 else [] for own in work.results]
        prompts = [[*p, *own, *reply] for p, own, reply in zip(prompts, new, replies, strict=True)]


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Wall time until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(device: torch.device, size: int) -> float:
    """Operations a second of a product of square bfloat16 matrices, the best of ten."""
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(seconds(device, lambda: one @ other) for _ in range(10))


def peak(device: torch.device) -> float:
    """MiB that the device has held at most; on a processor the whole process, which is more."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are shown, the first one warms up")
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    device = torch.device(args.device)
    rate = matrix_rate(device, 256 if args.tiny else 8192)
    work = workload(500 if args.tiny else 151_936, tiny=args.tiny)
    config = TrainConfig(
        tasks_per_step=len(work.prompts) // work.group_size,
        group_size=work.group_size,
        minibatches=1,
        dtype="bfloat16",
        micro_batch_tokens=args.micro_batch_tokens,
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    print(f"{name}, torch {torch.__version__}, bfloat16 matrices {rate / 1e12:.2f} Top/s")
    print(f"{len(work.prompts)} rollouts, {TURNS} turns, {work.turns.sum()} tokens drawn")
    plain = placed(random_model(tiny=args.tiny), device=args.device, dtype="bfloat16").eval()
    times = [seconds(device, lambda plain=plain: with_generate(plain, work)) for _ in range(args.rounds)]
    took = statistics.median(times[1:] or times)
    titles = (("rollout tokens/s", 18), ("share", 8), ("update tokens/s", 18), ("share", 8), ("peak MiB", 10))
    print(" " * 10 + "".join(f"{title:>{width}}" for title, width in (*titles, ("estimate", 10))))
    print(f"{'generate':10}{work.turns.sum() / took:18.0f}")
    del plain
    for name, learns in (("all", False), ("LoRA", True)):
        model = with_lora(random_model(tiny=args.tiny)) if learns else random_model(tiny=args.tiny)
        estimated = memory_estimate(model, config, work.lengths).total / MIB
        report(name, placed(model, device=args.device, dtype="bfloat16"), work, config, rate, args.rounds, estimated)
        del model


def report(
    name: str,
    model: Qwen2ForCausalLM,
    work: Work,
    config: TrainConfig,
    rate: float,
    rounds: int,
    estimated: float,
) -> None:
    """Plays and learns `rounds` times; prints a line of medians."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    policy: Any = Policy(model, NoChat())  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    weights = sum(p.numel() for p in model.parameters())
    frozen = any(not p.requires_grad for p in model.parameters())
    random, played, learned, engine, rows = np.random.default_rng(1), [], [], None, []
    for _ in range(rounds):

        def play() -> None:
            nonlocal engine, rows
            rollouts, engine = with_engine(model, work)
            rows = [(r.group, rollout_row(r, random.normal(size=TURNS).tolist(), [True] * TURNS)) for r in rollouts]

        played.append(seconds(device, play))
        learned.append(seconds(device, lambda: update(policy, optimizer, rows, config, 0)))
    assert engine is not None, "there is a round at least"
    plays, learns = (statistics.median(times[1:] or times) for times in (played, learned))
    fed = engine.stats.prefilled_tokens + engine.stats.decoded_tokens
    positions = computed_positions([row for _, row in rows], config)
    print(
        f"{name:10}{work.turns.sum() / plays:18.0f}{2 * weights * fed / plays / rate:8.1%}"
        f"{positions / learns:18.0f}{(4 if frozen else 6) * weights * positions / learns / rate:8.1%}"
        f"{peak(device):10.0f}{estimated:10.0f}",
        flush=True,
    )


def computed_positions(rows: list[Row], config: TrainConfig) -> int:
    """Tokens that an update computes, those of shared beginnings once."""
    batches = micro_batches(rows, max_tokens=config.micro_batch_tokens, pad_id=0)
    return sum(int(level.lengths.sum()) for batch in batches for level in batch.levels)


if __name__ == "__main__":
    main()
