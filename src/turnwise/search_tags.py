"""The tag protocol of an agent that searches several times: think, search, information, answer.

The tags are those of Search-R1 (arXiv 2503.09516), which arXiv 2505.11821 v2 takes over (section 5.2).
A message of the policy holds a think block and then either a search block, whose text is the query,
or an answer block. What is found comes back in an information block, in a user message.
"""

import re
from collections.abc import Mapping, Sequence

from turnwise.errors import ConfigError
from turnwise.tags import first_block, without_blocks
from turnwise.tools import Tool, argument_fault
from turnwise.types import Action, ToolCall, ToolResult

TAGS = ("think", "search", "information", "answer")
"""The protocol's tags; `information` is the environment's."""
TOOL_NAME, ARGUMENT = "search", "query"
"""The one tool that is called, and the argument that takes the text in <search>."""
NO_SEARCHES_LEFT = "No searches are left. Answer now."
"""What follows the information block where the policy's next turn is its last."""

_ANY_TAG = re.compile(rf"<(\s*(?:/\s*)?(?:{'|'.join(TAGS)})\s*)>", re.I)
_FORM = "<search>query</search>"


def system_prompt(tools: Mapping[str, Tool]) -> str:
    """The rules of the protocol, and what the search tool says of itself."""
    about = f"Search: {tools[TOOL_NAME].description}\n" if TOOL_NAME in tools else ""
    return (
        f"{about}"
        "Find the answer to the question; search as often as you need.\n"
        "In every message, first think in <think>. Then do one of two:\n"
        "- look up one missing fact: a few words in <search>. What is found comes in <information>.\n"
        "- give a short answer in <answer>.\n"
        "Close every tag, and write nothing outside of them."
    )


def check_tools(tools: Mapping[str, Tool]) -> None:
    """Raises ConfigError unless there is one tool, `search`, that can be called with a query alone."""
    if list(tools) != [TOOL_NAME]:
        raise ConfigError(
            f"protocol 'search' must have one tool, named {TOOL_NAME!r}; got {', '.join(tools) or 'none'}; "
            "keep that one alone, or take protocol 'tools'"
        )
    fault = argument_fault(tools[TOOL_NAME].parameters, {ARGUMENT: "words"})
    if fault:
        raise ConfigError(
            f"the tool {TOOL_NAME!r} must be callable with a string {ARGUMENT!r} alone; got one where {fault}; "
            "change its parameters, or take protocol 'tools'"
        )


def parse(text: str) -> Action:
    """What the policy's message says; never raises.

    The text inside complete think blocks is not looked at. Of the first search block and the first
    complete answer block, the one that opens first counts. A search block that is not closed, is
    empty or holds another tag gives `error`; an answer that is not closed is none.
    """
    thoughts = first_block(text, "think")
    reasoning = None if thoughts is None else thoughts.strip()
    acting = without_blocks(text, "think")
    answer = first_block(acting, "answer")
    search_at = acting.find("<search>")
    if answer is not None and not 0 <= search_at < acting.find("<answer>"):
        return Action(reasoning=reasoning, answer=answer.strip())
    if search_at < 0:
        return Action(reasoning=reasoning)
    query, error = _query(acting[search_at + len("<search>") :])
    calls = () if error else (ToolCall(name=TOOL_NAME, arguments={ARGUMENT: query}),)
    return Action(reasoning=reasoning, tool_calls=calls, error=error)


def calls_text(calls: Sequence[ToolCall]) -> str:
    """Calls as the policy writes them, a block each: their queries alone."""
    return "\n".join(f"<search>{(call.arguments or {}).get(ARGUMENT, '')}</search>" for call in calls)


def _query(rest: str) -> tuple[str, str | None]:
    """The query in the text that follows a `<search>`, and why it is none."""
    body, closing, _ = rest.partition("</search>")
    query = body.strip()
    if not closing:
        return query, f"<search> must be closed by </search>: {_FORM}"
    if not query:
        return query, f"<search> must hold a query: {_FORM}"
    if _ANY_TAG.search(query) or query != query.encode("utf-8", "replace").decode("utf-8"):
        return query, f"<search> must hold words alone: {_FORM}"
    return query, None


def result_text(result: ToolResult) -> str:
    """The environment's message about a search.

    Tags of the protocol inside the tool's text get square brackets, so that they mean nothing.
    """
    return "<information>\n" + _ANY_TAG.sub(r"[\1]", result.text) + "\n</information>"
