"""What removal really does: retraining without the samples. The truth that scores are held
against.

Deliberately knows nothing of the estimators: no product, solver or objective of theirs is used
here. A removed sample has weight 0, the others keep 1/n, and training starts from the full
solution, so that what is found is the same minimum's neighbour.
"""

import hashlib
import io
import json
import multiprocessing
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import linalg
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from shared.errors import UserError
from shared.files import atomic_write
from shared.processes import die_with_parent
from shared.seeding import step_seed

Field = Callable[[Tensor], Tensor]  # [p] -> [p]


@dataclass(frozen=True)
class Root:
    """Where training ended: w [p], |F(w)| (for a minimum the gradient's norm), Newton steps and
    evaluations of the function.
    """

    w: Tensor
    residual: float
    iterations: int


# ---- solving -------------------------------------------------------------------------------------


def newton_root(
    field: Field, w0: Tensor, *, tol: float = 1e-10, iterations: int = 50, chunk: int = 64
) -> Root:
    """A root of F: R^p -> R^p by Newton's method with the dense Jacobian; F need not be a gradient.

    The step is halved until |F| falls; where that does not help, or the Jacobian is singular, the
    step is Levenberg's, with more and more damping. Memory for a p x p matrix is needed.

    Args:
        tol: what |F(w)| must fall to.
        chunk: columns of the Jacobian that are computed at once.

    Raises:
        UserError: |F| did not fall to `tol`.
    """
    w = w0.detach().clone()
    eye = torch.eye(w.numel(), dtype=w.dtype, device=w.device)
    value = field(w)
    for step in range(iterations + 1):
        residual = float(value.norm())
        if residual <= tol:
            return Root(w, residual, step)
        if step == iterations:
            break
        jacobian = vmap(
            lambda one, at=w: jvp(field, (at,), (one,))[1], out_dims=1, chunk_size=chunk
        )(eye)
        found = _step(field, w, value, jacobian)
        if found is None:
            break
        w, value = found
    raise UserError(
        f"training stopped at |F| = {residual:.2g} after {step} Newton steps, not {tol:g}; start"
        " nearer, or regularise more"
    )


def _step(field: Field, w: Tensor, value: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor] | None:
    """The next w with F there, where |F| is smaller; None when no step makes it so."""
    size = value.norm()
    straight, info = torch.linalg.solve_ex(jacobian, -value)
    if not int(info):
        for halvings in range(12):
            there = w + straight * 0.5**halvings
            after = field(there)
            if after.norm() < size:
                return there, after
    normal = jacobian.T @ jacobian
    scale = normal.diagonal().mean()
    for power in range(-8, 9, 2):
        damped = normal + 10.0**power * scale * torch.eye(w.numel(), dtype=w.dtype, device=w.device)
        there = w - torch.linalg.solve(damped, jacobian.T @ value)
        after = field(there)
        if after.norm() < size:
            return there, after
    return None


def factored_jacobian(field: Field, w: Tensor, *, chunk: int = 64) -> Field:
    """v -> J^-1 v with the dense Jacobian of the field at w, factored once: for many `broyden_root`
    that start nearby.

    Raises:
        UserError: the Jacobian is singular.
    """
    eye = torch.eye(w.numel(), dtype=w.dtype, device=w.device)
    jacobian = vmap(lambda one: jvp(field, (w,), (one,))[1], out_dims=1, chunk_size=chunk)(eye)
    factors, pivots, info = torch.linalg.lu_factor_ex(jacobian)
    if int(info):
        raise UserError("the Jacobian is singular where training starts; regularise more")
    return lambda v: torch.linalg.lu_solve(factors, pivots, v.unsqueeze(1)).squeeze(1)


def broyden_root(
    field: Field,
    w0: Tensor,
    inverse: Field,
    *,
    tol: float = 1e-10,
    iterations: int = 200,
    memory: int = 30,
) -> Root:
    """A root of F by a quasi-Newton method: an old inverse Jacobian, corrected by the last `memory`
    steps (Anderson's multisecant form).

    What `inverse` is decides how fast the root is found, and not which: |F| is computed anew at
    every step.

    Args:
        inverse: v -> an approximation of J^-1 v (`factored_jacobian`).

    Raises:
        UserError: |F| did not fall to `tol`.
    """
    w = w0.detach().clone()
    value = field(w)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    for step in range(iterations + 1):
        residual = float(value.norm())
        if residual <= tol:
            return Root(w, residual, step)
        if step == iterations or not np.isfinite(residual):
            break
        left, move = value, torch.zeros_like(w)
        if changes:
            y = torch.stack(changes, 1)
            share = torch.linalg.lstsq(y, value.unsqueeze(1), driver="gelsd").solution
            left, move = value - (y @ share).squeeze(1), -(torch.stack(steps, 1) @ share).squeeze(1)
        move = move - inverse(left)
        for _ in range(12):
            after = field(w + move)
            if after.norm() < 2 * value.norm():  # secant steps need not fall one by one
                break
            move = move / 2
        steps, changes = [*steps, move][-memory:], [*changes, after - value][-memory:]
        w, value = w + move, after
    raise UserError(
        f"training stopped at |F| = {residual:.2g} after {step} quasi-Newton steps, not {tol:g};"
        " start nearer, or regularise more"
    )


def minimise(
    f: Callable[[Tensor], Tensor],
    w0: Tensor,
    *,
    tol: float = 1e-8,
    iterations: int = 1000,
    polish: bool = True,
    like: Tensor | None = None,
    both: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Root:
    """A minimum of the scalar f: L-BFGS (SciPy's), then Newton's method on the gradient unless
    `polish` is off.

    Args:
        like: a positive definite matrix [p, p] that is like the Hessian at the minimum, as that of
            the training with all samples is when some are left out. Steps are then taken in its
            coordinates, which saves most of them; it decides the way, not where it ends.
        both: w -> (gradient, value) of f, where there is a faster way than autodiff of f.

    Raises:
        UserError: the gradient's norm did not fall to `tol`, f is not finite at the start, `like`
            is not positive definite, or Newton's method left for a higher point.
    """
    start = float(f(w0))
    if not np.isfinite(start):
        raise UserError(
            f"the objective is {start:g} where training starts; look at the data and the starting"
            " point"
        )
    both = both or _differentiated(f)
    slope = grad(f)
    factor = None
    if like is not None:
        factor, info = torch.linalg.cholesky_ex(like)
        if int(info):
            raise UserError(
                "the matrix that training is to take steps by is not positive definite; train"
                " without it"
            )

    def at(moved: np.ndarray) -> Tensor:
        """Parameters of the coordinates y, w = w0 + L^-T y, in which the Hessian is near 1."""
        y = torch.from_numpy(moved).to(w0)
        return (
            y
            if factor is None
            else w0 + torch.linalg.solve_triangular(factor.T, y.unsqueeze(1), upper=True).squeeze(1)
        )

    def value_and_slope(moved: np.ndarray) -> tuple[float, np.ndarray]:
        gradient, value = both(at(moved))
        if factor is not None:
            gradient = torch.linalg.solve_triangular(
                factor, gradient.unsqueeze(1), upper=False
            ).squeeze(1)
        return float(value), gradient.double().cpu().numpy()

    options = {
        "maxiter": iterations,
        "maxcor": 20,
        "gtol": tol / w0.numel() ** 0.5,
        "ftol": 0.0,
        "maxfun": 10 * iterations,
    }
    first = w0.detach().double().cpu().numpy() if factor is None else np.zeros(w0.numel())
    found = minimize(value_and_slope, first, jac=True, method="L-BFGS-B", options=options)
    w, steps = at(found.x), int(found.nfev)
    value, _ = both(w)
    # Newton's steps by CG: rounding of f does not stop them
    while factor is not None and float(value.norm()) > tol:
        there = w + _preconditioned(slope, w, -value, factor)
        after = slope(there)
        if not float(after.norm()) < 0.5 * float(value.norm()):
            break
        w, value, steps = there, after, steps + 1
    residual = float(value.norm())
    if residual > tol:
        if not polish:
            raise UserError(
                f"training stopped at a gradient of norm {residual:.2g}, not {tol:g}; allow more"
                " iterations, or use float64"
            )
        root = newton_root(slope, w, tol=tol)
        w, residual, steps = root.w, root.residual, steps + root.iterations
    if float(f(w)) > float(found.fun) + 1e-9 * max(1.0, abs(float(found.fun))):
        raise UserError(
            "Newton's method went up, to a saddle or a maximum; allow more iterations before it, or"
            " regularise more"
        )
    return Root(w, residual, steps)


def _differentiated(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """w -> (gradient, value) of a scalar f; half the time of torch.func's for a small problem."""

    def both(w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = w.detach().requires_grad_()
            value = f(at)
            (gradient,) = torch.autograd.grad(value, at)
        return gradient, value.detach()

    return both


def _preconditioned(slope: Field, w: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """x with (Jacobian of the gradient `slope` at w) x = b to three digits, by SciPy's CG with the
    inverse of factor factor^T before it.
    """
    # a Hessian is its own transpose: the graph is made once, and a backward through it is a product
    _, pull, *_ = vjp(slope, w)

    def product(v: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(v.reshape(-1)).to(w)
        return np.asarray(pull(direction)[0].double().cpu().numpy())

    def inverse(v: np.ndarray) -> np.ndarray:
        column = torch.from_numpy(v.reshape(-1, 1)).to(w)
        return np.asarray(torch.cholesky_solve(column, factor).squeeze(1).double().cpu().numpy())

    shape = (w.numel(), w.numel())
    operator, before = (
        linalg.LinearOperator(shape, matvec=one, dtype=np.float64) for one in (product, inverse)
    )
    found, _ = linalg.cg(operator, b.double().cpu().numpy(), rtol=1e-3, maxiter=200, M=before)
    return torch.from_numpy(found).to(w)


# ---- many trainings ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrained:
    """One training per row: w [m, p] and the residual each ended with [m]."""

    w: Tensor
    residuals: Tensor


def without(n: int, removed: Iterable[int]) -> Tensor:
    """Weights [n] in float64: 0 for the removed samples, 1 for the others."""
    ids = check_removed(removed, n)
    weights = torch.ones(n, dtype=torch.float64)
    weights[ids] = 0
    return weights


def check_removed(removed: Iterable[int], n: int) -> list[int]:
    """The indices as a list; UserError when one is not of a sample, or stands there twice."""
    ids = [int(one) for one in removed]
    beyond = [one for one in ids if not 0 <= one < n]
    if beyond:
        raise UserError(
            f"sample {beyond[0]} cannot be removed: the samples are numbered 0 to {n - 1}"
        )
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise UserError(f"sample {twice} is to be removed twice; name it once")
    return ids


def subsets(n: int, fraction: float, count: int, seed: int) -> Tensor:
    """Random subsets for the LDS: [count, n] of bool, True for the round(fraction n) samples that
    are kept.
    """
    size = round(fraction * n)
    if not 0 < size < n:
        raise UserError(
            f"a fraction {fraction:g} of {n} samples keeps {size}; it must keep some and leave"
            " some out"
        )
    masks = torch.zeros(count, n, dtype=torch.bool)
    for row in range(count):
        kept = np.random.default_rng(step_seed(seed, "subset", row)).permutation(n)[:size]
        masks[row, torch.from_numpy(kept)] = True
    return masks


def retrain(
    train: Callable[[Tensor], Root],
    n: int,
    removals: Sequence[Iterable[int]],
    *,
    config: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    processes: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> Retrained:
    """Train once for each set of removed samples.

    Args:
        train: weights [n] in float64 -> the trained parameters. With `processes` above 1 a function
            that can be sent to another process: one of a module, or a `functools.partial` of one.
        removals: sets of sample indices.
        config: what else the result depends on (JSON); with the removed indices it names the file
            in `cache`.
        cache: a folder of results; None keeps none.
        progress: wraps the removals, in order.

    Raises:
        UserError: a removal is not of samples, a training failed, a file of the cache is not one,
            or a cache without `config`.
    """
    if cache is not None and config is None:
        raise UserError("a cache of trained parameters needs the config they depend on")
    ids = [check_removed(removed, n) for removed in removals]
    files = [None if cache is None else cache / f"{_key(config or {}, n, one)}.npz" for one in ids]
    known = [None if file is None or not file.exists() else _load(file) for file in files]
    missing = [without(n, one) for one, root in zip(ids, known, strict=True) if root is None]
    roots: list[Root] = []
    with _mapping(processes) as mapped:
        fresh = iter(mapped(train, missing))
        for file, root in progress(zip(files, known, strict=True)):
            if root is None:
                root = next(fresh)
                if file is not None:
                    _save(file, root)
            roots.append(root)
    if not roots:
        raise UserError("nothing to remove: give at least one set of samples")
    return Retrained(
        torch.stack([root.w for root in roots]),
        torch.tensor([root.residual for root in roots], dtype=torch.float64),
    )


def leave_one_out(
    train: Callable[[Tensor], Root], n: int, removed: Iterable[int], **options: Any
) -> Retrained:
    """Train once without each of the samples; `options` as of `retrain`."""
    return retrain(train, n, [[one] for one in check_removed(removed, n)], **options)


@contextmanager
def _mapping(processes: int) -> Iterator[Callable[..., Iterable[Root]]]:
    """A `map` over this process or others, of one torch thread each."""
    if processes == 1:
        yield map
        return
    # a fork would inherit torch's threads in an unknown state
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker) as pool:
        yield pool.map


def _start_worker() -> None:
    die_with_parent()
    torch.set_num_threads(1)


def _key(config: Mapping[str, Any], n: int, removed: Sequence[int]) -> str:
    text = json.dumps(
        {"config": config, "n": n, "removed": sorted(removed)}, sort_keys=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _save(file: Path, root: Root) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer, w=root.w.detach().cpu().numpy(), residual=root.residual, iterations=root.iterations
    )
    atomic_write(file, buffer.getvalue())


def _load(file: Path) -> Root:
    try:
        with np.load(file, allow_pickle=False) as saved:
            return Root(
                torch.from_numpy(saved["w"]), float(saved["residual"]), int(saved["iterations"])
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{file} holds no trained parameters; delete it and run again") from None
