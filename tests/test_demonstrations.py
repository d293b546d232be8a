"""Demonstrations of a user: read with their lines, framed as rollouts are, learned on the assistant's words alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from chats import CODER, template_chat
from turnwise.chat import Chat
from turnwise.cli import main
from turnwise.demonstrations import (
    Counts,
    DemonstrationConfig,
    demonstration_row,
    learn_demonstrations,
    read_demonstrations,
)
from turnwise.engine import Sampling
from turnwise.env import ToolEnvironment
from turnwise.errors import ConfigError, InputError
from turnwise.evaluation import make_engine, rollouts
from turnwise.policy import load_policy, save_policy, tiny_policy
from turnwise.protocols import PROTOCOLS
from turnwise.quick import is_quick
from turnwise.rollout import awaited
from turnwise.tool_files import load_tools
from turnwise.tools import tool, tool_mapping
from turnwise.types import Message, Task, ToolCall


def search(query: str) -> str:
    """Passages that best match the query."""
    return query


TASK = Task(id="1", question="Q", answers=("é!",))
TOOLS = tool_mapping([tool(search)])
CALL = {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"query": "Kenya"}'}}
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Which capital?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "Nairobi is."},
        {"role": "assistant", "content": "<answer>Nairobi</answer>"},
    ],
    "tools": [{"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}],
}


def written_to(folder: Path, *records: object) -> Path:
    path = folder / "demonstrations.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("protocol", ["tools", "qwen3-coder"])
def test_the_loss_is_on_what_the_assistant_says_and_the_token_that_closes_it(tmp_path, bpe_chat: Chat, protocol: str):
    chat, form = (bpe_chat if protocol == "tools" else template_chat(CODER)), PROTOCOLS[protocol]
    (found,) = read_demonstrations(written_to(tmp_path, CONVERSATION), form, TOOLS)
    row = demonstration_row(found, chat, form)
    taught = [i for i, learned in zip(row.ids, row.loss, strict=True) if learned]
    call = "I look.\n" + form.calls_text(found.messages[1].tool_calls)
    assert taught == [*chat.encode_said(call), chat.end_id, *chat.encode_said("<answer>Nairobi</answer>"), chat.end_id]
    assert np.array_equal(row.loss, row.action)
    # The whole is what the chat renders of the conversation, up to the last closing token.
    assert "Nairobi is." in chat.decode([i for i, learned in zip(row.ids, row.loss, strict=True) if not learned])
    assert chat.end_id == row.ids[-1]


def test_a_question_and_turns_begin_as_rollouts_do(tmp_path, bpe_chat: Chat):
    record = {"question": "Which capital?", "turns": ["a", "found", "b"]}
    (found,) = read_demonstrations(written_to(tmp_path, record), PROTOCOLS["tools"], TOOLS)
    row = demonstration_row(found, bpe_chat, PROTOCOLS["tools"])
    start = ToolEnvironment(Task(id="1", question="Which capital?", answers=()), TOOLS).start()
    assert list(row.prompt_ids) == bpe_chat.prompt_ids(start)
    reply = bpe_chat.reply_ids([Message(role="user", content="found")])
    said = [[*bpe_chat.encode_text(text), bpe_chat.end_id] for text in "ab"]
    assert list(row.ids) == [*said[0], *reply, *said[1]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"question": "a"', "line 1: must be JSON"),
        ("\n[]", "line 2: must be an object with messages, or with question and turns"),
        ('{"question": "a", "turns": []}', "line 1: turns must be a list of texts"),
        ('{"question": " ", "turns": ["a"]}', "line 1: question must be a text"),
        ('{"question": "a", "turns": ["a", "b"]}', "line 1: must begin with another's message and end with the assist"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: must begin with another's"),
        ('{"messages": [{"role": "user"}]}', r"line 1: messages\[0\].content must be text"),
        (
            json.dumps({"messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "assistant")]}),
            "messages 1 and 2 must not both be the assistant's",
        ),
        ("", "must have one demonstration at least"),
    ],
)
def test_bad_lines_are_refused_with_their_number(tmp_path, lines: str, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=message) as caught:
        read_demonstrations(path, PROTOCOLS["tools"], TOOLS)
    assert "\n" not in str(caught.value)


def test_options_out_of_range_are_refused():
    for options in ({"epochs": 0}, {"rows": 0}, {"learning_rate": 0.0}, {"token_budget": 0}):
        with pytest.raises(ConfigError, match="must be"):
            DemonstrationConfig(demonstrations=Path("x"), **options)


def test_a_demonstration_longer_than_the_context_is_refused_before_any_work(tmp_path, checkpoint: Path):
    path = written_to(tmp_path, {"question": "a", "turns": ["b"]}, {"question": "a", "turns": ["b" * 3000]})
    with pytest.raises(InputError, match="line 3: must fit the policy's context of 1024 tokens"):
        learn_demonstrations(DemonstrationConfig(demonstrations=path, policy=str(checkpoint), out=tmp_path / "out"))


def test_the_command_counts_tokens_and_leaves_a_checkpoint(tmp_path, checkpoint: Path, capsys):
    path = written_to(tmp_path, CONVERSATION, {"question": "a", "turns": ["b"]})
    args = ["warmup", "--demonstrations", str(path), "--policy", str(checkpoint), "--epochs", "2"]
    assert main([*args, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 demonstrations, " in said
    assert "step 2/2" in said
    assert load_policy(tmp_path / "out").chat.encode_text("a") == load_policy(checkpoint).chat.encode_text("a")
    assert main([*args, "--out", str(tmp_path / "out")]) == 2  # the folder holds files now


def test_it_is_learned_on_the_device_and_in_the_dtype_that_are_asked_for(tmp_path, checkpoint: Path):
    path, made = written_to(tmp_path, {"question": "Q", "turns": ["a"]}), {}
    for dtype in ("float32", "bfloat16"):
        options = {"dtype": dtype, "gradient_checkpointing": dtype == "bfloat16", "out": tmp_path / dtype}
        options["out"].mkdir()
        config = DemonstrationConfig(demonstrations=path, policy=str(checkpoint), epochs=1, **options)
        made[dtype] = learn_demonstrations(config).model
    assert {p.dtype for p in made["bfloat16"].parameters()} == {torch.bfloat16}
    whole, half = (torch.cat([p.flatten().float() for p in m.parameters()]) for m in made.values())
    assert_close(half, whole, atol=0.02, rtol=0.02)
    config = DemonstrationConfig(demonstrations=path, policy=str(checkpoint), device="mps", out=tmp_path)
    with pytest.raises(ConfigError, match="device must be one that torch offers"):
        learn_demonstrations(config)


def test_a_token_budget_ends_it_and_equal_seeds_learn_alike(tmp_path, checkpoint: Path):
    path = written_to(tmp_path, *({"question": f"q{k}", "turns": ["b"]} for k in range(4)))

    def steps(name: str, budget: int | None) -> list[tuple[int, float]]:
        seen: list[tuple[int, float]] = []
        config = DemonstrationConfig(
            demonstrations=path, policy=str(checkpoint), out=tmp_path / name, rows=1, epochs=2, token_budget=budget
        )
        (tmp_path / name).mkdir()
        policy = learn_demonstrations(config, lambda counts, step, read, loss: seen.append((read, loss)))
        assert not is_quick(policy.model), "what results began with comes out to the last bit"
        return seen

    whole = steps("whole", None)
    assert len(whole) == 8
    assert steps("cut", whole[2][0]) == whole[:3]


def greedy(policy, prompt: list[int]) -> str:
    engine = make_engine(policy)
    completion = awaited(engine.generate(prompt, Sampling(temperature=0.0, max_tokens=60, seed=0), session=0))
    assert completion.token_ids[-1] in policy.chat.stop_ids
    return policy.chat.decode(completion.token_ids)


def test_the_embedded_policy_learns_a_new_format_and_says_it(tmp_path):
    records = [
        {
            "messages": [
                {"role": "user", "content": f"What is the capital of {country}?"},
                {"role": "assistant", "content": f"LOOK[{country}]!"},
                {"role": "user", "content": f"{capital} it is"},
                {"role": "assistant", "content": f"DONE[{capital}]"},
            ]
        }
        for country, capital in (("Kenya", "Nairobi"), ("Peru", "Lima"), ("Norway", "Oslo"))
    ]
    losses: list[float] = []
    counts: list[Counts] = []

    def watch(found: Counts, step: int, read: int, loss: float) -> None:
        counts.append(found)
        losses.append(loss)

    config = DemonstrationConfig(
        demonstrations=written_to(tmp_path, *records), out=tmp_path / "out", epochs=45, rows=3, learning_rate=2e-3
    )
    (tmp_path / "out").mkdir()
    learn_demonstrations(config, watch)
    assert losses[0] > 2
    assert losses[-1] < 0.02
    assert counts[0].taught < counts[0].tokens
    policy = load_policy(tmp_path / "out")
    question = Message(role="user", content="What is the capital of Peru?")
    prompt = policy.chat.prompt_ids([question])
    assert greedy(policy, prompt) == "LOOK[Peru]!"
    said = [*policy.chat.encode_said("LOOK[Peru]!"), policy.chat.end_id]
    reply = policy.chat.reply_ids([Message(role="user", content="Lima it is")])
    assert greedy(policy, [*prompt, *said, *reply]) == "DONE[Lima]"


def test_a_policy_with_a_template_learns_its_own_format_and_plays_it(tmp_path):
    chat = template_chat(CODER)
    save_policy(tiny_policy(chat, seed=0, hidden=32, layers=2), tmp_path / "start")
    file = tmp_path / "tools.py"
    file.write_text('def find(a: str) -> str:\n    """Find."""\n    return f"{a}!"\n')
    rules, question = ToolEnvironment(TASK, load_tools(file), protocol="qwen3-coder").start()
    call = {"id": "1", "function": {"name": "find", "arguments": {"a": "é"}}}
    record = {
        "messages": [
            {"role": "system", "content": rules.content},
            {"role": "user", "content": question.content},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "é!"},
            {"role": "assistant", "content": "<answer>é!</answer>"},
        ],
        "tools": list(rules.tools),
    }
    config = DemonstrationConfig(
        demonstrations=written_to(tmp_path, record),
        policy=str(tmp_path / "start"),
        protocol="native",
        tools=file,
        out=tmp_path / "out",
        epochs=100,
        learning_rate=1e-2,
    )
    (tmp_path / "out").mkdir()
    losses: list[float] = []
    learn_demonstrations(config, lambda counts, step, read, loss: losses.append(loss))
    assert losses[-1] < 0.02
    options = {"protocol": "native", "tools": file, "max_turn_tokens": 120}
    [[rollout]] = rollouts(tmp_path / "out", [TASK], group_size=1, mode="greedy", **options)
    assert (rollout.stop, rollout.answer) == ("answer", "é!")
    assert rollout.turns[0].action.tool_calls == (ToolCall(name="find", arguments={"a": "é"}),)
    assert chat.decode(rollout.turns[0].reply_ids) == (
        "\n<|im_start|>user\n<tool_response>\né!\n</tool_response>\n<|im_start|>assistant\n"
    )
    assert rollout.outcome_rewards == {"answer_presence": 0.5, "exact_match": 1.0}
