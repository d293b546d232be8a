"""The models' own formats: what is a call, an answer, an error; and what is written reads back equal."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from turnwise.formats import (
    coder_parse,
    coder_text,
    hermes_parse,
    hermes_text,
    llama3_parse,
    llama3_text,
    tool_schemas,
    typed_call,
)
from turnwise.protocols import PROTOCOLS, is_well_formed, read_message
from turnwise.tools import tool, tool_mapping
from turnwise.types import Action, ToolCall

CALL = ToolCall(name="search", arguments={"query": "Kenya"})
HERMES = '<tool_call>\n{"name": "search", "arguments": {"query": "Kenya"}}\n</tool_call>'
LLAMA = '{"name": "search", "parameters": {"query": "Kenya"}}'
CODER = "<tool_call>\n<function=search>\n<parameter=query>\nKenya\n</parameter>\n</function>\n</tool_call>"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(
    st.builds(
        ToolCall, name=st.sampled_from(["search", "look_up"]), arguments=st.dictionaries(texts, values, max_size=3)
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize(("parse", "text"), [(hermes_parse, hermes_text), (llama3_parse, llama3_text)])
@settings(max_examples=40)
@given(made=calls, thoughts=st.sampled_from([None, "so"]))
def test_calls_as_written_read_back_equal(parse, text, made: list[ToolCall], thoughts: str | None):
    assume(thoughts or "</think>" not in text(made))  # would end thoughts, as in the models' own templates
    before = f"<think>\n{thoughts}\n</think>\n\n" if thoughts else ""
    assert parse(before + text(made)) == Action(reasoning=thoughts, tool_calls=tuple(made))


lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=12)


@settings(max_examples=40)
@given(arguments=st.dictionaries(st.sampled_from(["query", "a b", "ü"]), lines))
def test_texts_of_qwen3_coder_read_back_equal(arguments: dict[str, str]):
    made = ToolCall(name="search", arguments=arguments)
    assert coder_parse(coder_text([made, made])).tool_calls == (made, made)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (HERMES, (CALL,)),
        (f"I look it up.\n{HERMES}\n{HERMES}", (CALL, CALL)),
        (HERMES.removesuffix("</tool_call>"), (CALL,)),  # the end of the message closes the last
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
            (ToolCall(name="f", arguments={"a": "</tool_call>"}),),
        ),
        (f"so</think>{HERMES}", (CALL,)),  # a template that opens the thoughts itself
        (f"<think>{HERMES}</think>{HERMES}", (CALL,)),
    ],
)
def test_calls_of_hermes(text: str, found: tuple[ToolCall, ...]):
    assert (hermes_parse(text).tool_calls, hermes_parse(text).error) == (found, None)


@pytest.mark.parametrize(
    ("text", "kept", "message"),
    [
        ("<tool_call>", 0, "must be JSON"),
        ('<tool_call>{"name": "f"}</tool_call>', 1, '"arguments" must be an object'),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', 1, '"arguments" must be an object'),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', 0, 'with the "name" of a tool'),
        ("<tool_call>[1]</tool_call>", 0, 'with the "name" of a tool'),
        (f"{HERMES}<tool_call>x</tool_call>", 1, "must be JSON"),
        (f"{HERMES.removesuffix('</tool_call>')}{HERMES}", 0, "one JSON object and be closed"),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', 0, "must be JSON"),
        ('<tool_call>{"name": "f", "arguments": {"a": "\ud800"}}</tool_call>', 0, "must be JSON"),
        (
            '<tool_call>{"name": "f", "arguments": ' + '{"a": ' * 99 + "1" + "}" * 99 + "}</tool_call>",
            0,
            "must be JSON",
        ),
    ],
)
def test_calls_of_hermes_that_cannot_be_read_say_why(text: str, kept: int, message: str):
    action = hermes_parse(text)
    assert len(action.tool_calls) == kept
    assert message in (action.error or "")
    assert action.answer is None


def test_an_unreadable_call_comes_after_those_that_could_be_read():
    action = hermes_parse(f"{HERMES}<tool_call>x</tool_call>{HERMES}")
    assert action.tool_calls == (CALL,)
    assert action.num_calls == 2


@pytest.mark.parametrize("parse", [hermes_parse, llama3_parse, coder_parse])
def test_a_message_without_a_call_is_the_answer(parse):
    assert parse("It is Nairobi.").answer == "It is Nairobi."
    assert parse("<think>\nhm\n</think>\n\nIt is <answer>\nNairobi\n</answer>.") == Action(
        reasoning="hm", answer="Nairobi"
    )
    assert parse("so</think> \n") == Action(reasoning="so")
    assert parse("<think>still thinking: It is Nairobi") == Action(reasoning="still thinking: It is Nairobi")
    assert parse("") == Action()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LLAMA, (CALL,)),
        (f" {LLAMA}; {LLAMA}\n", (CALL, CALL)),
        (f"<|python_tag|>{LLAMA}", (CALL,)),
        (f"I look it up:\n{LLAMA}", (CALL,)),
        (LLAMA.replace("parameters", "arguments"), (CALL,)),
        (LLAMA.replace("{", '{"type": "function", ', 1), (CALL,)),
        ('<|python_tag|>search.call(query="Kenya")', (CALL,)),
        (
            '<|python_tag|>f.call(a="x", b="say "hi", y")',
            (ToolCall(name="f", arguments={"a": "x", "b": 'say "hi", y'}),),
        ),
        ("<|python_tag|>f.call()", (ToolCall(name="f", arguments={}),)),
    ],
)
def test_calls_of_llama3(text: str, found: tuple[ToolCall, ...]):
    assert (llama3_parse(text).tool_calls, llama3_parse(text).error) == (found, None)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("{", 0), ('{"name": "f"}', 1), (f"{LLAMA} and then", 1), ("<|python_tag|>print(1)", 0), (f"{LLAMA}; x", 1)],
)
def test_calls_of_llama3_that_cannot_be_read(text: str, kept: int):
    action = llama3_parse(text)
    assert (len(action.tool_calls), action.answer) == (kept, None)
    assert action.error


def test_json_below_the_first_line_that_is_no_call_is_text():
    assert llama3_parse('The record is\n{"name": "Kenya"}').answer == 'The record is\n{"name": "Kenya"}'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CODER, (CALL,)),
        (f"Well.\n{CODER}\n{CODER}", (CALL, CALL)),
        (CODER.removeprefix("<tool_call>\n"), (CALL,)),
        (CODER.removesuffix("\n</function>\n</tool_call>"), (CALL,)),
        ("<function=search><parameter=query>Kenya", (CALL,)),
        ("<tool_call><function=f></function></tool_call>", (ToolCall(name="f", arguments={}),)),
        (CODER.replace("\n</parameter>", ""), (CALL,)),  # the next tag ends a value, as it does for others who read it
        (CODER.replace("Kenya", "\na\nb\n"), (ToolCall(name="search", arguments={"query": "\na\nb\n"}),)),
    ],
)
def test_calls_of_qwen3_coder(text: str, found: tuple[ToolCall, ...]):
    assert (coder_parse(text).tool_calls, coder_parse(text).error) == (found, None)


@pytest.mark.parametrize(
    "text",
    ["<tool_call>x</tool_call>", "<function=>", "<function=f>junk</function>", f"<tool_call>{CODER[11:]}<tool_call>"],
)
def test_calls_of_qwen3_coder_that_cannot_be_read(text: str):
    action = coder_parse(text)
    assert action.error
    assert action.answer is None


def look_up(
    word: str,
    count: int,
    share: float = 0.5,
    exact: bool = False,
    among: list[str] | None = None,
    more: dict | None = None,
) -> str:
    """Looks a word up."""
    return word


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("word", "3", "3"),
        ("word", "null", "null"),
        ("count", "3", 3),
        ("count", " 3\n", 3),
        ("count", "three", "three"),
        ("share", "1", 1),
        ("share", "0.25", 0.25),
        ("exact", "true", True),
        ("exact", "False", False),
        ("among", '["a", "ü"]', ["a", "ü"]),
        ("among", "null", None),
        ("among", "None", None),
        ("more", '{"a": {"b": [1]}}', {"a": {"b": [1]}}),
        ("unknown", "3", "3"),
    ],
)
def test_texts_become_what_the_tool_wants(key: str, text: str, value: object):
    call = ToolCall(name="look_up", arguments={key: text})
    typed = typed_call(call, tool(look_up).parameters).arguments
    assert typed == {key: value}
    assert type(typed[key]) is type(value)


def test_the_protocol_gives_types_by_the_tool_that_is_called():
    tools = tool_mapping([tool(look_up)])
    text = coder_text([ToolCall(name="look_up", arguments={"word": "7", "count": 7})])
    action = read_message(PROTOCOLS["qwen3-coder"], text, tools)
    assert action.tool_calls == (ToolCall(name="look_up", arguments={"word": "7", "count": 7}),)
    assert read_message(PROTOCOLS["qwen3-coder"], text, {}).tool_calls[0].arguments == {"word": "7", "count": "7"}


@pytest.mark.parametrize(("name", "call"), [("hermes", HERMES), ("llama3", LLAMA), ("qwen3-coder", CODER)])
def test_a_message_is_well_formed_where_it_can_be_read(name: str, call: str):
    form = PROTOCOLS[name]
    assert is_well_formed(call, form, form.calling)
    assert not is_well_formed(call, form, form.answering)
    assert is_well_formed("Nairobi", form, form.answering)
    assert not is_well_formed("{" if name == "llama3" else "<tool_call>", form, form.calling)


def test_schemas_are_plain_json():
    (schema,) = tool_schemas(tool_mapping([tool(look_up)]))
    assert json.loads(json.dumps(schema)) == schema
    assert schema["function"]["parameters"]["required"] == ["word", "count"]


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize(
    "piece",
    [
        *("<think>", "<answer>", "<tool_call>", "</tool_call>", "<function=f>", "<parameter=a>", '\n{"a":[', "{", "["),
        *(
            "<reasoning>",
            "<tool>",
            "<search>",
            "< ",
            " ",
            '<|python_tag|>f.call(a="',
            '", b="',
            '\n{"name": "f", "arguments": {}}',
        ),
    ],
)
def test_long_messages_are_read_in_linear_time(name: str, piece: str):
    # 100,000 characters: a parser that looked at each pair of openings would take minutes.
    for before, after in (("", ""), ("<tool_call>", "</tool_call>")):
        some, many = (PROTOCOLS[name].parse(before + piece * n + after) for n in (200, 100_000 // len(piece)))
        assert (some.error is None, some.answer is None) == (many.error is None, many.answer is None)
