"""Weights in llama2.c's layout: a real pretrained Llama speaks, and a file of numbers comes out where it belongs."""

import asyncio
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from turnwise.cli import main
from turnwise.engine import Sampling
from turnwise.errors import InputError
from turnwise.evaluation import make_engine
from turnwise.llama2c import convert_llama2c, read_llama2c, read_tokenizer
from turnwise.policy import load_policy
from turnwise.training import train

WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "weights"
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="needs ../shared/data/weights")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stories") / "model"
    return convert_llama2c(WEIGHTS / "stories260K.bin", WEIGHTS / "tokenizer.bin", out)


@needs_weights
def test_the_real_model_tells_a_story_and_the_engine_tells_the_same(stories: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("Once upon a time", add_special_tokens=False)]
    drawn = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=100
    )[0].tolist()
    assert tokenizer.decode(drawn, skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high.\nLily's mom said,"
    )
    engine = make_engine(load_policy(stories))
    completion = asyncio.run(engine.generate(ids, Sampling(temperature=0, max_tokens=100, seed=0), session=0))
    assert list(completion.token_ids) == drawn[len(ids) :]


@needs_weights
def test_the_real_model_knows_english_and_its_sampled_tokens_probabilities(stories: Path):
    policy = load_policy(stories)
    ids = [1, *policy.chat.encode_text("The little dog was very happy. He ran to the park with his friend.")]
    with torch.no_grad():
        logprobs = policy.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    mean = float(logprobs.gather(-1, torch.tensor(ids[1:])[:, None]).mean())
    assert mean > -2.0  # a uniform guess has -6.24
    engine = make_engine(policy)
    completion = asyncio.run(engine.generate(ids, Sampling(max_tokens=60, seed=1), session=0))
    with torch.no_grad():
        whole = policy.model(torch.tensor([[*ids, *completion.token_ids]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    expected = whole.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert list(completion.logprobs) == pytest.approx(expected.tolist(), abs=1e-4)
    assert max(completion.token_ids) < 512  # those added for ChatML are as likely as a mean token is


@needs_weights
def test_the_real_tokenizer_comes_back_to_any_text_and_keeps_chatml_apart(stories: Path):
    chat = load_policy(stories).chat
    assert chat.tokenizer.vocab_size == 515
    for text in ("Once upon a time", " two  spaces ", "wörld 世界 🙂", "a\n\tb"):
        assert chat.decode(chat.encode_text(text)) == text
    assert not set(chat.encode_text("<|im_end|><s>")) & {1, 512, 513, 514}


def file_of_numbers(path: Path, sizes: tuple[int, ...]) -> np.ndarray:
    """A file whose numbers are 0, 1, 2, ... in the order of the layout."""
    dim, hidden, layers, heads, kv_heads, vocab, context = sizes
    head, vocab = dim // heads, abs(vocab)
    own = 2 * dim + 2 * dim * dim + 2 * dim * kv_heads * head + 3 * dim * hidden
    count = vocab * dim + layers * own + dim + context * head + (vocab * dim if sizes[5] < 0 else 0)
    numbers = np.arange(count, dtype="<f4")
    path.write_bytes(struct.pack("<7i", *sizes) + numbers.tobytes())
    return numbers


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_comes_from_its_place(tmp_path: Path, tied: bool):
    sizes = (8, 6, 2, 2, 1, 5 if tied else -5, 3)
    numbers = file_of_numbers(tmp_path / "w.bin", sizes)
    state = read_llama2c(tmp_path / "w.bin").state_dict()
    assert torch.equal(state["model.embed_tokens.weight"].flatten(), torch.from_numpy(numbers[:40].copy()))
    # 40 embeddings, 2 x 8 norms; then the queries of two layers of 64, of which the second begins at 120. Two heads of
    # four rows: rotary neighbours 0 1 | 2 3 become halves 0 2 | 1 3.
    queries = state["model.layers.1.self_attn.q_proj.weight"][:, 0].tolist()
    assert queries == [120 + 8 * row for row in (0, 2, 1, 3, 4, 6, 5, 7)]
    keys = state["model.layers.0.self_attn.k_proj.weight"][:, 0].tolist()
    assert keys == [184 + 8 * row for row in (0, 2, 1, 3)]
    # values 248, outputs 312, norms 440, gates 456, downs 552, ups 648, last norm 744, angles 752, own output layer 764
    assert state["model.layers.1.self_attn.v_proj.weight"][0, 0] == 248 + 32
    assert state["model.layers.1.self_attn.o_proj.weight"][0, 0] == 312 + 64
    assert state["model.layers.1.post_attention_layernorm.weight"][0] == 440 + 8
    assert state["model.layers.1.mlp.gate_proj.weight"][0, 0] == 456 + 48
    assert state["model.layers.1.mlp.down_proj.weight"][0, 0] == 552 + 48
    assert state["model.layers.1.mlp.up_proj.weight"][0, 0] == 648 + 48
    assert state["model.norm.weight"][0] == 744
    assert state["lm_head.weight"][0, 0] == (0 if tied else 764)


def test_files_of_another_layout_are_one_line(tmp_path: Path, capsys):
    good = tmp_path / "w.bin"
    file_of_numbers(good, (8, 6, 2, 2, 1, 5, 3))
    (tmp_path / "cut.bin").write_bytes(good.read_bytes()[:-4])
    (tmp_path / "other.bin").write_bytes(b"GGUF" * 20)
    (tmp_path / "t.bin").write_bytes(struct.pack("<i", 4) + (struct.pack("<fi", 0, 1) + b"a") * 3)
    for name, says in (
        ("cut.bin", "it is cut off, or of another layout"),
        ("other.bin", "must begin with the seven sizes"),
        ("none.bin", "must be a readable file"),
    ):
        with pytest.raises(InputError, match=says):
            read_llama2c(tmp_path / name)
    for vocab, says in ((5, "it ends at token 3"), (2, "it holds more")):
        with pytest.raises(InputError, match=says):
            read_tokenizer(tmp_path / "t.bin", vocab)
    assert main(["convert-weights", str(good), str(tmp_path / "t.bin"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"turnwise: {tmp_path / 't.bin'} must hold 5 tokens")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="new or empty folder"):
        convert_llama2c(good, tmp_path / "t.bin", tmp_path)


REWARDS = '''
def outcome_e(task, rollout):
    """Share of the letter e in what was said."""
    text = rollout.turns[-1].text
    return text.count("e") / max(1, len(text))
'''
TOOLS = '''
def look(word: str) -> str:
    """The word."""
    return word
'''


@needs_weights
@pytest.mark.slow
def test_the_real_model_learns_through_lora_what_it_is_rewarded_for(stories: Path, tmp_path: Path):
    pytest.importorskip("peft", reason="needs the extra `lora`")
    for name, text in (("rewards.py", REWARDS), ("tools.py", TOOLS)):
        (tmp_path / name).write_text(text)
    names = ("Lily", "Tom", "Ben")
    lines = [json.dumps({"id": name, "question": f"Who is {name}?", "answers": [name]}) for name in names]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    train(
        policy=str(stories),
        lora_rank=8,
        kl_coef=0.05,
        estimator="grpo-mr",
        tasks=str(tmp_path / "tasks.jsonl"),
        validation_tasks=str(tmp_path / "tasks.jsonl"),
        tools=tmp_path / "tools.py",
        rewards=tmp_path / "rewards.py",
        reward_weights={"outcome_e": 1.0},
        steps=40,
        tasks_per_step=2,
        minibatches=2,
        group_size=8,
        max_turns=1,
        max_turn_tokens=24,
        learning_rate=1e-2,
        validate_every=40,
        validation_size=3,
        out=tmp_path / "run",
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    returns = [record["metrics"]["return"] for record in records if record["split"] == "train"]
    assert returns[0] < 0.12  # English has about a tenth
    assert min(returns[-5:]) > 0.4


@needs_weights
def test_the_command_says_what_comes_next(tmp_path: Path, capsys):
    files = [str(WEIGHTS / name) for name in ("stories260K.bin", "tokenizer.bin")]
    assert main(["convert-weights", *files, str(tmp_path / "model")]) == 0
    assert f"turnwise train --policy {tmp_path / 'model'}" in capsys.readouterr().out
