"""The atlas's search task trained by TRL from the policy that ships; prints what was logged as a line of JSON.

torchrun --standalone --nproc-per-node 2 tests/trl_search.py OUT [ENGINE] [GENERATIONS]
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from trl import GRPOConfig

from turnwise.adapters.trl import TurnGRPOTrainer, environment_arguments
from turnwise.config import TrainConfig
from turnwise.policy import embedded_checkpoint
from turnwise.setting import make_setting

UPDATES = 4
"""Optimiser steps per generation, as the native trainer's minibatches."""


def main(out: str, engine: str = "own", generations: str = "8") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trainer = TurnGRPOTrainer(
        str(embedded_checkpoint()),
        args=GRPOConfig(
            out,
            per_device_train_batch_size=12,
            steps_per_generation=UPDATES,
            num_generations=12,
            max_steps=UPDATES * int(generations),
            learning_rate=5e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5 * UPDATES,
            adam_beta2=0.99,
            max_grad_norm=0.5,
            loss_type="grpo",
            max_completion_length=128,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=UPDATES,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        estimator="mt-grpo",
        **environment_arguments(make_setting(TrainConfig()), engine=engine),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        Path(out).mkdir(parents=True, exist_ok=True)
        lines = [line for line in trainer.state.log_history if "reward" in line]
        (Path(out) / "log.json").write_text(json.dumps(lines))
    if torch.distributed.is_initialized():
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
