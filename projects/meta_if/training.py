"""Meta-training, and retraining without some data: plain autodiff of the composed objective, no
formula of `total`.

At the solution theta of an inner problem, steps theta <- theta - A d_theta L_I(lam, theta) with the
constant A = H_in^-1 are a function of lam near theta(lam): the first step's error is of second
order in the change of lam, and each further step multiplies it by another order. So autodiff of the
composed objective is exact: with one step for its gradient, with two for its Hessian.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp, vmap

from projects.meta_if.problems import Adapted, MamlUnrolled, MetaProblem
from shared.errors import UserError
from shared.influence.products import Data
from shared.influence.retrain import Root, minimise

DENSE_OUTER = 3000  # up to here the Hessian of the outer objective is formed to end a training


@dataclass(frozen=True)
class Fitted:
    """A meta-training: lam [q], the norm of the total gradient there, and the points of gradient
    descent with the rate x steps of each.
    """

    lam: Tensor
    gradient_norm: float
    checkpoints: tuple[Tensor, ...]
    rates: tuple[float, ...]


def composed_losses(
    problem: MetaProblem,
    lam: Tensor,
    theta: Tensor,
    factor: Tensor | None,
    data: Data,
    order: int = 2,
) -> Tensor:
    """L_O(lam, theta(lam)) of tasks, [n], as a function of lam near where theta [n, p] and factor
    [n, p, p] solve the inner problems.

    Args:
        theta, factor: not used for unrolled steps, which are differentiated as they are.
        order: derivatives up to this one are right.
    """

    def unrolled(task: Data) -> Tensor:
        one = problem.inner.start(lam)
        for _ in range(problem.inner.steps):
            one = one - problem.inner.rate * grad(problem.inner_loss, argnums=1)(lam, one, task)
        return problem.outer_loss(lam, one, task)

    if isinstance(problem.inner, MamlUnrolled):
        return vmap(unrolled)(data)

    def implicit(th: Tensor, chol: Tensor, task: Data) -> Tensor:
        prepared = (problem.inner.prepare(lam, task[0]), *task[1:3])
        for _ in range(order):
            th = th - torch.cholesky_solve(
                grad(problem.prepared_loss, argnums=1)(lam, th, prepared).unsqueeze(1), chol
            ).squeeze(1)
        return problem.outer_loss(lam, th, task)

    return vmap(implicit)(theta, factor, data)


class Composed:
    """The outer objective as a function of lam, with the inner problems solved at each lam; convex
    ones from where they were last.
    """

    def __init__(self, problem: MetaProblem):
        self.problem, self._last = problem, None
        self.evaluations = 0

    def solved(self, lam: Tensor) -> Adapted | None:
        """The inner solutions at lam; None for unrolled steps."""
        if isinstance(self.problem.inner, MamlUnrolled):
            return None
        if self._last is None or not torch.equal(self._last[0], lam):
            start = (
                self._last[1].theta
                if self._last is not None and self.problem.inner.convex
                else None
            )
            self._last = (lam.detach().clone(), self.problem.adapt(lam.detach(), start))
        return self._last[1]

    def near(self, lam: Tensor, order: int = 2) -> Callable[[Tensor], Tensor]:
        """The objective as a function that is right up to the derivatives of this order at lam."""
        found = self.solved(lam)

        def objective(other: Tensor) -> Tensor:
            total = self.problem.l2 / 2 * other.square().sum()
            for rows in self.problem.chunks():
                th, chol = (
                    (None, None) if found is None else (found.theta[rows], found.factor[rows])
                )
                losses = composed_losses(
                    self.problem, other, th, chol, self.problem.part(rows), order
                )
                total = total + (self.problem.task_weights[rows] * losses).sum()
            return total

        return objective

    def value(self, lam: Tensor) -> Tensor:
        """The objective at lam; may be differentiated once, with the inner residual's accuracy."""
        return self.near(lam, order=1)(lam)

    def gradient_and_value(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """As autodiff of `value`, and faster: the inner problems are solved outside of it."""
        return grad_and_value(self.near(lam, order=1))(lam)

    def gradient(self, lam: Tensor) -> Tensor:
        """Its total gradient at lam, [q]."""
        self.evaluations += 1
        # one step would do, were the inner problems solved exactly; a second squares their residual
        return grad(self.near(lam))(lam)

    def hessian(self, lam: Tensor, chunk: int = 16) -> Tensor:
        """Its total Hessian at lam, [q, q]; `chunk` columns at once (more are slower on a CPU)."""
        # it is symmetric: a backward through the gradient's graph, made once, is a column
        _, pull, *_ = vjp(grad(self.near(lam)), lam)
        eye = torch.eye(lam.numel(), dtype=lam.dtype, device=lam.device)
        return vmap(lambda v: pull(v)[0], out_dims=1, chunk_size=chunk)(eye)


# ---- training ------------------------------------------------------------------------------------


def fit(
    problem: MetaProblem,
    lam: Tensor,
    *,
    steps: int = 100,
    rate: float = 0.5,
    tol: float = 1e-9,
    iterations: int = 2000,
    checkpoints: int = 5,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda items: items,
) -> Fitted:
    """Meta-train from lam: gradient descent (whose points TracIn takes), L-BFGS, and Newton's
    method where its matrix can be formed.

    Args:
        steps, rate: of gradient descent.
        tol: norm of the total gradient to end at.
        checkpoints: so many points of gradient descent are kept, each for steps / checkpoints
            steps.

    Raises:
        UserError: the loss is not finite, or the gradient does not fall to `tol`.
    """
    composed = Composed(problem)
    kept = []
    for step in progress(range(steps)):
        if checkpoints and step % max(1, steps // checkpoints) == 0 and len(kept) < checkpoints:
            kept.append(lam)
        lam = lam - rate * composed.gradient(lam)
        if not lam.isfinite().all():
            raise UserError(
                f"the loss is not finite after {step + 1} steps of gradient descent; lower the"
                " rate, or look at the data"
            )
    dense = lam.numel() <= DENSE_OUTER
    rough = minimise(
        composed.value,
        lam,
        tol=1e-3 if dense else tol,
        iterations=iterations,
        polish=False,
        both=composed.gradient_and_value,
    )
    root = polish(composed, rough.w, tol=tol) if dense else rough
    held = steps * rate / max(1, len(kept))
    return Fitted(root.w, root.residual, tuple(kept), (held,) * len(kept))


def polish(
    composed: Composed,
    lam: Tensor,
    *,
    tol: float = 1e-9,
    matrix: Tensor | None = None,
    iterations: int = 200,
) -> Root:
    """A minimum near lam: BFGS that starts from the Hessian.

    Where a step does not lower the gradient's norm, the Hessian is formed there, made positive, and
    a step of descent is searched for. `matrix` is a first Hessian, of another point or of other
    weights; what is found is a root of the gradient whatever it is.

    Raises:
        UserError: the gradient does not fall to `tol`.
    """
    slope = composed.gradient(lam)
    inverse = None if matrix is None else _inverse(matrix)
    for step in range(iterations):
        size = float(slope.norm())
        if size <= tol:
            return Root(lam, size, step)
        found = None if inverse is None else _straight(composed, lam, slope, inverse)
        if found is None:
            inverse = _inverse(composed.hessian(lam))
            found = _straight(composed, lam, slope, inverse) or _downhill(
                composed, lam, slope, inverse
            )
        if found is None:
            break
        inverse = _bfgs(inverse, found[0] - lam, found[1] - slope)
        lam, slope = found
    raise UserError(
        f"meta-training stopped at a total gradient of norm {float(slope.norm()):.2g}, not {tol:g};"
        " regularise more (l2)"
    )


def _inverse(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric matrix with its eigenvalues made positive."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors @ (
        (1 / values.abs().clamp(min=1e-3 * float(values.abs().max()))).unsqueeze(1) * vectors.T
    )


def _bfgs(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """The inverse Hessian after a step and the change of the gradient along it; as it was where the
    curvature along it is not positive.
    """
    bend = step @ change
    if bend <= 0:
        return inverse
    moved = inverse @ change
    outer = torch.outer(moved, step)
    return (
        inverse
        - (outer + outer.T) / bend
        + (1 + change @ moved / bend) * torch.outer(step, step) / bend
    )


def _straight(
    composed: Composed, lam: Tensor, slope: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The whole step and the gradient after it, where that is smaller."""
    there = lam - inverse @ slope
    try:
        after = composed.gradient(there)
    except UserError:  # so far away that an inner problem has no solution
        return None
    return (there, after) if float(after.norm()) < 0.9 * float(slope.norm()) else None


def _downhill(
    composed: Composed, lam: Tensor, slope: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The first of ever shorter steps that lowers the objective, and the gradient after it."""
    direction = inverse @ slope
    before, expected = float(composed.value(lam)), 1e-4 * float(slope @ direction)
    for halvings in range(20):
        there = lam - direction * 0.5**halvings
        try:
            after, value = composed.gradient(there), float(composed.value(there))
        except UserError:
            continue
        if value < before - expected * 0.5**halvings:
            return there, after
    return None


def retrain(
    problem: MetaProblem, fitted: Tensor, matrix: Tensor | None = None, tol: float = 1e-9
) -> Callable[[MetaProblem], Root]:
    """A function that trains the same problem with other weights, from the full solution `fitted`
    with the Hessian there.

    `matrix` is that Hessian where it is known; the trainings share it.
    """
    known = Composed(problem).hessian(fitted) if matrix is None else matrix
    return partial(_retrained, known=known, fitted=fitted, tol=tol)


def _retrained(changed: MetaProblem, known: Tensor, fitted: Tensor, tol: float) -> Root:
    return polish(Composed(changed), fitted, tol=tol, matrix=known)
