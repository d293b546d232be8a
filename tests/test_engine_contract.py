"""What every engine keeps: the scripted one, the in-process one, and vLLM's against a stand-in for the package."""

import asyncio
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import fake_vllm
from turnwise.chat import byte_chat
from turnwise.engine import Completion, Sampling, ScriptedEngine
from turnwise.engines.hf import HFEngine
from turnwise.engines.vllm import VLLMEngine
from turnwise.errors import ConfigError, InputError

VOCAB = 259
CONTEXT = 64
END = byte_chat().end_id
PROMPT = list(b"What?")
MODELLED = ["hf", "vllm"]
"""The engines behind which a model stands."""
ENGINES = ["scripted", *MODELLED]


def tiny(seed: int = 0) -> Qwen3ForCausalLM:
    """A random model of two layers over bytes."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny()


Make = Callable[..., Any]


@pytest.fixture
def make(request: pytest.FixtureRequest, model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes the engine that the test is run for; of a model's, `stop_ids` may be given."""
    kind: str = request.param
    if kind == "scripted":
        return lambda **_: ScriptedEngine(lambda prompt: f"Reply to {len(prompt)}: {prompt[:3]}.", byte_chat())
    fake_vllm.install(monkeypatch)
    engine: Any = {"hf": HFEngine, "vllm": VLLMEngine}[kind]
    return lambda **options: engine(
        options.pop("model", model), **{"stop_ids": [END], "max_context": CONTEXT, **options}
    )


def sampling(**options: Any) -> Sampling:
    return Sampling(**{"max_tokens": 12, "seed": 3, **options})


def drawn(engine: Any, prompt: list[int] = PROMPT, *, session: object = 0, **options: Any) -> Completion:
    """One completion; its session is released."""

    async def one() -> Completion:
        try:
            return await engine.generate(prompt, sampling(**options), session=session)
        finally:
            engine.release(session)

    return asyncio.run(one())


def full_logprobs(model: Any, prompt: list[int], ids: tuple[int, ...], temperature: float) -> list[float]:
    """By one pass over everything."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0].double()
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + k, token]) for k, token in enumerate(ids)]


def alike(found: Completion, expected: Completion) -> bool:
    """The same tokens, and log-probabilities up to the rounding of batches of other sizes."""
    same = (found.token_ids, found.finish) == (expected.token_ids, expected.finish)
    return same and found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


every_engine = pytest.mark.parametrize("make", ENGINES, indirect=True)
every_model = pytest.mark.parametrize("make", MODELLED, indirect=True)


# ---- ids and log-probabilities ----


@every_engine
def test_a_completion_has_a_logprob_for_every_token_and_a_reason(make: Make):
    completion = drawn(make())
    assert 1 <= len(completion.token_ids) <= 12
    assert len(completion.logprobs) == len(completion.token_ids)
    assert all(math.isfinite(value) and value <= 0 for value in completion.logprobs)
    assert all(type(token) is int and 0 <= token < VOCAB for token in completion.token_ids)
    assert completion.finish == ("stop" if completion.token_ids[-1] == END else "length")


@every_model
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(make: Make, model: Any, temperature: float):
    completion = drawn(make(stop_ids=()), temperature=temperature)
    expected = full_logprobs(model, PROMPT, completion.token_ids, temperature)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@every_engine
def test_the_next_turn_goes_on_from_the_ids_of_the_last(make: Make):
    engine = make()

    async def two_turns() -> tuple[list[int], Completion]:
        first = await engine.generate(PROMPT, sampling(), session="a")
        longer = [*PROMPT, *first.token_ids, *b"so?"]
        second = await engine.generate(longer, sampling(seed=8), session="a")
        engine.release("a")
        return longer, second

    longer, second = asyncio.run(two_turns())
    assert alike(second, drawn(engine, longer, session="fresh", seed=8))


@every_model
def test_logprobs_stay_right_over_turns(make: Make, model: Any):
    engine = make(stop_ids=())
    ids = list(PROMPT)

    async def turns() -> None:
        for turn in range(3):
            completion = await engine.generate(ids, sampling(seed=turn, max_tokens=5), session="a")
            assert completion.logprobs == pytest.approx(full_logprobs(model, ids, completion.token_ids, 1.0), abs=1e-4)
            ids.extend([*completion.token_ids, *b"ok"])
        engine.release("a")

    asyncio.run(turns())


# ---- finish ----


@every_engine
def test_a_budget_of_tokens_cuts_a_completion_off(make: Make):
    whole = drawn(make(), temperature=0.0, max_tokens=30)
    cut = drawn(make(), temperature=0.0, max_tokens=2)
    assert (cut.token_ids, cut.finish) == (whole.token_ids[:2], "length")


@every_model
def test_the_stop_token_ends_a_completion_and_is_part_of_it(make: Make):
    free = drawn(make(stop_ids=()), temperature=0.0)
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    stopped = drawn(make(stop_ids=[stop]), temperature=0.0)
    assert (stopped.token_ids, stopped.finish) == (free.token_ids[: first + 1], "stop")
    assert stopped.logprobs == pytest.approx(free.logprobs[: first + 1], abs=1e-6)


@every_model
def test_the_context_bounds_a_completion(make: Make):
    completion = drawn(make(stop_ids=()), max_tokens=999)
    assert (len(completion.token_ids), completion.finish) == (CONTEXT - len(PROMPT), "length")


# ---- seeds, sessions ----


@every_engine
def test_equal_seeds_draw_alike(make: Make):
    engine = make()
    assert drawn(engine, seed=5) == drawn(engine, seed=5, session="other")
    assert drawn(engine, seed=2**64 - 1).token_ids  # as `rollout_seed` gives them


@every_model
def test_other_seeds_draw_otherwise(make: Make):
    engine = make()
    assert len({drawn(engine, seed=seed).token_ids for seed in (0, 1, 2**63 + 5)}) == 3


@every_engine
def test_many_at_once_come_to_what_each_comes_to_alone(make: Make):
    engine = make()
    prompts = [list(f"{n}, {n * n}".encode()) for n in range(9)]

    async def together() -> list[Completion]:
        jobs = (engine.generate(p, sampling(seed=i), session=i) for i, p in enumerate(prompts))
        return await asyncio.wait_for(asyncio.gather(*jobs), 30)

    found = asyncio.run(together())
    for i in range(len(prompts)):
        engine.release(i)
    for i, prompt in enumerate(prompts):
        assert alike(found[i], drawn(engine, prompt, seed=i))


@every_engine
def test_releasing_forgets_and_an_unknown_session_is_no_error(make: Make):
    engine = make()
    engine.release("never seen")
    first = drawn(engine, session="a")
    engine.release("a")
    assert drawn(engine, session="a") == first


@every_engine
def test_a_fork_draws_what_a_conversation_of_its_own_would(make: Make):
    engine = make()

    async def forked() -> tuple[list[int], Completion]:
        first = await engine.generate(PROMPT, sampling(), session="a")
        longer = [*PROMPT, *first.token_ids, *b"so?"]
        engine.fork("a", "b")
        second = await engine.generate(longer, sampling(seed=8), session="b")
        engine.release("a")
        engine.release("b")
        return longer, second

    longer, second = asyncio.run(forked())
    assert alike(second, drawn(engine, longer, seed=8))


@every_engine
def test_a_fork_needs_a_new_session(make: Make):
    engine = make()

    async def forked() -> None:
        await engine.generate(PROMPT, sampling(), session="a")
        await engine.generate(PROMPT, sampling(), session="b")
        with pytest.raises(InputError, match="must be a new session; 'b' is one already"):
            engine.fork("a", "b")

    asyncio.run(forked())


@every_engine
def test_whoever_watches_is_told_every_token_in_order(make: Make):
    engine, told = make(), []

    async def watched() -> Completion:
        first = engine.generate(PROMPT, sampling(), session=0, watch=told.append)
        others = [engine.generate(PROMPT, sampling(seed=s), session=s) for s in range(1, 5)]
        return (await asyncio.gather(first, *others))[0]

    completion = asyncio.run(watched())
    assert tuple(told) == completion.token_ids
    for session in range(5):
        engine.release(session)
    assert alike(completion, drawn(engine))


# ---- errors ----


@every_model
@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "a prompt must have 1 to 63 tokens"),
        ([1] * CONTEXT, "got 64"),
        ([1, VOCAB], "token ids must be in [0, 259); got 1 to 259"),
        ([-1, 4], "got -1 to 4"),
    ],
)
def test_bad_prompts_are_refused_and_leave_nothing_behind(make: Make, prompt: list[int], says: str):
    engine = make()
    with pytest.raises(InputError) as caught:
        drawn(engine, prompt)
    assert says in str(caught.value)
    engine.refresh(1)


@every_model
def test_two_requests_of_one_session_at_once_are_refused(make: Make):
    engine = make()

    async def both() -> list[Any]:
        jobs = (engine.generate(PROMPT, sampling(), session="a") for _ in range(2))
        return await asyncio.gather(*jobs, return_exceptions=True)

    first, second = asyncio.run(both())
    assert isinstance(first, Completion)
    with pytest.raises(InputError, match="must wait for its answer"):
        raise second


@every_model
def test_a_cancelled_request_is_forgotten_and_the_others_go_on(make: Make):
    engine = make(stop_ids=())

    async def cancelled() -> Completion:
        other = asyncio.create_task(engine.generate(PROMPT, sampling(), session="b"))
        task = asyncio.create_task(engine.generate(PROMPT, sampling(max_tokens=50), session="a"))
        for _ in range(4):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await asyncio.wait_for(other, 10)

    assert alike(asyncio.run(cancelled()), drawn(make(stop_ids=())))
    engine.release("b")
    engine.refresh(1)


@every_model
def test_a_released_request_is_cancelled(make: Make):
    engine = make(stop_ids=())

    async def released() -> None:
        task = asyncio.create_task(engine.generate(PROMPT, sampling(max_tokens=50), session="a"))
        for _ in range(4):
            await asyncio.sleep(0)
        engine.release("a")
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(released())
    engine.refresh(1)


@every_model
def test_a_failure_in_the_model_reaches_everyone_and_the_engine_recovers(make: Make):
    model = tiny()
    engine = make(model=model, stop_ids=())
    expected = drawn(engine)
    inside = engine._llm._model if isinstance(engine, VLLMEngine) else model
    hook = inside.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("burnt")))

    async def both() -> list[Any]:
        jobs = (engine.generate([*PROMPT, n], sampling(), session=n) for n in range(2))
        return await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 10)

    assert [str(error) for error in asyncio.run(both())] == ["burnt", "burnt"]
    hook.remove()
    engine.release(0)
    engine.release(1)
    assert drawn(engine) == expected


@every_model
def test_weights_that_are_not_numbers_are_an_error(make: Make):
    model = tiny()
    engine = make(model=model)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    engine.refresh(1)
    with pytest.raises(InputError, match="the model must give finite logits"):
        drawn(engine)


# ---- weights ----


@every_model
def test_after_a_refresh_the_new_weights_speak_and_the_version_says_so(make: Make):
    model = tiny()
    engine = make(model=model, stop_ids=())
    assert engine.policy_version == 0
    before = drawn(engine)
    with torch.no_grad():
        for new, old in zip(tiny(seed=7).parameters(), model.parameters(), strict=True):
            old.copy_(new)
    engine.refresh(4)
    after = drawn(engine)
    assert engine.policy_version == 4
    assert after.token_ids != before.token_ids
    assert after.logprobs == pytest.approx(full_logprobs(model, PROMPT, after.token_ids, 1.0), abs=1e-4)


@every_model
def test_refresh_with_a_session_alive_is_a_bug(make: Make):
    engine = make()

    async def alive() -> None:
        await engine.generate(PROMPT, sampling(), session="a")
        with pytest.raises(AssertionError, match="1 sessions alive"):
            engine.refresh(1)

    asyncio.run(alive())


# ---- vLLM alone ----


@pytest.mark.parametrize("make", ["vllm"], indirect=True)
def test_vllm_stays_in_the_process_and_starts_with_the_trainers_weights(make: Make, model: Any):
    engine = make()
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    theirs = dict(engine._llm._model.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in model.named_parameters())
    assert "lm_head.weight" not in theirs  # tied: it is given once


@pytest.mark.parametrize("make", ["vllm"], indirect=True)
def test_vllm_computes_what_turns_and_prompts_have_in_common_once(make: Make):
    engine = make(stop_ids=())
    core = engine._llm.llm_engine

    async def group() -> Completion:
        jobs = (engine.generate(PROMPT, sampling(max_tokens=3, seed=s), session=s) for s in range(4))
        first, *_ = await asyncio.gather(*jobs)
        before = core.fed
        await engine.generate([*PROMPT, *first.token_ids, 8, 9], sampling(max_tokens=1), session=0)
        assert core.fed - before == 3  # the last token drawn, which was never fed, and the reply
        return first

    asyncio.run(group())


@pytest.mark.parametrize("make", ["vllm"], indirect=True)
def test_vllm_drops_requests_that_nobody_waits_for(make: Make):
    engine = make(stop_ids=())
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(engine.generate(PROMPT, sampling(max_tokens=50), session="a"), 0.0001))
    assert not engine._llm.llm_engine.requests


def test_without_vllm_the_engine_says_how_to_get_it(model: Any):
    with pytest.raises(ConfigError, match=r'pip install "turnwise\[vllm\]"'):
        VLLMEngine(model, stop_ids=[END], max_context=CONTEXT)


@pytest.mark.parametrize("make", ["vllm"], indirect=True)
def test_what_vllm_refuses_is_one_line(make: Make):
    with pytest.raises(ConfigError, match=r"must be able to hold the model; it cannot \(ValueError: gpu_mem"):
        make(memory_share=2.0)
