"""Log-probabilities under the policy, their gradients, and checkpoints on disk."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import families
from families import EACH_FAMILY
from turnwise.batch import MicroBatch, Row, distinct_rows, micro_batches, pack, rollout_row, weighted
from turnwise.config import TrainConfig
from turnwise.credit import ESTIMATORS, turn_table
from turnwise.errors import InputError, RunError
from turnwise.loss import policy_loss
from turnwise.policy import Policy, load_policy, save_policy, tiny_policy, token_logprobs
from turnwise.types import Action, Rollout, Turn

VOCAB = 300


def rollout(seed: int, prompt_length: int, *lengths: int) -> Rollout:
    """Random tokens: turns of the given lengths with replies of 3 between them; prompts go by length."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCAB, n).tolist())

    turns = [
        Turn(
            action_ids=ids(n),
            sampling_logprobs=tuple((-6 + rng.normal(0, 0.1, n)).tolist()),
            text="",
            action=Action(),
            reply_ids=ids(3),
        )
        for n in lengths
    ]
    prompt = tuple(np.random.default_rng(prompt_length).integers(3, VOCAB, prompt_length).tolist())
    return Rollout(task_id="t", group=0, prompt_ids=prompt, turns=tuple(turns), stop="answer")


def rows() -> list[Row]:
    """Six rollouts over two prompts of different lengths, with 1 to 3 turns."""
    played = [(9, 4), (9, 2, 5), (5, 1), (9, 3, 1, 2), (5, 6, 2), (5, 2)]
    return [
        rollout_row(rollout(i, *sizes), np.linspace(-1, 1.5, len(sizes) - 1).tolist(), [True] * (len(sizes) - 1))
        for i, sizes in enumerate(played)
    ]


def plain_logprobs(policy: Policy, row: Row, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a row's following tokens by one ordinary forward pass."""
    ids = torch.tensor([[*row.prompt_ids, *row.ids]])
    logits = policy.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(row.prompt_ids) :, None])[:, 0]


def gradient(policy: Policy, loss: torch.Tensor) -> torch.Tensor:
    policy.model.zero_grad()
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    policy.model.zero_grad()
    return found


def batched_loss(policy: Policy, all_rows: list[Row], *, max_tokens: int, pad_id: int = 0) -> torch.Tensor:
    total = torch.zeros(())
    if all_rows[0].weights is None:
        all_rows = weighted(all_rows, "sequence-mean")
    for batch in micro_batches(all_rows, max_tokens=max_tokens, pad_id=pad_id):
        logprobs, _ = token_logprobs(policy.model, batch, batch.loss)
        assert batch.weights is not None
        weights = (batch.counts[:, None] * batch.weights)[batch.loss]
        sampled, advantages = batch.sampling_logprobs[batch.loss], batch.advantages[batch.loss]
        total = total + policy_loss(logprobs, sampled, advantages, weights).loss
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_shared_prompts_give_what_a_plain_forward_pass_gives(tiny: Policy, temperature: float):  # identity 31
    batch = pack(rows(), pad_id=0)
    with torch.no_grad():
        found, entropy = token_logprobs(tiny.model, batch, batch.attention, temperature=temperature)
        expected = torch.cat([plain_logprobs(tiny, row, temperature) for row in rows()])
    assert_close(found, expected, atol=1e-5, rtol=0)
    assert ((entropy > 0) & (entropy <= np.log(tiny.model.config.vocab_size) + 1e-5)).all()


def branching_rows() -> list[Row]:
    """Rollouts that share their beginnings: a prompt, a first turn, two turns."""
    base = rollout(0, 9, 4, 3, 5)
    short = dataclasses.replace(base, turns=(base.turns[0], rollout(1, 9, 1).turns[0]))
    other_end = dataclasses.replace(base, turns=(*base.turns[:2], rollout(2, 9, 2).turns[0]))
    at_once = dataclasses.replace(base, turns=(rollout(3, 9, 6).turns[0],))
    other_prompt = dataclasses.replace(base, prompt_ids=(5,))
    played = (base, short, other_end, at_once, other_prompt)
    return [rollout_row(r, [1.0, -0.5, 2.0][: len(r.turns)], [True] * len(r.turns)) for r in played]


@pytest.mark.parametrize("window", [None, 2, 5, 100])
def test_shared_beginnings_give_what_plain_passes_give_for_any_window(bpe_chat, window: int | None):
    policy = tiny_policy(bpe_chat, seed=3, hidden=16, layers=2)
    policy.model.config.sliding_window = window
    if window is None:
        policy.model.config.layer_types = ["full_attention"] * 2
    config = type(policy.model.config).from_dict(policy.model.config.to_dict())
    config._attn_implementation = "sdpa"
    fresh = Policy(type(policy.model)(config), bpe_chat)
    fresh.model.load_state_dict(policy.model.state_dict())
    made = branching_rows()
    batch = pack(made, pad_id=0)
    assert [len(level.ids) for level in batch.levels] == [2, 3, 2, 2]
    found, _ = token_logprobs(fresh.model, batch, batch.attention)
    expected = torch.cat([plain_logprobs(fresh, row) for row in made])
    assert_close(found, expected, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 2, len(found))
    shared, plain = (gradient(fresh, (weights * x).sum()) for x in (found, expected))
    assert_close(shared, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_familys_shared_beginnings_give_a_plain_passs_numbers_and_gradient(bpe_chat, family: str):
    model = families.tiny(family, vocab=VOCAB, initializer_range=0.1)
    policy, made = Policy(model, bpe_chat), branching_rows()
    batch = pack(made, pad_id=0)
    found, _ = token_logprobs(model, batch, batch.attention)
    expected = torch.cat([plain_logprobs(policy, row) for row in made])
    assert_close(found, expected, atol=1e-4, rtol=0, check_dtype=False)  # found are float32
    weights = torch.linspace(-1, 2, len(found))
    shared, plain = (gradient(policy, (weights * x).sum()) for x in (found, expected))
    assert_close(shared, plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-4)


def test_rows_of_one_token_need_only_the_prompt(tiny: Policy):
    short = [rollout_row(rollout(i, 5, 1), [1.0], [True]) for i in range(3)]
    batch = pack(short, pad_id=0)
    with torch.no_grad():
        found, _ = token_logprobs(tiny.model, batch, batch.loss)
        assert_close(found, torch.cat([plain_logprobs(tiny, row) for row in short]), atol=1e-5, rtol=0)


def test_the_answer_turn_sees_the_tool_result(tiny: Policy):
    played = rollout(0, 9, 4, 5)
    changed = tuple(i + 1 if i < VOCAB - 1 else 3 for i in played.turns[0].reply_ids)
    other = dataclasses.replace(
        played, turns=(dataclasses.replace(played.turns[0], reply_ids=changed), played.turns[1])
    )
    batch = pack([rollout_row(r, [1.0, 1.0], [True, True]) for r in (played, other)], pad_id=0)
    with torch.no_grad():
        found, _ = token_logprobs(tiny.model, batch, batch.action)
    before, after = found.reshape(2, 9)
    assert_close(before[:4], after[:4])
    assert (before[4:] - after[4:]).abs().min() > 1e-5


def test_environment_tokens_have_no_gradient(tiny: Policy):  # identity 32, and broken: a sampled token in their place
    # the whole loss by plain passes, row by row, over sampled positions alone: same value, same gradient
    expected = torch.zeros(())
    for row in rows():
        at = torch.from_numpy(row.loss)
        logprobs = plain_logprobs(tiny, row)[at]
        sampled, advantages = (torch.from_numpy(x)[at] for x in (row.sampling_logprobs, row.advantages))
        weights = torch.full_like(logprobs, 1 / (len(rows()) * int(at.sum())))
        expected = expected + policy_loss(logprobs, sampled, advantages, weights).loss
    found = batched_loss(tiny, rows(), max_tokens=10_000)
    assert_close(found, expected)
    assert_close(gradient(tiny, found), gradient(tiny, expected), atol=1e-6, rtol=1e-4)
    poisoned = [dataclasses.replace(r, advantages=np.where(r.action, r.advantages, np.float32(1e6))) for r in rows()]
    assert_close(batched_loss(tiny, poisoned, max_tokens=10_000), expected)
    counted = [dataclasses.replace(r, advantages=np.where(r.action, np.float32(1e6), r.advantages)) for r in rows()]
    assert (batched_loss(tiny, counted, max_tokens=10_000) - expected).abs() > 1000


@pytest.mark.parametrize("name", ["grpo-mr", "mt-grpo", "turn-rloo", "gigpo"])
def test_the_surrogates_gradient_at_ratio_one_is_that_of_advantages_times_log_probabilities(tiny: Policy, name: str):
    played = [rollout(0, 9, 4, 5), rollout(1, 9, 2, 3), rollout(2, 9, 6)]
    table = turn_table(
        [0, 0, 0],
        [[{"r": 1.0}, {}], [{"r": 0.25}, {}], [{}]],
        [{"o": 0.0}, {"o": 1.0}, {"o": 2.0}],
        anchors=[["s", "t"], ["s", "t"], ["s"]],
    )
    credit = np.split(ESTIMATORS[name](table).advantages, table.last[:-1] + 1)
    made = [rollout_row(r, own.tolist(), [True] * len(own)) for r, own in zip(played, credit, strict=True)]
    batch = pack(made, pad_id=0)
    logprobs, _ = token_logprobs(tiny.model, batch, batch.loss)
    weights, advantages = torch.ones_like(logprobs), batch.advantages[batch.loss]
    found = gradient(tiny, policy_loss(logprobs, logprobs.detach(), advantages, weights).loss)
    expected = torch.zeros(())
    for row, turns, own in zip(made, played, credit, strict=True):
        sampled = torch.from_numpy(row.action)
        by_token = np.repeat(own, [len(turn.action_ids) for turn in turns.turns])
        expected = expected + (plain_logprobs(tiny, row)[sampled] * torch.tensor(by_token, dtype=torch.float32)).sum()
    expected = -gradient(tiny, expected)
    assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert expected.abs().max() > 0.01
    flat = gradient(tiny, policy_loss(*_again(tiny, batch), torch.ones_like(advantages), weights).loss)
    assert (flat - expected).abs().max() > 0.01  # other advantages, another gradient


def _again(policy: Policy, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, _ = token_logprobs(policy.model, batch, batch.loss)
    return logprobs, logprobs.detach()


def test_the_loss_has_no_slope_in_logits_that_chose_the_tools_tokens(tiny: Policy):  # identity 32
    row = rollout_row(rollout(0, 9, 4, 5), [2.0, -1.0], [True, True])
    ids = torch.tensor([[*row.prompt_ids, *row.ids]])
    logits = tiny.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].detach().requires_grad_()
    logprobs = logits.log_softmax(-1).gather(-1, ids[0, len(row.prompt_ids) :, None])[:, 0]
    at = torch.from_numpy(row.loss)
    chosen, advantages = logprobs[at], torch.from_numpy(row.advantages)[at]
    policy_loss(chosen, chosen.detach(), advantages, torch.ones_like(advantages)).loss.backward()
    assert logits.grad is not None
    assert (logits.grad[~torch.from_numpy(row.action)] == 0).all()
    assert (logits.grad[torch.from_numpy(row.action)].abs().max(-1).values > 0).all()


def test_a_turn_outside_the_loss_mask_is_not_trained(tiny: Policy):
    played = rollout(0, 9, 4, 5)
    only_second = [rollout_row(played, [3.0, 1.0], [False, True])]
    batch = pack(only_second, pad_id=0)
    logprobs, _ = token_logprobs(tiny.model, batch, batch.loss)
    assert len(logprobs) == 5
    other = [rollout_row(played, [-7.0, 1.0], [False, True])]
    losses = [batched_loss(tiny, r, max_tokens=100) for r in (only_second, other)]
    assert_close(gradient(tiny, losses[0]), gradient(tiny, losses[1]))


@pytest.mark.parametrize(("max_tokens", "pad_id"), [(1, 0), (12, 0), (10_000, 7)])
def test_micro_batches_order_and_padding_change_neither_loss_nor_gradient(tiny: Policy, max_tokens: int, pad_id: int):
    # identity 31
    usual = batched_loss(tiny, rows(), max_tokens=10_000)
    other = batched_loss(tiny, rows()[::-1], max_tokens=max_tokens, pad_id=pad_id)
    assert_close(other, usual)
    assert_close(gradient(tiny, other), gradient(tiny, usual), atol=1e-6, rtol=1e-4)


def test_micro_batches_with_weights_of_their_own_change_the_loss(tiny: Policy):  # identity 31, broken
    # a token's weight is over all tokens of the minibatch; over those of its micro-batch, short rows count more
    whole = batched_loss(tiny, weighted(rows(), "token-mean"), max_tokens=10_000)
    alone = [batched_loss(tiny, weighted([row], "token-mean"), max_tokens=10_000) for row in rows()]
    assert (torch.stack(alone).mean() - whole).abs() > 0.01
    sizes = torch.tensor([float(row.loss.sum()) for row in rows()])
    assert_close((sizes * torch.stack(alone)).sum() / sizes.sum(), whole)


def test_merging_equal_rows_changes_neither_loss_nor_gradient(tiny: Policy):
    repeated = [row for i, row in enumerate(rows()) for _ in range(1 + i % 3)]
    merged = distinct_rows(weighted(repeated, "sequence-mean"))
    assert (len(repeated), len(merged)) == (12, 6)
    one, other = (batched_loss(tiny, r, max_tokens=10_000) for r in (repeated, merged))
    assert_close(other, one)
    assert_close(gradient(tiny, other), gradient(tiny, one), atol=1e-6, rtol=1e-4)


# -------------------------------------------------------------------------------- checkpoints


def test_a_policy_is_a_function_of_its_seed(bpe_chat):
    one, same, other = (tiny_policy(bpe_chat, seed=s, hidden=16, layers=1).model.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_saved_policy_comes_back_bit_equal(tiny: Policy, checkpoint):
    again = load_policy(checkpoint)
    state = again.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tiny.model.state_dict().items())
    assert again.context == tiny.context == 1024
    assert again.chat.encode_text("Kenya <|im_end|>") == tiny.chat.encode_text("Kenya <|im_end|>")


def damaged(checkpoint, tmp_path, change) -> str:
    """The one-line message that a damaged copy of the checkpoint gives."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    change(folder)
    with pytest.raises(RunError) as caught:
        load_policy(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_truncated_model_file_is_refused(checkpoint, tmp_path):
    def cut(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    assert "must hold a whole model" in damaged(checkpoint, tmp_path, cut)


def test_a_model_that_lacks_a_tensor_is_refused_not_filled_up(checkpoint, tmp_path):
    def drop(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    assert "it lacks model.layers.0.mlp.up_proj.weight" in damaged(checkpoint, tmp_path, drop)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(checkpoint, tmp_path):
    def grow(folder):
        data = json.loads((folder / "tokenizer.json").read_text())
        data["model"]["vocab"]["Ġextra"] = 9999
        (folder / "tokenizer.json").write_text(json.dumps(data))

    assert "must fit its model" in damaged(checkpoint, tmp_path, grow)


def test_a_config_that_is_no_config_is_refused(checkpoint, tmp_path):
    assert "must hold a whole model" in damaged(
        checkpoint, tmp_path, lambda folder: (folder / "config.json").write_text("{")
    )


def test_an_unknown_policy_name_is_one_line():
    with pytest.raises(InputError, match=r"embedded or embedded-search, a checkpoint folder .*; got 'embeded'"):
        load_policy("embeded")


def test_saving_replaces_what_was_there(tiny: Policy, tmp_path):
    save_policy(tiny, tmp_path)
    save_policy(tiny, tmp_path)
    assert load_policy(tmp_path).context == 1024


def test_the_protocol_decides_which_embedded_start_is_meant():
    search = TrainConfig(protocol="search")
    assert (TrainConfig().start, search.start) == ("embedded", "embedded-search")
    assert dataclasses.replace(search, policy="runs/mine").start == "runs/mine"


def test_both_embedded_starts_load_with_one_tokenizer():
    one, two = load_policy("embedded"), load_policy("embedded-search")
    text = "<think>\nI need the author.\n</think>\n<search>\nHamlet\n</search>"
    assert one.chat.encode_text(text) == two.chat.encode_text(text)
    weights = (p.model.get_input_embeddings().weight for p in (one, two))
    assert not torch.equal(*weights)
