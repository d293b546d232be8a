"""Untrusted text made harmless for a page and for a terminal.

Questions, policy text and tool results are whatever somebody's corpus holds: markup, terminal
escapes, characters that reverse the reading order. Nothing is dropped: each becomes visible.
"""

import html
import re
import unicodedata
from collections.abc import Sequence

from turnwise.protocols import PROTOCOLS

_TAG = rf"</?(?:{'|'.join(dict.fromkeys(tag for protocol in PROTOCOLS.values() for tag in protocol.tags))})>"
_KEPT = "\n\t"


def visible(text: str) -> str:
    """`text` with a visible sign for every control, direction and unpaired surrogate character.

    C0 controls become their Unicode pictures (ESC is ␛), others ⟨U+202E⟩; newline and tab stay.
    """
    text = text.replace("\r\n", "\n")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _sign(c) for c in text)


def _sign(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if unicodedata.category(char) == "Zs":  # a no-break or typographic space
        return " "
    return f"⟨U+{code:04X}⟩"


def one_line(text: str) -> str:
    """`text` made visible, on one line."""
    return " ".join(visible(text).split())


def escaped(text: str) -> str:
    """`text` as HTML text or as the value of a quoted attribute."""
    return html.escape(visible(text), quote=True)


def shortened(text: str, limit: int) -> str:
    """The first `limit` characters of `text`, and how many were left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} … ({len(text) - limit:,} more characters)"


def marked_up(text: str, answers: Sequence[str]) -> str:
    """`text` as HTML, with protocol tags set back and accepted answers underlined."""
    names = [re.escape(visible(a)) for a in answers if len(a.strip()) >= 2]
    names.sort(key=len, reverse=True)
    words = rf"|(?P<gold>(?<!\w)(?:{'|'.join(names)})(?!\w))" if names else ""
    text, out, end = visible(text), [], 0
    for match in re.finditer(rf"(?P<tag>{_TAG}){words}", text, re.IGNORECASE):
        kind = "i" if match["tag"] else "u"
        out += [html.escape(text[end : match.start()])]
        out += [f"<{kind}>{html.escape(match[0])}</{kind}>"]
        end = match.end()
    return "".join([*out, html.escape(text[end:])])
