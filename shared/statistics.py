"""What tables, figures and claims compute from rows: ratios of times, means over seeds, intervals.

Nothing here imports torch, so that a table is made in half a second and no change of an engine
makes it again.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from shared.errors import UserError
from shared.seeding import step_seed

Statistic = Callable[[np.ndarray, np.ndarray], float]


# ---- times ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Repeats of one variant, in seconds, in the order in which they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


@dataclass(frozen=True)
class Ratio:
    """A ratio of times: its median over the rounds, and an interval that holds the true median with
    probability `coverage`.
    """

    value: float
    low: float
    high: float
    coverage: float


def ratio(numerator: Timing | Sequence[float], denominator: Timing | Sequence[float]) -> Ratio:
    """Median of the round-by-round ratios of two interleaved timings, with an interval between
    order statistics.

    The interval is the narrowest one with a coverage of at least 95 %, whatever the distribution
    (that of the sign test); with fewer than six rounds there is none, and it spans them all.
    """
    top = np.asarray(numerator.seconds if isinstance(numerator, Timing) else numerator)
    bottom = np.asarray(denominator.seconds if isinstance(denominator, Timing) else denominator)
    if top.shape != bottom.shape or top.size == 0:
        raise ValueError(
            f"the timings hold {top.size} and {bottom.size} rounds; they must be interleaved, a"
            " pair a round"
        )
    rounds = np.sort(top / bottom)
    outside = np.cumsum([math.comb(rounds.size, k) for k in range(rounds.size // 2 + 1)]) / 2.0 ** (
        rounds.size - 1
    )
    cut = max(0, int(np.sum(outside <= 0.05)) - 1)  # rounds left out at either end
    return Ratio(
        float(np.median(rounds)),
        float(rounds[cut]),
        float(rounds[-1 - cut]),
        float(1 - outside[cut]),
    )


# ---- seeds ---------------------------------------------------------------------------------------


class Mean(NamedTuple):
    """A mean over seeds with its 95 % interval by Student's t; without one (NaN) for a
    single seed.
    """

    value: float
    low: float
    high: float


def mean_interval(values: Iterable[float]) -> Mean:
    """The mean of one value per seed; NaN are left out."""
    from scipy import stats

    found = np.asarray(list(values), dtype=float)
    found = found[~np.isnan(found)]
    mean = float(found.mean()) if len(found) else math.nan
    if len(found) < 2:
        return Mean(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return Mean(mean, mean - half, mean + half)


# ---- resampling ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A value on all pairs, and the middle 95 % (or `level`) of it on resampled ones."""

    value: float
    low: float
    high: float


def bootstrap(
    predicted: ArrayLike,
    true: ArrayLike,
    statistic: Statistic,
    *,
    seed: int,
    count: int = 1000,
    level: float = 0.95,
) -> Interval:
    """A percentile bootstrap interval of a statistic over the m removals."""
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    return _interval(lambda rows: statistic(a[rows], b[rows]), a.shape[0], seed, count, level)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    true: ArrayLike,
    statistic: Statistic,
    *,
    seed: int,
    count: int = 1000,
    level: float = 0.95,
) -> Interval:
    """The interval of statistic(first, true) - statistic(second, true), both on the same resampled
    removals.
    """
    a, b, c = (np.asarray(one, dtype=np.float64) for one in (first, second, true))
    return _interval(
        lambda rows: statistic(a[rows], c[rows]) - statistic(b[rows], c[rows]),
        c.shape[0],
        seed,
        count,
        level,
    )


def _interval(
    value: Callable[[np.ndarray], float], size: int, seed: int, count: int, level: float
) -> Interval:
    whole = value(np.arange(size))
    draw = np.random.default_rng(step_seed(seed, "bootstrap"))
    values: list[float] = []
    while len(values) < count:
        try:
            values.append(value(draw.integers(size, size=size)))
        except UserError:
            # a resample may be one pair again and again, or hold no corrupted sample; the whole is
            # known to be none of these
            continue
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(whole), float(low), float(high))
