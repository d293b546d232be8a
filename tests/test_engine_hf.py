import asyncio
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from families import EACH_FAMILY, VOCAB, tiny
from turnwise.engine import Completion, Sampling
from turnwise.engines import attention, hf
from turnwise.engines.attention import Beginnings, processor_attention
from turnwise.engines.cache import RowCache
from turnwise.engines.hf import HFEngine
from turnwise.engines.sampling import drawn_tokens
from turnwise.errors import ConfigError, InputError


def prompts(count: int, seed: int = 0, low: int = 1, high: int = 30) -> list[list[int]]:
    random = np.random.default_rng(seed)
    sizes = random.integers(low, high, count)
    return [random.integers(1, VOCAB, size).tolist() for size in sizes]


def generate_all(engine: HFEngine, items: Sequence[tuple[Sequence[int], Sampling]]) -> list[Completion]:
    """All items at once, each in its own session, released afterwards."""

    async def one(session: int, prompt: Sequence[int], sampling: Sampling) -> Completion:
        try:
            return await engine.generate(prompt, sampling, session=session)
        finally:
            engine.release(session)

    async def everything() -> list[Completion]:
        return await asyncio.gather(*(one(i, *item) for i, item in enumerate(items)))

    return asyncio.run(asyncio.wait_for(everything(), 60))


def three_turns(
    engine: HFEngine, count: int, *, max_tokens: int = 6, lockstep: bool = False
) -> list[list[tuple[list[int], Completion]]]:
    """`count` sessions of three turns; between turns each gets a ragged reply of its own."""
    starts = prompts(count, seed=1)
    histories: list[list[tuple[list[int], Completion]]] = [[] for _ in range(count)]

    async def turn(i: int) -> None:
        history = histories[i]
        if history:
            before, completion = history[-1]
            reply = prompts(1, seed=100 * i + len(history), high=9)[0]
            prompt = [*before, *completion.token_ids, *reply]
        else:
            prompt = starts[i]
        sampling = Sampling(max_tokens=max_tokens - i % 3, seed=10 * i + len(history))
        history.append((prompt, await engine.generate(prompt, sampling, session=i)))

    async def rollout(i: int) -> None:
        for _ in range(3):
            await turn(i)
        engine.release(i)

    async def everything() -> None:
        if lockstep:
            for _ in range(3):
                await asyncio.gather(*(turn(i) for i in range(count)))
            for i in range(count):
                engine.release(i)
        else:
            await asyncio.gather(*(rollout(i) for i in range(count)))

    asyncio.run(asyncio.wait_for(everything(), 60))
    return histories


def full_logprobs(model: PreTrainedModel, prompt: Sequence[int], drawn: Sequence[int]) -> list[float]:
    """Log-probabilities of `drawn` after `prompt` by one forward pass over everything."""
    ids = torch.tensor([[*prompt, *drawn]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].double().log_softmax(-1)
    first = len(prompt) - 1
    return [float(logprobs[first + k, token]) for k, token in enumerate(drawn)]


# ---- drawing ----


def draw(logits: list[float], temperature: float, uniform: float) -> tuple[int, float]:
    tokens, logprobs = drawn_tokens(
        torch.tensor([logits], dtype=torch.float64),
        torch.tensor([temperature], dtype=torch.float64),
        torch.tensor([uniform], dtype=torch.float64),
    )
    return int(tokens[0]), float(logprobs[0])


def test_a_draw_inverts_the_cumulative_distribution():
    # p = 1/2, 1/4, 1/4: cumulative 0.5, 0.75, 1.
    logits = [math.log(2), 0.0, 0.0]
    assert [draw(logits, 1.0, u)[0] for u in (0.0, 0.499, 0.5, 0.749, 0.75, 0.999)] == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip
    assert draw(logits, 1.0, 0.6)[1] == pytest.approx(math.log(0.25))


def test_temperature_one_half_squares_the_odds_and_logprobs_follow():
    # p ∝ 3², 1: 0.9, 0.1.
    logits = [math.log(3), 0.0]
    assert draw(logits, 0.5, 0.89) == (0, pytest.approx(math.log(0.9)))
    assert draw(logits, 0.5, 0.91) == (1, pytest.approx(math.log(0.1)))


def test_greedy_takes_the_most_probable_token_with_its_logprob_at_temperature_one():
    # p = 1/4, 3/4.
    assert draw([0.0, math.log(3)], 0.0, 0.0) == (1, pytest.approx(math.log(0.75)))


# 1.0 is no uniform, but what one times a rounded total could come to.
@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1.0, 0.0), 1.0])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float):
    never = -math.inf
    token, logprob = draw([never, 0.0, never, 0.1, never], 1.0, uniform)
    assert token in (1, 3)
    assert math.isfinite(logprob)


def test_the_largest_uniform_stays_in_range_whatever_the_rounding():
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 333)))
    uniforms = torch.full((500,), float(np.nextafter(1.0, 0.0)), dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        tokens, _ = drawn_tokens(logits.to(dtype), torch.ones_like(uniforms), uniforms)
        assert int(tokens.max()) == 332


# ---- agreement ----


HEADS = [("qwen3", 4, True), ("qwen3", 1, True), ("llama", 2, False)]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_greedy_equals_model_generate_alone_and_in_a_batch(family: str):
    found, alone, generated = greedy_and_generated(tiny(family))
    assert (found, alone) == (generated, generated[:2])


@pytest.mark.parametrize(("family", "kv_heads", "tied"), HEADS)
def test_greedy_equals_model_generate_for_any_number_of_heads(family: str, kv_heads: int, tied: bool):
    found, alone, generated = greedy_and_generated(tiny(family, kv_heads=kv_heads, tied=tied))
    assert (found, alone) == (generated, generated[:2])


def greedy_and_generated(model: PreTrainedModel) -> tuple[list[list[int]], ...]:
    """Greedy tokens of four prompts in a batch, of two of them alone, and what `generate` gives for the four."""
    starts = prompts(4)
    expected = [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=7,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in starts
    ]
    greedy = Sampling(temperature=0, max_tokens=16, seed=0)
    engine = HFEngine(model, stop_ids={7}, max_context=64)
    together = generate_all(engine, [(prompt, greedy) for prompt in starts])
    alone = [generate_all(engine, [(prompt, greedy)])[0] for prompt in starts[:2]]
    assert len({tuple(ids) for ids in expected}) > 1, "prompts that all go on alike show nothing"
    return *([list(c.token_ids) for c in found] for found in (together, alone)), expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3 with a sliding layer", "gemma 3", "phi 3"])
def test_sampling_logprobs_agree_with_a_full_forward_pass_over_three_turns(attention: str, family: str):
    model = tiny(family, dtype=torch.float32, attention=attention)
    engine = HFEngine(model, stop_ids=(), max_context=128)
    for history in three_turns(engine, 9):
        for prompt, completion in history:
            assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-4)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_familys_sampling_logprobs_are_those_of_a_full_forward_pass(family: str):
    model = tiny(family)
    for history in three_turns(HFEngine(model, stop_ids=(), max_context=128), 4):
        for prompt, completion in history:
            assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-6)


def test_a_sampled_completion_is_the_same_alone_and_among_fifty_others():
    model = tiny()
    items = [(prompt, Sampling(max_tokens=12 + i % 7, seed=i)) for i, prompt in enumerate(prompts(51))]
    engine = HFEngine(model, stop_ids={3}, max_context=64)
    together = generate_all(engine, items)
    for i in (0, 17, 50):
        alone = generate_all(engine, [items[i]])[0]
        assert alone.token_ids == together[i].token_ids
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=1e-6)


def test_seeds_decide_the_draw():
    engine = HFEngine(tiny(), stop_ids=(), max_context=64)
    items = [([1, 2, 3], Sampling(max_tokens=20, seed=seed)) for seed in (5, 5, 6, -5)]
    first, again, other, negative = generate_all(engine, items)
    assert first == again
    assert len({first.token_ids, other.token_ids, negative.token_ids}) == 3


def test_samples_follow_the_models_distribution():
    model = tiny(dtype=torch.float32)
    engine = HFEngine(model, stop_ids=(), max_rows=500, max_context=8)
    items = [([4, 9], Sampling(max_tokens=1, seed=seed)) for seed in range(2000)]
    drawn = np.array([c.token_ids[0] for c in generate_all(engine, items)])
    with torch.no_grad():
        p = model(torch.tensor([[4, 9]])).logits[0, -1].softmax(-1).numpy()
    # Standard error of each share is below sqrt(p / 2000); 5 of them, and the seeds are fixed.
    share = np.bincount(drawn, minlength=VOCAB) / 2000
    assert (np.abs(share - p) <= 5 * np.sqrt(p / 2000) + 1e-3).all()


# ---- finish ----


def test_the_stop_token_ends_a_completion_and_is_part_of_it():
    model = tiny()
    greedy = Sampling(temperature=0, max_tokens=10, seed=0)
    free = generate_all(HFEngine(model, stop_ids=(), max_context=64), [([1, 2], greedy)])[0]
    assert (len(free.token_ids), free.finish) == (10, "length")
    stop = free.token_ids[4]
    cut = free.token_ids[: free.token_ids.index(stop) + 1]
    stopped = generate_all(HFEngine(model, stop_ids=[stop], max_context=64), [([1, 2], greedy)])[0]
    assert (stopped.token_ids, stopped.finish) == (cut, "stop")
    assert stopped.logprobs == pytest.approx(free.logprobs[: len(cut)])


def test_the_context_bounds_a_completion_and_the_cache_grows_up_to_it():
    # 200 - 3 = 197 tokens fit.
    model = tiny(dtype=torch.float32)
    engine = HFEngine(model, stop_ids=(), max_context=200)
    completion = generate_all(engine, [([1, 2, 3], Sampling(max_tokens=999, seed=0))])[0]
    assert (len(completion.token_ids), completion.finish) == (197, "length")
    assert completion.logprobs == pytest.approx(full_logprobs(model, [1, 2, 3], completion.token_ids), abs=1e-4)


# ---- what is fed ----


def test_sixteen_rollouts_of_one_prompt_feed_it_once():
    engine = HFEngine(tiny(), stop_ids=(), max_context=64)
    one, two = prompts(2, low=20)
    items = [(p, Sampling(max_tokens=5, seed=i)) for i, p in enumerate([one] * 16 + [two] * 16)]
    together = generate_all(engine, items)
    assert engine.stats.prefilled_tokens == len(one) + len(two)
    assert engine.stats.decoded_tokens == 32 * 5
    assert engine.stats.decode_steps == 4  # the first token comes from the prefill
    assert engine.stats.seconds > 0
    assert len({c.token_ids for c in together[:16]}) > 1
    assert together[3].token_ids == generate_all(engine, [items[3]])[0].token_ids


def test_a_returning_session_feeds_only_the_reply_and_its_last_token():
    engine = HFEngine(tiny(), stop_ids=(), max_context=64)

    async def rollout() -> None:
        sampling = Sampling(max_tokens=5, seed=0)
        first = await engine.generate([1, 2, 3], sampling, session="a")
        await engine.generate([1, 2, 3, *first.token_ids, 8, 9], sampling, session="a")

    asyncio.run(rollout())
    # Turn 1: 3. Turn 2: the fifth drawn token, which was never fed, and the reply 8, 9.
    assert engine.stats.prefilled_tokens == 3 + 1 + 2


def test_a_changed_conversation_keeps_the_common_prefix_and_is_right():
    model = tiny(dtype=torch.float32)
    engine = HFEngine(model, stop_ids=(), max_context=64)
    changed = [1, 2, 3, 9, 9]

    async def rollout() -> tuple[Completion, Completion]:
        await engine.generate([1, 2, 3, 4, 5, 6], Sampling(max_tokens=5, seed=0), session=0)
        other = await engine.generate(changed, Sampling(max_tokens=5, seed=1), session=0)
        return other, await engine.generate(changed, Sampling(max_tokens=5, seed=1), session=0)

    other, repeated = asyncio.run(rollout())
    # 6 at first; then 9, 9; then only the last token of the same prompt again.
    assert engine.stats.prefilled_tokens == 6 + 2 + 1
    assert other.token_ids == repeated.token_ids
    expected = full_logprobs(model, changed, other.token_ids)
    assert other.logprobs == pytest.approx(expected, abs=1e-4)
    assert repeated.logprobs == pytest.approx(expected, abs=1e-4)


# ---- forks ----


def forked_turns(
    engine: HFEngine,
    *,
    replies: Sequence[Sequence[int]],
    evict: bool = False,
    lead: bool = False,
    temperature: float = 1.0,
) -> list[tuple[list[int], Completion]]:
    """A first turn, and one second turn per reply: the first in the same session, the others in forks of it.

    With `lead` the first has its second turn before the others ask. With `evict` others take all rows in between.
    """

    async def second(k: int, prompt: list[int], session: object) -> tuple[list[int], Completion]:
        sampling = Sampling(temperature=temperature, max_tokens=6, seed=50 + k)
        return prompt, await engine.generate(prompt, sampling, session=session)

    async def everything() -> list[tuple[list[int], Completion]]:
        start = prompts(1, seed=4, low=12)[0]
        first = await engine.generate(start, Sampling(temperature=temperature, max_tokens=6, seed=0), session="first")
        asked = [[*start, *first.token_ids, *reply] for reply in replies]
        for k in range(1, len(replies)):
            engine.fork("first", k)
        if evict:
            others = [second(k, p, f"other {k}") for k, p in enumerate(prompts(engine.max_rows, seed=9))]
            await asyncio.gather(*others)
            assert "first" not in engine._row_of
        done = [await second(0, asked[0], "first")] if lead else []
        rest = [second(k, p, k or "first") for k, p in enumerate(asked) if k or not lead]
        done += await asyncio.gather(*rest)
        for session in ("first", *range(1, len(replies)), *(f"other {k}" for k in range(engine.max_rows))):
            engine.release(session)
        return done

    return asyncio.run(asyncio.wait_for(everything(), 60))


WAYS = {"at once": {}, "after the parent went on": {"lead": True}, "after the parent was evicted": {"evict": True}}
REPLIES = {"alike": [[7, 8, 9]] * 4, "different": [[7, 8, 9], [7, 8], [7, 1, 2, 3], [4]]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("replies", REPLIES)
@pytest.mark.parametrize("family", ["qwen3", "qwen3 with a sliding layer"])
def test_a_fork_draws_what_a_conversation_of_its_own_would(family: str, replies: str, way: str):
    model = tiny(family)
    for temperature in (0.0, 1.0):
        engine = HFEngine(model, stop_ids={3}, max_context=64, max_rows=5)
        turns = forked_turns(engine, replies=REPLIES[replies], temperature=temperature, **WAYS[way])
        fresh = HFEngine(model, stop_ids={3}, max_context=64)
        samplings = [Sampling(temperature=temperature, max_tokens=6, seed=50 + k) for k in range(len(turns))]
        alone = [generate_all(fresh, [(p, s)])[0] for (p, _), s in zip(turns, samplings, strict=True)]
        for (prompt, forked), own in zip(turns, alone, strict=True):
            assert forked.token_ids == own.token_ids
            assert forked.logprobs == pytest.approx(own.logprobs, abs=1e-9)
            assert forked.logprobs == pytest.approx(full_logprobs(model, prompt, forked.token_ids), abs=1e-9)


def test_a_fork_in_float32_agrees_with_a_full_forward_pass():
    model = tiny(dtype=torch.float32)
    for prompt, completion in forked_turns(HFEngine(model, stop_ids=(), max_context=64), replies=REPLIES["different"]):
        assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-5)


def test_forks_feed_only_what_their_parent_does_not_have():
    start = len(prompts(1, seed=4, low=12)[0])

    def fed(replies: list[list[int]], **way: bool) -> int:
        engine = HFEngine(tiny(), stop_ids=(), max_context=64)
        forked_turns(engine, replies=replies, **way)
        return engine.stats.prefilled_tokens - start

    # The sixth drawn token, which was never fed, and the reply: once for all.
    assert fed([[7, 8, 9]] * 4) == 4
    # After the parent went on they copy all but the prompt's last token, which the first of them feeds.
    assert fed([[7, 8, 9]] * 4, lead=True) == 4 + 1
    # Different replies: each its own and the drawn token, the rest is copied.
    assert fed([[7, 8, 9], [7, 8], [5]]) == 4 + 3 + 2


def test_a_fork_needs_a_new_session_and_leaves_nothing_behind():
    engine = HFEngine(tiny(), stop_ids=(), max_context=64)

    async def scene() -> None:
        sampling = Sampling(max_tokens=2, seed=0)
        await engine.generate([1, 2], sampling, session="a")
        engine.fork("a", "b")
        with pytest.raises(InputError, match="'b' is one already"):
            engine.fork("a", "b")
        with pytest.raises(InputError, match="'a' is one already"):
            engine.fork("b", "a")
        engine.release("b")
        engine.fork("never seen", "c")
        assert len((await engine.generate([1, 2], sampling, session="c")).token_ids) == 2
        engine.release("a")
        engine.release("c")

    asyncio.run(scene())
    assert not engine._parents
    engine.refresh(1)


# ---- rows that begin alike ----


def grouped_turns(engine: HFEngine, sizes: Sequence[int]) -> list[tuple[list[int], Completion]]:
    """Two turns of groups of such `sizes`, one prompt each; lengths and replies are each rollout's own."""

    async def rollout(group: int, number: int) -> list[tuple[list[int], Completion]]:
        prompt = prompts(1, seed=group, low=12 + group)[0]
        first = await engine.generate(prompt, Sampling(max_tokens=4 + number, seed=number), session=(group, number))
        later = [*prompt, *first.token_ids, *prompts(1, seed=50 + number, high=9)[0]]
        second = await engine.generate(later, Sampling(max_tokens=5, seed=number), session=(group, number))
        engine.release((group, number))
        return [(prompt, first), (later, second)]

    async def everything() -> list[list[tuple[list[int], Completion]]]:
        return await asyncio.gather(*(rollout(group, i) for group, size in enumerate(sizes) for i in range(size)))

    return [turn for history in asyncio.run(asyncio.wait_for(everything(), 60)) for turn in history]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Beginnings of 8 tokens are shared from now on; the list gets families and rows wherever a layer reads so."""
    found = []

    def counted(*given: Any) -> torch.Tensor:
        length, row, members, _ = given[4:]
        assert length >= 8
        found.append((len(row), len(members.unique())))
        return plain(*given)

    plain = attention._by_families
    monkeypatch.setattr(hf, "SHARED_TOKENS", 8)
    monkeypatch.setattr(attention, "_by_families", counted)
    return found


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_what_rows_begin_with_is_read_once_and_comes_to_the_same(family: str, shared: list):
    model = tiny(family)
    engine = HFEngine(model, stop_ids=(), max_context=64)
    for prompt, completion in grouped_turns(engine, [5, 3, 4]):
        assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-6)
    # All twelve rows, and what is left of them later; not where every layer slides, or has its own attention.
    every = family in ("mistral, all sliding", "phi 3", "starcoder 2", "gemma 2", "gpt-oss")
    assert ((3, 12) in shared, any(rows < 12 for _, rows in shared)) == (not every, not every)


@pytest.mark.parametrize("way", WAYS)
def test_forks_begin_as_their_parent_does(way: str, shared: list):
    model = tiny(dtype=torch.float32)
    engine = HFEngine(model, stop_ids=(), max_context=64, max_rows=5)
    for prompt, completion in forked_turns(engine, replies=REPLIES["different"], **WAYS[way]):
        assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-5)
    assert any(families < rows for families, rows in shared) == (way != "after the parent was evicted")


def test_a_row_whose_beginning_changes_leaves_its_family(shared: list):
    model = tiny()
    engine = HFEngine(model, stop_ids=(), max_context=64)
    start = prompts(1, low=14)[0]
    changed = [*start[:5], 9, *start[6:]]

    async def rollout(session: int, second: list[int]) -> list[tuple[list[int], Completion]]:
        first = await engine.generate(start, Sampling(max_tokens=3, seed=session), session=session)
        again = await engine.generate(second, Sampling(max_tokens=4, seed=session), session=session)
        return [(start, first), (second, again)]

    async def everything() -> list[list[tuple[list[int], Completion]]]:
        return await asyncio.gather(*(rollout(i, changed if i == 2 else [*start, 7]) for i in range(4)))

    for history in asyncio.run(asyncio.wait_for(everything(), 60)):
        for prompt, completion in history:
            assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-9)
    assert {(1, 4), (2, 4)} <= set(shared)


def test_short_beginnings_single_rows_and_half_numbers_are_read_as_before(shared: list):
    generate_all(HFEngine(tiny(), stop_ids=(), max_context=64), [([1, 2, 3], Sampling(max_tokens=4, seed=0))] * 4)
    each = [(prompt, Sampling(max_tokens=4, seed=0)) for prompt in prompts(4, low=10)]
    generate_all(HFEngine(tiny(), stop_ids=(), max_context=64), each)
    alike = [(prompts(1, low=10)[0], Sampling(max_tokens=4, seed=0))] * 4
    generate_all(HFEngine(tiny(dtype=torch.bfloat16), stop_ids=(), max_context=64), alike)
    assert not shared
    generate_all(HFEngine(tiny(), stop_ids=(), max_context=64), alike)
    assert shared == [(1, 4)] * 3 * 2  # steps after the prefill's, layers


def test_a_models_own_mask_over_beginnings_counts(shared: list):
    """Doge adds a learned bias of each head to the mask, which the engine knows nothing of."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    config = transformers.DogeConfig(**sizes, **heads, initializer_range=0.3)
    config._attn_implementation = "sdpa"
    model = transformers.DogeForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.normal_()
    for prompt, completion in grouped_turns(HFEngine(model, stop_ids=(), max_context=64), [6]):
        assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-6)
    assert not shared


def test_values_may_be_narrower_than_keys():
    torch.manual_seed(0)
    query, key, value = torch.randn(4, 4, 1, 12), torch.randn(4, 2, 9, 12), torch.randn(4, 2, 9, 6)
    key[:, :, :5], value[:, :, :5] = key[:1, :, :5].clone(), value[:1, :, :5].clone()
    mask = torch.zeros(4, 1, 1, 9)
    mask[1:, :, :, 7:] = -torch.inf
    plain, _ = processor_attention(torch.nn.Module(), query, *(x.repeat_interleave(2, 1) for x in (key, value)), mask)
    vars(key)["beginnings"] = Beginnings(5, torch.tensor([0]), torch.tensor([[0, 1, 2, 3]]), torch.arange(4), mask)
    with torch.no_grad():
        found, _ = processor_attention(torch.nn.Module(), query, key, value, mask)
    assert found.shape == (4, 1, 4, 6)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("family", ["qwen3", "gemma 3", "falcon"])
def test_a_model_that_an_engine_has_used_computes_trains_and_is_saved_as_before(tmp_path: Path, family: str):
    fresh, used = (falcon() if family == "falcon" else tiny(family, dtype=torch.float32) for _ in range(2))
    generate_all(HFEngine(used, stop_ids=(), max_context=64), [([1, 2, 3], Sampling(max_tokens=3, seed=0))] * 2)
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6]])
    padded = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    for model in (fresh, used):
        model(**padded).logits[:, -1].square().mean().backward()
    for before, after in zip(fresh.parameters(), used.parameters(), strict=True):
        assert torch.equal(before.grad, after.grad)
    with torch.no_grad():
        assert torch.equal(fresh(**padded).logits[:, -1], used(**padded).logits[:, -1])
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fresh.generate(**padded, **greedy), used.generate(**padded, **greedy))
    for name, model in (("fresh", fresh), ("used", used)):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "used/config.json").read_bytes() == (tmp_path / "fresh/config.json").read_bytes()


def falcon() -> PreTrainedModel:
    """A family whose attention asks for the name of its implementation, and computes it by itself."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config._attn_implementation = "sdpa"
    return transformers.FalconForCausalLM(config).eval()


# ---- rows ----


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_more_sessions_than_rows_come_to_the_same_end(rows: int, lockstep: bool):
    # Lockstep is the hard case: every session comes back only when all have had their turn, so that
    # idle sessions hold every row while others wait.
    roomy = three_turns(HFEngine(tiny(), stop_ids={3}, max_context=128), 11)
    narrow = HFEngine(tiny(), stop_ids={3}, max_rows=rows, max_context=128)
    histories = three_turns(narrow, 11, lockstep=lockstep)
    for history, expected in zip(histories, roomy, strict=True):
        for (prompt, completion), (its_prompt, its_completion) in zip(history, expected, strict=True):
            assert prompt == its_prompt
            assert completion.token_ids == its_completion.token_ids


def test_sessions_that_take_turns_are_not_evicted_while_others_wait():
    engine = HFEngine(tiny(), stop_ids=(), max_rows=4, max_context=128)
    histories = three_turns(engine, 11)
    fed = sum(
        len(history[0][0])
        + sum(len(after[0]) - len(before[0]) - len(before[1].token_ids) + 1 for before, after in pairwise(history))
        for history in histories
    )
    assert engine.stats.prefilled_tokens == fed


def test_holes_in_the_batch_are_closed_without_disturbing_idle_or_active_rows():
    # Short first turns in the front rows leave holes while the last row decodes 150 tokens; then
    # the short sessions return. Every log-probability must still be right.
    model = tiny(dtype=torch.float32)
    engine = HFEngine(model, stop_ids=(), max_context=256)
    starts = prompts(6)

    async def short(i: int, long: asyncio.Future) -> list[tuple[list[int], Completion]]:
        first = await engine.generate(starts[i], Sampling(max_tokens=4, seed=i), session=i)
        await long
        prompt = [*starts[i], *first.token_ids, 5]
        second = await engine.generate(prompt, Sampling(max_tokens=9, seed=i), session=i)
        return [(starts[i], first), (prompt, second)]

    async def last(long: asyncio.Future) -> list[tuple[list[int], Completion]]:
        drawn = await engine.generate(starts[5], Sampling(max_tokens=150, seed=5), session=5)
        long.set_result(None)
        return [(starts[5], drawn)]

    async def everything() -> list[list[tuple[list[int], Completion]]]:
        long = asyncio.get_running_loop().create_future()
        return await asyncio.gather(*(short(i, long) for i in range(5)), last(long))

    histories = asyncio.run(asyncio.wait_for(everything(), 60))
    for history in histories:
        for prompt, completion in history:
            assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-4)
    assert engine.stats.prefilled_tokens == sum(map(len, starts)) + 5 * 2
    assert engine._row_of == {5: 0, 1: 1, 2: 2, 3: 3, 4: 4, 0: 5}  # 0 and 5 changed places


def test_rows_move_into_holes_of_ended_sessions_and_change_places_with_waiting_ones():
    model = tiny(dtype=torch.float32)
    engine = HFEngine(model, stop_ids=(), max_context=256)
    starts = prompts(6)
    long = {4: 150, 5: 160}

    async def play(i: int) -> list[tuple[list[int], Completion]]:
        first = await engine.generate(starts[i], Sampling(max_tokens=long.get(i, 4), seed=i), session=i)
        if i == 0:  # ends, and leaves row 0 free; 1 to 3 wait, as for a tool
            engine.release(i)
            return [(starts[i], first)]
        while i < 4 and engine.stats.decode_steps < 145:
            await asyncio.sleep(0)
        prompt = [*starts[i], *first.token_ids, 5]
        return [(starts[i], first), (prompt, await engine.generate(prompt, Sampling(max_tokens=9, seed=i), session=i))]

    async def everything() -> list[list[tuple[list[int], Completion]]]:
        return await asyncio.gather(*map(play, range(6)))

    for history in asyncio.run(asyncio.wait_for(everything(), 60)):
        for prompt, completion in history:
            assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-4)
    assert engine.stats.prefilled_tokens == sum(map(len, starts)) + 5 * 2, "a session's row was lost"
    rows = engine._row_of
    assert {rows[4], rows[5]} == {0, 1}, "the long ones come first"
    assert (rows[1] in (4, 5), rows[2], rows[3]) == (True, 2, 3), "one of them changed places with 1"


@pytest.mark.parametrize(
    ("target", "source"),
    [
        ([1, 2, 3, 6], [0, 0, 0, 5]),
        ([1, 2], [0, 5]),
        ([1, 3], [0, 0]),
        ([0, 4], [7, 6]),
        ([5], [2]),
        ([0, 7], [7, 0]),
        ([1, 2], [2, 3]),
        ([], []),
    ],
)
def test_rows_of_the_cache_are_copied_as_they_were(target: list[int], source: list[int]):
    caches = [RowCache(on_processor=one_by_one) for one_by_one in (True, False)]
    for cache in caches:
        drawn = torch.Generator().manual_seed(0)
        cache.keys, cache.values = ([torch.rand(8, 2, 5, 3, generator=drawn) for _ in range(2)] for _ in range(2))
    before = [tensor.clone() for tensor in (*caches[0].keys, *caches[0].values)]
    for cache in caches:
        cache.move(np.array(target, np.int64), np.array(source, np.int64), 4)
        for tensor, old in zip((*cache.keys, *cache.values), before, strict=True):
            for row in range(8):
                origin = dict(zip(target, source, strict=True)).get(row, row)
                assert torch.equal(tensor[row, :, :4], old[origin, :, :4])
                assert torch.equal(tensor[row, :, 4:], old[row, :, 4:])


def test_a_cancelled_request_frees_its_row():
    engine = HFEngine(tiny(), stop_ids=(), max_rows=1, max_context=4096)

    async def scene() -> Completion:
        endless = asyncio.ensure_future(engine.generate([1], Sampling(max_tokens=4000, seed=0), session="endless"))
        waiting = asyncio.ensure_future(engine.generate([2], Sampling(max_tokens=4000, seed=0), session="waiting"))
        next_one = asyncio.ensure_future(engine.generate([3], Sampling(max_tokens=2, seed=0), session="next"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert engine.stats.decode_steps > 0
        endless.cancel()
        waiting.cancel()
        results = await asyncio.gather(endless, waiting, next_one, return_exceptions=True)
        assert [type(r) for r in results[:2]] == [asyncio.CancelledError] * 2
        return results[2]

    completion = asyncio.run(asyncio.wait_for(scene(), 60))
    assert len(completion.token_ids) == 2
    assert engine.stats.decode_steps < 100


def test_a_released_request_is_cancelled():
    engine = HFEngine(tiny(), stop_ids=(), max_context=4096)

    async def scene() -> None:
        request = asyncio.ensure_future(engine.generate([1], Sampling(max_tokens=4000, seed=0), session=0))
        await asyncio.sleep(0)
        engine.release(0)
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(asyncio.wait_for(scene(), 60))
    engine.release("never seen")
    engine.refresh(1)


# ---- failures ----


def test_a_failure_in_the_model_reaches_everyone_and_the_engine_recovers():
    model = tiny()
    engine = HFEngine(model, stop_ids=(), max_rows=2, max_context=64)
    items = [([1 + i], Sampling(max_tokens=9, seed=i)) for i in range(5)]
    expected = generate_all(engine, items)

    async def scene() -> list[BaseException | Completion]:
        hook = model.get_decoder().norm.register_forward_hook(fail_at_call(3))
        try:
            return await asyncio.gather(
                *(engine.generate(*item, session=i) for i, item in enumerate(items)),
                return_exceptions=True,
            )
        finally:
            hook.remove()

    results = asyncio.run(asyncio.wait_for(scene(), 60))
    assert [str(r) for r in results] == ["broken on purpose"] * 5
    for i in range(5):
        engine.release(i)
    assert generate_all(engine, items) == expected


def fail_at_call(number: int):
    calls = iter(range(1, 10_000))

    def hook(*_: object) -> None:
        if next(calls) >= number:
            raise RuntimeError("broken on purpose")

    return hook


def test_weights_that_are_not_numbers_are_an_error():
    model = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight[4, 0] = math.nan
    with pytest.raises(InputError, match="finite"):
        generate_all(
            HFEngine(model, stop_ids=(), max_context=64),
            [([1], Sampling(max_tokens=2, seed=0))],
        )


@pytest.mark.parametrize(
    ("prompt", "says"),
    [([], "1 to 15"), ([1] * 16, "1 to 15"), ([VOCAB], "in \\[0, 50\\)"), ([-1], "in \\[0")],
)
def test_bad_prompts_are_refused_and_leave_nothing_behind(prompt: list[int], says: str):
    engine = HFEngine(tiny(), stop_ids=(), max_context=16)
    with pytest.raises(InputError, match=says):
        asyncio.run(engine.generate(prompt, Sampling(max_tokens=2, seed=0), session=0))
    engine.refresh(1)
    longest = generate_all(engine, [([1] * 15, Sampling(max_tokens=2, seed=0))])[0]
    assert (len(longest.token_ids), longest.finish) == (1, "length")


def test_two_requests_of_one_session_at_once_are_refused():
    engine = HFEngine(tiny(), stop_ids=(), max_context=64)

    async def scene() -> None:
        sampling = Sampling(max_tokens=5, seed=0)
        await asyncio.gather(*(engine.generate([1], sampling, session=0) for _ in range(2)))

    with pytest.raises(InputError, match="own session"):
        asyncio.run(scene())


def test_models_that_would_come_out_wrong_are_refused():
    def refused(says: str, family: str = "qwen3", **changes: object) -> None:
        model = tiny(family)
        for name, value in changes.items():
            setattr(model.config, name, value)
        with pytest.raises(ConfigError, match=says):
            HFEngine(model, stop_ids=(), max_context=256)

    refused("linear_attention", layer_types=["linear_attention", "full_attention"])
    refused(r"a sliding_window without layer_types \(llama\)", "llama", sliding_window=4)
    refused("use_bidirectional_attention", "gemma 3", use_bidirectional_attention=True)
    refused("'flash_attention_2'", _attn_implementation="flash_attention_2")
    refused("beyond 128 tokens those of rope_type 'longrope' do; got a context of 256", "phi 3, longrope")
    with pytest.raises(ConfigError, match="stop_ids"):
        HFEngine(tiny(), stop_ids=[VOCAB], max_context=64)
    with pytest.raises(ConfigError, match="max_rows"):
        HFEngine(tiny(), stop_ids=(), max_rows=0, max_context=64)


def test_rotary_frequencies_of_each_kind_of_layer_are_looked_at():
    model = tiny("gemma 3")
    model.config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    with pytest.raises(ConfigError, match="'dynamic'"):
        HFEngine(model, stop_ids=(), max_context=300)
    HFEngine(model, stop_ids=(), max_context=256)


# ---- new weights ----


def test_refresh_forgets_the_old_weights():
    model, other = tiny(dtype=torch.float32), tiny(dtype=torch.float32, seed=1)
    engine = HFEngine(model, stop_ids=(), max_context=64)
    item = ([1, 2, 3, 4], Sampling(max_tokens=6, seed=0))
    generate_all(engine, [item])
    model.load_state_dict(other.state_dict())
    engine.refresh(7)
    assert engine.policy_version == 7
    completion = generate_all(engine, [item])[0]
    assert completion.logprobs == pytest.approx(full_logprobs(other, item[0], completion.token_ids), abs=1e-4)


def test_refresh_with_a_session_alive_is_a_bug():
    engine = HFEngine(tiny(), stop_ids=(), max_context=64)
    asyncio.run(engine.generate([1], Sampling(max_tokens=2, seed=0), session=0))
    with pytest.raises(AssertionError, match="1 sessions alive"):
        engine.refresh(1)
    engine.release(0)
    engine.refresh(1)


def test_drawing_leaves_the_models_mode_and_gradients_alone():
    model = tiny().train()
    engine = HFEngine(model, stop_ids=(), max_context=64)
    generate_all(engine, [([1, 2], Sampling(max_tokens=3, seed=0))])
    assert model.training
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
