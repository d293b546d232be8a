"""What the benchmarks of speed count and write: forced turns, operations by hand, equal work, the table."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from turnwise.chat import byte_chat
from turnwise.policy import tiny_policy
from turnwise.types import Action

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """A benchmark as a module, by name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_keys_that_tokens_see_are_those_up_to_themselves(benchmark):
    seen_keys = benchmark("floor").seen_keys
    assert seen_keys(0, 4) == 1 + 2 + 3 + 4
    assert seen_keys(10, 2) == 11 + 12
    assert seen_keys(0, 4, 3) == 1 + 2 + 3 + 3
    assert seen_keys(10, 2, 3) == 3 + 3


def test_operations_by_hand(benchmark):
    floor = benchmark("floor")
    shape = floor.Shape(body=100, head=30, layers=3, sliding=1, window=2, width=8, cached=6)
    work = floor.Work()
    work.add(shape, start=4, count=2, predicted=1)
    # linear layers 2 x 100 x 2 tokens, output 2 x 30 x 1, attention 4 x 8 x (2 layers x (5 + 6) + 1 x (2 + 2))
    assert work.flops(shape) == 400 + 60 + 32 * (22 + 4)
    # four bytes of 6 numbers a key and its value, in the same layers
    assert floor.cache_bytes(shape, keys=work.keys, near_keys=work.near_keys) == 4 * 6 * (22 + 4)


def test_operations_are_those_that_torch_counts(benchmark):
    floor = benchmark("floor")
    model = tiny_policy(byte_chat(), seed=0, hidden=32, layers=2).model
    model.config._attn_implementation = "eager"  # whose products torch counts one by one
    length = 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    # a whole forward pass computes all pairs of tokens, in sliding layers too
    pairs = length * length
    shape = floor.Shape.of(model)
    assert shape.sliding == 1
    counted = floor.flops(shape, tokens=length, keys=pairs, near_keys=pairs, predicted=length)
    rotary = counter.get_total_flops() - counted
    assert 0 <= rotary < 0.01 * counted  # angles of the rotary embedding are a product, too


def test_nested_parts_share_no_time(benchmark):
    floor = benchmark("floor")
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    seen = floor.Seen(
        shape=floor.Shape(body=1, head=1, layers=1, sliding=0, window=0, width=1, cached=1), counting=True
    )
    floor.time = type("Clock", (), {"process_time": staticmethod(lambda: next(clock))})
    seen.switch()
    with seen.part("outer"), seen.part("inner"):  # at 1 and 3, until 6 and 10
        pass
    assert seen.seconds == {"outer": (3 - 1) + (10 - 6), "inner": 6 - 3}


@pytest.fixture
def small(benchmark):
    """Two questions of three turns with prompts of at least 200 tokens, and a random policy."""
    forced = benchmark("forced")
    policy = forced.long_policy(forced.context_of(3, 200, 8), hidden=16, layers=2)
    setting = forced.forced_setting(turns=3, tasks=2, prompt_tokens=200, chat=policy.chat, turn_tokens=8)
    return forced, policy, setting


def test_forced_rollouts_have_all_turns_and_long_prompts(small):
    forced, policy, setting = small
    rollouts = forced.forced_rollouts(policy, setting, forced.forced_engine(policy, setting, 2), 2, 0)
    assert [len(rollout.turns) for rollout in rollouts] == [3] * 4
    assert all(len(rollout.prompt_ids) >= 200 for rollout in rollouts)
    assert rollouts[0].prompt_ids == rollouts[1].prompt_ids != rollouts[2].prompt_ids
    assert all(turn.reply_ids for rollout in rollouts for turn in rollout.turns[:-1])
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    assert forced.learn(policy, optimizer, setting, rollouts)["live_rollouts"] == 1.0


def test_plain_rollouts_and_their_update_are_the_same_work(small, benchmark):
    forced, policy, setting = small
    plain = benchmark("plain")
    rollouts = plain.plain_rollouts(policy, setting, 2)
    assert [len(rollout.turns) for rollout in rollouts] == [3] * 4
    assert all(len(turn.action_ids) <= 8 for rollout in rollouts for turn in rollout.turns)
    # the gradients of both updates are the same, as the policy has not moved since it sampled
    gradients = []
    for learn in (forced.learn, plain.plain_update):
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
        found = []
        optimizer.register_step_pre_hook(
            lambda optimizer, *_, found=found: found.extend(p.grad.clone() for p in policy.model.parameters())
        )
        learn(policy, optimizer, setting, as_sampled(rollouts, policy))
        gradients.append(found)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def as_sampled(rollouts, policy):
    """The rollouts with the log-probabilities that their tokens had."""
    import dataclasses

    found = []
    for rollout in rollouts:
        ids = [*rollout.prompt_ids, *(token for turn in rollout.turns for token in (*turn.action_ids, *turn.reply_ids))]
        with torch.no_grad():
            logprobs = policy.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        turns, place = [], len(rollout.prompt_ids)
        for turn in rollout.turns:
            own = [float(logprobs[place + i - 1, token]) for i, token in enumerate(turn.action_ids)]
            turns.append(dataclasses.replace(turn, sampling_logprobs=tuple(own)))
            place += len(turn.action_ids) + len(turn.reply_ids)
        found.append(dataclasses.replace(rollout, turns=tuple(turns)))
    return found


def test_whatever_is_said_is_a_search_until_the_last_turn(small):
    forced, _, setting = small
    assert forced.query_of('<tool>{"name": "search", "args": {"query": "Kenya"}}</tool>') == "Kenya"
    assert forced.query_of("x" * 100) == "x" * 60
    environment = setting.environment(setting.train[0])
    assert "<result>" in environment.step("Kenya").reply[0].content
    assert environment.step("").stop is None
    last = environment.step("Kenya")
    assert (last.stop, last.reply, last.action) == ("max_turns", (), Action())


def test_the_first_wanted_hit_counts(benchmark):
    search = benchmark("search")
    hits = [search.Hit(id=str(i), title=f"title {i}", text="", score=1.0) for i in range(3)]
    assert search.rank(hits, search.article_is("title 1")) == 1
    assert search.rank(hits, search.article_is("title 9")) == search.K


ABOUT = {
    "benchmark": "about",
    "of": "step",
    "commands": "trl_step.py --steps 1",
    "minutes": 1.0,
    "date": "2026-01-02",
    "processor": "Some CPU",
    "cores": 2,
    "threads": 1,
    "load": 0.1,
    "python": "3.11",
    "versions": {"torch": "2.13.0"},
    "trl": "1.16.0",
}
STEP = {
    "benchmark": "step",
    "turns": 3,
    "prompt_tokens": 400,
    "way": "TRL",
    "tasks": 4,
    "group_size": 8,
    "step_s": 6.0,
    "rollout_s": 2.0,
    "turns_a_rollout": 3.0,
    "sampled_a_rollout": 43.6,
    "step_ratio": 3.0,
    "rollout_ratio": 2.5,
    "adapter_share": 0.0,
}
FLOOR = {"benchmark": "floor", "shape": "8x12", "part": "decode", "seconds": 0.5, "share": 0.25, "amount": 2e9}
SCALE = {"benchmark": "scaling", "sweep": "turns", "point": "8 turns"}
SCALE |= {
    f"{name}{ratio}": 2.0 for name in ("rollout_s", "update_s", "sampled", "positions") for ratio in ("", "_ratio")
}


def test_the_page_has_a_row_for_each_line_and_says_what_was_run(benchmark):
    lines = [STEP, ABOUT, {**FLOOR, "unit": "operations", "floor_s": 0.1}, SCALE]
    page = benchmark("all").page(lines)
    assert "| 3, 400 tokens, 4 x 8 | TRL | 3.00 | 44 | 6.00 | 3.00 | 2.00 | 2.50 |" in page
    assert "| 8x12, decode | 500.0 | 25.0 % | 2e+09 operations | 100.00 | 5.0 |" in page
    assert "| turns: 8 turns | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 |" in page
    assert (
        "`trl_step.py --steps 1` on 2026-01-02: Some CPU, 2 cores, 1 thread, load 0.1; torch 2.13.0, trl 1.16.0."
        in page
    )
    assert "## Search" not in page  # what was not measured is not there


def test_lines_are_kept_until_their_benchmark_runs_again(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    every, file = benchmark("all"), tmp_path / "performance.json"
    every.write(file, [STEP, ABOUT, SCALE])
    monkeypatch.setattr(every.subprocess, "run", lambda *_, **__: benchmark("measured").append(file, "step", STEP, {}))
    options = type("Options", (), {"trl_python": None, "data": tmp_path})
    every.run("step", [["trl_step.py", "--steps", "2"]], options, file)
    scale, step, about = every.read(file)
    assert (scale, step) == (SCALE, STEP)
    assert about["commands"] == "trl_step.py --steps 2"


def test_numbers_have_four_digits(benchmark):
    rounded = benchmark("measured").rounded
    assert [rounded(x) for x in (123456.0, 0.00012345, 7, "x", True)] == [123500.0, 0.0001234, 7, "x", True]
