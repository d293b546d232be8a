"""A calculator agent on problems in GSM8K's format: shown a little, then trained by reinforcement.

The embedded policy has only ever searched. A few demonstrations show it the new tool; training does the rest.
"""

import argparse
import json
import operator
import random
import re
import tempfile
from pathlib import Path

import torch

import turnwise
from turnwise.policy import save_policy
from turnwise.tags import result_text, system_prompt
from turnwise.types import Message, ToolResult
from turnwise.warmup import Demonstration, demonstration_row, teach_rows

STORIES = (
    ("+", "{who} has {a} {things} and buys {b} more. How many {things} are there?"),
    ("-", "{who} had {a} {things} and gave {b} away. How many {things} are left?"),
    ("*", "{who} fills {a} boxes with {b} {things} each. How many {things} are there?"),
)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculator(expression: str) -> str:
    """Computes a sum, difference or product of two whole numbers, such as 12 * 7."""
    found = re.fullmatch(r"\s*(\d+)\s*([-+*])\s*(\d+)\s*", expression)
    if not found:
        raise turnwise.ToolError("the expression must be two whole numbers with +, - or * between them")
    return str(OPERATORS[found[2]](int(found[1]), int(found[3])))


TOOLS = [calculator]


def problem(rng: random.Random) -> tuple[str, str, int]:
    """A question, the expression that answers it, and its value."""
    sign, story = rng.choice(STORIES)
    a, b = sorted((rng.randint(2, 99), rng.randint(2, 99)), reverse=True)
    who, things = rng.choice(("Ada", "Ben", "Mia", "Tom")), rng.choice(("apples", "books", "coins", "stamps"))
    expression = f"{a} {sign} {b}"
    return story.format(who=who, a=a, b=b, things=things), expression, int(calculator(expression))


def demonstration(question: str, expression: str, value: int) -> Demonstration:
    call = json.dumps({"name": "calculator", "args": {"expression": expression}})
    asked = f"<reasoning>\nLet me compute it.\n</reasoning>\n<tool>\n{call}\n</tool>"
    said = f"<reasoning>\nThe result says it.\n</reasoning>\n<answer>\n{value}\n</answer>"
    return Demonstration(question=question, messages=(asked, said), replies=(result_text(ToolResult(text=str(value))),))


def shown_policy(folder: Path, steps: int, rng: random.Random) -> Path:
    """The embedded policy after a few steps on demonstrations."""
    policy = turnwise.load_policy("embedded")
    tools = {"calculator": turnwise.tool(calculator)}
    system = tuple(policy.chat.message_ids(Message(role="system", content=system_prompt(tools))))
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.01)
    for step in range(steps):
        rows = [demonstration_row(demonstration(*problem(rng)), policy.chat, system) for _ in range(16)]
        loss = teach_rows(policy, optimizer, rows, 2e-3 * min(1.0, (step + 1) / 20))
    print(f"{steps} steps of 16 demonstrations, loss {loss:.3f}", flush=True)
    folder.mkdir()
    save_policy(policy, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shown", type=int, default=45)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    rng, folder = random.Random(0), Path(tempfile.mkdtemp(prefix="calculator-"))
    for name, count in (("train", 200), ("test", 60)):
        rows = [problem(rng) for _ in range(count)]
        lines = [{"question": q, "answer": f"{e} = <<{e}={v}>>{v}\n#### {v}"} for q, e, v in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sizes = {"tasks_per_step": 6, "group_size": 8, "minibatches": 2, "validate_every": options.steps}
    result = turnwise.train(
        policy=str(shown_policy(folder / "start", options.shown, rng)),
        tasks=str(folder / "train.jsonl"),
        validation_tasks=str(folder / "test.jsonl"),
        tools=Path(__file__),
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
