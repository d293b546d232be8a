"""Parts of a step on several cores: the same numbers as one after the other."""

import copy
import dataclasses
import pickle
import threading

import numpy as np
import pytest
import torch

from families import EACH_FAMILY, VOCAB, tiny
from turnwise import batch, cores, learning
from turnwise.batch import Row
from turnwise.config import TrainConfig
from turnwise.cores import fuse_norms, in_parallel, parts_at_once
from turnwise.critic import make_critic, step_values
from turnwise.evaluation import draw, make_engine, make_engines, rollout_limits
from turnwise.learning import update
from turnwise.policy import Policy, load_policy, tiny_policy
from turnwise.setting import make_setting


def test_results_come_in_order_whatever_is_done_first():
    second_is_done = threading.Event()

    def part(i: int) -> int:
        if i == 0:
            assert second_is_done.wait(10), "two parts were not at work at once"
        second_is_done.set()
        return i

    assert list(in_parallel(part, range(4), at_once=2)) == [0, 1, 2, 3]


def test_a_parts_error_is_the_callers_and_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(in_parallel(lambda i: 1 // i, [1, 0, 2], at_once=2))
    assert torch.get_num_threads() == before


def test_inside_a_part_torch_uses_one_thread():
    assert list(in_parallel(lambda _: torch.get_num_threads(), range(3), at_once=2)) == [1, 1, 1]


def test_small_models_are_computed_in_parts_and_large_ones_on_all_threads():
    assert parts_at_once(torch.nn.Linear(10, 10), 2) == 2
    with torch.device("meta"):
        large = torch.nn.Linear(5_000, 5_000)  # 25 million weights
    assert parts_at_once(large, 2) == 1


def random_rows(count: int, vocab: int) -> list[tuple[int, Row]]:
    """Rollouts of different lengths in groups of two, with values and returns."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        size = int(rng.integers(3, 9))
        sampled = np.ones(size, dtype=bool)
        row = Row(
            prompt_ids=tuple(rng.integers(5, vocab, 4).tolist()),
            ids=tuple(rng.integers(5, vocab, size).tolist()),
            action=sampled,
            loss=sampled,
            sampling_logprobs=rng.normal(-4, 0.1, size).astype(np.float32),
            advantages=rng.normal(0, 1, size).astype(np.float32),
            values=np.zeros((size, 1), dtype=np.float32),
            returns=rng.normal(0, 1, (size, 1)).astype(np.float32),
        )
        rows.append((i // 2, row))
    return rows


@pytest.mark.parametrize("trunk", [None, "own", "shared"])
def test_an_update_in_parts_is_the_same_to_the_last_bit(bpe_chat, trunk):
    config = TrainConfig(micro_batch_tokens=16, minibatches=2, learning_rate=1e-2)
    weights = []
    for at_once in (1, 2):
        policy: Policy = tiny_policy(bpe_chat, seed=0, hidden=16, layers=2)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
        critic = make_critic(policy, trunk) if trunk else None
        rows = random_rows(12, bpe_chat.tokenizer.vocab_size)
        with single_threaded():
            update(policy, optimizer, rows, config, 9, None, critic, at_once=at_once)
        learned = [*policy.model.parameters(), *(critic.parameters if critic else ())]
        weights.append([p.detach().clone() for p in learned])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    start = tiny_policy(bpe_chat, seed=0, hidden=16, layers=2).model.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(weights[0], start, strict=False)), "nothing was learned"


@pytest.mark.parametrize(
    ("most", "small", "expected"), [(None, True, (2048, True)), (None, False, (2048, False)), (64, True, (64, False))]
)
def test_a_small_policys_micro_batches_are_even_unless_a_budget_is_given(
    bpe_chat, monkeypatch: pytest.MonkeyPatch, most: int | None, small: bool, expected: tuple[int, bool]
):
    asked = []

    def micro_batches(rows, *, max_tokens: int, pad_id: int, even: bool):
        asked.append((max_tokens, even))
        return batch.micro_batches(rows, max_tokens=max_tokens, pad_id=pad_id, even=even)

    monkeypatch.setattr(learning, "micro_batches", micro_batches)
    if not small:
        monkeypatch.setattr(cores, "SMALL", 1)
    policy = tiny_policy(bpe_chat, seed=0, hidden=16, layers=1)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    rows = random_rows(4, bpe_chat.tokenizer.vocab_size)
    update(policy, optimizer, rows, TrainConfig(micro_batch_tokens=most, minibatches=1), 0)
    assert asked == [expected]


def test_values_in_parts_are_the_same(bpe_chat):
    policy = tiny_policy(bpe_chat, seed=0, hidden=16, layers=2)
    critic = make_critic(policy, "own")
    torch.nn.init.normal_(critic.head.weight)
    rows = [row for _, row in random_rows(6, bpe_chat.tokenizer.vocab_size)]
    options = {"max_tokens": 16, "pad_id": bpe_chat.pad_id}
    with single_threaded():
        one, two = (step_values(critic, rows, [True] * 6, at_once=n, **options) for n in (1, 2))
    assert np.array_equal(one[1], two[1])
    assert all(np.array_equal(a, b) for a, b in zip(one[0], two[0], strict=True))


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_norms_of_one_operation_are_the_same_to_the_last_bit(family: str):
    plain, fused = tiny(family, dtype=torch.float32), tiny(family, dtype=torch.float32)
    for model in (plain, fused):
        drawn = torch.Generator().manual_seed(1)
        for weight in model.parameters():  # norms' own are all 1 at first
            weight.data += 0.1 * torch.randn(weight.shape, generator=drawn)
    fuse_norms(fused)
    taken = [norm for norm in fused.modules() if "forward" in vars(norm)]
    plainly = ("llama", "qwen", "mistral", "mixtral", "smollm", "granite", "olmo", "phi 3", "gpt-oss")
    assert bool(taken) == family.startswith(plainly)
    ids = torch.arange(14).reshape(2, 7) % VOCAB
    found = [model(input_ids=ids).logits for model in (plain, fused, copy.deepcopy(fused))]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for logits in found[:2]:
        logits.square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_a_norm_that_is_copied_or_cast_goes_its_own_way():
    model = tiny("qwen3", dtype=torch.float32)
    fuse_norms(model)
    norm, states = model.model.norm, torch.randn(3, model.config.hidden_size)
    copied = copy.deepcopy(norm)
    copied.weight.data.fill_(3.0)
    assert torch.equal(copied(states), 3.0 * norm(states)), "a copy has its own weight"
    assert torch.equal(pickle.loads(pickle.dumps(norm))(hidden_states=states), norm(states))
    norm.double()  # transformers' computes in float32 all the same
    assert torch.equal(norm(states.double()), type(norm).forward(norm, states.double()))
    large = tiny("qwen3", dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores, "SMALL", 1)
        fuse_norms(large)
    assert not any("forward" in vars(module) for module in large.modules())
    assert "forward" in vars(load_policy("embedded").model.get_decoder().norm)


class single_threaded:
    """torch on one thread, for comparisons to the last bit."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


@pytest.mark.parametrize("how", [{"group_size": 2}, {"branches": (2, 2)}])
def test_two_engines_draw_what_one_draws(how):
    config = TrainConfig()
    policy, setting = load_policy("embedded"), make_setting(config)
    options = {"limits": rollout_limits(config, policy), "temperature": 1.0, "seed": (7,), **how}
    drawn = [
        draw(setting.train[:5], setting, [make_engine(policy) for _ in range(count)], policy.chat, **options)
        for count in (1, 2)
    ]
    assert [r.group for group in drawn[1] for r in group] == [r.group for group in drawn[0] for r in group]
    said = [[[turn.action_ids for turn in r.turns] for group in groups for r in group] for groups in drawn]
    assert said[0] == said[1]


def test_a_users_tools_are_called_from_one_thread(tmp_path):
    policy, config = load_policy("embedded"), TrainConfig(threads=3)
    assert len(make_engines(policy, config)) == 3
    assert len(make_engines(policy, dataclasses.replace(config, tools=tmp_path / "tools.py"))) == 1
