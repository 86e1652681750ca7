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
    none below 1000 will do.
    """
    if not target_epsilon > 0:
        raise UserError(f"the target epsilon must be above 0, not {target_epsilon}")

    def spent(sigma: float) -> float:
        return epsilon([Mechanism(sigma, sample_rate, steps)], delta, accountant)

    low, high = 0.0, 1.0
    while spent(high) > target_epsilon:
        low, high = high, 2 * high
        if high > 1000:
            raise UserError(
                f"epsilon {target_epsilon:g} at delta {delta:g} cannot be reached in {steps} steps"
                f" at sampling rate {sample_rate:g}; take fewer steps, smaller batches or more data"
            )
    while high - low > 1e-4:
        middle = (low + high) / 2
        # Close to no noise the accountants' numerics give out; what they cannot bound is not
        # private enough.
        low, high = (low, middle) if _finite(spent, middle) <= target_epsilon else (middle, high)
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


def _opacus(kind: Any) -> Callable[[Sequence[Mechanism], float], float]:
    def spent(history: Sequence[Mechanism], delta: float) -> float:
        from opacus import accountants

        accountant = getattr(accountants, kind)()
        accountant.history = [(one.noise_multiplier, one.sample_rate, one.steps) for one in history]
        with warnings.catch_warnings():
            # "optimal order is the largest alpha": the bound holds, another order would be tighter
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta=delta))

    return spent


def _pld(history: Sequence[Mechanism], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    # Rounded up to multiples of 1e-3 the bound is still one; it differs in the fourth digit from
    # the default's and is ten times as fast.
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for one in history:
        accountant.compose(
            PoissonSampledDpEvent(one.sample_rate, GaussianDpEvent(one.noise_multiplier)), one.steps
        )
    return float(accountant.get_epsilon(delta))


ACCOUNTANTS: dict[str, Callable[[Sequence[Mechanism], float], float]] = {
    "rdp": _opacus("RDPAccountant"),
    "prv": _opacus("PRVAccountant"),
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
            (
                "noise comes from torch's generator in floating point, which is not made for"
                " adversaries who see its bits"
            ),
            *notes,
        )
        size, expected = sampling.dataset_size, sampling.expected_batch_size
        return cls(
            epsilon(history, delta, accountant),
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
