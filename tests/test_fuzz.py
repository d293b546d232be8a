"""A seeded share of the fuzzing; the whole of it is `python -m turnwise.fuzz`."""

import random

import pytest

from turnwise import fuzz
from turnwise.fuzz import damaged, fault, fuzz_chat, main, random_message, reference_calls
from turnwise.protocols import PROTOCOLS
from turnwise.types import Action, ToolCall

CHAT = fuzz_chat()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_generated_and_damaged_messages_are_read_and_forge_nothing(name: str):
    found = fuzz.fuzz(name, 400, 0, CHAT)
    assert found.failures == []
    assert found.with_calls > 100
    assert found.with_error > 40
    assert found.compared > 60
    assert found.undamaged > 40


def test_equal_seeds_make_equal_messages():
    def made(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [damaged(rng, random_message(rng, "hermes")[0], "other") for _ in range(20)]

    assert made(1) == made(1) != made(2)


def test_what_is_wrong_is_found():
    call, other = ToolCall(name="f", arguments={}), ToolCall(name="g", arguments={})
    right = Action(tool_calls=(call,))
    assert fault("hermes", right, (call,), [call]) is None
    assert "written" in (fault("hermes", right, (other,), None) or "")
    assert "plain reading" in (fault("hermes", right, None, [other]) or "")
    assert "beside" in (fault("hermes", Action(tool_calls=(call,), answer="a"), None, None) or "")
    deep: dict = {}
    for _ in range(2000):
        deep = {"a": deep}
    assert "cannot be written" in (
        fault("hermes", Action(tool_calls=(ToolCall(name="f", arguments=deep),)), None, None) or ""
    )


def test_a_token_that_text_forges_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(CHAT.tokenizer), "broken", lambda self, text, names=None: text.replace("\ud800", "?"))
    assert any("control token" in failure for failure in fuzz.fuzz("hermes", 100, 0, CHAT).failures)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tools", '<reasoning>a</reasoning><tool>{"name": "f", "args": {}}</tool>'),
        ("hermes", 'so <tool_call>{"name": "f", "arguments": {}}'),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}'),
        ("qwen3-coder", "<tool_call><function=f></function></tool_call>"),
    ],
)
def test_the_plain_reading_finds_a_call(name: str, text: str):
    assert reference_calls(name, text) == [ToolCall(name="f", arguments={})]
    assert reference_calls(name, "Nairobi") is None


def test_the_command_counts_and_says_what_failed(capsys: pytest.CaptureFixture[str]):
    assert main(["--count", "20", "--protocols", "hermes", "search"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["hermes", "search"]
    assert all("20 messages" in line and "0 failures" in line for line in lines)
