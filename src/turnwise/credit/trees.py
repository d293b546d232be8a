"""Credit where rollouts branch: turns taken in one state are compared with each other.

A table with the column `node` holds trees. States are numbered: first one per group, where its rollouts begin, then
one per node, to which its turn leads. A leaf is a rollout's end; a rollout that ends where others go on is a leaf
there. Rollouts that share a turn each have a row for it: `share_weights` counts it once.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from turnwise.credit.parts import (
    Credit,
    Stream,
    check_scale,
    check_unit,
    group_mean,
    numbered,
    on_turns,
    require,
    reward_to_go,
    varied,
    z_stream,
)
from turnwise.credit.table import Rollouts, TurnKeys, Turns, TurnTable
from turnwise.credit.trajectory import Merging, rollout_rewards
from turnwise.credit.transforms import after_turns

Once = Int[np.ndarray, "M"]
"""A row for each turn that is counted once."""


@dataclass(frozen=True, kw_only=True)
class TreeValues:
    """Values of states, at each turn."""

    before: Turns
    """Of the state the turn was taken in."""
    after: Turns
    """Of the state it led to."""
    root: Turns
    """Of the state its group began in."""


def states(table: TurnTable) -> tuple[TurnKeys, TurnKeys]:
    """The numbers of the states before and after each turn; turns with equal numbers before are siblings."""
    table.need("node")
    assert table.node is not None
    group, groups = numbered(table.rollout_group)
    after = groups + numbered(table.node)[0]
    before = np.roll(after, 1)
    before[table.first] = group
    return before, after


def leaf_counts(table: TurnTable) -> TurnKeys:
    """How many rollouts share each turn, which is how many leaves lie below it."""
    _, after = states(table)
    return np.bincount(after)[after]


def share_weights(table: TurnTable) -> Turns:
    """Weights under which every turn counts once, however many rollouts share it.

    w = 1 / number of rollouts that share the turn,    so that Σ w = number of nodes
    """
    return 1.0 / leaf_counts(table)


def leaf_weights(table: TurnTable) -> Rollouts:
    """What each leaf counts for among those of its group: the share of the draws that led to it; they sum to 1.

        w = product over the leaf's turns k of 1 / draws in the state before turn k,  times 1 / draws in its last state
        draws in a state = number of turns taken in it + number of rollouts that end in it

    Under these weights a sum over leaves of what their turns give is an unbiased estimate of its expectation under the
    policy, also where some turns end a rollout and others branch on: a turn drawn as one of c counts 1/c however many
    leaves lie below it. An ending is a draw of its own: it counts beside turns that others took from there, and beside
    other endings. The plain mean over leaves leans towards turns below which more was drawn.
    """
    before, after = states(table)
    different = np.unique(np.stack([before, after]), axis=1)
    states_known = int(after.max()) + 1
    end = after[table.last]
    drawn = np.bincount(different[0], minlength=states_known) + np.bincount(end, minlength=states_known)
    weights = 1.0 / drawn[end]
    np.multiply.at(weights, table.rollout, 1.0 / drawn[before])
    return weights


def leaf_mean_values(table: TurnTable, returns: Rollouts) -> TreeValues:
    """The value of a state as the mean return of all rollouts that pass it.

    V(n) = mean of Rᵢ over the leaves below n
    """
    returns = require("returns", returns, table.num_rollouts, what="rollout")
    before, after = states(table)
    values = np.zeros(after.max() + 1)
    values[after] = _mean(np.repeat(returns, table.lengths), after)
    start = before[table.first]
    values[start] = _mean(returns, start)
    return TreeValues(before=values[before], after=values[after], root=np.repeat(values[start], table.lengths))


def child_mean_values(table: TurnTable, returns: Rollouts) -> TreeValues:
    """The value of a state as the plain mean over its children, however many leaves lie below each.

    V(leaf) = Rᵢ,    V(n) = mean of V over the children of n
    """
    returns = require("returns", returns, table.num_rollouts, what="rollout")
    before, after = states(table)
    once, leaves = _once(_first(after)), int(after.max()) + 1 + np.arange(table.num_rollouts)  # the ends of rollouts
    children = np.concatenate([after[once], leaves])
    parents = np.concatenate([before[once], after[table.last]])
    depth = np.concatenate([table.index[once], table.lengths])
    counts, values = np.bincount(parents), np.zeros(leaves[-1] + 1)
    sums, low, high = np.zeros(len(counts)), np.full(len(counts), np.inf), np.full(len(counts), -np.inf)
    values[leaves] = returns
    order = np.argsort((depth.max() - depth).astype(np.min_scalar_type(depth.max())), kind="stable")
    for level in np.split(order, np.flatnonzero(np.diff(depth[order])) + 1):  # the deepest first
        above, below = parents[level], values[children[level]]
        values[above] = below  # right where a state has one child
        several = counts[above] > 1
        if several.any():
            above, below = above[several], below[several]
            for gather, into in ((np.add, sums), (np.minimum, low), (np.maximum, high)):
                gather.at(into, above, below)
            values[above] = np.clip(sums[above] / counts[above], low[above], high[above])  # exact where all are equal
    root = np.repeat(values[before[table.first]], table.lengths)
    return TreeValues(before=values[before], after=values[after], root=root)


def sibling_stream(
    values: Turns, table: TurnTable, *, ddof: int = 1, eps: float = 1e-4, what: str = "reward"
) -> Stream:
    """What each turn has, as a z-score among its siblings; a shared turn counts once, a turn without siblings gets 0.

    Raises ValueError where rollouts that share a turn do not agree in its value; `what` says there what the values are.
    """
    check_scale(ddof=ddof, eps=eps)
    before, after = states(table)
    first = _first(after)
    odd = values != values[first]
    if odd.any():
        row, other = int(odd.argmax()), int(first[odd.argmax()])
        raise ValueError(
            f"rollouts that share a turn must agree in its {what}; rows {other} and {row} share one and have "
            f"{values[other]} and {values[row]}; give them one reward or two nodes"
        )
    once = _once(first)
    siblings = once[(np.bincount(before[once]) > 1)[before[once]]]
    baseline, advantage = values.copy(), np.zeros(len(values))
    if len(siblings):
        found = z_stream(values[siblings], before[siblings], ddof=ddof, eps=eps)
        baseline[siblings], advantage[siblings] = found.baseline, found.advantage
    return Stream(value=values, baseline=baseline[first], advantage=advantage[first])


def mt_grpo_tree(table: TurnTable, *, alpha: float = 1.0, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """MT-GRPO as its paper prints it: a turn's own reward is compared with those of turns taken in the same state.

        Aᴵₙ  = z-score of rₙ over the turns taken in the state of n, each once
        Aᴼᵢ  = z-score of Rᴼᵢ over all leaves of the group
        Aᵢₖ  = Aᴵᵢₖ + α Aᵢ,ₖ₊₁,    Aᵢ,Kᵢ = Aᴵᵢ,Kᵢ + Aᴼᵢ

    Zeng et al. 2025, arXiv 2505.11821, appendix D. A turn that answers where siblings search counts with reward 0, as
    in `mt_grpo`; where last turns have no turn reward, their Aᴵ is 0 and the printed form remains. A shared turn has
    one Aᴵ, but another advantage in each rollout, whose later turns and outcome differ.
    """
    check_unit(alpha=alpha)
    own = sibling_stream(table.turn_reward(), table, ddof=ddof, eps=eps)
    last = z_stream(table.outcome_reward(), table.rollout_group, ddof=ddof, eps=eps)
    return Credit(
        advantages=reward_to_go(own.advantage, last.advantage, table, discount=alpha),
        streams={"turn": own, "outcome": on_turns(last, table)},
    )


def treerl(table: TurnTable, *, rewards: Merging = "merged") -> Credit:
    """TreeRL: a turn is compared with the state it was taken in and with the root.

        Aₙ = ((V(n) − V(root)) + (V(n) − V(parent of n))) / √(leaves below n)   with V the mean over leaves

    Hou et al. 2025, arXiv 2506.11902. `rewards` says what a leaf returns: all rewards on the way or the outcome alone.
    """
    values = leaf_mean_values(table, rollout_rewards(table, rewards))
    scale = 1 / np.sqrt(leaf_counts(table))
    streams = {
        "root": Stream(value=values.after, baseline=values.root, advantage=scale * (values.after - values.root)),
        "edge": Stream(value=values.after, baseline=values.before, advantage=scale * (values.after - values.before)),
    }
    return Credit(advantages=streams["root"].advantage + streams["edge"].advantage, streams=streams)


def carl_edges(table: TurnTable, *, rewards: Merging = "merged") -> Credit:
    """CARL: a turn is credited with the value it added.

        Aₙ = V(n) − V(parent of n)   with V the plain mean over children

    Shen et al. 2025, arXiv 2512.04949. Exactly 0 where a state has one child; all children of a state sum to 0; along a
    rollout the advantages sum to its return minus the root's value, where no other rollout ends in the same node.
    """
    values = child_mean_values(table, rollout_rewards(table, rewards))
    edge = Stream(value=values.after, baseline=values.before, advantage=values.after - values.before)
    return Credit(advantages=edge.advantage, streams={"edge": edge})


def tree_grpo(table: TurnTable, *, rewards: Merging = "merged", ddof: int = 1, eps: float = 1e-4) -> Credit:
    """Tree-GRPO: a leaf is compared with the leaves of its tree and with all leaves of the group.

        Aᵢ = z-score of Rᵢ over the leaves of its tree + z-score of Rᵢ over all leaves of the group

    Ji et al. 2025, arXiv 2509.21240; one advantage for all turns of a rollout. Rollouts with the same first turn are
    one tree. A tree of one leaf adds 0.
    """
    found = rollout_rewards(table, rewards)
    _, after = states(table)
    keys = {"tree": after[table.first], "group": table.rollout_group}
    streams = {name: on_turns(z_stream(found, key, ddof=ddof, eps=eps), table) for name, key in keys.items()}
    return Credit(advantages=streams["tree"].advantage + streams["group"].advantage, streams=streams)


def slate(table: TurnTable, *, ddof: int = 1, eps: float = 1e-4) -> Credit:
    """SLATE: a turn is credited with its own score alone, compared with other turns taken in the same state.

        Aₙ = z-score of rₙ over the turns taken in the state of n, each once

    arXiv 2602.23440. The score is the turn's reward, with the outcome in a rollout's last turn. Continuations that were
    scored and not followed are rollouts that end there. ddof and eps are ours.
    """
    what = "reward, to which the outcome is added in a rollout's last turn"
    siblings = sibling_stream(table.reward(), table, ddof=ddof, eps=eps, what=what)
    return Credit(advantages=siblings.advantage, streams={"siblings": siblings})


def vineppo(table: TurnTable, *, gamma: float = 1.0) -> Credit:
    """VinePPO: a turn is credited with its reward and the value it added, values from fresh rollouts.

        Aₖ = rₖ + γ V(sₖ₊₁) − V(sₖ),    V(end) = 0, or `bootstrap` where the rollout was cut off

    Kazemnejad et al. 2024, arXiv 2410.01679. The column `values` has V(sₖ): the mean return of fresh rollouts from the
    state before the turn. r of the last turn includes the outcome.
    """
    check_unit(gamma=gamma)
    table.need("values")
    assert table.values is not None
    end = np.zeros(table.num_rollouts) if table.bootstrap is None else table.bootstrap
    target = table.reward() + gamma * after_turns(table.values, end, table)
    step = Stream(value=target, baseline=table.values, advantage=target - table.values)
    return Credit(advantages=step.advantage, streams={"step": step})


def _mean(values: Turns, keys: TurnKeys) -> Turns:
    """The mean over all entries with the same key, at each; exactly the value where all are equal."""
    return np.where(varied(values, keys), group_mean(values, keys), values)


def _first(after: TurnKeys) -> TurnKeys:
    """At each row, the first row that leads to the same state."""
    first = np.zeros(after.max() + 1, dtype=np.int64)
    first[after[::-1]] = np.arange(len(after))[::-1]  # of rows with the same state the last to be written stays
    return first[after]


def _once(first: TurnKeys) -> Once:
    """The rows that are the first to lead to their state."""
    return np.flatnonzero(first == np.arange(len(first)))
