"""What logits in pieces save, and how near the memory estimate comes, as peaks of the process measured in one run.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 python benchmarks/memory.py [--tokens 1024] [--only float32]

Each line is a process of its own: what it had before, subtracted from the most that the kernel ever saw it have. Before
is after the same work in small, so that what libraries load and compile at their first use is not counted.

* Logits: log-probabilities of tokens over a vocabulary of 150,000 with their gradient, plain and in pieces.
* Steps: rollouts through the engine and one update of a random Qwen2 (hidden 512, 8 layers, vocabulary 30,000), beside
  what `memory_estimate` said; in float32, with layers computed again, in bfloat16, in mixed precision, with a part that
  learns, and with a critic.
"""

import argparse
import asyncio
import multiprocessing
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from turnwise.batch import Row, on_sampled
from turnwise.config import CRITIC_METHODS, TrainConfig
from turnwise.critic import make_critic
from turnwise.devices import placed
from turnwise.engine import Sampling
from turnwise.engines.hf import HFEngine
from turnwise.learning import update
from turnwise.logits import logprobs_of
from turnwise.memory import Lengths, longest_rows, memory_estimate
from turnwise.policy import Policy

MIB = 2**20
LENGTHS = Lengths(prompt=160, turn=32, result=60, turns=3, context=1024)
STEPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "recomputed": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "mixed": {"dtype": "mixed"},
    "last layer learns": {},
    "own critic": {"estimator": "mt-ppo"},
    "twice the tokens": {"micro_batch_tokens": 2048},
}


class NoChat:
    """The one thing that an update asks of a chat."""

    pad_id = 0


def apart(work: Callable[[], float]) -> float:
    """What the work returns, done in a process of its own, which leaves nothing in this one's memory."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def done(pipe: Connection) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        pipe.send(work())

    process = context.Process(target=done, args=(there,))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def growth(work: Callable[[], object], small: Callable[[], object]) -> float:
    """MiB by which a process of its own grows at most while it does the work, once it has done it in small."""

    def measured() -> float:
        small()
        with open("/proc/self/statm") as file:
            before = int(file.read().split()[1]) * resource.getpagesize()
        work()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / MIB

    return apart(measured)


def estimate(name: str) -> float:
    """MiB that were estimated for a step."""
    return memory_estimate(model(name), options(name), LENGTHS).total / MIB


def logits(tokens: int, vocabulary: int, width: int, *, pieces: bool) -> None:
    """Log-probabilities and their gradient, plain or in pieces."""
    states = torch.randn(tokens, width, requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    chosen = torch.randint(0, vocabulary, (tokens,))
    if pieces:
        found, entropy = logprobs_of(head, states, chosen, temperature=1.0, vocabulary=vocabulary)
    else:
        logprobs = head(states).float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        found = logprobs.gather(-1, chosen[:, None])[:, 0]
    (found.sum() + 0 * entropy.detach().sum()).backward()


def model(name: str, *, small: bool = False) -> Qwen2ForCausalLM:
    """A random Qwen2 of 38 million parameters, or of some thousand."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2_000 if small else 30_000,
        hidden_size=16 if small else 512,
        intermediate_size=32 if small else 1408,
        num_hidden_layers=1 if small else 8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=LENGTHS.context,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    found = Qwen2ForCausalLM(config)
    if name == "last layer learns":
        found.requires_grad_(False)
        found.model.layers[-1].requires_grad_(True)
    return found


def options(name: str) -> TrainConfig:
    shape = {"tasks_per_step": 4, "group_size": 4, "minibatches": 1, "micro_batch_tokens": 1024}
    return TrainConfig(**{**shape, "max_turns": LENGTHS.turns, **STEPS[name]})


def step(name: str, *, small: bool = False) -> None:
    """Rollouts and an update as in training, of the lengths that the estimate assumes."""
    config = options(name)
    policy: Any = Policy(model(name, small=small), NoChat())  # type: ignore[arg-type]
    placed(policy.model, dtype=config.dtype, device="cpu", recompute=config.gradient_checkpointing)
    learned = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5)
    critic = make_critic(policy, config.critic) if config.estimator in CRITIC_METHODS else None
    engine = HFEngine(policy.model, stop_ids=(), max_context=LENGTHS.context)
    rows = longest_rows(config, LENGTHS)
    alive = config.tasks_per_step * config.group_size
    asyncio.run(played(engine, [rows[i % len(rows)] for i in range(alive)]))
    for each in (optimizer, critic.optimizer) if critic else (optimizer,):
        with_moments(each)
    made = [(i // config.group_size, learnable(row, critic is not None)) for i, row in enumerate(rows)]
    update(policy, optimizer, made, config, 0, critic=critic)
    assert engine.stats.decoded_tokens


def with_moments(optimizer: torch.optim.Optimizer) -> None:
    """Takes a step of no length, after which the optimiser is as large as it gets."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


async def played(engine: HFEngine, rows: Sequence[Row]) -> None:
    """Draws the rows' turns, as many tokens as each has."""

    async def rollout(i: int, row: Row) -> None:
        ids = [*row.prompt_ids]
        for turn in range(LENGTHS.turns):
            sampling = Sampling(max_tokens=LENGTHS.turn, seed=100 * i + turn)
            done = await engine.generate(ids, sampling, session=i)
            ids += [*done.token_ids, *range(LENGTHS.result)]
        engine.release(i)

    await asyncio.gather(*(rollout(i, row) for i, row in enumerate(rows)))


def learnable(row: Row, critic: bool) -> Row:
    """The row with an advantage of 1 on every token."""
    ones = on_sampled(row, torch.ones(int(row.action.sum())).numpy())
    extra = {"values": 0 * ones[:, None], "returns": ones[:, None]} if critic else {}
    return replace(row, advantages=ones, sampling_logprobs=-10 * ones, **extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--pieces-only", action="store_true", help="leave the plain way out: it may not fit")
    parser.add_argument("--only", nargs="*", default=list(STEPS), choices=list(STEPS))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, float32 logits of {args.tokens} tokens x {args.vocabulary}")
    found = {}
    for name in ("in pieces",) if args.pieces_only else ("plain", "in pieces"):
        pieces = name == "in pieces"
        found[name] = growth(
            lambda pieces=pieces: logits(args.tokens, args.vocabulary, 64, pieces=pieces),
            lambda pieces=pieces: logits(16, 1000, 64, pieces=pieces),
        )
        print(f"  {name:20}{found[name]:8.0f} MiB", flush=True)
    if len(found) == 2:
        print(f"  plain / in pieces   {found['plain'] / found['in pieces']:8.2f}")
    print(f"{'step':20}{'measured MiB':>14}{'estimated':>11}{'error':>8}")
    for name in args.only:
        estimated = apart(lambda name=name: estimate(name))
        measured = growth(lambda name=name: step(name), lambda name=name: step(name, small=True))
        print(f"{name:20}{measured:14.0f}{estimated:11.0f}{estimated / measured - 1:+8.1%}", flush=True)


if __name__ == "__main__":
    main()
