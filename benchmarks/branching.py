"""What a tree of rollouts costs beside chains with as many leaves, as ratios within one run.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 python benchmarks/branching.py --threads 1

The embedded policy on the atlas's questions, 4 x 4 leaves of each, three ways, one after the other in every round:

* `tree`: four first turns, four second ones after each; a fork copies its parent's cache;
* `tree, fed again`: the same rollouts, but every fork feeds its whole conversation;
* `chains`: sixteen rollouts of their own.

So that every tree has its sixteen leaves, the environment answers each first turn, whatever it says, with what a search
for the question finds, and ends with the second. A turn that is cut off at its token limit still ends early.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import asyncio
import platform
import statistics
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import tyro

from turnwise.config import TrainConfig
from turnwise.engines.hf import HFEngine
from turnwise.env import Step
from turnwise.evaluation import rollout_limits
from turnwise.policy import load_policy
from turnwise.rollout import run_groups, run_trees, sampled_tokens
from turnwise.setting import make_setting
from turnwise.tags import result_text
from turnwise.types import Action, Message, Task, ToolResult


class Looking:
    """An environment of two turns: it looks the question up after the first one, whatever that says."""

    def __init__(self, opening: tuple[Message, ...], found: str) -> None:
        self.opening, self.found, self.turns = opening, found, 0

    def start(self) -> tuple[Message, ...]:
        return self.opening

    async def step(self, text: str) -> Step:
        self.turns += 1
        if self.turns == 2:
            return Step(action=Action(answer=text), stop="answer")
        return Step(action=Action(), reply=(Message(role="user", content=self.found),))


class FedAgain(HFEngine):
    """Forks that copy nothing."""

    def fork(self, session: Hashable, into: Hashable) -> None:
        pass


@dataclass(kw_only=True)
class Cost:
    """What one way of drawing came to; times of each round, counts of the last."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    leaves: int = 0
    prefilled: int = 0
    sampled: int = 0


def main(
    questions: int = 16,
    branches: tuple[int, int] = (4, 4),
    rounds: Annotated[int, tyro.conf.arg(help="Rounds; the table has medians over them.")] = 3,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    config = TrainConfig()
    policy, setting = load_policy(config.policy), make_setting(config)
    limits, tasks = rollout_limits(config, policy), setting.train[:questions]
    chains = branches[0] * branches[1]
    (search,) = setting.tools.values()

    def looking(task: Task) -> Looking:
        return Looking(setting.environment(task).start(), result_text(ToolResult(text=search.function(task.question))))

    ways: dict[str, tuple[type[HFEngine], Any]] = {
        "tree": (HFEngine, partial(run_trees, branches=branches)),
        "tree, fed again": (FedAgain, partial(run_trees, branches=branches)),
        "chains": (HFEngine, partial(run_groups, group_size=chains)),
    }
    costs = {name: Cost() for name in ways}
    for step in range(rounds):
        for name, (kind, run) in ways.items():
            engine = kind(policy.model, stop_ids=[policy.chat.end_id], max_context=policy.context)
            wall, cpu = time.perf_counter(), time.process_time()
            groups = asyncio.run(run(tasks, looking, engine, policy.chat, limits=limits, seed=(0, step)))
            cost = costs[name]
            cost.wall_s.append(time.perf_counter() - wall)
            cost.cpu_s.append(time.process_time() - cpu)
            cost.leaves = sum(map(len, groups))
            cost.prefilled = engine.stats.prefilled_tokens
            cost.sampled = sum(map(sampled_tokens, groups))
    print(
        f"{platform.machine()}, {threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{questions} questions, branches {branches[0]} {branches[1]}, {rounds} rounds"
    )
    print(f"{'':17}{'leaves':>7}{'prefilled':>10}{'sampled':>9}{'wall s':>8}{'CPU s':>7}{'CPU ms/leaf':>12}")
    for name, cost in costs.items():
        wall, cpu = statistics.median(cost.wall_s), statistics.median(cost.cpu_s)
        print(
            f"{name:17}{cost.leaves:7}{cost.prefilled:10}{cost.sampled:9}{wall:8.2f}{cpu:7.2f}"
            f"{1000 * cpu / cost.leaves:12.1f}"
        )
    print(f"\n{'tree is':17}{'prefilled':>10}{'sampled':>9}{'wall':>7}{'CPU':>7}")
    tree = costs["tree"]
    for name in ("tree, fed again", "chains"):
        other = costs[name]
        wall, cpu = (
            statistics.median(b / a for a, b in zip(mine, its, strict=True))
            for mine, its in ((tree.wall_s, other.wall_s), (tree.cpu_s, other.cpu_s))
        )
        print(
            f"vs {name:14}{other.prefilled / tree.prefilled:9.2f}x{other.sampled / tree.sampled:8.2f}x"
            f"{wall:6.2f}x{cpu:6.2f}x"
        )


if __name__ == "__main__":
    tyro.cli(main)
