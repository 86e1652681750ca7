"""A training run of SAM with batches as a function of the samples' weights, and how removal changes
where it ends.

With the batch B_t of step t, m_i the weight of sample i, and L_B(w) = (1/|B|) sum_{i in B} m_i
l_i(w):

    g = grad L_B(w),  wt = w + rho g / (|g| + 1e-12),  v <- momentum v + grad L_B(wt) + l2 w,  w <-
    w - lr_t v

Removal of sample k is m_k = 0. To first order the end moves by -dw_T/dm_k, for which there are
three estimates:

* `unrolled_effects`: the exact tangent of the run, by forward mode through every step, for some
  samples at a time; memory does not grow with the number of steps.
* `Gif` (theorem 4.6 of the paper): all Hessian terms left out. What stays of dw_T/dm_k is - sum
  over the steps with k in B_t of (lr_t / |B_t|) grad l_k(wt_t), with the decay that l2 and momentum
  alone give: TracIn at the perturbed points.
* `gif_checkpoints`: the same from saved weights, each with its learning rate, and one perturbation
  for all samples.

The body of the paper could not be read: that its GIF leaves out the Hessian terms is told by its
reviews; the recursion is derived here.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from projects.sam_if.estimators import Estimator
from projects.sam_if.fixed_point import SAMProblem
from projects.sam_if.sam import TINY
from shared.errors import UserError
from shared.influence.baselines import Metric, metric_gradient
from shared.influence.retrain import check_removed
from shared.seeding import generator


@dataclass(frozen=True)
class Step:
    """One step: the samples of the batch and the learning rate."""

    rows: Tensor
    lr: float


@dataclass(frozen=True, eq=False)
class Recipe:
    """A training run: fixed batches, learning rates, momentum, and where it starts. The regulariser
    is the objective's l2.

    Attributes:
        problem: its objective must have centre 0; its own batches are not used, as each step has
            its batch and its perturbation.
        kept: hold the weights of every step once the run has been made, so that what follows it
            several times makes it once; for small models.
    """

    problem: SAMProblem
    w0: Tensor
    steps: tuple[Step, ...]
    momentum: float = 0.0
    kept: bool = False

    @classmethod
    def epochs(
        cls,
        problem: SAMProblem,
        w0: Tensor,
        *,
        epochs: int,
        batch: int,
        lr: float,
        seed: int,
        momentum: float = 0.0,
        cosine: bool = False,
        kept: bool = False,
    ) -> "Recipe":
        """Shuffled batches drawn once from the seed; the learning rate constant or falling as a
        cosine to 0.
        """
        n = problem.objective.n
        rows = [
            part
            for epoch in range(epochs)
            for part in torch.randperm(n, generator=generator(seed, "epoch", epoch)).split(
                min(batch, n)
            )
        ]
        rates = [
            lr * (0.5 * (1 + math.cos(math.pi * t / len(rows))) if cosine else 1.0)
            for t in range(len(rows))
        ]
        return cls(
            problem,
            w0,
            tuple(Step(one, rate) for one, rate in zip(rows, rates, strict=True)),
            momentum,
            kept,
        )

    def __post_init__(self) -> None:
        if self.problem.objective.centre is not None:
            raise UserError(
                "a run decays to 0; a regulariser with another centre is for the fixed point alone"
            )
        if not self.steps:
            raise UserError("a training run needs at least one step")

    @cached_property
    def weights(self) -> Tensor:
        """m [n]: 1 where the objective says nothing."""
        objective = self.problem.objective
        return (
            self.w0.new_ones(objective.n)
            if objective.weights is None
            else objective.weights.to(self.w0)
        )

    def losses(self, step: Step, w: Tensor) -> Tensor:
        """The losses of the batch, [batch]."""
        objective = self.problem.objective
        return objective.losses(w, tuple(one[step.rows] for one in objective.data))

    def gradient(self, step: Step, w: Tensor, weights: Tensor) -> Tensor:
        """grad L_B(w) with the batch's weights."""
        return grad(lambda at: (weights * self.losses(step, at)).sum() / len(step.rows))(w)

    def perturbed(self, step: Step, w: Tensor, weights: Tensor) -> Tensor:
        """wt of the batch."""
        if not self.problem.rho:
            return w
        g = self.gradient(step, w, weights)
        return w + self.problem.rho * g / (g.norm() + TINY)

    def advance(
        self, step: Step, w: Tensor, velocity: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of the run: (w, v) after it."""
        slope = (
            self.gradient(step, self.perturbed(step, w, weights), weights)
            + self.problem.objective.l2 * w
        )
        velocity = self.momentum * velocity + slope
        return w - step.lr * velocity, velocity

    def states(self) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """The steps of the run with the objective's own weights, each with w and v before it."""
        places = self._path if self.kept else self._walk(self.weights)
        for step, (w, velocity) in zip(self.steps, places, strict=False):
            yield step, w, velocity

    def _walk(self, m: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """w and v before each step, and at the end, with these weights of the samples."""
        w, velocity = self.w0, torch.zeros_like(self.w0)
        yield w, velocity
        for step in self.steps:
            w, velocity = self.advance(step, w, velocity, m[step.rows])
            yield w, velocity

    @cached_property
    def _path(self) -> list[tuple[Tensor, Tensor]]:
        return list(self._walk(self.weights))

    def train(self, weights: Tensor | None = None) -> Tensor:
        """Where the run ends, w_T [p]: with the objective's own weights, or others [n]. UserError
        when it diverges.
        """
        if weights is None and self.kept:
            return self._finite(self._path[-1][0])
        walk = self._walk(self.weights if weights is None else weights.to(self.w0))
        ((w, _),) = deque(walk, maxlen=1)
        return self._finite(w)

    def retrain(self, weights: Tensor, chunk: int = 64) -> Tensor:
        """Where the runs with other weights of the samples end: [runs, n] -> [runs, p].

        All runs of a chunk make a step together, for they have the same batches.

        Raises:
            UserError: a run diverges.
        """
        ends = []
        for m in weights.to(self.w0).split(chunk):
            w = self.w0.expand(len(m), -1)
            velocity = torch.zeros_like(w)
            for step in self.steps:

                def advance(w: Tensor, v: Tensor, m: Tensor, step: Step = step) -> tuple:
                    return self.advance(step, w, v, m)

                w, velocity = vmap(advance)(w, velocity, m[:, step.rows])
            ends.append(self._finite(w))
        return torch.cat(ends)

    @staticmethod
    def _finite(w: Tensor) -> Tensor:
        if not w.isfinite().all():
            raise UserError(
                "training diverged: the weights are not finite; take a smaller learning rate"
            )
        return w


# ---- exact ---------------------------------------------------------------------------------------


def unrolled_effects(recipe: Recipe, samples: Sequence[int], chunk: int = 64) -> Tensor:
    """Exact first-order change of w_T when each sample is removed: columns of [p, samples].

    Forward mode through the whole run: each step's derivative is taken at the run's own state, for
    `chunk` samples at once.
    """
    ids = check_removed(samples, recipe.problem.objective.n)
    m = recipe.weights
    found = []
    for piece in torch.tensor(ids, dtype=torch.long).split(chunk):
        d_w = recipe.w0.new_zeros(len(piece), recipe.w0.numel())
        d_v = torch.zeros_like(d_w)
        for step, w, velocity in recipe.states():
            own = m[step.rows]
            # dm of the batch for each sample
            directions = (step.rows.unsqueeze(0) == piece.unsqueeze(1)).to(w)

            def tangent(
                dw: Tensor,
                dv: Tensor,
                dm: Tensor,
                step: Step = step,
                at: tuple[Tensor, ...] = (w, velocity, own),
            ) -> tuple:
                return jvp(lambda a, b, c: recipe.advance(step, a, b, c), at, (dw, dv, dm))[1]

            d_w, d_v = vmap(tangent)(d_w, d_v, directions)
        found.append(-d_w * m[piece].unsqueeze(1))
    return torch.cat(found).T if found else recipe.w0.new_zeros(recipe.w0.numel(), 0)


# ---- without Hessians ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gif:
    """SAM-GIF over a run: of the tangent of the run only what goes in at each step, carried on by
    l2 and momentum alone.
    """

    recipe: Recipe

    @cached_property
    def carried(self) -> list[float]:
        """By step: how much of a gradient that enters there is in -w_T. lr_t / |B_t| without decay
        and momentum.
        """
        on_w, on_v, shares = 1.0, 0.0, []
        for step in reversed(self.recipe.steps):
            on_v = on_v - step.lr * on_w  # of v after the step, which moves w and the next v
            shares.append(-on_v / len(step.rows))
            on_w, on_v = on_w + self.recipe.problem.objective.l2 * on_v, self.recipe.momentum * on_v
        return shares[::-1]

    def scores(self, metric: Metric) -> Tensor:
        """grad metric(w_T) . removal effect of every sample, [n] or [n, q]: a forward-mode pass
        over each batch of the run, which is made twice, the first time for its end.
        """
        w_end = self.recipe.train()
        direction = metric_gradient(metric, w_end)
        found = direction.new_zeros(self.recipe.problem.objective.n, *direction.shape[1:])
        for share, (step, wt, m) in zip(self.carried, self._perturbed(), strict=True):
            objective = self.recipe.problem.objective
            part = replace(
                objective, data=tuple(one[step.rows] for one in objective.data), weights=None
            )
            dots = part.sample_dots(wt, direction)
            found[step.rows] += share * dots * (m if dots.dim() == 1 else m.unsqueeze(1))
        return found

    def removal_effects(self, samples: Sequence[int]) -> Tensor:
        """Predicted change of w_T when each sample is removed: columns of [p, samples]."""
        ids = check_removed(samples, self.recipe.problem.objective.n)
        out = self.recipe.w0.new_zeros(self.recipe.w0.numel(), len(ids))
        places = {one: column for column, one in enumerate(ids)}
        for share, (step, wt, m) in zip(self.carried, self._perturbed(), strict=True):
            hit = [
                (row, places[one]) for row, one in enumerate(step.rows.tolist()) if one in places
            ]
            if hit:
                rows, columns = torch.tensor(hit).T
                gradients = self.recipe.problem.objective.sample_gradients(wt, step.rows[rows])
                out[:, columns] += share * (gradients * m[rows].unsqueeze(1)).T
        return out

    def removal_effect(self, samples: Sequence[int]) -> Tensor:
        """The sum over the samples, [p], by one gradient a step."""
        return self.joint_effects([samples])[:, 0]

    def joint_effects(self, sets: Sequence[Sequence[int]]) -> Tensor:
        """The sum over each set of samples, columns of [p, sets]; one gradient a step and set."""
        gone = self.recipe.weights.new_zeros(len(sets), self.recipe.problem.objective.n)
        for row, samples in enumerate(sets):
            gone[row, check_removed(samples, self.recipe.problem.objective.n)] = 1
        total = self.recipe.w0.new_zeros(self.recipe.w0.numel(), len(sets))
        for share, (step, wt, m) in zip(self.carried, self._perturbed(), strict=True):
            for column, own in enumerate(gone[:, step.rows]):
                if bool(own.any()):
                    total[:, column] += (
                        share * len(step.rows) * self.recipe.gradient(step, wt, m * own)
                    )
        return total

    def _perturbed(self) -> Iterable[tuple[Step, Tensor, Tensor]]:
        for step, w, _ in self.recipe.states():
            m = self.recipe.weights[step.rows]
            yield step, self.recipe.perturbed(step, w, m), m


def gif_checkpoints(
    problem: SAMProblem, checkpoints: Sequence[Tensor], rates: Sequence[float], metric: Metric
) -> Tensor:
    """SAM-GIF from saved weights: sum over checkpoints of rate x grad metric(last) . grad l_k(wt)
    m_k / n, [n] or [n, q].

    Args:
        checkpoints: the last one is the trained model, whose metric is meant.
        rates: learning rate of each times the steps it stands for.
    """
    if len(checkpoints) != len(rates) or not checkpoints:
        raise UserError(
            f"SAM-GIF needs a learning rate per checkpoint; there are {len(rates)} for"
            f" {len(checkpoints)}"
        )
    direction = metric_gradient(metric, checkpoints[-1])
    return torch.stack(
        [
            rate * Estimator(problem.at(w), "sam_if").along(direction)
            for w, rate in zip(checkpoints, rates, strict=True)
        ]
    ).sum(0)
