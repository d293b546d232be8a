"""How long a training step and its rollouts take natively, with transformers' `generate`, and inside TRL, in one run.

    python benchmarks/trl_step.py [--turns 2 3 8] [--prompt-tokens 0 400] [--steps 2] [--tasks 4] [--group-size 8]

All have the same model (the embedded policy, with a longer context), questions, search tool, group size, most tokens of
a turn, temperature and credit, and as many turns: every message is a search until the last turn (`forced`). How long a
turn is is chance, so turns and sampled tokens of a rollout are printed for each. The learning rate is 0, so that all
draw from one policy. `--prompt-tokens` is the least length of a prompt; 0 leaves questions as they are.

* native: the in-process engine, our update, one engine and one micro-batch at a time;
* generate: `model.generate` for every turn and one padded batch for the loss (`plain`);
* TRL: its generation, its tool loop, its loss and optimiser, around `TurnGRPOTrainer`, with the turn's own budget of
  tokens given to its generation, which knows only one for all turns;
* TRL, our rollouts (with `--ours`): its loss and optimiser around our engine.

Seconds are the process's own CPU time on one thread, medians over steps, after one that
warms up; steps alternate. The
adapter's share is what `TurnGRPOTrainer` does beside TRL's own work. Without TRL its lines are left out.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from forced import (
    context_of,
    forced_engine,
    forced_rollouts,
    forced_setting,
    learn,
    long_policy,
    mean_sampled,
    mean_turns,
)
from measured import append
from plain import plain_rollouts, plain_update
from transformers.utils import logging as transformers_logging

from turnwise.policy import Policy, save_policy
from turnwise.setting import Setting
from turnwise.types import Rollout


class Way(Protocol):
    """One of those that are compared."""

    adapter_s: float

    def step(self, number: int) -> tuple[float, float, float, float]:
        """A step's CPU seconds, those of its rollouts, turns and sampled tokens of a rollout."""
        ...


class Ours:
    """Rollouts and update as functions."""

    def __init__(
        self,
        policy: Policy,
        setting: Setting,
        rollouts: Callable[[int], list[Rollout]],
        update: Callable[..., object],
    ) -> None:
        self._policy, self._setting, self._rollouts, self._update = policy, setting, rollouts, update
        self._optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
        self.adapter_s = 0.0

    def step(self, number: int) -> tuple[float, float, float, float]:
        """As `Way`."""
        torch.manual_seed(number)
        start = time.process_time()
        rollouts = self._rollouts(number)
        rolled = time.process_time() - start
        self._update(self._policy, self._optimizer, self._setting, rollouts)
        return time.process_time() - start, rolled, mean_turns(rollouts), mean_sampled(rollouts)


def ways(options: argparse.Namespace, turns: int, prompt_tokens: int, folder: str) -> dict[str, Way]:
    """All that are compared, by name."""
    policy = long_policy(context_of(turns, prompt_tokens))
    size = options.group_size
    setting = forced_setting(turns=turns, tasks=options.tasks, prompt_tokens=prompt_tokens, chat=policy.chat)
    engine = forced_engine(policy, setting, size)
    found: dict[str, Way] = {
        "native": Ours(policy, setting, lambda step: forced_rollouts(policy, setting, engine, size, step), learn),
        "generate": Ours(policy, setting, lambda step: plain_rollouts(policy, setting, size), plain_update),
    }
    if importlib.util.find_spec("trl"):
        from trl_way import trl_way

        start = Path(folder) / f"start-{turns}-{prompt_tokens}"
        save_policy(policy, start)
        for name, ours in (("TRL", False), *((("TRL, our rollouts", True),) if options.ours else ())):
            found[name] = trl_way(start, setting, size, folder, ours=ours)
    return found


def compare(options: argparse.Namespace, turns: int, prompt_tokens: int, folder: str) -> None:
    """Measures one case, prints and notes it."""
    found = ways(options, turns, prompt_tokens, folder)
    seen: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in found}
    for step in range(options.steps):
        for name, way in found.items():
            seen[name].append(way.step(step))
    rows = {name: [statistics.median(column) for column in zip(*own, strict=True)] for name, own in seen.items()}
    length = prompt_tokens or "short"
    print(f"\n{turns} turns, prompts {length}: {options.tasks} questions x {options.group_size} rollouts")
    for name, (step_s, rollout_s, played, sampled) in rows.items():
        case = {"turns": turns, "prompt_tokens": prompt_tokens, "way": name}
        values = {
            "tasks": options.tasks,
            "group_size": options.group_size,
            "step_s": step_s,
            "rollout_s": rollout_s,
            "turns_a_rollout": played,
            "sampled_a_rollout": sampled,
            "step_ratio": step_s / rows["native"][0],
            "rollout_ratio": rollout_s / rows["native"][1],
            "adapter_share": found[name].adapter_s / sum(own[0] for own in seen[name]),
        }
        append(options.json, "step", case, values)
        print(
            f"  {name:18} step {step_s:7.2f} s ({values['step_ratio']:5.2f} x)   rollouts {rollout_s:7.2f} s "
            f"({values['rollout_ratio']:5.2f} x)   {played:.2f} turns, {sampled:5.1f} tokens   "
            f"adapter {100 * values['adapter_share']:.2f} %",
            flush=True,
        )


def main() -> None:
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[0, 400])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--ours", action="store_true", help="TRL around our engine, too")
    parser.add_argument("--json", type=Path, help="file of JSON lines to add to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for way in ways(options, 2, 0, folder).values():  # warms up
            way.step(0)
        for turns in options.turns:
            for prompt_tokens in options.prompt_tokens:
                compare(options, turns, prompt_tokens, folder)


if __name__ == "__main__":
    main()
