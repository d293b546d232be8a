"""Why a turn has its advantage: what it was compared with, and what of it was paid.

The first lines are the split of the advantage where the recorded rewards give it, and say plainly where they do not;
the last one says which rewards this turn got, and which its siblings got and it did not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.credit import ONE_PER_ROLLOUT
from turnwise.report.data import RolloutLine
from turnwise.report.recipes import Part, siblings
from turnwise.report.splits import Split, splits
from turnwise.report.text import one_line

OUTCOME_ALONE = ("grpo-or", "ppo-or")
"""The methods that turn rewards do not count for."""
NAMED = 3
"""How many rewards that siblings got are named."""
NOTHING = 1e-9


def turn_reward(line: RolloutLine, turn: int) -> float:
    """Sum of the reward components of one turn; 0 where it has none."""
    return math.fsum(components(line, turn).values())


def components(line: RolloutLine, turn: int) -> Mapping[str, float]:
    """The reward components of one turn."""
    rewards = line.rollout.turn_rewards
    return rewards[turn] if turn < len(rewards) else {}


def outcome_reward(line: RolloutLine) -> float:
    return math.fsum(line.rollout.outcome_rewards.values())


def return_from(line: RolloutLine, turn: int = 0) -> float:
    """All that is paid from a turn on, undiscounted."""
    return outcome_reward(line) + math.fsum(turn_reward(line, k) for k in range(turn, len(line.rollout.turns)))


def reasons(lines: Sequence[RolloutLine], config: Mapping[str, Any]) -> list[list[str]]:
    """A text for every turn of rollouts of one step; `config` is the run's."""
    method, placebo = str(config.get("estimator")), config.get("placebo")
    groups: dict[Any, list[RolloutLine]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)

    def what_was_paid(line: RolloutLine, turn: int) -> str:
        return _dealt(line, turn) if placebo else _paid(line, turn, groups[line.group], method)

    return [
        [f"{_number_said(line, k, split, method)}\n{what_was_paid(line, k)}" for k in range(len(line.rollout.turns))]
        for line, split in zip(lines, splits(lines, config), strict=True)
    ]


def _number_said(line: RolloutLine, turn: int, split: Sequence[Split] | None, method: str) -> str:
    if line.advantages is None:
        return "No advantage: the rollout was not trained on."
    advantage = line.advantages[turn]
    if split is None:
        return f"{signed(advantage)}: {_unsplit(line, turn, method)}"
    same = " Every turn gets the same." if method in ONE_PER_ROLLOUT and len(line.rollout.turns) > 1 else ""
    return f"{_equation(advantage, split[turn])}{same}"


def _unsplit(line: RolloutLine, turn: int, method: str) -> str:
    """What is known where the advantage is not recomputed."""
    bases = "".join(f", baseline {one_line(name)} {number(v[turn])}" for name, v in line.baselines.items())
    cut = line.rollout.stop == "max_tokens" and "value" in line.baselines
    why = (
        "cut off by the token budget, it goes on with a value that is not recorded, so it is not split"
        if cut
        else f"what was recorded does not give this number under {one_line(method)}, so it is not split"
    )
    return f"return from here on {number(return_from(line, turn))}{bases}; {why}."


def _equation(advantage: float, split: Split) -> str:
    parts = [part for part in split.parts if abs(part.advantage) > NOTHING]
    if split.over:
        scaled = (
            f"({signed(split.total)} − {split.over} mean {number(split.centre)}) / its spread {number(split.spread)}"
        )
        if len(parts) == 1:
            return f"{signed(advantage)} = {scaled}.\n{signed(split.total)} = {_said(parts[0])}."
        lines = [f"{signed(advantage)} = {scaled}."]
        return "\n".join([*lines, *_listed(split.total, parts)]) if parts else lines[0]
    if not parts:
        return f"{signed(advantage)}: {_level(split)}."
    if len(parts) == 1:
        return f"{signed(advantage)} = {_said(parts[0])}."
    return "\n".join(_listed(advantage, parts))


def _level(split: Split) -> str:
    """Where nothing differs: the value and the baselines that it equals."""
    told = dict.fromkeys(f"{part.what} {number(part.value)} equals its baseline, {part.source}" for part in split.parts)
    return "; ".join(list(told)[:2]) or "nothing to compare"


def _listed(total: float, parts: Sequence[Part]) -> list[str]:
    summed = signed(parts[0].advantage) + "".join(_added(part.advantage) for part in parts[1:])
    return [f"{signed(total)} = {summed}", *(f"{signed(part.advantage)}: {_said(part)}." for part in parts)]


def _added(value: float) -> str:
    return f" {'−' if value < 0 else '+'} {abs(value):.2f}"


def _said(part: Part) -> str:
    """(outcome 1.90 − baseline 1.65) / 0.58, the mean of the group’s 12 rollouts; what is 1 is left out."""
    weight = "" if part.weight == 1 else f"{number(part.weight)} × "
    if part.baseline is None:
        return f"{weight}{part.what} {number(part.value)}"
    difference = f"{part.what} {number(part.value)} − baseline {number(part.baseline)}"
    spread = "" if abs(part.spread - 1) < 1e-6 else f" / {number(part.spread)}"
    if weight or spread:
        difference = f"({difference})"
    return f"{weight}{difference}{spread}, {part.source}"


def _paid(line: RolloutLine, turn: int, group: Sequence[RolloutLine], method: str) -> str:
    """Which rewards the turn got, and which ones siblings got at the same place."""
    others = [other for other in group if other is not line and other.rollout.stop != "error"]
    here = [other for other in others if turn < len(other.rollout.turns)]
    own = components(line, turn)
    said = [_listing("Paid here", own) or "Nothing is paid at this turn"]
    lost = _lost(own, [components(other, turn) for other in here])
    last = turn == len(line.rollout.turns) - 1
    if last:
        outcome = line.rollout.outcome_rewards
        said.append(_listing("at the end", outcome) or "nothing at the end")
        lost += _lost(outcome, [other.rollout.outcome_rewards for other in others], at_end=True)
    text = f"{'; '.join(said)}."
    if lost:
        text += f" Not paid: {'; '.join(lost[:NAMED])}."
    if not here:
        text += " No sibling took this turn." if others else ""
    else:
        text += f" {siblings(len(here)).capitalize()} took this turn."
    return (
        f"{text} Turn rewards do not count under {method}." if method in OUTCOME_ALONE and any(own.values()) else text
    )


def _dealt(line: RolloutLine, turn: int) -> str:
    """What a placebo gave the turn, which says nothing of what it did."""
    said = _listing("Dealt to this turn by the placebo, whatever it did", components(line, turn))
    return f"{said or 'The placebo dealt nothing to this turn'}."


def _listing(head: str, rewards: Mapping[str, float]) -> str:
    there = [f"{worded(name)} {number(value)}" for name, value in rewards.items() if abs(value) > NOTHING]
    return f"{head}: {', '.join(there)}" if there else ""


def _lost(own: Mapping[str, float], others: Sequence[Mapping[str, float]], *, at_end: bool = False) -> list[str]:
    """Rewards above zero that some of the others got, who got more than this one, which did not get them."""
    better = [other for other in others if math.fsum(other.values()) > math.fsum(own.values()) + NOTHING]
    names = dict.fromkeys(name for other in better for name, value in other.items() if value > NOTHING)
    where = "at the end" if at_end else "here"
    return [
        f"{worded(name)}, which {sum(other.get(name, 0.0) > NOTHING for other in others)} of "
        f"{siblings(len(others))} got {where}"
        for name in names
        if own.get(name, 0.0) <= NOTHING
    ]


def worded(name: str) -> str:
    """The name of a reward in plain words."""
    return one_line(name).replace("_", " ")


def signed(value: float) -> str:
    """Two decimals with a sign: +0.83, −0.40, 0.00."""
    if not math.isfinite(value):
        return str(value)
    text = f"{abs(value):.2f}"
    if text == "0.00":
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def number(value: float) -> str:
    """Two decimals with a true minus sign."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
