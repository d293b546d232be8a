"""Turn 1 on real questions: the embedded policy learns to search Wikipedia for TriviaQA's questions.

    python experiments/trivia.py trivia --seeds 3

The folder has `train.jsonl`, `validation.jsonl` and `wikipedia.jsonl.gz`, as `turnwise convert` makes them. First the
embedded policy is shown every training question, and three times as many pieces of passages, each with a call that asks
it as it stands: its copying is learned from the atlas's names and breaks off in other people's English
(docs/trivia.md). Then MT-GRPO trains it, paid for turn 1 alone.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

from turnwise.cli import main as turnwise
from turnwise.search import open_index, search_tool
from turnwise.tags import result_text
from turnwise.tasks import load_tasks
from turnwise.types import ToolResult
from turnwise.warmup import CALL_THOUGHTS, READ_THOUGHTS

SPANS = 12000
"""Pieces of passages that are copied, beside 3,970 questions."""


def write_demonstrations(questions: Path, corpus: str, out: Path) -> None:
    """Demonstrations of a search for a text as it stands: of each question, and of `SPANS` pieces of passages.

    Every fourth question goes on to an answer, so that answering is not forgotten: an accepted one where the result has
    it, else the title of what was found.
    """
    rng, search = random.Random(0), search_tool(open_index(corpus), cap=600)
    demonstrations = []
    for number, task in enumerate(load_tasks(questions)):
        turns = [_call(task.question, rng)]
        if number % 4 == 0:
            found = str(search.function(task.question))
            value = next((answer for answer in task.answers if answer in found), found.partition("\n")[0])
            thought = f"<reasoning>\n{READ_THOUGHTS[0]}\n</reasoning>"
            turns += [result_text(ToolResult(text=found)), f"{thought}\n<answer>\n{value}\n</answer>"]
        demonstrations.append({"question": task.question, "turns": turns})
    with gzip.open(corpus, "rt", encoding="utf-8") as file:
        passages = [json.loads(line)["text"].split() for line in file]
    for words in rng.sample(passages, SPANS):
        size = rng.randint(8, 30)
        begin = rng.randrange(max(1, len(words) - size))
        span = " ".join(words[begin : begin + size])
        demonstrations.append({"question": span, "turns": [_call(span, rng)]})
    rng.shuffle(demonstrations)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in demonstrations)
    out.write_text("".join(lines), encoding="utf-8")


def _call(query: str, rng: random.Random) -> str:
    call = json.dumps({"name": "search", "args": {"query": query}}, ensure_ascii=False)
    return f"<reasoning>\n{rng.choice(CALL_THOUGHTS)}\n</reasoning>\n<tool>\n{call}\n</tool>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-size", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--shown", action=argparse.BooleanOptionalAction, default=True, help="demonstrations first")
    options = parser.parse_args()
    folder, runs = options.folder, Path("runs")
    corpus, start, name = f"{folder}/wikipedia.jsonl.gz", "embedded", "trivia-unshown"
    if options.shown:
        start, name, shown = "runs/trivia-start", "trivia", runs / "trivia-demonstrations.jsonl"
        if not (runs / "trivia-start" / "config.json").is_file():
            write_demonstrations(folder / "train.jsonl", corpus, shown)
            taught = f"--corpus {corpus} --epochs 4 --rows 16 --learning-rate 1e-3"
            turnwise(["warmup", "--demonstrations", str(shown), *taught.split(), "--out", start])
    train = {
        "policy": start,
        "tasks": f"{folder}/train.jsonl",
        "validation-tasks": f"{folder}/validation.jsonl",
        "corpus": corpus,
        "alpha": "0",
        "tasks-per-step": "8",
        "group-size": "12",
        "max-turn-tokens": "160",
        "learning-rate": "2e-4",
        "steps": str(options.steps),
    }
    how = ["--name", name, "--estimators", "mt-grpo", "--seeds", str(options.seeds), "--jobs", str(options.jobs)]
    given = [part for key, value in train.items() for part in (f"--train.{key}", value)]
    turnwise(["reproduce", *how, "--eval-size", str(options.eval_size), *given])


if __name__ == "__main__":
    main()
