"""A calculator agent on problems in GSM8K's format: shown a little, then trained by reinforcement.

The embedded policy has only ever searched. A few demonstrations show it the new tool; training does the rest.
"""

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not keep a core busy

import turnwise
from turnwise.demonstrations import DemonstrationConfig, learn_demonstrations
from turnwise.tags import result_text
from turnwise.toolbox.calculator import calculator
from turnwise.types import ToolResult

STORIES = (
    ("+", "{who} has {a} {things} and buys {b} more. How many {things} are there?"),
    ("-", "{who} had {a} {things} and gave {b} away. How many {things} are left?"),
    ("*", "{who} fills {a} boxes with {b} {things} each. How many {things} are there?"),
)
ROWS = 16


def problem(rng: random.Random) -> tuple[str, str, str]:
    """A question, the expression that answers it, and its value."""
    sign, story = rng.choice(STORIES)
    a, b = sorted((rng.randint(2, 99), rng.randint(2, 99)), reverse=True)
    who, things = rng.choice(("Ada", "Ben", "Mia", "Tom")), rng.choice(("apples", "books", "coins", "stamps"))
    expression = f"{a} {sign} {b}"
    return story.format(who=who, a=a, b=b, things=things), expression, calculator(expression)


def demonstration(question: str, expression: str, value: str) -> dict:
    """A line of a demonstrations file: the question, and what policy and environment say by turns."""
    call = json.dumps({"name": "calculator", "args": {"expression": expression}})
    asked = f"<reasoning>\nLet me compute it.\n</reasoning>\n<tool>\n{call}\n</tool>"
    said = f"<reasoning>\nThe result says it.\n</reasoning>\n<answer>\n{value}\n</answer>"
    return {"question": question, "turns": [asked, result_text(ToolResult(text=value)), said]}


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def shown_policy(folder: Path, steps: int, rng: random.Random) -> str:
    """The embedded policy after a few steps on demonstrations."""
    shown = write(folder / "shown.jsonl", [demonstration(*problem(rng)) for _ in range(steps * ROWS)])
    start = folder / "start"
    learn_demonstrations(
        DemonstrationConfig(
            demonstrations=shown, tools="calculator", epochs=1, rows=ROWS, learning_rate=2e-3, out=start
        )
    )
    return str(start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shown", type=int, default=45)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    rng, folder = random.Random(0), Path(tempfile.mkdtemp(prefix="calculator-"))
    for name, count in (("train", 200), ("test", 60)):
        rows = [problem(rng) for _ in range(count)]
        lines = [{"question": q, "answer": f"{e} = <<{e}={v}>>{v}\n#### {v}"} for q, e, v in rows]
        write(folder / f"{name}.jsonl", lines)
    sizes = {"tasks_per_step": 6, "group_size": 8, "minibatches": 2, "validate_every": options.steps}
    result = turnwise.train(
        policy=shown_policy(folder, options.shown, rng),
        tasks=str(folder / "train.jsonl"),
        validation_tasks=str(folder / "test.jsonl"),
        tools="calculator",
        steps=options.steps,
        out=folder / "run",
        **sizes,
    )
    records = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    sampled, held = ([r["metrics"]["exact_match"] for r in records if r["split"] == s] for s in ("train", "validation"))
    print(f"sampled in training: {sampled[0]:.0%} right in the first step, {sampled[-1]:.0%} in the last")
    print(f"exact_match: {held[0]:.0%} of 60 held-out problems before training, {held[-1]:.0%} after training")


if __name__ == "__main__":
    main()
