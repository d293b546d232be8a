"""LoRA: what learns, what is saved, what the reference is, and the plain checkpoint that comes of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from families import FAMILIES
from small_runs import small_world
from turnwise.batch import pack, rollout_row
from turnwise.cli import main
from turnwise.config import TrainConfig
from turnwise.demonstrations import DemonstrationConfig, learn_demonstrations
from turnwise.engine import Sampling
from turnwise.errors import ConfigError, InputError, RunError
from turnwise.evaluation import evaluate, make_engine, rollouts, run_policy
from turnwise.exporting import export
from turnwise.learning import _reference_logprobs
from turnwise.lora import add_lora, is_adapted, merge_adapter, plain_weights, without_adapter
from turnwise.policy import Policy, load_policy, save_policy, token_logprobs
from turnwise.rundir import checkpoint_folder
from turnwise.training import start_policy, train
from turnwise.types import Action, Rollout, Turn

peft = pytest.importorskip("peft", reason="needs the extra `lora`")

IDS = torch.tensor([[5, 7, 301, 44, 9, 12, 5]])
REWARDS = '''
def turn_small(task, rollout):
    """Share of a turn's tokens with a small id."""
    return [sum(i < 150 for i in turn.action_ids) / len(turn.action_ids) for turn in rollout.turns]
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict:
    """Options of a LoRA run of four quick steps with a KL term, without `out`."""
    folder = tmp_path_factory.mktemp("world")
    return {
        **small_world(folder, checkpoint, (f"q{i}" for i in range(5)), REWARDS),
        "lora_rank": 4,
        "kl_coef": 0.1,
        "steps": 4,
        "tasks_per_step": 2,
        "group_size": 3,
        "max_turn_tokens": 6,
        "minibatches": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "validate_every": 2,
        "validation_size": 2,
        "checkpoint_every": 2,
        "threads": 2,
    }


@pytest.fixture(scope="module")
def run(world: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(**world, out=out).finished
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(family: str = "qwen3", *, targets: tuple[str, ...] = (), moved: bool = True, seed: int = 0):
    """A tiny model with an adapter; `moved` away from its beginning, where it does nothing."""
    model = families.tiny(family, vocab=400)
    add_lora(model, rank=3, alpha=6, targets=targets, seed=seed, base="nowhere")
    if moved:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


# ---- the adapter ----


@pytest.mark.parametrize("family", ["qwen3", "gemma 2", "phi 3", "gpt-neox"])
def test_a_fresh_adapter_changes_nothing_a_moved_one_does_and_merging_it_is_the_same_model(family: str):
    plain = logits(families.tiny(family, vocab=400))
    assert_close(logits(adapted(family, moved=False)), plain)
    model = adapted(family)
    moved = logits(model)
    assert (moved - plain).abs().max() > 0.01
    with without_adapter(model):
        assert_close(logits(model), plain)
    assert_close(logits(model), moved)
    merge_adapter(model)
    assert not is_adapted(model)
    assert_close(logits(model), moved)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_product_is_added_alpha_over_rank_times():
    # y = W x + (6 / 3) B A x
    model = adapted(targets=("up_proj",))
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert_close(layer(x), x @ layer.base_layer.weight.T + 6 / 3 * x @ a.T @ b.T)


def test_all_linear_layers_but_the_output_layer_learn_unless_some_are_named():
    def learned(**options) -> set[str]:
        model = adapted(**options)
        return {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}

    own = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert learned() == own
    assert learned(targets=("q_proj", "v_proj")) == {"q_proj", "v_proj"}
    assert learned(targets=("layers.1.self_attn.q_proj",)) == {"q_proj"}
    assert learned(family="phi 3") == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_an_adapter_is_a_function_of_its_seed_and_leaves_others_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = adapted(moved=False)  # builds a model with a seed of its own first
    torch.manual_seed(5)
    add_lora(families.tiny(vocab=400), rank=2, alpha=2, targets=(), seed=9, base="nowhere")
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    families.tiny(vocab=400)
    assert torch.equal(state, torch.random.get_rng_state())
    assert expected.shape == (3,)
    same, other = adapted(moved=False), adapted(moved=False, seed=1)

    def first(model):
        return model.get_submodule("model.layers.0.mlp.up_proj").lora_A["default"].weight

    assert torch.equal(first(one), first(same))
    assert not torch.equal(first(one), first(other))


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens"])
def test_targets_that_cannot_learn_are_refused(target: str):
    with pytest.raises(ConfigError, match=r"none called '.*'; take some of .*q_proj|weights of their own"):
        adapted(targets=(target,))


# ---- the engine and the update ----


def test_the_engine_draws_and_the_update_computes_with_the_adapter(bpe_chat):
    model = adapted()
    completion = engine_completion(Policy(model, bpe_chat), [5, 7, 301])
    ids = torch.tensor([[5, 7, 301, *completion.token_ids]])
    with torch.no_grad():
        expected = model(ids).logits[0, 2:-1].log_softmax(-1).gather(-1, ids[0, 3:, None])[:, 0]
    assert list(completion.logprobs) == pytest.approx(expected.tolist(), abs=1e-9)
    turn = Turn(
        action_ids=completion.token_ids, sampling_logprobs=completion.logprobs, text="", action=Action(), reply_ids=()
    )
    rollout = Rollout(task_id="t", group=0, prompt_ids=(5, 7, 301), turns=(turn,), stop="answer")
    batch = pack([rollout_row(rollout, [1.0], [True])], pad_id=0)
    found, _ = token_logprobs(model, batch, batch.loss)
    assert_close(found, expected, atol=1e-5, rtol=0, check_dtype=False)
    found.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".lora_" in name}
    config = TrainConfig(kl_coef=0.1, lora_rank=3)
    [reference] = _reference_logprobs(Policy(model, bpe_chat), [batch], config, 1)
    base, _ = token_logprobs(families.tiny(vocab=400), batch, batch.loss)
    assert reference is not None
    assert_close(reference, base.detach())
    assert (reference - found).abs().max() > 1e-3
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)


def engine_completion(policy: Policy, prompt: list[int]):
    import asyncio

    return asyncio.run(make_engine(policy).generate(prompt, Sampling(max_tokens=9, seed=0), session=0))


# ---- a run ----


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        del line["wall_s"]
        line["metrics"] = {
            k: v for k, v in line["metrics"].items() if k not in ("tokens_per_s", "rollout_s", "update_s")
        }
    return found


def test_a_run_saves_the_adapter_alone_and_the_base_by_reference(run: Path, world: dict):
    folder = checkpoint_folder(run, 4)
    assert not (folder / "model.safetensors").exists()
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in name for name in tensors)
    assert any(bool(tensor.abs().max() > 0) for name, tensor in tensors.items() if "lora_B" in name)
    record = json.loads((folder / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(Path(world["policy"]).resolve())
    assert (record["r"], record["lora_alpha"]) == (4, 8)
    assert len(load_file(folder / "optimizer.safetensors")) == 3 * len(tensors)


def test_the_divergence_from_the_start_is_that_of_the_adapter(run: Path):
    kl = [line["metrics"]["kl"] for line in lines(run) if line["split"] == "train"]
    assert 0 < kl[0] < kl[-1]


def test_a_reference_of_its_own_gives_the_same_divergence(run: Path, world: dict, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("turnwise.training._Run._reference", lambda self: load_policy(self.config.start))
    train(**world, out=tmp_path / "two")
    for one, other in zip(lines(run), lines(tmp_path / "two"), strict=True):
        assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-6)


def test_a_resumed_run_comes_to_the_same_numbers_and_weights(run: Path, world: dict, tmp_path: Path):
    class Stopper:
        def show(self, record: dict) -> None:
            if record["step"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(**world, out=tmp_path / "run", display=Stopper())
    (checkpoint_folder(tmp_path / "run", 3) / "state.json").unlink()  # go on from step 2
    with pytest.warns(UserWarning, match="passed over"):
        train(resume=True, out=tmp_path / "run")
    assert lines(tmp_path / "run") == lines(run)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(checkpoint_folder(r, 4) / name) for r in (tmp_path / "run", run))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_eval_and_rollouts_play_the_adapter(run: Path):
    policy, config = run_policy(run, "last")
    assert config.lora_rank == 4
    with without_adapter(policy.model):
        base = logits(policy.model)
    assert (logits(policy.model) - base).abs().max() > 1e-4
    assert evaluate(run, limit=2).metrics["turns"].n == 2
    assert len(rollouts(run, group_size=2)[0]) == 2


def test_transformers_loads_a_checkpoint_and_an_export_to_the_same_logits(run: Path, tmp_path: Path, capsys):
    mine = logits(run_policy(run, "last")[0].model)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(checkpoint_folder(run, 4))), mine)
    assert main(["export", str(run), "--checkpoint", "last", "--out", str(tmp_path / "plain")]) == 0
    assert "The checkpoint is in" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert_close(logits(plain), mine, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").encode("Kenya")
    again = load_policy(tmp_path / "plain")
    assert not is_adapted(again.model)
    assert all(p.requires_grad for p in again.model.parameters())


def test_an_export_of_a_run_without_adapter_is_its_checkpoint(checkpoint: Path, tmp_path: Path):
    out = export(checkpoint, tmp_path / "plain")
    one, other = (load_file(folder / "model.safetensors") for folder in (out, checkpoint))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(InputError, match="new or empty folder"):
        export(checkpoint, out)


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_rank": -1}, r"lora-rank must be in \[0, 65536\]"),
        ({"lora_alpha": 4.0}, "lora-alpha must go with LoRA"),
        ({"lora_targets": ("q_proj",)}, "lora-targets must go with LoRA"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora-alpha must be >="),
        ({"lora_rank": 2, "estimator": "mt-ppo"}, "--critic shared"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(**options)


def test_targets_come_from_a_configuration_file(tmp_path: Path):
    from turnwise.config import config_from_dict, read_config_file

    (tmp_path / "o.toml").write_text('lora-rank = 2\nlora-targets = ["q_proj", "v_proj"]\n')
    config = config_from_dict(read_config_file(tmp_path / "o.toml"), "o.toml")
    assert config.lora_targets == ("q_proj", "v_proj")
    assert config_from_dict(json.loads(json.dumps({**config.__dict__, "out": "x"})), "again").lora_targets == (
        "q_proj",
        "v_proj",
    )


def test_an_adapter_whose_base_is_gone_or_that_is_damaged_is_one_line(bpe_chat, checkpoint: Path, tmp_path: Path):
    policy = start_policy(TrainConfig(policy=str(checkpoint), lora_rank=2))
    save_policy(policy, tmp_path / "good")
    assert is_adapted(load_policy(tmp_path / "good").model)
    with pytest.raises(ConfigError, match="is an adapter; make one of it: turnwise export"):
        start_policy(TrainConfig(policy=str(tmp_path / "good")))
    file = tmp_path / "good" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(RunError, match="must be whole and fit its base model") as caught:
        load_policy(tmp_path / "good")
    assert "\n" not in str(caught.value)
    file.write_bytes(whole)
    record = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    record["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "good" / "adapter_config.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"must find its base model, .*gone"):
        load_policy(tmp_path / "good")
    (tmp_path / "good" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="must name its base model"):
        load_policy(tmp_path / "good")


def test_a_shared_critic_reads_an_adapted_policy(world: dict, tmp_path: Path):
    changed = {**world, "estimator": "turn-ppo", "critic": "shared", "steps": 1, "threads": 1}
    assert train(**changed, out=tmp_path / "run").finished


def test_families_with_an_adapter_come_back_from_disk(bpe_chat, tmp_path: Path):
    for number, family in enumerate(("gemma 3", "granite")):
        base = tmp_path / f"base {number}"
        save_policy(Policy(families.tiny(family, vocab=400, dtype=torch.float32), bpe_chat), base)
        policy = start_policy(TrainConfig(policy=str(base), lora_rank=2, seed=3))
        for parameter in policy.learned:
            parameter.data += 0.1
        save_policy(policy, tmp_path / f"saved {number}")
        assert_close(logits(load_policy(tmp_path / f"saved {number}").model), logits(policy.model))
    assert {"gemma 3", "granite"} <= set(FAMILIES)
    assert np.isfinite(logits(policy.model).numpy()).all()


def test_plain_weights_are_those_of_the_merged_model():
    model = families.tiny("qwen2")
    add_lora(model, rank=4, alpha=8, targets=(), seed=0, base="base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    found = dict(plain_weights(model))
    assert is_adapted(model)
    merge_adapter(model)
    expected = dict(model.named_parameters())
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_demonstrations_are_not_learned_by_an_adapter(run: Path, tmp_path: Path):
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps({"question": "Q", "turns": ["a"]}))
    config = DemonstrationConfig(demonstrations=path, policy=str(run / "best"), out=tmp_path)
    with pytest.raises(ConfigError, match="policy must be a plain checkpoint to start from"):
        learn_demonstrations(config)
