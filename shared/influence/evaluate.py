"""How well scores agree with the truth. Correlations and areas are SciPy's and scikit-learn's; the
protocols are here.

Scores follow the package's convention: the predicted change of a metric when a sample is removed.
`harm` is minus the score of a loss.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn import metrics

from shared.errors import UserError

Statistic = Callable[[np.ndarray, np.ndarray], float]


# ---- correlation ---------------------------------------------------------------------------------


def pearson(predicted: ArrayLike, true: ArrayLike) -> float:
    """Pearson's correlation of two [m]. UserError when one is constant, where there is none."""
    a, b = _pair(predicted, true)
    return float(np.clip(stats.pearsonr(a, b).statistic, -1, 1))


def spearman(predicted: ArrayLike, true: ArrayLike) -> float:
    """Rank correlation of two [m]. UserError when one is constant, where there is none."""
    a, b = _pair(predicted, true)
    return float(stats.spearmanr(a, b).statistic)


def subset_predictions(scores: ArrayLike, kept: ArrayLike) -> np.ndarray:
    """The change of the metric that additive scores predict for training on subsets: the sum over
    what is left out.

    Args:
        scores: [n] or, for several queries, [n, q].
        kept: [m, n] of bool.

    Returns:
        [m] or [m, q].
    """
    mask, values = np.asarray(kept, dtype=bool), np.asarray(scores, dtype=np.float64)
    if mask.shape[1:] != values.shape[:1]:
        raise UserError(
            f"scores of {values.shape[0]} samples do not go with subsets of {mask.shape[1]}"
        )
    return (~mask).astype(np.float64) @ values


def lds(scores: ArrayLike, kept: ArrayLike, outcomes: ArrayLike) -> float:
    """Linear datamodelling score (Park et al. 2023): the rank correlation of predicted and true
    metric over subsets, mean over queries.

    Args:
        scores: [n] or [n, q].
        kept: [m, n] of bool, from `retrain.subsets`.
        outcomes: the metric after training on each subset, [m] or [m, q].
    """
    predicted = np.atleast_2d(subset_predictions(scores, kept).T)
    true = np.atleast_2d(np.asarray(outcomes, dtype=np.float64).T)
    if predicted.shape != true.shape:
        raise UserError(
            f"scores predict {predicted.T.shape} outcomes and {true.T.shape} are given; they must"
            " be of the same queries"
        )
    return float(np.mean([spearman(a, b) for a, b in zip(predicted, true, strict=True)]))


def noise_ceiling(first: ArrayLike, second: ArrayLike, statistic: Statistic = pearson) -> float:
    """The agreement of the truth with itself: the true effects under two seeds of the optimiser,
    [m] each.

    No predictor that is blind to the seed can be expected to agree with one of them much better
    than this.
    """
    return statistic(np.asarray(first), np.asarray(second))


# ---- parameters ----------------------------------------------------------------------------------


def cosine(predicted: ArrayLike, true: ArrayLike) -> np.ndarray:
    """Cosine of predicted and true changes of the parameters, [..., p] -> [...]; 0 where one of
    them is 0.
    """
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.where(sizes == 0, 1, sizes))


def relative_error(predicted: ArrayLike, true: ArrayLike) -> np.ndarray:
    """|predicted - true| / |true|, [..., p] -> [...]."""
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    return np.asarray(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1))


# ---- detection -----------------------------------------------------------------------------------


def auroc(harm: ArrayLike, corrupted: ArrayLike) -> float:
    """Area under the ROC curve of finding the corrupted samples [n] (bool) by their harm [n]."""
    return float(metrics.roc_auc_score(_both_kinds(corrupted), np.asarray(harm)))


def average_precision(harm: ArrayLike, corrupted: ArrayLike) -> float:
    """Average precision of the same."""
    return float(metrics.average_precision_score(_both_kinds(corrupted), np.asarray(harm)))


def precision_at(harm: ArrayLike, corrupted: ArrayLike, k: int) -> float:
    """The share of corrupted samples among the k most harmful; of equally harmful ones the first
    are taken.
    """
    mask = np.asarray(corrupted, dtype=bool)
    if not 0 < k <= mask.size:
        raise UserError(f"precision at {k} needs 1 to {mask.size} samples")
    return float(mask[most_harmful(harm)[:k]].mean())


def found_share(harm: ArrayLike, corrupted: ArrayLike, inspected: Sequence[float]) -> list[float]:
    """The share of all corrupted samples found by inspecting these shares of the data, the most
    harmful first.
    """
    mask = _both_kinds(corrupted)
    found = np.concatenate([[0], np.cumsum(mask[most_harmful(harm)])]) / mask.sum()
    return [float(found[round(share * mask.size)]) for share in inspected]


def most_harmful(harm: ArrayLike) -> np.ndarray:
    """Indices by falling harm; equals stay in order."""
    return np.argsort(-np.asarray(harm, dtype=np.float64), kind="stable")


def removal_curve(
    harm: ArrayLike, shares: Sequence[float], outcome: Callable[[list[int]], float]
) -> list[float]:
    """The metric after training without the most harmful shares of the data; `outcome` retrains
    without the samples it is given.
    """
    order = most_harmful(harm)
    return [outcome(order[: round(share * order.size)].tolist()) for share in shares]


# ---- checks --------------------------------------------------------------------------------------


def _pair(predicted: ArrayLike, true: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size < 2:
        raise UserError(
            f"a correlation needs two lists of the same length, at least 2, not {a.shape} and"
            f" {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("a correlation needs finite numbers")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise UserError(
            f"the {'predicted' if np.ptp(a) == 0 else 'true'} values are all equal: there is no"
            " correlation"
        )
    return a, b


def _both_kinds(corrupted: ArrayLike) -> np.ndarray:
    mask = np.asarray(corrupted, dtype=bool)
    if mask.all() or not mask.any():
        raise UserError("detection needs some corrupted samples and some clean ones")
    return mask
