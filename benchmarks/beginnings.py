"""From which length on it pays to read what a group's rows begin with once, while they decode.

    python benchmarks/beginnings.py [--groups 8] [--group-size 12] [--lengths 64 128 256 512 1024] [--tokens 40]

Groups of rollouts decode as many tokens each after prompts of one length, by turns with beginnings shared and without;
the first round warms up. Prints the processor time of both, medians of five rounds, and how many times as long the
plain way takes.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import asyncio
import statistics

import torch
from forced import long_policy
from measured import cpu_seconds

from turnwise.engine import Sampling
from turnwise.engines import hf
from turnwise.engines.hf import HFEngine
from turnwise.policy import Policy

ROUNDS = 5


def decoded(policy: Policy, *, groups: int, size: int, length: int, tokens: int) -> None:
    """Every row draws `tokens` tokens after its group's prompt."""
    vocab = policy.chat.tokenizer.vocab_size
    engine = HFEngine(policy.model, stop_ids=(), max_rows=groups * size, max_context=length + tokens)
    prompts = [[(7 * i + 13 * group) % vocab for i in range(length)] for group in range(groups)]

    async def everything() -> None:
        await asyncio.gather(
            *(
                engine.generate(prompt, Sampling(max_tokens=tokens, seed=i), session=(group, i))
                for group, prompt in enumerate(prompts)
                for i in range(size)
            )
        )

    asyncio.run(everything())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = long_policy(max(options.lengths) + options.tokens)
    for length in options.lengths:
        times: dict[str, list[float]] = {"shared": [], "plain": []}
        for _ in range(ROUNDS + 1):
            for name, least in (("shared", 1), ("plain", 10**9)):
                hf.QUICK_SHARED_TOKENS = least

                def work(length: int = length) -> None:
                    size, tokens = options.group_size, options.tokens
                    decoded(policy, groups=options.groups, size=size, length=length, tokens=tokens)

                times[name].append(cpu_seconds(work))
        shared, plain = (statistics.median(times[name][1:]) for name in ("shared", "plain"))
        print(f"prompts of {length:5}: {shared:6.3f} s, plain {plain:6.3f} s, {plain / shared:.2f} x")


if __name__ == "__main__":
    main()
