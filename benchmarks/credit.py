"""How fast the credit library is: 4,096 rollouts x 16 turns, and 8 million tokens.

    python benchmarks/credit.py [--rollouts 4096] [--rounds 15]

Prints, for every estimator of turns, its time beside that of the same formula written as Python loops over
rollouts and turns, and beside numpy.cumsum over the table's reward columns; for those of tokens the same with loops
over tokens; how memory grows; and what `import turnwise.credit` costs and loads. The loops below are written from the
equations without the library: results of both must agree to 1e-9, or the command stops.

Both read the same table: the library its columns, the loops their elements one by one. Every round gives a method a
table on which nothing has been computed yet. Seconds are those of the processor, so other programs change them little.
"""

import argparse
import gc
import os
import platform
import subprocess
import sys
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import pairwise
from math import isnan
from typing import Any

import numpy as np

from turnwise.credit import ESTIMATORS, TOKEN_ESTIMATORS, TokenTable, TurnTable, turn_table

TURNS, GROUP_SIZE, STATES = 16, 16, 12
TOKENS_PER_TURN = 122
"""4,096 x 16 x 122 are 8 million tokens."""
BY_KEY = ("gigpo", "hgpo", "hgpo-code", "gagpo", "mt-grpo-tree", "treerl", "carl", "tree-grpo", "slate")
"""Those whose groups are named by anchors or nodes, which may have to be sorted."""


def make_table(rollouts: int, *, seed: int = 0, ragged: bool = False) -> TurnTable:
    """Rollouts in groups of 16, which share their first turns: pairs the first two, fours the next two, and so on.

    Turns that are shared have equal rewards, and three in ten turns lack one of the two.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, TURNS + 1, rollouts) if ragged else np.full(rollouts, TURNS)
    nodes: list[list[Hashable]] = [
        [(i // GROUP_SIZE, k, i % GROUP_SIZE >> max(0, 3 - k // 2)) for k in range(n)] for i, n in enumerate(lengths)
    ]
    for i, path in enumerate(nodes):
        path[-1] = (path[-1], i)  # the last turn, which is paid with the outcome, is no other rollout's
    paid: dict[Hashable, dict[str, float]] = {}
    for node in dict.fromkeys(node for path in nodes for node in path):
        tool, found = rng.normal(size=2).tolist()
        paid[node] = {"tool": tool, "found": found} if rng.random() < 0.7 else {"tool": tool}
    return turn_table(
        [i // GROUP_SIZE for i in range(rollouts)],
        [[paid[node] for node in path] for path in nodes],
        [dict(zip(("right", "format"), rng.normal(size=2).tolist(), strict=True)) for _ in range(rollouts)],
        values=[rng.normal(size=n).tolist() for n in lengths],
        anchors=[rng.integers(0, STATES, n).tolist() for n in lengths],
        nodes=nodes,
        tokens=[rng.integers(1, 200, n).tolist() for n in lengths],
    )


# ----------------------------------------------------------------- the formulas as loops, one number per turn

Step = TurnTable
PerTurn = list[list[float]]
"""One number per turn of each rollout."""


def rows(step: Step) -> list[list[int]]:
    """The rows of each rollout."""
    found: list[list[int]] = []
    for row in range(len(step.rollout)):
        if step.index[row] == 0:
            found.append([])
        found[-1].append(row)
    return found


def column(step: Step, name: str) -> list[list[Any]]:
    """An entry per turn of each rollout."""
    values = getattr(step, name)
    return [[values[row] for row in turns] for turns in rows(step)]


def totals(step: Step) -> PerTurn:
    """Each turn's reward."""
    found = []
    for turns in rows(step):
        out = []
        for row in turns:
            total = 0.0
            for rewards in step.turn_rewards.values():
                if not isnan(rewards[row]):
                    total += rewards[row]
            out.append(total)
        found.append(out)
    return found


def outcomes(step: Step) -> list[float]:
    return [sum(rewards[i] for rewards in step.outcome_rewards.values()) for i in range(step.num_rollouts)]


def paid(step: Step) -> PerTurn:
    """Each turn's reward; the last turn's with the outcome."""
    found = totals(step)
    for turns, outcome in zip(found, outcomes(step), strict=True):
        turns[-1] += outcome
    return found


def merged(step: Step) -> list[float]:
    return [sum(turns) for turns in paid(step)]


def spread(values: Sequence[float], step: Step) -> PerTurn:
    return [[value for _ in turns] for value, turns in zip(values, rows(step), strict=True)]


def flat(ragged: Sequence[Sequence[Any]]) -> list[Any]:
    return [entry for each in ragged for entry in each]


def ragged_like(values: Sequence[float], step: Step) -> PerTurn:
    rest = iter(values)
    return [[next(rest) for _ in turns] for turns in rows(step)]


def by_key(values: Sequence[float], keys: Sequence[Hashable]) -> dict[Hashable, list[float]]:
    found: dict[Hashable, list[float]] = defaultdict(list)
    for value, key in zip(values, keys, strict=True):
        found[key].append(value)
    return found


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def std_of(values: Sequence[float], ddof: int) -> float:
    if len(values) <= ddof or min(values) == max(values):
        return 0.0
    mean = mean_of(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - ddof)) ** 0.5


def scores(values: Sequence[float], keys: Sequence[Hashable], *, ddof: int = 1, eps: float = 1e-4) -> list[float]:
    """z-scores among the values with the same key."""
    known = {key: (mean_of(found), std_of(found, ddof)) for key, found in by_key(values, keys).items()}
    out = []
    for value, key in zip(values, keys, strict=True):
        mean, std = known[key]
        out.append((value - mean) / (std + eps) if std > 0 else 0.0)
    return out


def groups(step: Step) -> list[int]:
    return [step.group[turns[0]] for turns in rows(step)]


def places(step: Step) -> list[Hashable]:
    """Group and turn index of every turn."""
    return [(step.group[row], step.index[row]) for row in range(len(step.rollout))]


def to_go(rewards: PerTurn, gamma: float) -> PerTurn:
    found = []
    for turns in rewards:
        carry, out = 0.0, []
        for reward in reversed(turns):
            carry = reward + gamma * carry
            out.append(carry)
        found.append(out[::-1])
    return found


def grpo_or(step: Step) -> PerTurn:
    return spread(scores(outcomes(step), groups(step)), step)


def grpo_mr(step: Step) -> PerTurn:
    return spread(scores(merged(step), groups(step)), step)


def dr_grpo(step: Step) -> PerTurn:
    returns, known = merged(step), by_key(merged(step), groups(step))
    means = {group: mean_of(found) for group, found in known.items()}
    return spread([value - means[group] for value, group in zip(returns, groups(step), strict=True)], step)


def rloo(step: Step) -> PerTurn:
    returns = merged(step)
    known = by_key(returns, groups(step))
    out = []
    for value, group in zip(returns, groups(step), strict=True):
        others = len(known[group]) - 1
        out.append(value - (sum(known[group]) - value) / others if others else 0.0)
    return spread(out, step)


def by_tokens(values: list[float], step: Step, eps: float) -> list[float]:
    """Whitened over the step, each rollout weighed by its tokens."""
    weights = [sum(tokens) for tokens in column(step, "tokens")]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / (sum(weights) - 1)
    return [(v - mean) / (variance**0.5 + eps) for v in values]


def reinforce_pp(step: Step) -> PerTurn:
    return spread(by_tokens(merged(step), step, 1e-8), step)


def reinforce_pp_baseline(step: Step) -> PerTurn:
    return spread(by_tokens([turns[0] for turns in dr_grpo(step)], step, 1e-8), step)


def gdpo(step: Step) -> PerTurn:
    summed = [0.0] * step.num_rollouts
    for name in ("tool", "found", "right", "format"):
        if name in step.outcome_rewards:
            found = [step.outcome_rewards[name][i] for i in range(step.num_rollouts)]
        else:
            rewards = step.turn_rewards[name]
            found = [sum(rewards[row] for row in turns if not isnan(rewards[row])) for turns in rows(step)]
        summed = [a + b for a, b in zip(summed, scores(found, groups(step)), strict=True)]
    return spread(scores(summed, [0] * len(summed)), step)


def mt_grpo(step: Step) -> PerTurn:
    own = ragged_like(scores(flat(totals(step)), places(step)), step)
    for turns, outcome in zip(own, scores(outcomes(step), groups(step)), strict=True):
        turns[-1] += outcome
    return to_go(own, 1.0)


def grpo_decoupled(step: Step) -> PerTurn:
    return [[turns[0] for _ in turns] for turns in mt_grpo(step)]


def mt_grpo_repo(step: Step) -> PerTurn:
    own = scores([sum(turns) for turns in totals(step)], groups(step))
    outcome, both = scores(outcomes(step), groups(step)), scores(merged(step), groups(step))
    found = []
    for i, turns in enumerate(rows(step)):
        later = [outcome[i] for _ in turns[1:]]
        found.append([outcome[i] + own[i], *later] if later else [both[i]])
    return found


def turn_rloo(step: Step) -> PerTurn:
    returns = to_go(paid(step), 1.0)
    known = by_key(flat(returns), places(step))
    ends = by_key([turns[-1] for turns in returns], groups(step))
    found = []
    for group, turns in zip(groups(step), returns, strict=True):
        out = []
        for k, value in enumerate(turns):
            same = known[group, k]
            if len(same) > 1:
                baseline = (sum(same) - value) / (len(same) - 1)
            else:
                others = len(ends[group]) - 1
                baseline = (sum(ends[group]) - turns[-1]) / others if others else 0.0
            out.append(value - baseline)
        found.append(out)
    return found


def gtpo(step: Step) -> PerTurn:
    return ragged_like(scores(flat(to_go(paid(step), 0.9)), places(step)), step)


def added(first: PerTurn, second: PerTurn, *, a: float = 1.0, b: float = 1.0) -> PerTurn:
    return [[a * x + b * y for x, y in zip(xs, ys, strict=True)] for xs, ys in zip(first, second, strict=True)]


def matchtir(step: Step) -> PerTurn:
    return added(grpo_mr(step), gtpo(step), a=0.5, b=0.5)


def irc_hybrid(step: Step) -> PerTurn:
    return added(gtpo(step), grpo_or(step), b=0.3)


def states(step: Step) -> list[list[Hashable]]:
    """Group and anchor of every turn."""
    return [
        [(group, anchor) for anchor in anchors]
        for group, anchors in zip(groups(step), column(step, "anchor"), strict=True)
    ]


def gigpo(step: Step) -> PerTurn:
    whole = spread(scores(merged(step), groups(step), eps=1e-6), step)
    found = scores(flat(to_go(paid(step), 0.95)), flat(states(step)), eps=1e-6)
    return added(whole, ragged_like(found, step))


def by_history(step: Step, ddof: int) -> list[tuple[list[float], list[bool]]]:
    """For 0, 1 and 2 states before: the scores among turns with equal states, and whether a turn has company."""
    returns, found = to_go(paid(step), 0.95), []
    for j in range(3):
        values, keys = [], []
        for i, seen in enumerate(states(step)):
            for k in range(len(seen)):
                keys.append(tuple(seen[k - j : k + 1]) if k >= j else (i, k, "alone"))
                values.append(returns[i][k])
        known = by_key(values, keys)
        found.append((scores(values, keys, ddof=ddof, eps=1e-6), [len(known[key]) > 1 for key in keys]))
    return found


def hgpo(step: Step) -> PerTurn:
    levels, out = by_history(step, 1), []
    for t in range(len(levels[0][0])):
        summed = total = 0.0
        for j, (level, company) in enumerate(levels):
            if company[t]:
                summed += (j + 1) * level[t]
                total += j + 1
        out.append(summed / total if total else 0.0)
    return ragged_like(out, step)


def hgpo_code(step: Step) -> PerTurn:
    levels, out = by_history(step, 0), []
    for t in range(len(levels[0][0])):
        summed = total = 0.0
        for j, (level, _) in enumerate(levels):
            if level[t] != 0:
                summed += (j + 2) * level[t]
                total += j + 2
        out.append(summed / (total + 1e-6) if total else 0.0)
    return ragged_like(out, step)


def gae(rewards: PerTurn, values: Sequence[Sequence[float]], gamma: float, lam: float) -> PerTurn:
    found = []
    for turns, known in zip(rewards, values, strict=True):
        carry, after, out = 0.0, 0.0, []
        for reward, value in zip(reversed(turns), reversed(known), strict=True):
            carry = reward + gamma * after - value + gamma * lam * carry
            after = value
            out.append(carry)
        found.append(out[::-1])
    return found


def gagpo(step: Step) -> PerTurn:
    returns, seen = to_go(paid(step), 0.95), states(step)
    known = {key: mean_of(found) for key, found in by_key(flat(returns), flat(seen)).items()}
    values = [[known[key] for key in keys] for keys in seen]
    found = flat(gae(paid(step), values, 0.95, 0.95))
    return ragged_like(scores(found, [step.group[row] for row in range(len(found))], eps=1e-6), step)


def turn_ppo(step: Step, lam: float = 0.9) -> PerTurn:
    return gae(paid(step), column(step, "values"), 0.99, lam)


def step_ppo(step: Step) -> PerTurn:
    found = flat(turn_ppo(step, 1.0))
    return ragged_like(scores(found, [0] * len(found), eps=1e-8), step)


def vineppo(step: Step) -> PerTurn:
    return gae(paid(step), column(step, "values"), 1.0, 0.0)


def paths(step: Step) -> list[list[Hashable]]:
    """Each rollout's nodes, from its group's root on."""
    return [[("root", g), *nodes] for g, nodes in zip(groups(step), column(step, "node"), strict=True)]


def sibling_scores(values: PerTurn, step: Step) -> PerTurn:
    """Scores among the turns taken in one state, each of them once."""
    own: dict[Hashable, float] = {}
    parent: dict[Hashable, Hashable] = {}
    for path, turns in zip(paths(step), values, strict=True):
        for before, node, value in zip(path, path[1:], turns, strict=False):
            own[node], parent[node] = value, before
    found = dict(zip(own, scores(list(own.values()), [parent[node] for node in own]), strict=True))
    return [[found[node] for node in path[1:]] for path in paths(step)]


def mt_grpo_tree(step: Step) -> PerTurn:
    own = sibling_scores(totals(step), step)
    for turns, outcome in zip(own, scores(outcomes(step), groups(step)), strict=True):
        turns[-1] += outcome
    return to_go(own, 1.0)


def slate(step: Step) -> PerTurn:
    return sibling_scores(paid(step), step)


def treerl(step: Step) -> PerTurn:
    below: dict[Hashable, list[float]] = defaultdict(list)
    for path, value in zip(paths(step), merged(step), strict=True):
        for node in path:
            below[node].append(value)
    means = {node: mean_of(found) for node, found in below.items()}
    found = []
    for path in paths(step):
        root = means[path[0]]
        edges = pairwise(path)
        found.append([(2 * means[n] - root - means[before]) / len(below[n]) ** 0.5 for before, n in edges])
    return found


def carl(step: Step) -> PerTurn:
    children: dict[Hashable, dict[Hashable, None]] = defaultdict(dict)
    depth: dict[Hashable, int] = {}
    means: dict[Hashable, float] = {}
    for i, (path, value) in enumerate(zip(paths(step), merged(step), strict=True)):
        for k, node in enumerate(path):
            depth[node] = k
            children[node][path[k + 1] if k + 1 < len(path) else ("leaf", i)] = None
        means["leaf", i] = value
    for node in sorted(depth, key=depth.__getitem__, reverse=True):
        means[node] = mean_of([means[child] for child in children[node]])
    return [[means[n] - means[before] for before, n in pairwise(path)] for path in paths(step)]


def tree_grpo(step: Step) -> PerTurn:
    trees = [path[1] for path in paths(step)]
    within, across = scores(merged(step), trees), scores(merged(step), groups(step))
    return spread([a + b for a, b in zip(within, across, strict=True)], step)


LOOPS: dict[str, Callable[[Step], PerTurn]] = {
    "grpo-or": grpo_or,
    "grpo-mr": grpo_mr,
    "dr-grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_pp,
    "reinforce++-baseline": reinforce_pp_baseline,
    "gdpo": gdpo,
    "grpo-decoupled": grpo_decoupled,
    "mt-grpo": mt_grpo,
    "mt-grpo-repo": mt_grpo_repo,
    "turn-rloo": turn_rloo,
    "gtpo": gtpo,
    "matchtir": matchtir,
    "irc-hybrid": irc_hybrid,
    "gigpo": gigpo,
    "hgpo": hgpo,
    "hgpo-code": hgpo_code,
    "gagpo": gagpo,
    "turn-ppo": turn_ppo,
    "step-ppo": step_ppo,
    "mt-grpo-tree": mt_grpo_tree,
    "treerl": treerl,
    "carl": carl,
    "tree-grpo": tree_grpo,
    "slate": slate,
    "vineppo": vineppo,
}
"""Every estimator of turns at its defaults."""


# ---------------------------------------------------------------------------------- and per token


def tokens_of(step: Step, tokens_per_turn: int) -> TokenTable:
    """As many tokens in each turn, with a critic's values."""
    turn = np.repeat(np.arange(len(step.rollout)), tokens_per_turn)
    return TokenTable(turns=step, turn=turn, values=np.random.default_rng(1).normal(size=len(turn)))


def token_values(table: TokenTable) -> list[list[list[float]]]:
    """The values by rollout, turn and token."""
    assert table.values is not None
    found: list[list[list[float]]] = [[[] for _ in turns] for turns in rows(table.turns)]
    for at in range(len(table.turn)):
        row = table.turn[at]
        found[table.turns.rollout[row]][table.turns.index[row]].append(table.values[at])
    return found


def at_ends(rewards: PerTurn, values: list[list[list[float]]]) -> PerTurn:
    """Each turn's reward at its last token, per rollout."""
    found = []
    for turns, known in zip(rewards, values, strict=True):
        out: list[float] = []
        for reward, own in zip(turns, known, strict=True):
            out += [0.0] * (len(own) - 1) + [reward]
        found.append(out)
    return found


def late(step: Step, rewards: Sequence[float]) -> PerTurn:
    return [[0.0 for _ in turns[1:]] + [reward] for turns, reward in zip(rows(step), rewards, strict=True)]


def loop_tokens(name: str, table: TokenTable) -> list[float]:
    """The token advantages of each method at its defaults, flat."""
    step, values = table.turns, token_values(table)
    whole = [flat(known) for known in values]
    if name == "ppo-or":
        return flat(gae(at_ends(late(step, outcomes(step)), values), whole, 1.0, 1.0))
    if name in ("ppo-mr", "mt-ppo-paid-at-end"):
        return flat(gae(at_ends(late(step, merged(step)), values), whole, 1.0, 1.0))
    own = flat(gae(at_ends(paid(step), values), whole, 1.0, 1.0))
    if name == "mt-ppo":
        return own
    out: list[float] = []
    if name == "bi-level-gae":
        ends = [[turn[-1] for turn in known] for known in values]
        for turns, last, known in zip(gae(paid(step), ends, 0.95, 1.0), ends, values, strict=True):
            for advantage, end, tokens in zip(turns, last, known, strict=True):
                out += gae([[0.0] * (len(tokens) - 1) + [advantage + end]], [tokens], 1.0, 1.0)[0]
        return out
    rest = iter(own)
    for turns, known in zip(gae(paid(step), column(step, "values"), 0.95, 0.95), values, strict=True):
        for advantage, tokens in zip(turns, known, strict=True):
            mine = [next(rest) for _ in tokens]
            mean = mean_of(mine)
            out += [advantage + (a - mean) for a in mine]
    return out


# ------------------------------------------------------------------------------------ measuring


def seconds(work: Callable[[Any], object], table: Any, rounds: int) -> float:
    """The least of some rounds, each with a fresh table."""
    found = []
    for _ in range(rounds):
        given = fresh(table)
        start = time.process_time()
        work(given)
        found.append(time.process_time() - start)
    return min(found)


def fresh(table: Any) -> Any:
    """The same table, with nothing computed on it yet."""
    return replace(table, turns=fresh(table.turns)) if isinstance(table, TokenTable) else replace(table)


def peak(work: Callable[[Any], object], table: Any) -> int:
    """Bytes that a call holds at most, beside what was there."""
    given = fresh(table)
    gc.collect()
    tracemalloc.start()
    work(given)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def compare_turns(rollouts: int, rounds: int) -> None:
    table, half = make_table(rollouts), make_table(rollouts // 2)
    turns = len(table.rollout)
    least = seconds(lambda t: [np.cumsum(rewards) for rewards in t.turn_rewards.values()], table, rounds)
    print(f"{rollouts} rollouts x {TURNS} turns; numpy.cumsum over both turn rewards: {least * 1e3:.2f} ms")
    print(f"{'':22} {'ms':>8} {'loops, ms':>10} {'x loops':>8} {'cumsums':>8} {'keys':>5} {'bytes/turn':>11}  growth")
    for name, estimate in ESTIMATORS.items():
        loop = LOOPS[name]
        check(name, estimate(table).advantages, flat(loop(table)))
        own, loops = seconds(estimate, table, rounds), seconds(loop, table, 2)
        memory = [peak(estimate, each) for each in (half, table)]
        print(
            f"{name:22} {own * 1e3:8.2f} {loops * 1e3:10.1f} {loops / own:8.0f} {own / least:8.1f} "
            f"{'yes' if name in BY_KEY else '':>5} {memory[1] / turns:11.0f} {memory[1] / memory[0]:7.2f}",
            flush=True,
        )


def compare_tokens(rollouts: int, rounds: int) -> None:
    step = make_table(rollouts)
    few = tokens_of(make_table(max(GROUP_SIZE, rollouts // 64)), TOKENS_PER_TURN)
    half, whole = tokens_of(make_table(rollouts // 2), TOKENS_PER_TURN), tokens_of(step, TOKENS_PER_TURN)
    least = seconds(lambda t: np.cumsum(t.values), whole, rounds)
    tokens = len(whole.turn)
    print(f"\n{tokens:,} tokens; numpy.cumsum over the values: {least * 1e3:.0f} ms; loops over {len(few.turn):,}")
    print(f"{'':22} {'ms':>8} {'loops, us/token':>16} {'x loops':>8} {'cumsums':>8} {'bytes/token':>12} {'growth':>7}")
    for name, estimate in TOKEN_ESTIMATORS.items():
        loop = partial(loop_tokens, name)
        check(name, estimate(few).advantages, loop(few))
        own, loops = seconds(estimate, whole, max(1, rounds // 5)), seconds(loop, few, 1) / len(few.turn)
        memory = [peak(estimate, each) for each in (half, whole)]
        print(
            f"{name:22} {own * 1e3:8.0f} {loops * 1e6:16.2f} {loops * tokens / own:8.0f} {own / least:8.1f} "
            f"{memory[1] / tokens:12.0f} {memory[1] / memory[0]:7.2f}",
            flush=True,
        )


def check(name: str, found: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=name)


IMPORT = """
import sys, time
import numpy
before, start = set(sys.modules), time.process_time()
import turnwise.credit
took = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(took, " ".join(sorted(new)))
"""


def compare_import(rounds: int) -> None:
    found = []
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, env=os.environ
        )
        took, *names = done.stdout.split()
        found.append((float(took), names))
    took, names = min(found)
    print(f"\nimport turnwise.credit: {took:.3f} s beside numpy's own; it loads {', '.join(names)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    np.ones(3_000_000)  # freed at once: from now on the process keeps memory, as one that has worked before does
    compare_turns(options.rollouts, options.rounds)
    compare_tokens(options.rollouts, options.rounds)
    compare_import(options.rounds)


if __name__ == "__main__":
    main()
