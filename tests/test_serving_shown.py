"""What of a message is shown, whole and while it grows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.protocols import PROTOCOLS
from turnwise.serving.shown import shown

CALL = '<tool>\n{"name": "search", "args": {}}\n</tool>'
HERMES = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'
LLAMA = '{"name": "search", "parameters": {}}'


@pytest.mark.parametrize(
    ("protocol", "text", "content", "calls"),
    [
        ("tools", "<reasoning>\nx\n</reasoning>\n<answer>\nLima\n</answer>", "Lima", ""),
        ("tools", f"<reasoning>\nx\n</reasoning>\n{CALL}", "", CALL),
        ("tools", "<reasoning>\n<answer>no</answer>\n</reasoning>\n<answer>yes</answer>", "yes", ""),
        ("tools", "<answer>\nLima, the cap", "Lima, the cap", ""),
        ("tools", "neither", "neither", ""),
        ("tools", "<reasoning>\nnever closed", "<reasoning>\nnever closed", ""),
        ("tools", "<reasoning>\nnever closed <answer>a</answer>", "a", ""),
        ("search", "<think>\nx\n</think>\n<search>\nPeru\n</search>", "", "<search>\nPeru\n</search>"),
        ("search", "<think>\nx\n</think>\n<answer>\nLima\n</answer>", "Lima", ""),
        ("hermes", "<think>\nx\n</think>\n\nIt is Lima.", "It is Lima.", ""),
        ("hermes", f"Let me see.\n{HERMES}", "Let me see.", HERMES),
        ("hermes", "a < b and\n{x}", "a < b and\n{x}", ""),
        ("llama3", LLAMA, "", LLAMA),
        ("llama3", "Plain.", "Plain.", ""),
    ],
)
def test_the_content_of_a_message(protocol: str, text: str, content: str, calls: str):
    found = shown(PROTOCOLS[protocol], text, done=True)
    assert (found[0], found[1].strip()) == (content, calls)


def test_thoughts_that_the_prompt_has_opened_are_not_shown():
    assert shown(PROTOCOLS["hermes"], "so.\n</think>\n\nLima", done=True, thinking=True)[0] == "Lima"
    assert shown(PROTOCOLS["hermes"], "so.", done=False, thinking=True)[0] == ""


def test_an_answer_is_shown_while_it_is_drawn_but_no_tag_is():
    text = "<reasoning>\nx\n</reasoning>\n<answer>\nLima is it\n</answer>"
    seen = [shown(PROTOCOLS["tools"], text[:n], done=False)[0] for n in range(len(text) + 1)]
    assert list(dict.fromkeys(seen))[:4] == ["", "L", "Li", "Lim"]
    assert seen[-1] == "Lima is it"
    assert not any("<" in content for content in seen)


PIECES = [
    "<reasoning>", "</reasoning>", "<tool>", "</tool>", "<answer>", "</answer>", "<think>", "</think>", "<search>",
    "<tool_call>", "</tool_call>", "<|python_tag|>", "{", "}", LLAMA, '{"name": "a", "arguments": {}}', "\n", " ", "a",
]  # fmt: skip


@given(
    protocol=st.sampled_from(sorted(PROTOCOLS)),
    pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12),
    thinking=st.booleans(),
)
def test_what_is_shown_only_grows(protocol: str, pieces: list[str], thinking: bool):
    text, form = "".join(pieces), PROTOCOLS[protocol]
    before = ""
    for n in range(len(text) + 1):
        now = shown(form, text[:n], done=False, thinking=thinking)[0]
        assert now.startswith(before)
        before = now
    content, calls = shown(form, text, done=True, thinking=thinking)
    assert content.startswith(before)
    assert text.endswith(calls)
