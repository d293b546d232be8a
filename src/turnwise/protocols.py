"""The protocols in which a policy and the environment talk: how each is written and read.

Two are of tags, all of whose messages are plain text: the paper's and Search-R1's. The others are models' own formats
(`turnwise.formats`), whose tools, calls and results the model's chat template writes.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from turnwise import formats, search_tags, tags
from turnwise.errors import ConfigError, RunError, unknown_name
from turnwise.templates import Template
from turnwise.tools import Tool
from turnwise.types import Action, Message, ToolCall, ToolResult

ProtocolName = Literal["tools", "search", "native", "hermes", "llama3", "qwen3-coder"]
"""`tools`: JSON calls of any tool (`turnwise.tags`); `search`: queries alone (`turnwise.search_tags`); the formats of
`turnwise.formats`; `native`: the one of these that the policy's chat template writes."""
NATIVE = "native"


@dataclass(frozen=True, kw_only=True)
class TagProtocol:
    """A protocol: its tags, and the functions that write and read its messages."""

    thinking: str
    """The tag of the policy's thoughts."""
    calling: str
    """The tag of its calls."""
    returned: str
    """The environment's tag, of what a call returned."""
    answering: str
    """The tag of its answer."""
    system_prompt: Callable[[Mapping[str, Tool]], str]
    parse: Callable[[str], Action]
    result_text: Callable[[ToolResult], str]
    check_tools: Callable[[Mapping[str, Tool]], None]
    """Raises ConfigError for tools that the protocol cannot call."""
    calls_text: Callable[[Sequence[ToolCall]], str]
    """Calls as the policy writes them."""
    last_turn: str = ""
    """What is said, below a result, before the last granted turn; blank for nothing."""
    own_format: bool = False
    """Whether it is a model's own format, in which a message without a call is the answer."""
    typed: bool = True
    """Whether a call's arguments have types; otherwise they are texts, which the tool's schema types."""

    @property
    def tags(self) -> tuple[str, str, str, str]:
        return self.thinking, self.calling, self.returned, self.answering


def _any_tools(tools: Mapping[str, Tool]) -> None:
    """Every tool can be called."""


def _own_format(
    parse: Callable[[str], Action], calls_text: Callable[[Sequence[ToolCall]], str], *, typed: bool = True
) -> TagProtocol:
    return TagProtocol(
        thinking=formats.THINK,
        calling=formats.CALL,
        returned=formats.RESPONSE,
        answering=formats.ANSWER,
        system_prompt=formats.system_prompt,
        parse=parse,
        result_text=lambda result: result.text,
        check_tools=_any_tools,
        calls_text=calls_text,
        own_format=True,
        typed=typed,
    )


PROTOCOLS: Mapping[str, TagProtocol] = {
    "tools": TagProtocol(
        thinking="reasoning",
        calling="tool",
        returned="result",
        answering="answer",
        system_prompt=tags.system_prompt,
        parse=tags.parse,
        result_text=tags.result_text,
        check_tools=_any_tools,
        calls_text=tags.calls_text,
    ),
    "search": TagProtocol(
        thinking="think",
        calling="search",
        returned="information",
        answering="answer",
        system_prompt=search_tags.system_prompt,
        parse=search_tags.parse,
        result_text=search_tags.result_text,
        check_tools=search_tags.check_tools,
        calls_text=search_tags.calls_text,
        last_turn=search_tags.NO_SEARCHES_LEFT,
    ),
    "hermes": _own_format(formats.hermes_parse, formats.hermes_text),
    "llama3": _own_format(formats.llama3_parse, formats.llama3_text),
    "qwen3-coder": _own_format(formats.coder_parse, formats.coder_text, typed=False),
}


def protocol_named(name: str) -> TagProtocol:
    """The protocol of a name; ConfigError for an unknown one."""
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def native_protocol(template: Template | None, source: str) -> str:
    """The name of the format in which a chat template writes calls; ConfigError, which names `source`, without one."""
    advice = "take protocol 'tools'"
    if template is None:
        raise ConfigError(f"protocol 'native' must have a policy with a chat template; {source} has none; {advice}")
    call = ToolCall(name="look_up", arguments={"word": 'a "b"', "count": 3})
    schema = {"properties": {"word": {"type": "string"}, "count": {"type": "integer"}}, "required": []}
    try:
        said = _written_call(template, call)
    except RunError as error:
        raise ConfigError(f"protocol 'native' must have a template that writes calls; {error}; {advice}") from error
    for name, protocol in PROTOCOLS.items():
        found = protocol.parse(said).tool_calls if protocol.own_format else ()
        if tuple(formats.typed_call(c, schema) for c in found) == (call,):
            return name
    known = ", ".join(name for name, protocol in PROTOCOLS.items() if protocol.own_format)
    raise ConfigError(
        f"protocol 'native' must have a chat template that writes calls in one of the formats {known}; that of "
        f"{source} writes {said[:60]!r}; {advice}"
    )


def _written_call(template: Template, call: ToolCall) -> str:
    """What a template writes for an assistant's call, without the tokens that close the turn."""
    question = {"role": "user", "content": "a"}
    function = {"name": call.name, "arguments": dict(call.arguments or {})}
    made = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "call00000", "function": function}],
    }
    tools: list | None = None
    try:
        before = template.render([question], tools)
    except RunError:
        tools = []  # some templates want a list
        before = template.render([question], tools)
    after = template.render([question, made], tools, generate=False)
    same = zip(before, after, strict=False)
    begins = next((k for k, (a, b) in enumerate(same) if a != b), min(len(before), len(after)))
    return re.sub(r"(?:<[^<>]*>|\s)*\Z", "", after[begins:])


def opening(protocol: TagProtocol, tools: Mapping[str, Tool], question: str) -> tuple[Message, ...]:
    """The messages before the policy's first turn: the rules, with the tools, and the question."""
    schemas = formats.tool_schemas(tools) if protocol.own_format else ()
    return (
        Message(role="system", content=protocol.system_prompt(tools), tools=schemas),
        Message(role="user", content=question),
    )


def read_message(protocol: TagProtocol, text: str, tools: Mapping[str, Tool]) -> Action:
    """What the policy's message says; never raises. Arguments have the types that the tools want."""
    action = protocol.parse(text)
    if protocol.typed:
        return action
    calls = (formats.typed_call(c, tools[c.name].parameters) if c.name in tools else c for c in action.tool_calls)
    return dataclasses.replace(action, tool_calls=tuple(calls))


def reply_messages(
    protocol: TagProtocol, action: Action, results: Sequence[ToolResult], *, last: bool
) -> tuple[Message, ...]:
    """The environment's messages after calls; `last` where the turn that follows is the last one granted."""
    if not protocol.own_format:
        return (Message(role="user", content=reply_text(protocol, results, last=last)),)
    names = [*(call.name for call in action.tool_calls), *[None] * len(results)]
    pairs = zip(results, names, strict=False)
    return tuple(Message(role="tool", content=protocol.result_text(result), name=name) for result, name in pairs)


def said_text(protocol: TagProtocol, message: Message) -> str:
    """What the policy writes as an assistant's message: its content, and then its calls."""
    calls = protocol.calls_text(message.tool_calls) if message.tool_calls else ""
    return "\n".join(part for part in (message.content, calls) if part)


def reply_text(protocol: TagProtocol, results: Sequence[ToolResult], *, last: bool) -> str:
    """The environment's message after calls; `last` where the turn that follows is the last one granted."""
    text = "\n".join(map(protocol.result_text, results))
    return f"{text}\n{protocol.last_turn}" if last and protocol.last_turn else text


def is_well_formed(text: str, protocol: TagProtocol, block: str) -> bool:
    """Whether a message is a block of thoughts and then one of the tag `block`, and nothing else.

    Each tag stands once; white space may stand around the blocks. arXiv 2505.11821 v2, section 5.2. In a model's own
    format, where thoughts are the model's affair: whether it makes calls that can all be read, or answers.
    """
    if protocol.own_format:
        action = protocol.parse(text)
        return action.error is None and (bool(action.tool_calls) if block == protocol.calling else not action.num_calls)
    found = list(re.finditer(rf"<\s*(?:/\s*)?(?:{'|'.join(protocol.tags)})\s*>", text, re.I))
    wanted = [f"<{protocol.thinking}>", f"</{protocol.thinking}>", f"<{block}>", f"</{block}>"]
    if [tag[0] for tag in found] != wanted:
        return False
    outside = text[: found[0].start()] + text[found[1].end() : found[2].start()] + text[found[3].end() :]
    return not outside.strip()
