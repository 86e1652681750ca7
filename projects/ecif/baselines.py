"""The baselines of ECIF: methods for losses that are a sum over samples, which see a pair only
with its own loss; and plainer ranks.

Scores are [n] in the package's convention, below 0 for harmful. The methods are those of
`shared.influence`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from projects.ecif import labels
from projects.ecif.influence import Contrastive
from projects.ecif.loss import pair_losses
from projects.ecif.towers import linear_layers
from shared.influence import baselines
from shared.influence.baselines import Metric
from shared.influence.ekfac import EKFAC
from shared.influence.products import Data, chunks, per_sample_dots
from shared.influence.solvers import Info, Solved, spectral_radius
from shared.seeding import step_seed

TRAK_DAMPING = 0.1  # of the mean diagonal


@dataclass(frozen=True, eq=False)
class Pointwise:
    """The problem as pointwise methods see it: sample n has the loss Pos_n, and that it is a
    negative of others is not known.

    Has what the methods of `shared.influence.baselines` ask of an `Objective`.
    """

    problem: Contrastive

    @property
    def n(self) -> int:
        return self.problem.pairs.n

    def sample_losses(self, w: Tensor) -> Tensor:
        pairs = self.problem.pairs
        with torch.no_grad():
            pieces = chunks(pairs.data, self.problem.chunk)
            return pairs.by_pair(
                torch.cat(
                    [
                        pair_losses(self.problem.towers.logits(w, piece[:-1]), piece[-1])
                        for piece in pieces
                    ]
                )
            )

    def sample_dots(self, w: Tensor, directions: Tensor) -> Tensor:
        found = self.problem.scores_along(w, directions, parts="positive")
        return self.problem.pairs.by_pair(found) * self.problem.pairs.batches

    def removal_weights(self, w: Tensor) -> Tensor:
        return w.new_full((self.n,), 1 / self.problem.pairs.batches)

    def expanded(self) -> Data:
        """For what goes through samples one by one: each pair's whole batch, [n, B, ...] and
        presence, and the pair's place in it, [n].
        """
        pairs = self.problem.pairs
        batch, place = pairs.order // pairs.present.shape[1], pairs.order % pairs.present.shape[1]
        return (*(part[batch] for part in pairs.data), place)

    def own_losses(self, w: Tensor, data: Data) -> Tensor:
        """Pos of the pairs of `expanded` data, [n]."""
        *inputs, present, place = data
        losses = pair_losses(self.problem.towers.logits(w, tuple(inputs)), present)
        return losses.gather(-1, place.unsqueeze(-1)).squeeze(-1)

    def own_margins(self, w: Tensor, data: Data) -> Tensor:
        """TRAK's margin of the pairs."""
        return _margins(self.own_losses(w, data))


def _margins(losses: Tensor) -> Tensor:
    """TRAK's margin log p / (1 - p), with -log p the mean of the two directions' losses."""
    loss = losses / 2
    return -loss - torch.log(-torch.expm1(-loss))


def if_ekfac(problem: Contrastive, w: Tensor, metric: Metric) -> Tensor:
    """IF-EKFAC: influence with the pair's own loss and EK-FAC of its gradients' second moment
    (empirical Fisher), damped as is usual.

    EK-FAC covers linear layers: log tau, a single number, is held fixed.
    """
    pointwise, pairs = Pointwise(problem), problem.pairs
    # the objective is a mean over batches, EK-FAC's moment one over pairs
    per_batch = pairs.n / pairs.batches
    layers, rows = linear_layers(problem.towers.parameters)

    def losses(part: Tensor, data: Data) -> Tensor:
        return pointwise.own_losses(w.detach().index_copy(0, rows, part), data)

    ekfac = EKFAC.fit(
        layers, w[rows], losses, pointwise.expanded(), chunk=256, l2=problem.delta / pairs.n
    )
    return baselines.influence(pointwise, w, metric, _ekfac_solver(ekfac, rows, 1 / per_batch))


def if_ekfac_by_rows(problem: Contrastive, w: Tensor, metric: Metric) -> Tensor:
    """IF-EKFAC for models that cannot go through every pair's whole batch: a sample is what
    passes through a text's or a picture's own forward pass, whosever loss it belongs to. That is
    what tools for sums over samples make of a batch's loss.
    """
    layers, rows = linear_layers(problem.towers.parameters)
    pairs = problem.pairs
    ekfac = EKFAC.fit(
        layers,
        w[rows],
        problem.losses_of_layers(w, rows),
        pairs.data,
        chunk=1,
        l2=problem.delta / pairs.batches,
    )
    return baselines.influence(Pointwise(problem), w, metric, _ekfac_solver(ekfac, rows, 1.0))


def _ekfac_solver(ekfac: EKFAC, rows: Tensor, scale: float) -> baselines.Solve:
    """b -> EK-FAC's inverse of scale * b at `rows` of it, 0 at the other entries."""

    def solve(b: Tensor) -> Solved:
        x, info = ekfac.solve(scale * b[rows])
        return torch.zeros_like(b).index_copy(0, rows, x), Info(
            "ekfac", info.relative_residual, 1, 1
        )

    return solve


def trak(problem: Contrastive, w: Tensor, metric: Metric, *, dimension: int, seed: int) -> Tensor:
    """TRAK with one model: gradients of the pairs' own margins at random `dimension` numbers, a
    tenth of the mean diagonal as damping.
    """
    pointwise = Pointwise(problem)
    options = {"dimension": dimension, "seed": seed, "damping": TRAK_DAMPING, "chunk": 256}
    return baselines.trak(pointwise.own_margins, pointwise.expanded(), [w], metric, **options)


def trak_by_forward_mode(
    problem: Contrastive,
    w: Tensor,
    metric: Metric,
    *,
    dimension: int,
    seed: int,
    at_once: int = 1,
) -> Tensor:
    """The same numbers by forward mode, which makes no gradient of a pair: a pass for `at_once` of
    the dimensions, whose memory grows with them.
    """
    pairs = problem.pairs
    matrix = baselines.projection(w.numel(), dimension, step_seed(seed, "trak", 0), w)

    def margins(at: Tensor, data: Data) -> Tensor:
        return _margins(pair_losses(problem.towers.logits(at, data[:-1]), data[-1]))

    columns = [
        pairs.by_pair(per_sample_dots(margins, w, pairs.data, some, problem.chunk))
        for some in matrix.split(at_once, 1)
    ]
    regression = baselines.feature_regression(
        torch.cat(columns, 1), matrix.T @ baselines.metric_gradient(metric, w), TRAK_DAMPING
    )
    return -regression * torch.sigmoid(-_margins(Pointwise(problem).sample_losses(w)))


def tracin(problem: Contrastive, checkpoints: Sequence[Tensor], metric: Metric) -> Tensor:
    """TracIn over checkpoints of equal weight, by forward mode: a gradient and a pass each, no
    gradient of a pair is made.
    """
    return baselines.tracin(Pointwise(problem), checkpoints, [1.0] * len(checkpoints), metric)


def tracin_by_gradients(
    problem: Contrastive, checkpoints: Sequence[Tensor], metric: Metric
) -> Tensor:
    """The same numbers as TracIn is usually had: every pair's gradient at every checkpoint."""
    parts = [
        problem.pair_gradients(w, parts="positive") @ baselines.metric_gradient(metric, w)
        for w in checkpoints
    ]
    return torch.stack(parts).sum(0)


def checkpoints(problem: Contrastive, start: Tensor, w: Tensor, count: int) -> list[Tensor]:
    """Points of the training for TracIn: gradient descent with a fixed step from `start`, and the
    end w as the last.

    L-BFGS has no learning rate for TracIn to weigh by, so a plain descent with the step 1 /
    (largest curvature at the end) stands for it.
    """
    objective = problem.objective()
    step = 1 / spectral_radius(objective.hessian(w), w)
    at, found = start.clone(), []
    for number in range(1, 10 * (count - 1) + 1):
        at = at - step * objective.gradient(at)
        if number % 10 == 0:
            found.append(at)
    return [*found, w]


def clip_score(problem: Contrastive, w: Tensor) -> Tensor:
    """The cosine of a pair's own text and image: the lower, the more harmful."""
    pairs = problem.pairs
    with torch.no_grad():
        pieces = [
            problem.towers.embed(w, piece)[:2] for piece in chunks(pairs.inputs, problem.chunk)
        ]
        return pairs.by_pair(
            torch.cat(
                [
                    torch.nn.functional.cosine_similarity(texts, images, dim=-1)
                    for texts, images in pieces
                ]
            )
        )


def all_scores(
    problem: Contrastive,
    w: Tensor,
    metric: Metric,
    solve: Callable[[Tensor], Solved],
    *,
    start: Tensor,
    seed: int,
    dimension: int = 256,
) -> dict[str, Callable[[], Tensor]]:
    """Every method's scores as a call, by name, in the order of the tables."""
    return {
        labels.ECIF: partial(problem.scores, w, metric, solve),
        labels.ECIF_LINEAR: partial(problem.scores, w, metric, solve, "paper"),
        labels.POSITIVE_ONLY: partial(problem.scores, w, metric, solve, "exact", "positive"),
        labels.IF_EKFAC: partial(if_ekfac, problem, w, metric),
        labels.TRAK: partial(trak, problem, w, metric, dimension=dimension, seed=seed),
        labels.TRACIN: lambda: tracin(problem, checkpoints(problem, start, w, 5), metric),
        labels.SELF_INFLUENCE: lambda: -problem.self_influence(w, solve),
        labels.CLIP_SCORE: partial(clip_score, problem, w),
        labels.PAIR_LOSS: lambda: baselines.loss_value(Pointwise(problem), w),
        labels.RANDOM: lambda: baselines.chance(problem.pairs.n, seed),
    }


def scores_by_passes(
    problem: Contrastive,
    w: Tensor,
    validation: Contrastive,
    solve: baselines.Solve,
    *,
    points: Sequence[Tensor],
    seed: int,
    dimension: int,
    at_once: int = 1,
) -> dict[str, Callable[[], Tensor]]:
    """Methods' scores for the mean loss of `validation` as calls, for a model of which a gradient
    of each pair, or the graph of all validation pairs at once, is too much: forward-mode passes,
    and chunks. `points` are TracIn's, `at_once` TRAK's (`trak_by_forward_mode`).
    """

    def to_first_order(at: Tensor) -> Metric:
        g = validation.mean_gradient(at)  # whose gradient is g, at the cost of a product
        return lambda other: other @ g

    return {
        labels.ECIF: lambda: problem.scores(w, to_first_order(w), solve),
        labels.IF_EKFAC: lambda: if_ekfac_by_rows(problem, w, to_first_order(w)),
        labels.TRAK: lambda: trak_by_forward_mode(
            problem, w, to_first_order(w), dimension=dimension, seed=seed, at_once=at_once
        ),
        labels.TRACIN: lambda: torch.stack(
            [tracin(problem, [at], to_first_order(at)) for at in points]
        ).sum(0),
        labels.CLIP_SCORE: partial(clip_score, problem, w),
        labels.PAIR_LOSS: lambda: baselines.loss_value(Pointwise(problem), w),
        labels.RANDOM: lambda: baselines.chance(problem.pairs.n, seed),
    }
