"""How long a training step takes: 16 questions x 16 rollouts of the embedded policy on the atlas.

    python benchmarks/step.py [--steps 6] [--threads 2]

Prints the medians of the rollout half and the update half, side by side on one thread, on all threads as training uses
them (a part of the step on each), and with torch's own threads inside every operation. Every step begins with the same
weights; engines and their memory stay from step to step, as in training, and the first step is left out.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from turnwise import training
from turnwise.config import TrainConfig
from turnwise.crediting import credit_rollouts
from turnwise.evaluation import draw, make_engine, place, rollout_limits
from turnwise.learning import update
from turnwise.policy import load_policy
from turnwise.setting import make_setting


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config = TrainConfig()
    setting = make_setting(config)
    ways = {  # parts of a step at once, threads in each operation
        "one thread": (1, 1),
        "parts in parallel": (options.threads, 1),
        "threads in operations": (1, options.threads),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    policies = {name: place(load_policy(config.policy), config) for name in ways}
    start = load_policy(config.policy).model.state_dict()
    engines_of = {name: [make_engine(policies[name]) for _ in range(at_once)] for name, (at_once, _) in ways.items()}
    for step in range(options.steps):
        tasks = training.ordered_tasks(setting.train, config.seed, step * config.tasks_per_step, config.tasks_per_step)
        for name, (at_once, threads) in ways.items():
            torch.set_num_threads(threads)
            policy, engines = policies[name], engines_of[name]
            policy.model.load_state_dict(start)
            groups = []

            def roll(policy=policy, engines=engines, groups=groups, tasks=tasks, step=step) -> None:
                limits = rollout_limits(config, policy)
                size = config.group_size
                groups += draw(
                    tasks,
                    setting,
                    engines,
                    policy.chat,
                    limits=limits,
                    temperature=1.0,
                    seed=(0, step),
                    group_size=size,
                )

            rolled = seconds(roll)
            rollouts = [setting.scored(t, r) for t, group in zip(tasks, groups, strict=True) for r in group]
            rows = credit_rollouts(rollouts, config).rows
            optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)

            def learn(policy=policy, optimizer=optimizer, rows=rows, step=step, at_once=at_once) -> object:
                return update(policy, optimizer, rows, config, step, at_once=at_once)

            times[name].append((rolled, seconds(learn)))
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.steps} steps")
    print(f"{config.passes} passes x {config.minibatches} minibatches; 16 questions x 16 rollouts")
    medians = {
        name: [statistics.median(half) for half in zip(*found[1:], strict=True)] for name, found in times.items()
    }
    first = sum(medians["one thread"])
    for name, (rolled, learned) in medians.items():
        total = rolled + learned
        halves = f"rollouts {rolled:5.2f} s   update {learned:5.2f} s"
        print(f"{name:22} {halves}   step {total:5.2f} s   {first / total:.2f} x")


if __name__ == "__main__":
    main()
