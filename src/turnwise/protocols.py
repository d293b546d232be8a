"""The tag protocols in which a policy and the environment talk: how each is written and read."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from turnwise import search_tags, tags
from turnwise.errors import unknown_name
from turnwise.tools import Tool
from turnwise.types import Action, ToolResult

ProtocolName = Literal["tools", "search"]
"""`tools`: JSON calls of any tool (`turnwise.tags`); `search`: queries alone (`turnwise.search_tags`)."""


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
    last_turn: str = ""
    """What is said, below a result, before the last granted turn; blank for nothing."""

    @property
    def tags(self) -> tuple[str, str, str, str]:
        return self.thinking, self.calling, self.returned, self.answering


def _any_tools(tools: Mapping[str, Tool]) -> None:
    """Every tool can be called."""


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
        last_turn=search_tags.NO_SEARCHES_LEFT,
    ),
}


def protocol_named(name: str) -> TagProtocol:
    """The protocol of a name; ConfigError for an unknown one."""
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def reply_text(protocol: TagProtocol, results: Sequence[ToolResult], *, last: bool) -> str:
    """The environment's message after calls; `last` where the turn that follows is the last one granted."""
    text = "\n".join(map(protocol.result_text, results))
    return f"{text}\n{protocol.last_turn}" if last and protocol.last_turn else text


def is_well_formed(text: str, protocol: TagProtocol, block: str) -> bool:
    """Whether a message is a block of thoughts and then one of the tag `block`, and nothing else.

    Each tag stands once; white space may stand around the blocks. arXiv 2505.11821 v2, section 5.2.
    """
    form = rf"\s*<{protocol.thinking}>(.*?)</{protocol.thinking}>\s*<{block}>(.*?)</{block}>\s*"
    found = re.fullmatch(form, text, re.S)
    any_tag = rf"<\s*/?\s*(?:{'|'.join(protocol.tags)})\s*>"
    return found is not None and not any(re.search(any_tag, inner, re.I) for inner in found.groups())
