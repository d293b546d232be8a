"""Hostile text through what stands behind the parsers: `python -m turnwise.hostile --count 100000`.

Texts are strewn with tags, names of control tokens, markup, terminal escapes, characters that reverse the reading
order, lone surrogates and line ends of Unicode. Each stage checks of every text that it stays text: control tokens and
turn boundaries come from the frame alone, records are read back equal, the page has no element or attribute of the
text's, and the terminal no control character. A failure is printed with its text, so that it can be given again.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

from turnwise.chat import BPETokenizer, Chat, TemplateChat, load_chat
from turnwise.display import turn_panel
from turnwise.engine import ScriptedEngine
from turnwise.env import Step, ToolEnvironment
from turnwise.fuzz import CONTROL, MARKS, NOISE, TEXTS, fuzz_chat
from turnwise.hostile_files import inspect_fault, paths_check, report_check, traces_check
from turnwise.report.text import embedded_json, escaped, one_line, visible
from turnwise.rollout import Limits, run_rollout
from turnwise.templates import Template
from turnwise.tools import tool
from turnwise.types import Action, Message, Rollout, Task, ToolCall, ToolResult, Turn, rollout_from_json

EMBEDDED = Path(__file__).parent / "data" / "policy"
# fmt: off
MARKUP = (
    "<script>alert(1)</script>", '"><img src=x onerror=y>', "' onclick='x", "</pre>", "<!--", "-->", "]]>", "&lt;",
    "&#x3c;b&#x3e;", "[red]", "[/]", "[link=file:x]", "$x", "${x}", "{{ x }}", "{% raw %}", "%s", "../../x", "; rm x",
    "\x1b[2J", "\x1b]0;x\x07", "\x1b]8;;x\x1b\\", "\x9b31m", "\x9d", "\x08", "\r", "\x7f", "\x85", "\u2028", "\u2029",
    "\u202e", "\u2066", "\u200b", "\ufeff", "\U000e0041", "\udc00", "\ud83d", "\ufdd0", "\ufdd1", "\uffff",
)
# fmt: on
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
)
"""The special tokens of the two families of published templates."""
PIECES = (*NOISE, *MARKUP, *CONTROL, *MARKS, *TEXTS)
CALL = '<tool>\n{"name": "look", "args": {}}\n</tool>'
ANSWER = "<answer>\na\n</answer>"
Check = Callable[[str], str | None]
"""What is wrong with what a stage made of a text; None where nothing is."""


def hostile_text(rng: random.Random) -> str:
    """A text of one to eight pieces, now and then cut so that names arise at its ends."""
    text = "".join(rng.choice(PIECES)[:400] for _ in range(rng.randint(1, 8)))
    if rng.random() < 0.3:
        start, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        text = text[start:end] + rng.choice(PIECES)[:400]
    return text


def tokens_check(chat: Chat) -> Check:
    """That a text adds no control token to a reply, a prompt, or by itself."""
    tokenizer = chat.tokenizer
    assert isinstance(tokenizer, BPETokenizer), "a chat of bytes has no control tokens to forge"
    control = set(tokenizer.control.values())

    def framed(text: str) -> list[list[int]]:
        reply = [Message(role="user", content=text)]
        prompt = [Message(role="system", content=text), Message(role="user", content=text)]
        return [[i for i in ids if i in control] for ids in (chat.reply_ids(reply), chat.prompt_ids(prompt))]

    plain = framed("a")

    def check(text: str) -> str | None:
        if not control.isdisjoint(chat.encode_text(text)):
            return "a control token out of text"
        return None if framed(text) == plain else "a text changes the frame"

    return check


def rollout_check(chat: Chat) -> Check:
    """That a tool's hostile result leaves turns, their tokens and their calls the policy's own."""
    limits, encode = Limits(max_turn_tokens=2000, context=60_000, max_turns=2), chat.encode_text
    said = [tuple([*encode(text), chat.end_id]) for text in (CALL, ANSWER)]

    def check(text: str) -> str | None:
        @tool(inline=True)
        def look() -> str:
            """Looks."""
            return text

        task = Task(id="a", question=text)
        environment = ToolEnvironment(task, {"look": look}, max_turns=2)
        engine = ScriptedEngine([CALL, ANSWER], chat)
        rollout = asyncio.run(run_rollout(task, environment, engine, chat, limits=limits))
        if [turn.action_ids for turn in rollout.turns] != said or rollout.stop != "answer":
            return f"other turns than the policy's: {len(rollout.turns)}, {rollout.stop}, {rollout.error}"
        calls = [turn.action.tool_calls for turn in rollout.turns]
        if calls != [(ToolCall(name="look", arguments={}),), ()] or rollout.answer != "a":
            return "other calls than the policy's"
        return None

    return check


def record_fault(text: str) -> str | None:
    """What is wrong with a rollout's line that holds the text everywhere.

    Two halves of a character beside one another are that character in JSON, so the text has it whole from the start.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    call = ToolCall(name=text, arguments={text: [text, {"a": text}]})
    action = Action(reasoning=text, tool_calls=(call,), error=text)
    turn = Turn(action_ids=(1,), sampling_logprobs=(0.0,), text=text, action=action, results=(ToolResult(text=text),))
    rollout = Rollout(task_id=text, group=0, prompt_ids=(1,), turns=(turn,), stop="error", error=text, states=(text,))
    line = rollout.to_json()
    if not line.isascii() or len(line.splitlines()) != 1:
        return "a record that is no line of ASCII"
    return None if rollout_from_json(line) == rollout else "a record that is not read back equal"


class _Elements(HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", ()))


def page_fault(text: str) -> str | None:
    """What is wrong with a piece of the page that holds the text as text, as an attribute, and in the script's data."""
    parser = _Elements()
    data = f'<script type="application/json">{embedded_json([visible(text)])}</script>'
    parser.feed(f'<p title="{escaped(text)}">{escaped(text)}</p>{data}')
    parser.close()
    if parser.elements != [("p", ("title",)), ("script", ("type",))]:
        return f"elements of the text's: {parser.elements}"
    shown = visible(text)
    if parser.text.startswith(shown) and json.loads(parser.text.removeprefix(shown)) == [shown]:
        return None
    return "a text that the page does not show whole"


def terminal_fault(text: str) -> str | None:
    """What is wrong with the turn that `turnwise ask` shows, and with a line."""
    import io

    from rich.console import Console

    call = ToolCall(name=text, arguments={text: text})
    action = Action(reasoning=text, tool_calls=(call,))
    step = Step(action=action, results=(ToolResult(text=text), ToolResult(text=text, error=text)))
    out = io.StringIO()
    Console(file=out, markup=False, highlight=False, emoji=False, width=110).print(turn_panel(1, text, step))
    said = out.getvalue().replace("\n", "").replace("\t", "")
    line = one_line(text)
    if not line.isprintable() or not said.isprintable():
        return "a control character reaches the terminal"
    return None


def published_chats(templates: Path, checkpoint: Path) -> dict[str, Chat]:
    """A chat for each chat template in a folder of `*.jinja`, over a checkpoint's tokenizer."""
    found: dict[str, Chat] = {}
    for file in sorted(templates.glob("*.jinja")):
        source = file.read_text(encoding="utf-8")
        tokenizer = load_chat(checkpoint).tokenizer
        assert isinstance(tokenizer, BPETokenizer), "a chat of bytes has no control tokens to forge"
        llama = "<|start_header_id|>" in source
        special = LLAMA if llama else CHATML
        tokenizer.backend.add_special_tokens([*special])
        ends = {"bos_token": LLAMA[0], "eos_token": LLAMA[4]} if llama else {"eos_token": CHATML[-1]}
        found[file.stem] = TemplateChat(BPETokenizer(tokenizer.backend), Template(source=source, tokens=ends))
    return found


def stages(chat: Chat, published: Mapping[str, Chat] | None = None) -> dict[str, tuple[Check, float]]:
    """Each stage's check, and its share of the texts."""
    own = {f"frame of {name}": (tokens_check(chat), 0.002) for name, chat in (published or {}).items()}
    return {
        **own,
        "tokens": (tokens_check(chat), 0.28),
        "frame of a template": (tokens_check(fuzz_chat()), 0.09),
        "rollout": (rollout_check(chat), 0.01),
        "record": (record_fault, 0.36),
        "page": (page_fault, 0.15),
        "terminal": (terminal_fault, 0.01),
        "paths": (paths_check(), 0.02),
        "traces": (traces_check(), 0.06),
        "report": (report_check(), 0.0005),
        "inspect": (inspect_fault, 0.02),
    }


def failures(name: str, check: Check, count: int, seed: int) -> list[str]:
    """What failed of `count` texts in a stage; equal seeds make equal texts."""
    rng, found = random.Random(f"{name} {seed}"), []
    for _ in range(count):
        text = hostile_text(rng)
        try:
            fault = check(text)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            found.append(f"{fault}\n  {json.dumps(text)}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Puts hostile texts through every stage and prints a table; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m turnwise.hostile", description="Hostile text through every stage.")
    parser.add_argument("--count", type=int, default=100_000, help="texts, of all stages together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, default=EMBEDDED, help="a folder whose tokenizer and template to use"
    )
    parser.add_argument("--templates", type=Path, help="a folder of published chat templates to frame texts with, too")
    options = parser.parse_args(argv)
    published = published_chats(options.templates, options.checkpoint) if options.templates else None
    failed = 0
    print("| stage | inputs | seconds | failures |\n|---|---|---|---|")
    for name, (check, share) in stages(load_chat(options.checkpoint), published).items():
        count, start = max(1, round(share * options.count)), time.perf_counter()
        found = failures(name, check, count, options.seed)
        failed += len(found)
        print(f"| {name} | {count:,} | {time.perf_counter() - start:.0f} | {len(found)} |", flush=True)
        for failure in found[:5]:
            print(f"  {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
