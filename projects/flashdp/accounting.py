"""What has been spent: (epsilon, delta) of a run of DP-SGD, from the accountants of Opacus and of
Google's dp-accounting.

    rdp    Opacus, Rényi: fast, an upper bound somewhat above the others
    prv    Opacus, privacy random variables: tight to a small numerical error
    pld    dp-accounting, privacy loss distributions: a tight upper bound

All are for the Poisson-subsampled Gaussian mechanism under adding or removing one record.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import UserError

# the tight accountants take minutes over an epsilon far above this; the bound of rdp then stands in
# for theirs
MEANINGLESS = 200.0
LARGEST = 1e6  # noise multiplier
TOLERANCE = 1e-4  # of a noise multiplier
# What the numerics of prv and pld may add to epsilon, of its value.
PRV_ERROR = 5e-2
PLD_ERROR = 1e-4
# Rényi orders. Those of Opacus end at 63, where no epsilon below log(1/delta)/62 can be seen.
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
HIGH_ORDERS = [round(64 * 1.25**k) for k in range(30)]


@dataclass(frozen=True)
class Mechanism:
    """`steps` releases with the same noise multiplier and sampling rate."""

    noise_multiplier: float
    sample_rate: float | None  # None: batches of fixed size, which no accountant here covers
    steps: int


def epsilon(history: Sequence[Mechanism], delta: float, accountant: str = "rdp") -> float:
    """The epsilon at `delta` of all releases together; 0 without any, infinite without noise."""
    if not 0 < delta < 1:
        raise UserError(f"delta must be between 0 and 1, not {delta}")
    if accountant not in ACCOUNTANTS:
        raise UserError(f"no accountant '{accountant}'; there are {', '.join(ACCOUNTANTS)}")
    if any(one.sample_rate is None and one.steps > 0 for one in history):
        raise UserError(
            "steps with batches of fixed size have no epsilon here: the accountants assume Poisson"
            " sampling"
        )
    spent = [one for one in history if one.steps > 0 and one.sample_rate]
    if not spent:
        return 0.0
    if any(one.noise_multiplier == 0 for one in spent):
        return math.inf
    if accountant != "rdp" and (bound := ACCOUNTANTS["rdp"](spent, delta)) > MEANINGLESS:
        return bound
    found = ACCOUNTANTS[accountant](spent, delta)
    # an accountant that gives out has bounded nothing
    return max(0.0, found) if found == found else math.inf


def noise_multiplier(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "rdp"
) -> float:
    """The smallest σ, to 1e-4, whose epsilon after `steps` is at most the target. UserError when
    none below 1e6 will do.
    """
    if not target_epsilon > 0:
        raise UserError(f"the target epsilon must be above 0, not {target_epsilon}")

    from scipy.optimize import brentq

    def spent(sigma: float, kind: str = accountant) -> float:
        return epsilon([Mechanism(sigma, sample_rate, steps)], delta, kind)

    high = 1.0
    while _finite(lambda sigma: spent(sigma, "rdp"), high) > target_epsilon:
        high *= 2
        if high > LARGEST:
            raise UserError(
                f"epsilon {target_epsilon:g} at delta {delta:g} cannot be reached in {steps} steps"
                f" at sampling rate {sample_rate:g}; take fewer steps, smaller batches or more data"
            )
    # rdp is fast and never below the others, so its multiplier is an upper end for theirs.
    precision = TOLERANCE if accountant == "rdp" else 0.01 * high
    high = _bisected(lambda sigma: spent(sigma, "rdp"), target_epsilon, high, precision)
    if accountant == "rdp":
        return high
    exact: Callable[[float], float] = spent
    if accountant == "pld":
        interval = _interval([Mechanism(high, sample_rate, steps)], delta)[0]

        def exact(sigma: float) -> float:
            return _pld_at([Mechanism(sigma, sample_rate, steps)], delta, interval)

    def excess(sigma: float) -> float:
        return math.log(max(_finite(exact, sigma), 1e-12) / target_epsilon)

    low = 0.9 * high
    while low > 1e-3 and excess(low) <= 0:
        high, low = low, 0.9 * low
    if excess(high) < 0 < excess(low) < math.inf:
        high = brentq(excess, low, high, xtol=TOLERANCE / 2, rtol=1e-6)
    # a root is found from either side, and `epsilon` may choose a finer interval
    while spent(high) > target_epsilon:
        high += max(TOLERANCE / 4, high * 1e-6)
    return high


def _bisected(
    spent: Callable[[float], float], target: float, high: float, precision: float
) -> float:
    """The smallest σ, to `precision`, that spends at most the target; `high` does."""
    low = 0.0 if high == 1 else high / 2
    while high - low > precision:
        middle = (low + high) / 2
        # Close to no noise the accountants' numerics give out; what they cannot bound is not
        # private enough.
        low, high = (low, middle) if _finite(spent, middle) <= target else (middle, high)
    return high


def _finite(function: Callable[[float], float], value: float) -> float:
    try:
        return function(value)
    except (ValueError, OverflowError, FloatingPointError):
        return math.inf


def check_delta(delta: float, dataset_size: int) -> None:
    """UserError for a delta that would allow the release of a whole record."""
    if not 0 < delta < 1 / dataset_size:
        raise UserError(
            f"delta must be above 0 and below 1/{dataset_size} = {1 / dataset_size:.3g}, one over"
            f" the number of records; not {delta}"
        )


def _rdp(history: Sequence[Mechanism], delta: float) -> float:
    found = _opacus("RDPAccountant", history, delta, alphas=ORDERS)
    # The best order is the last of these, or beyond it.
    if found < 2 * math.log(1 / delta) / (ORDERS[-1] - 1):
        from opacus.accountants.analysis.rdp import get_privacy_spent

        curve = [sum(one.steps * _renyi(one, order) for one in history) for order in HIGH_ORDERS]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = min(
                found, float(get_privacy_spent(orders=HIGH_ORDERS, rdp=curve, delta=delta)[0])
            )
    return found


def _renyi(one: Mechanism, order: int) -> float:
    """The Rényi divergence of an integer order of one release (Mironov, Talwar, Zhang 2019, arXiv
    1908.10530, section 3.3): a sum, here over an array, which an order of thousands needs.
    """
    import numpy as np
    from scipy.special import gammaln, logsumexp, xlog1py, xlogy

    rate, k = one.sample_rate, np.arange(order + 1)
    assert rate is not None
    terms = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms += xlogy(k, rate) + xlog1py(order - k, -rate)
    terms += (k * k - k) / (2 * one.noise_multiplier**2)
    return float(logsumexp(terms)) / (order - 1)


def _prv(history: Sequence[Mechanism], delta: float) -> float:
    allowed = min(0.01, PRV_ERROR * _rdp(history, delta))
    return _opacus("PRVAccountant", history, delta, eps_error=allowed)


def _opacus(kind: str, history: Sequence[Mechanism], delta: float, **options: Any) -> float:
    from opacus import accountants

    accountant = getattr(accountants, kind)()
    accountant.history = [(one.noise_multiplier, one.sample_rate, one.steps) for one in history]
    with warnings.catch_warnings():
        # "optimal order is the largest alpha": the bound holds, another order would be tighter
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=delta, **options))


def _pld(history: Sequence[Mechanism], delta: float) -> float:
    return _interval(history, delta)[1]


def _interval(history: Sequence[Mechanism], delta: float) -> tuple[float, float]:
    """The interval to whose multiples privacy losses are rounded up, so that it changes epsilon by
    no more than `PLD_ERROR` of it; and that epsilon.

    Whatever the interval, the result is an upper bound. Its error falls with the square of the
    interval: at half of it, a third of the difference is left.
    """
    interval = 1e-3
    found = _pld_at(history, delta, interval)
    while interval > 1e-7:
        interval /= 2
        before, found = found, _pld_at(history, delta, interval)
        if before - found <= 3 * PLD_ERROR * found:
            break
    return interval, found


def _pld_at(history: Sequence[Mechanism], delta: float, interval: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=interval)
    for one in history:
        accountant.compose(
            PoissonSampledDpEvent(one.sample_rate, GaussianDpEvent(one.noise_multiplier)), one.steps
        )
    return float(accountant.get_epsilon(delta))


ACCOUNTANTS: dict[str, Callable[[Sequence[Mechanism], float], float]] = {
    "rdp": _rdp,
    "prv": _prv,
    "pld": _pld,
}


@dataclass(frozen=True)
class PrivacyReport:
    """The guarantee and what it rests on. `str()` is what a person reads."""

    epsilon: float
    delta: float
    accountant: str
    history: tuple[Mechanism, ...]
    dataset_size: int
    expected_batch_size: float
    clip: float
    groups: int
    assumptions: tuple[str, ...]

    @classmethod
    def of(
        cls,
        history: Sequence[Mechanism],
        delta: float,
        accountant: str,
        clip: float,
        groups: int,
        sampling: Any,
        notes: Sequence[str] = (),
        spent: float | None = None,
    ) -> "PrivacyReport":
        assumptions = (
            (
                "one record of the data is one sample; neighbouring data sets differ by one record"
                " more or less"
            ),
            (
                "each record is drawn on its own with the stated probability, and nobody else knows"
                " which were drawn"
            ),
            (
                "the loss of a sample depends on that sample alone, and each record passes through"
                " the model once in a step"
            ),
            (
                "the first dimension of what each layer gets is the samples; no buffer depends on"
                " the data"
            ),
            (
                "what is released is the parameters after each step; losses, norms and gradients"
                " before the noise are not"
            ),
            *notes,
        )
        size, expected = sampling.dataset_size, sampling.expected_batch_size
        return cls(
            epsilon(history, delta, accountant) if spent is None else spent,
            delta,
            accountant,
            tuple(history),
            size,
            expected,
            clip,
            groups,
            assumptions,
        )

    def __str__(self) -> str:
        runs = "; ".join(
            f"{one.steps} steps at rate {one.sample_rate:.3g} with noise multiplier"
            f" {one.noise_multiplier:.4g}"
            for one in self.history
        )
        lines = [
            (
                f"({self.epsilon:.3f}, {self.delta:g})-differential privacy by the"
                f" {self.accountant} accountant"
            ),
            f"  {runs or 'no steps'}",
            (
                f"  {self.dataset_size} records, batches of {self.expected_batch_size:g}; total"
                f" bound {self.clip:g}, {self.groups} groups"
            ),
            "  it rests on:",
            *(f"  - {one}" for one in self.assumptions),
        ]
        return "\n".join(lines)
