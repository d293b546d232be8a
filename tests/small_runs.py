"""A few questions, a tool and reward functions in files, for whole runs that take a second."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TOOLS = '''
def look(word: str) -> str:
    """The word."""
    return word
'''


def small_world(folder: Path, checkpoint: Path, names: Iterable[str], rewards: str | None = None) -> dict[str, Any]:
    """Options of a run on questions of such names, asked with one tool; with `rewards`, of a reward file alone."""
    tasks = [{"id": name, "question": f"Word {name}?", "answers": [f"w{name}"]} for name in names]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (folder / "tools.py").write_text(TOOLS)
    options = {
        "policy": str(checkpoint),
        "tasks": str(folder / "tasks.jsonl"),
        "validation_tasks": str(folder / "tasks.jsonl"),
        "tools": folder / "tools.py",
    }
    if rewards is not None:
        (folder / "rewards.py").write_text(rewards)
        options |= {"rewards": folder / "rewards.py", "reward_weights": {}}
    return options
