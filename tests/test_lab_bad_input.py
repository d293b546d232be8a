"""The laboratory: parameters out of range are refused by name, and sure policies give numbers."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from turnwise.cli import main
from turnwise.credit import rloo
from turnwise.lab import PROBLEMS, action_probabilities, group_gradient, policy_gradient, solve


@pytest.mark.parametrize("problem", ["stop-or-go", "tokens", "revisits"])
def test_a_policy_that_is_sure_has_no_gradient_and_no_nan(problem: str):
    process, logits = PROBLEMS[problem]()
    sure = 1e6 * np.sign(logits + 0.05)
    policy = action_probabilities(process, sure)
    assert np.isfinite(policy).all()
    truth = solve(process, sure)
    for found in (truth.v, truth.q, truth.advantage, truth.token_q, truth.token_advantage):
        assert np.isfinite(found).all()
    assert np.isfinite(policy_gradient(process, sure)).all()


def test_the_q_of_a_token_that_is_all_but_impossible_is_that_of_its_actions():
    """ "search" has probability exp(-2000), which is 0 in numbers; its two actions still share it as they did."""
    process, logits = PROBLEMS["tokens"]()
    search = next(
        p for p, (s, words) in enumerate(process.choices) if (process.states[s], words) == ("question", "search")
    )
    usual = solve(process, logits).token_q
    logits[search] = -2000.0
    assert_allclose(solve(process, logits).token_q[:, search], usual[:, search])


@pytest.mark.parametrize(
    ("problem", "parameters", "words"),
    [
        ("stop-or-go", {"noise": 1.5}, r"noise must be in \[0, 1\]; got 1\.5"),
        ("stop-or-go", {"turns": 0}, "turns must be a whole number >= 1 and finite; got 0"),
        ("ragged", {"ends": -0.1}, r"ends must be in \[0, 1\]; got -0\.1"),
        ("stochastic-tool", {"noise": float("nan")}, r"noise must be in \[0, 1\]; got nan"),
        ("revisits", {"turns": 0}, "turns must be a whole number"),
        ("one-decisive-turn", {"turns": 0}, "turns must be a whole number"),
        ("one-decisive-turn", {"reward": float("inf")}, "reward must be >= -1e"),
        ("sparse", {"turns": 0}, "turns must be a whole number"),
        ("sparse", {"paying": 4}, r"paying must be a whole number in \[0, 3\]; got 4"),
    ],
)
def test_problems_refuse_parameters_out_of_range(problem: str, parameters: dict, words: str):
    with pytest.raises(ValueError, match=words):
        PROBLEMS[problem](**parameters)


@pytest.mark.parametrize("given", [{"samples": 1}, {"samples": 0}, {"limit": -1}, {"group_size": 0}])
def test_a_group_gradient_needs_two_samples_and_counts_that_are_none_below_zero(given: dict):
    process, logits = PROBLEMS["decoy"]()
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be a whole number >= "):
        group_gradient(rloo, process, logits, **{"group_size": 2, **given})


@pytest.mark.parametrize(("option", "value"), [("samples", "1"), ("groups", "0"), ("group-sizes", "0")])
def test_the_lab_names_the_option_that_is_too_small(option: str, value: str, capsys):
    assert main(["lab", f"--{option}", value]) == 2
    assert f"{option} must be >= {2 if option == 'samples' else 1}; got {value}" in capsys.readouterr().err
