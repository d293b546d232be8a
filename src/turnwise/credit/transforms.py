"""What turn rewards are made of: potentials, information gain, and controls that take the content out of them.

A function here gives one column, which `with_turn_reward` puts into the table, or the whole table changed. What is
measured in states is given as critics' values are: `before` each turn, and `end` for the state after a rollout's last.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from turnwise.credit.parts import Credit, check_number, check_unit, require, turn_index_keys
from turnwise.credit.table import LARGEST, Rollouts, TurnKeys, Turns, TurnTable

States = Float[np.ndarray, "S"]
HIGHEST = 200.0
"""Logarithms above this are of no probability, however it was rounded."""
Aliases = Float[np.ndarray, "S A"]


def after_turns(before: Turns, end: Rollouts, table: TurnTable) -> Turns:
    """What holds in the state after each turn: in the next turn's state, and `end` after the last."""
    after = np.roll(before.astype(float), -1)
    after[table.last] = end
    return after


def with_turn_reward(table: TurnTable, name: str, column: Turns) -> TurnTable:
    """The table with one more turn reward; NaN is absent."""
    require(name, column, len(table.rollout), absent=True)
    if name in table.turn_rewards:
        raise ValueError(f"turn reward {name!r} must be new; the table has it; give another name")
    return replace(table, turn_rewards={**table.turn_rewards, name: column.astype(float)})


def potential_shaping(before: Turns, table: TurnTable, *, end: Rollouts | None = None, gamma: float = 1.0) -> Turns:
    """Each turn's gain in potential.

        Fₖ = γ Φ(sₖ₊₁) − Φ(sₖ),    so that Σₖ γ^(k−1) Fₖ = γ^K Φ(end) − Φ(s₁)

    Ng, Harada and Russell 1999. `before` is Φ(sₖ). `end` is the potential of the state in which a rollout was cut off,
    and must be 0 where it ended itself; None: all ended themselves. With that the expected policy gradient is the one
    without shaping. `gamma` must be the discount of the return.
    """
    check_unit(gamma=gamma)
    end = np.zeros(table.num_rollouts) if end is None else end
    before = require("before", before, len(table.rollout))
    end = require("end", end, table.num_rollouts, what="rollout")
    return gamma * after_turns(before, end, table) - before


def information_gain(before: Turns, table: TurnTable, *, end: Rollouts | None = None) -> Turns:
    """How much each turn raised the log-probability of the right answer.

        rₖ = s(sₖ₊₁) − s(sₖ)   with s the mean log-probability of the right answer's tokens

    Wang et al. 2025, arXiv 2510.14967 (IGPO). `before` is s(sₖ). The last turn answers: it has no reward (absent)
    unless `end` gives the state after it; NaN there is absent too. Everything that is paid sums to last s − first s.
    """
    end = np.full(table.num_rollouts, np.nan) if end is None else end
    before = require("before", before, len(table.rollout))
    end = require("end", end, table.num_rollouts, what="rollout", absent=True)
    return after_turns(before, end, table) - before


def probability_gain(before: Turns, table: TurnTable, *, end: Rollouts | None = None) -> Turns:
    """How much each turn raised the probability of the right answer, per token of it.

        rₖ = exp s(sₖ₊₁) − exp s(sₖ)   with s as in `information_gain`

    A variant of arXiv 2510.14967 that public code offers. It hardly pays for what is unlikely before and after, where
    `information_gain` pays most.
    """
    columns = {"before": require("before", before, len(table.rollout))}
    if end is not None:
        columns["end"] = require("end", end, table.num_rollouts, what="rollout", absent=True)
    for name, column in columns.items():
        large = column > HIGHEST
        if large.any():
            row = int(large.argmax())
            raise ValueError(
                f"{name} must be log-probabilities, below {HIGHEST:g}; row {row} has {column[row]}; mend it"
            )
    return information_gain(np.exp(columns["before"]), table, end=np.exp(columns["end"]) if "end" in columns else None)


def alias_potential(logprobs: Aliases) -> States:
    """The log-probability that any of several spellings of the answer is given, one row per state.

        Φ = log Σ_a exp(log p(a))

    arXiv 2603.22293 (TIPS). −inf stands for a spelling that an answer does not have; a state needs one at least.
    """
    best = logprobs.max(axis=1)
    broken = ~np.isfinite(best)
    if broken.any():
        row = int(broken.argmax())
        raise ValueError(f"each state must have a finite log-probability; state {row} has {logprobs[row]}; mend it")
    return np.logaddexp.reduce(logprobs, axis=1)


def tips(before: Turns, table: TurnTable, *, end: Rollouts | None = None, scale: float = 0.02) -> Turns:
    """A small reward for each turn's gain in information.

        rₖ = scale · (Φ(sₖ₊₁) − Φ(sₖ))   paid when the tool has answered

    Xie et al. 2026, arXiv 2603.22293 (TIPS). `before` is Φ(sₖ), which `alias_potential` makes. As in
    `information_gain`, the turn that answers is not paid. `potential_shaping` also takes the last Φ back; only that
    leaves the policy gradient as it was.
    """
    check_number("scale", scale, 0.0)
    return scale * information_gain(before, table, end=end)


def shuffle_in_rollouts(table: TurnTable, rng: np.random.Generator) -> TurnTable:
    """The table with each rollout's turn rewards dealt out anew among its turns: a placebo.

    Turns without a turn reward stay without, all components of a turn move together, and every rollout keeps its sum.
    A rollout with one such turn stays as it is.
    """
    return _shuffled(table, table.rollout, rng)


def shuffle_across_rollouts(table: TurnTable, rng: np.random.Generator) -> TurnTable:
    """The table with the turn rewards at each turn index dealt out anew among the rollouts of the group: a placebo.

    Turns without a turn reward stay without, and all components of a turn move together. Each turn index keeps its
    rewards, and so its mean and variance; the rewards no longer tell what the turn did.
    """
    return _shuffled(table, turn_index_keys(table), rng)


def pay_at_the_end(table: TurnTable) -> TurnTable:
    """The table with every turn reward moved to its rollout's outcome: the same content, another place.

        Rᴼᵢ ← Rᴼᵢ + Σₖ rᵢₖ,    rᵢₖ absent

    Component by component, under the same names; undiscounted. A component is absent from the outcome where no turn of
    the rollout has it, nor the outcome.
    """
    outcome = dict(table.outcome_rewards)
    for name, column in table.turn_rewards.items():
        paid = ~np.isnan(column)
        total = np.bincount(table.rollout[paid], weights=column[paid], minlength=table.num_rollouts)
        own = outcome.get(name, np.full(table.num_rollouts, np.nan))
        none = np.isnan(own) & (np.bincount(table.rollout[paid], minlength=table.num_rollouts) == 0)
        outcome[name] = np.where(none, np.nan, np.nan_to_num(own, nan=0.0) + total)
    return replace(table, turn_rewards={}, outcome_rewards=outcome)


def calibrated_rewards(
    table: TurnTable,
    success: Rollouts,
    estimate: Callable[[TurnTable], Credit],
    *,
    alpha: float,
    delta: float,
    rounds: int,
) -> TurnTable:
    """The table with each kind of turn paid by how well it tells successful rollouts from others.

        ρ_c = correlation over all turns of [the turn has reward c] with its rollout's success (point-biserial)
        r_c = α ρ_c   where |ρ_c| > δ,   0 elsewhere

    then, for `rounds` times or until nothing changes: a reward whose turns have a mean advantage of the sign opposite
    to it, under `estimate`, becomes 0. Iterative reward calibration, arXiv 2604.02869, with `irc_hybrid` as `estimate`.
    The two lines are the paper's, and so is the aim that every mean advantage has its reward's sign. Ours, since we
    could not read them with certainty: that a kind of turn is one component of the turn rewards, whatever it paid; that
    ρ is over turns; and what a round does. The paper's constants are not known, so none has a default. `success` is
    0 or 1 for each rollout.
    """
    success = require("success", success, table.num_rollouts, what="rollout")
    wrong = np.flatnonzero((success != 0) & (success != 1))
    if len(wrong):
        raise ValueError(f"success must be 0 or 1; rollout {wrong[0]} has {success[wrong[0]]}; decide")
    check_unit(delta=delta)
    check_number("rounds", rounds, 0, whole=True)
    check_number("alpha", alpha, -LARGEST)
    has = {name: ~np.isnan(column) for name, column in table.turn_rewards.items()}
    paid = {name: _correlation(turns.astype(float), success[table.rollout]) for name, turns in has.items()}
    paid = {name: alpha * rho if abs(rho) > delta else 0.0 for name, rho in paid.items()}

    def made() -> TurnTable:
        return replace(table, turn_rewards={name: np.where(has[name], paid[name], np.nan) for name in has})

    for _ in range(rounds):
        found = estimate(made()).advantages
        opposite = [name for name in has if has[name].any() and paid[name] * found[has[name]].mean() < 0]
        if not opposite:
            break
        paid.update(dict.fromkeys(opposite, 0.0))
    return made()


def _correlation(first: Turns, second: Turns) -> float:
    """Pearson's; 0 where either is the same everywhere."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _shuffled(table: TurnTable, keys: TurnKeys, rng: np.random.Generator) -> TurnTable:
    """Turns with a turn reward swap theirs with turns of the same key."""
    columns = table.turn_rewards
    paid = np.flatnonzero(np.any([~np.isnan(column) for column in columns.values()], axis=0)) if columns else []
    moved = {name: column.copy() for name, column in columns.items()}
    if len(paid):
        to = paid[np.argsort(keys[paid], kind="stable")]
        source = paid[np.lexsort((rng.random(len(paid)), keys[paid]))]
        for name, column in columns.items():
            moved[name][to] = column[source]
    return replace(table, turn_rewards=moved)
