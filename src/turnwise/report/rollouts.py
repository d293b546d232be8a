"""What the page's script is given of the rollouts: plain JSON, every text in it once and made visible.

    texts       every text; elsewhere a text is its place in this list
    cuts        lengths of the tokens of a turn's text, each list once
    scale       the |advantage| of full colour
    runs        title, name, method
    groups      run, step, question, golds, kind; rollouts: the first, and the one after the last
    rollouts    group, outcome, said, end, errors, return, paid, failed, turns;
                flips: turns whose credit is against the outcome, and against their own reward
    turns       text, gist, cuts, advantage, return, paid, bases, value, tokens, masked, why, results;
                by_token: advantages and values of its tokens, where a method gives each its own

`paid` and `bases` are pairs of a name and a number. Lengths are JavaScript's. What is absent or empty is left out.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turnwise.credit.diagnostics import NOTHING
from turnwise.report.data import MAX_ROLLOUTS, RolloutLine, Run, spread_groups
from turnwise.report.tables import estimator_title
from turnwise.report.text import one_line, shortened, visible
from turnwise.report.tokens import Pieces, token_pieces
from turnwise.report.why import components, outcome_reward, reasons, return_from, turn_reward, worded
from turnwise.types import Turn

MAX_TEXT_CHARS = 6_000_000
"""Characters of all different turns and results together; beyond that each is cut shorter."""
TEXT_CHARS = 4_000
"""Characters of a turn or a result."""
GIST_CHARS = 60
OUTCOMES = ("right", "wrong", "no answer", "failed", "not checked")
STOPS = {
    "answer": "gave its answer",
    "no_action": "neither called a tool nor answered",
    "done": "came to the end",
    "max_turns": "out of turns",
    "max_tokens": "cut off: out of tokens",
    "error": "the environment failed",
}
Json = dict[str, Any]


@dataclass
class Interned:
    """Values by place; equal ones have one."""

    values: list[Any] = field(default_factory=list)
    _places: dict[Any, int] = field(default_factory=dict)

    def place(self, value: Any) -> int:
        """The place of a value, added where it is new."""
        if value not in self._places:
            self._places[value] = len(self.values)
            self.values.append(value)
        return self._places[value]


def shown_rollouts(runs: Sequence[Run]) -> list[tuple[Run, tuple[RolloutLine, ...]]]:
    """Rollouts of each run, MAX_ROLLOUTS together: an equal share of each, in whole groups, evenly over its steps.

    What a run does not need of its share is the others'. Where there are too many runs for a group each, those of each
    method's first seeds have one.
    """
    seen: Counter[str] = Counter()
    ranks: dict[int, int] = {}
    for i in sorted(range(len(runs)), key=lambda i: runs[i].seed):
        ranks[i] = seen[runs[i].estimator]
        seen[runs[i].estimator] += 1
    left, chosen = MAX_ROLLOUTS, {}
    share = MAX_ROLLOUTS / max(len(runs), 1)
    order = sorted(range(len(runs)), key=lambda i: (len(runs[i].rollouts) > share, ranks[i]))
    for nth, i in enumerate(order):
        sizes = Counter(line.group for line in runs[i].rollouts)
        kept = spread_groups(sizes, left // (len(order) - nth))
        if sum(sizes[key] for key in kept) <= left:
            chosen[i] = tuple(line for line in runs[i].rollouts if line.group in kept)
            left -= len(chosen[i])
    return [(run, chosen.get(i, ())) for i, run in enumerate(runs)]


def page_data(shown: Sequence[tuple[Run, Sequence[RolloutLine]]]) -> Json:
    """The rollouts for the page's script."""
    writer = _Writer(limit=_text_limit([line for _, lines in shown for line in lines]))
    for run, lines in shown:
        writer.add(run, lines)
    return {
        "texts": writer.texts.values,
        "cuts": [list(cuts) for cuts in writer.cuts.values],
        "scale": colour_scale([line for _, lines in shown for line in lines]),
        "runs": writer.runs,
        "groups": writer.groups,
        "rollouts": writer.rollouts,
    }


@dataclass
class _Writer:
    """The tables of the page's data, as runs are added."""

    limit: int
    texts: Interned = field(default_factory=Interned)
    cuts: Interned = field(default_factory=Interned)
    runs: list[Json] = field(default_factory=list)
    groups: list[Json] = field(default_factory=list)
    rollouts: list[Json] = field(default_factory=list)

    def add(self, run: Run, lines: Sequence[RolloutLine]) -> None:
        """Adds a run's rollouts, group by group."""
        if not lines:
            return
        method = estimator_title(run.estimator)
        title = f"{method}, seed {run.seed}"
        texts = {name: self.text(said) for name, said in (("title", title), ("name", run.name), ("method", method))}
        self.runs.append(_present(**texts, placebo=bool(run.config.get("placebo"))))
        pieces = _remembered(token_pieces(run.path))
        for group, why in _groups(run, lines):
            first = group[0]
            self.groups.append(
                _present(
                    run=len(self.runs) - 1,
                    step=first.step,
                    question=self.text(shortened(first.task.question, self.limit)),
                    golds=[self.text(one_line(answer)) for answer in first.task.answers[:5]],
                    kind=self.text(one_line(first.task.kind)) if first.task.kind else None,
                    rollouts=[len(self.rollouts), len(self.rollouts) + len(group)],
                )
            )
            flips = zip(against_own_reward(group), against_outcome(group), strict=True)
            for line, said, (own, outcome) in zip(group, why, flips, strict=True):
                self.rollouts.append(self._rollout(line, said, {"own": own, "outcome": outcome}, pieces))

    def text(self, said: str) -> int:
        """The place of a text, made visible."""
        return self.texts.place(visible(said))

    def _rollout(self, line: RolloutLine, why: Sequence[str], flips: dict[str, list[int]], pieces: Pieces) -> Json:
        rollout = line.rollout
        end = STOPS.get(rollout.stop, rollout.stop)
        return _present(
            group=len(self.groups) - 1,
            outcome=self.text(outcome_of(line)),
            said=self.text(one_line(shortened(rollout.answer, 200))) if rollout.answer else None,
            end=self.text(end),
            errors=[self.text(error) for error in errors_of(line)],
            flips={name: turns for name, turns in flips.items() if turns},
            failed=self.text(shortened(rollout.error, 500)) if rollout.error else None,
            paid=self._pairs(rollout.outcome_rewards.items()),
            turns=[self._turn(line, k, why[k], pieces) for k in range(len(rollout.turns))],
            **{"return": _short(return_from(line))},
        )

    def _turn(self, line: RolloutLine, k: int, why: str, pieces: Pieces) -> Json:
        turn = line.rollout.turns[k]
        text, cuts = self._text_and_cuts(turn, pieces)
        bases = {name: values[k] for name, values in line.baselines.items()}
        value = bases.pop("value", None)
        results = [
            _present(text=self.text(shortened(r.text, self.limit)), error=self.text(r.error) if r.error else None)
            for r in turn.results
        ]
        return _present(
            text=text,
            cuts=cuts,
            gist=self.text(gist_of(turn)),
            advantage=None if line.advantages is None else _short(line.advantages[k]),
            paid=self._pairs(components(line, k).items()),
            bases=self._pairs(bases.items()),
            value=None if value is None else _short(value),
            tokens=len(turn.action_ids),
            masked=line.loss_mask is not None and not line.loss_mask[k],
            why=self.text(why),
            results=results,
            by_token=_by_token(line, k),
            **{"return": _short(return_from(line, k))},
        )

    def _text_and_cuts(self, turn: Turn, pieces: Pieces) -> tuple[int, int | None]:
        """The turn's text and the lengths of its tokens, which are as many as fit."""
        found = pieces(turn.action_ids, turn.text)
        if found is None:
            return self.text(shortened(turn.text, self.limit)), None
        kept, chars = [], 0
        for piece in found:
            chars += len(piece)
            if chars > self.limit:
                break
            kept.append(visible(piece))
        missing = len(turn.text) - len("".join(found[: len(kept)]))
        note = f" … ({missing:,} more characters)" if missing else ""
        lengths = tuple(len(piece.encode("utf-16-le")) // 2 for piece in kept)
        return self.texts.place("".join(kept) + note), self.cuts.place(lengths)

    def _pairs(self, numbers: Any) -> list[list[Any]]:
        return [[self.text(worded(name)), _short(value)] for name, value in numbers]


def _present(**entries: Any) -> Json:
    """The entries that say something."""
    return {name: value for name, value in entries.items() if value is not None and value is not False and value != []
            and value != {}}  # fmt: skip


def _remembered(pieces: Pieces | None) -> Pieces:
    """The same, with what equal turns are cut into kept."""
    known: dict[tuple[Sequence[int], str], list[str] | None] = {}

    def found(ids: Sequence[int], text: str) -> list[str] | None:
        if pieces is None:
            return None
        if (ids, text) not in known:
            known[ids, text] = pieces(ids, text)
        return known[ids, text]

    return found


def _by_token(line: RolloutLine, k: int) -> Json:
    """Advantages and values of the tokens of one turn."""
    start = sum(len(turn.action_ids) for turn in line.rollout.turns[:k])
    here = slice(start, start + len(line.rollout.turns[k].action_ids))
    columns = {"advantages": line.token_advantages, "values": line.token_values}
    return {name: [_short(x) for x in column[here]] for name, column in columns.items() if column is not None}


def _groups(run: Run, lines: Sequence[RolloutLine]) -> Iterator[tuple[list[RolloutLine], list[list[str]]]]:
    """The groups of a run, and why each turn of each rollout has its credit."""
    by_step: dict[int, list[RolloutLine]] = {}
    for line in lines:
        by_step.setdefault(line.step, []).append(line)
    for ours in by_step.values():
        why = reasons(ours, run.config)
        by_group: dict[Any, list[int]] = {}
        for i, line in enumerate(ours):
            by_group.setdefault(line.group, []).append(i)
        for members in by_group.values():
            yield [ours[i] for i in members], [why[i] for i in members]


def _text_limit(lines: Sequence[RolloutLine]) -> int:
    """Most characters of a turn or result, so that all different ones together have MAX_TEXT_CHARS."""
    texts = {turn.text for line in lines for turn in line.rollout.turns}
    texts |= {result.text for line in lines for turn in line.rollout.turns for result in turn.results}
    lengths = np.array([len(text) for text in texts], dtype=int)
    limit = TEXT_CHARS
    while limit > 100 and np.minimum(lengths, limit).sum() > MAX_TEXT_CHARS:
        limit //= 2
    return limit


def colour_scale(lines: Sequence[RolloutLine]) -> float:
    """The |advantage| of full colour: the 90th percentile, rounded up to 1, 2 or 5 times 10ⁿ."""
    sizes = [abs(a) for line in lines for a in line.advantages or () if math.isfinite(a)]
    top = float(np.quantile(sizes, 0.9)) if sizes else 0.0
    if top <= 0:
        return 1.0
    unit = 10 ** math.floor(math.log10(top))
    return next(m * unit for m in (1.0, 2.0, 5.0, 10.0) if m * unit >= top * 0.999)


def outcome_of(line: RolloutLine) -> str:
    """One of OUTCOMES."""
    rollout = line.rollout
    if rollout.stop == "error":
        return "failed"
    if rollout.success is not None:
        return "right" if rollout.success else "wrong"
    if rollout.answer is None and line.task.answers:
        return "no answer"
    value = rollout.outcome_rewards.get("exact_match", rollout.outcome_rewards.get("correct"))
    return "not checked" if value is None else "right" if value > 0 else "wrong"


def errors_of(line: RolloutLine) -> list[str]:
    """The error classes of a rollout's calls, and of what ended it where that was a failure."""
    found = {result.error for turn in line.rollout.turns for result in turn.results if result.error}
    if line.rollout.stop == "error" and line.rollout.error:
        found.add(one_line(shortened(line.rollout.error.partition(":")[0], GIST_CHARS)))
    return sorted(found)


def gist_of(turn: Turn) -> str:
    """What a turn did, in a few words."""
    action = turn.action
    if action.answer is not None:
        said = f"“{action.answer}”"
    elif action.error == "parse":
        said = "a call that cannot be read"
    elif call := action.tool_call:
        values = [str(value) for value in (call.arguments or {}).values()]
        said = f"{call.name}: {', '.join(values)}" if values else call.name
    else:
        said = turn.text
    said = one_line(said)
    return (said if len(said) <= GIST_CHARS else f"{said[: GIST_CHARS - 2]} …") or "(nothing)"


def against_outcome(group: Sequence[RolloutLine]) -> list[list[int]]:
    """The turns of each rollout whose credit has the sign opposite to that of the rollout's outcome.

    Which is the outcome reward minus its mean over the group.
    """
    mean = _mean([outcome_reward(line) for line in group if line.advantages])
    return [_opposed(line, [outcome_reward(line) - mean] * len(line.rollout.turns)) for line in group]


def against_own_reward(group: Sequence[RolloutLine]) -> list[list[int]]:
    """The turns of each rollout whose credit has the sign opposite to that of their own reward.

    Which is the reward minus its mean over the turns at the same place of the group; as the metric `sign_flips` counts.
    """
    credited = [line for line in group if line.advantages]
    means = [
        _mean([turn_reward(line, k) for line in credited if k < len(line.rollout.turns)])
        for k in range(max(len(line.rollout.turns) for line in group))
    ]
    return [_opposed(line, [turn_reward(line, k) - means[k] for k in range(len(line.rollout.turns))]) for line in group]


def _opposed(line: RolloutLine, better: Sequence[float]) -> list[int]:
    pairs = enumerate(zip(line.advantages or (), better, strict=False))
    return [k for k, (a, by) in pairs if min(abs(by), abs(a)) > NOTHING and by * a < 0]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)


def _short(value: float) -> float | None:
    """Four significant digits; None where it is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
