"""Ratios, means and intervals: against closed forms, SciPy and their own coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from shared import statistics
from shared.errors import UserError
from shared.influence import evaluate
from shared.statistics import Timing, mean_interval, ratio


def test_the_interval_of_a_mean_is_students():
    mean, low, high = mean_interval([1.0, 2.0, math.nan, 4.0])
    expected = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert mean == pytest.approx(7 / 3)
    assert (low, high) == pytest.approx(expected)
    assert mean_interval([3.0]).value == 3.0
    assert math.isnan(mean_interval([3.0]).low)
    assert math.isnan(mean_interval([math.nan]).value)


def test_a_ratio_is_the_median_of_the_rounds():
    found = ratio(Timing((2.0, 4.0, 30.0)), Timing((1.0, 1.0, 10.0)))
    assert found.value == 3.0
    assert 2.0 <= found.low <= found.value <= found.high <= 4.0
    assert ratio([2.0, 4.0, 30.0], [1.0, 1.0, 10.0]) == found, "its resampling has a fixed seed"


def test_a_ratio_without_spread_has_an_interval_without_width():
    found = ratio([3.0] * 5, [2.0] * 5)
    assert (found.low, found.value, found.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize("rounds", [6, 9, 25])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(rounds):
    rng = np.random.default_rng(0)
    held, trials = 0, 2000
    for _ in range(trials):
        busy = rng.lognormal(0, 1, rounds)  # a busy moment falls on both
        found = ratio(1.1 * busy * rng.lognormal(0, 0.05, rounds), busy)
        held += found.low <= 1.1 <= found.high
    assert found.coverage >= 0.95
    assert abs(held / trials - found.coverage) < 4 * (0.05 * 0.95 / trials) ** 0.5


def test_with_few_rounds_the_interval_spans_them_all_and_owns_up():
    found = ratio([1.0, 5.0, 2.0], [1.0, 1.0, 1.0])
    assert (found.low, found.value, found.high, found.coverage) == (1.0, 2.0, 5.0, 0.75)


@pytest.mark.parametrize(("top", "bottom"), [([1.0], [1.0, 2.0]), ([], [])])
def test_timings_of_different_lengths_are_refused(top, bottom):
    with pytest.raises(ValueError, match="must be interleaved"):
        ratio(top, bottom)


# ---- resampling ----------------------------------------------------------------------------------


def test_bootstrap_intervals_are_seeded_and_cover_the_truth():
    draw = np.random.default_rng(3)
    covered = 0
    for trial in range(40):
        true = draw.normal(size=60)
        predicted = true + draw.normal(size=60)  # correlation 1 / sqrt(2)
        interval = statistics.bootstrap(predicted, true, evaluate.pearson, seed=trial, count=150)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 0.5**0.5 <= interval.high
    assert covered >= 33
    assert statistics.bootstrap(
        predicted, true, evaluate.pearson, seed=1, count=50
    ) == statistics.bootstrap(predicted, true, evaluate.pearson, seed=1, count=50)


def test_resamples_without_the_statistic_are_drawn_again():
    interval = statistics.bootstrap(
        [3, 2, 1], [True, False, False], evaluate.auroc, seed=0, count=50
    )
    assert interval == statistics.Interval(1, 1, 1)
    with pytest.raises(UserError, match="all equal"):
        statistics.bootstrap([1, 1, 1], [1, 2, 3], evaluate.pearson, seed=0)


def test_a_paired_interval_is_narrower_than_the_two_it_compares():
    draw = np.random.default_rng(0)
    true = draw.normal(size=80)
    first = true + draw.normal(size=80)
    second = first + 0.05 * draw.normal(size=80)
    paired = statistics.paired_bootstrap(first, second, true, evaluate.pearson, seed=0, count=300)
    alone = statistics.bootstrap(first, true, evaluate.pearson, seed=0, count=300)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    assert paired.value == pytest.approx(
        evaluate.pearson(first, true) - evaluate.pearson(second, true)
    )
    assert statistics.paired_bootstrap(
        first, first, true, evaluate.pearson, seed=0, count=20
    ) == statistics.Interval(0, 0, 0)
