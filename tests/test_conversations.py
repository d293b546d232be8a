"""Conversations in the shape of OpenAI's API: read, framed, and written back."""

import json

import pytest

from chats import CODER, template_chat
from conftest import bpe_backend
from turnwise.chat import BPETokenizer, Chat
from turnwise.conversations import conversation_ids, read_messages, read_tools, reply_message, written
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
    ids = conversation_ids(tags, PROTOCOLS["tools"], read_messages(MESSAGES), read_tools(TOOLS))
    assert tags.decode(ids).endswith("<result>\nNairobi is.\n</result>\nassistant\n")
    own = template_chat(CODER)
    rendered = own.tokenizer.decode_all(
        conversation_ids(own, PROTOCOLS["qwen3-coder"], read_messages(MESSAGES), read_tools(TOOLS))
    )
    assert '"name": "search"' in rendered.split("<|im_end|>")[0]
    assert "<parameter=query>\nKenya\n</parameter>" in rendered
    assert rendered.endswith("<tool_response>\nNairobi is.\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_what_the_policy_writes_goes_back_in_openais_shape():
    text = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "search", "arguments": {"query": "é"}}\n</tool_call>'
    assert reply_message(PROTOCOLS["hermes"], text) == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "call00000", "type": "function", "function": {"name": "search", "arguments": '{"query": "é"}'}}
        ],
    }
    (back,) = read_messages([reply_message(PROTOCOLS["hermes"], text)])
    assert back.tool_calls == (ToolCall(name="search", arguments={"query": "é"}),)
    assert reply_message(PROTOCOLS["hermes"], "It is <answer>Nairobi</answer>")["content"] == "Nairobi"
    assert reply_message(PROTOCOLS["hermes"], "<tool_call>x") == {"role": "assistant", "content": "<tool_call>x"}
    assert reply_message(PROTOCOLS["tools"], "Hello") == {"role": "assistant", "content": "Hello"}


def test_arguments_of_qwen3_coder_go_back_in_their_types():
    tools = json.loads(json.dumps(TOOLS))
    tools[0]["function"]["parameters"]["properties"]["k"] = {"type": "integer"}
    text = "<tool_call><function=search><parameter=k>3</parameter></function></tool_call>"
    (call,) = reply_message(PROTOCOLS["qwen3-coder"], text, read_tools(tools))["tool_calls"]
    assert call["function"]["arguments"] == '{"k": 3}'


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of messages"),
        ("Hello", "messages must be a list of messages"),
        ([{"role": "robot", "content": ""}], r"messages\[0\] must be an object with a role"),
        ([MESSAGES[0], {"role": "user"}], r"messages\[1\].content must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content must be text"),
        ([{"role": "user", "content": "", "tool_calls": [CALL]}], "tool_calls must be a list, of an assistant"),
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
