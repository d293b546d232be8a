"""TRL's trainer with turn credit, and what its steps take; for `trl_step`, on forced turns, and `trl_demo`."""

import time
from pathlib import Path
from typing import Any

import trl
from forced import RESULT_TOKENS, outcome_value, query_of, turn_value
from transformers import PrinterCallback, TrainerCallback

from turnwise.adapters.trl import (
    TurnGRPOTrainer,
    completion_turns,
    environment_arguments,
    task_rows,
    tool_tokenizer,
)
from turnwise.setting import Setting


class TimedTrainer(TurnGRPOTrainer):
    """Knows how long its rollouts and the adapter's own part took, and how many turns there were."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.adapter_s = self.rollout_s = 0.0
        self.turns: list[float] = []
        super().__init__(*args, **options)

    def _generate(self, *args: Any) -> Any:
        start = time.process_time()
        found = super()._generate(*args)
        self.rollout_s += time.process_time() - start
        return found

    def _noted(self, *args: Any) -> Any:
        start = time.process_time()
        noted = super()._noted(*args)
        self.adapter_s += time.process_time() - start
        return noted

    def _with_turn_credit(self, batch: dict[str, Any]) -> dict[str, Any]:
        start = time.process_time()
        found = super()._with_turn_credit(batch)
        self.adapter_s += time.process_time() - start
        self.turns.append(self._metrics["train"]["turn_credit/turns"][-1])
        return found


class Clock(TrainerCallback):
    """CPU seconds of each of TRL's steps."""

    def __init__(self) -> None:
        self.started, self.steps = 0.0, []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.process_time() - self.started)


class TRLWay:
    """A trainer, one step at a time."""

    def __init__(self, trainer: TimedTrainer) -> None:
        self._trainer, self._clock = trainer, Clock()
        trainer.add_callback(self._clock)
        trainer.remove_callback(PrinterCallback)

    @property
    def adapter_s(self) -> float:
        """CPU seconds of the adapter so far."""
        return self._trainer.adapter_s

    def step(self, number: int) -> tuple[float, float, float, float]:
        """A step's CPU seconds, those of its rollouts, turns and sampled tokens of a rollout."""
        trainer = self._trainer
        before = trainer.rollout_s
        trainer.args.seed = number
        seen: dict[str, list[float]] = trainer._metrics["train"]
        seen.clear()  # TRL clears it when it logs, which it does at the end of a run of steps alone
        trainer.log = lambda *_, **__: None  # type: ignore[method-assign]
        trainer.train()
        tokens = seen["completions/mean_length"][-1]
        return self._clock.steps[-1], trainer.rollout_s - before, trainer.turns[-1], tokens


def trl_way(start: Path, setting: Setting, size: int, out: str, *, ours: bool) -> TRLWay:
    """TRL with its own tool loop, or around our engine."""
    config = setting.config
    tokenizer = tool_tokenizer(start)
    if ours:
        given = environment_arguments(setting)
    else:
        given = own_arguments(setting)
        tokenizer.parse_response = lambda ids, **_: forced_call(tokenizer.decode(ids, skip_special_tokens=True))
    trainer = TimedTrainer(
        str(start),
        args=trl.GRPOConfig(
            out,
            per_device_train_batch_size=len(setting.train) * size,
            num_generations=size,
            max_steps=1,
            learning_rate=0.0,
            loss_type="grpo",
            max_completion_length=config.max_turns * (config.max_turn_tokens + RESULT_TOKENS),
            generation_kwargs={"max_new_tokens": config.max_turn_tokens},
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
    return TRLWay(trainer)


def forced_call(text: str) -> dict[str, Any]:
    """Any message as a search."""
    function = {"name": "search", "arguments": {"query": query_of(text)}}
    return {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": function}]}


def own_arguments(setting: Setting) -> dict[str, Any]:
    """The questions, the tool and the rewards in TRL's own form."""
    tool = setting.tools["search"].function

    def search(query: str) -> str:
        """Articles that best match the query.

        Args:
            query: A question or a few words.
        """
        return str(tool(query))

    def said(completions: Any, **_: Any) -> list[list[float | None]]:
        return [
            [turn_value(str(turn[0]["content"])) if len(turn) > 1 else None for turn in completion_turns(own)]
            for own in completions
        ]

    def answered(completions: Any, answers: Any, **_: Any) -> list[float]:
        pairs = zip(completions, answers, strict=True)
        return [outcome_value(str(own[-1].get("content")), golds) for own, golds in pairs]

    return {
        "tools": [search],
        "reward_funcs": [answered],
        "turn_reward_funcs": [said],
        "train_dataset": task_rows(setting.train, setting.environment),
    }
