"""The sampled tokens of a turn as pieces of its text, by the tokenizer that a run's policy was saved with."""

from collections.abc import Callable, Sequence
from pathlib import Path

Pieces = Callable[[Sequence[int], str], list[str] | None]
"""The text of each token, empty where it adds none; None where they do not make up the turn's text."""


def token_pieces(run: Path) -> Pieces | None:
    """What cuts the turns of a run into tokens; None where the run holds no tokenizer that can be read."""
    file = run / "best" / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        from tokenizers import Tokenizer
        from tokenizers.decoders import DecodeStream
    except ImportError:  # a part of the extra `train`; the page does without
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # what the library raises for a damaged file
        return None

    def pieces(ids: Sequence[int], text: str) -> list[str] | None:
        stream, out = DecodeStream(skip_special_tokens=True), []
        try:
            out = [stream.step(tokenizer, token) or "" for token in ids]
        except Exception:  # ids of another tokenizer
            return None
        joined = "".join(out)
        if not out or not text.startswith(joined):
            return None
        out[-1] += text[len(joined) :]  # a character whose bytes never came to an end
        return out

    return pieces
