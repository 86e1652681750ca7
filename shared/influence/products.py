"""Products with derivatives, without the derivatives: gradients, Hessians, Gauss-Newton matrices,
per-sample directional derivatives.

Sizes: p parameters, n samples, k directions. A direction is [p]; several are the columns of [p, k],
and results have the same layout. `data` is a tuple of tensors whose first dimension is the samples;
`losses(w, data)` is [n]. Chunks of data bound the memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

Data = tuple[Tensor, ...]
Losses = Callable[[Tensor, Data], Tensor]
Function = Callable[[Tensor], Tensor]
# Directions that one vmap takes at once: on a CPU more of them fall out of its caches.
DIRECTIONS = {"cpu": 16}
DIRECTIONS_ELSEWHERE = 64


# ---- a count of what was done --------------------------------------------------------------------


@dataclass
class Passes:
    """How often the data were gone through, by kind of work. Chunks of one pass are one pass; k
    directions are k passes.
    """

    gradients: int = 0
    curvature_products: int = 0
    per_sample_gradients: int = 0
    forward_mode: int = 0


_counting: ContextVar[tuple[Passes, ...]] = ContextVar("_counting", default=())


@contextmanager
def count_passes() -> Iterator[Passes]:
    """Count the passes made inside by the functions of this module and of `objective`. May be
    nested.
    """
    passes = Passes()
    token = _counting.set((*_counting.get(), passes))
    try:
        yield passes
    finally:
        _counting.reset(token)


def note(kind: str, passes: int = 1) -> None:
    """Add to the count of those who count (for code that makes a pass in a way of its own)."""
    for counter in _counting.get():
        setattr(counter, kind, getattr(counter, kind) + passes)


# ---- one function of w ---------------------------------------------------------------------------


def gradient(f: Function, w: Tensor) -> Tensor:
    """grad f(w), [p]; f(w) is a scalar."""
    note("gradients")
    return grad(f)(w)


def along(product: Function, v: Tensor) -> Tensor:
    """Apply a product with one direction, [p] -> [...], to v [p] or, by vmap, to the columns of v
    [p, k] -> [..., k].
    """
    if v.dim() == 1:
        return product(v)
    if v.shape[1] == 1:
        return product(v[:, 0]).unsqueeze(-1)
    if v.shape[1] == 0:
        return product(v.new_zeros(v.shape[0])).unsqueeze(-1)[..., :0]
    at_once = DIRECTIONS.get(v.device.type, DIRECTIONS_ELSEWHERE)
    return vmap(product, in_dims=1, out_dims=-1, chunk_size=at_once)(v)


def hvp(f: Function, w: Tensor, v: Tensor) -> Tensor:
    """Hessian of the scalar f at w times v, forward over reverse: [p] -> [p], [p, k] -> [p, k]."""
    note("curvature_products", _columns(v))
    return plain_hvp(f, w, v)


def plain_hvp(f: Function, w: Tensor, v: Tensor) -> Tensor:
    """`hvp` that is not counted, for those who count the whole of its chunks as one."""
    return along(lambda one: jvp(grad(f), (w,), (one,))[1], v)


def hessian(f: Function, w: Tensor) -> Tensor:
    """The whole Hessian [p, p] of the scalar f at w; p products."""
    return hvp(f, w, torch.eye(w.numel(), dtype=w.dtype, device=w.device))


def ggn_vp(outputs: Function, output_loss: Function, w: Tensor, v: Tensor) -> Tensor:
    """Generalised Gauss-Newton matrix J^T H_out J of output_loss(outputs(w)), times v: [p] -> [p],
    [p, k] -> [p, k].

    J is the Jacobian of `outputs` (any shape) and H_out the Hessian of the scalar `output_loss` in
    the outputs; positive semi-definite where `output_loss` is convex, whatever the model
    (Schraudolph 2002).
    """
    note("curvature_products", _columns(v))
    return plain_ggn_vp(outputs, output_loss, w, v)


def plain_ggn_vp(outputs: Function, output_loss: Function, w: Tensor, v: Tensor) -> Tensor:
    """`ggn_vp` that is not counted."""
    at, pull, *_ = vjp(outputs, w)
    bend = grad(output_loss)

    def product(one: Tensor) -> Tensor:
        moved = jvp(outputs, (w,), (one,))[1]
        return pull(jvp(bend, (at,), (moved,))[1])[0]

    return along(product, v)


def prepared_hvp(f: Function, w: Tensor) -> Function:
    """v -> `plain_hvp(f, w, v)` for many v: the gradient's graph is made once and kept, a backward
    through it is a product.

    Some four times as fast as making it anew, for the memory of the graph over all that f goes
    through.
    """
    _, pull, *_ = vjp(grad(f), w)
    return lambda v: along(lambda one: pull(one)[0], v)


def prepared_ggn_vp(outputs: Function, output_loss: Function, w: Tensor) -> Function:
    """v -> `plain_ggn_vp(outputs, output_loss, w, v)` for many v, from graphs that are made once
    and kept.
    """
    at, pull, *_ = vjp(outputs, w)
    # linear, so that its transpose is the Jacobian
    _, push, *_ = vjp(lambda bent: pull(bent)[0], torch.zeros_like(at))
    _, bend, *_ = vjp(grad(output_loss), at)
    return lambda v: along(lambda one: pull(bend(push(one)[0])[0])[0], v)


# ---- all samples at once -------------------------------------------------------------------------


def chunks(data: Data, chunk: int | None) -> Iterator[Data]:
    """The data in pieces of at most `chunk` samples, in order; None: in one."""
    samples = data[0].shape[0]
    size = chunk or max(samples, 1)
    for start in range(0, max(samples, 1), size):  # no samples are one piece of none
        yield tuple(part[start : start + size] for part in data)


def per_sample_gradients(
    losses: Losses, w: Tensor, data: Data, chunk: int | None = None, matrix: Tensor | None = None
) -> Tensor:
    """Row i is grad l_i(w): [n, p], or with a `matrix` [p, d] its product with that, [n, d];
    gradients of one chunk exist at a time.
    """
    note("per_sample_gradients")

    def one(sample: Data) -> Tensor:
        return grad(lambda at: losses(at, tuple(part.unsqueeze(0) for part in sample)).squeeze(0))(
            w
        )

    pieces = (vmap(one)(piece) for piece in chunks(data, chunk))
    return torch.cat([piece if matrix is None else piece @ matrix for piece in pieces])


def per_sample_dots(
    losses: Losses, w: Tensor, data: Data, directions: Tensor, chunk: int | None = None
) -> Tensor:
    """grad l_i(w) . v for every sample i: [n] for a direction [p], [n, k] for [p, k].

    One forward-mode pass over the data per direction: the derivative of the vector of losses along
    v. No gradient of a sample is made, and the losses of a chunk may depend on one another.
    """
    note("forward_mode", _columns(directions))

    def of(piece: Data) -> Tensor:
        return along(lambda one: jvp(lambda at: losses(at, piece), (w,), (one,))[1], directions)

    return torch.cat([of(piece) for piece in chunks(data, chunk)])


def _columns(v: Tensor) -> int:
    return 1 if v.dim() == 1 else v.shape[1]
