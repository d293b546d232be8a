"""Untrusted text made harmless for a page and for a terminal.

Questions, policy text and tool results are whatever somebody's corpus holds: markup, terminal
escapes, characters that reverse the reading order. Nothing is dropped: each becomes visible.
"""

import html
import json
import unicodedata
from typing import Any

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


def embedded_json(value: Any) -> str:
    """`value` as JSON that is safe between script tags: no <, > or & can stand in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
