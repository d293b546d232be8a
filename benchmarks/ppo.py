"""What a critic costs: a step of mt-ppo against a step of mt-grpo on the same rollouts of the embedded policy.

    python benchmarks/ppo.py [--steps 4] [--threads 1] [--policy embedded]

A step is its rollouts, its credit (with a critic, values before it) and its update. Rollouts are drawn once and learned
from in turn with no critic, with one on its own trunk and with one on the policy's. Prints medians and ratios of the
process's CPU time, which other processes do not disturb.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import asyncio
import dataclasses
import platform
import statistics
import time

import torch

from turnwise import learning, training
from turnwise.config import TrainConfig
from turnwise.crediting import credit_rollouts
from turnwise.critic import make_critic
from turnwise.evaluation import make_engine, rollout_limits
from turnwise.policy import load_policy
from turnwise.rollout import run_groups
from turnwise.setting import make_setting
from turnwise.types import Rollout

METHODS = {
    "mt-grpo": {"estimator": "mt-grpo"},
    "mt-ppo, own trunk": {"estimator": "mt-ppo", "critic": "own"},
    "mt-ppo, shared trunk": {"estimator": "mt-ppo", "critic": "shared"},
}


def learning_seconds(config: TrainConfig, rollouts: list[Rollout], step: int) -> float:
    """Credit and update from a fresh policy."""
    policy = load_policy(config.policy)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
    critic = make_critic(policy, config.critic) if config.estimator == "mt-ppo" else None
    start = time.process_time()
    credited = credit_rollouts(rollouts, config, critic, pad_id=policy.chat.pad_id)
    learning.update(policy, optimizer, credited.rows, config, step, critic=critic)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--policy", default="embedded")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = TrainConfig(policy=options.policy)
    setting = make_setting(config)
    rolled: list[float] = []
    learned: dict[str, list[float]] = {name: [] for name in METHODS}
    for step in range(options.steps):
        policy = load_policy(config.policy)
        tasks = training.ordered_tasks(setting.train, config.seed, step * config.tasks_per_step, config.tasks_per_step)
        start = time.process_time()
        groups = asyncio.run(
            run_groups(
                tasks,
                setting.environment,
                make_engine(policy),
                policy.chat,
                group_size=config.group_size,
                limits=rollout_limits(config, policy),
                seed=(0, step),
            )
        )
        rolled.append(time.process_time() - start)
        rollouts = [setting.scored(t, r) for t, group in zip(tasks, groups, strict=True) for r in group]
        for name, method in METHODS.items():
            learned[name].append(learning_seconds(dataclasses.replace(config, **method), rollouts, step))
    rollout_s = statistics.median(rolled[1:] or rolled)
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.steps} steps")
    print(f"{config.tasks_per_step} questions x {config.group_size} rollouts; rollouts {rollout_s:.2f} s of CPU time")
    medians = {name: statistics.median(values[1:] or values) for name, values in learned.items()}
    usual = medians["mt-grpo"]
    for name, median in medians.items():
        ratio = (rollout_s + median) / (rollout_s + usual)
        print(f"{name:22} credit and update {median:6.2f} s ({median / usual:.2f} x)   step {ratio:.2f} x")


if __name__ == "__main__":
    main()
