"""What ECIF is held against: methods for losses that are a sum over samples, which see a pair only with its own loss; and plainer ranks.

Scores are [n] in the package's convention, below 0 for harmful. The methods are those of `shared.influence`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from projects.ecif.influence import Contrastive
from projects.ecif.loss import pair_losses
from shared.influence import baselines
from shared.influence.baselines import Metric
from shared.influence.ekfac import EKFAC
from shared.influence.params import Parameters
from shared.influence.products import Data
from shared.influence.solvers import Info, Solved, spectral_radius


@dataclass(frozen=True, eq=False)
class Pointwise:
    """The problem as pointwise methods see it: sample n has the loss Pos_n, and that it is a negative of others is not known.

    Has what the methods of `shared.influence.baselines` ask of an `Objective`.
    """

    problem: Contrastive

    @property
    def n(self) -> int:
        return self.problem.pairs.n

    def sample_losses(self, w: Tensor) -> Tensor:
        pairs = self.problem.pairs
        with torch.no_grad():
            return pairs.by_pair(pair_losses(self.problem.towers.logits(w, pairs.inputs), pairs.present))

    def sample_dots(self, w: Tensor, directions: Tensor) -> Tensor:
        found = self.problem.scores_along(w, directions, parts="positive")
        return self.problem.pairs.by_pair(found) * self.problem.pairs.batches

    def removal_weights(self, w: Tensor) -> Tensor:
        return w.new_full((self.n,), 1 / self.problem.pairs.batches)

    def expanded(self) -> Data:
        """For what goes through samples one by one: each pair's whole batch, [n, B, ...] and presence, and the pair's place in it, [n]."""
        pairs = self.problem.pairs
        batch, place = pairs.order // pairs.present.shape[1], pairs.order % pairs.present.shape[1]
        return (*(part[batch] for part in pairs.data), place)

    def own_losses(self, w: Tensor, data: Data) -> Tensor:
        """Pos of the pairs of `expanded` data, [n]."""
        *inputs, present, place = data
        losses = pair_losses(self.problem.towers.logits(w, tuple(inputs)), present)
        return losses.gather(-1, place.unsqueeze(-1)).squeeze(-1)

    def own_margins(self, w: Tensor, data: Data) -> Tensor:
        """TRAK's margin log p / (1 - p) of the pairs, with -log p the mean of the two directions' losses."""
        loss = self.own_losses(w, data) / 2
        return -loss - torch.log(-torch.expm1(-loss))


def if_ekfac(problem: Contrastive, w: Tensor, metric: Metric) -> Tensor:
    """IF-EKFAC: influence with the pair's own loss and EK-FAC of its gradients' second moment (empirical Fisher), damped as is usual.

    EK-FAC covers linear layers: log tau, a single number, is held fixed.
    """
    pointwise, towers = Pointwise(problem), problem.towers
    whole = towers.parameters
    layers = Parameters.of(whole.model, ("*", "!log_tau"), whole.dtype)
    rows = torch.cat([torch.arange(where.start, where.stop) for name, where in whole.slices.items() if name in layers.names]).to(w.device)

    def losses(part: Tensor, data: Data) -> Tensor:
        return pointwise.own_losses(w.detach().index_copy(0, rows, part), data)

    pairs = problem.pairs
    per_batch = pairs.n / pairs.batches  # the objective is a mean over batches, EK-FAC's moment one over pairs
    ekfac = EKFAC.fit(layers, w[rows], losses, pointwise.expanded(), chunk=256, l2=problem.delta / pairs.n)

    def solve(b: Tensor) -> Solved:
        x, info = ekfac.solve(b[rows] / per_batch)
        return torch.zeros_like(b).index_copy(0, rows, x), Info("ekfac", info.relative_residual, 1, 1)

    return baselines.influence(pointwise, w, metric, solve)


def trak(problem: Contrastive, w: Tensor, metric: Metric, *, dimension: int, seed: int) -> Tensor:
    """TRAK with one model: gradients of the pairs' own margins at random `dimension` numbers, a tenth of the mean diagonal as damping."""
    pointwise = Pointwise(problem)
    return baselines.trak(pointwise.own_margins, pointwise.expanded(), [w], metric, dimension=dimension, seed=seed, damping=0.1, chunk=256)


def tracin(problem: Contrastive, checkpoints: Sequence[Tensor], metric: Metric) -> Tensor:
    """TracIn over checkpoints of equal weight, by forward mode: a gradient and a pass each, no gradient of a pair is made."""
    return baselines.tracin(Pointwise(problem), checkpoints, [1.0] * len(checkpoints), metric)


def tracin_by_gradients(problem: Contrastive, checkpoints: Sequence[Tensor], metric: Metric) -> Tensor:
    """The same numbers as TracIn is usually had: every pair's gradient at every checkpoint."""
    parts = [problem.pair_gradients(w, parts="positive") @ baselines.metric_gradient(metric, w) for w in checkpoints]
    return torch.stack(parts).sum(0)


def checkpoints(problem: Contrastive, start: Tensor, w: Tensor, count: int) -> list[Tensor]:
    """Points of the training for TracIn: gradient descent with a fixed step from `start`, and the end w as the last.

    L-BFGS has no learning rate for TracIn to weigh by, so a plain descent with the step 1 / (largest curvature at the end) stands for it.
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
        texts, images, _ = problem.towers.embed(w, pairs.inputs)
        return pairs.by_pair(torch.nn.functional.cosine_similarity(texts, images, dim=-1))


def all_scores(
    problem: Contrastive, w: Tensor, metric: Metric, solve: Callable[[Tensor], Solved], *, start: Tensor, seed: int, dimension: int = 256
) -> dict[str, Callable[[], Tensor]]:
    """Every method's scores as a call, by name, in the order of the tables."""
    return {
        "ECIF": partial(problem.scores, w, metric, solve),
        "ECIF, paper": partial(problem.scores, w, metric, solve, "paper"),
        "positive only": partial(problem.scores, w, metric, solve, "exact", "positive"),
        "IF-EKFAC": partial(if_ekfac, problem, w, metric),
        "TRAK": partial(trak, problem, w, metric, dimension=dimension, seed=seed),
        "TracIn": lambda: tracin(problem, checkpoints(problem, start, w, 5), metric),
        "self-influence": lambda: -problem.self_influence(w, solve),
        "CLIP-score": partial(clip_score, problem, w),
        "pair loss": lambda: baselines.loss_value(Pointwise(problem), w),
        "random": lambda: baselines.chance(problem.pairs.n, seed),
    }
