"""How long a training step takes: 16 questions x 16 rollouts of the embedded policy on the atlas.

    python benchmarks/step.py [--steps 6] [--threads 2]

Prints the medians of the rollout half and the update half, and what sharing equal rollouts saves: the same update with
every rollout computed on its own. Both are measured in turn in one run.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import asyncio
import platform
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch

from turnwise import learning, training
from turnwise.config import TrainConfig
from turnwise.evaluation import make_engine, rollout_limits
from turnwise.policy import load_policy
from turnwise.rollout import run_groups
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
    torch.set_num_threads(options.threads)
    config = TrainConfig()
    setting = make_setting(config)
    times: dict[str, list[float]] = {"rollouts": [], "update": [], "update, nothing shared": []}
    for step in range(options.steps):
        policy = load_policy(config.policy)
        tasks = training.step_tasks(setting.train, config, step)
        engine, limits = make_engine(policy), rollout_limits(config, policy)
        start = time.perf_counter()
        groups = asyncio.run(
            run_groups(
                tasks,
                setting.environment,
                engine,
                policy.chat,
                group_size=config.group_size,
                limits=limits,
                seed=(0, step),
            )
        )
        times["rollouts"].append(time.perf_counter() - start)
        rollouts = [setting.scored(t, r) for t, group in zip(tasks, groups, strict=True) for r in group]
        table = training.rollout_table(rollouts)
        rows = training.training_rows(rollouts, table, training.estimate(config, table))
        for name in ("update", "update, nothing shared"):
            learner = load_policy(config.policy)
            optimizer = torch.optim.AdamW(learner.model.parameters(), lr=0.0)

            def update(learner=learner, optimizer=optimizer, rows=rows, step=step) -> object:
                return learning.update(learner, optimizer, rows, config, step)

            if name == "update":
                times[name].append(seconds(update))
            else:
                with patch.object(learning, "distinct_rows", list):
                    times[name].append(seconds(update))
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.steps} steps")
    print(f"{config.passes} passes x {config.minibatches} minibatches; 16 questions x 16 rollouts")
    medians = {name: statistics.median(values[1:] or values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:24} {median:6.2f} s")
    print(f"{'step':24} {medians['rollouts'] + medians['update']:6.2f} s")
    print(f"sharing: {medians['update, nothing shared'] / medians['update']:.2f} x faster update")


if __name__ == "__main__":
    main()
