"""Bad input to `turnwise.credit`: a ValueError that names the row or parameter and what must hold."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from turnwise import credit
from turnwise.credit import ESTIMATORS, TOKEN_ESTIMATORS, TokenTable, TurnTable, turn_table
from turnwise.credit.parts import check_flag, check_number

UNITS = ("gamma", "token_gamma", "token_lam")
"""Parameters that are discounts wherever they occur."""


def table() -> TurnTable:
    """Two rollouts of two turns and one of one, with every column."""
    return turn_table(
        [0, 0, 1],
        [[{"a": 1.0}, {}], [{"a": 0.5}, {"a": 2.0}], [{}]],
        [{"b": 1.0}, {"b": 0.0}, {"b": 1.0}],
        values=[[0.1, 0.2], [0.3, 0.4], [0.5]],
        anchors=[["s", "t"], ["s", "t"], ["s"]],
        nodes=[[0, 1], [2, 3], [4]],
        tokens=[[1, 2], [2, 1], [3]],
    )


def token_table() -> TokenTable:
    turn = np.repeat(np.arange(5), [1, 2, 2, 1, 3])
    return TokenTable(turns=table(), turn=turn, values=np.linspace(0, 1, len(turn)))


def parameters(kind: type) -> list[tuple[str, str]]:
    """Each estimator with each of its parameters whose default is of this type."""
    return [
        (name, parameter.name)
        for name, method in {**ESTIMATORS, **TOKEN_ESTIMATORS}.items()
        for parameter in inspect.signature(method).parameters.values()
        if type(parameter.default) is kind
    ]


def call(name: str, **given: Any) -> Any:
    return ESTIMATORS[name](table(), **given) if name in ESTIMATORS else TOKEN_ESTIMATORS[name](token_table(), **given)


@pytest.mark.parametrize(("name", "parameter"), parameters(float))
def test_no_estimator_takes_a_number_that_is_not_finite_or_below_zero(name: str, parameter: str):
    for bad in (math.nan, math.inf, -0.5, 1e300, *([1.5] if parameter in UNITS else [])):
        words = rf"{parameter} must be (in \[0, [1-9]|>= 0 and finite).*; got {re.escape(repr(bad))}"
        with pytest.raises(ValueError, match=words):
            call(name, **{parameter: bad})


@pytest.mark.parametrize(("name", "parameter"), parameters(int))
def test_no_estimator_takes_a_count_below_zero(name: str, parameter: str):
    for bad in (-1, *([2] if parameter == "ddof" else [])):
        with pytest.raises(ValueError, match=f"{parameter} must be a whole number .*; got {bad}"):
            call(name, **{parameter: bad})


def test_mt_grpos_alpha_is_a_discount_and_weights_of_components_are_numbers():
    for name in ("mt-grpo", "mt-grpo-tree"):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]; got 1\.5"):
            call(name, alpha=1.5)
    with pytest.raises(ValueError, match=r"weights\['a'\] must be >= 0 and finite; got nan"):
        call("gdpo", weights={"a": math.nan})


def test_a_power_of_hgpos_histories_must_be_a_number():
    """3 ** 209 is below 1e100 and 3 ** 210 is not."""
    assert np.isfinite(call("hgpo", history=1, alpha=209.0).advantages).all()
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 209\]; got 210\.0"):
        call("hgpo", history=1, alpha=210.0)


@pytest.mark.parametrize("bad", ["1", None, True, 1j, math.nan, -1, np.float64(np.inf), 10**400])
def test_a_number_is_a_real_one_within_bounds(bad: object):
    with pytest.raises(ValueError, match="x must be >= 0 and finite; got"):
        check_number("x", bad, 0)


def test_a_whole_number_is_no_fraction_and_a_flag_is_true_or_false():
    check_number("x", np.int8(1), 0, 1, whole=True)
    check_number("x", np.float32(1), 0)
    with pytest.raises(ValueError, match=r"x must be a whole number in \[0, 1\]; got 0\.5"):
        check_number("x", 0.5, 0, 1, whole=True)
    check_flag("x", np.True_)
    for bad in (1, "yes", None):
        with pytest.raises(ValueError, match=f"x must be True or False; got {bad!r}"):
            check_flag("x", bad)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda t: credit.reward_to_go(np.zeros(5), np.zeros(3), t, discount=-1.0), "discount must be in"),
        (lambda t: credit.group_std(np.zeros(5), t.group, ddof=2), "ddof must be a whole number in"),
        (lambda t: credit.z_score(np.zeros(5), t.group, eps=-1.0), "eps must be >= 0"),
        (lambda t: credit.z_score(np.zeros(5), t.group, ddof=-1), "ddof must be a whole number in"),
        (lambda t: credit.whiten(np.arange(5.0), eps=math.nan), "eps must be >= 0"),
        (lambda t: credit.potential_shaping(np.zeros(5), t, gamma=math.nan), "gamma must be in"),
        (lambda t: credit.tips(np.zeros(5), t, scale=math.inf), "scale must be >= 0"),
        (lambda t: credit.empg(np.ones(5), np.ones(5), t, kappa=math.nan), "kappa must be >= 0"),
        (lambda t: credit.empg(np.ones(5), np.ones(5), t, kappa_next=-1.0), "kappa_next must be >= 0"),
        (lambda t: credit.empg(np.ones(5), np.ones(5), t, zeta=math.inf), "zeta must be >= 0"),
        (lambda t: credit.empg(np.ones(5), np.ones(5), t, eps=-1.0), "eps must be >= 0"),
        (lambda t: credit.agent_opsd(np.ones(5), np.ones(5), np.ones(3), t, lam=0.5, eps=-1.0), "eps must be >= 0"),
        (lambda t: credit.anchor_keys(t, history=-1), "history must be a whole number >= 0"),
        (lambda t: credit.loss_weights(credit.token_table(t), "constant", length=0), "length must be a whole number"),
    ],
)
def test_no_part_transform_or_modulator_takes_numbers_out_of_range(made: Callable[[TurnTable], Any], words: str):
    with pytest.raises(ValueError, match=words):
        made(table())


def test_whitening_what_differs_by_less_than_squares_can_tell_gives_zero_and_no_nan():
    assert credit.whiten(np.array([0.0, 1e-200]), eps=0.0).tolist() == [0.0, 0.0]
