"""What the laboratory says of the shipped estimators: who is unbiased, who is not, and by how much."""

import json
from pathlib import Path

import numpy as np
import pytest

from turnwise.cli import main
from turnwise.credit import (
    ESTIMATORS,
    Credit,
    TokenTable,
    TurnTable,
    dr_grpo,
    mt_grpo,
    mt_ppo,
    mt_ppo_paid_at_end,
    reward_to_go,
    rloo,
    turn_rloo,
)
from turnwise.lab import (
    PROBLEMS,
    all_rollouts,
    group_gradient,
    group_table,
    logit_table,
    metrics,
    policy_gradient,
    solve,
    turn_process,
)

EXACT = 60_000
"""Groups that are enumerated at most: every problem's with two rollouts."""


def bias(estimator, problem: str, *, group_size: int = 2, **parameters) -> float:
    """|E ĝ − ∇J| / |∇J|, exactly."""
    process, logits = PROBLEMS[problem](**parameters)
    found = group_gradient(estimator, process, logits, group_size=group_size, limit=EXACT)
    assert found.exact
    return metrics(found, policy_gradient(process, logits))["bias"]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_default_of_ours_is_unbiased_on_every_problem(problem: str):
    assert bias(turn_rloo, problem) < 1e-12


@pytest.mark.parametrize("group_size", [1, 3])
def test_it_is_so_for_other_group_sizes_where_the_policy_chooses_when_to_stop(group_size: int):
    assert bias(turn_rloo, "stop-or-go", group_size=group_size) < 1e-12


def without_loners(table: TurnTable) -> Credit:
    """The same with nothing for turns that nobody else reached: the form that looks harmless."""
    alone = np.ones(len(table.rollout), dtype=bool)
    for k in range(int(table.index.max()) + 1):
        rows = np.flatnonzero(table.index == k)
        _, at, counts = np.unique(table.group[rows], return_inverse=True, return_counts=True)
        alone[rows] = counts[at] == 1
    return Credit(advantages=np.where(alone, 0.0, turn_rloo(table).advantages))


def test_giving_nothing_to_turns_that_nobody_else_reached_is_biased():  # identity 22
    assert bias(without_loners, "stop-or-go") > 0.05


def test_rloo_is_unbiased_and_dr_grpo_is_short_by_a_factor():  # identity 17
    assert bias(rloo, "stop-or-go", group_size=3) < 1e-12
    assert bias(dr_grpo, "stop-or-go", group_size=3) == pytest.approx(1 / 3)  # (G−1)/G of the gradient


def mean_only_mt_grpo(table: TurnTable) -> Credit:
    """MT-GRPO with leave-one-out means in place of z-scores, α = 1: the rule for ragged groups of its docstring."""
    members = np.bincount(table.rollout_group)[table.group]
    sums = {}
    reward = table.turn_reward()
    for k in range(int(table.index.max()) + 1):
        rows = table.index == k
        sums[k] = np.bincount(table.group[rows], weights=reward[rows], minlength=int(table.group.max()) + 1)
    others = np.array([sums[k][g] for k, g in zip(table.index, table.group, strict=True)]) - reward
    own = reward - others / (members - 1)
    outcome = table.outcome_reward()
    total = np.bincount(table.rollout_group, weights=outcome)[table.rollout_group]
    size = np.bincount(table.rollout_group)[table.rollout_group]
    final = outcome - (total - outcome) / (size - 1)
    return Credit(advantages=reward_to_go(own, final, table, discount=1.0))


def test_mt_grpo_with_means_is_unbiased_and_with_z_scores_is_not():  # identity 8
    # one search or none, then the answer: the case study of the paper, where only a first turn is paid
    moves = {
        "asked": {"search": [(0.7, "found", 1.0), (0.3, "lost", 0.2)], "guess": [(0.3, "right", 0), (0.7, "wrong", 0)]},
        "found": {"read": [(1.0, "right", 0.0)], "ignore": [(1.0, "wrong", 0.0)]},
        "lost": {"guess": [(0.4, "right", 0.0), (0.6, "wrong", 0.0)]},
    }
    process = turn_process({"asked": 1.0}, moves, {"right": 1.0}, max_turns=2)
    logits = logit_table(process, {"asked": {"search": -0.4}, "found": {"read": 0.3}})
    truth = policy_gradient(process, logits)

    def here(estimator, metric: str = "bias") -> float:
        found = metrics(group_gradient(estimator, process, logits, group_size=3, limit=EXACT), truth)[metric]
        assert found is not None
        return found

    assert here(mean_only_mt_grpo) < 1e-12
    assert here(turn_rloo) < 1e-12
    assert here(mt_grpo) > 0.1
    # and it varies less than leave-one-out on the sum of all rewards, which is unbiased too
    assert here(rloo) < 1e-12
    assert here(mean_only_mt_grpo, "variance") < 0.9 * here(rloo, "variance")


def test_where_a_second_paid_turn_may_be_reached_or_not_even_its_means_are_biased():  # identity 8, broken
    """A later turn's baseline is taken off only in rollouts that get there, which the earlier turn decides."""
    assert bias(mean_only_mt_grpo, "stop-or-go", group_size=3, turns=3) > 0.01
    assert bias(turn_rloo, "stop-or-go", group_size=3, turns=3) < 1e-12


@pytest.mark.parametrize("name", ["grpo-mr", "mt-grpo", "gtpo", "matchtir", "irc-hybrid", "gigpo", "hgpo", "gagpo"])
def test_published_forms_that_normalise_are_biased_somewhere(name: str):
    assert max(bias(ESTIMATORS[name], problem) for problem in ("stop-or-go", "revisits")) > 0.01


@pytest.mark.parametrize("problem", PROBLEMS)
def test_with_exact_critics_mt_ppo_and_its_control_give_every_token_the_same(problem: str):  # identity 9
    """At γ = λ = 1. What was paid before a token is in the control's return, and in its exact critic's value."""
    process, logits = PROBLEMS[problem]()
    solution, rollouts = solve(process, logits), all_rollouts(process, logits)
    turns, _ = group_table(rollouts, np.arange(len(rollouts.probability))[:, None])
    rewards = turns.turn_rewards["turn"]
    paid = np.cumsum(rewards) - rewards
    before = paid - np.repeat(paid[rollouts.first], rollouts.length)
    token_value = solution.token_q - solution.token_advantage
    chosen = [np.flatnonzero(process.through[s, a]) for s, a in zip(rollouts.state, rollouts.action, strict=True)]
    to_come = np.concatenate([token_value[k, own] for k, own in zip(rollouts.index, chosen, strict=True)])
    turn = np.repeat(np.arange(len(turns.rollout)), rollouts.tokens)
    placed = mt_ppo(TokenTable(turns=turns, turn=turn, values=to_come)).advantages
    late = mt_ppo_paid_at_end(TokenTable(turns=turns, turn=turn, values=to_come + before[turn])).advantages
    np.testing.assert_allclose(placed, late, rtol=0, atol=1e-12)
    assert np.abs(placed).max() > 0.1
    if before.any():
        naive = mt_ppo_paid_at_end(TokenTable(turns=turns, turn=turn, values=to_come)).advantages
        assert np.abs(naive - placed).max() > 0.01, "the control's own critic must know what was paid before"


def test_the_command_prints_the_map_and_writes_it(tmp_path: Path, capsys):
    command = ["lab", "--estimators", "rloo", "mt-grpo", "--group-sizes", "2", "--groups", "300", "--samples", "20"]
    assert main([*command, "--metric", "cosine", "--out", str(tmp_path / "map")]) == 0
    shown = capsys.readouterr().out
    assert "rloo" in shown
    assert "stop-or-go" in shown
    rows = json.loads((tmp_path / "map.json").read_text())
    assert {row["estimator"] for row in rows} == {"rloo", "mt-grpo"}
    assert (tmp_path / "map.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--metric", "cosin"], "did you mean cosine"),
        (["--estimators", "rlo"], "did you mean rloo"),
        (["--estimators", "treerl"], "estimators must be a known name"),
        (["--group-sizes", "0"], "must be >= 1"),
        (["--group-sizes", "2", "100000"], "group-sizes must be at most 128: larger groups take hours; got 100000"),
        (["--out", "/nowhere/map"], "must be writable"),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: str, capsys):
    assert main(["lab", *args]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
