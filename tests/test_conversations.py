"""Conversations in the shape of OpenAI's API: read, framed, and written back."""

import pytest

from chats import CODER, template_chat
from conftest import bpe_backend
from turnwise.chat import BPETokenizer, Chat
from turnwise.conversations import read_messages, read_tools, written
from turnwise.errors import InputError
from turnwise.protocols import PROTOCOLS
from turnwise.types import Message, ToolCall

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Passages that best match the query.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        },
    }
]
CALL = {"id": "x1", "type": "function", "function": {"name": "search", "arguments": '{"query": "Kenya"}'}}
MESSAGES = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "capital?"}]},
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "x1", "content": "Nairobi is."},
]


def test_messages_are_read_with_arguments_as_objects_and_results_under_their_tools_name():
    system, user, assistant, result = read_messages(MESSAGES)
    assert (system, user.content) == (Message(role="system", content="Be brief."), "Which capital?")
    assert assistant.tool_calls == (ToolCall(name="search", arguments={"query": "Kenya"}),)
    assert assistant.content == "<think>\nhm\n</think>\n\n"
    assert result == Message(role="tool", content="Nairobi is.", name="search")


def answers(*names: str | None) -> list[dict]:
    """Two calls, x1 and x2, and the results of the named ones."""
    calls = {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "x2"}]}
    return [*MESSAGES[:2], calls, *({"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in names)]


def test_results_stand_in_the_order_of_their_calls():
    again = [*answers("x2", "x1"), *answers("x1")[1:]]
    contents = [message.content for message in read_messages(again) if message.role == "tool"]
    assert contents == ["of x1", "of x2", "of x1"]
    unnamed = [message.content for message in read_messages(answers("y", "x1", None))]
    assert unnamed[3:] == ["of x1", "of y", "of None"]


def test_under_tags_everything_is_text():
    messages = written(PROTOCOLS["tools"], read_messages(MESSAGES), read_tools(TOOLS))
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[0].content == PROTOCOLS["tools"].system_prompt(read_tools(TOOLS)) + "\n\nBe brief."
    assert messages[2].content.endswith('<tool>\n{"name": "search", "args": {"query": "Kenya"}}\n</tool>')
    assert messages[3].content == "<result>\nNairobi is.\n</result>"
    assert not any(m.tools or m.tool_calls for m in messages)


def test_rules_make_a_system_message_where_there_is_none():
    first, second = written(PROTOCOLS["search"], read_messages(MESSAGES[1:2]), read_tools(TOOLS))
    assert (first.role, second.content) == ("system", "Which capital?")


def test_both_kinds_of_chat_frame_a_conversation():
    tags = Chat(BPETokenizer(bpe_backend()))
    ids = tags.prompt_ids(written(PROTOCOLS["tools"], read_messages(MESSAGES), read_tools(TOOLS)))
    assert tags.decode(ids).endswith("<result>\nNairobi is.\n</result>\nassistant\n")
    own = template_chat(CODER)
    rendered = own.tokenizer.decode_all(
        own.prompt_ids(written(PROTOCOLS["qwen3-coder"], read_messages(MESSAGES), read_tools(TOOLS)))
    )
    assert '"name": "search"' in rendered.split("<|im_end|>")[0]
    assert "<parameter=query>\nKenya\n</parameter>" in rendered
    assert rendered.endswith("<tool_response>\nNairobi is.\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of messages"),
        ("Hello", "messages must be a list of messages"),
        ([{"role": "robot", "content": ""}], r"messages\[0\] must be an object with a role"),
        ([MESSAGES[0], {"role": "user"}], r"messages\[1\].content must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content must be text"),
        ([{"role": "user", "content": "", "tool_calls": [CALL]}], "tool_calls must be a list, of an assistant"),
        (
            answers("x2"),
            r"up to \[3\] must have one result for each call.*; got those of calls 2; ",
        ),
        (answers("x1", "x1"), r"up to \[4\] must have .* got those of calls 1, 1;"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] must have a function with a name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '"{}"'}}]}],
            r"tool_calls\[0\].function.arguments must be a JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{} x"}}]}],
            "arguments must be a JSON object",
        ),
    ],
)
def test_messages_of_another_shape_are_refused_with_their_place(messages, message: str):
    with pytest.raises(InputError, match=message) as caught:
        read_messages(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tools", ["search", [3], [{"function": {}}], [{"function": {"name": "f", "parameters": {"properties": [1]}}}]]
)
def test_tools_of_another_shape_are_refused(tools):
    with pytest.raises(InputError, match="must"):
        read_tools(tools)


def test_no_tools_are_no_tools():
    assert read_tools(None) == {}
