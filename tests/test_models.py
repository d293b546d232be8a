"""Checkpoints of other families: loaded by folder or hub's name, saved with their own files, or refused in a line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

import families
from families import EACH_FAMILY
from turnwise.errors import ConfigError, InputError, RunError
from turnwise.evaluation import run_policy
from turnwise.policy import load_policy, save_policy

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(folder: Path, bpe_chat, family: str = "qwen2", *, shard: str = "50GB", **options) -> Path:
    """A tiny model as it would be published: with its tokenizer's files, a template and how to generate."""
    model = families.tiny(family, vocab=400, dtype=torch.float32, **options)
    model.save_pretrained(folder, max_shard_size=shard)
    bpe_chat.tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test asks the hub; its cache is an empty folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_family_loads_and_is_saved_as_transformers_takes_it(family: str, bpe_chat, tmp_path):
    policy = load_policy(write_model(tmp_path / "model", bpe_chat, family))
    save_policy(policy, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 7, 301, 44, 9, 12, 5]])
    with torch.no_grad():
        assert_close(again(ids).logits, policy.model(ids).logits)
    assert type(again) is type(policy.model)


def test_the_models_own_files_are_kept_byte_for_byte(bpe_chat, tmp_path):
    source = write_model(tmp_path / "model", bpe_chat)
    policy = load_policy(source)
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    before = {name: (source / name).read_bytes() for name in names}
    shutil.rmtree(source)  # as a pruned checkpoint is, when a resumed run saves its next one
    save_policy(policy, tmp_path / "saved")
    assert {name: (tmp_path / "saved" / name).read_bytes() for name in names} == before
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.model_max_length == 77
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Peru"}], tokenize=False).endswith(
        "Peru<|im_end|>\n"
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config.temperature == 0.6


@pytest.mark.parametrize("tied", [True, False])
def test_shards_and_tied_embeddings_load_whole(bpe_chat, tmp_path, tied: bool):
    source = write_model(tmp_path / "model", bpe_chat, shard="20KB", tied=tied)
    assert len(list(source.glob("model-*.safetensors"))) > 1
    model = load_policy(source).model
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    next(source.glob("model-00002*")).unlink()
    with pytest.raises(RunError, match="must hold a whole model in safetensors"):
        load_policy(source)


def test_weights_of_two_bytes_are_trained_in_four(bpe_chat, tmp_path):
    families.tiny(vocab=400).to(torch.bfloat16).save_pretrained(write_model(tmp_path / "model", bpe_chat, "qwen3"))
    assert load_policy(tmp_path / "model").model.dtype == torch.float32


def test_the_context_ends_where_longropes_frequencies_would_change(bpe_chat, tmp_path):
    assert load_policy(write_model(tmp_path / "model", bpe_chat, "phi 3, longrope")).context == 128
    assert load_policy(write_model(tmp_path / "other", bpe_chat, "phi 3")).context == 256


# ---- by a hub's name ----


def test_a_downloaded_model_of_the_hub_loads_by_its_name(bpe_chat, tmp_path):
    cache = tmp_path / "hub" / "models--someone--Tiny-1.5"
    write_model(cache / "snapshots" / COMMIT, bpe_chat)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    policy = load_policy("someone/Tiny-1.5")
    assert "chat_template.jinja" in policy.files
    assert run_policy("someone/Tiny-1.5")[0].context == policy.context


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "someone/else",
            "someone/else.: it is no folder, and as a model it is not downloaded and the hub cannot be reached",
        ),
        ("no/such/folder", "a checkpoint folder with config.json, or a model of the Hugging Face hub"),
        ("qwen", "got 'qwen'$"),
    ],
)
def test_what_is_neither_folder_nor_model_is_one_line(source: str, says: str):
    with pytest.raises(InputError, match=says) as caught:
        load_policy(source)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"a checkpoint folder with config.json, .*; got '/"):
        load_policy(tmp_path)


# ---- refused ----


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            "is 'own': code of its own, which is not run",
        ),
        ({"model_type": "t5"}, "is 't5': no causal language model of transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"are quantised \(gptq\)"),
        ({"model_type": "gemma3", "text_config": {}}, r"\(gemma3\) takes more than text"),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            "full or sliding attention .* got chunked_attention",
        ),
    ],
)
def test_models_that_cannot_be_trained_are_refused_with_the_reason(change: dict, says: str, bpe_chat, tmp_path):
    folder = write_model(tmp_path / "model", bpe_chat)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((ConfigError, RunError), match=says) as caught:
        load_policy(folder)
    assert "\n" not in str(caught.value)


def test_a_family_that_knows_no_masks_or_positions_of_ours_is_found_out_by_computing(bpe_chat, tmp_path):
    folder = write_model(tmp_path / "model", bpe_chat)
    (folder / "model.safetensors").unlink()
    config = BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4, max_position_embeddings=256)
    BloomForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ConfigError, match="that of bloom does not"):
        load_policy(folder)


def test_logits_that_come_out_otherwise_are_found_out_by_computing(bpe_chat, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", bpe_chat, "granite")
    load_policy(folder)
    monkeypatch.setattr("turnwise.policy.output_logits", lambda model, states: model.lm_head(states))
    with pytest.raises(ConfigError, match=r"the logits of granite are 2 of their size apart"):  # 3 - 1: scaled by 1/3
        load_policy(folder)


def test_weights_that_are_no_numbers_are_found_out_by_computing(bpe_chat, tmp_path):
    model = families.tiny(vocab=400, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    model.save_pretrained(write_model(tmp_path / "model", bpe_chat, "qwen3"))
    with pytest.raises(ConfigError, match="weights that are no numbers"):
        load_policy(tmp_path / "model")
