"""The checks of `turnwise doctor trl`: packages, releases, a batch whose credit is known, several processes."""

import contextlib
import importlib
import importlib.metadata
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from turnwise.adapters.doctor import Finding, installed, of_release

RANGE = ("1.8", "2")
"""The releases of TRL that the adapter is for, the second one not included."""
INSTALL = 'pip install "turnwise[trl]"'
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "trl")


def packages() -> Finding:
    """The packages are installed."""
    return installed(PACKAGES, install=INSTALL)


def releases() -> Finding:
    """The release of TRL is one that the adapter is for."""
    return of_release("trl", *RANGE)


def imports() -> Finding:
    """TRL's trainer and the adapter can be imported."""
    missing = _missing_import("trl.trainer.grpo_trainer") or _missing_import("turnwise.adapters.trl")
    if missing:
        # TRL 1.8 to 1.12 use requests without asking for it; later ones may want other packages.
        return Finding(what=f"TRL's trainer needs {missing}, which is not installed", fix=f"pip install {missing}")
    return Finding(what="TRL's GRPOTrainer and the adapter can be imported")


def _missing_import(module: str) -> str | None:
    """The package whose absence keeps a module from being imported; TRL hides it behind a RuntimeError."""
    try:
        with _quiet():
            importlib.import_module(module)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ModuleNotFoundError) and cause.name:
                return cause.name.split(".")[0]
            cause = cause.__cause__
        raise
    return None


def tool_parsing() -> Finding:
    """Tool calls of TRL's own loop can be read."""
    from packaging.version import Version

    found, needed = Version(importlib.metadata.version("transformers")), Version("5.13")
    if found < needed:
        return Finding(
            what=f"transformers {found} cannot read tool calls by a response template: TRL's own loop would take every "
            "call for text, without an error",
            fix=f'pip install "transformers>={needed}"',
        )
    return Finding(what=f"transformers {found} reads tool calls by a response template")


def a_batch() -> Finding:
    """A batch with known rewards gets known credit inside TRL's trainer."""
    import numpy as np

    turn_rewards = [[{"tool": 1.0}, {}], [{"tool": 0.0}, {}]] * 2
    with _quiet():
        batch, metrics, loss = _credited(turn_rewards, [{"answer": 0.0}] * 4)
    arrived = metrics.get("turn_credit/reward/tool")
    if not arrived or abs(arrived[-1] - 0.5) > 1e-6:
        return Finding(
            what=f"turn rewards do not arrive: their mean over rollouts is 0.5, the trainer saw {arrived}",
            fix="TurnGRPOTrainer(..., turn_reward_funcs=[...])  # or turn_rewards from rollout_func, a list each",
        )
    shape = tuple(batch["advantages"].shape)
    if shape != tuple(batch["completion_ids"].shape):
        return Finding(
            what=f"advantages have the shape {shape}, not one per token, {tuple(batch['completion_ids'].shape)}",
            fix="trainer = TurnGRPOTrainer(...)  # from turnwise.adapters.trl, and no override of its methods",
        )
    # In the group of four: z = ±½ / (0.577 + 1e-4) on the first turns, 0 on the second ones, whose outcomes are equal.
    first = batch["advantages"][:, 0].tolist()
    z = 0.5 / (np.std([1, 0, 1, 0], ddof=1) + 1e-4)
    second = batch["advantages"][:, 4].tolist()
    if not np.allclose(first, [z, -z, z, -z], atol=1e-5) or not np.allclose(second, 0.0, atol=1e-6):
        return Finding(
            what=f"turns must get ±{z:.3f} and 0; the first got {first}, the second {second}",
            fix='pip install "trl>=1.8,<2"  # the trainer changed what it does with a batch',
        )
    if not np.isfinite(loss):
        return Finding(what=f"TRL's loss of that batch is {loss}", fix='pip install "trl>=1.8,<2"')
    return Finding(what=f"turn rewards arrive; advantages differ between turns ({first[0]:+.3f} and {second[0]:+.3f})")


def _credited(turn_rewards: Any, outcomes: Any) -> tuple[Any, Any, float]:
    """TRL's batch of two-turn rollouts with these rewards, the metrics that it logs, and the loss."""
    from datasets import Dataset

    from turnwise.policy import embedded_checkpoint

    adapter: Any = importlib.import_module("turnwise.adapters.trl")
    size = len(turn_rewards)

    def given(prompts: Any, trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [[5, 6]] * size,
            "completion_ids": [[7, 8, 9, 10, 11, 2]] * size,
            "logprobs": None,
            "env_mask": [[1, 1, 0, 0, 1, 1]] * size,
            "turn_rewards": turn_rewards,
            "outcome_rewards": outcomes,
        }

    prompt = [{"role": "user", "content": "What is the capital of Kenya?"}]
    with tempfile.TemporaryDirectory() as folder:
        trainer = adapter.TurnGRPOTrainer(
            str(embedded_checkpoint()),
            args=adapter.GRPOConfig(
                folder,
                per_device_train_batch_size=size,
                num_generations=size,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt}]),
            reward_funcs=[adapter.rollout_return],
            rollout_func=given,
            estimator="mt-grpo",
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._generate_and_score_completions([{"prompt": prompt} for _ in range(size)])
        loss = trainer._compute_loss(trainer.model, batch)
    return batch, trainer._metrics["train"], float(loss.detach())


def processes() -> Finding:
    """Several processes can exchange what credit needs."""
    import torch

    if not torch.distributed.is_available():
        return Finding(
            what="this torch has no torch.distributed: groups cannot span processes",
            fix="install a build of torch with distributed support (the ones on pytorch.org have it)",
        )
    count, seen = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", "1"))
    hint = f"accelerate launch --num_processes {max(count, 2)} train.py"
    where = f"{seen} processes" if seen > 1 else "one process"
    return Finding(
        what=f"{where} here, {count} GPUs; for several: {hint} (turn rewards are gathered: groups may span processes)"
    )


CHECKS: list[Callable[[], Finding]] = [packages, releases, imports, tool_parsing, a_batch, processes]
"""In this order: each builds on those before."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of experimental seams that the adapter knows of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
