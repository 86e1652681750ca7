"""How a layer's sum of clipped per-sample weight gradients is formed: one function a backend.

A weight of shape [l, r] meets a batch of B samples with T positions as two factors, `left` [B, T,
l] and `right` [B, T, r]; sample i's gradient is leftᵢᵀ rightᵢ. (For `nn.Linear`, left is the
gradient of the output and right the input; for transformers' `Conv1D`, which stores its weight
transposed, the other way round.) Each backend adds Σᵢ cᵢ leftᵢᵀ rightᵢ to `out` and asks `factors`
for c.

    backend     products of 2·B·T·l·r   besides                      scratch
    loop                  1             4 passes over B·l·r          l·r
    ghost                 1             2·B·T²·(l + r)               2·B·T² + B·T·l
    recompute             2             -                            a tile of it
    explicit              1             5 passes over B·l·r          B·l·r
    triton_2k             1             2 passes over B·l·r          a few l·r
    triton_persistent     1             -                            none

`explicit` is the oracle, and what other implementations do. The last two are CUDA kernels
(`kernels.py`).

`loop` is the paper's method without its kernel: each per-sample gradient is formed once, its norm
is reduced in two levels, and it is scaled into the sum while the next one overwrites it.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from projects.flashdp.factors import Factors, square_norm
from projects.flashdp.scratch import SCRATCH_BUFFER
from shared.errors import UserError

TILE = 1 << 18  # elements of a tile of `recompute`
# a sample's square over that of orthogonal positions, below which a Gram norm is not trusted
CANCELLED = 1 / 64
SCRATCH = 1 << 26  # elements; above it `auto` does not give a layer a scratch of its size


class Backend(Protocol):
    """Adds the clipped sum to `out` [l, r] (or writes it, when `fresh`: `out` is then
    uninitialised).

    `factors(squares, start)` takes the squared norms of samples start, start + 1, ... and returns
    their factors; the factor of a sample whose norm is not finite is 0, and then nothing of the
    sample may reach `out`.
    """

    def __call__(
        self, left: Tensor, right: Tensor, out: Tensor, fresh: bool, factors: Factors
    ) -> None: ...


def loop(left: Tensor, right: Tensor, out: Tensor, fresh: bool, factors: Factors) -> None:
    """One sample at a time through one scratch; the first one of a fresh sum is formed where the
    sum will be.
    """
    direct = fresh and left.dtype == out.dtype
    scratch = SCRATCH_BUFFER.get(left, *out.shape) if len(left) > direct else out
    if fresh and not direct:
        out.zero_()
    for sample, (left_lT, right_Tr) in enumerate(
        zip(left.mT.unbind(), right.unbind(), strict=True)
    ):
        first = direct and sample == 0
        gradient = torch.mm(left_lT, right_Tr, out=out if first else scratch)
        if not out.is_cuda:
            c = factors.next(float(square_norm(gradient)))
            if first:
                out.mul_(c) if c else out.zero_()
            elif c:
                out.add_(gradient, alpha=c)
        else:  # no look at c, which would wait for the device
            c_1 = factors(square_norm(gradient), sample)
            clipped = torch.where(c_1 > 0, gradient * c_1, 0)
            out.copy_(clipped) if first else out.add_(clipped)


def explicit(left: Tensor, right: Tensor, out: Tensor, fresh: bool, factors: Factors) -> None:
    """All per-sample gradients at once."""
    gradients = torch.einsum("btl,btr->blr", left, right)
    c = factors(square_norm(gradients), 0)
    clipped = torch.einsum(
        "b,blr->lr",
        c.to(out.dtype),
        gradients.masked_fill_((c == 0)[:, None, None], 0).to(out.dtype),
    )
    out.copy_(clipped) if fresh else out.add_(clipped)


def ghost(left: Tensor, right: Tensor, out: Tensor, fresh: bool, factors: Factors) -> None:
    """Norms from Gram matrices, then one product of all samples.

    A Gram norm is that of the exact gradient; what is summed has been rounded. Where a sample's
    positions all but cancel the two differ by much, and the bound would not hold: such a sample is
    formed and summed as in `recompute` (on a GPU, where nobody may look, its norm is taken for the
    most that it can be). 16-bit factors are widened, for the same reason.
    """
    if left.dtype in (torch.bfloat16, torch.float16):
        left, right = left.float(), right.float()
    squares, apart = gram_square_norms(left, right)
    cancelled = squares < apart * CANCELLED  # a NaN compares false
    if out.is_cuda:
        _weighted(
            left, right, out, fresh, factors(torch.where(cancelled, apart * left.shape[1], squares))
        )
        return
    few = cancelled.nonzero().flatten().tolist()
    for sample in few:
        squares[sample] = _tiled_square_norm(left[sample], right[sample], out)
    c = factors(squares)
    _weighted(left, right, out, fresh, c.masked_fill(cancelled, 0) if few else c)
    for sample in few:
        _add_tiles(left[sample], right[sample], out, float(c[sample]))


def gram_square_norms(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """‖leftᵢᵀ rightᵢ‖² for each i as Σₜₛ (leftᵢ leftᵢᵀ)ₜₛ (rightᵢ rightᵢᵀ)ₜₛ, never below 0; and
    the part of it with t = s.

    The second is what the square would be were the positions orthogonal; the first far below it
    means that they cancel.
    """
    if left.shape[1] == 1:
        squares = (
            torch.linalg.vector_norm(left, dim=(1, 2)) * torch.linalg.vector_norm(right, dim=(1, 2))
        ).square()
        return squares, squares
    product = (left @ left.mT).mul_(right @ right.mT)
    return product.flatten(1).sum(1).clamp_min_(0), product.diagonal(dim1=1, dim2=2).sum(1)


def recompute(left: Tensor, right: Tensor, out: Tensor, fresh: bool, factors: Factors) -> None:
    """Per-sample gradients twice, tile by tile: for their norms, and to be summed. No scratch
    beyond a tile.

    The same product a second time gives the same bits, so the norm is of what is summed.
    """
    if fresh:
        out.zero_()
    for sample in range(len(left)):
        square = _tiled_square_norm(left[sample], right[sample], out)
        c = factors(square, sample) if out.is_cuda else factors.next(float(square))
        _add_tiles(left[sample], right[sample], out, c)


def _tiles(left: Tensor, right: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A sample's gradient a tile at a time, each with its place in `out`."""
    height = max(1, TILE // out.shape[1])
    for columns, place in zip(left.split(height, dim=1), out.split(height), strict=True):
        yield columns.T @ right, place


def _tiled_square_norm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.stack([square_norm(tile) for tile, _ in _tiles(left, right, out)]).sum()


def _add_tiles(left: Tensor, right: Tensor, out: Tensor, c: Tensor | float) -> None:
    """out += c leftᵀ right; nothing for c = 0, whatever the factors hold."""
    if not isinstance(c, Tensor) and c == 0:
        return
    for tile, place in _tiles(left, right, out):
        if isinstance(c, Tensor):
            place.add_(torch.where(c > 0, tile * c, 0))
        else:
            place.add_(tile, alpha=c)


def _weighted(left: Tensor, right: Tensor, out: Tensor, fresh: bool, c: Tensor) -> None:
    """out += Σᵢ cᵢ leftᵢᵀ rightᵢ; samples with c = 0 are left out, whatever they hold."""
    if out.is_cuda:  # no look at c, which would wait for the device
        left = torch.where((c > 0)[:, None, None], left, 0)
        right = torch.where((c > 0)[:, None, None], right, 0)
    elif not bool((c > 0).all()):
        kept = c > 0
        left, right, c = left[kept], right[kept], c[kept]
    weighted = (left * c[:, None, None].to(left.dtype)).flatten(0, 1).T
    if left.dtype != out.dtype:
        product = (weighted @ right.flatten(0, 1)).to(out.dtype)
        out.copy_(product) if fresh else out.add_(product)
    else:
        torch.addmm(out, weighted, right.flatten(0, 1), beta=0 if fresh else 1, out=out)


def triton_2k(left: Tensor, right: Tensor, out: Tensor, fresh: bool, factors: Factors) -> None:
    """Chunks of samples, two kernels each."""
    from projects.flashdp import kernels  # imports triton, which not every machine has

    kernels.triton_2k(left, right, out, fresh, factors)


def triton_persistent(
    left: Tensor, right: Tensor, out: Tensor, fresh: bool, factors: Factors
) -> None:
    """All samples in one kernel."""
    from projects.flashdp import kernels

    kernels.triton_persistent(left, right, out, fresh, factors)


BACKENDS: dict[str, Backend] = {
    one.__name__: one for one in (loop, ghost, recompute, explicit, triton_2k, triton_persistent)
}


def check(backend: str) -> None:
    """UserError for a backend that there is not, or not here."""
    if backend != "auto" and backend not in BACKENDS:
        raise UserError(f"no backend '{backend}'; there are auto, {', '.join(BACKENDS)}")
    if backend.startswith("triton"):
        from projects.flashdp import kernels

        kernels.require(backend)


def fitting(backend: str, out: Tensor) -> str:
    """The backend asked for, or what serves where the weight has more tiles than
    `triton_persistent` can hold.
    """
    if backend == "triton_persistent":
        from projects.flashdp import kernels

        return backend if kernels.resident(*out.shape, out.device) else "triton_2k"
    return backend


# Products done in the time that memory moves one byte, for float32 on one core and for bfloat16 on
# a large GPU.
FLOPS_PER_BYTE = {"cpu": 4.2, "cuda": 125.0}


def cost(
    backend: str,
    batch: int,
    positions: int,
    rows: int,
    columns: int,
    device: str,
    itemsize: int = 4,
) -> float:
    """Predicted time of a backend for a weight [rows, columns], in multiples of the plain weight
    gradient's 2·B·T·l·r operations.
    """
    product, size = 2 * batch * positions * rows * columns, batch * rows * columns
    operations, elements = {
        "loop": (0, 4 * size),
        "explicit": (0, 5 * size),
        "recompute": (product, 0),
        "ghost": (
            2 * batch * positions**2 * (rows + columns),
            batch * positions * (2 * rows + 3 * positions),
        ),
        "triton_2k": (0, 2 * size),
        "triton_persistent": (0, 0),
    }[backend]
    return 1 + (operations + elements * itemsize * FLOPS_PER_BYTE[device]) / product


def choose(
    batch: int, positions: int, rows: int, columns: int, device: str, itemsize: int = 4
) -> str:
    """The backend that `cost` predicts to be fastest among those whose scratch is in bounds. A
    function of shapes alone.
    """
    fits = rows * columns <= SCRATCH
    names = ["ghost", "recompute", *(["loop"] if fits else [])]
    if device == "cuda" and itemsize < 8:
        from projects.flashdp import kernels

        names += ["triton_2k"] if fits and kernels.available() else []
        names += (
            ["triton_persistent"] if kernels.available() and kernels.resident(rows, columns) else []
        )
    return min(
        names, key=lambda name: cost(name, batch, positions, rows, columns, device, itemsize)
    )
