"""NaN and infinities: the rollout or the step that has them is left out, counted and kept to be looked at."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import turnwise.learning
from small_runs import small_world
from turnwise.critic import make_critic
from turnwise.engine import Sampling
from turnwise.engines.hf import HFEngine
from turnwise.errors import NotFinite, RunError
from turnwise.policy import load_policy, tiny_policy
from turnwise.rundir import KEPT_BAD, checkpoint_folder, latest_checkpoint, read_lines
from turnwise.traces import read_traces
from turnwise.training import train

REWARDS = """
def outcome_varied(task, rollout):
    return sum(rollout.turns[-1].action_ids) % 97 / 97
"""
SOMETIMES_NAN = """
def outcome_varied(task, rollout):
    found = sum(rollout.turns[-1].action_ids)
    return float("nan") if found % 3 == 0 else found % 97 / 97
"""
SHAPE: dict[str, Any] = {
    "steps": 3,
    "tasks_per_step": 2,
    "group_size": 4,
    "max_turn_tokens": 4,
    "minibatches": 2,
    "learning_rate": 1e-2,
    "validation_size": 1,
    "threads": 1,
}


def world(folder: Path, checkpoint: Path, rewards: str = REWARDS) -> dict[str, Any]:
    return {**small_world(folder, checkpoint, (f"q{i}" for i in range(5)), rewards), **SHAPE}


def steps_of(run: Path) -> list[dict[str, float]]:
    return [line["metrics"] for line in read_lines(run / "metrics.jsonl") if line["split"] == "train"]


class Broken:
    """A function whose calls in `bad` are given to `spoil`."""

    def __init__(self, real: Any, spoil: Any, bad: set[int]) -> None:
        self.real, self.spoil, self.bad, self.calls = real, spoil, bad, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        found = self.real(*args, **options)
        return self.spoil(found) if self.calls in self.bad else found


def infinite(parts: Any) -> Any:
    """The loss with an infinity added; its gradient stays finite."""
    return type(parts)(**{**vars(parts), "loss": parts.loss + float("inf")})


@pytest.mark.parametrize("method", ["mt-grpo", "mt-ppo"])
def test_an_infinite_loss_skips_its_minibatch(checkpoint: Path, tmp_path: Path, monkeypatch, method: str):
    name = "policy_loss" if method == "mt-grpo" else "value_loss"
    monkeypatch.setattr(turnwise.learning, name, Broken(getattr(turnwise.learning, name), infinite, {3}))
    with pytest.warns(UserWarning, match=r"step of step 2 was skipped, as its .*loss is inf; its batch is in"):
        train(**world(tmp_path, checkpoint), estimator=method, out=tmp_path / "run")
    assert [step["skipped_steps"] for step in steps_of(tmp_path / "run")] == [0, 1, 0]
    [bad] = (tmp_path / "run" / "bad").iterdir()
    record, rows = json.loads((bad / "batch.json").read_text()), load_file(bad / "batch.safetensors")
    assert (bad.name, record["step"], record["minibatch"]) == ("step-000002-1-1", 2, 1)
    assert len(rows["group"]) == 4
    assert rows["lengths"].sum() == len(rows["ids"]) == len(rows["advantages"])
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_stops_after_too_many_skipped_steps_with_its_last_weights(checkpoint: Path, tmp_path: Path, monkeypatch):
    broken = Broken(turnwise.learning.policy_loss, infinite, set(range(3, 99)))
    monkeypatch.setattr(turnwise.learning, "policy_loss", broken)
    run = tmp_path / "run"
    with (
        pytest.warns(UserWarning, match="was skipped"),
        pytest.raises(RunError, match=r"skipped 4 times in a row; the last 4 up to step 3") as caught,
    ):
        train(**{**world(tmp_path, checkpoint), "steps": 9, "skip_limit": 4}, out=run)
    assert "\n" not in str(caught.value)
    assert latest_checkpoint(run)[1]["skipped_in_a_row"] == 4
    before, after = (load_policy(checkpoint_folder(run, step)).model.state_dict() for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list((run / "bad").iterdir())) == min(4, KEPT_BAD)
    monkeypatch.setattr(turnwise.learning, "policy_loss", broken.real)
    assert train(out=run, resume=True).finished


def test_a_gradient_of_the_critic_that_is_nan_moves_neither(bpe_chat):
    policy = tiny_policy(bpe_chat, seed=0, hidden=16, layers=1)
    critic = make_critic(policy, "own")
    optimizer = torch.optim.SGD(policy.learned, lr=1.0)
    for parameter in (*policy.learned, *critic.parameters):
        parameter.grad = torch.ones_like(parameter)
    critic.head.bias.grad = torch.full_like(critic.head.bias, float("nan"))
    before = [p.detach().clone() for p in (*policy.learned, *critic.parameters)]
    optimizers = {"value_grad_norm": critic.optimizer, "grad_norm": optimizer}
    with pytest.raises(turnwise.learning._NotFinite, match="its value_grad_norm is nan"):
        turnwise.learning._stepped(optimizers, 1.0, {"loss": 1.0})
    assert all(torch.equal(a, b) for a, b in zip(before, (*policy.learned, *critic.parameters), strict=True))
    assert not critic.optimizer.state_dict()["state"]
    assert all(p.grad is None for p in (*policy.learned, *critic.parameters))


def test_a_reward_that_is_nan_fails_its_rollout_alone(checkpoint: Path, tmp_path: Path):
    run = tmp_path / "run"
    train(**world(tmp_path, checkpoint, SOMETIMES_NAN), out=run)
    shares = [step["failed_rollouts"] for step in steps_of(run)]
    assert 0 < sum(shares) < 3
    lines = read_lines(run / "rollouts.jsonl")
    failed = [line for line in lines if line["rollout"]["stop"] == "error"]
    assert failed
    for line in failed:
        assert line["rollout"]["error"].startswith("NotFinite: reward function outcome_varied must return finite")
        assert line["advantages"] is None
        assert line["rollout"]["outcome_rewards"] == {}
    assert len(read_traces(run / "rollouts.jsonl")) == len(lines) - len(failed), "turnwise credit leaves them out"
    for step, group in {(line["step"], line["group"]) for line in lines}:
        credited = [x for x in lines if (x["step"], x["group"]) == (step, group) and x["advantages"] is not None]
        assert sum(x["advantages"][0] for x in credited) == pytest.approx(0, abs=1e-6), "a mean over those that count"


def test_a_conversation_whose_logits_are_nan_fails_alone_and_leaves_nothing(bpe_chat):
    policy = tiny_policy(bpe_chat, seed=0, hidden=16, layers=2)
    expected = asyncio.run(completions(policy, [[5, 6, 7], [5, 6, 8, 9]]))
    with torch.no_grad():
        embedding: Any = policy.model.get_input_embeddings()
        embedding.weight[300] = float("nan")
        policy.model.set_output_embeddings(torch.nn.Linear(16, policy.chat.tokenizer.vocab_size, bias=False))
        clean = tiny_policy(bpe_chat, seed=0, hidden=16, layers=2)
        head: Any = policy.model.get_output_embeddings()
        head.weight.copy_(clean.model.get_input_embeddings().weight)
    found = asyncio.run(completions(policy, [[5, 6, 7], [5, 300, 7, 9, 9], [5, 6, 8, 9]], max_rows=2))
    assert isinstance(found[1], NotFinite)
    assert [found[0], found[2]] == expected


async def completions(policy: Any, prompts: list[list[int]], max_rows: int = 8) -> list[Any]:
    engine = HFEngine(policy.model, stop_ids=[], max_rows=max_rows, max_context=64)

    async def one(number: int, prompt: list[int]) -> Any:
        try:
            found = await engine.generate(prompt, Sampling(max_tokens=6, temperature=0, seed=0), session=number)
            return found.token_ids
        except NotFinite as error:
            return error
        finally:
            engine.release(number)

    return await asyncio.gather(*(one(n, prompt) for n, prompt in enumerate(prompts)))


def test_a_damaged_best_policy_is_named_and_the_newest_is_taken(checkpoint: Path, tmp_path: Path):
    from turnwise.evaluation import run_policy

    run = tmp_path / "run"
    train(**world(tmp_path, checkpoint), out=run)
    assert (run / "best").is_dir()
    data = bytearray((run / "best" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "best" / "model.safetensors").write_bytes(data)
    with pytest.warns(UserWarning, match=r"damaged best policy \(model.safetensors has changed\); step-000003 is"):
        run_policy(run)
    with pytest.raises(RunError, match=r"best must be as it was written; model.safetensors has changed"):
        run_policy(run / "best")
