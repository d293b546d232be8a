"""Turn 1 on real questions: the embedded policy learns to search Wikipedia for TriviaQA's questions.

    python experiments/trivia.py trivia --seeds 3

The folder has `train.jsonl`, `validation.jsonl` and `wikipedia.jsonl.gz`, as `turnwise convert` makes them. First the
embedded policy is shown every training question with a call that asks it as it stands: its copying is learned from the
atlas's names and breaks off in other people's English (docs/trivia.md). Then MT-GRPO trains it, paid for turn 1 alone.
"""

import argparse
import json
import random
from pathlib import Path

from turnwise.cli import main as turnwise
from turnwise.search import open_index, search_tool
from turnwise.tags import result_text
from turnwise.tasks import load_tasks
from turnwise.types import ToolResult
from turnwise.warmup import CALL_THOUGHTS, READ_THOUGHTS


def write_demonstrations(questions: Path, corpus: str, out: Path) -> None:
    """A demonstration of each question: a search for it as it stands.

    Every fourth goes on to an answer, so that answering is not forgotten: an accepted one where the result has it, else
    the title of what was found.
    """
    rng, search = random.Random(0), search_tool(open_index(corpus), cap=600)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for number, task in enumerate(load_tasks(questions)):
            call = json.dumps({"name": "search", "args": {"query": task.question}}, ensure_ascii=False)
            turns = [f"<reasoning>\n{rng.choice(CALL_THOUGHTS)}\n</reasoning>\n<tool>\n{call}\n</tool>"]
            if number % 4 == 0:
                found = str(search.function(task.question))
                value = next((answer for answer in task.answers if answer in found), found.partition("\n")[0])
                thought = f"<reasoning>\n{READ_THOUGHTS[0]}\n</reasoning>"
                turns += [result_text(ToolResult(text=found)), f"{thought}\n<answer>\n{value}\n</answer>"]
            file.write(json.dumps({"question": task.question, "turns": turns}, ensure_ascii=False) + "\n")


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
        "steps": str(options.steps),
    }
    how = ["--name", name, "--estimators", "mt-grpo", "--seeds", str(options.seeds), "--jobs", str(options.jobs)]
    given = [part for key, value in train.items() for part in (f"--train.{key}", value)]
    turnwise(["reproduce", *how, "--eval-size", str(options.eval_size), *given])


if __name__ == "__main__":
    main()
