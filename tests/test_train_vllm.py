"""Training with engine vllm, against a stand-in for the package: the whole loop, from command to checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_vllm
from turnwise.config import TrainConfig
from turnwise.engines.vllm import VLLMEngine
from turnwise.errors import ConfigError
from turnwise.evaluation import make_engines
from turnwise.policy import load_policy
from turnwise.rundir import read_lines
from turnwise.training import train
from turnwise.types import rollout_from_json

SMALL: dict[str, Any] = {
    "steps": 2,
    "tasks_per_step": 2,
    "group_size": 2,
    "minibatches": 1,
    "validation_size": 2,
    "max_turn_tokens": 6,
    "threads": 1,
}


def test_a_run_with_vllm_draws_with_the_weights_of_each_step(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake_vllm.install(monkeypatch)
    loads: list[int] = []
    refresh = VLLMEngine.refresh
    monkeypatch.setattr(VLLMEngine, "refresh", lambda self, version: (refresh(self, version), loads.append(version)))
    result = train(policy=str(checkpoint), engine="vllm", vllm_memory_share=0.3, out=tmp_path / "r", **SMALL)
    assert result.finished
    assert loads == [1, 2]
    lines = read_lines(tmp_path / "r" / "rollouts.jsonl")
    model = load_policy(checkpoint).model
    for rollout in [rollout_from_json(json.dumps(line["rollout"])) for line in lines if line["step"] == 1]:
        ids = list(rollout.prompt_ids)
        for turn in rollout.turns:
            assert turn.sampling_logprobs == pytest.approx(logprobs_after(model, ids, turn.action_ids), abs=1e-4)
            ids += [*turn.action_ids, *turn.reply_ids]


def logprobs_after(model: Any, prompt: list[int], drawn: tuple[int, ...]) -> list[float]:
    """By one pass over everything."""
    with torch.no_grad():
        logprobs = model(torch.tensor([[*prompt, *drawn]])).logits[0].log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + k, token]) for k, token in enumerate(drawn)]


def test_the_configuration_chooses_the_engine(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    fake_vllm.install(monkeypatch)
    policy = load_policy(checkpoint)
    (engine,) = make_engines(policy, TrainConfig(engine="vllm"), max_rows=7)
    assert isinstance(engine, VLLMEngine)
    assert engine._llm.llm_engine.max_num_seqs == 7
    assert engine.max_context == policy.context
    assert not any(isinstance(engine, VLLMEngine) for engine in make_engines(policy, TrainConfig()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "sglang"}, "engine must be a known name"),
        ({"vllm_memory_share": 0.5}, "vllm-memory-share must go with engine vllm"),
        ({"engine": "vllm", "vllm_memory_share": 1.5}, "vllm-memory-share must be in"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(**options)


def test_without_vllm_nothing_is_begun(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="engine vllm must find the package vllm"):
        train(policy=str(checkpoint), engine="vllm", out=tmp_path / "r", **SMALL)
    assert not (tmp_path / "r").exists()
