"""How soon models of the starting policy's size learn to copy, with and without its narrow first layer.

    python benchmarks/copying.py [--steps 400]

Trains fresh models on spans of random tokens that repeat, and prints the loss on all but the first time, nats per
token, averaged over every hundred steps. Guessing among the tokens in view costs about 2.2.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import copy
import random
import time

import torch
from transformers import Qwen3ForCausalLM

from turnwise.batch import Row, micro_batches
from turnwise.policy import load_policy, token_logprobs
from turnwise.warmup import REPEATED_LENGTH, REPEATED_PIECES, _taught

VARIANTS = {
    "window of 3 first, heads of 64": {},
    "window of 2 first, heads of 64": {"sliding_window": 2},
    "full attention, heads of 64": {"layer_types": ["full_attention"] * 3},
    "full attention, heads of 32": {"layer_types": ["full_attention"] * 3, "head_dim": 32},
}


def repeated(rng: random.Random, start: int) -> Row:
    """A span of 4 to 16 random tokens, again and again."""
    span = [rng.randrange(3, REPEATED_PIECES) for _ in range(rng.randint(4, 16))]
    ids = (span * REPEATED_LENGTH)[:REPEATED_LENGTH]
    return _taught((start,), ids, [i > len(span) for i in range(len(ids))])


def losses(changes: dict, *, steps: int, rows: int, rate: float) -> list[float]:
    """The loss of every step of one model."""
    policy = load_policy("embedded")
    config = copy.deepcopy(policy.model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(1)
    found = []
    for step in range(steps):
        batch = next(
            micro_batches(
                [repeated(rng, policy.chat.start_id) for _ in range(rows)],
                max_tokens=10**6,
                pad_id=policy.chat.pad_id,
            )
        )
        loss = -token_logprobs(model, batch, batch.loss)[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(float(loss.detach()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, changes in VARIANTS.items():
        start = time.perf_counter()
        found = losses(changes, steps=options.steps, rows=options.rows, rate=options.rate)
        means = [sum(found[i : i + 100]) / len(found[i : i + 100]) for i in range(0, len(found), 100)]
        shown = "  ".join(f"{mean:.2f}" for mean in means)
        print(f"{name:32} {shown}   ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
