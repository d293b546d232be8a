"""Own questions and an own tool: an agent learns to ask a small SQLite database.

Questions are JSON lines, the tool is a typed function with a docstring, and a reward is a function of the task and the
rollout. Run it with `python examples/own_tools.py`; the run is left in a temporary folder, which it names.
"""

import argparse
import json
import os
import sqlite3
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not keep a core busy

import turnwise
from turnwise.types import Rollout, Task

PLACES = {
    "state of Brazil": "Acre Rio_Branco, Alagoas Maceió, Bahia Salvador, Ceará Fortaleza, Goiás Goiânia, "
    "Mato_Grosso Cuiabá, Minas_Gerais Belo_Horizonte, Pará Belém, Paraná Curitiba, Pernambuco Recife",
    "canton of Switzerland": "Aargau Aarau, Jura Delémont, Thurgau Frauenfeld, Ticino Bellinzona, Valais Sion",
    "state of Germany": "Bavaria Munich, Hesse Wiesbaden, Saxony Dresden, Thuringia Erfurt, Lower_Saxony Hanover",
}
"""Places and their capitals, none of which the embedded policy has been asked about."""
ROWS = [
    (*(word.replace("_", " ") for word in pair.split()), kind)
    for kind, text in PLACES.items()
    for pair in text.split(",")
]
DATABASE = sqlite3.connect(":memory:", check_same_thread=False)
DATABASE.execute("CREATE TABLE place (name TEXT, capital TEXT, kind TEXT)")
DATABASE.executemany("INSERT INTO place VALUES (?, ?, ?)", ROWS)


def search(query: str) -> str:
    """Looks up articles by keywords and returns the best match."""
    found = DATABASE.execute("SELECT * FROM place WHERE name LIKE ?", (f"%{query.strip()}%",)).fetchone()
    if not found:
        return "No results."
    name, capital, kind = found
    return f"{name}\n{name} is a {kind}. The capital is {capital}. It has many towns."


def outcome_short(task: Task, rollout: Rollout) -> float:
    """A little for an answer of at most three words."""
    return 0.1 if rollout.answer and len(rollout.answer.split()) <= 3 else 0.0


TOOLS = [search]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=14)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="own-tools-"))
    questions = folder / "questions.jsonl"
    lines = [
        {"id": name, "question": f"What is the capital of {name}?", "answers": [capital]} for name, capital, _ in ROWS
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    result = turnwise.train(
        tasks=str(questions),
        validation_tasks=str(questions),
        tools=__file__,
        rewards=Path(__file__),
        steps=options.steps,
        tasks_per_step=6,
        group_size=8,
        minibatches=2,
        validate_every=options.steps,
        out=folder / "run",
    )
    records = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    before, after = (r["metrics"] for r in records if r["split"] == "validation")
    for name in ("tool_execution", "exact_match"):
        print(f"{name}: {before[name]:.0%} of {len(ROWS)} questions before, {after[name]:.0%} after training")
    [[rollout]] = turnwise.rollouts(result.out, tasks=turnwise.load_tasks(questions)[2:3], group_size=1, mode="greedy")
    print(*(turn.text for turn in rollout.turns), sep="\n--\n")
    print(f"The run is in {result.out}.")


if __name__ == "__main__":
    main()
