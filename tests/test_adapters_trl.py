"""TRL's own trainer with turn credit: the native advantages, the native loss, and training in two processes.

Runs where TRL is installed (make test-slow makes an environment for the newest release and one for the oldest).
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl")
    import torch
    from trl import GRPOConfig
    from trl.experimental.gmpo import GMPOTrainer

    from turnwise.adapters.trl import (
        EnvironmentRollouts,
        TurnGRPOTrainer,
        completion_turns,
        environment_arguments,
        refusals,
        rollout_columns,
        rollout_return,
        task_rows,
        tool_tokenizer,
    )

from adapter_rollouts import awkward_rollouts, native_advantages
from turnwise.adapters.doctor import failed, run_check
from turnwise.adapters.rows import WITHOUT_CRITIC
from turnwise.adapters.trl_checks import CHECKS
from turnwise.batch import rollout_row
from turnwise.chat import load_chat
from turnwise.config import TrainConfig
from turnwise.engines.hf import HFEngine
from turnwise.errors import ConfigError, InputError
from turnwise.learning import update
from turnwise.policy import embedded_checkpoint, load_policy
from turnwise.rollout import Limits, awaited, run_rollout
from turnwise.setting import make_setting
from turnwise.types import Rollout

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
HERE = Path(__file__).parent
GROUP = 4


def arguments(out: Path, **options: Any) -> GRPOConfig:
    return GRPOConfig(
        str(out),
        **{
            "per_device_train_batch_size": 4 * GROUP,
            "num_generations": GROUP,
            "max_steps": 1,
            "loss_type": "grpo",
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_completion_length": 128,
            **options,
        },
    )


def fixed_trainer(rollouts: list[Rollout], checkpoint: Path, out: Path, **options: Any) -> TurnGRPOTrainer:
    """A trainer whose rollouts are these; its dataset has a row for each group."""
    from datasets import Dataset

    def given(prompts: Any, trainer: Any) -> dict[str, Any]:
        return rollout_columns(rollouts, load_chat(checkpoint))

    prompts = dict.fromkeys(r.task_id for r in rollouts)
    estimator = options.pop("estimator", "mt-grpo")
    return TurnGRPOTrainer(
        str(checkpoint),
        args=arguments(out, **options),
        reward_funcs=[rollout_return],
        rollout_func=given,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts]),
        estimator=estimator,
    )


def batch_inputs(rollouts: list[Rollout]) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": r.task_id}]} for r in rollouts]


def by_tokens(batch: dict[str, Any]) -> dict[tuple[int, ...], np.ndarray]:
    """Each row's advantages at its sampled tokens, by the row's tokens; TRL shuffles rows."""
    mask = (batch["completion_mask"] * batch["tool_mask"]).numpy() > 0
    assert np.all(batch["advantages"].numpy()[~mask] == 0)
    keys = zip(batch["prompt_ids"], batch["completion_ids"], strict=True)
    return {
        (*prompt.tolist(), *ids.tolist()): row[own]
        for (prompt, ids), row, own in zip(keys, batch["advantages"].numpy(), mask, strict=True)
    }


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    """Groups of four, in order: unequal turn counts, some cut off; of the last group, all but one failed."""
    import dataclasses

    found = awkward_rollouts(4, GROUP, singleton=False)
    return [
        dataclasses.replace(r, stop="error", turn_rewards=(), outcome_rewards={}) if i > 3 * GROUP else r
        for i, r in enumerate(found)
    ]


@pytest.fixture(scope="module")
def trainer(rollouts: list[Rollout], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TurnGRPOTrainer:
    return fixed_trainer(rollouts, checkpoint, tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_trl_gets_the_native_advantages(estimator: str, trainer: TurnGRPOTrainer, rollouts: list[Rollout]):
    trainer.estimator = estimator
    trainer.model.train()
    trainer._step, trainer._buffered_inputs = 0, None
    batch = trainer._prepare_inputs(batch_inputs(rollouts))  # TRL shuffles here
    found = by_tokens(batch)
    live = [r for r in rollouts if r.stop != "error"]
    expected = native_advantages(live, estimator)
    width = batch["completion_ids"].shape[1]
    prompt_width = batch["prompt_ids"].shape[1]
    for rollout, own in zip(live, expected, strict=True):
        ids = [i for turn in rollout.turns for i in (*turn.action_ids, *turn.reply_ids)]
        key = (*[0] * (prompt_width - len(rollout.prompt_ids)), *rollout.prompt_ids, *ids, *[0] * (width - len(ids)))
        np.testing.assert_allclose(found[key], own, rtol=1e-6, atol=1e-6)
    assert sum(len(own) == 0 for own in found.values()) >= 1  # the failed ones are padding


def test_the_completions_table_shows_what_was_used(trainer: TurnGRPOTrainer, rollouts: list[Rollout]):
    trainer.estimator = "mt-grpo"
    trainer.model.train()
    batch = trainer._generate_and_score_completions(batch_inputs(rollouts))
    mask = batch["completion_mask"] * batch["tool_mask"]
    means = (batch["advantages"].sum(1) / mask.sum(1).clamp(min=1)).tolist()
    np.testing.assert_allclose(list(trainer._logs["advantages"])[-len(rollouts) :], means, atol=1e-5)
    shown = list(trainer._logs["extra"]["turn_advantages"])[-len(rollouts) :]
    assert [len(text.split()) for text in shown] == [len(r.turns) if r.stop != "error" else 0 for r in rollouts]
    assert "turn_credit/abs_advantage/turn_1" in trainer._metrics["train"]


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo"])
def test_equal_advantages_give_the_native_loss_and_gradient(kind: str, checkpoint: Path, tmp_path: Path):
    aggregation = {"grpo": "sequence-mean", "bnpo": "token-mean", "dr_grpo": "constant"}[kind]
    step = awkward_rollouts(4, GROUP, singleton=False)
    trainer = fixed_trainer(step, checkpoint, tmp_path, loss_type=kind)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.max_completion_length = 2 * 64  # what the native constant divides by
    batch = trainer._generate_and_score_completions(batch_inputs(step))
    logprobs, _, *_ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        batch["completion_ids"].shape[1],
    )
    batch["old_per_token_logps"] = logprobs.detach() + 0.3 * torch.sin(torch.arange(logprobs.numel()).view_as(logprobs))
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1e9)

    policy = load_policy(checkpoint)
    config = TrainConfig(
        minibatches=1, tasks_per_step=4, max_turns=2, max_turn_tokens=64, max_grad_norm=1e9, aggregation=aggregation
    )
    rows = []
    mask = (batch["completion_mask"] * batch["tool_mask"]) > 0
    for i, rollout in enumerate(step):
        row = rollout_row(rollout, [0.0] * len(rollout.turns), [True] * len(rollout.turns))
        advantages, old = np.zeros(len(row.ids), np.float32), np.zeros(len(row.ids), np.float32)
        advantages[row.action] = batch["advantages"][i][mask[i]].numpy()
        old[row.action] = batch["old_per_token_logps"][i][mask[i]].numpy()
        import dataclasses

        rows.append((rollout.group, dataclasses.replace(row, advantages=advantages, sampling_logprobs=old)))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    native = update(policy, optimizer, rows, config, 10)
    assert native["clip_fraction"] > 0.05
    assert native["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert native["grad_norm"] == pytest.approx(float(norm), rel=1e-6)


# ----------------------------------------------------------------------------------- several processes


def run_processes(*args: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_group_that_spans_two_processes_is_one_group(checkpoint: Path, tmp_path: Path):
    # 3 groups of 4 on 2 processes: the second one is split
    run_processes(str(HERE / "trl_ranks.py"), str(checkpoint), str(tmp_path))
    step = awkward_rollouts(3, GROUP, singleton=False, seed=5)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert set(ranks[0]) == set(WITHOUT_CRITIC)
    for estimator in WITHOUT_CRITIC:
        found = [row for rank in ranks for row in rank[estimator]]
        for own, other in zip(found, native_advantages(step, estimator), strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-6, atol=1e-6, err_msg=estimator)


def test_training_in_two_processes_teaches_the_tool(tmp_path: Path):
    run_processes(str(HERE / "trl_search.py"), str(tmp_path), "own", "6")
    log = json.loads((tmp_path / "log.json").read_text())
    rates = [line["turn_credit/reward/tool_execution"] / 0.2 for line in log]  # a rollout has one call
    assert len(rates) == 6
    assert rates[0] < 0.4
    assert np.mean(rates[-2:]) > rates[0] + 0.3


def test_trls_own_generation_plays_our_environments_in_two_processes(tmp_path: Path):
    run_processes(str(HERE / "trl_search.py"), str(tmp_path), "trl", "1")
    (line,) = json.loads((tmp_path / "log.json").read_text())
    assert line["turn_credit/turns"] > 1.1
    assert line["turn_credit/reward/tool_execution"] > 0


# ------------------------------------------------------------------------------ TRL's tools and environments


SETTING = make_setting(TrainConfig())


def search(query: str) -> str:
    """Articles that best match the query.

    Args:
        query: A question or a few words.
    """
    return SETTING.tools["search"].function(query)


class Searcher:
    """An environment as TRL has them: one per rollout, its public methods are tools."""

    def reset(self, **row: Any) -> None:
        self.found: list[bool] = []
        self.answers = row["answers"]

    def search(self, query: str) -> str:
        """Articles that best match the query.

        Args:
            query: A question or a few words.
        """
        text = search(query)
        self.found.append(any(answer in text for answer in self.answers))
        return text


def turn_executed(prompts: Any, completions: Any, **_: Any) -> list[list[float | None]]:
    return [
        [0.2 * ("error" not in turn[1]["content"]) if len(turn) > 1 else None for turn in completion_turns(completion)]
        for completion in completions
    ]


def turn_found(prompts: Any, completions: Any, environments: Any, **_: Any) -> list[list[float | None]]:
    return [
        [0.5 * environment.found[k] if k < len(environment.found) else None for k in range(len(completion_turns(own)))]
        for own, environment in zip(completions, environments, strict=True)
    ]


def said_answer(prompts: Any, completions: Any, answers: Any, **_: Any) -> list[float]:
    return [float(any(a in own[-1]["content"] for a in golds)) for own, golds in zip(completions, answers, strict=True)]


@pytest.mark.parametrize("way", ["tools", "environment"])
def test_trls_own_tool_loop_gets_turn_credit(way: str, tmp_path: Path):
    given: dict[str, Any] = {"tools": [search], "turn_reward_funcs": turn_executed}
    if way == "environment":
        given = {"environment_factory": Searcher, "turn_reward_funcs": [turn_executed, turn_found]}
    trainer = TurnGRPOTrainer(
        str(embedded_checkpoint()),
        args=arguments(tmp_path, num_generations=8, per_device_train_batch_size=32),
        processing_class=tool_tokenizer(embedded_checkpoint()),
        train_dataset=task_rows(SETTING.train[:20], SETTING.environment),
        reward_funcs=[said_answer],
        estimator="mt-grpo",
        **given,
    )
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["tools/call_frequency"] > 0.1
    assert line["turn_credit/turns"] == pytest.approx(1 + line["tools/call_frequency"])
    assert line["turn_credit/reward/turn_executed"] > 0
    assert line["turn_credit/abs_advantage/turn_1"] != line["turn_credit/abs_advantage/turn_2"]
    assert way == "tools" or "turn_credit/reward/turn_found" in line


def test_our_engine_draws_in_trl_what_it_draws_natively(tmp_path: Path):
    trainer = TurnGRPOTrainer(
        str(embedded_checkpoint()), args=arguments(tmp_path), **environment_arguments(SETTING, tasks=4)
    )
    plays: Any = trainer.rollout_func
    assert isinstance(plays, EnvironmentRollouts)
    tasks = [task for task in SETTING.train[:4] for _ in range(2)]
    prompts = [row["prompt"] for row in task_rows(tasks, SETTING.environment)]
    columns = plays(prompts, trainer)
    policy = load_policy("embedded")
    engine = HFEngine(policy.model, stop_ids=[policy.chat.end_id], max_context=policy.context)
    limits = Limits(max_turn_tokens=64, context=policy.context, max_turns=2)
    from turnwise.rollout import rollout_seed

    for i in (0, 5):
        rollout = awaited(
            run_rollout(
                tasks[i],
                SETTING.environment(tasks[i]),
                engine,
                policy.chat,
                limits=limits,
                seed=rollout_seed(0, 0, 0, i),
            )
        )
        assert columns["prompt_ids"][i] == list(rollout.prompt_ids)
        assert columns["completion_ids"][i][: len(rollout.turns[0].action_ids)] == list(rollout.turns[0].action_ids)
        assert max(columns["turn_ids"][i]) == len(rollout.turns) - 1


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"importance_sampling_level": "sequence"}, "turn credit is lost"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "gdpo instead"),
    ],
)
def test_what_would_distort_turn_credit_is_refused(options: dict, said: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=said):
        TurnGRPOTrainer("none", args=arguments(tmp_path, **options), turn_reward_funcs=turn_executed)


def test_refusals_say_why(tmp_path: Path):
    sequence = arguments(tmp_path, importance_sampling_level="sequence")
    assert refusals(sequence, "grpo-mr") == []  # one advantage per rollout loses nothing
    sequence.loss_type = "cispo"
    assert refusals(sequence, "mt-grpo") == []
    plain = arguments(tmp_path)
    assert refusals(plain, "mt-grpo") == []
    assert "geometric mean" in refusals(plain, "mt-grpo", GMPOTrainer)[0]
    plain.use_vllm, plain.vllm_importance_sampling_correction = True, True
    assert "TRL's default" in refusals(plain, "mt-grpo")[0]
    plain.vllm_importance_sampling_mode = "token_truncate"
    assert refusals(plain, "mt-grpo") == []


def test_sequence_level_ratios_do_delete_turn_credit(checkpoint: Path, tmp_path: Path):
    """Why they are refused: +1 on one turn and -1 on an equally long one leave no gradient."""
    step = [r for r in awkward_rollouts(4, GROUP, singleton=False) if len(r.turns) > 1]
    trainer = fixed_trainer((step * 16)[: 4 * GROUP], checkpoint, tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(batch_inputs((step * 16)[: 4 * GROUP]))
    mask = batch["completion_mask"] * batch["tool_mask"]
    count = mask.cumsum(1)
    half = (mask.sum(1, keepdim=True) // 2) * mask
    batch["advantages"] = mask * ((count <= half).float() - ((count > half) & (count <= 2 * half)).float())
    norms = {}
    for level in ("token", "sequence"):
        trainer.importance_sampling_level = level
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, batch).backward()
        norms[level] = float(torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1e9))
    assert norms["sequence"] < 1e-5 * norms["token"]


def test_missing_turn_rewards_are_an_error_before_training(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="mt-grpo must have turn rewards"):
        TurnGRPOTrainer(str(checkpoint), args=arguments(tmp_path), reward_funcs=[said_answer])


def test_rollouts_without_turn_rewards_are_an_error(checkpoint: Path, tmp_path: Path):
    step = awkward_rollouts(4, GROUP, singleton=False)
    trainer = fixed_trainer(step, checkpoint, tmp_path)
    plain = trainer.rollout_func
    trainer.rollout_func = lambda prompts, t: {k: v for k, v in plain(prompts, t).items() if k != "turn_rewards"}
    with pytest.raises(InputError, match="must have turn rewards"):
        trainer._generate_and_score_completions(batch_inputs(step))


def test_the_doctor_finds_nothing_to_mend():
    said = [(check.__name__, run_check(check)) for check in CHECKS]
    assert not [name for name, text in said if failed(text)], said
