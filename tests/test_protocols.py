"""One environment, two protocols: forms, the forced answer turn, and tools that cannot be called."""

import asyncio
from typing import Literal

import pytest

from turnwise.chat import byte_chat
from turnwise.engine import ScriptedEngine
from turnwise.env import Step, ToolEnvironment
from turnwise.errors import ConfigError
from turnwise.protocols import PROTOCOLS, is_well_formed, protocol_named
from turnwise.rollout import Limits, run_rollout
from turnwise.search_tags import NO_SEARCHES_LEFT
from turnwise.tools import tool, tool_mapping
from turnwise.types import Message, Task

TASK = Task(id="kenya", question="What is the capital of Kenya?", answers=("Nairobi",))
SEARCH = "<think>r</think><search>Kenya</search>"
ANSWER = "<think>r</think><answer>Nairobi</answer>"


def search(query: str) -> str:
    """Passages that best match the query."""
    return f"about {query}"


TOOLS = tool_mapping([tool(search)])


def played(*texts: str, max_turns: int) -> list[Step]:
    env = ToolEnvironment(TASK, TOOLS, max_turns=max_turns, protocol="search")
    env.start()
    return [asyncio.run(env.step(text)) for text in texts]


def test_the_environment_opens_with_the_rules_of_its_protocol():
    assert ToolEnvironment(TASK, TOOLS, protocol="search").start() == (
        Message(role="system", content=PROTOCOLS["search"].system_prompt(TOOLS)),
        Message(role="user", content="What is the capital of Kenya?"),
    )


def test_the_reply_before_the_last_turn_says_that_no_searches_are_left():
    # Three turns are two searches and an answer: the second search's reply comes before the last turn.
    first, second, last = played(SEARCH, SEARCH, ANSWER, max_turns=3)
    found = "<information>\nabout Kenya\n</information>"
    assert [m.content for m in first.reply] == [found]
    assert [m.content for m in second.reply] == [f"{found}\n{NO_SEARCHES_LEFT}"]
    assert (last.stop, last.action.answer, last.reply) == ("answer", "Nairobi", ())


def test_a_search_that_cannot_be_read_costs_its_turn_and_is_answered_with_the_reason():
    (step,) = played("<think>r</think><search></search>", max_turns=2)
    assert step.stop is None
    assert step.result is not None
    assert step.result.error == "parse"
    (reply,) = step.reply
    assert "[search] must hold a query" in reply.content
    assert reply.content.endswith(NO_SEARCHES_LEFT)


def test_a_search_in_the_forced_answer_turn_is_not_executed():
    steps = played(SEARCH, SEARCH, max_turns=2)
    assert [step.stop for step in steps] == [None, "max_turns"]
    assert (steps[1].results, steps[1].reply) == ((), ())


def test_the_forced_answer_turn_is_granted_however_long_the_results_are():
    chat = byte_chat()

    def search(query: str) -> str:
        """Passages that best match the query."""
        return "long " * 300

    prompt = len(chat.prompt_ids(ToolEnvironment(TASK, TOOLS, protocol="search").start()))
    limits = Limits(max_turn_tokens=60, context=prompt + 700, max_turns=4)
    environment = ToolEnvironment(TASK, tool_mapping([tool(search)]), max_turns=4, protocol="search")
    engine = ScriptedEngine([SEARCH, SEARCH, SEARCH, ANSWER], chat)
    rollout = asyncio.run(run_rollout(TASK, environment, engine, chat, limits=limits))
    assert (rollout.stop, rollout.answer, len(rollout.turns)) == ("answer", "Nairobi", 4)


def other(query: str) -> str:
    """Another tool."""
    return query


def with_number(query: str, k: int) -> str:
    """Passages, so many."""
    return query * k


def of_number(query: int) -> str:
    """Passages of a number."""
    return str(query)


def with_default(query: str, k: int = 3) -> str:
    """Passages, three unless told otherwise."""
    return query * k


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([], "must have one tool, named 'search'; got none"),
        ([other], "got other; keep that one alone"),
        ([search, other], "got search, other; keep that one alone"),
        ([with_number], "got one where argument 'k' is missing"),
        ([of_number], "argument 'query' must be integer"),
    ],
)
def test_tools_that_a_query_cannot_call_are_refused_with_the_reason(functions: list, message: str):
    for function in functions:
        if function in (with_number, of_number):
            function.__name__ = "search"
    with pytest.raises(ConfigError, match=message) as caught:
        ToolEnvironment(TASK, tool_mapping(tool(f) for f in functions), protocol="search")
    assert "\n" not in str(caught.value)


def test_a_search_tool_may_have_other_arguments_that_have_defaults():
    with_default.__name__ = "search"
    environment = ToolEnvironment(TASK, tool_mapping([tool(with_default)]), protocol="search")
    step = asyncio.run(environment.step("<think>\na\n</think>\n<search>\nKenya\n</search>"))
    assert step.result is not None
    assert (step.result.error, step.result.text) == (None, with_default("Kenya"))


def test_an_unknown_protocol_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean search"):
        protocol_named("serch")


# --------------------------------------------------------------------------- well-formed messages


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (SEARCH, True),
        ("\n<think>\na\n</think>\n\n<search>\nb\n</search>\n", True),
        ("<think></think><search>b</search>", True),
        ("<search>b</search><think>a</think>", False),  # thoughts come first
        ("<search>b</search>", False),
        ("<think>a</think>", False),
        ("<think>a</think><think>a</think><search>b</search>", False),
        (f"{SEARCH}<search>c</search>", False),
        (f"{SEARCH}{ANSWER}", False),
        (f"Well, {SEARCH}", False),
        (f"{SEARCH} done", False),
        ("<think>a</think> so <search>b</search>", False),
        ("<think>a<information>x</information></think><search>b</search>", False),
        ("<think>a <ANSWER> </think><search>b</search>", False),
        ("<think>a</think><search>b <search> c</search>", False),
        ("<think>a</think><search>b", False),
        (ANSWER, False),  # the other block
        ("", False),
    ],
)
def test_a_turn_is_thoughts_and_one_block_each_tag_once_and_nothing_else(text: str, good: bool):
    assert is_well_formed(text, PROTOCOLS["search"], "search") == good


@pytest.mark.parametrize("name", ["tools", "search"])
def test_both_protocols_have_one_form(name: Literal["tools", "search"]):
    form = PROTOCOLS[name]
    for block in (form.calling, form.answering):
        text = f"<{form.thinking}>a</{form.thinking}>\n<{block}>b</{block}>"
        assert is_well_formed(text, form, block)
        assert not is_well_formed(text, form, form.returned)
        assert not is_well_formed(text + f"<{form.returned}>", form, block)
