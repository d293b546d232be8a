"""Playing tasks: what is recorded is what the engine saw, and every ending is a fact."""

import asyncio
import json

import numpy as np
import pytest

from turnwise.chat import byte_chat
from turnwise.engine import Completion, Sampling, ScriptedEngine
from turnwise.env import Step, ToolEnvironment
from turnwise.errors import InputError
from turnwise.rollout import Limits, awaited, rollout_seed, run_groups, run_rollout
from turnwise.tools import tool, tool_mapping
from turnwise.types import Action, Message, Rollout, Task, rollout_from_json

CHAT = byte_chat()
TASK = Task(id="kenya", question="What is the capital of Kenya?", answers=("Nairobi",))
LIMITS = Limits(max_turn_tokens=200, context=4000, max_turns=3)


def search(query: str) -> str:
    """Passages about the query."""
    if query == "fail":
        raise RuntimeError("no index")
    return f"About {query}: <|im_end|> Nairobi é. " + "x" * (3000 if query == "long" else 0)


async def wait(query: str) -> str:
    """The query, later."""
    await asyncio.sleep(0.001 * (len(query) % 3))
    return query


TOOLS = tool_mapping([tool(search, result_cap=10_000), tool(wait)])


def call(query: str, name: str = "search") -> str:
    return f"<tool>{json.dumps({'name': name, 'args': {'query': query}})}</tool>"


def answer(text: str) -> str:
    return f"<answer>{text}</answer>"


class Recorder:
    """A scripted engine that keeps what it was given and what it gave."""

    def __init__(self, replies) -> None:
        self.inner = ScriptedEngine(replies, CHAT)
        self.policy_version = 5
        self.seen: list[tuple[tuple[int, ...], Sampling, Completion]] = []
        self.released: list[object] = []

    async def generate(self, prompt_ids, sampling, *, session):
        completion = await self.inner.generate(prompt_ids, sampling, session=session)
        self.seen.append((tuple(prompt_ids), sampling, completion))
        return completion

    def release(self, session) -> None:
        self.released.append(session)


def played(*replies: str, limits: Limits = LIMITS, environment=None, max_turns: int = 3) -> Rollout:
    environment = environment or ToolEnvironment(TASK, TOOLS, max_turns=max_turns)
    engine = ScriptedEngine(list(replies), CHAT)
    return asyncio.run(run_rollout(TASK, environment, engine, CHAT, limits=limits))


def test_recorded_tokens_are_exactly_what_the_engine_saw():
    engine = Recorder([call("Kenya"), call("Peru"), answer("Nairobi")])
    environment = ToolEnvironment(TASK, TOOLS, max_turns=3)
    rollout = asyncio.run(run_rollout(TASK, environment, engine, CHAT, limits=LIMITS, seed=9, group=4, temperature=0.5))
    ids = rollout.prompt_ids
    for turn, (prompt, _, completion) in zip(rollout.turns, engine.seen, strict=True):
        assert prompt == ids
        assert turn.action_ids == completion.token_ids
        assert turn.sampling_logprobs == completion.logprobs
        ids = (*ids, *turn.action_ids, *turn.reply_ids)
    assert (rollout.stop, rollout.answer, rollout.group, rollout.policy_version) == ("answer", "Nairobi", 4, 5)
    assert rollout.num_tokens == len(ids)
    assert rollout.turns[-1].reply_ids == ()
    assert len(engine.released) == 1
    assert {s.temperature for _, s, _ in engine.seen} == {0.5}
    assert len({s.seed for _, s, _ in engine.seen}) == 3, "every turn draws from its own seed"


def test_the_conversation_in_tokens_is_the_conversation_in_messages():
    rollout = played(call("Kenya"), answer("Nairobi"))
    assert rollout.turns[0].result is not None
    messages = [
        *ToolEnvironment(TASK, TOOLS).start(),
        Message(role="assistant", content=call("Kenya")),
        Message(role="user", content=f"<result>\n{rollout.turns[0].result.text}\n</result>"),
    ]
    first = rollout.turns[0]
    assert [*rollout.prompt_ids, *first.action_ids, *first.reply_ids] == CHAT.prompt_ids(messages)
    assert first.reply_ids.count(CHAT.end_id) == 1, "the tool's own <|im_end|> is text"


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("<tool>broken</tool>", "parse"),
        (call("x", name="serch"), "unknown_tool"),
        ('<tool>{"name": "search", "args": {"q": 1}}</tool>', "bad_arguments"),
        (call("fail"), "exception"),
    ],
)
def test_a_failed_call_is_an_observation_and_the_rollout_goes_on(reply: str, error: str):
    rollout = played(reply, answer("Nairobi"))
    assert rollout.turns[0].result is not None
    assert rollout.turns[0].result.error == error
    assert (rollout.stop, len(rollout.turns)) == ("answer", 2)


def test_a_call_in_the_last_granted_turn_stops_with_max_turns():
    rollout = played(call("a"), call("b"), max_turns=2)
    assert (rollout.stop, rollout.answer, len(rollout.turns)) == ("max_turns", None, 2)
    assert rollout.turns[1].result is None
    assert rollout.turns[1].reply_ids == ()


def test_a_message_without_call_or_answer_ends_the_rollout():
    assert played("Nairobi").stop == "no_action"


def test_a_turn_that_is_cut_off_stops_with_max_tokens():
    rollout = played(answer("Nairobi"), limits=Limits(max_turn_tokens=12, context=4000))
    assert rollout.stop == "max_tokens"
    assert rollout.turns[0].text == "<answer>Nair"
    assert rollout.turns[0].action == Action()
    assert rollout.answer is None


@pytest.mark.parametrize("room", [0, 1, 7, 500])
def test_a_long_result_is_cut_so_that_the_last_turn_has_its_tokens(room: int):
    prompt = len(CHAT.prompt_ids(ToolEnvironment(TASK, TOOLS).start()))
    action = len(CHAT.encode_text(call("long"))) + 1
    context = prompt + action + CHAT.empty_reply_length + room + 200
    limits = Limits(max_turn_tokens=200, context=context, max_turns=2)
    rollout = played(call("long"), answer("x" * 183), limits=limits, max_turns=2)  # 183 + 17 = 200
    assert rollout.stop == "max_tokens", "201 tokens with the closing one"
    assert rollout.num_tokens == context
    assert len(rollout.turns[0].reply_ids) == CHAT.empty_reply_length + room
    assert played(call("long"), answer("x" * 182), limits=limits, max_turns=2).stop == "answer"


def test_long_results_leave_room_for_all_turns_that_are_granted():
    prompt = len(CHAT.prompt_ids(ToolEnvironment(TASK, TOOLS).start()))
    context = prompt + 4 * 200 + 3 * CHAT.empty_reply_length
    limits = Limits(max_turn_tokens=200, context=context, max_turns=4)
    padded = call("long") + "y" * (199 - len(call("long")))  # a turn of just 200 tokens
    rollout = played(padded, padded, padded, answer("x" * 181), limits=limits, max_turns=4)
    assert (rollout.stop, len(rollout.turns)) == ("answer", 4)
    assert rollout.num_tokens <= context


def test_where_not_even_an_empty_reply_fits_the_rollout_stops():
    prompt = len(CHAT.prompt_ids(ToolEnvironment(TASK, TOOLS).start()))
    limits = Limits(max_turn_tokens=200, context=prompt + 210)
    rollout = played(call("long"), answer("x"), limits=limits)
    assert (rollout.stop, len(rollout.turns)) == ("max_tokens", 1)
    assert rollout.turns[0].result is not None
    assert rollout.turns[0].reply_ids == ()


class Failing:
    """An environment whose start or second step fails."""

    def __init__(self, *, at_start: bool) -> None:
        self.at_start, self.steps = at_start, 0

    def start(self) -> tuple[Message, ...]:
        if self.at_start:
            raise ConnectionError("refused:\nport 80")
        return (Message(role="user", content="go"),)

    async def step(self, text: str) -> Step:
        self.steps += 1
        if self.steps == 2:
            raise ConnectionError("refused:\nport 80")
        return Step(action=Action(), reply=(Message(role="user", content="on"),))


def test_a_failing_environment_is_recorded_with_what_was_played():
    rollout = played("a", "b", environment=Failing(at_start=False))
    assert (rollout.stop, rollout.error) == ("error", "ConnectionError: refused: port 80")
    assert [turn.text for turn in rollout.turns] == ["a", "b"]
    assert not rollout.terminated
    assert rollout_from_json(rollout.to_json()) == rollout


def test_an_environment_that_cannot_start_is_recorded_without_turns():
    rollout = played("a", environment=Failing(at_start=True))
    assert (rollout.stop, rollout.error) == ("error", "ConnectionError: refused: port 80")
    assert (rollout.turns, rollout.prompt_ids) == ((), ())


def test_one_failing_environment_leaves_the_others_alone():
    environments = iter([Failing(at_start=True), ToolEnvironment(TASK, TOOLS)])
    engine = ScriptedEngine([answer("Nairobi")], CHAT)
    (group,) = asyncio.run(run_groups([TASK], lambda _: next(environments), engine, CHAT, group_size=2, limits=LIMITS))
    assert [r.stop for r in group] == ["error", "answer"]


def test_a_failing_engine_is_raised_as_itself_and_sessions_are_released():
    engine = Recorder([call("a")])  # a second call finds no reply: InputError
    with pytest.raises(InputError, match="must have a reply"):
        asyncio.run(
            run_groups(
                [TASK] * 3,
                lambda task: ToolEnvironment(task, TOOLS),
                engine,
                CHAT,
                group_size=2,
                limits=LIMITS,
            )
        )
    assert len(engine.released) == 6


def test_a_prompt_without_room_for_a_turn_is_refused():
    with pytest.raises(InputError, match=r"task 'kenya' must leave room for a turn of 200") as caught:
        played(answer("x"), limits=Limits(max_turn_tokens=200, context=300))
    assert "\n" not in str(caught.value)


def test_many_rollouts_with_a_slow_tool_keep_their_conversations_apart():
    tasks = [Task(id=f"t{i}", question=f"Question {i}.", answers=("x",)) for i in range(25)]
    replies = {t.question: [call(t.id, name="wait"), answer(t.id)] for t in tasks}
    groups = asyncio.run(
        run_groups(
            tasks,
            lambda task: ToolEnvironment(task, TOOLS),
            ScriptedEngine(replies, CHAT),
            CHAT,
            group_size=4,
            limits=LIMITS,
        )
    )
    assert [[r.task_id for r in group] for group in groups] == [[t.id] * 4 for t in tasks]
    assert [[r.group for r in group] for group in groups] == [[i] * 4 for i in range(25)]
    for task, group in zip(tasks, groups, strict=True):
        for rollout in group:
            assert rollout.turns[0].result is not None
            assert (rollout.turns[0].result.text, rollout.answer) == (task.id, task.id)


def test_a_coroutine_is_waited_for_with_and_without_a_running_loop():
    async def seven() -> int:
        await asyncio.sleep(0)
        return 7

    async def as_in_a_notebook() -> int:
        return awaited(seven())

    assert awaited(seven()) == 7
    assert asyncio.run(as_in_a_notebook()) == 7
    with pytest.raises(ZeroDivisionError):
        awaited(divided())


async def divided() -> float:
    return 1 / 0


def test_seeds_are_stable_and_differ_between_runs_steps_groups_and_members():
    parts = [(seed, step, group, member) for seed in (0, 1) for step in (0, 1) for group in (0, 1) for member in (0, 1)]
    assert len({rollout_seed(*p) for p in parts}) == 16
    assert rollout_seed(1, 2) == rollout_seed(1, 2)
    assert rollout_seed(1) != rollout_seed(1, 0)


@pytest.mark.parametrize("parts", [(), (0,), (1, 2, 3), (2**32 - 1, 2**32), (2**64 - 1, 0, 2**40 + 5), (7, 2**200)])
def test_seeds_are_numpys_for_the_parts_behind_their_number(parts: tuple[int, ...]):
    expected = np.random.SeedSequence([len(parts), *parts]).generate_state(1, np.uint64)[0]
    assert rollout_seed(*parts) == expected
    assert rollout_seed(1, int(np.int32(5))) == rollout_seed(np.int32(1), np.int32(5))  # type: ignore[arg-type]


def test_a_seed_of_negative_parts_is_refused():
    with pytest.raises(ValueError, match=r"negative; got \(3, -1\)"):
        rollout_seed(3, -1)


def test_a_rollouts_seeds_do_not_depend_on_how_many_others_run():
    def seeds(size: int) -> list[int]:
        engine = Recorder([answer("x")])
        make = lambda task: ToolEnvironment(task, TOOLS)  # noqa: E731
        asyncio.run(run_groups([TASK] * 2, make, engine, CHAT, group_size=size, limits=LIMITS, seed=(3, 1)))
        return [s.seed for _, s, _ in engine.seen]

    few, many = seeds(2), seeds(5)
    assert [few[0], few[1], few[2], few[3]] == [many[0], many[1], many[5], many[6]]
    assert len(set(many)) == 10
