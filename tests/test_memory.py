"""The estimate of a run's memory: counted parts, and what the passes hold."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from turnwise import memory
from turnwise.batch import chunks, pack, weighted
from turnwise.cli import main
from turnwise.config import TrainConfig
from turnwise.devices import is_offered
from turnwise.errors import ConfigError
from turnwise.memory import Lengths, Live, check_memory, longest_rows, memory_estimate
from turnwise.policy import token_logprobs

LENGTHS = Lengths(prompt=20, turn=8, result=6, turns=2, context=512)
CONFIG = TrainConfig(tasks_per_step=2, group_size=4, minibatches=1, micro_batch_tokens=256)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    return Qwen2ForCausalLM(config)


def test_what_can_be_counted_is(model: Qwen2ForCausalLM):
    # embeddings 300 x 32; a layer: q 32x32+32, k and v 32x16+16 each, o 32x32, gate, up, down 32x64 each, two norms 32
    count = 300 * 32 + 2 * (32 * 33 + 2 * 33 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    found = memory_estimate(model, replace(CONFIG, kl_coef=0.1), LENGTHS)
    assert found.held["weights"] == found.held["reference"] == found.update["gradients"] == 4 * count
    assert found.held["optimiser"] == 8 * count
    # 8 rollouts of 20 + 8 + 6 + 8 tokens; 2 layers x keys and values of 2 heads of 8, in 4 bytes
    assert found.held["rollout cache"] == 8 * 42 * 2 * 2 * 2 * 8 * 4
    assert found.total == sum(found.held.values()) + max(sum(found.update.values()), sum(found.rollouts.values()))
    half = memory_estimate(model, replace(CONFIG, dtype="bfloat16"), LENGTHS)
    assert (half.held["weights"], half.held["optimiser"]) == (2 * count, 4 * count)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32, "the model itself stays as it is"


def test_drawing_ahead_takes_a_copy_of_what_learns_and_both_halves_at_once(model: Qwen2ForCausalLM):
    usual = memory_estimate(model, CONFIG, LENGTHS)
    found = memory_estimate(model, replace(CONFIG, ahead=True), LENGTHS)
    cache, weights = usual.held["rollout cache"], usual.held["weights"]
    assert found.held == {**usual.held, "sampler": weights, "rollout cache": 2 * cache}
    both = sum(usual.held.values()) + sum(usual.update.values()) + sum(usual.rollouts.values())
    assert found.total == both + weights + cache


def test_a_gpu_repeats_keys_for_the_heads_that_share_them(model: Qwen2ForCausalLM):
    # 8 rollouts that feed 6 tokens after 36: keys and values of 2 heads of 8 are copied to 4, in 4 bytes; a processor
    # is at its fullest at another moment, so that not all of it is the difference.
    copies = 8 * 42 * 2 * (4 * 8) * 4
    processor, gpu = (memory_estimate(model, replace(CONFIG, device=name), LENGTHS) for name in ("cpu", "cuda"))
    part = "feeding and drawing"
    assert copies / 2 < gpu.rollouts[part] - processor.rollouts[part] < copies
    assert gpu.held == processor.held


def test_a_context_bounds_the_cache(model: Qwen2ForCausalLM):
    short = replace(LENGTHS, context=30)
    assert memory_estimate(model, CONFIG, short).held["rollout cache"] == 8 * 30 * 2 * 2 * 2 * 8 * 4


def test_vllm_takes_its_share_of_the_device_and_no_cache_of_ours(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "device_memory", lambda device: 1000)
    found = memory_estimate(model, replace(CONFIG, engine="vllm", vllm_memory_share=0.3), LENGTHS)
    assert found.held["vLLM"] == 300
    assert "rollout cache" not in found.held
    assert sum(found.rollouts.values()) == 0


def test_passes_on_shapes_take_what_real_passes_take(model: Qwen2ForCausalLM):
    rows = longest_rows(CONFIG, LENGTHS)
    (chunk,) = chunks(rows, max_tokens=CONFIG.micro_batch_tokens)
    batch = pack(weighted(chunk, "sequence-mean"), pad_id=0)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Live((*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None))) as live:
        token_logprobs(model, batch, batch.loss)[0].sum().backward()
    model.zero_grad()
    found = memory_estimate(model, CONFIG, LENGTHS)
    assert found.update["activations"] + found.update["logits and backward"] == pytest.approx(live.most, rel=0.03)


def test_views_of_what_is_there_take_nothing():
    weight = torch.zeros(8, 4)
    with Live((weight,)) as live:
        made = weight.t() @ torch.zeros(8, 2)
    assert live.most == 4 * (8 * 2 + 4 * 2)  # the zeros and the product
    assert made.shape == (4, 2)


def test_what_does_not_learn_has_no_gradient_and_keeps_less(model: Qwen2ForCausalLM):
    whole = memory_estimate(model, CONFIG, LENGTHS)
    frozen = Qwen2ForCausalLM(model.config).requires_grad_(False)
    frozen.model.layers[1].mlp.requires_grad_(True)
    part = memory_estimate(frozen, CONFIG, LENGTHS)
    assert part.update["gradients"] == 4 * 3 * 32 * 64
    assert part.held["optimiser"] == 8 * 3 * 32 * 64
    assert part.update["activations"] < 0.6 * whole.update["activations"]


def test_options_change_what_they_say(model: Qwen2ForCausalLM):
    usual = memory_estimate(model, CONFIG, LENGTHS)
    again = memory_estimate(model, replace(CONFIG, gradient_checkpointing=True), LENGTHS)
    fewer = memory_estimate(model, replace(CONFIG, micro_batch_tokens=128), LENGTHS)
    mixed = memory_estimate(model, replace(CONFIG, dtype="mixed"), LENGTHS)
    critic = memory_estimate(model, replace(CONFIG, estimator="mt-ppo"), LENGTHS)
    assert again.update["activations"] < 0.5 * usual.update["activations"]
    assert 0.4 < fewer.update["activations"] / usual.update["activations"] < 0.7
    assert mixed.held["weights"] == usual.held["weights"]
    assert mixed.update["activations"] < 0.9 * usual.update["activations"]
    assert critic.held["critic"] == 3 * usual.held["weights"]  # the embeddings are tied: its decoder has all of them
    assert critic.update["logits and backward"] > 0.9 * usual.update["activations"]


def test_longest_rows_fill_micro_batches_with_what_the_options_allow():
    rows = longest_rows(replace(CONFIG, group_size=64, micro_batch_tokens=100), LENGTHS)
    assert {(len(row.prompt_ids), len(row.ids), int(row.action.sum())) for row in rows} == {(20, 22, 16)}
    assert len(rows) == 2 + 200 // 22
    assert np.flatnonzero(~rows[0].action).tolist() == [*range(8, 14)]


def test_a_small_model_is_not_looked_at(model: Qwen2ForCausalLM):
    assert check_memory(model, CONFIG, LENGTHS) is None


def test_too_little_room_is_one_line_with_changes_by_effect(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "SMALL", 1)
    fitting = check_memory(model, CONFIG, LENGTHS)
    assert fitting
    monkeypatch.setattr(memory, "device_memory", lambda device: None)
    assert check_memory(model, CONFIG, LENGTHS) == fitting
    monkeypatch.setattr(memory, "device_memory", lambda device: fitting.total - 1)
    with pytest.raises(
        ConfigError, match=r"the run must fit its device \(cpu\) with .*; change, by effect: "
    ) as caught:
        check_memory(model, CONFIG, LENGTHS)
    text = str(caught.value)
    assert "\n" not in text
    assert text.index("--micro-batch-tokens 128 (saves") < text.index("--dtype bfloat16 (saves"), text
    assert "--gradient-checkpointing (saves" in text


def test_a_dry_run_says_it_and_leaves_nothing(checkpoint, tmp_path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert main(["train", "--policy", str(checkpoint), "--max-turn-tokens=16", "--out", str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("memory: about ")
    assert not out.exists()
    missing = next(kind for kind in ("mps", "cuda") if not is_offered(kind))
    for option, says in (([f"--device={missing}"], "device must be one"), (["--max-turn-tokens=5000"], "must fit the")):
        assert main(["train", "--policy", str(checkpoint), *option, "--out", str(out), "--dry-run"]) == 2
        assert says in capsys.readouterr().err


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's memory is read from /proc")
def test_the_estimate_is_within_15_percent_of_what_a_process_takes():
    # minutes: rollouts and updates of a model of 38 million parameters, each case in a process of its own
    cases = ("recomputed", "last layer learns")
    command = [sys.executable, BENCHMARKS / "memory.py", "--tokens", "512", "--only", *cases]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    ratio = next(line for line in done.stdout.splitlines() if "plain / in pieces" in line)
    assert float(ratio.split()[-1]) > 2
    errors = {line[:20].strip(): float(line.split()[-1].rstrip("%")) for line in done.stdout.splitlines()[5:]}
    assert tuple(errors) == cases
    assert all(abs(error) < 15 for error in errors.values()), errors


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_on_a_processor():
    pytest.importorskip("peft")
    command = [sys.executable, BENCHMARKS / "gpu.py", "--tiny", "--rounds", "1", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()[3:]]
    assert names == ["generate", "all", "LoRA"]
