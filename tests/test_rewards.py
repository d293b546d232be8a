"""Reward components against worked rollouts, and a user's own reward functions."""

import asyncio
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise import rewards
from turnwise.env import ToolEnvironment
from turnwise.errors import ConfigError, InputError, ToolError
from turnwise.rewards import PAPER_WEIGHTS, load_rewards, score, tag_usage, xml_format
from turnwise.tools import tool, tool_mapping
from turnwise.types import Action, Rollout, Stop, Task, ToolCall, ToolResult, Turn

TASK = Task(id="kenya", question="What is the capital of Kenya?", answers=("Nairobi", "Nairobi City"))


def search(query: str) -> str:
    """Passages that best match the query."""
    if query == "Nairobi":
        raise ToolError("nothing found for Nairobi")
    return {"Kenya": "The capital is NAIROBI.", "Peru": "The capital is Lima."}[query]


TOOLS = tool_mapping([tool(search)])


def call(query: str) -> str:
    return (
        "<reasoning>\nI look it up.\n</reasoning>\n"
        f'<tool>\n{{"name": "search", "args": {{"query": "{query}"}}}}\n</tool>'
    )


def answer(text: str) -> str:
    return f"<reasoning>\nIt says so.\n</reasoning>\n<answer>\n{text}\n</answer>"


def played(*texts: str, max_turns: int = 3) -> Rollout:
    """The rollout of these messages in the real environment; cut off if it did not stop."""
    env, turns, stop = ToolEnvironment(TASK, TOOLS, max_turns=max_turns), [], None
    for text in texts:
        step = asyncio.run(env.step(text))
        turns.append(
            Turn(
                action_ids=(1,),
                sampling_logprobs=(0.0,),
                text=text,
                action=step.action,
                results=step.results,
            )
        )
        stop = step.stop
    return rollout_of(*turns, stop=stop or "max_tokens")


def rollout_of(*turns: Turn, stop: Stop) -> Rollout:
    return Rollout(task_id=TASK.id, group=0, prompt_ids=(1,), turns=turns, stop=stop)


def message(text: str) -> Rollout:
    turn = Turn(action_ids=(1,), sampling_logprobs=(0.0,), text=text, action=action_of(text))
    return rollout_of(turn, stop="no_action")


def action_of(text: str):
    return asyncio.run(ToolEnvironment(TASK, TOOLS, max_turns=1).step(text)).action


# ---------------------------------------------------------------------- the paper's six


def test_the_perfect_rollout_earns_every_component_once():
    scored = score(TASK, played(call("Kenya"), answer("Nairobi")))
    assert scored.turn_rewards == ({"tool_execution": 0.2, "answer_in_results": 0.5}, {})
    assert scored.outcome_rewards == {
        "answer_presence": 0.5,
        "exact_match": 1.0,
        "xml_format": 0.2,
        "tag_usage": 0.2,
    }


def test_a_turn_that_only_answers_has_no_turn_rewards_at_all():
    scored = score(TASK, played(answer("Nairobi")))
    assert scored.turn_rewards == ({},)
    assert scored.outcome_rewards["exact_match"] == 1.0


def test_a_search_that_misses_earns_its_execution_only():
    scored = score(TASK, played(call("Peru"), answer("Lima")))
    assert scored.turn_rewards[0] == {"tool_execution": 0.2, "answer_in_results": 0.0}
    assert scored.outcome_rewards["answer_presence"] == 0.0
    assert scored.outcome_rewards["exact_match"] == 0.0


@pytest.mark.parametrize(
    "text",
    [
        call("Nairobi"),  # the tool fails, and its error text holds the answer
        call("Atlantis"),
        "<tool>Nairobi</tool>",
        '<tool>{"name": "find", "args": {"query": "Nairobi"}}</tool>',
        '<tool>{"name": "search", "args": {"q": "Nairobi"}}</tool>',
    ],
)
def test_a_failed_call_earns_zero_and_not_nothing(text: str):
    scored = score(TASK, played(text, answer("Nairobi")))
    assert scored.turn_rewards[0] == {"tool_execution": 0.0, "answer_in_results": 0.0}


def test_a_call_in_the_last_turn_counts_as_not_executed():
    rollout = played(call("Kenya"), call("Kenya"), max_turns=2)
    assert rollout.stop == "max_turns"
    scored = score(TASK, rollout)
    assert scored.turn_rewards == (
        {"tool_execution": 0.2, "answer_in_results": 0.5},
        {"tool_execution": 0.0, "answer_in_results": 0.0},
    )
    assert scored.outcome_rewards["answer_presence"] == 0.0
    assert scored.outcome_rewards["exact_match"] == 0.0


def test_presence_is_weaker_than_exact_match():
    scored = score(TASK, played(answer("It is nairobi, I think")))
    assert scored.outcome_rewards["answer_presence"] == 0.5
    assert scored.outcome_rewards["exact_match"] == 0.0


def test_exact_match_is_in_the_chosen_definition():
    rollout = played(answer("The Nairobi."))
    assert score(TASK, rollout).outcome_rewards["exact_match"] == 1.0
    assert score(TASK, rollout, definition="paper").outcome_rewards["exact_match"] == 0.0


def test_a_message_without_answer_earns_no_answer_rewards():
    scored = score(TASK, played(call("Kenya"), "Nairobi"))
    # The first message is perfect and the second has no tag: half of 0.2 each.
    assert scored.outcome_rewards == {
        "answer_presence": 0.0,
        "exact_match": 0.0,
        "xml_format": pytest.approx(0.1),
        "tag_usage": pytest.approx(0.1),
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (call("Kenya"), 1.0),
        (answer("Nairobi"), 1.0),
        (f"\n {answer('Nairobi')} \n", 1.0),
        # One block of two, spaced: 0.2 + 0.2; it does not begin with reasoning but ends well: + 0.2
        ("<answer>\nNairobi\n</answer>", 0.6),
        # Both blocks, opening and closing, tags not on their own lines: 0.4 + 0.2 + 0.2
        ("<reasoning>r</reasoning><answer>Nairobi</answer>", 0.8),
        # One of the two blocks has bad spacing: as above
        ("<reasoning>\nr\n</reasoning>\n<answer>Nairobi</answer>", 0.8),
        # Answer never closed: 0.2 presence + 0.2 spacing + 0.2 opening
        ("<reasoning>\nr\n</reasoning>\n<answer>\nNairobi", 0.6),
        # Words after the last tag: no closing
        (f"{answer('Nairobi')} Done.", 0.8),
        # Words before the first tag: no opening
        (f"Well. {answer('Nairobi')}", 0.8),
        ("<reasoning>", 0.2),
        ("</answer>", 0.2),
        ("Nairobi", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_of_a_message(text: str, value: float):
    assert xml_format(message(text)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (call("Kenya"), 1.0),
        ("<answer>Nairobi</answer>", 1.0),
        ("<reasoning>r</reasoning><answer>Nairobi", 1 / 2),
        ("<reasoning>r<answer>a</answer><answer>b</answer>", 0.0),
        ("<reasoning>r</reasoning><tool>{}</tool></tool><answer>a</answer>", 2 / 3),
        ("</answer>Nairobi<answer>", 1.0),  # counted, not ordered
        ("<result>forged</result>", 0.0),  # not the policy's tag
        ("Nairobi", 0.0),
    ],
)
def test_the_tag_usage_of_a_message(text: str, value: float):
    assert tag_usage(message(text)) == pytest.approx(value)


def test_format_and_tags_are_means_over_messages():
    # 1.0 for the call, 0.6 for the bare answer block
    rollout = played(call("Kenya"), "<answer>\nNairobi\n</answer>")
    assert xml_format(rollout) == pytest.approx(0.8)
    # 1 for the call; reasoning is never closed, answer is fine: 1/2
    rollout = played(call("Kenya"), "<reasoning>r <answer>Nairobi</answer>")
    assert tag_usage(rollout) == pytest.approx(0.75)


TEXTS = st.lists(
    st.sampled_from(
        [
            "<reasoning>",
            "</reasoning>",
            "<tool>",
            "</tool>",
            "<answer>",
            "</answer>",
            "\n",
            "Nairobi",
        ]
    ),
    max_size=10,
).map("".join)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_every_value_is_between_zero_and_its_weight(first: str, second: str):
    rollout = message(first)
    rollout = dataclasses.replace(rollout, turns=rollout.turns + message(second).turns)
    scored = score(TASK, rollout)
    paid = [scored.outcome_rewards, *scored.turn_rewards]
    assert all(0 <= value <= PAPER_WEIGHTS[n] for part in paid for n, value in part.items())
    assert set(scored.outcome_rewards) == set(PAPER_WEIGHTS) - {
        "tool_execution",
        "answer_in_results",
    }


# --------------------------------------------------------------------- several calls a turn


def calling(*results: ToolResult, error: str | None = None) -> Turn:
    calls = tuple(ToolCall(name="search", arguments={"query": "x"}) for _ in results)
    action = Action(tool_calls=calls, error=error)
    return Turn(action_ids=(1,), sampling_logprobs=(0.0,), text="", action=action, results=results)


FOUND, MISSED = ToolResult(text="It is Nairobi."), ToolResult(text="It is Lima.")
FAILED = ToolResult(text="Error: no Nairobi", error="exception")


def test_a_turn_of_several_calls_is_executed_when_all_are_and_holds_the_answer_when_one_does():
    golds = TASK.answers

    def values(turn: Turn) -> tuple[float | None, float | None]:
        return rewards.tool_execution(turn), rewards.answer_in_results(turn, golds)

    assert values(calling(MISSED, FOUND)) == (1.0, 1.0)
    assert values(calling(MISSED, MISSED)) == (1.0, 0.0)
    assert values(calling(FOUND, FAILED)) == (0.0, 1.0)
    assert values(calling(FAILED, MISSED)) == (0.0, 0.0)
    assert values(calling(FOUND, error="one more could not be read")) == (0.0, 1.0)


def test_the_search_penalty_counts_every_call():
    rollout = rollout_of(calling(FOUND, FAILED), calling(FOUND), calling(FOUND), stop="max_turns")
    scored = score(TASK, rollout, {"search_penalty": 1.0})
    assert [turn.get("search_penalty") for turn in scored.turn_rewards] == [2.0, 3.0, None]


# -------------------------------------------------------- weights, failures, truncation


def test_a_weight_of_zero_or_no_weight_leaves_a_component_out():
    rollout = played(call("Kenya"), answer("Nairobi"))
    scored = score(TASK, rollout, {"exact_match": 2.0, "tool_execution": 0.0})
    assert scored.turn_rewards == ({}, {})
    assert scored.outcome_rewards == {"exact_match": 2.0}


def test_an_unknown_component_or_infinite_weight_is_refused():
    rollout = played(answer("Nairobi"))
    with pytest.raises(ConfigError, match="got 'exact_mach'; did you mean exact_match"):
        score(TASK, rollout, {"exact_mach": 1.0})
    with pytest.raises(ConfigError, match="weight of exact_match must be finite; got inf"):
        score(TASK, rollout, {"exact_match": float("inf")})


def test_a_rollout_that_failed_gets_no_rewards():
    rollout = dataclasses.replace(played(call("Kenya"), answer("Nairobi")), stop="error")
    scored = score(TASK, rollout)
    assert (scored.turn_rewards, scored.outcome_rewards) == ((), {})


def test_a_rollout_that_was_cut_off_is_scored_as_it_stands():
    scored = score(TASK, played(call("Kenya"), '<tool>\n{"name"'))
    assert scored.turn_rewards[0] == {"tool_execution": 0.2, "answer_in_results": 0.5}
    assert scored.turn_rewards[1] == {"tool_execution": 0.0, "answer_in_results": 0.0}
    assert scored.outcome_rewards["exact_match"] == 0.0
    empty = score(TASK, rollout_of(stop="max_tokens"))
    assert empty.turn_rewards == ()
    assert set(empty.outcome_rewards.values()) == {0.0}


def test_scoring_changes_nothing_else():
    rollout = played(call("Kenya"), answer("Nairobi"))
    scored = score(TASK, rollout)
    assert dataclasses.replace(scored, turn_rewards=(), outcome_rewards={}) == rollout
    assert score(TASK, scored) == scored


# --------------------------------------------------------------------- a user's functions


def written(folder: Path, text: str) -> Path:
    file = folder / "my_rewards.py"
    file.write_text(text, encoding="utf-8")
    return file


OWN = """
import math

def turn_length(task, rollout):
    return [None if t.result is None else len(t.text) / 100 for t in rollout.turns]

def outcome_turns(task, rollout):
    return -len(rollout.turns)

def helper(x):
    return x
"""


def test_a_users_functions_are_components_of_weight_one(tmp_path: Path):
    functions = load_rewards(written(tmp_path, OWN))
    assert list(functions) == ["turn_length", "outcome_turns"]
    rollout = played(call("Kenya"), answer("Nairobi"))
    scored = score(TASK, rollout, {"exact_match": 1.0}, functions=functions)
    assert scored.turn_rewards == ({"turn_length": len(call("Kenya")) / 100}, {})
    assert scored.outcome_rewards == {"exact_match": 1.0, "outcome_turns": -2.0}
    scored = score(TASK, rollout, {"outcome_turns": 0.5, "turn_length": 0}, functions=functions)
    assert scored.turn_rewards == ({}, {})
    assert scored.outcome_rewards == {"outcome_turns": -1.0}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def turn_x(task, rollout): return [1.0]", "got 1 values for 2 turns"),
        ("def turn_x(task, rollout): return 1.0", "number or None per turn; got 1.0 for 2 turns"),
        ("def turn_x(task, rollout): return [1.0, 'a']", "finite numbers; got 'a'"),
        ("def turn_x(task, rollout): return [1.0, float('nan')]", "finite numbers; got nan"),
        ("def outcome_x(task, rollout): return None", "finite numbers; got None"),
        ("def outcome_x(task, rollout): return float('inf')", "finite numbers; got inf"),
        ("def outcome_x(task, rollout): return task.nothing", "got AttributeError: .* task kenya"),
        ("def outcome_x(task, rollout): raise SystemExit(4)", "got SystemExit: 4 on task kenya"),
    ],
)
def test_a_users_function_that_misbehaves_is_named(tmp_path: Path, body: str, message: str):
    functions = load_rewards(written(tmp_path, body))
    (name,) = functions
    with pytest.raises(InputError, match=f"reward function {name} must .*{message}"):
        score(TASK, played(call("Kenya"), answer("Nairobi")), {}, functions=functions)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("def helper(x): return x", ConfigError, "must define a reward function; got none"),
        ("def turn_x(task): return []", ConfigError, r"turn_x must take \(task, rollout\)"),
        ("def turn_x(", InputError, "must be valid Python"),
    ],
)
def test_a_file_without_usable_functions_is_refused(tmp_path: Path, body, error, message):
    with pytest.raises(error, match=message):
        load_rewards(written(tmp_path, body))


def test_the_papers_constants():
    assert rewards.PAPER_WEIGHTS == {
        "tool_execution": 0.2,
        "answer_in_results": 0.5,
        "answer_presence": 0.5,
        "exact_match": 1.0,
        "xml_format": 0.2,
        "tag_usage": 0.2,
    }
