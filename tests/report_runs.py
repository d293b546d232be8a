"""Run directories as the trainer writes them, with plausible curves and exact advantages.

The curves are drawn, not trained; the rewards and the advantages of the rollouts are computed from
what stands in their text, with a standard deviation of ddof 1.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turnwise.types import Action, Rollout, Task, ToolCall, ToolResult, Turn

FACTS = [
    ("Which currency do people pay with in Kenya?", ("Kenyan shilling", "shilling"), "Kenya",
     "Kenya is a country in East Africa. The capital is Nairobi. The currency is the Kenyan "
     "shilling. People there speak Swahili and English.",
     ("Nairobi", "Swahili", "Kenyan shilling"), "country"),
    ("What is the chemical symbol of tungsten?", ("W",), "Tungsten",
     "Tungsten is a hard grey metal. The chemical symbol is W. The atomic number is 74. "
     "It has the highest melting point of all metals.", ("Tu", "74", "W"), "element"),
    ("Who painted The Hay Wain?", ("John Constable", "Constable"), "The Hay Wain",
     "The Hay Wain is an oil painting. The painter is John Constable. It was finished in the year "
     "1821 and hangs in the National Gallery in London.",
     ("Turner", "1821", "John Constable"), "painting"),
    ("On which continent does Suriname lie?", ("South America",), "Suriname",
     "Suriname is a small country. The continent is South America. The capital is Paramaribo. "
     "The official language is Dutch.", ("Paramaribo", "Africa", "South America"), "country"),
]  # fmt: skip
GROUP_SIZE = 12
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<!-- --> ]]> &lt; \x1b[31mred\x1b[0m \x00\x07\x7f \u202eright-to-left "
    "[bold]rich[/bold] \ud800 'q' \"q\""
)


def z(values: Sequence[float]) -> np.ndarray:
    array = np.array(values)
    if len(array) < 2 or np.ptp(array) == 0:
        return np.zeros(len(array))
    return (array - array.mean()) / array.std(ddof=1)


def write_run(path: Path, *, estimator: str, seed: int, steps: int = 60, rollouts: bool = True) -> Path:
    """One run directory at `path`."""
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, *estimator.encode()])
    config = {"estimator": estimator, "seed": seed, "steps": steps, "group_size": GROUP_SIZE,
              "tasks_per_step": 16, "alpha": 1.0}  # fmt: skip
    write_json(path / "config.json", {"format": 1, "turnwise_version": "0.1.0", "config": config})
    write_lines(path / "metrics.jsonl", metric_lines(estimator, steps, rng))
    if rollouts:
        records = [
            record
            for step in (1, steps // 2, steps)
            for group, fact in enumerate(FACTS[:3])
            for record in group_records(estimator, step, steps, group, fact, rng)
        ]
        write_lines(path / "rollouts.jsonl", records)
    return path


def bare_run(path: Path, lines: list, *, estimator: str = "mt-grpo", seed: int = 0, **config: Any) -> Path:
    """A run directory of nothing but its configuration and these metric lines."""
    path.mkdir(parents=True)
    write_json(path / "config.json", {"format": 1, "config": {"estimator": estimator, "seed": seed, **config}})
    write_lines(path / "metrics.jsonl", lines)
    return path


def metric_line(step: int, split: str = "validation", **metrics: float) -> dict[str, Any]:
    return {"step": step, "split": split, "wall_s": 1.0, "metrics": metrics}


def said_turn(text: str, **fields: Any) -> Turn:
    """A turn of two tokens."""
    fields = {"action": Action(), "action_ids": (5, 6), **fields}
    return Turn(sampling_logprobs=(-1.0,) * len(fields["action_ids"]), text=text, **fields)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def write_lines(path: Path, records: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def skills(estimator: str, progress: float, luck: float = 0.0) -> tuple[float, float]:
    """(rate of well-formed calls, share read rightly from the article) at a point of training."""
    grow = 1 / (1 + np.exp(-10 * (progress - 0.35)))
    return {
        "grpo-or": (0.45 * (1 - grow) ** 1.5 + 0.02, 0.45),
        "grpo-mr": (0.45 + 0.52 * grow, 0.45 + (0.18 + luck) * grow),
        "mt-grpo": (0.45 + 0.545 * min(1, 1.6 * grow), 0.45 + (0.47 + luck / 4) * grow),
    }.get(estimator, (0.5, 0.5))


def metric_lines(estimator: str, steps: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    luck, lines = rng.normal(0, 0.1), []
    for step in range(steps + 1):
        call, read = skills(estimator, step / steps, luck)
        noise = rng.normal(0, 0.02, 8)
        tool = float(np.clip(call + noise[0] + luck / 20, 0, 1))
        found = tool * 0.94
        right = float(np.clip(found * read + (1 - tool) * 0.27 + noise[1], 0, 1))
        metrics = {
            "tool_execution": tool, "answer_in_results": found, "exact_match": right,
            "xml_format": float(np.clip(0.78 + 0.2 * step / steps + noise[2], 0, 1)),
            "return": 0.2 * tool + 0.5 * found + 1.6 * right + 0.3,
            "entropy": float(0.9 * np.exp(-1.6 * step / steps) + abs(noise[3])),
            "kl": float(0.14 * (step / steps) ** 0.7 + abs(noise[4]) / 6),
            "dead_groups": float(np.clip(0.05 + 0.3 * step / steps + noise[5], 0, 1)),
            "abs_advantage/turn_1": float(0.8 + noise[6]), "turns": 1 + tool,
            "abs_advantage/turn_2": float(0.6 + 0.5 * (estimator == "mt-grpo") + noise[7]),
        }  # fmt: skip
        if step:
            lines.append({"step": step, "split": "train", "wall_s": 2.5 * step, "metrics": metrics})
        if step % 15 == 0:
            kept = {k: v for k, v in metrics.items() if not k.startswith(("abs_", "kl", "dead"))}
            lines.append({"step": step, "split": "validation", "wall_s": 2.6 * step, "metrics": kept})
    return lines


def group_records(
    estimator: str, step: int, steps: int, group: int, fact: tuple, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """The records of one group, with advantages computed from its own rewards."""
    question, answers, _, _, _, kind = fact
    call, read = skills(estimator, step / steps)
    rollouts = [a_rollout(fact, group, call, read, rng) for _ in range(GROUP_SIZE)]
    task = Task(id=f"{kind}-{group}", question=question, answers=answers, kind=kind)
    return [
        record(task, step, r, a, {"group mean": [float(np.mean([total(x) for x in rollouts]))]})
        for r, a in zip(rollouts, advantages(estimator, rollouts), strict=True)
    ]


def record(task: Task, step: int, rollout: Rollout, advantage: Sequence[float],
           baselines: Any = None, split: str = "train") -> dict[str, Any]:  # fmt: skip
    """One line of rollouts.jsonl."""
    turns = len(rollout.turns)
    names = {name: list(values) * turns for name, values in (baselines or {}).items()}
    return {
        "step": step, "split": split, "group": rollout.group, "baselines": names or None,
        "task": {"id": task.id, "question": task.question, "answers": task.answers,
                 "kind": task.kind},
        "rollout": dataclasses.asdict(rollout), "advantages": [float(a) for a in advantage],
        "loss_mask": [turn.action.error != "masked" for turn in rollout.turns],
    }  # fmt: skip


def total(rollout: Rollout) -> float:
    own = sum(sum(r.values()) for r in rollout.turn_rewards)
    return own + sum(rollout.outcome_rewards.values())


def advantages(estimator: str, rollouts: Sequence[Rollout]) -> list[list[float]]:
    """GRPO-OR, GRPO-MR or MT-GRPO (two turns, alpha 1) over one group."""
    outcome = z([sum(r.outcome_rewards.values()) for r in rollouts])
    merged = z([total(r) for r in rollouts])
    first = z([sum(r.turn_rewards[0].values()) for r in rollouts])
    if estimator == "grpo-or":
        return [[o] * len(r.turns) for o, r in zip(outcome, rollouts, strict=True)]
    if estimator == "grpo-mr":
        return [[m] * len(r.turns) for m, r in zip(merged, rollouts, strict=True)]
    both = zip(first, outcome, rollouts, strict=True)
    return [[f + o, o][: len(r.turns)] for f, o, r in both]


def a_rollout(fact: tuple, group: int, call: float, read: float, rng: np.random.Generator) -> Rollout:
    """One rollout of at most two turns, rewarded with the paper's constants."""
    _, answers, title, article, values, _ = fact
    draw, name = rng.random(), str(rng.choice(values[:2]))
    turns, rewards = [], []
    if draw < call + 0.15:
        good = draw < call
        query = f'{{"name": "search", "args": {{"query": "{title}"}}}}'
        query = query if good else query[:-1].replace('"args"', "args")
        text = f"<reasoning>\nI should look up {title}.\n</reasoning>\n<tool>\n{query}\n</tool>"
        result = ToolResult(text=f"{title}\n{article}") if good else ToolResult(
            text="Error: the call must be JSON with a name and args", error="parse")  # fmt: skip
        turns.append(a_turn(text, rng, tool_calls=(ToolCall(name="search", arguments=None),), results=(result,)))
        rewards.append({"tool_execution": 0.2, "answer_in_results": 0.5} if good else {})
        right = good and rng.random() < read
    else:
        right = rng.random() < 0.3
    said = answers[0] if right else name
    turns.append(a_turn(f"<answer>\n{said}\n</answer>", rng, answer=said))
    rewards.append({})
    outcome = {"answer_presence": 0.5 * right, "exact_match": 1.0 * right,
               "xml_format": 0.2, "tag_usage": 0.2 if len(turns) == 2 else 0.1}  # fmt: skip
    return Rollout(task_id=title, group=group, prompt_ids=(1, 2, 3), turns=tuple(turns),
                   stop="answer", turn_rewards=tuple(rewards), outcome_rewards=outcome)  # fmt: skip


def a_turn(text: str, rng: np.random.Generator, results: tuple[ToolResult, ...] = (), **action: Any) -> Turn:
    ids = tuple(int(i) for i in rng.integers(0, 4000, 3 + len(text) // 4))
    return Turn(action_ids=ids, sampling_logprobs=(-0.5,) * len(ids), text=text,
                action=Action(**action), results=results)  # fmt: skip


def write_runs(folder: Path, seeds: int = 3, **options: Any) -> list[Path]:
    return [
        write_run(folder / f"{name}-{seed}", estimator=name, seed=seed, **options)
        for name in ("grpo-or", "grpo-mr", "mt-grpo")
        for seed in range(seeds)
    ]
