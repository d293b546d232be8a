"""Generalised advantage estimation with a critic: over tokens, over turns, and over both.

Time steps are what the policy did. Tokens that it did not write are no steps: they get advantage 0, need no value,
and credit passes through them undiscounted. A rollout that was cut off goes on with `bootstrap`, the value of the
state in which it was cut. `gamma` and `lam` are per token where there are tokens alone; where both levels meet, they
are per turn, and those per token say so.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from turnwise.credit.parts import (
    Credit,
    Steps,
    Stream,
    check_number,
    check_unit,
    group_mean,
    require,
    require_length,
    sums_to_go,
    whiten,
)
from turnwise.credit.table import Rollouts, Tokens, TokenTable, TurnTable
from turnwise.credit.trajectory import rollout_rewards

StepKeys = Int[np.ndarray, "S"]
Sequences = Float[np.ndarray, "Q"]
Placement = Literal["outcome", "merged", "turns"]


@dataclass(frozen=True, kw_only=True)
class TokenCredit:
    """Token advantages and value targets, rows as in the table; 0 at tokens that the policy did not write."""

    advantages: Tokens
    returns: Tokens
    """What the critic's token values are to learn: value plus token advantage."""


def token_rewards(table: TokenTable, placement: Placement) -> Tokens:
    """The reward that each token is paid.

    outcome    Rᴼ at the rollout's last sampled token
    merged     Σₖ rₖ + Rᴼ at the rollout's last sampled token
    turns      rₖ at the last sampled token of turn k, Rᴼ at that of the last turn
    """
    turns, rewards = table.turns, np.zeros(len(table.turn))
    match placement:
        case "outcome" | "merged":
            rewards[table.last[turns.last]] = rollout_rewards(turns, placement)
        case "turns":
            rewards[table.last] = turns.reward()
        case _:
            raise ValueError(f"placement must be a known name; got {placement!r}; take one of {Placement.__args__}")
    return rewards


def sampled_token_rewards(table: TokenTable, rewards: Tokens) -> Tokens:
    """The same rewards, with those that lie on tokens which the policy did not write moved to the sampled token before.

    None is dropped: what lies before the first sampled token of the table goes to that one.
    """
    rewards = require("rewards", rewards, len(table.turn), what="token")
    written = table.written
    before = np.cumsum(table.turn >= 0) - 1
    return np.bincount(written[np.maximum(before, 0)], weights=rewards, minlength=len(table.turn))


def gae(rewards: Steps, values: Steps, sequence: StepKeys, bootstrap: Sequences, *, gamma: float, lam: float) -> Steps:
    """Generalised advantage estimates of steps that follow each other within sequences.

        δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ),    Aₜ = δₜ + γλ Aₜ₊₁

    Schulman et al. 2016, arXiv 1506.02438. `sequence` numbers each step's sequence, 0, 1, ... in order; `bootstrap` is
    the value after each sequence's last step, where A is 0. Raises ValueError for columns of
    other lengths, and for what is not finite.
    """
    require_length("sequence", sequence, len(rewards), what="step")
    rewards = require("rewards", rewards, len(rewards), what="step")
    values = require("values", values, len(rewards), what="step")
    bootstrap = require("bootstrap", bootstrap, 1 + int((sequence[1:] != sequence[:-1]).sum()), what="sequence")
    return _gae(rewards, values, sequence, bootstrap, gamma=gamma, lam=lam)


def _gae(rewards: Steps, values: Steps, sequence: StepKeys, bootstrap: Sequences, *, gamma: float, lam: float) -> Steps:
    """`gae` of columns from tables, which have been checked."""
    check_unit(gamma=gamma, lam=lam)
    ends = np.append(np.flatnonzero(sequence[1:] != sequence[:-1]), len(sequence) - 1)
    after = np.empty(len(values))
    after[:-1] = values[1:]
    after[ends] = bootstrap
    return sums_to_go(rewards + gamma * after - values, np.diff(ends, prepend=-1), gamma * lam)


def token_gae(table: TokenTable, rewards: Tokens, *, gamma: float, lam: float) -> TokenCredit:
    """GAE over the tokens that the policy wrote, with the token table's values.

        δₜ = rₜ + γ Vₜ₊₁ − Vₜ,    Aₜ = δₜ + γλ Aₜ₊₁,    target = Aₜ + Vₜ

    t + 1 is the next sampled token of the rollout, whatever lies between; after the last, V is the rollout's
    `bootstrap`. A reward on a token that the policy did not write counts for the sampled token before it. Values of
    zero and λ = 1 give the discounted reward-to-go, which REINFORCE++ (arXiv 2501.03262) whitens.
    Schulman et al. 2016, arXiv 1506.02438. `gamma` discounts per token.
    """
    return _token_gae(table, sampled_token_rewards(table, rewards), gamma=gamma, lam=lam)


def _token_gae(table: TokenTable, paid: Tokens, *, gamma: float, lam: float) -> TokenCredit:
    """`token_gae` with rewards at tokens that the policy wrote."""
    written, values = table.written, _token_values(table)[table.written]
    rollout = table.turns.rollout[table.turn[written]]
    found = _gae(paid[written], values, rollout, _bootstrap(table.turns), gamma=gamma, lam=lam)
    return _token_credit(table, found, found + values)


def ppo_or(table: TokenTable, *, gamma: float = 1.0, lam: float = 1.0) -> TokenCredit:
    """Token GAE on the outcome reward alone, paid at the rollout's last sampled token.

        rₜ = Rᴼ at the rollout's last sampled token,  0 elsewhere

    "PPO-OR" of arXiv 2505.11821.
    """
    return _token_gae(table, token_rewards(table, "outcome"), gamma=gamma, lam=lam)


def ppo_mr(table: TokenTable, *, gamma: float = 1.0, lam: float = 1.0) -> TokenCredit:
    """Token GAE on turn rewards and outcome in one sum, paid at the rollout's last sampled token.

        rₜ = Σₖ rₖ + Rᴼ at the rollout's last sampled token,  0 elsewhere

    "PPO-MR" of arXiv 2505.11821.
    """
    return _token_gae(table, token_rewards(table, "merged"), gamma=gamma, lam=lam)


def mt_ppo(table: TokenTable, *, gamma: float = 1.0, lam: float = 1.0) -> TokenCredit:
    """Token GAE with each turn's reward paid at the turn's last sampled token.

        rₜ = rₖ at the last sampled token of turn k,  plus Rᴼ at that of the last turn,  0 elsewhere

    "MT-PPO" of Zeng et al. 2025, arXiv 2505.11821.
    """
    return _token_gae(table, token_rewards(table, "turns"), gamma=gamma, lam=lam)


def mt_ppo_paid_at_end(table: TokenTable, *, gamma: float = 1.0, lam: float = 1.0) -> TokenCredit:
    """The control for MT-PPO: what it pays, but all of it at the rollout's last sampled token.

        rₜ = Σₖ rₖ + Rᴼ at the rollout's last sampled token,  0 elsewhere

    On one table this is `ppo_mr`. The paper's PPO-MR pays other rewards than its MT-PPO, so that two things change at
    once; this name stands for MT-PPO's own rewards, so that placement alone changes. With γ = λ = 1 and exact critics
    the two placements give equal advantages.
    """
    return ppo_mr(table, gamma=gamma, lam=lam)


def whiten_tokens(table: TokenTable, advantages: Tokens, *, eps: float = 1e-8) -> Tokens:
    """Advantages whitened over the sampled tokens of the step; exactly 0 elsewhere.

        (A − mean) / (std + eps)   over sampled tokens, all rollouts together

    What PPO trainers do to token advantages, and REINFORCE++ (arXiv 2501.03262) to the reward-to-go.
    """
    require_length("advantages", advantages, len(table.turn), what="token")
    written = table.written
    return _on_tokens(table, whiten(require("advantages", advantages[written], len(written), what="token"), eps=eps))


def turn_ppo(table: TurnTable, *, gamma: float = 0.99, lam: float = 0.9) -> Credit:
    """GAE over turns, with the turn table's values.

        δₖ = rₖ + γ Vₖ₊₁ − Vₖ,    Aₖ = δₖ + γλ Aₖ₊₁      r of the last turn includes Rᴼ

    Turn-PPO, Li et al. 2025, arXiv 2512.17008. The value targets Aₖ + Vₖ are the stream's `value`. `gamma` discounts
    per turn.
    """
    table.need("values")
    assert table.values is not None
    values = table.values
    found = _gae(table.reward(), values, table.rollout, _bootstrap(table), gamma=gamma, lam=lam)
    return Credit(advantages=found, streams={"turn": Stream(value=found + values, baseline=values, advantage=found)})


def step_ppo(table: TurnTable, *, gamma: float = 0.99, lam: float = 1.0, eps: float = 1e-8) -> Credit:
    """GAE over turns, whitened over all turns of the step.

        Âₖ = (Aₖ − mean A) / (std A + eps)   with A of `turn_ppo`

    StepPO, Wang et al. 2026, arXiv 2604.18401; the defaults are those of its code on HotpotQA. The stream holds A
    before it is whitened.
    """
    found = turn_ppo(table, gamma=gamma, lam=lam)
    return replace(found, advantages=whiten(found.advantages, eps=eps))


def bi_level_gae(
    table: TokenTable, *, gamma: float = 0.95, lam: float = 1.0, token_gamma: float = 1.0, token_lam: float = 1.0
) -> TokenCredit:
    """GAE over turns first; then over the tokens of each turn, which is paid its turn's return at its end.

        δₖ = rₖ + γ Vₖ₊₁ − Vₖ,    Aₖ = δₖ + γλ Aₖ₊₁      Vₖ: the value at turn k's last sampled token
        within turn k:   r = Aₖ + Vₖ at its last sampled token, 0 before;   V = 0 after it;   GAE with γ′ and λ′

    Bi-level GAE of RAGEN, arXiv 2504.20073, and VAGEN, arXiv 2510.16907, as their code has it: the last token of a
    turn gets Aₖ itself. Their code tells turns by rewards that are not 0; here a turn without reward is a turn.
    `gamma` and `lam` are per turn, `token_gamma` and `token_lam` (γ′, λ′) per token.
    """
    check_unit(gamma=gamma, lam=lam, token_gamma=token_gamma, token_lam=token_lam)
    turns, written, values = table.turns, table.written, _token_values(table)
    at_end = values[table.last]
    turn = _gae(turns.reward(), at_end, turns.rollout, _bootstrap(turns), gamma=gamma, lam=lam)
    paid = np.zeros(len(table.turn))
    paid[table.last] = turn + at_end
    nothing = np.zeros(len(turns.rollout))
    found = _gae(paid[written], values[written], table.turn[written], nothing, gamma=token_gamma, lam=token_lam)
    return _token_credit(table, found, found + values[written])


def vetta(
    table: TokenTable,
    *,
    alpha: float = 1.0,
    gamma: float = 0.95,
    lam: float = 0.95,
    token_gamma: float = 1.0,
    token_lam: float = 1.0,
) -> TokenCredit:
    """The turn's advantage, and around it each token's own, centred within the turn.

        Aₖⱼ = Aₖ + α (aₖⱼ − mean over j of aₖⱼ)      A of `turn_ppo`, a of `mt_ppo`

    VETTA, Chen et al. 2026 (`Jiaju-Chen/VETTA-official`), equations 4 to 6; α is 1 on ALFWorld and 3 on WebShop.
    It needs values in both tables. `gamma` and `lam` are per turn, `token_gamma` and `token_lam` per token. The
    returns are targets of the token values; those of the turn values are the stream's `value` of `turn_ppo`.
    """
    check_unit(gamma=gamma, lam=lam, token_gamma=token_gamma, token_lam=token_lam)
    check_number("alpha", alpha, 0.0)
    turn = turn_ppo(table.turns, gamma=gamma, lam=lam)
    token = mt_ppo(table, gamma=token_gamma, lam=token_lam)
    written = table.written
    row, own = table.turn[written], token.advantages[written]
    fused = turn.advantages[row] + alpha * (own - group_mean(own, row))
    return replace(token, advantages=_on_tokens(table, fused))


def _bootstrap(table: TurnTable) -> Rollouts:
    return np.zeros(table.num_rollouts) if table.bootstrap is None else table.bootstrap


def _token_values(table: TokenTable) -> Tokens:
    if table.values is None:
        raise ValueError("this method needs the values of the token table; they are missing; give a critic's, or zeros")
    return table.values


def _token_credit(table: TokenTable, advantages: Steps, returns: Steps) -> TokenCredit:
    return TokenCredit(advantages=_on_tokens(table, advantages), returns=_on_tokens(table, returns))


def _on_tokens(table: TokenTable, found: Steps) -> Tokens:
    """One number per sampled token among all tokens; 0 elsewhere."""
    out = np.zeros(len(table.turn))
    out[table.written] = found
    return out
