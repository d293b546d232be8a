"""Messages to token ids and back: the only module that knows how a chat is framed.

Conversations grow by appending tokens. Nothing that was sampled is ever decoded and encoded again, and text
from questions, tools or corpora can never become a control token: those enter only as the frame here.

A checkpoint with a chat template of its own is framed by it (`TemplateChat`); any other by ChatML (`Chat`):

    <|im_start|>role⏎ content <|im_end|>⏎

`load_chat(folder)` is the chat of a checkpoint, `save_chat` writes it. For whole conversations in the shape of
OpenAI's API see `turnwise.conversations`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from turnwise.errors import RunError
from turnwise.formats import PYTHON_TAG
from turnwise.records import parsed
from turnwise.templates import Template, read_template, write_template
from turnwise.types import Message, ToolCall

START = "<|im_start|>"
END = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIALS = (PAD, START, END)
BREAKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that are no characters, one of which keeps a control token apart inside text."""
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
        return bytes([i for i in ids if i < 256]).decode("utf-8", "replace")

    def special_id(self, token: str) -> int:
        return 256 + SPECIALS.index(token)


class BPETokenizer:
    """A `tokenizers.Tokenizer` that never reads a control token out of text.

    Control tokens are the special ones, and those added to the vocabulary for a format, such as Qwen's `<tool_call>`.
    Where text has one's name it is read with a break after the name's first character, so that its pieces are plain
    tokens. `encode_framed` reads text that a template has framed: in it names without a break are control tokens.
    """

    def __init__(self, backend: Any) -> None:
        from tokenizers import AddedToken, Tokenizer

        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.control = {t.content: i for i, t in added.items() if t.special or len(t.content.strip(" \t\r\n▁")) > 1}
        """Ids of the control tokens by name."""
        self._names = names_pattern(self.control)
        self._endings = tuple({name[k:] for name in self.control for k in range(1, len(name))})
        self._beginnings = tuple({name[:k] for name in self.control for k in range(1, len(name))})
        self._reader = Tokenizer.from_str(backend.to_str())
        self._break = next(char for char in BREAKS if backend.token_to_id(char) is None)
        self._reader.add_special_tokens([AddedToken(self._break, special=True, normalized=False)])
        self._break_id = self._reader.token_to_id(self._break)
        self._folds = any(token.normalized for token in added.values() if token.content in self.control)
        unknown = getattr(backend.model, "unk_token", None)  # any text may have it, and it frames nothing
        self._forbidden = frozenset(i for name, i in self.control.items() if name != unknown)
        for name in self.control:
            if self.control[name] in self._forbidden.intersection(self.encode_text(name)):
                raise RunError(
                    f"text must never become a control token; the policy's tokenizer reads {name!r} out of any text; "
                    "use a tokenizer without that token"
                )

    def broken(self, text: str, names: re.Pattern[str] | None = None) -> str:
        """`text` with a break in every name of a control token, or of those that `names` finds.

        At its ends too, where a name could arise together with what is written around it.
        """
        names = names or self._names
        clean = text.encode("utf-8", "replace").decode("utf-8").replace(self._break, "\ufffd")  # "?" for surrogates
        while names.search(clean):
            clean = names.sub(lambda found: f"{found[0][0]}{self._break}{found[0][1:]}", clean)
        if self._folds and names is self._names and self._reads_control(clean):
            clean = self._break.join(clean)  # what the tokenizer's normaliser makes equal to a name
        return clean

    def joined(self, text: str) -> str:
        """`broken` text, with breaks at those ends that could be a part of a name together with what stands there."""
        text = self.broken(text)
        stripped = text.strip()
        if not stripped:
            return text
        start = text.index(stripped)
        before, after = text[:start], text[start + len(stripped) :]
        inside = any(stripped in name for name in self.control)
        first = self._break if inside or stripped.startswith(self._endings) else ""
        last = self._break if inside or stripped.endswith(self._beginnings) else ""
        return f"{before}{first}{stripped}{last}{after}"

    def _reads_control(self, text: str) -> bool:
        return not self._forbidden.isdisjoint(self._reader.encode(text, add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        return self.encode_framed(self._break + self.broken(text))

    def encode_said(self, text: str, names: re.Pattern[str]) -> list[int]:
        """Ids of text in which only the control tokens that `names` finds stay text."""
        return self.encode_framed(self._break + self.broken(text, names))

    def encode_framed(self, text: str) -> list[int]:
        """Ids of text whose breaks were put there by `broken`; names of control tokens without one are those tokens."""
        return [i for i in self._reader.encode(text, add_special_tokens=False).ids if i != self._break_id]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of `ids`, the names of control tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def special_id(self, token: str) -> int:
        return self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)


def names_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """What finds each of some names in text, the longest first; nothing where there are none."""
    listed = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed)) or "(?!)")


class Chat:
    """The ChatML frame over a tokenizer."""

    template: Template | None = None
    """The checkpoint's own template, where it frames the chat."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if isinstance(tokenizer, BPETokenizer):
            _check_chatml(tokenizer)
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.special_id(PAD)
        self.start_id = tokenizer.special_id(START)
        self.end_id = tokenizer.special_id(END)
        self.stop_ids: tuple[int, ...] = (self.end_id,)
        """The special tokens that end the policy's turn."""
        self._newline = tokenizer.encode_text("\n")
        self._assistant = [self.start_id, *tokenizer.encode_text("assistant\n")]
        self.empty_reply_length = len(self.reply_ids([Message(role="user", content="")]))
        """Tokens of a reply of one message without content."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; never a control token."""
        return self.tokenizer.encode_text(text)

    def encode_said(self, text: str) -> list[int]:
        """Ids of what the policy says in `text`, as it would sample them: the tokens of its format among them."""
        return self.encode_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without the frame's special tokens."""
        return self.tokenizer.decode(ids)

    def message_ids(self, message: Message, *, max_content: int | None = None) -> list[int]:
        """One framed message; its content cut to `max_content` tokens where that is given."""
        if message.tool_calls or message.tools or message.role == "tool":
            raise RunError(
                "a checkpoint without a chat template must have messages of text alone; got tools, their calls or "
                "results; take protocol 'tools', or a checkpoint with a template"
            )
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


class TemplateChat(Chat):
    """The frame that a checkpoint's own chat template writes.

    A prompt is what the template renders. A reply is what it writes between one turn of the policy and the next: it
    renders a short conversation in which a stand-in speaks for the policy, and what follows the stand-in's closing
    token is taken. So templates that write a conversation's past otherwise once it has grown (without thoughts, say)
    are framed as the policy saw them at each turn, and what it sampled stays as it was. Raises RunError for a template
    whose replies would depend on what the policy said, or that closes its turns with no special token.
    """

    def __init__(self, tokenizer: BPETokenizer, template: Template, *, stop_tokens: Iterable[str] = ()) -> None:
        self.tokenizer: BPETokenizer = tokenizer
        self.template = self._frame = template
        self._stops = names_pattern(name for name, i in tokenizer.control.items() if i in tokenizer.special_ids)
        self._tools = self._tools_without_tools()
        self._takes_system = self._renders("system")
        self._several = self._renders_calls()
        self.takes_tools = self._renders("tool")
        """Whether the template has a place for calls and for what they return."""
        closing = self._closing()
        self.end_id = tokenizer.control[closing]
        named = [template.tokens.get("eos_token", "")]
        stops = [tokenizer.control[name] for name in (*named, *stop_tokens) if name in tokenizer.control]
        self.stop_ids = tuple(dict.fromkeys([self.end_id, *stops]))
        self.pad_id = tokenizer.control.get(template.tokens.get("pad_token", ""), self.end_id)
        self.start_id = tokenizer.control.get(template.tokens.get("bos_token", ""), self.end_id)
        self._said = names_pattern(self._frame_names())
        self._check_replies()
        roles = ("user", "tool") if self.takes_tools else ("user",)
        self.empty_reply_length = max(len(self.reply_ids([Message(role=role, content="")])) for role in roles)

    def _frame_names(self) -> list[str]:
        """The control tokens that the policy's own text cannot hold; those of formats of calls it can."""
        special = self.tokenizer.special_ids
        return [name for name, i in self.tokenizer.control.items() if i in special and name != PYTHON_TAG]

    def encode_said(self, text: str) -> list[int]:
        return self.tokenizer.encode_said(text, self._said)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without what closes or begins a turn; names of other control tokens stand in it."""
        hidden = {*self.stop_ids, self.pad_id, self.start_id}
        return self.tokenizer.decode_all([i for i in ids if i not in hidden])

    def message_ids(self, message: Message, *, max_content: int | None = None) -> list[int]:
        """Not to be had: a template frames whole conversations."""
        raise RunError("a chat template must frame a whole conversation; got one message; use prompt_ids or reply_ids")

    def prompt_ids(self, messages: Iterable[Message]) -> list[int]:
        """The conversation as the template renders it, up to where the policy's next token comes."""
        messages = list(messages)
        tools = messages[0].tools if messages else ()
        rendered = self._frame.render(self._dicts(messages), self._schemas(tools) or self._tools)
        return self.tokenizer.encode_framed(rendered)

    def reply_ids(self, messages: Iterable[Message], *, max_ids: int | None = None) -> list[int]:
        """What follows the token by which the policy closed its turn, up to where its next turn begins.

        Where that is longer than `max_ids`, message contents are cut at their ends; the frame stays whole.
        """
        messages = list(messages)
        ids = self._reply(messages)
        if max_ids is None or len(ids) <= max_ids:
            return ids
        kept = 0  # most characters, of all contents one after the other, that fit
        step = 1 << sum(len(m.content) for m in messages).bit_length()
        while step:
            if len(self._reply(_cut(messages, kept + step))) <= max_ids:
                kept += step
            step //= 2
        return self._reply(_cut(messages, kept))

    def _reply(self, messages: Sequence[Message], said: str = "", earlier: int = 0) -> list[int]:
        return self.tokenizer.encode_framed(self._reply_text(messages, said, earlier))

    def _reply_text(self, messages: Sequence[Message], said: str = "", earlier: int = 0) -> str:
        """What the template writes after a stand-in's message, which says `said`, `earlier` exchanges into a chat."""
        past = [*_EXCHANGE * earlier, *self._stand_in(messages, said)]
        rendered = self._frame.render([*past, *self._dicts(messages, merge=False)], self._tools)
        at = rendered.find(STAND_IN)
        found = self._stops.search(rendered, at) if at >= 0 else None
        if found is None:
            raise RunError(
                "the chat template must write what the policy says, and close it with a special token; it does not; "
                "use another template, or delete it to use ChatML"
            )
        return rendered[found.end() :]

    def _closing(self) -> str:
        """The special token by which the template closes the policy's turn."""
        past = [*self._stand_in((), ""), {"role": "user", "content": "a"}]
        rendered = self._frame.render(past, self._tools)
        after = rendered[rendered.find(STAND_IN) + len(STAND_IN) :] if STAND_IN in rendered else ""
        found = self._stops.match(after.lstrip())
        if found is None:
            raise RunError(
                "the chat template must close what the policy says with a special token of the tokenizer; after it "
                f"comes {after[:20]!r}; use another template, or delete it to use ChatML"
            )
        return found[0]

    def _check_replies(self) -> None:
        """RunError where what the template writes after a turn depends on what was said before."""
        for role in ("user", "tool") if self.takes_tools else ("user",):
            reply = [Message(role=role, content="a b")]
            found = {self._reply_text(reply, said, earlier) for said in _SAID for earlier in (0, 2)}
            if len(found) > 1:
                raise RunError(
                    "the chat template must write the same after a turn, whatever was said before; after a message of "
                    f"role {role} it does not; use another template, or delete it to use ChatML"
                )

    def _tools_without_tools(self) -> Sequence[Mapping[str, Any]] | None:
        """What a conversation without tools gives as its tools: none, or an empty list where the template wants one."""
        try:
            self._frame.render([{"role": "user", "content": "a"}], None)
        except RunError:
            self._frame.render([{"role": "user", "content": "a"}], [])
            return ()
        return None

    def _renders(self, role: str) -> bool:
        """Whether the template shows what a message of a role says."""
        told = {"role": role, "content": _TOLD, "name": "a", "tool_call_id": call_id(0)}
        try:
            if role == "system":
                return _TOLD in self._frame.render([told, {"role": "user", "content": "a"}], self._tools)
            rendered = self._frame.render([*_calling(1, ""), told], self._tools)
        except RunError:
            return False
        return STAND_IN in rendered and _TOLD in rendered

    def _renders_calls(self) -> bool:
        """Whether the template takes several calls in one message."""
        try:
            self._frame.render(_calling(2, ""), self._tools, generate=False)
        except RunError:
            return False
        return True

    def _stand_in(self, reply: Sequence[Message], said: str) -> list[dict[str, Any]]:
        """A question and the stand-in's message, which makes the calls of the reply's results, if it has any.

        Where the template takes one call in a message alone, one; the results of others follow all the same.
        """
        count = sum(message.role == "tool" for message in reply)
        if count:
            return _calling(count if self._several else 1, said)
        return [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"{said}{STAND_IN}"}]

    def _dicts(self, messages: Sequence[Message], *, merge: bool = True) -> list[dict[str, Any]]:
        """The messages in the shape that templates take, no control token in what was not said by the policy.

        A system message goes before the first user message where the template has no place for it.
        """
        messages = list(messages)
        if merge and not self._takes_system and messages and messages[0].role == "system":
            system, *rest = messages
            first = next((m for m in rest if m.role == "user"), Message(role="user", content=""))
            both = Message(role="user", content=f"{system.content}\n\n{first.content}".strip())
            messages = [both, *(m for m in rest if m is not first)]
        return [*_numbered(self._dict(message) for message in messages)]

    def _dict(self, message: Message) -> dict[str, Any]:
        broken = self.tokenizer.broken
        if message.role != "assistant":
            named = {"name": broken(message.name)} if message.name else {}
            return {"role": message.role, "content": self.tokenizer.joined(message.content), **named}
        said = {"role": message.role, "content": broken(message.content, self._said)}
        if not message.tool_calls:
            return said
        return {**said, "tool_calls": [self._call(call) for call in message.tool_calls]}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        """A call as the policy said it: its texts can hold the tokens of its format, as its content can."""
        arguments = self._broken_values(dict(call.arguments or {}), self._said)
        name = self.tokenizer.broken(call.name, self._said)
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    def _schemas(self, tools: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [self._broken_values(tool) for tool in tools]

    def _broken_values(self, value: Any, names: re.Pattern[str] | None = None) -> Any:
        """A JSON value with breaks in its texts."""
        if isinstance(value, str):
            return self.tokenizer.broken(value, names)
        if isinstance(value, Mapping):
            broken = self.tokenizer.broken
            return {broken(key, names): self._broken_values(item, names) for key, item in value.items()}
        return [self._broken_values(item, names) for item in value] if isinstance(value, list | tuple) else value


STAND_IN = "stand-in"
"""What the stand-in for the policy says."""
_TOLD = "told"
_SAID = ("", "Well, ", "<think>\nso\n</think>\n\n")
"""What the stand-in says before that, to see that nothing depends on it."""
_EXCHANGE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def call_id(number: int) -> str:
    """The name of a conversation's call: nine letters and digits, as Mistral's templates want it."""
    return f"call{number:05d}"


def _calling(count: int, said: str) -> list[dict[str, Any]]:
    """A question and the stand-in's message that makes `count` calls."""
    function = {"name": STAND_IN, "arguments": {"a": STAND_IN}}
    calls = [{"type": "function", "id": call_id(k), "function": function} for k in range(count)]
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": said, "tool_calls": calls}]


def _numbered(messages: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The messages with names for calls, and each result with that of its call."""
    made = answered = 0
    for message in messages:
        if message["role"] == "assistant":
            answered = made
            for call in message.get("tool_calls", ()):
                call["id"] = call_id(made)
                made += 1
        elif message["role"] == "tool":
            message["tool_call_id"] = call_id(answered)
            answered += 1
        yield message


def _cut(messages: Sequence[Message], characters: int) -> list[Message]:
    """The messages with so many characters of their contents, taken together."""
    cut = []
    for message in messages:
        content = message.content[: max(0, characters)]
        characters -= len(content)
        cut.append(Message(role=message.role, content=content, name=message.name))
    return cut


def _check_chatml(tokenizer: BPETokenizer) -> None:
    missing = [token for token in SPECIALS if tokenizer.special_id(token) is None]
    if missing:
        raise RunError(
            f"a checkpoint without a chat template must have the ChatML tokens; its tokenizer lacks "
            f"{', '.join(missing)}; add its chat_template.jinja, or use a checkpoint with a ChatML tokenizer, such as "
            "the Qwen family's"
        )


def byte_chat() -> Chat:
    """A chat that needs no model and no tokenizer file: one token per byte."""
    return Chat(ByteTokenizer())


def load_chat(folder: Path) -> Chat:
    """The chat of a checkpoint folder: its tokenizer, framed by its chat template if it has one, else by ChatML.

    The tokenizer is read from `tokenizer.json`, or from what transformers can make one of, such as Qwen2's `vocab.json`
    and `merges.txt`. Raises RunError where a file is missing or damaged, or the template cannot be used.
    """
    tokenizer = BPETokenizer(_backend(folder))
    template = read_template(folder)
    if template is None or template.source == CHAT_TEMPLATE:
        return Chat(tokenizer)
    return TemplateChat(tokenizer, template, stop_tokens=_generation_stops(folder, tokenizer))


def save_chat(chat: Chat, folder: Path) -> None:
    """Writes the tokenizer and the chat template; `load_chat` and `transformers` read the folder as it is."""
    tokenizer = chat.tokenizer
    assert isinstance(tokenizer, BPETokenizer), "only a real tokenizer can be saved"
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if chat.template:
        write_template(chat.template, folder)
        settings |= chat.template.tokens
    else:
        settings |= {"eos_token": END, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _backend(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint folder."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise RunError(f"{path} must be a tokenizer file; it cannot be read ({error})") from error
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.model")):
        raise RunError(f"a checkpoint must hold tokenizer.json; {path} does not exist")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer
    except Exception as error:  # transformers and what it converts with raise their own
        raise RunError(
            f"{folder} must hold tokenizer.json, or what transformers makes a tokenizer of; it cannot be read "
            f"({' '.join(str(error).split())[:200]}); save the tokenizer with transformers first"
        ) from error


def _generation_stops(folder: Path, tokenizer: BPETokenizer) -> list[str]:
    """The tokens at which the checkpoint's `generation_config.json` ends a turn."""
    path = folder / "generation_config.json"
    try:
        settings = parsed(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise RunError(f"{path} must be JSON; it cannot be read ({error}); restore the file") from error
    given = settings.get("eos_token_id") if isinstance(settings, dict) else None
    ids = given if isinstance(given, list) else [given]
    return [name for name, i in tokenizer.control.items() if i in ids]
