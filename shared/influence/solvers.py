"""x with A x = b, from products with A: b is [p] or, several right-hand sides, [p, k], and x is
like it.

Every solver returns (x, Info) with the true relative residual |A x - b| / |b|, computed anew from
x. One that does not reach its tolerance raises UserError; `tol=None` says that a truncated result
is wanted, whose residual is then for the caller to report.

| solver | for |
| --- | --- |
| `dense` | any A, small p: the oracle |
| `cg` | symmetric positive definite |
| `gcr` | not symmetric; several right-hand sides share their products |
| `gmres` `lsmr` | not symmetric |
| `neumann` `lissa` | a series; converges where the spectral radius of I - A / scale is below 1 |
| `woodbury` | damping I + G^T G / n with few rows in G |
| `galerkin` | symmetric A within a subspace: random (`random_basis`) or per layer (`logra_basis`) |
| `identity` | A = I: the gradient dot product |
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import linalg
from torch import Tensor

from shared.errors import UserError
from shared.influence.params import Parameters
from shared.seeding import generator, step_seed

Operator = Callable[[Tensor], Tensor]
DENSE_BYTES = 4 << 30  # a matrix beyond this is not made
SPACE_BYTES = 2 << 30  # directions that `gcr` keeps


@dataclass(frozen=True)
class Info:
    """How a system was solved.

    Attributes:
        relative_residual: |A x - b| / |b|, of the worst right-hand side, from x itself.
        iterations: of the method; the most over the right-hand sides.
        products: with A (or its transpose), counted per vector; the one that checks the residual is
            among them.
    """

    solver: str
    relative_residual: float
    iterations: int
    products: int


Solved = tuple[Tensor, Info]


class _Counted:
    """A + damping I that counts the vectors it was given."""

    def __init__(self, operator: Operator, damping: float):
        self.operator, self.damping, self.count = operator, damping, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1 if v.dim() == 1 else v.shape[1]
        product = self.operator(v)
        return product + self.damping * v if self.damping else product


def relative_residual(operator: Operator, x: Tensor, b: Tensor) -> float:
    """|A x - b| / |b| of the worst column; a column b = 0 counts |A x| itself. NaN where x is not
    finite.
    """
    if b.numel() == 0:
        return 0.0
    scale = b.norm(dim=0)
    return float(
        (
            (operator(x) - b).norm(dim=0) / torch.where(scale == 0, torch.ones_like(scale), scale)
        ).max()
    )


def _checked(
    solver: str,
    operator: _Counted,
    x: Tensor,
    b: Tensor,
    iterations: int,
    tol: float | None,
    advice: str,
    residual: float | None = None,
) -> Solved:
    """x, unless its residual, which is computed here where it is not yet known, is above tol."""
    residual = relative_residual(operator, x, b) if residual is None else residual
    if not math.isfinite(residual) or (tol is not None and residual > tol):
        wanted = "a finite number" if tol is None else f"{tol:g}"
        raise UserError(
            f"{solver} stopped at a relative residual of {residual:.2g} after {iterations}"
            f" iterations, not {wanted}; {advice}"
        )
    return x, Info(solver, residual, iterations, operator.count)


# ---- exact ---------------------------------------------------------------------------------------


def matrix_of(operator: Operator, like: Tensor) -> Tensor:
    """The matrix [p, p] of an operator, by p products, in the dtype of `like` [p] or [p, k].
    UserError when it would be too large.
    """
    size = like.shape[0]
    if size**2 * like.element_size() > DENSE_BYTES:
        raise UserError(
            f"a dense matrix of {size} x {size} needs {size**2 * like.element_size() / 1e9:.1f} GB;"
            " use cg, gmres or ekfac"
        )
    return operator(torch.eye(size, dtype=like.dtype, device=like.device))


def dense(
    operator: Operator | Tensor, b: Tensor, *, damping: float = 0.0, tol: float | None = 1e-6
) -> Solved:
    """LU of the whole matrix, which need not be symmetric. Give it the matrix [p, p] itself or its
    operator.
    """
    matrix = operator if isinstance(operator, Tensor) else matrix_of(operator, b)
    count = _Counted(matrix.matmul, damping)
    count.count = 0 if isinstance(operator, Tensor) else matrix.shape[0]
    damped = (
        matrix + damping * torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        if damping
        else matrix
    )
    columns = b if b.dim() == 2 else b.unsqueeze(1)
    x, info = torch.linalg.solve_ex(damped, columns)
    if int(info):
        raise UserError("the matrix is singular; add damping")
    return _checked("dense", count, x.view_as(b), b, 1, tol, _CLOSE_TO_SINGULAR)


_CLOSE_TO_SINGULAR = "the matrix is close to singular: add damping"


def factored(matrix: Tensor, *, tol: float | None = 1e-6) -> Callable[[Tensor], Solved]:
    """b -> what `dense` gives for it, for many b: the matrix [p, p] is factored once.

    Raises:
        UserError: the matrix is singular; and for a b, its true residual is above `tol`.
    """
    factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
    if int(info):
        raise UserError("the matrix is singular; add damping")

    def solve(b: Tensor) -> Solved:
        columns = b if b.dim() == 2 else b.unsqueeze(1)
        x = torch.linalg.lu_solve(factors, pivots, columns)
        count = _Counted(matrix.matmul, 0.0)
        return _checked("dense", count, x.view_as(b), b, 1, tol, _CLOSE_TO_SINGULAR)

    return solve


# ---- Krylov --------------------------------------------------------------------------------------


def cg(
    operator: Operator,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-6,
    iterations: int | None = None,
    preconditioner: Operator | None = None,
) -> Solved:
    """Conjugate gradients for a symmetric positive definite A + damping I; all right-hand sides in
    one batched product an iteration.

    Args:
        iterations: at most; by default 10 p, since rounding delays the end.
        preconditioner: v -> an approximation of A^-1 v, symmetric positive definite
            (`EKFAC.inverse`).

    Raises:
        UserError: negative curvature was met, or the tolerance was not.
    """
    product = _Counted(operator, damping)
    limit = 10 * b.shape[0] if iterations is None else iterations
    aim = tol / 2 if tol else 0.0  # the residual that is updated drifts from the true one
    b_PK = b if b.dim() == 2 else b.unsqueeze(1)
    size_K = b_PK.norm(dim=0)
    x_PK, r_PK = torch.zeros_like(b_PK), b_PK.clone()
    z_PK = preconditioner(r_PK) if preconditioner else r_PK
    d_PK, rz_K = z_PK.clone(), (r_PK * z_PK).sum(0)
    step = 0
    while step < limit:
        active_K = r_PK.norm(dim=0) > aim * size_K
        if not active_K.any():
            r_PK = b_PK - product(x_PK)
            if not (r_PK.norm(dim=0) > aim * size_K).any():
                break
            # the update had drifted: start again from here
            z_PK = preconditioner(r_PK) if preconditioner else r_PK
            d_PK, rz_K = z_PK.clone(), (r_PK * z_PK).sum(0)
            step += 1
            continue
        ad_PK = product(d_PK)
        bend_K = (d_PK * ad_PK).sum(0)
        if (active_K & (bend_K <= 0)).any():
            worst = float((bend_K / d_PK.square().sum(0))[active_K].min())
            raise UserError(
                f"cg met negative curvature ({worst:.2g}): the matrix is not positive definite; add"
                f" damping above {-worst:.2g}"
            )
        alpha_K = torch.where(active_K, rz_K / bend_K, torch.zeros_like(rz_K))
        x_PK = x_PK + alpha_K * d_PK
        r_PK = r_PK - alpha_K * ad_PK
        z_PK = preconditioner(r_PK) if preconditioner else r_PK
        next_K = (r_PK * z_PK).sum(0)
        beta_K = torch.where(active_K, next_K / rz_K, torch.zeros_like(rz_K))
        d_PK, rz_K = torch.where(active_K, z_PK + beta_K * d_PK, d_PK), next_K
        step += 1
    return _checked(
        "cg",
        product,
        x_PK.view_as(b),
        b,
        step,
        tol,
        "add damping, allow more iterations, or use float64",
    )


def gcr(
    operator: Operator,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-6,
    iterations: int | None = None,
    preconditioner: Operator | None = None,
) -> Solved:
    """Generalised conjugate residuals (Eisenstat, Elman and Schultz 1983) for any A, with one space
    of directions for all right-hand sides.

    A step adds the residuals of the sides that are not solved yet, and each side takes from the
    whole space what makes its residual smallest. So k sides need far fewer products than k times
    those of one, and the products of a step are one batch. Where no residual falls, the space grows
    by powers of A, as that of GMRES does. Two vectors a direction are kept, up to `SPACE_BYTES`;
    then the space is made anew.

    Args:
        iterations: steps at most; by default 10 p.
        preconditioner: v -> an approximation of A^-1 v, for columns [p, k]; any will do.

    Raises:
        UserError: the tolerance was not met.
    """
    product = _Counted(operator, damping)
    b_PK = b if b.dim() == 2 else b.unsqueeze(1)
    scale_K = b_PK.norm(dim=0)
    scale_K = torch.where(scale_K == 0, torch.ones_like(scale_K), scale_K)
    x_PK, r_PK = torch.zeros_like(b_PK), b_PK / scale_K  # of sides of length 1
    v_PM = q_PM = b_PK[:, :0]  # directions, and A times them, which is orthonormal
    room = max(1, SPACE_BYTES // (2 * max(1, b_PK.shape[0]) * b_PK.element_size()))
    limit, aim = 10 * b.shape[0] if iterations is None else iterations, 0.9 * (tol or 0.0)
    step, fell, checked = 0, True, False
    while True:
        size_K = r_PK.norm(dim=0)
        open_K = size_K > aim
        if checked and not open_K.any():
            break
        if step >= limit or not open_K.any():
            # the residual that is updated may have drifted from the true one
            r_PK = b_PK / scale_K - product(x_PK)
            v_PM = q_PM = b_PK[:, :0]
            fell = checked = True
            if step >= limit:
                break
            continue
        checked = False
        step += 1
        d_PK = r_PK[:, open_K] if fell else q_PM[:, -1:]
        d_PK = preconditioner(d_PK) if preconditioner and fell else d_PK
        if q_PM.shape[1] + d_PK.shape[1] > room:
            v_PM = q_PM = b_PK[:, :0]
        d_PK, ad_PK = _orthonormal(d_PK, product(d_PK), v_PM, q_PM)
        if d_PK.shape[1] == 0 and (not fell or q_PM.shape[1] == 0):
            step = limit  # the space holds all that A makes of it
            continue
        share_KK = ad_PK.T @ r_PK
        x_PK, r_PK = x_PK + d_PK @ share_KK, r_PK - ad_PK @ share_KK
        fell = bool((r_PK.norm(dim=0) < 0.999 * size_K)[open_K].any())
        v_PM, q_PM = torch.cat([v_PM, d_PK], 1), torch.cat([q_PM, ad_PK], 1)
    x = (x_PK * scale_K).view_as(b)
    residual = float(r_PK.norm(dim=0).max()) if b.numel() else 0.0
    advice = "add damping, allow more iterations, or use float64"
    return _checked("gcr", product, x, b, step, tol, advice, residual)


def _orthonormal(d_PK: Tensor, ad_PK: Tensor, v_PM: Tensor, q_PM: Tensor) -> tuple[Tensor, Tensor]:
    """Directions and A times them, changed alike so that the latter are orthonormal, to q as well;
    those that depend on others are left out.
    """
    rounding = torch.finfo(ad_PK.dtype).eps * 10 * max(1, ad_PK.shape[1])
    before_K = ad_PK.norm(dim=0)
    scale_K = torch.where(before_K == 0, torch.ones_like(before_K), before_K)
    d_PK, ad_PK = d_PK / scale_K, ad_PK / scale_K
    for _ in range(2):  # once leaves what rounding left of the others
        along_MK = q_PM.T @ ad_PK
        d_PK, ad_PK = d_PK - v_PM @ along_MK, ad_PK - q_PM @ along_MK
        values_K, turn_KK = torch.linalg.eigh(ad_PK.T @ ad_PK)
        kept = values_K > rounding
        turn_KK = turn_KK[:, kept] / values_K[kept].sqrt()
        d_PK, ad_PK = d_PK @ turn_KK, ad_PK @ turn_KK
    return d_PK, ad_PK


def gmres(
    operator: Operator,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-6,
    iterations: int | None = None,
    restart: int = 100,
) -> Solved:
    """GMRES (SciPy's) for any A; one right-hand side after the other. `iterations` are products at
    most per side, by default 10 p.
    """
    product = _Counted(operator, damping)
    size = b.shape[0]
    limit = 10 * size if iterations is None else iterations
    restart = min(restart, size, max(limit, 1))

    def solve(column: np.ndarray) -> tuple[np.ndarray, int]:
        seen: list[float] = []
        aim = 0.9 * (tol or 0.0)  # its own residual is the true one but for rounding
        found, _ = linalg.gmres(
            _scipy(product, b),
            column,
            rtol=aim,
            restart=restart,
            maxiter=max(1, math.ceil(limit / restart)),
            callback=seen.append,
            callback_type="pr_norm",
        )
        return found, len(seen)

    x, steps = _by_columns(solve, b)
    return _checked(
        "gmres", product, x, b, steps, tol, "add damping, allow more iterations, or use float64"
    )


def lsmr(
    operator: Operator,
    b: Tensor,
    *,
    transpose: Operator,
    damping: float = 0.0,
    tol: float | None = 1e-6,
    iterations: int | None = None,
) -> Solved:
    """LSMR (SciPy's) for any A, of which it needs v -> A^T v as well; slower than GMRES, and needs
    no memory of past directions.

    `iterations` are at most per right-hand side, by default 20 p.
    """
    product, adjoint = _Counted(operator, damping), _Counted(transpose, damping)

    def solve(column: np.ndarray) -> tuple[np.ndarray, int]:
        aim = (tol or 0.0) / 2
        limit = 20 * b.shape[0] if iterations is None else iterations
        found, _, steps, *_ = linalg.lsmr(
            _scipy(product, b, adjoint), column, atol=0.0, btol=aim, conlim=0.0, maxiter=limit
        )
        return found, steps

    x, steps = _by_columns(solve, b)
    product.count += adjoint.count
    return _checked(
        "lsmr", product, x, b, steps, tol, "add damping, allow more iterations, or use gmres"
    )


def _scipy(
    product: Operator, like: Tensor, transpose: Operator | None = None
) -> linalg.LinearOperator:
    """The operator for SciPy, which works in float64 on the CPU."""

    def wrapped(operator: Operator) -> Callable[[np.ndarray], np.ndarray]:
        return lambda v: operator(torch.from_numpy(v.reshape(-1)).to(like)).double().cpu().numpy()

    size = like.shape[0]
    adjoint = {} if transpose is None else {"rmatvec": wrapped(transpose)}
    return linalg.LinearOperator((size, size), matvec=wrapped(product), dtype=np.float64, **adjoint)


def _by_columns(
    solve: Callable[[np.ndarray], tuple[np.ndarray, int]], b: Tensor
) -> tuple[Tensor, int]:
    columns = (b if b.dim() == 2 else b.unsqueeze(1)).double().cpu().numpy()
    found = [solve(column) for column in columns.T.copy()]
    if not found:
        return torch.zeros_like(b), 0
    return torch.from_numpy(np.stack([x for x, _ in found], 1)).to(b).view_as(b), max(
        steps for _, steps in found
    )


# ---- series --------------------------------------------------------------------------------------


def neumann(
    operator: Operator,
    b: Tensor,
    *,
    scale: float | None = None,
    depth: int = 1000,
    damping: float = 0.0,
    tol: float | None = 1e-6,
) -> Solved:
    """(1/s) sum_{j <= depth} (I - A/s)^j b, which tends to A^-1 b where the spectral radius of I -
    A/s is below 1.

    Args:
        scale: s; by default 1.05 times the largest eigenvalue in size, by power iteration.

    Raises:
        UserError: the radius is 1 or more, or the tolerance was not met at this depth.
    """
    product = _Counted(operator, damping)
    s = 1.05 * spectral_radius(product, b) if scale is None else scale
    if s <= 0:
        raise UserError(f"the scale of a Neumann series must be positive, not {s:g}")
    radius = spectral_radius(lambda v: v - product(v) / s, b)
    if radius >= 1:
        raise UserError(
            f"the Neumann series diverges: |I - A/{s:.3g}| has the spectral radius {radius:.4g};"
            " take a larger scale, and damping if A has eigenvalues below 0"
        )
    x = term = b / s
    for _ in range(depth):
        term = term - product(term) / s
        x = x + term
    return _checked("neumann", product, x, b, depth, tol, "allow more depth, or add damping")


def lissa(
    operator: Operator,
    b: Tensor,
    *,
    sampled: Callable[[int], Operator],
    scale: float,
    depth: int = 1000,
    repeats: int = 1,
    damping: float = 0.0,
    tol: float | None = 0.1,
) -> Solved:
    """The Neumann series with another sample of A in every step, averaged over repeats (Agarwal et
    al. 2017, LiSSA).

    Args:
        operator: the whole A, for the residual alone.
        sampled: step -> an unbiased sample of A (`Objective.sampled_hessians`).
        scale: above the largest eigenvalue of the samples.
        tol: loose, because the noise of the samples does not go away with depth.
    """
    whole = _Counted(operator, damping)
    total = torch.zeros_like(b)
    for repeat in range(repeats):
        x = b / scale
        for step in range(depth):
            product = _Counted(sampled(repeat * depth + step), damping)
            x = b / scale + x - product(x) / scale
            whole.count += product.count
        total = total + x / repeats
    return _checked(
        "lissa",
        whole,
        total,
        b,
        depth * repeats,
        tol,
        "allow more depth, a larger scale, more repeats or larger batches",
    )


# ---- low rank ------------------------------------------------------------------------------------


def woodbury(rows: Tensor, b: Tensor, *, damping: float, tol: float | None = 1e-6) -> Solved:
    """(damping I + G^T G / n)^-1 b through the n x n Gram matrix of the rows G [n, p]: exact, and
    cheap where n is below p.

    With per-sample gradients as rows this is the damped empirical Fisher matrix.
    """
    if damping <= 0:
        raise UserError(
            f"woodbury needs a damping above 0, not {damping:g}: without it the matrix is singular"
        )
    n = rows.shape[0]
    gram_NN = rows @ rows.T
    gram_NN.diagonal().add_(n * damping)
    factor_NN = torch.linalg.cholesky(gram_NN)
    columns = b if b.dim() == 2 else b.unsqueeze(1)
    x = ((columns - rows.T @ torch.cholesky_solve(rows @ columns, factor_NN)) / damping).view_as(b)
    product = _Counted(lambda v: rows.T @ (rows @ v) / n, damping)
    return _checked("woodbury", product, x, b, 1, tol, "use more damping, or float64")


def galerkin(
    operator: Operator, b: Tensor, basis: Tensor, *, damping: float = 0.0, tol: float | None = None
) -> Solved:
    """Q (Q^T (A + damping I) Q)^-1 Q^T b within the span of the orthonormal columns Q [p, d]; exact
    where that holds the solution. A is symmetric.

    The residual in Info is that of the whole system, which is not small for a b that sticks out of
    the subspace.

    Raises:
        UserError: A + damping I is not positive definite in the subspace, or a residual above
            `tol`.
    """
    product = _Counted(operator, damping)
    inner = basis.T @ product(basis)
    factor, info = torch.linalg.cholesky_ex((inner + inner.T) / 2)
    if int(info):
        raise UserError(
            "the matrix is not positive definite in the subspace: add damping, or use the"
            " Gauss-Newton matrix"
        )
    columns = b if b.dim() == 2 else b.unsqueeze(1)
    x = (basis @ torch.cholesky_solve(basis.T @ columns, factor)).view_as(b)
    return _checked("galerkin", product, x, b, 1, tol, "take a larger basis")


def random_basis(size: int, dimension: int, seed: int, like: Tensor) -> Tensor:
    """Orthonormal columns that span a uniformly random subspace, [p, d], in the dtype and on the
    device of `like`.
    """
    if not 0 < dimension <= size:
        raise UserError(
            f"a random subspace of {size} parameters has a dimension from 1 to {size}, not"
            f" {dimension}"
        )
    normal = torch.randn(size, dimension, generator=generator(seed, "basis"), dtype=torch.float64)
    return torch.linalg.qr(normal)[0].to(like)


def logra_basis(
    parameters: Parameters,
    rank: int,
    seed: int,
    like: Tensor,
    moments: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """A subspace per parameter, Q_out (x) Q_in for a weight [out, in...]: at most rank^2 columns
    each (Choe et al. 2024, LoGra, which has both kinds).

    Projecting a gradient S^T A on it is projecting the activations A and the back-propagated S by
    `rank` directions each. A bias or another vector gets up to `rank` columns of its own.

    Args:
        seed: of the random subspaces.
        moments: of some weights, by their names, the second moments of inputs [in, in] and of
            the outputs' gradients [out, out] (`ekfac.layer_moments`): these get the moments'
            leading eigenvectors, and nothing of them is random.

    Returns:
        [p, d] with orthonormal columns, in the dtype and on the device of `like`.
    """
    blocks = []
    for number, (name, shape) in enumerate(zip(parameters.names, parameters.shapes, strict=True)):
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape.numel())
        if moments is not None and name in moments:
            inputs, outputs = moments[name]
            left, right = (_leading(one, rank).to(like) for one in (outputs, inputs))
        else:
            left, right = (
                random_basis(size, min(rank, size), step_seed(seed, "logra", number, side), like)
                for side, size in enumerate((rows, columns))
            )
        blocks.append(torch.kron(left, right))
    return torch.block_diag(*blocks)


def _leading(moment: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the `rank` largest eigenvalues of a symmetric matrix [s, s]: [s, rank]."""
    return torch.linalg.eigh(moment)[1][:, -rank:]


def identity(b: Tensor) -> Solved:
    """A = I: what the gradient dot product takes for the curvature."""
    return b, Info("identity", 0.0, 0, 0)


# ---- spectra -------------------------------------------------------------------------------------


def spectral_radius(operator: Operator, like: Tensor, iterations: int = 50) -> float:
    """The largest |eigenvalue|, by power iteration from a fixed start: from below, and close where
    the spectrum is spread.

    It is the mean growth over the later half, so that a complex pair of eigenvalues does not make
    it swing.
    """
    v = torch.randn(like.shape[0], generator=generator(0, "power"), dtype=torch.float64).to(like)
    v = v / v.norm()
    logs = []
    for _ in range(iterations):
        v = operator(v)
        size = float(v.norm())
        if size == 0 or not math.isfinite(size):
            return size
        logs.append(math.log(size))
        v = v / size
    return math.exp(float(np.mean(logs[iterations // 2 :])))


def smallest_eigenvalue(operator: Operator, like: Tensor) -> float:
    """The smallest eigenvalue of a symmetric operator: exact up to 500 parameters, by Lanczos to
    three digits beyond.

    Raises:
        UserError: Lanczos did not converge.
    """
    size = like.shape[0]
    if size <= 500:
        return float(torch.linalg.eigvalsh(matrix_of(operator, like))[0])
    options: dict[str, Any] = {
        "which": "SA",
        "return_eigenvectors": False,
        "tol": 1e-3,
        "maxiter": 20 * size,
    }
    # SciPy's own start is drawn anew each time
    start = torch.randn(size, generator=generator(0, "lanczos"), dtype=torch.float64).numpy()
    try:
        return float(linalg.eigsh(_scipy(operator, like), k=1, v0=start, **options)[0])
    except linalg.ArpackNoConvergence:
        raise UserError(
            "the smallest eigenvalue was not found; use the Gauss-Newton matrix, which has none"
            " below 0"
        ) from None


def require_positive(operator: Operator, like: Tensor, damping: float = 0.0) -> float:
    """The smallest eigenvalue of the symmetric A + damping I; UserError when it is not above 0."""
    smallest = smallest_eigenvalue(operator, like) + damping
    if smallest <= 0:
        needed = damping - smallest
        raise UserError(
            f"the Hessian is indefinite: its smallest eigenvalue is {smallest - damping:.3g} with"
            f" damping {damping:g}; use damping above {needed:.3g}, or the Gauss-Newton matrix"
        )
    return smallest
