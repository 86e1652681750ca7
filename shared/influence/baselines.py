"""Scores of training samples for a metric, all with one signature and in the package's one
convention.

    scores = method(objective, w, metric, ...)

`metric(w)` is a scalar or, for several queries, [q]; scores are [n] or [n, q]: the predicted change
of the metric when a sample is removed. For a metric that is a loss, positive is helpful. Methods
that give no such prediction (loss, chance) give an order alone.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vjp, vmap

from shared.errors import UserError
from shared.influence import products
from shared.influence.objective import Objective
from shared.influence.products import Data
from shared.influence.solvers import Solved, identity
from shared.seeding import generator, step_seed

Metric = Callable[[Tensor], Tensor]
Solve = Callable[[Tensor], Solved]  # e.g. partial(cg, objective.hessian(w)), or EKFAC.solve


# ---- influence functions -------------------------------------------------------------------------


def metric_gradient(metric: Metric, w: Tensor) -> Tensor:
    """Gradient of a scalar metric, [p], or the gradients of q metrics as columns, [p, q]."""
    value, pull, *_ = vjp(metric, w)
    products.note("gradients", max(1, value.numel()))
    if value.dim() == 0:
        return pull(torch.ones_like(value))[0]
    if value.dim() != 1:
        raise UserError(
            f"a metric is a number or a list of numbers, not of shape {tuple(value.shape)}"
        )
    return vmap(lambda one: pull(one)[0], out_dims=1)(
        torch.eye(value.numel(), dtype=value.dtype, device=value.device)
    )


def removal_effect(objective: Objective, w: Tensor, samples: Sequence[int], solve: Solve) -> Tensor:
    """Predicted w_without_k - w = A^-1 grad l_k(w) m_k / n for each of the samples: columns of [p,
    samples].
    """
    rows = torch.tensor(list(samples), dtype=torch.long, device=w.device)
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < objective.n:
        raise UserError(
            f"there are samples 0 to {objective.n - 1}, not {int(rows.min())} to {int(rows.max())}"
        )
    return solve(objective.sample_gradients(w, rows).T * objective.removal_weights(w)[rows])[0]


def influence(objective: Objective, w: Tensor, metric: Metric, solve: Solve) -> Tensor:
    """Influence function (Koh and Liang 2017): grad metric . A^-1 grad l_k m_k / n.

    One solve per query and one forward-mode pass; A is what `solve` inverts, symmetric, with the
    regulariser: the Hessian, the Gauss-Newton matrix, EK-FAC. To report how it was solved, call
    `solve` on `metric_gradient` and give its x to `scores_along`.
    """
    return scores_along(objective, w, solve(metric_gradient(metric, w))[0])


def scores_along(objective: Objective, w: Tensor, s: Tensor) -> Tensor:
    """s . grad l_k(w) m_k / n of every sample, for s [p] = A^-1 grad metric or several, [p, q]."""
    dots = objective.sample_dots(w, s)
    weights = objective.removal_weights(w)
    return dots * (weights if dots.dim() == 1 else weights.unsqueeze(1))


def self_influence(objective: Objective, w: Tensor, solve: Solve, chunk: int = 256) -> Tensor:
    """grad l_k . A^-1 grad l_k m_k / n: how much its own loss would rise, [n]. Not negative; high
    for what the others do not explain.

    One solve per sample, so it is meant for solvers that factor once (`dense`, `woodbury`, EK-FAC).
    """
    found = []
    for rows in torch.arange(objective.n, device=w.device).split(chunk):
        gradients = objective.sample_gradients(w, rows)
        found.append((gradients * solve(gradients.T)[0].T).sum(1))
    return torch.cat(found) * objective.removal_weights(w)


def gradient_dot(objective: Objective, w: Tensor, metric: Metric) -> Tensor:
    """Influence with the identity for the curvature."""
    return influence(objective, w, metric, identity)


# ---- other methods -------------------------------------------------------------------------------


def tracin(
    objective: Objective,
    checkpoints: Sequence[Tensor],
    learning_rates: Sequence[float],
    metric: Metric,
) -> Tensor:
    """TracIn (Pruthi et al. 2020): sum over checkpoints of learning rate x grad metric . grad l_k
    m_k / n.

    The learning rate of a checkpoint stands for all steps up to the next one: a rate times the
    steps it held for gives the scale of a change of the metric.
    """
    if len(checkpoints) != len(learning_rates) or not checkpoints:
        raise UserError(
            f"TracIn needs a learning rate per checkpoint; there are {len(learning_rates)} for"
            f" {len(checkpoints)}"
        )
    parts = [
        rate * gradient_dot(objective, w, metric)
        for w, rate in zip(checkpoints, learning_rates, strict=True)
    ]
    return torch.stack(parts).sum(0)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) of the labels' softmax probabilities: logits [n, c], labels [n] -> [n]."""
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    is_own = torch.arange(logits.shape[1], device=labels.device) == labels.unsqueeze(1)
    return own - torch.where(is_own, -math.inf, logits).logsumexp(1)


def trak(
    sample_margins: Callable[[Tensor, Data], Tensor],
    data: Data,
    ensemble: Sequence[Tensor],
    metric: Metric,
    *,
    dimension: int,
    seed: int,
    damping: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """TRAK (Park et al. 2023), for losses that are log(1 + exp(-margin)): cross-entropy, with
    `margins`.

    Gradients of the margins, projected at random to `dimension` numbers, are the features of a
    linear logistic regression, whose influence function it is: score_k = -(P^T grad metric)^T
    (Phi^T Phi)^-1 phi_k (1 - p_k). Over an ensemble both the regression and 1 - p are averaged, as
    in the paper. With the margin of a query for a metric this is minus the paper's tau, which
    predicts the effect of a sample's presence.

    Args:
        sample_margins: (w, data) -> [samples].
        ensemble: the parameters of one or more trained models.
        damping: added to Phi^T Phi, relative to its mean diagonal; needed where there are fewer
            samples than dimensions.
    """
    if not ensemble:
        raise UserError("TRAK needs at least one trained model")
    parts, slopes = [], []
    for number, w in enumerate(ensemble):
        matrix = projection(w.numel(), dimension, step_seed(seed, "trak", number), w)
        features = products.per_sample_gradients(sample_margins, w, data, chunk, matrix)
        parts.append(feature_regression(features, matrix.T @ metric_gradient(metric, w), damping))
        with torch.no_grad():
            slopes.append(
                torch.sigmoid(
                    -torch.cat([sample_margins(w, piece) for piece in products.chunks(data, chunk)])
                )
            )
    slope = torch.stack(slopes).mean(0)
    regression = torch.stack(parts).mean(0)
    return -regression * (slope if regression.dim() == 1 else slope.unsqueeze(1))


def feature_regression(features: Tensor, query: Tensor, damping: float) -> Tensor:
    """Phi (Phi^T Phi + damping)^-1 q, TRAK's inner step, of features Phi [n, d] and a query [d] or
    several [d, q]: [n] or [n, q].

    UserError where Phi^T Phi with `damping`, relative to its mean diagonal, is singular.
    """
    gram = features.T @ features
    gram.diagonal().add_(damping * gram.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        size = len(gram)
        raise UserError(
            f"TRAK's {size} x {size} matrix of {len(features)} samples is singular; add damping or"
            " project to less"
        )
    columns = query if query.dim() == 2 else query.unsqueeze(1)
    return (features @ torch.cholesky_solve(columns, factor)).view(len(features), *query.shape[1:])


def projection(size: int, dimension: int, seed: int, like: Tensor) -> Tensor:
    """A random matrix [p, d] of independent signs / sqrt(d), which keeps dot products in the mean;
    the identity where d is p or more.
    """
    if dimension < 1:
        raise UserError(f"a random projection needs at least 1 dimension, not {dimension}")
    if dimension >= size:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    signs = torch.randint(
        0, 2, (size, dimension), generator=generator(seed, "projection"), dtype=torch.int8
    )
    return (2 * signs - 1).to(like) / math.sqrt(dimension)


def loss_value(objective: Objective, w: Tensor) -> Tensor:
    """Minus the sample's own loss, [n]: the higher the loss, the more harmful. The order is what
    counts.
    """
    return -objective.sample_losses(w)


def chance(n: int, seed: int) -> Tensor:
    """Scores drawn at random, [n]."""
    return torch.randn(n, generator=generator(seed, "chance"), dtype=torch.float64)
