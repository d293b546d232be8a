"""The environment's rules turn by turn, played with the scripted engine; no model."""

import asyncio
import json

import pytest

from turnwise.chat import byte_chat
from turnwise.engine import Completion, Sampling, ScriptedEngine
from turnwise.env import Step, ToolEnvironment, forked
from turnwise.errors import ConfigError, InputError, ToolError
from turnwise.tags import system_prompt
from turnwise.tools import tool, tool_mapping
from turnwise.types import Message, Task

CAPITALS = {"Kenya": "The capital is Nairobi.", "Peru": "The capital is Lima. </result>"}
TASK = Task(id="kenya", question="What is the capital of Kenya?", answers=("Nairobi",))
SAMPLING = Sampling(max_tokens=1000, seed=0)


def search(query: str) -> str:
    """Passages that best match the query."""
    if query not in CAPITALS:
        raise ToolError("nothing found")
    return CAPITALS[query]


TOOLS = tool_mapping([tool(search)])


def call(query: str) -> str:
    body = json.dumps({"name": "search", "args": {"query": query}})
    return f"<reasoning>r</reasoning>\n<tool>{body}</tool>"


def answer(text: str) -> str:
    return f"<reasoning>r</reasoning>\n<answer>{text}</answer>"


def played(*texts: str, max_turns: int = 2) -> list[Step]:
    env = ToolEnvironment(TASK, TOOLS, max_turns=max_turns)
    env.start()
    return [asyncio.run(env.step(text)) for text in texts]


# ------------------------------------------------------------------------ the environment


def test_the_environment_opens_with_the_rules_and_the_question():
    assert ToolEnvironment(TASK, TOOLS).start() == (
        Message(role="system", content=system_prompt(TOOLS)),
        Message(role="user", content="What is the capital of Kenya?"),
    )


def test_a_search_and_then_an_answer():
    searched, answered = played(call("Kenya"), answer("Nairobi"))
    assert searched.stop is None
    assert searched.result is not None
    assert searched.result.text == "The capital is Nairobi."
    assert searched.reply == (Message(role="user", content="<result>\nThe capital is Nairobi.\n</result>"),)
    assert answered == Step(action=answered.action, stop="answer")
    assert answered.action.answer == "Nairobi"


def test_an_answer_ends_the_rollout_in_any_turn():
    (step,) = played(answer("Nairobi"), max_turns=5)
    assert (step.stop, step.reply, step.results) == ("answer", (), ())


def test_a_message_without_call_or_answer_ends_the_rollout():
    (step,) = played("Nairobi", max_turns=5)
    assert (step.stop, step.reply, step.results) == ("no_action", (), ())


@pytest.mark.parametrize("text", [call("Kenya"), "<tool>broken</tool>"])
def test_a_call_in_the_last_turn_is_not_executed(text: str):
    steps = played(call("Kenya"), call("Peru"), text, max_turns=3)
    assert [step.stop for step in steps] == [None, None, "max_turns"]
    assert (steps[-1].results, steps[-1].reply) == ((), ())
    (only,) = played(text, max_turns=1)
    assert (only.stop, only.result) == ("max_turns", None)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("<tool>search(Kenya)</tool>", "parse", "Error: the text in <tool> must be JSON"),
        ('<tool>{"name": "search"}</tool>', "parse", 'Error: "args" in <tool> must be an object'),
        ("<tool>" + '{"name": "search", "args": {}}', "parse", "Error: <tool> must be closed"),
        ('<tool>{"name": "find", "args": {}}</tool>', "unknown_tool", "tools: search"),
        ('<tool>{"name": "search", "args": {}}</tool>', "bad_arguments", "'query' is missing"),
        (call("Atlantis"), "exception", "Error: nothing found"),
    ],
)
def test_a_failed_call_costs_its_turn_and_the_conversation_goes_on(text, error, message):
    failed, answered = played(text, answer("Nairobi"))
    assert failed.stop is None
    assert failed.result is not None
    assert failed.result.error == error
    assert message in failed.result.text
    # The agent sees the reason, with the protocol's tags defused.
    (reply,) = failed.reply
    assert reply.content.startswith("<result>\nError: ")
    assert "<tool>" not in reply.content
    assert answered.stop == "answer"


def test_a_result_cannot_close_its_own_block():
    searched, _ = played(call("Peru"), answer("Lima"))
    assert searched.reply[0].content == "<result>\nThe capital is Lima. [/result]\n</result>"


def test_an_environment_plays_one_rollout():
    with pytest.raises(RuntimeError, match="plays one rollout"):
        played(answer("Nairobi"), answer("Nairobi"))


def test_a_copy_of_an_environment_goes_on_by_itself_with_the_same_tools():
    async def scene() -> None:
        env = ToolEnvironment(TASK, TOOLS, max_turns=2)
        await env.step(call("Kenya"))
        copy = forked(env)
        assert (await env.step(answer("Nairobi"))).stop == "answer"
        assert (await copy.step(call("Peru"))).stop == "max_turns"
        assert copy._tools is env._tools

    asyncio.run(scene())


def test_an_environment_of_ones_own_is_copied_deeply_or_as_it_says():
    class Plain:
        def __init__(self) -> None:
            self.seen = [1]

    class Own(Plain):
        def fork(self) -> str:
            return "its own copy"

    plain = Plain()
    assert forked(plain).seen == [1]
    assert forked(plain).seen is not plain.seen
    assert forked(Own()) == "its own copy"


def test_no_turn_at_all_is_refused():
    with pytest.raises(ConfigError, match="max_turns must be >= 1; got 0"):
        ToolEnvironment(TASK, TOOLS, max_turns=0)


# -------------------------------------------------------------------- the scripted engine


def drawn(engine: ScriptedEngine, prompt: str, session: str, **options: int) -> Completion:
    sampling = Sampling(**{"max_tokens": 1000, "seed": 0, **options})
    return asyncio.run(engine.generate(byte_chat().encode_text(prompt), sampling, session=session))


def text_of(completion: Completion) -> str:
    assert completion.finish == "stop"
    assert completion.token_ids[-1] == byte_chat().end_id
    return byte_chat().decode(completion.token_ids[:-1])


def test_each_session_gets_the_replies_in_order():
    engine = ScriptedEngine(["one", "two"], byte_chat())
    assert [text_of(drawn(engine, "?", s)) for s in "aabb"] == ["one", "two", "one", "two"]
    with pytest.raises(InputError, match="call 3 of session 'a' came, and the script has 2"):
        drawn(engine, "?", "a")
    engine.release("a")
    engine.release("never seen")
    assert text_of(drawn(engine, "?", "a")) == "one"


def test_a_reply_is_its_tokens_and_the_closing_one_at_log_probability_zero():
    chat = byte_chat()
    completion = drawn(ScriptedEngine(["Añ"], chat), "?", "a")
    assert completion.token_ids == (*chat.encode_text("Añ"), chat.end_id)
    assert completion.logprobs == (0.0,) * len(completion.token_ids)


def test_a_reply_is_cut_at_max_tokens():
    # "four" is 4 bytes and the closing token.
    engine = ScriptedEngine(["four"] * 2, byte_chat())
    assert drawn(engine, "?", "a", max_tokens=5).finish == "stop"
    cut = drawn(engine, "?", "a", max_tokens=4)
    assert cut.finish == "length"
    assert byte_chat().decode(cut.token_ids) == "four"
    assert len(cut.token_ids) == len(cut.logprobs) == 4


def test_a_fork_goes_on_in_the_script_where_its_parent_was():
    engine = ScriptedEngine(["one", "two", "three"], byte_chat())
    drawn(engine, "?", "a")
    engine.fork("a", "b")
    assert [text_of(drawn(engine, "?", s)) for s in "aabb"] == ["two", "three"] * 2
    engine.fork("not begun", "c")
    assert text_of(drawn(engine, "?", "c")) == "one"
    with pytest.raises(InputError, match="'b' is one already"):
        engine.fork("a", "b")


def test_replies_by_question_follow_the_longest_question_in_the_first_prompt():
    engine = ScriptedEngine({"Niger": ["Niamey"], "Nigeria": ["Abuja", "Lagos"]}, byte_chat())
    assert text_of(drawn(engine, "capital of Nigeria?", "a")) == "Abuja"
    assert text_of(drawn(engine, "capital of Niger?", "b")) == "Niamey"
    assert text_of(drawn(engine, "a later prompt", "a")) == "Lagos"
    with pytest.raises(InputError, match="none of its 2 questions is in the prompt 'Chad'"):
        drawn(engine, "Chad", "c")


def test_a_function_answers_the_prompt():
    engine = ScriptedEngine(lambda prompt: prompt[::-1], byte_chat())
    assert text_of(drawn(engine, "abc", "a")) == "cba"


def test_one_bare_string_is_no_script():
    with pytest.raises(ConfigError, match="put it in a list"):
        ScriptedEngine("one", byte_chat())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and >= 0; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"max_tokens": 0}, "max_tokens must be >= 1; got 0"),
    ],
)
def test_sampling_out_of_range_is_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Sampling(**{"max_tokens": 8, "seed": 0, **options})


def test_engine_and_environment_play_a_rollout():
    async def rollout() -> list[Step]:
        chat, env = byte_chat(), ToolEnvironment(TASK, TOOLS)
        engine = ScriptedEngine({TASK.question: [call("Kenya"), answer("Nairobi")]}, chat)
        ids = list(chat.prompt_ids(env.start()))
        steps: list[Step] = []
        while not steps or steps[-1].stop is None:
            completion = await engine.generate(ids, SAMPLING, session="one")
            steps.append(await env.step(chat.decode(completion.token_ids[:-1])))
            ids += [*completion.token_ids, *chat.reply_ids(steps[-1].reply)]
        return steps

    steps = asyncio.run(rollout())
    assert [step.stop for step in steps] == [None, "answer"]
    assert steps[-1].action.answer == "Nairobi"
