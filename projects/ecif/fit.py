"""Training to a minimum, and the curvature there: what an influence function is the
derivative of.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from projects.ecif.influence import Contrastive
from projects.ecif.towers import linear_layers
from shared.errors import UserError
from shared.influence.baselines import Solve
from shared.influence.ekfac import layer_moments
from shared.influence.retrain import Root, minimise
from shared.influence.scoring import check_converged
from shared.influence.solvers import (
    cg,
    dense,
    factored,
    galerkin,
    logra_basis,
    matrix_of,
    require_positive,
)

# The regulariser's weight is far above 1, so that the minimum is nearer than this.
GRADIENT_TOLERANCE = 1e-6
Basis = Literal["leading", "random"]


@dataclass(frozen=True, eq=False)
class Fit:
    """A trained problem: parameters w [p], the gradient's norm there, and the Hessian [p, p] where
    it was asked for.
    """

    problem: Contrastive
    w: Tensor
    gradient_norm: float
    hessian: Tensor | None

    @cached_property
    def solve(self) -> Solve:
        """b -> H^-1 b by the whole Hessian, which must have been asked for; factored once."""
        assert self.hessian is not None
        return factored(self.hessian)

    def without(self, removed: Iterable[int]) -> Root:
        """The minimum without some pairs, from this one: the same partition, the same theta_0, in
        the coordinates of the Hessian here.
        """
        return minimise(
            self.problem.without(removed).objective(),
            self.w,
            tol=GRADIENT_TOLERANCE,
            like=self.hessian,
        )


def fit(
    problem: Contrastive,
    start: Tensor | None = None,
    tol: float = GRADIENT_TOLERANCE,
    hessian: bool = True,
) -> Fit:
    """Train to a minimum from `start` (theta_0), float64.

    Raises:
        UserError: the gradient did not fall to `tol`, the loss is not finite, or the Hessian is
            indefinite.
    """
    begin = start if start is not None else problem.centre
    if begin is None:
        raise UserError("training needs a start; give one, or a centre")
    if begin.dtype != torch.float64:
        raise UserError(f"training to a gradient of {tol:g} needs float64, not {begin.dtype}")
    objective = problem.objective()
    # the coordinates as they are
    identity = torch.eye(begin.numel(), dtype=begin.dtype, device=begin.device)
    root = minimise(objective, begin, tol=tol, iterations=5000, like=identity)
    if not hessian:
        return Fit(problem, root.w, root.residual, None)
    matrix = matrix_of(objective.hessian(root.w), root.w)
    require_positive(matrix.matmul, root.w)
    return Fit(problem, root.w, root.residual, matrix)


def solver(
    problem: Contrastive,
    w: Tensor,
    name: str,
    damping: float = 0.0,
    rank: int = 16,
    seed: int = 0,
    tol: float = 1e-6,
    basis: Basis = "leading",
) -> Solve:
    """How H^-1 b is found, with H that of the problem at w.

    Args:
        name: "cg" (Hessian, residual checked), "ggn" (Gauss-Newton matrix, which has no negative
            eigenvalue, by CG), "dense" (Hessian, checked for being positive definite), or "logra"
            (Hessian within `rank` directions a side of every layer, checked for being positive
            definite there: an approximation, whose residual is not checked).
        damping: added to the diagonal.
        basis: which directions "logra" takes, see `projection`.

    Raises:
        UserError: an unknown name; and when it is used, what the solvers refuse.
    """
    objective = problem.objective()
    if name == "cg":
        return partial(cg, objective.hessian(w), damping=damping, tol=tol)
    if name == "ggn":
        return partial(cg, objective.ggn(w), damping=damping, tol=tol)
    if name == "dense":
        matrix = matrix_of(objective.hessian(w), w)
        require_positive(matrix.matmul, w, damping)
        return partial(dense, matrix, damping=damping, tol=tol)
    if name == "logra":
        columns = projection(problem, w, rank, seed, basis)
        return partial(galerkin, objective.hessian(w), basis=columns, damping=damping)
    raise UserError(f"the solver is one of cg, ggn, dense, logra, not '{name}'")


def projection(problem: Contrastive, w: Tensor, rank: int, seed: int, basis: Basis) -> Tensor:
    """What LoGra projects gradients to, [p, d] with orthonormal columns: of every linear layer
    `rank` directions of its inputs times `rank` of its outputs, and the temperature.

    Args:
        basis: "leading" (the eigenvectors of the second moments of the layer's inputs and of the
            gradients of its outputs with the largest eigenvalues, over the training batches), or
            "random" (drawn from `seed`).
    """
    whole, moments = problem.towers.parameters, None
    if basis == "leading":
        layers, rows = linear_layers(whole)
        of_layers = layer_moments(
            layers, w[rows], problem.losses_of_layers(w, rows), problem.pairs.data, problem.chunk
        )
        moments = {f"{name}.weight": both for name, both in of_layers.items()}
    return logra_basis(whole, rank, seed, w, moments)


def check_trained(problem: Contrastive, w: Tensor, tol: float) -> float:
    """The gradient's norm at w. UserError for a loss that is not finite or a norm above `tol`: a
    score is the derivative of an optimum.
    """
    objective = problem.objective()
    objective.sample_losses(w)
    return check_converged(objective.gradient(w), tol)
