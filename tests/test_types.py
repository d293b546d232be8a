"""Rollout records: facts in, the same facts out."""

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from turnwise.types import Action, Rollout, ToolCall, ToolResult, Turn, rollout_from_json


def rollout(text: str = "x", stop: str = "answer") -> Rollout:
    called = Action(reasoning="r", tool_calls=(ToolCall(name="search", arguments={"query": text}),))
    return Rollout(
        task_id="t",
        group=3,
        prompt_ids=(1, 2, 3),
        turns=(
            Turn(
                action_ids=(4, 5),
                sampling_logprobs=(-0.5, -0.25),
                text=text,
                action=called,
                results=(ToolResult(text=text, error="exception", duration_s=0.5, documents=(text, "b")),),
                reply_ids=(6, 7, 8),
            ),
            Turn(action_ids=(9,), sampling_logprobs=(-1.0,), text="", action=Action(answer=text)),
        ),
        stop=stop,  # type: ignore[arg-type]
        policy_version=7,
        error=None,
        turn_rewards=({"tool_execution": 0.2}, {}),
        outcome_rewards={"exact_match": 1.0},
    )


def test_tokens_are_counted_over_prompt_actions_and_replies():
    assert rollout().num_tokens == 3 + 2 + 3 + 1


def test_the_answer_is_the_last_turns():
    assert rollout("Nairobi").answer == "Nairobi"
    failed = Rollout(task_id="t", group=0, prompt_ids=(), turns=(), stop="error", error="E: x")
    assert failed.answer is None
    assert rollout_from_json(failed.to_json()) == failed


def test_only_answers_and_messages_without_action_terminate():
    ended = [s for s in ("answer", "no_action", "max_turns", "max_tokens", "error") if rollout(stop=s).terminated]
    assert ended == ["answer", "no_action"]


@given(st.text(st.characters(exclude_categories=())))
def test_a_rollout_comes_back_equal_from_one_line_of_json(text: str):
    # every character, lone surrogates and Unicode's line separators included
    line = rollout(text).to_json()
    assert len(line.splitlines()) == 1
    assert line.isascii()
    assert rollout_from_json(line) == rollout(text)


def test_an_absent_reward_stays_absent():
    again = rollout_from_json(rollout().to_json())
    assert again.turn_rewards == ({"tool_execution": 0.2}, {})
    assert json.loads(rollout().to_json())["turn_rewards"][1] == {}


def test_nodes_come_back_and_records_without_them_are_chains():
    tree = dataclasses.replace(rollout(), nodes=(0, 4))
    assert rollout_from_json(tree.to_json()) == tree
    old = json.loads(rollout().to_json())
    del old["nodes"]
    assert rollout_from_json(json.dumps(old)) == rollout()


def test_a_rollout_that_was_recorded_before_results_named_documents_still_reads():
    data = json.loads(rollout().to_json())
    del data["turns"][0]["results"][0]["documents"]
    again = rollout_from_json(json.dumps(data))
    assert again.turns[0].result == ToolResult(text="x", error="exception", duration_s=0.5)
    assert again.turns[0].result.documents is None


def test_a_rollout_that_was_recorded_when_a_turn_had_one_call_still_reads():
    data = json.loads(rollout().to_json())
    for turn in data["turns"]:
        calls, results = turn["action"].pop("tool_calls"), turn.pop("results")
        turn["action"]["tool_call"] = calls[0] if calls else None
        turn["result"] = results[0] if results else None
    assert rollout_from_json(json.dumps(data)) == rollout()


def test_first_call_and_first_result_have_names_of_their_own():
    called, answered = rollout().turns
    assert called.action.tool_call == called.action.tool_calls[0]
    assert called.result == called.results[0]
    assert (answered.action.tool_call, answered.result) == (None, None)


def test_a_call_that_could_not_be_read_counts_once():
    read, unread = ToolCall(name="a", arguments={}), ToolCall(name="b", arguments=None)
    assert Action(answer="x").num_calls == 0
    assert Action(tool_calls=(read, read)).num_calls == 2
    assert Action(tool_calls=(read, unread), error="no object").num_calls == 2
    assert Action(tool_calls=(read,), error="no name").num_calls == 2
    assert Action(error="no JSON").num_calls == 1
