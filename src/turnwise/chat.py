"""Messages to token ids and back: the only module that knows a chat template.

Conversations grow by appending tokens. Nothing that was sampled is ever decoded and encoded again, and text
from questions, tools or corpora can never become a special token: special ids enter only as the frame here.

The frame is ChatML, as Qwen models use it:

    <|im_start|>role⏎ content <|im_end|>⏎
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from turnwise.errors import RunError
from turnwise.types import Message

START = "<|im_start|>"
END = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIALS = (PAD, START, END)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' -}}
    {%- if message.role == 'tool' -%}
        {{- '<result>\n' + message.content + '\n</result>' -}}
    {%- else -%}
        {{- message.content or '' -}}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {{- '<tool>\n{"name": ' + call.function.name | tojson + ', "args": ' -}}
        {{- call.function.arguments | tojson + '}\n</tool>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
"""The frame as a Jinja template, for tools that render conversations themselves.

Tool calls and what they return are written in the tags of protocol `tools`. The tools' descriptions are not in it: they
stand in the system message."""


class Tokenizer(Protocol):
    """Plain text to ids and back, and the ids of the special tokens."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text`, none of them special, whatever the text says."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        ...

    def special_id(self, token: str) -> int:
        """Id of one of the special tokens."""
        ...

    @property
    def vocab_size(self) -> int: ...


class ByteTokenizer:
    """One token per UTF-8 byte, specials above them. For environments and tests without a model."""

    vocab_size = 256 + len(SPECIALS)

    def encode_text(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def special_id(self, token: str) -> int:
        return 256 + SPECIALS.index(token)


class BPETokenizer:
    """A `tokenizers.Tokenizer` that never reads a special token out of text."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        missing = [token for token in SPECIALS if tokenizer.token_to_id(token) is None]
        if missing:
            raise RunError(
                f"the policy's tokenizer must have the ChatML tokens; it lacks {', '.join(missing)}; "
                "use a checkpoint with a ChatML tokenizer, such as the Qwen family's"
            )
        if set(self.encode_text("".join(SPECIALS))) & set(map(self.special_id, SPECIALS)):
            raise RunError(
                f"the tokens {', '.join(SPECIALS)} must be marked special in the policy's tokenizer; they are plain "
                'added tokens, which any text could contain; set "special" in tokenizer.json'
            )

    def encode_text(self, text: str) -> list[int]:
        clean = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become "?"
        return self.backend.encode(clean, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def special_id(self, token: str) -> int:
        return self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)


class Chat:
    """The ChatML frame over a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.special_id(PAD)
        self.start_id = tokenizer.special_id(START)
        self.end_id = tokenizer.special_id(END)
        self._newline = tokenizer.encode_text("\n")
        self._assistant = [self.start_id, *tokenizer.encode_text("assistant\n")]
        self.empty_reply_length = len(self.reply_ids([Message(role="user", content="")]))
        """Tokens of a reply of one message without content."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; never a special token."""
        return self.tokenizer.encode_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return self.tokenizer.decode(ids)

    def message_ids(self, message: Message, *, max_content: int | None = None) -> list[int]:
        """One framed message; its content cut to `max_content` tokens where that is given."""
        content = self.encode_text(message.content)[:max_content]
        role = self.encode_text(f"{message.role}\n")
        return [self.start_id, *role, *content, self.end_id, *self._newline]

    def prompt_ids(self, messages: Iterable[Message]) -> list[int]:
        """A conversation's beginning, up to where the policy's first token comes."""
        return [i for m in messages for i in self.message_ids(m)] + self._assistant

    def reply_ids(self, messages: Iterable[Message], *, max_ids: int | None = None) -> list[int]:
        """What follows the policy's `<|im_end|>`: the environment's messages and the next turn's header.

        Where that is longer than `max_ids`, message contents are cut at their ends; the frame stays whole.
        """
        messages = list(messages)
        ids = self._framed_reply(messages, None)
        if max_ids is not None and len(ids) > max_ids:
            ids = self._framed_reply(messages, max(0, max_ids - self._frame_length(messages)))
        return ids

    def _frame_length(self, messages: Iterable[Message]) -> int:
        empty = [Message(role=m.role, content="") for m in messages]
        return len(self._framed_reply(empty, None))

    def _framed_reply(self, messages: list[Message], budget: int | None) -> list[int]:
        ids = list(self._newline)
        for message in messages:
            framed = self.message_ids(message, max_content=budget)
            if budget is not None:
                budget -= min(budget, len(self.encode_text(message.content)))
            ids += framed
        return ids + self._assistant


def byte_chat() -> Chat:
    """A chat that needs no model and no tokenizer file: one token per byte."""
    return Chat(ByteTokenizer())


def load_chat(folder: Path) -> Chat:
    """The chat of a checkpoint folder, read from its `tokenizer.json`."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RunError(f"a checkpoint must hold tokenizer.json; {path} does not exist")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise RunError(f"{path} must be a tokenizer file; it cannot be read ({error})") from error
    return Chat(BPETokenizer(backend))
