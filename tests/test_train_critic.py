"""Training with a critic: every method runs on the embedded policy, and a run goes on alike wherever it was stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from small_runs import small_world
from turnwise.checksums import CHECKSUMS
from turnwise.cli import main
from turnwise.config import CRITIC_METHODS
from turnwise.credit import TOKEN_ESTIMATORS
from turnwise.report import load_run, write_report
from turnwise.rundir import checkpoint_folder
from turnwise.traces import lacking, read_traces, traces_credit, traces_table
from turnwise.training import train

TIMES = ("tokens_per_s", "rollout_s", "update_s")
REWARDS = '''
def turn_small(task, rollout):
    """Share of a turn's tokens with a small id."""
    return [sum(i < 150 for i in turn.action_ids) / len(turn.action_ids) for turn in rollout.turns]
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict:
    """Options of a run of four quick steps, without `out`. All its rollouts are cut off, so all are bootstrapped."""
    folder = tmp_path_factory.mktemp("world")
    return {
        **small_world(folder, checkpoint, (f"q{i}" for i in range(5)), REWARDS),
        "estimator": "mt-ppo",
        "steps": 4,
        "tasks_per_step": 2,
        "group_size": 3,
        "max_turn_tokens": 6,
        "minibatches": 2,
        "learning_rate": 1e-2,
        "critic_warmup_steps": 1,
        "warmup_steps": 2,
        "validate_every": 4,
        "validation_size": 2,
        "checkpoint_every": 2,
    }


def numbers(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without clock times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        del line["wall_s"]
        line["metrics"] = {k: v for k, v in line["metrics"].items() if k not in TIMES}
    return found


def of_training(run: Path) -> list[dict]:
    return [line["metrics"] for line in numbers(run) if line["split"] == "train"]


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(world: dict, tmp_path: Path, critic: str):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(**world, critic=critic, out=whole)
    train(**{**world, "steps": 3}, critic=critic, out=parts)  # the last checkpoint is of step 3, of no round number
    train(out=parts, resume=True, steps=4)
    assert of_training(parts) == of_training(whole)
    assert (parts / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    for name in ("model", "optimizer", "critic", "critic_optimizer"):
        one, other = (load_file(checkpoint_folder(run, 4) / f"{name}.safetensors") for run in (parts, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    steps = of_training(whole)
    assert "grad_norm" not in steps[0], "the critic's warm-up"
    assert all(step["grad_norm"] > 0 for step in steps[1:])
    assert all(step["bootstrapped"] == 1 for step in steps)
    listed = (checkpoint_folder(whole, 4) / CHECKSUMS).read_text()
    assert all(f"  {name}\n" in listed for name in ("critic.safetensors", "critic_optimizer.safetensors"))


def test_cut_off_batches_are_warned_of_once_and_the_report_says_so(world: dict, tmp_path: Path, capsys):
    train(**{**world, "steps": 2}, out=tmp_path / "run")
    found = [line.get("warnings", []) for line in numbers(tmp_path / "run") if line["split"] == "train"]
    assert [len(each) for each in found] == [1, 0]
    assert "raise --max-turn-tokens" in found[0][0]
    assert any("Warning at step 1: all rollouts" in note for note in load_run(tmp_path / "run").notes)


@pytest.fixture(scope="module")
def quick() -> dict:
    """Options of a quick step of the embedded policy on the atlas."""
    return {
        "steps": 1,
        "tasks_per_step": 2,
        "group_size": 3,
        "minibatches": 2,
        "validation_size": 1,
        "validate_every": 100,
        "checkpoint_every": 100,
        "log_groups": 1,
        "threads": 1,
    }


@pytest.mark.parametrize("estimator", CRITIC_METHODS)
def test_every_method_trains_the_embedded_policy_and_is_reported(quick: dict, tmp_path: Path, estimator: str):
    out = tmp_path / "run"
    assert train(**quick, estimator=estimator, out=out).finished
    for step in of_training(out):
        for name in ("explained_variance", "value_loss", "value_clip_fraction", "mean_value", "value_grad_norm"):
            assert np.isfinite(step[name])
        assert step["grad_norm"] > 0
    records = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        turns = record["rollout"]["turns"]
        assert len(record["advantages"]) == len(record["baselines"]["value"]) == len(turns)
        if estimator in TOKEN_ESTIMATORS:
            lengths = [len(turn["action_ids"]) for turn in turns]
            by_turn = np.split(record["token_advantages"], np.cumsum(lengths)[:-1])
            np.testing.assert_allclose([x.mean() for x in by_turn], record["advantages"], atol=1e-4)
            assert len(record["token_values"]) == sum(lengths)
            if estimator != "vetta":  # which values turns by a head of its own
                firsts = [x[0] for x in np.split(record["token_values"], np.cumsum(lengths)[:-1])]
                np.testing.assert_allclose(firsts, record["baselines"]["value"], atol=1e-5)
        else:
            assert "token_values" not in record, "whose critic has targets at the turns' first tokens alone"
    traces = read_traces(out / "rollouts.jsonl")
    assert lacking(estimator, traces) == []
    assert np.isfinite(traces_credit(estimator, traces, traces_table(traces))).all()
    page = write_report([load_run(out)], out / "report.html")
    assert estimator in Path(page).read_text()


@pytest.mark.parametrize("aggregation", ["token-mean", "turn-mean", "constant"])
def test_the_first_pass_is_on_policy_whatever_a_token_weighs(world: dict, tmp_path: Path, aggregation: str):
    options = {**world, "steps": 1, "minibatches": 1, "estimator": "mt-grpo", "critic_warmup_steps": 0}
    options["aggregation"] = aggregation
    train(**options, out=tmp_path / "run")
    [step] = of_training(tmp_path / "run")
    assert step["policy_shift"] < 1e-6
    assert step["clip_fraction"] == 0
    assert 5 < step["entropy"] < 6, "a mean over tokens, of a random policy: somewhat below ln 400"


def test_the_command_line_trains_with_a_critic(tmp_path: Path, capsys):
    out = tmp_path / "run"
    sizes = ["--tasks-per-step", "2", "--group-size", "2", "--minibatches", "1", "--validation-size", "1"]
    method = ["--estimator", "mt-ppo", "--critic", "shared", "--whiten", "False", "--lam", "0.95"]
    assert main(["train", *method, *sizes, "--steps", "1", "--threads", "1", "--out", str(out)]) == 0
    assert "return" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["whiten"], config["lam"], config["gamma"]) == (False, 0.95, None)
