"""Hostile text in files: in names of files, in traces, in a whole report page, in what `turnwise inspect` prints.

The checks that `hostile` makes where a text has to go through a file or a whole page first.
"""

import atexit
import functools
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from turnwise.checksums import CHECKSUMS, damage
from turnwise.compare import run_configs
from turnwise.config import TrainConfig
from turnwise.designs import read_design
from turnwise.errors import TurnwiseError
from turnwise.evaluation import source_name
from turnwise.inspection import inspect_tasks, inspection_lines
from turnwise.report import load_run, write_report
from turnwise.sources import check_code
from turnwise.traces import read_traces, verifiers_lines
from turnwise.types import Action, Rollout, Task, ToolCall, ToolResult, Turn

STEPS = ("..", ".", "/", "\\", "~", "a", "-", "C:", "\0", "\n", ".jsonl", ".gz", "//", " ", "%2e", "‥", "．", "hf:")
"""What a name that leads elsewhere is made of."""
_TASK = "Which capital?"


def _whole(text: str) -> str:
    """The text with halves of a character that stand together as that character, as any reader of JSON has it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _fits(text: str) -> bool:
    return not any(0xD800 <= ord(c) < 0xE000 for c in text)


def _folder() -> Path:
    """A folder for the life of the process."""
    folder = Path(tempfile.mkdtemp(prefix="turnwise-hostile-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# --- names of files ---------------------------------------------------------------------------------


def paths_check() -> Callable[[str], str | None]:
    """That no name out of data leads out of the folder that it is for."""
    folder = _folder()
    inner = folder / "outer" / "run"
    inner.mkdir(parents=True)
    (inner.parent / "secret").write_text("x")

    def check(text: str) -> str | None:
        rng = random.Random(text.encode("utf-8", "replace"))
        made = "".join(rng.choice(STEPS) for _ in range(rng.randint(1, 5)))
        for name in (text, made, f"../{made}", f"{made}{text[:9]}"):
            fault = _name_fault(inner, name)
            if fault:
                return f"{fault}: {name!r}"
        return None

    return check


def _name_fault(run: Path, name: str) -> str | None:
    """What is wrong with where a name leads."""
    if not _inside(run, f"eval-{source_name(name)}-greedy.json"):
        return "an evaluation's file is elsewhere"
    if _fits(name):
        file = run / "design.toml"
        file.write_text(f"[shared]\nname = {json.dumps(name)}\n[{json.dumps(name)}]\nalpha = 0.5\n", encoding="utf-8")
        design = _allowed(read_design, file)
        if design:
            runs = run / design.name
            if not _inside(run, design.name) or not all(
                _inside(runs, os.path.relpath(job.out, runs)) for job in run_configs(design.arms, 1, runs).values()
            ):
                return "a run of a comparison is elsewhere"
        (run / CHECKSUMS).write_text(f"{'0' * 64}  {name}\n", encoding="utf-8")
        if "has changed" in str(damage(run)) and not _inside(run, name):
            return "a file elsewhere is read for its checksum"
    index = {"weight_map": {"a": name, "b": f"{name}.safetensors"}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    (run / "config.json").write_text("{}")
    if _allowed(check_code, run) is not False and not (name.endswith(".safetensors") and _inside(run, name)):
        return "weights elsewhere are read"
    return None


def _allowed(call: Callable[..., Any], *given: Any) -> Any:
    """What a call returns, True for nothing, or False where it refuses."""
    try:
        result = call(*given)
        return True if result is None else result
    except TurnwiseError:
        return False


def _inside(folder: Path, name: str) -> bool:
    """Whether a name in a folder is that of something below it."""
    place = os.path.normpath(os.path.join(folder, name))
    return "\0" not in name and place.startswith(f"{folder}{os.sep}")


# --- traces -----------------------------------------------------------------------------------------


def traces_check() -> Callable[[str], str | None]:
    """That traces with the text in every field are read back with that text, and written once more."""
    folder = _folder()
    file = folder / "traces.jsonl"

    def check(text: str) -> str | None:
        text = _whole(text)
        plain = {"group": text, "id": text, "turns": [{"text": text, "rewards": {text: 0.5}, "anchor": text}] * 2}
        _written(file, [plain, plain], ascii_only=not _fits(text))
        found = read_traces(file)
        told = [(t.id, t.group, [(u.text, u.anchor, dict(u.rewards)) for u in t.turns]) for t in found]
        if told != [(text, text, [(text, text, {text: 0.5})] * 2)] * 2:
            return "traces that are not read back equal"
        records = [_verifiers_record(text, k) for k in range(2)]
        _written(file, records, ascii_only=not _fits(text))
        lines = verifiers_lines(file, "grpo-or")
        if any(len(line.splitlines()) != 1 or not line.isascii() for line in lines):
            return "a trace that is no line of ASCII"
        written = [json.loads(line) for line in lines]
        for record in written:
            if record["nodes"][1].pop("advantages") is None:
                return "a trace without its credit"
        return None if written == records else "a trace in which more than the credit was changed"

    return check


def _verifiers_record(text: str, number: int) -> dict[str, Any]:
    nodes = [
        {"sampled": False, "parent": None, "message": {"role": "user", "content": text}},
        {
            "sampled": True,
            "parent": 0,
            "mask": [1, 1],
            "message": {"role": "assistant", "content": text, "tool_calls": [{"name": text, "arguments": text}]},
        },
    ]
    rewards = {text: {"score": float(number)}}
    return {"id": text, "task": {"key": text, "data": {text: text}}, "nodes": nodes, "rewards": rewards}


def _written(file: Path, records: Sequence[Any], *, ascii_only: bool) -> None:
    """Lines as other tools write them: in UTF-8 where that can be."""
    lines = [json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records]
    file.write_text("".join(lines), encoding="utf-8", newline="")


# --- a report ---------------------------------------------------------------------------------------


class _Elements(HTMLParser):
    """How often a page has each element, with the names of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, ...]] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag, *sorted(name for name, _ in attrs)] += 1

    def handle_comment(self, data: str) -> None:
        self.found["comment",] += 1

    def handle_decl(self, decl: str) -> None:
        self.found["declaration",] += 1


PLAIN_TEXTS = ("a", "<tool>Kenya</tool> Kenya\nb", "Kenya " * 400)
"""Texts between which a page may choose its elements: plain ones, ones with a tag and an answer, long ones."""
ONCE = ("script", "style", "link", "meta", "base", "title", "head", "body", "iframe", "object", "form", "comment")
"""Elements of which a text may add none of a kind that is there already."""


def report_check() -> Callable[[str], str | None]:
    """That a run's page with the text in every field has no element, attribute or comment but those of plain pages."""
    folder = _folder()
    run, page = folder / "run", folder / "page.html"
    run.mkdir()

    def elements(text: str) -> Counter[tuple[str, ...]]:
        _write_run(run, text)
        write_report([load_run(run)], page)
        parser = _Elements()
        parser.feed(page.read_text(encoding="utf-8"))
        parser.close()
        return parser.found

    plain = [elements(text) for text in PLAIN_TEXTS]
    known = {element for found in plain for element in found}

    def check(text: str) -> str | None:
        found = elements(_whole(text))
        new = sorted(set(found) - known)
        if new:
            return f"elements of the text's: {new[:5]}"
        counts = {name: [sum(n for e, n in of.items() if e[0] == name) for of in (found, *plain)] for name in ONCE}
        more = [name for name, (own, *others) in counts.items() if own > max(others)]
        return f"more of the page's own elements: {more}" if more else None

    return check


def _write_run(run: Path, text: str) -> None:
    """A run whose every text is the text."""
    config = {"estimator": "mt-grpo", "seed": 0, "policy": text, "steps": 1, "alpha": 1.0}
    (run / "config.json").write_text(json.dumps({"format": 1, "turnwise": text, "config": config}))
    lines = [
        {"step": step, "split": split, "wall_s": 1.0, "metrics": {"exact_match": 0.5, text: 0.5}, "warnings": [text]}
        for step in (0, 1)
        for split in ("train", "validation")
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = Task(id=text, question=text, answers=(text, "Kenya"), kind=text)
    records = [_rollout_record(task, text, k) for k in range(3)]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    evaluation = {"name": text, "mode": "greedy", "metrics": {"exact_match": estimate, text: estimate}}
    (run / "eval-x-greedy.json").write_text(json.dumps(evaluation))


def _rollout_record(task: Task, text: str, number: int) -> dict[str, Any]:
    call = ToolCall(name=text, arguments={text: text})
    results = (ToolResult(text=text, error=text if number == 1 else None, documents=(text,)),)
    turn = Turn(
        action_ids=(1,),
        sampling_logprobs=(-0.5,),
        text=text,
        action=Action(reasoning=text, tool_calls=(call,)),
        results=results,
        reply_ids=(2,),
    )
    last = Turn(action_ids=(1,), sampling_logprobs=(-0.5,), text=text, action=Action(answer=text))
    rollout = Rollout(
        task_id=text,
        group=0,
        prompt_ids=(1,),
        turns=(turn, last),
        stop="error" if number == 2 else "answer",
        error=text if number == 2 else None,
        turn_rewards=({text: 0.5}, {}),
        outcome_rewards={text: float(number)},
    )
    return {
        "step": 1,
        "split": "train",
        "task": {"id": task.id, "question": task.question, "answers": task.answers, "kind": task.kind},
        "rollout": json.loads(rollout.to_json()),
        "advantages": None if number == 2 else [0.5, -0.5],
        "baselines": {"turn": [0.1, 0.1]},
    }


# --- inspect ----------------------------------------------------------------------------------------


@functools.cache
def _inspected() -> dict[str, Any]:
    """What `turnwise inspect` finds of two plain tasks under the embedded policy."""
    with tempfile.TemporaryDirectory(prefix="turnwise-hostile-") as folder:
        file = Path(folder) / "tasks.jsonl"
        tasks = [{"id": f"{k}", "question": _TASK, "answers": ["a"], "kind": "b"} for k in range(2)]
        file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
        return inspect_tasks(TrainConfig(tasks=str(file), validation_tasks=str(file)))


def inspect_fault(text: str) -> str | None:
    """What is wrong with what `turnwise inspect` prints where every text out of the tasks is the text."""
    found = _filled(_inspected(), text)
    for line in "\n".join(inspection_lines(found)).split("\n"):
        if not line.replace("\t", "").isprintable():
            return f"a control character reaches the terminal: {ascii(line)[:80]}"
    printed = json.dumps(found, indent=1)
    return None if printed.isascii() and json.loads(printed) == _filled(found, _whole(text)) else "JSON that differs"


def _filled(value: Any, text: str) -> Any:
    """A finding with every text in it replaced, and the names of kinds."""
    if isinstance(value, dict):
        return {name: {text: 1} if name == "kinds" else _filled(inner, text) for name, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, text) for inner in value]
    return text if isinstance(value, str) else value
