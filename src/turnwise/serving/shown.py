"""What of the policy's text a client is shown as content: the answer, without thoughts and without calls.

The same rule serves whole messages and those that are still being drawn. There, only what can no longer change is
given, so that the parts of a stream, put together, are the content of the whole response.
"""

from collections.abc import Sequence

from turnwise.protocols import TagProtocol

PYTHON_TAG = "<|python_tag|>"


def shown(protocol: TagProtocol, text: str, *, done: bool, thinking: bool = False) -> tuple[str, str]:
    """The content in a message of the policy, and what stands from its first call on.

    With `done` False the message may go on. `thinking`: the prompt has opened the thoughts already.
    """
    if protocol.own_format:
        return _own(protocol, text, done=done, thinking=thinking)
    return _tagged(protocol, text, done=done)


def _tagged(protocol: TagProtocol, text: str, *, done: bool) -> tuple[str, str]:
    """The text in the answer's tags. A message with neither answer nor call is shown whole, once it is done."""
    opens = [f"<{tag}>" for tag in (protocol.thinking, protocol.calling, protocol.answering)]
    at = 0
    while True:
        found = [place if (place := text.find(tag, at)) >= 0 else len(text) for tag in opens]
        first = min(found)
        if first == len(text):
            return (text if done else "", "")
        if first == found[1]:
            return "", text[first:]
        if first == found[2]:
            return _inside(text[first + len(opens[2]) :], f"</{protocol.answering}>", done=done), ""
        closing = text.find(f"</{protocol.thinking}>", first)
        if closing < 0 and not done:
            return "", ""
        # Thoughts that are never closed are text like any other.
        at = closing if closing >= 0 else first + len(opens[0])


def _inside(text: str, closing: str, *, done: bool) -> str:
    """What stands before a closing tag, without white space around it; without that tag, what is sure to."""
    body, closed, _ = text.partition(closing)
    return body.strip() if closed or done else _certain(body.lstrip(), [closing])


def _certain(text: str, tags: Sequence[str]) -> str:
    """The text without what may be the beginning of a tag, or white space before one."""
    longest = max((n for tag in tags for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
    return text[: len(text) - longest].rstrip()


def _own(protocol: TagProtocol, text: str, *, done: bool, thinking: bool) -> tuple[str, str]:
    """All text after the thoughts; of a message with calls, what stands before all that may begin one."""
    rest = _after_thoughts(protocol, text.lstrip(), done=done, thinking=thinking).lstrip()
    begins = [f"<{protocol.calling}>", PYTHON_TAG, "\n{"]
    places = [place for tag in begins if (place := rest.find(tag)) >= 0]
    first = 0 if rest.startswith("{") else min(places, default=len(rest))
    if not done:
        return (rest[:first].rstrip() if first < len(rest) else _certain(rest, begins)), ""
    if not protocol.parse(text).num_calls:
        return rest.rstrip(), ""
    return rest[:first].rstrip(), rest[first:]


def _after_thoughts(protocol: TagProtocol, text: str, *, done: bool, thinking: bool) -> str:
    """What follows the thoughts; nothing while they may go on."""
    opening = f"<{protocol.thinking}>"
    if thinking or text.startswith(opening):
        return text.partition(f"</{protocol.thinking}>")[2]
    return "" if not done and opening.startswith(text) else text
