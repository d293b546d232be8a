"""The statistics of few seeds, each by arithmetic."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from turnwise.paired import (
    ENUMERATED,
    Interval,
    Time,
    _resamples,
    area,
    bootstrap_interval,
    earlier,
    first_reaching,
    median_time,
    paired,
    proportion_interval,
    resampled_means,
    sign_test,
)


def test_the_resamples_of_two_values_are_three():
    means, weights = resampled_means([0.0, 1.0])  # 0 0, once; 0 1 and 1 0; 1 1, once: of 4
    assert sorted(zip(means.tolist(), weights.tolist(), strict=True)) == [(0.0, 0.25), (0.5, 0.5), (1.0, 0.25)]


@pytest.mark.parametrize("n", [1, 3, 5, ENUMERATED])
def test_resamples_are_as_many_as_the_formula_says_and_their_weights_sum_to_one(n: int):
    values = np.arange(n) ** 2.0
    means, weights = resampled_means(values.tolist())
    assert len(means) == math.comb(2 * n - 1, n)
    assert_allclose(weights.sum(), 1.0)
    assert_allclose(weights @ means, values.mean())
    assert_allclose(weights @ (means - values.mean()) ** 2, values.var() / n)  # the variance of a mean of n draws


def test_the_bounds_cut_a_fortieth_of_the_weight():
    #  means of four values 0, 0, 0, 4 are how often the 4 was drawn, binomial (4, 1/4):
    #  P(0) = .316, P(at most 2) = .949, P(at most 3) = .9961, so the bounds are 0 and 3
    assert bootstrap_interval([0.0, 0.0, 0.0, 4.0]) == Interval(low=0.0, high=3.0)
    assert bootstrap_interval([1.0, 1.0, 1.0]) == Interval(low=1.0, high=1.0)
    #  of three values the lowest resample alone has weight 1/27 > .025: the interval is the range
    assert bootstrap_interval([0.0, 2.0, 7.0]) == Interval(low=0.0, high=7.0)


def test_drawn_resamples_are_always_the_same_and_near_all_of_them(monkeypatch: pytest.MonkeyPatch):
    values = [0.3, 0.1, 0.4, 0.15, 0.9, 0.2, 0.65]
    exact = bootstrap_interval(values)
    monkeypatch.setattr("turnwise.paired.ENUMERATED", 3)
    monkeypatch.setattr("turnwise.paired._resamples", _resamples.__wrapped__)
    drawn = bootstrap_interval(values)
    assert drawn == bootstrap_interval(values)
    assert_allclose([drawn.low, drawn.high], [exact.low, exact.high], atol=0.01)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 6, 2 / 64), (4, 1, 2 * (1 + 5) / 32), (3, 3, 1.0), (2, 3, 1.0)],
)
def test_the_sign_test_counts_splits(wins: int, losses: int, p: float):
    assert sign_test(wins, losses) == p


def test_pairs_are_compared_seed_by_seed():
    found = paired([0.5, 0.9, 0.25, 0.5, 1.0, 1.0], [0.25, 0.4, 0.5, 0.5, 0.5, 0.75])
    assert_allclose(found.differences, [0.25, 0.5, -0.25, 0.0, 0.5, 0.25])
    assert_allclose(found.mean, 1.25 / 6)
    assert (found.wins, found.losses) == (4, 1)  # the tie counts for neither
    assert found.p == 2 * (1 + 5) / 32
    assert found.least_p == 2 / 32
    assert found.interval is not None
    assert found.interval.low < found.mean < found.interval.high


def test_few_pairs_have_no_interval():
    assert paired([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]).interval is None
    with pytest.raises(ValueError, match="equally many"):
        paired([1.0], [1.0, 2.0])


def test_a_difference_that_is_constant_over_seeds_is_seen_however_seeds_differ():
    base = [0.1, 0.9, 0.5, 0.3, 0.7]  # seeds differ by .8, arms by .05: unpaired, nothing would be seen
    found = paired([b + 0.05 for b in base], base)
    assert found.interval is not None
    assert_allclose([found.interval.low, found.interval.high], [0.05, 0.05])


def test_a_probability_from_none_or_all_has_the_textbook_bounds():
    #  none of n: (1 − p)ⁿ = .025
    found = proportion_interval(0, 3)
    assert found.low == 0.0
    assert_allclose(found.high, 1 - 0.025 ** (1 / 3))
    found = proportion_interval(5, 5)
    assert found.high == 1.0
    assert_allclose(found.low, 0.025 ** (1 / 5))


def test_a_probabilitys_bounds_leave_a_fortieth_on_either_side():
    found = proportion_interval(2, 10)
    at_most = sum(math.comb(10, i) * found.high**i * (1 - found.high) ** (10 - i) for i in range(3))
    fewer = sum(math.comb(10, i) * found.low**i * (1 - found.low) ** (10 - i) for i in range(2))
    assert_allclose([at_most, 1 - fewer], [0.025, 0.025])
    assert_allclose([found.low, found.high], [0.0252, 0.5561], atol=1e-4)  # Clopper and Pearson's charts: .03 and .56
    with pytest.raises(ValueError, match="got 4 of 3"):
        proportion_interval(4, 3)


def test_a_probabilitys_interval_covers_it_as_often_as_it_says():
    for n in (3, 5, 10):
        bounds = [proportion_interval(k, n) for k in range(n + 1)]
        for p in np.linspace(0.02, 0.98, 25):
            chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
            assert sum(c for c, b in zip(chances, bounds, strict=True) if b.low <= p <= b.high) >= 0.95


def test_a_threshold_is_reached_by_the_mean_of_several_steps():
    curve = [0.0, 1.0, 0.0, 0.5, 0.75, 0.75, 1.0]
    assert first_reaching(curve, 0.6, window=1) == 2
    assert first_reaching(curve, 0.6, window=3) == 6  # means of three: .33, .5, .42, .67
    assert first_reaching(curve, 0.9, window=3) is None
    assert first_reaching([None, 0.5, 0.7], 0.6, window=3) == 3  # (.5 + .7) / 2
    assert first_reaching([1.0, 1.0], 0.5, window=3) is None


def reached(at: float) -> Time:
    return Time(at=at, reached=True)


def missed(at: float) -> Time:
    return Time(at=at, reached=False)


def test_a_median_is_known_while_most_have_arrived():
    assert median_time([reached(4), missed(60), reached(9)]) == reached(9)
    assert median_time([reached(4), missed(60), missed(50)]) == missed(50)
    assert median_time([reached(4), reached(6)]) == reached(6)
    assert median_time([reached(4), missed(60)]) == missed(60)
    assert [reached(1234.4).text(), missed(60).text()] == ["1,234", ">60"]


def test_who_came_earlier_is_said_only_where_it_is_known():
    assert earlier(reached(3), reached(5)) == 1
    assert earlier(reached(5), reached(3)) == -1
    assert earlier(reached(5), reached(5)) == 0
    assert earlier(reached(30), missed(60)) == 1
    assert earlier(reached(30), missed(20)) == 0  # it was watched for 20 alone
    assert earlier(missed(60), reached(30)) == -1
    assert earlier(missed(20), reached(30)) == 0
    assert earlier(missed(20), missed(30)) == 0


def test_an_area_is_the_mean_over_what_was_spent():
    #  .2 over 10 tokens, .4 over 30, .8 over 60: (2 + 12 + 48) / 100
    assert_allclose(area([0.2, 0.4, 0.8], [10, 40, 100], 100), 0.62)
    assert_allclose(area([0.2, 0.4, 0.8], [10, 40, 100], 50), (2 + 12 + 8) / 50)  # the rest lies beyond
    assert_allclose(area([0.2, 0.4, 0.8], [10, 40, 100], 200), (62 + 80) / 200)  # the last one holds
    assert_allclose(area([None, 0.4, None], [1, 2, 3], 3), 0.4)
    with pytest.raises(ValueError, match="must have a value"):
        area([None], [1], 1)
