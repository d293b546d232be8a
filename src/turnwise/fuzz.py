"""Every parser of policy text under generated and mutated messages: `python -m turnwise.fuzz --count 100000`.

Messages are calls with nested arguments, in the protocol's own form, with thoughts, answers and noise; most are then
damaged: cut, doubled, spliced, strewn with tags, control tokens and broken Unicode. Of each message four things are
checked: the parser returns a record that can be written; it returns the calls that were written, where nothing was
damaged; it agrees with a plain reading of the format (`reference_calls`) wherever that finds calls; and as a tool's
result the text adds no control token to the conversation.
"""

import argparse
import dataclasses
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnwise.chat import BPETokenizer, Chat, TemplateChat, load_chat
from turnwise.formats import typed_call
from turnwise.protocols import PROTOCOLS, TagProtocol
from turnwise.templates import Template
from turnwise.types import Action, Message, ToolCall, ToolResult

DAMAGED = 0.8
"""The share of messages that are damaged."""
TEXTS = (
    "Kenya",
    "a \"b\" 'c'",
    "é ü ß 日本 🦙",
    "line\nline\n",
    "\\n \\u0041 \\",
    "{}[],:",
    "</x> & <y>",
    " ",
    "",
    "0",
    "null",
)
NOISE = (
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "\ud800",
        "\x00",
    ),
    *(
        "<function=",
        "</function>",
        "<parameter=",
        "</parameter>",
        ">",
        "<",
        "{",
        "}",
        '"',
        "\\",
        ";",
        "\n",
        "\n{",
        "[" * 99,
    ),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "x.call(",
        '="',
        '", ',
        ")",
        "1e999",
    ),
    *("<reasoning>", "</reasoning>", "<tool>", "</tool>", "<result>", "<search>", "</search>", "<information>", "NaN"),
    *('{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {"a": [1, {"b": null}]}}', "9" * 5000, "\ufdd0"),
)
"""What is strewn in."""
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
    "<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(kw_only=True)
class Findings:
    """What came of the messages of one parser."""

    messages: int = 0
    undamaged: int = 0
    with_calls: int = 0
    with_answer: int = 0
    with_error: int = 0
    compared: int = 0
    """Messages in which the plain reading found calls."""
    slowest_s: float = 0.0
    """Processor time of one message in the parser."""
    failures: list[str] = dataclasses.field(default_factory=list)


# --------------------------------------------------------------------------------- messages


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """A value of JSON, nested up to four deep."""
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind < 3:
        return rng.choice(TEXTS)
    if kind < 6:
        return rng.choice((0, -1, 12345678901234567890, 1.5, -2e-9, True, False, None))
    values = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return values if kind == 6 else {f"{rng.choice(TEXTS)}{k}": value for k, value in enumerate(values)}


def random_calls(rng: random.Random, name: str) -> tuple[ToolCall, ...]:
    """Calls that the protocol can write."""
    if name == "search":
        query = rng.choice(("Kenya", "é 日本 🦙", 'the "b" of \\n c'))
        return (ToolCall(name="search", arguments={"query": query}),)
    count = 1 if name == "tools" else rng.choice((1, 1, 1, 2, 3))
    return tuple(
        ToolCall(
            name=rng.choice(("search", "look_up", "f")),
            arguments={key: random_value(rng) for key in rng.sample(("query", "k", "a b", "ü"), rng.randrange(4))},
        )
        for _ in range(count)
    )


def random_message(rng: random.Random, name: str) -> tuple[str, tuple[ToolCall, ...]]:
    """A message in the protocol's form, and the calls in it: none where it answers."""
    protocol = PROTOCOLS[name]
    thoughts = f"<{protocol.thinking}>\n{rng.choice(TEXTS)} so\n</{protocol.thinking}>\n" if rng.random() < 0.7 else ""
    if rng.random() < 0.2:
        return f"{thoughts}<answer>\n{rng.choice(TEXTS)}\n</answer>", ()
    calls = random_calls(rng, name)
    return thoughts + protocol.calls_text(calls), calls


def damaged(rng: random.Random, text: str, other: str) -> str:
    """`text` after one to six accidents; `other` is another message."""
    for _ in range(rng.randint(1, 6)):
        at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        draw = rng.randrange(7)
        if draw == 0:
            text = text[:at] + text[min(end, at + 9) :]
        elif draw == 1:
            text = text[:end]
        elif draw == 2:
            text = text[:at] + text[at:end] * 2 + text[end:]
        elif draw == 3:
            text = text[:at] + other[min(at, len(other)) :]
        elif draw == 4:
            text = text[:at] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), 0xD800, 0x1F999))) + text[at:]
        else:
            text = text[:at] + rng.choice(NOISE) * rng.choice((1, 1, 1, 2, 40)) + text[at:]
    return text[: rng.choice((2000, 2000, 2000, 20_000))]


# ------------------------------------------------------------------------- the plain reading


def reference_calls(name: str, text: str) -> list[ToolCall] | None:
    """The calls of a message as a plain reading of the format finds them; None where it has no opinion."""
    try:
        text.encode()  # where a surrogate stands decides whether it matters: no opinion
        calls = _REFERENCES[name](text)
        json.dumps([(call.name, call.arguments) for call in calls], allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    wrong = any(not isinstance(c.name, str) or not isinstance(c.arguments, dict) for c in calls)
    return None if wrong or not calls or _deep(calls) else calls


def _deep(calls: Sequence[ToolCall]) -> bool:
    return json.dumps([call.arguments for call in calls]).count("[[[[[[[[") > 0


def _after_thoughts(text: str) -> str:
    """What follows `</think>`; ValueError where thoughts are not closed."""
    if "</think>" not in text and text.lstrip().startswith("<think>"):
        raise ValueError("thoughts that do not end")
    return text.split("</think>", 1)[-1]


def _tools_reference(text: str) -> list[ToolCall]:
    acting = re.sub(r"<reasoning>(.*?)</reasoning>", " ", text, flags=re.S)
    answer = re.search(r"<answer>(.*?)</answer>", acting, re.S)
    if answer and (acting.find("<tool>") < 0 or answer.start() < acting.find("<tool>")):
        return []
    body, _ = acting[acting.index("<tool>") + 6 :].split("</tool>", 1)
    data = json.loads(body)
    return [ToolCall(name=data["name"], arguments=data["args"])]


def _search_reference(text: str) -> list[ToolCall]:
    acting = re.sub(r"<think>(.*?)</think>", " ", text, flags=re.S)
    answer = re.search(r"<answer>(.*?)</answer>", acting, re.S)
    if answer and (acting.find("<search>") < 0 or answer.start() < acting.find("<search>")):
        return []
    query = acting[acting.index("<search>") + 8 :].split("</search>", 1)
    if len(query) < 2 or not query[0].strip() or re.search(r"[<>]", query[0]):
        return []
    return [ToolCall(name="search", arguments={"query": query[0].strip()})]


def _hermes_reference(text: str) -> list[ToolCall]:
    chunks = _after_thoughts(text).split("<tool_call>")[1:]
    if any("</tool_call>" not in chunk for chunk in chunks[:-1]):
        return []
    found = [json.loads(chunk.split("</tool_call>")[0]) for chunk in chunks]
    return [ToolCall(name=data["name"], arguments=data["arguments"]) for data in found]


def _llama3_reference(text: str) -> list[ToolCall]:
    said = _after_thoughts(text).strip().removeprefix("<|python_tag|>")
    if "<|python_tag|>" in said:
        return []
    try:
        found = [json.loads(said)]
    except ValueError:
        found = [json.loads(part) for part in re.split(r"(?<=\})\s*;\s*(?=\{)", said.strip())]
    return [ToolCall(name=data["name"], arguments=data.get("parameters", data.get("arguments"))) for data in found]


def _coder_reference(text: str) -> list[ToolCall]:
    said = _after_thoughts(text)
    parameter = r"<parameter=[^<>\n]+>(?:(?!</?parameter|</?function|</tool_call).)*</parameter>"
    call = rf"<tool_call>\s*<function=([^<>\n]+)>((?:\s*{parameter})*)"
    whole = rf"(?:\s*{call}\s*</function>\s*</tool_call>)+\s*"
    if len(said) > 3000 or not re.fullmatch(whole, said, re.S):
        return []
    return [
        ToolCall(
            name=found[1].strip(),
            arguments={
                key.strip(): value.removeprefix("\n").removesuffix("\n")
                for key, value in re.findall(r"<parameter=([^<>\n]+)>(.*?)</parameter>", found[2], re.S)
            },
        )
        for found in re.finditer(call, said, re.S)
    ]


_REFERENCES: dict[str, Callable[[str], list[ToolCall]]] = {
    "tools": _tools_reference,
    "search": _search_reference,
    "hermes": _hermes_reference,
    "llama3": _llama3_reference,
    "qwen3-coder": _coder_reference,
}


# ----------------------------------------------------------------------------------- checks


def fuzz_chat() -> Chat:
    """A chat with special tokens, tokens of a format and a template, over single bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in MARKS])
    return TemplateChat(BPETokenizer(backend), Template(source=TEMPLATE, tokens={"eos_token": "<|im_end|>"}))


def control_ids(chat: Chat, text: str, protocol: TagProtocol) -> list[int]:
    """The control tokens of the reply to a call that returned `text`, in order."""
    tokenizer = chat.tokenizer
    assert isinstance(tokenizer, BPETokenizer), "a chat of bytes has no control tokens to forge"
    control = set(tokenizer.control.values())
    role = "tool" if protocol.own_format else "user"
    reply = Message(role=role, content=protocol.result_text(ToolResult(text=text)))
    return [i for i in chat.reply_ids([reply]) if i in control]


def fault(
    name: str, action: Action, written: Sequence[ToolCall] | None, expected: Sequence[ToolCall] | None
) -> str | None:
    """What is wrong with what a parser made of a message.

    `written` are its calls where nothing was damaged, `expected` those that the plain reading finds.
    """
    if action.answer is not None and (action.tool_calls or action.error):
        return "an answer beside a call"
    try:
        json.dumps(dataclasses.asdict(action), allow_nan=False)
        json.dumps([c.arguments for c in action.tool_calls], ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return f"a record that cannot be written: {error}"
    if written is not None and not _same(name, action.tool_calls, written):
        return f"other calls than were written: {written}"
    if expected is not None and list(action.tool_calls) != expected:
        return f"other calls than a plain reading finds: {expected}"
    return None


def _same(name: str, found: Sequence[ToolCall], written: Sequence[ToolCall]) -> bool:
    """Whether the calls are those that were written; where arguments are texts, once they have their types."""
    if PROTOCOLS[name].typed:
        return tuple(found) == tuple(written)
    typed = [
        typed_call(call, {"properties": {key: _schema_of(value) for key, value in (own.arguments or {}).items()}})
        for call, own in zip(found, written, strict=False)
    ]
    return len(found) == len(written) and typed == list(written)


def _schema_of(value: Any) -> dict[str, Any]:
    return {"type": "string"} if isinstance(value, str) else {}


def fuzz(name: str, count: int, seed: int, chat: Chat) -> Findings:
    """`count` messages through the parser of the protocol `name`; equal seeds make equal messages."""
    protocol, rng, findings = PROTOCOLS[name], random.Random(f"{name} {seed}"), Findings()
    plain = control_ids(chat, "a", protocol)
    other = ""
    for _ in range(count):
        text, calls = random_message(rng, name)
        is_damaged = rng.random() < DAMAGED
        if is_damaged:
            text, other = damaged(rng, text, other), text
        findings.messages += 1
        findings.undamaged += not is_damaged
        expected = reference_calls(name, text)
        start = time.process_time()
        try:
            action = protocol.parse(text)
            findings.slowest_s = max(findings.slowest_s, time.process_time() - start)
            found = fault(name, action, None if is_damaged else calls, expected)
            if found is None and control_ids(chat, text, protocol) != plain:
                found = "a control token out of text"
        except Exception as error:  # a parser must raise nothing
            found, action = f"{type(error).__name__}: {error}", Action()
        findings.with_calls += bool(action.tool_calls)
        findings.with_answer += action.answer is not None
        findings.with_error += action.error is not None
        findings.compared += expected is not None
        if found:
            findings.failures.append(f"{found}\n  {text!r}")
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzzes every parser and prints what came of it; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m turnwise.fuzz", description="Every parser under mutated messages.")
    parser.add_argument("--count", type=int, default=100_000, help="messages per parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--protocols", nargs="*", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder whose tokenizer and template to use")
    options = parser.parse_args(argv)
    chat = load_chat(options.checkpoint) if options.checkpoint else fuzz_chat()
    failed = 0
    for name in options.protocols:
        start = time.perf_counter()
        found = fuzz(name, options.count, options.seed, chat)
        failed += len(found.failures)
        print(
            f"{name:12} {found.messages:,} messages, {found.undamaged:,} undamaged; calls {found.with_calls:,}, "
            f"answers {found.with_answer:,}, errors {found.with_error:,}; compared {found.compared:,}; slowest "
            f"{1000 * found.slowest_s:.1f} ms; {len(found.failures)} failures; {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for failure in found.failures[:5]:
            print(f"  {failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
