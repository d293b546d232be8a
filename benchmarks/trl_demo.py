"""How long a step of the demo's task takes natively and inside TRL as it is: same policy, questions, tools, group size.

    python benchmarks/trl_demo.py [--steps 4] [--tasks 8] [--group-size 8]

Two turns: the embedded policy after a few native steps, so that it calls its tool. Three turns: the embedded agent that
searches several times, on two-hop questions, after a few steps that pay for searches alone, so that it takes its turns.
Agents take the turns that they take; TRL has one budget of tokens for all of them, as large as the native ones
together, so one that rambles goes on to its end. `trl_step` gives both the same turns and budgets. Steps alternate
between the trainers; rates are 0, so that all draw from one policy. Seconds are the process's own CPU time on one
thread, medians over steps. "TRL" is its own generation and tool loop; "TRL, our rollouts" its loss and optimiser around
our engine. The adapter's share is what `TurnGRPOTrainer` does beside TRL's own work.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import PrinterCallback
from trl_way import Clock, TimedTrainer

from turnwise.adapters.trl import completion_turns, environment_arguments, task_rows, tool_tokenizer
from turnwise.config import TrainConfig
from turnwise.crediting import credit_rollouts
from turnwise.evaluation import draw, make_engine, rollout_limits
from turnwise.learning import update
from turnwise.policy import Policy, load_policy
from turnwise.setting import Setting, make_setting
from turnwise.training import train


def trl_trainer(start: Path, setting: Setting, count: int, size: int, out: str, *, ours: bool) -> TimedTrainer:
    config = setting.config
    given = environment_arguments(setting, tasks=count)
    tokenizer = tool_tokenizer(start, protocol=config.protocol)
    if not ours:
        tool = setting.tools["search"].function

        def search(query: str) -> str:
            """Articles that best match the query.

            Args:
                query: A question or a few words.
            """
            return str(tool(query))

        def turn_executed(completions: Any, **_: Any) -> list[list[float | None]]:
            return [[0.2 if len(turn) > 1 else None for turn in completion_turns(own)] for own in completions]

        def said_answer(completions: Any, answers: Any, **_: Any) -> list[float]:
            pairs = zip(completions, answers, strict=True)
            return [float(any(gold in str(own[-1].get("content")) for gold in golds)) for own, golds in pairs]

        given = {
            "tools": [search],
            "reward_funcs": [said_answer],
            "turn_reward_funcs": [turn_executed],
            "train_dataset": task_rows(setting.train[:count], setting.environment),
        }
    return TimedTrainer(
        str(start),
        args=trl.GRPOConfig(
            out,
            per_device_train_batch_size=count * size,
            num_generations=size,
            max_steps=1,
            learning_rate=0.0,
            loss_type="grpo",
            max_completion_length=config.max_turns * config.max_turn_tokens + (config.max_turns - 1) * 160,
            max_tool_calling_iterations=config.max_turns - 1,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        estimator="mt-grpo",
        **given,
    )


def native_step(policy: Policy, setting: Setting, count: int, size: int, step: int) -> tuple[float, float]:
    """CPU seconds of a whole step, and the turns per rollout."""
    config, engine = setting.config, make_engine(policy)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
    start = time.process_time()
    tasks = setting.train[:count]
    limits = rollout_limits(config, policy)
    groups = draw(
        tasks, setting, [engine], policy.chat, limits=limits, temperature=1.0, seed=(0, step), group_size=size
    )
    rollouts = [setting.scored(task, r) for task, group in zip(tasks, groups, strict=True) for r in group]
    update(policy, optimizer, credit_rollouts(rollouts, config).rows, config, step)
    return time.process_time() - start, sum(len(r.turns) for r in rollouts) / len(rollouts)


def taught(folder: str, config: TrainConfig, **options: Any) -> Path:
    """The checkpoint of a few native steps, so that the policy uses its turns."""
    out = Path(folder) / f"taught-{config.max_turns}"
    shape = {"steps": 8, "tasks_per_step": 8, "group_size": 12, "minibatches": 4}
    train(config, out=out, threads=1, validation_size=8, checkpoint_every=8, **shape, **options)
    (start,) = (out / "checkpoints").glob("step-*")
    return start


def compare(name: str, start: Path, config: TrainConfig, options: argparse.Namespace, out: str) -> None:
    setting, policy = make_setting(config), load_policy(start)
    count, size = options.tasks, options.group_size
    trainers = {
        "TRL": trl_trainer(start, setting, count, size, out, ours=False),
        "TRL, our rollouts": trl_trainer(start, setting, count, size, out, ours=True),
    }
    clocks = {way: Clock() for way in trainers}
    for way, trainer in trainers.items():
        trainer.add_callback(clocks[way])
        trainer.remove_callback(PrinterCallback)
    native: list[tuple[float, float]] = []
    for step in range(options.steps + 1):  # the first one warms up
        native.append(native_step(policy, setting, count, size, step))
        for trainer in trainers.values():
            trainer.args.seed = step
            trainer.train()
    own, turns = (statistics.median(column) for column in zip(*native[1:], strict=True))
    print(f"\n{name}: {count} questions x {size} rollouts, {config.max_turns} turns at most")
    print(f"  {'native':20} {own:6.2f} s a step   {turns:.2f} turns a rollout")
    for way, trainer in trainers.items():
        each = statistics.median(clocks[way].steps[1:])
        share = trainer.adapter_s / sum(clocks[way].steps)
        turns = statistics.median(trainer.turns[1:])
        print(f"  {way:20} {each:6.2f} s a step   {turns:.2f} turns a rollout   {each / own:.2f} x native", end="")
        print(f"   adapter's share {100 * share:.2f} %")


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}; load {load:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        two = TrainConfig(minibatches=1, tasks_per_step=options.tasks)
        compare("two turns", taught(folder, two), two, options, folder)
        three = TrainConfig(
            minibatches=1, tasks_per_step=options.tasks, protocol="search", tasks="atlas-two-hop", max_turns=3
        )
        start = taught(folder, three, reward_weights={"turn_format": 1.0})
        compare("three turns", start, three, options, folder)


if __name__ == "__main__":
    main()
