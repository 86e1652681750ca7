"""Where SAM training ends, and its derivatives there.

SAM follows grad L(w + eps(w)) + l2 w with eps(w) = rho g / (|g| + 1e-12), g = grad L(w), and does
not differentiate through eps. Its solution is a root of

    F(w) = grad L(w + eps(w)) + l2 (w - centre),

which in general is not the gradient of anything. With `wt = w + eps(w)`, H = Hess L(w), Ht = Hess
L(wt), c = rho / (|g| + 1e-12) and P = I - g g^T / (|g| (|g| + 1e-12)), up-weighting sample k by
delta in L, so in both levels, gives

    d eps/dw = c P H                J   = dF/dw     = Ht (I + c P H) + l2 I                     not
    symmetric d eps/ddelta = c P grad l_k(w)  r_k = dF/ddelta = grad l_k(wt) + c Ht P grad l_k(w)
    dw/ddelta = -J^-1 r_k

With a perturbation per batch (a fixed partition of the samples, "m-sharpness") F is the mean of the
batches' grad L_B(w + eps_B(w)), weighted by their sizes; every term above is averaged in the same
way, and sample k enters r_k through its own batch alone.

The paper (arXiv 2507.04059) defines the up-weighted perturbation and solution (definition 4.1); its
body could not be read, and these formulas are derived here and held against finite differences of
the solution found anew.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from projects.sam_if.sam import TINY
from shared.errors import UserError
from shared.influence import retrain
from shared.influence.objective import Objective, Operator
from shared.influence.solvers import matrix_of, spectral_radius
from shared.seeding import step_seed

Curvature = Literal["hessian", "ggn"]


@dataclass(frozen=True, eq=False)
class SAMProblem:
    """What SAM solves: an objective, the radius, and which samples share a perturbation.

    Attributes:
        objective: L and its l2; the regulariser takes no part in the perturbation.
        rho: length of the perturbation; 0 is plain training.
        batches: disjoint sets of sample indices that cover all n, each with its own perturbation
            (`partition`); None: one for all.
    """

    objective: Objective
    rho: float
    batches: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise UserError(f"rho must be a number of at least 0, not {self.rho:g}")
        if self.batches is not None:
            ids = torch.cat(self.batches).sort().values.cpu() if self.batches else torch.empty(0)
            if any(len(one) == 0 for one in self.batches) or not torch.equal(
                ids, torch.arange(self.objective.n)
            ):
                raise UserError(
                    "the batches must be disjoint, not empty, and hold each of the"
                    f" {self.objective.n} samples"
                )

    @cached_property
    def parts(self) -> tuple[tuple[Tensor, float, Objective], ...]:
        """Each batch's samples, its share of all, and its objective without the regulariser."""
        whole = replace(self.objective, l2=0.0, centre=None)
        if self.batches is None:
            return ((torch.arange(whole.n), 1.0, whole),)
        found = []
        for rows in self.batches:
            weights = None if whole.weights is None else whole.weights[rows]
            found.append(
                (
                    rows,
                    len(rows) / whole.n,
                    replace(whole, data=tuple(one[rows] for one in whole.data), weights=weights),
                )
            )
        return tuple(found)

    def pull(self, w: Tensor) -> Tensor:
        """The regulariser's gradient, [p]."""
        return self.objective.l2 * (
            w if self.objective.centre is None else w - self.objective.centre
        )

    def field(self, w: Tensor) -> Tensor:
        """F(w), [p]: what SAM follows, and 0 where it ends."""
        total = self.pull(w)
        for _, share, part in self.parts:
            g = part.gradient(w)
            total = total + share * (
                part.gradient(w + self.rho * g / (g.norm() + TINY)) if self.rho else g
            )
        return total

    def weighted(self, weights: Tensor) -> "SAMProblem":
        """The same problem with these sample weights [n], as the retraining wants it."""
        return replace(self, objective=replace(self.objective, weights=weights))

    def at(
        self, w: Tensor, curvature: Curvature = "hessian", *, formed: bool = False
    ) -> "Linearised":
        """Everything about w that the estimators need. UserError where the gradient is 0 and rho is
        not.

        Args:
            formed: make H and Ht as matrices [p, p], by 2 p products a batch, before the first
                product with them: for small p and many solves.
        """
        return Linearised(self, w, curvature, formed)


def partition(n: int, size: int, seed: int) -> tuple[Tensor, ...]:
    """The n samples in random batches of `size` (the last may be smaller), the same for a seed:
    leave-one-out needs it fixed.
    """
    if not size > 0:
        raise UserError(f"a batch holds at least 1 sample, not {size}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(step_seed(seed, "partition")))
    return order.split(size)


def fit(
    problem: SAMProblem, w0: Tensor, *, tol: float = 1e-9, iterations: int = 2000
) -> retrain.Root:
    """SAM's solution near the plain minimum: L-BFGS without the perturbation, then Broyden's steps
    on F, and Newton's where these fail.

    For full-batch, smooth problems of up to a few thousand parameters.

    Raises:
        UserError: |F| does not fall to `tol`. There need not be a solution: where the loss's
            gradient is much smaller than the curvature times rho, F jumps over 0 (for l(w) = w^2 /
            2 and any rho it has no root).
    """
    plain = retrain.minimise(problem.objective, w0, tol=min(1e-6, 1e3 * tol), iterations=iterations)
    if not problem.rho:
        return retrain.newton_root(problem.field, plain.w, tol=tol)
    try:
        return retrain.broyden_root(
            problem.field,
            plain.w,
            retrain.factored_jacobian(problem.field, plain.w),
            tol=tol,
            iterations=60,
        )
    except UserError:
        pass
    try:
        return retrain.newton_root(problem.field, plain.w, tol=tol)
    except UserError as error:
        slopes = min(float(part.gradient(plain.w).norm()) for _, _, part in problem.parts)
        raise UserError(
            f"SAM's fixed point was not found near the plain minimum, where |g| is {slopes:.2g} and"
            f" rho {problem.rho:g} ({error}); take a smaller rho or a larger l2"
        ) from None


@dataclass(frozen=True, eq=False)
class _Piece:
    """One batch at w: its share, objective, gradient g, |g|, c = rho / (|g| + 1e-12), and the
    perturbed point.
    """

    rows: Tensor
    share: float
    part: Objective
    w: Tensor
    g: Tensor
    size: float
    c: float
    wt: Tensor
    curvature: Curvature
    formed: bool

    @cached_property
    def here(self) -> Operator:
        """H, or the Gauss-Newton matrix."""
        return self._curved(self.w)

    @cached_property
    def there(self) -> Operator:
        """Ht, or the Gauss-Newton matrix at the perturbed point."""
        return self._curved(self.wt)

    def _curved(self, w: Tensor) -> Operator:
        product = self.part.hessian(w) if self.curvature == "hessian" else self.part.ggn(w)
        return matrix_of(product, w).matmul if self.formed else product

    def project(self, v: Tensor) -> Tensor:
        """P v: [p] or [p, k]."""
        along = self.g @ v / (self.size * (self.size + TINY))
        return v - (self.g * along if v.dim() == 1 else self.g.unsqueeze(1) * along)


class Linearised:
    """J, its transpose and the right-hand sides at w. Vectors are [p] or columns [p, k].

    Attributes:
        curvature: "hessian", or "ggn" for Gauss-Newton matrices in place of H and Ht (for networks
            that are not convex).
        formed: whether H and Ht are kept as matrices; otherwise nothing is formed.
        residual: F(w), [p].
        plain_gradient: grad L(w) + l2 (w - centre), [p]: what is 0 where training without SAM ends.
    """

    def __init__(
        self,
        problem: SAMProblem,
        w: Tensor,
        curvature: Curvature = "hessian",
        formed: bool = False,
    ):
        self.problem, self.w, self.curvature, self.formed = problem, w, curvature, formed
        pieces, residual = [], problem.pull(w)
        for rows, share, part in problem.parts:
            g = part.gradient(w)
            size = float(g.norm())
            if not math.isfinite(size):
                raise UserError(
                    f"the gradient's norm is {size} at the given weights; look at the weights and"
                    " the data"
                )
            if problem.rho and size == 0:
                raise UserError(
                    "the gradient of the loss is exactly 0 here, so SAM's perturbation has no"
                    " direction; score with rho 0"
                )
            c = problem.rho / (size + TINY)
            pieces.append(_Piece(rows, share, part, w, g, size, c, w + c * g, curvature, formed))
            residual = residual + share * (part.gradient(w + c * g) if problem.rho else g)
        self.pieces, self.residual = tuple(pieces), residual
        self.plain_gradient = sum((one.share * one.g for one in pieces), start=problem.pull(w))

    # ---- matrices --------------------------------------------------------------------------------

    def plain(self, v: Tensor) -> Tensor:
        """(H + l2 I) v: what ordinary influence functions invert."""
        return sum(
            (one.share * one.here(v) for one in self.pieces), start=self.problem.objective.l2 * v
        )

    def frozen(self, v: Tensor) -> Tensor:
        """(Ht + l2 I) v: the perturbation taken for a constant."""
        return sum(
            (one.share * one.there(v) for one in self.pieces), start=self.problem.objective.l2 * v
        )

    def jacobian(self, v: Tensor) -> Tensor:
        """J v, by two curvature products."""
        total = self.problem.objective.l2 * v
        for one in self.pieces:
            moved = v + one.c * one.project(one.here(v)) if one.c else v
            total = total + one.share * one.there(moved)
        return total

    def jacobian_transposed(self, v: Tensor) -> Tensor:
        """J^T v, by two curvature products."""
        total = self.problem.objective.l2 * v
        for one in self.pieces:
            outer = one.there(v)
            inner = one.c * one.here(one.project(outer)) if one.c else torch.zeros_like(v)
            total = total + one.share * (outer + inner)
        return total

    # ---- right-hand sides ------------------------------------------------------------------------

    def plain_sums(self, weights: Tensor) -> Tensor:
        """sum_k weights_k grad l_k(w) for one or several sets of weights: [n] -> [p], [n, k] -> [p,
        k].
        """
        return self._sums(weights, at_perturbed=False)

    def frozen_sums(self, weights: Tensor) -> Tensor:
        """The same at the perturbed point."""
        return self._sums(weights, at_perturbed=True)

    def direct_sums(self, weights: Tensor) -> Tensor:
        """sum_k weights_k c Ht P grad l_k(w): what the samples do through the perturbation."""
        total = self.w.new_zeros(self.w.numel(), *weights.shape[1:])
        for one in self.pieces:
            if one.c and bool((own := weights[one.rows]).any()):
                total = total + one.c * one.there(
                    one.project(_weighted_gradients(one.part, self.w, own))
                )
        return total

    def _sums(self, weights: Tensor, at_perturbed: bool) -> Tensor:
        total = self.w.new_zeros(self.w.numel(), *weights.shape[1:])
        for one in self.pieces:
            if bool((own := weights[one.rows]).any()):
                total = total + _weighted_gradients(
                    one.part, one.wt if at_perturbed else self.w, own
                )
        return total

    # ---- whether it may be trusted ---------------------------------------------------------------

    def turning(self, iterations: int = 20) -> float:
        """The largest c lambda_max(H) over the batches, from below, by a few steps of the power
        method.

        It bounds |d eps| / |dw|: where it is large, the direction of the perturbation turns with
        the smallest change of w.
        """
        return max(
            one.c * spectral_radius(one.here, self.w, iterations) if one.c else 0.0
            for one in self.pieces
        )

    def check_turning(self, limit: float = 1e4) -> float:
        """`turning`; UserError above `limit`, where |g| is so small that the direction of the
        perturbation is not to be trusted.
        """
        found = self.turning()
        if found > limit:
            least = min(one.size for one in self.pieces)
            raise UserError(
                f"rho/|g| x the largest curvature is {found:.2g}, above {limit:g}: the loss's"
                f" gradient ({least:.2g}) is too small for rho {self.problem.rho:g}, and the"
                " perturbation turns with any change; regularise more or score with a smaller rho"
            )
        return found


def _weighted_gradients(part: Objective, at: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights_k grad l_k: [n] -> [p], [n, k] -> [p, k], without gradients of single samples
    where one sum is asked for.
    """
    if weights.dim() == 1:
        return part.n * replace(part, weights=weights.to(at)).gradient(at)
    used = weights.any(1).nonzero().flatten()
    return part.sample_gradients(at, used).T @ weights[used].to(at)
