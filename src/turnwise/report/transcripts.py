"""Rollouts as HTML text: each turn on its advantage's colour, its facts in a tooltip.

Everything is plain HTML and CSS; the page's script only chooses which group is in view.
"""

import json
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from turnwise.report.data import RolloutLine, Run, spread_steps
from turnwise.report.tables import estimator_order, estimator_title
from turnwise.report.text import escaped, marked_up, one_line, shortened
from turnwise.report.why import number, outcome_reward, reasons, signed, total_reward, turn_reward
from turnwise.types import ToolResult

MAX_ROLLOUTS = 600
MAX_GROUP = 32
MAX_TEXT_CHARS = 3_000_000
TURN_CHARS, RESULT_CHARS = 4_000, 2_000
OUTCOMES = ("right", "wrong", "no answer", "not checked")
AGAINST = "Its own reward points the other way."
STOPS = {
    "answer": "gave its answer",
    "no_action": "neither called a tool nor answered",
    "done": "came to the end",
    "max_turns": "out of turns",
    "max_tokens": "cut off: out of tokens",
    "error": "the environment failed",
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """The recorded rollouts of one task in one step of one run."""

    run: Run
    step: int
    lines: tuple[RolloutLine, ...]


def groups(runs: Sequence[Run]) -> list[Group]:
    """The groups to show, at most MAX_ROLLOUTS rollouts.

    One run of each estimator comes first, and of each the first groups of every step that the
    runs were read with.
    """
    queue: list[tuple[int, int, Group]] = []
    for estimator in estimator_order(runs):
        ours = sorted((r for r in runs if r.estimator == estimator), key=lambda r: r.seed)
        for rank, run in enumerate(ours):
            queue += [(rank + nth, rank, group) for nth, group in _groups_of_run(run)]
    queue.sort(key=lambda item: item[:2])
    chosen: set[int] = set()
    rollouts = chars = 0
    for i, (_, _, group) in enumerate(queue):
        shown = group.lines[:MAX_GROUP]
        size = sum(_num_chars(line) for line in shown)
        if rollouts + len(shown) <= MAX_ROLLOUTS and chars + size <= MAX_TEXT_CHARS:
            chosen.add(i)
            rollouts, chars = rollouts + len(shown), chars + size
    kept = [group for i, (_, _, group) in enumerate(queue) if i in chosen]
    order = {(id(run)): i for i, run in enumerate(runs)}
    return sorted(kept, key=lambda g: (order[id(g.run)], g.step))


def _groups_of_run(run: Run) -> Iterator[tuple[int, Group]]:
    """(how manieth of its step, group) in the order of the file."""
    by_key: dict[tuple[int, int, str], list[RolloutLine]] = {}
    for line in run.rollouts:
        by_key.setdefault((line.step, line.rollout.group, line.task.id), []).append(line)
    steps = spread_steps(sorted({step for step, _, _ in by_key}))
    for step in steps:
        here = [tuple(lines) for (s, _, _), lines in by_key.items() if s == step]
        yield from ((nth, Group(run=run, step=step, lines=x)) for nth, x in enumerate(here))


def _num_chars(line: RolloutLine) -> int:
    results = [result.text for t in line.rollout.turns for result in t.results]
    texts = [t.text for t in line.rollout.turns]
    return sum(min(len(t), TURN_CHARS) for t in texts) + sum(min(len(t), RESULT_CHARS) for t in results)


def colour_scale(shown: Sequence[Group]) -> float:
    """The |advantage| of full colour: the 95th percentile, rounded up to 1, 2 or 5 times 10ⁿ."""
    sizes = [abs(a) for g in shown for x in g.lines for a in x.advantages or () if math.isfinite(a)]
    top = float(np.quantile(sizes, 0.95)) if sizes else 0.0
    if top <= 0:
        return 1.0
    unit = 10 ** math.floor(math.log10(top))
    return next(m * unit for m in (1.0, 2.0, 5.0, 10.0) if m * unit >= top * 0.999)


def section(shown: Sequence[Group]) -> str:
    """All groups, each foldable, with the pickers that the script fills."""
    scale = colour_scale(shown)
    first = _opened(shown)
    body = "".join(_group(g, g is first, scale) for g in shown)
    return (
        '<form class="pickers" hidden><label>Run <select id="pick-run"></select></label>'
        '<label><span>Training step <b id="step-now"></b></span>'
        '<input type="range" id="pick-step" min="0" step="1"></label>'
        '<label class="wide">Question <select id="pick-task"></select></label></form>'
        f"{_filters(shown)}{_legend(scale)}{body}"
    )


def _filters(shown: Sequence[Group]) -> str:
    """Which rollouts of a group are in view, and in which order; options that no rollout has are left out."""
    lines = [line for group in shown for line in group.lines]
    outcomes = [name for name in OUTCOMES if any(_outcome(line) == name for line in lines)]
    errors = sorted({error for line in lines for error in _errors(line)})
    return (
        '<form class="filters" hidden>'
        f'<label>Outcome <select id="by-outcome">{_options(["all", *outcomes])}</select></label>'
        f'<label>Tool error <select id="by-error">{_options(["all", "none", *errors])}</select></label>'
        '<label>Order <select id="by-order"><option value="return">highest return</option>'
        '<option value="credit">largest credit</option><option value="up">most praised turn</option>'
        '<option value="down">most blamed turn</option></select></label>'
        '<label class="tick"><input type="checkbox" id="by-sign">credit against a turn’s own reward</label>'
        '<output aria-live="polite"></output></form>'
    )


def _options(names: Sequence[str]) -> str:
    return "".join(f'<option value="{escaped(n)}">{escaped(one_line(n))}</option>' for n in names)


def _outcome(line: RolloutLine) -> str:
    """One of OUTCOMES."""
    right = _is_right(line)
    if right is not None:
        return "right" if right else "wrong"
    return "no answer" if line.rollout.answer is None else "not checked"


def _errors(line: RolloutLine) -> set[str]:
    return {result.error for turn in line.rollout.turns for result in turn.results if result.error}


def against_own_reward(group: Sequence[RolloutLine]) -> list[tuple[int, ...]]:
    """The turns of each rollout whose credit has the sign opposite to that of their own reward.

    Which is the reward minus its mean over the turns at the same place of the group; as the metric `sign_flips` counts.
    """
    found = []
    for line in group:
        turns = []
        for k, advantage in enumerate(line.advantages or ()):
            here = [turn_reward(other, k) for other in group if k < len(other.rollout.turns)]
            better = turn_reward(line, k) - math.fsum(here) / len(here)
            if min(abs(better), abs(advantage)) > 1e-9 and better * advantage < 0:
                turns.append(k)
        found.append(tuple(turns))
    return found


def _legend(scale: float) -> str:
    stops = [-1.0, -0.5, 0.0, 0.5, 1.0]
    boxes = "".join(f'<span class="key {_sign(s)}" style="--w:{abs(s):.2f}">{signed(s * scale)}</span>' for s in stops)
    return (
        '<p class="scale"><span>less likely</span>'
        f'<span class="keys" role="img" aria-label="colour scale of the advantage">{boxes}</span>'
        "<span>more likely</span>"
        '<span class="key env">grey: from the environment, never trained on</span></p>'
    )


def _sign(advantage: float | None) -> str:
    if advantage is None or not math.isfinite(advantage) or abs(advantage) < 0.005:
        return "none"
    return "pos" if advantage > 0 else "neg"


def _opened(shown: Sequence[Group]) -> Group:
    """The group in view at first: of the last method's first run, the one with most to compare."""
    last = estimator_order([group.run for group in shown])[-1]
    run = next(group.run for group in shown if group.run.estimator == last)
    ours = [group for group in shown if group.run is run]
    return max(ours, key=lambda group: len({line.advantages for line in group.lines}))


def _group(group: Group, opened: bool, scale: float) -> str:
    run, first = group.run, group.lines[0]
    why, against = reasons(group.lines, run.config), against_own_reward(group.lines)
    order = sorted(range(len(group.lines)), key=lambda i: -total_reward(group.lines[i]))
    alike: dict[Hashable, list[int]] = {}
    for i in order[:MAX_GROUP]:
        alike.setdefault(_content(group.lines[i]), []).append(i)
    cards = "".join(
        _card(group.lines[same[0]], why[same[0]], scale, len(same), against[same[0]]) for same in alike.values()
    )
    title = f"{estimator_title(run.estimator)}, seed {run.seed}"
    question = one_line(shortened(first.task.question, 1_000))
    golds = ", ".join(first.task.answers[:5]) + (" …" if len(first.task.answers) > 5 else "")
    return (
        f'<details class="group" data-run="{escaped(f"{title} · {one_line(run.name)}")}" '
        f'data-step="{group.step}" data-task="{escaped(question)}"'
        f"{' open' if opened else ''}>"
        f"<summary>{escaped(title)} · step {group.step} · {escaped(question)}</summary>"
        f'<h3>{escaped(question)}</h3><p class="golds">{f"Accepted: <b>{escaped(golds)}</b>" if golds else ""}'
        f"{f' <span>({escaped(one_line(first.task.kind))})</span>' if first.task.kind else ''}</p>"
        f'<p class="tally">{escaped(_tally(group))}</p><div class="cards">{cards}</div></details>'
    )


def _content(line: RolloutLine) -> Hashable:
    """Equal for rollouts that say and earn the same: they share a card."""
    rollout = line.rollout
    turns = tuple((t.text, tuple((r.text, r.error) for r in t.results)) for t in rollout.turns)
    rewards = [sorted(r.items()) for r in (*rollout.turn_rewards, rollout.outcome_rewards)]
    return turns, rollout.stop, rollout.error, str(rewards), line.advantages, line.loss_mask


def _tally(group: Group) -> str:
    n = len(group.lines)
    called = sum(_ran_tool(line) for line in group.lines)
    right = [r for line in group.lines if (r := _is_right(line)) is not None]
    outcome = math.fsum(outcome_reward(x) for x in group.lines) / n
    own = math.fsum(total_reward(x) - outcome_reward(x) for x in group.lines) / n
    text = f"{n} rollouts: {called} ran a tool"
    if right:
        text += f", {sum(right)} {'answered right' if group.lines[0].task.answers else 'solved the task'}"
    text += f". Mean turn reward {number(own)}, mean outcome {number(outcome)}."
    if n > MAX_GROUP:
        text += f" The {MAX_GROUP} with the highest return are shown."
    return text


def _ran_tool(line: RolloutLine) -> bool:
    return any(result.error is None for t in line.rollout.turns for result in t.results)


def _is_right(line: RolloutLine) -> bool | None:
    """Whether the answer is exactly right, or the environment says so; None where neither a reward nor it does."""
    if line.rollout.success is not None:
        return line.rollout.success
    rewards = line.rollout.outcome_rewards
    value = rewards.get("exact_match", rewards.get("correct"))
    return None if value is None else value > 0


def _card(line: RolloutLine, why: Sequence[str], scale: float, count: int, against: Sequence[int]) -> str:
    credit = [a for a in line.advantages or () if math.isfinite(a)] or [0.0]
    facts = {
        "outcome": _outcome(line),
        "errors": json.dumps(sorted(_errors(line))),
        "sign": str(len(against)),
        "return": f"{total_reward(line):.6g}",
        "up": f"{max(credit):.6g}",
        "down": f"{min(credit):.6g}",
        "count": str(count),
    }
    marks = "".join(f' data-{name}="{escaped(value)}"' for name, value in facts.items())
    turns = "".join(_turn(line, k, why[k], scale, k in against) for k in range(len(line.rollout.turns)))
    if line.rollout.error:
        turns += f'<p class="failed">{escaped(shortened(line.rollout.error, 500))}</p>'
    return (
        f'<article class="card"{marks}>{_verdict(line, count)}{turns}<footer>'
        f"Return {number(total_reward(line))}: {escaped(_sum_text(line))}</footer></article>"
    )


def _verdict(line: RolloutLine, count: int) -> str:
    alike = f'<span class="alike">× {count} alike</span>' if count > 1 else ""
    answer = line.rollout.answer
    if answer is None and line.task.answers == ():
        said = STOPS.get(line.rollout.stop, line.rollout.stop).capitalize()
        kind, mark = {True: ("right", "✓ solved"), False: ("wrong", "✗ not solved"), None: ("", "")}[_is_right(line)]
        return f'<header><em>{escaped(said)}</em>{alike}<b class="{kind}">{mark}</b></header>'
    if answer is None:
        said = STOPS.get(line.rollout.stop, line.rollout.stop).capitalize()
        return f'<header><em>{escaped(said)}</em>{alike}<b class="wrong">✗ no answer</b></header>'
    marks = {True: ("right", "✓ right"), False: ("wrong", "✗ wrong"), None: ("", "not checked")}
    kind, mark = marks[_is_right(line)]
    said = escaped(one_line(shortened(answer, 200))) or "(empty)"
    return f'<header><em>“{said}”</em>{alike}<b class="{kind}">{mark}</b></header>'


def _sum_text(line: RolloutLine) -> str:
    parts = [
        f"turn {k + 1} {number(turn_reward(line, k))}" for k, rewards in enumerate(line.rollout.turn_rewards) if rewards
    ]
    return " + ".join([*parts, f"outcome {number(outcome_reward(line))}"])


def _turn(line: RolloutLine, k: int, why: str, scale: float, against: bool) -> str:
    turn = line.rollout.turns[k]
    advantage = None if line.advantages is None else line.advantages[k]
    finite = advantage is not None and math.isfinite(advantage)
    weight = min(1.0, abs(advantage) / scale) if advantage is not None and finite else 0.0
    badge = "–" if advantage is None else signed(advantage)
    masked = line.loss_mask is not None and not line.loss_mask[k]
    results = "".join(_result(result, line.task.answers) for result in turn.results)
    text = marked_up(shortened(turn.text, TURN_CHARS), ())
    note = f'<b class="against">{AGAINST}</b>' if against else ""
    return (
        f'<div class="turn {_sign(advantage)}{" masked" if masked else ""}" tabindex="0" '
        f'style="--w:{weight:.2f}"><div class="head"><span>turn {k + 1}'
        f"{' · not in the loss' if masked else ''}</span>"
        f'<strong class="adv">{badge}</strong></div><pre>{text or "(nothing)"}</pre>'
        f'<p class="why">{escaped(why)}{note}</p>{_tooltip(line, k)}</div>{results}'
    )


def _result(result: ToolResult, golds: Sequence[str]) -> str:
    failed = f"<b>{escaped(result.error)}</b> " if result.error else ""
    return f'<div class="env">{failed}<pre>{marked_up(shortened(result.text, RESULT_CHARS), golds)}</pre></div>'


def _tooltip(line: RolloutLine, k: int) -> str:
    turn, rollout = line.rollout.turns[k], line.rollout
    rows: list[tuple[str, str]] = []
    components = rollout.turn_rewards[k] if k < len(rollout.turn_rewards) else {}
    rows += [(f"reward: {_words(n)}", number(v)) for n, v in components.items()]
    if k == len(rollout.turns) - 1:
        rows += [(f"outcome: {_words(n)}", number(v)) for n, v in rollout.outcome_rewards.items()]
    if not rows:
        rows.append(("reward", "none at this turn"))
    rows += [(f"baseline: {_words(n)}", number(v[k])) for n, v in line.baselines.items()]
    rows.append(("advantage", "none" if line.advantages is None else signed(line.advantages[k])))
    if line.loss_mask is not None:
        rows.append(("in the loss", "yes" if line.loss_mask[k] else "no (masked out)"))
    rows.append(("tokens sampled", f"{len(turn.action_ids):,}"))
    rows += [("tool result", result.error or "ran") for result in turn.results]
    if k == len(rollout.turns) - 1:
        rows.append(("then", STOPS.get(rollout.stop, rollout.stop)))
    cells = "".join(f"<dt>{escaped(n)}</dt><dd>{escaped(v)}</dd>" for n, v in rows)
    return f'<dl class="tip" role="tooltip">{cells}</dl>'


def _words(name: str) -> str:
    return one_line(name).replace("_", " ")
