"""Sums of clipped per-sample weight gradients on a GPU, in Triton: two backends of `backends.py`.

`triton_2k` takes a chunk of samples at a time. Its first kernel forms their products, stores them,
and stores one partial squared norm per sample and tile; its second reads each stored product once
and adds c times it to the sum. A chunk is as many samples as the L2 cache holds, so that the
products are read where they were just written.

`triton_persistent` is the paper's single pass: every tile of the weight has a program of its own
that keeps the tile's sum in registers and goes through the samples. Programs exchange partial
squared norms at a barrier across the grid, once per sample, and each computes c for itself: no
product ever reaches memory. It needs all its programs on the device at once (`resident`).

Neither uses atomics on floating-point numbers or anything left in memory by an earlier launch, so
equal inputs give equal bits.

TRITON_INTERPRET=1, set before this module is imported, runs all on CPU tensors; the barrier then
allows one program only.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from projects.flashdp.factors import TINY, Factors
from projects.flashdp.scratch import SCRATCH_BUFFER
from shared.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError:
    # triton comes with CUDA builds of torch; without it the kernels below are never called
    triton = None

# of products in a chunk: the inputs shall stay in the cache beside them, which has 50 MiB on an
# H100 or H200
L2_BYTES = 32 << 20
ENOUGH = 128  # programs that keep a large GPU busy
BLOCK = 2048  # elements a program of the second kernel adds up
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

EXACT = False  # True: float32 products in float32, even where torch is allowed TF32


def available() -> bool:
    """Whether the kernels can run here at all."""
    return triton is not None and (torch.cuda.is_available() or _interpreted())


def supports(left: Tensor, right: Tensor, out: Tensor) -> bool:
    """Whether they take these tensors. (In float64 the tensor cores have no use, and `loop`
    serves.)
    """
    same = left.dtype == right.dtype and left.device == right.device == out.device
    return (
        available()
        and same
        and {left.dtype, out.dtype} <= set(DTYPES)
        and (left.is_cuda or _interpreted())
    )


def resident(rows: int, columns: int, device: torch.device | None = None) -> bool:
    """Whether a weight of this shape has few enough tiles for `triton_persistent`: one for each of
    the device's processors.
    """
    return available() and _resident_side(rows, columns, device) is not None


def triton_2k(left: Tensor, right: Tensor, out: Tensor, fresh: bool, factors: Factors) -> None:
    """Two kernels per chunk of samples."""
    _require("triton_2k", left, right, out)
    samples, positions, rows = left.shape
    columns = right.shape[2]
    if not samples or not out.numel():
        return _nothing(samples, out, fresh, factors)
    # A product of float16 can leave its range, so it is stored in float32; one of bfloat16 cannot.
    wide = left.new_empty(0, dtype=torch.float32) if left.dtype == torch.float16 else left
    chunk = min(samples, max(1, L2_BYTES // (rows * columns * wide.itemsize)), 65535)
    side = _side(rows, columns, chunk)
    tiles = triton.cdiv(rows, side) * triton.cdiv(columns, side)
    with torch.cuda.device_of(left):
        for start in range(0, samples, chunk):
            part = slice(start, min(start + chunk, samples))
            size = part.stop - part.start
            products = SCRATCH_BUFFER.get(wide, size, rows, columns)
            partials = torch.empty(size, tiles, device=left.device, dtype=torch.float32)
            inputs = (left[part], right[part])
            _products[(tiles, size)](
                *inputs, products, partials, *_geometry(*inputs), **_options(left, positions, side)
            )
            c = factors(partials.sum(1), start)
            grid = (triton.cdiv(out.numel(), BLOCK),)
            write, flat = fresh and start == 0, out.is_contiguous()
            _add[grid](
                products,
                c,
                out,
                size,
                out.numel(),
                columns,
                *out.stride(),
                FRESH=write,
                FLAT=flat,
                BLOCK=BLOCK,
                num_warps=4,
            )


def triton_persistent(
    left: Tensor, right: Tensor, out: Tensor, fresh: bool, factors: Factors
) -> None:
    """One kernel; `triton_2k` where the weight is not `resident`."""
    _require("triton_persistent", left, right, out)
    samples, positions, rows = left.shape
    columns = right.shape[2]
    side = _resident_side(rows, columns, left.device)
    if side is None:
        return triton_2k(left, right, out, fresh, factors)
    if not samples or not out.numel():
        return _nothing(samples, out, fresh, factors)
    tiles = triton.cdiv(rows, side) * triton.cdiv(columns, side)
    partials = torch.empty(2, tiles, device=left.device, dtype=torch.float32)
    norms, c = torch.empty(2, samples, device=left.device, dtype=torch.float32)
    counter = torch.zeros(1, device=left.device, dtype=torch.int32)
    extra = norms if factors.extra is None else factors.extra.contiguous()
    with torch.cuda.device_of(left):
        _persistent[(tiles,)](
            *(left, right, out, extra, partials, counter, norms, c),
            *(samples, float(factors.bound), float(factors.scale)),
            *_geometry(left, right),
            *out.stride(),
            TINY=TINY,
            EXTRA=factors.extra is not None,
            FRESH=fresh,
            TILES=triton.next_power_of_2(tiles),
            **_options(left, positions, side),
            # the driver refuses a grid that is not resident, on which the barrier would never open
            launch_cooperative_grid=True,
        )
    factors.record(norms, c)


def require(backend: str) -> None:
    """UserError when the kernels cannot run here."""
    if triton is None:
        raise UserError(
            f"backend '{backend}' needs triton, which is not installed: pip install triton, or use"
            " backend 'auto'"
        )
    if not available():
        raise UserError(
            f"backend '{backend}' needs a CUDA device, and torch sees none; use backend 'auto'"
        )


def _require(backend: str, left: Tensor, right: Tensor, out: Tensor) -> None:
    require(backend)
    if not supports(left, right, out):
        found = f"{left.dtype}, {right.dtype} and {out.dtype} on {left.device.type}".replace(
            "torch.", ""
        )
        raise UserError(
            f"backend '{backend}' takes float32, bfloat16 and float16 on a GPU, not {found}; use"
            " backend 'auto'"
        )


def _interpreted() -> bool:
    return triton is not None and not isinstance(_products, triton.JITFunction)


def _nothing(samples: int, out: Tensor, fresh: bool, factors: Factors) -> None:
    """An empty batch, which has no grid to launch."""
    factors(torch.zeros(samples, device=out.device), 0)
    if fresh:
        out.zero_()


def _geometry(left: Tensor, right: Tensor) -> Sequence[int]:
    return (*left.shape[1:], right.shape[2], *left.stride(), *right.stride())


# ---- tiles: square; their side follows from the shapes and, where they must be resident, the
# device, and nothing is timed


def _side(rows: int, columns: int, samples: int) -> int:
    """128 does the fewest loads per product; 64 where that leaves processors idle."""
    return 128 if samples * triton.cdiv(rows, 128) * triton.cdiv(columns, 128) >= ENOUGH else 64


def _resident_side(rows: int, columns: int, device: torch.device | None) -> int | None:
    """64 where each tile has a processor of its own, else 128, whose product and sum fill a
    processor's registers; else None.
    """
    if _interpreted():
        processors = 1
    else:
        processors = (
            0
            if device and device.type != "cuda"
            else torch.cuda.get_device_properties(device).multi_processor_count
        )
    return next(
        (
            side
            for side in (64, 128)
            if triton.cdiv(rows, side) * triton.cdiv(columns, side) <= processors
        ),
        None,
    )


def _options(left: Tensor, positions: int, side: int) -> dict[str, object]:
    """How a tile is computed. Steps along the positions of 128 bytes, of which three are under way
    where tensor cores want them.
    """
    tensor_cores = left.dtype != torch.float32 or (
        torch.backends.cuda.matmul.fp32_precision == "tf32" and not EXACT
    )
    step = 128 // left.itemsize if tensor_cores else 16
    return {
        "SIDE": side,
        "STEP": min(step, max(16, triton.next_power_of_2(positions))),
        "PRECISION": "tf32" if tensor_cores else "ieee",
        # whose dot takes bfloat16's bits for integers
        "WIDEN": left.dtype == torch.bfloat16 and _interpreted(),
        "num_warps": 8 if side == 128 else 4,
        "num_stages": 3 if tensor_cores else 2,
    }


# ---- kernels ----


def _jit(kernel):
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _tile(L, R, SIDE: tl.constexpr):
    """Rows and columns of this program's tile. Eight tiles down, then the next column: neighbours
    share more of what they read.
    """
    down, across = tl.cdiv(L, SIDE), tl.cdiv(R, SIDE)
    tile = tl.program_id(0)
    band = tile // (8 * across)
    height = min(down - band * 8, 8)
    place = tile % (8 * across)
    row, column = band * 8 + place % height, place // height
    return row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)


@_jit
def _product(
    left, right, rows, columns, T, L, R, left_t, left_l, right_t, right_r,
    SIDE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of leftᵀ right, in float32; 0 outside the matrix."""
    positions = tl.arange(0, STEP)
    left += rows.to(tl.int64)[:, None] * left_l + positions[None, :].to(tl.int64) * left_t
    right += positions[:, None].to(tl.int64) * right_t + columns.to(tl.int64)[None, :] * right_r
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, T, STEP):
        inside = start + positions < T
        a = tl.load(left, mask=(rows < L)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & (columns < R)[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += STEP * left_t
        right += STEP * right_t
    return total


@_jit
def _products(
    left, right, products, partials,
    T, L, R, left_b, left_t, left_l, right_b, right_t, right_r,
    SIDE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (tile, sample): one tile of one sample's product, and its squared norm as it is
    stored, that is, after rounding.
    """
    sample = tl.program_id(1).to(tl.int64)
    rows, columns = _tile(L, R, SIDE)
    left += sample * left_b
    right += sample * right_b
    total = _product(
        left,
        right,
        rows,
        columns,
        T,
        L,
        R,
        left_t,
        left_l,
        right_t,
        right_r,
        SIDE,
        STEP,
        PRECISION,
        WIDEN,
    )
    stored = total.to(products.dtype.element_ty)
    at = (sample * L + rows[:, None]) * R + columns[None, :]
    tl.store(products + at, stored, mask=(rows < L)[:, None] & (columns < R)[None, :])
    wide = stored.to(tl.float32)
    tl.store(
        partials + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(wide * wide, 1), 0)
    )


@_jit
def _add(
    products, c, out, samples, size, columns, out_l, out_r,
    FRESH: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out += Σ_b c_b products_b, for BLOCK elements. A sample with c = 0 adds nothing, whatever it
    holds.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    target = out + at if FLAT else out + (at // columns) * out_l + (at % columns) * out_r
    total = tl.zeros([BLOCK], tl.float32)
    if not FRESH:
        total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    for sample in range(samples):
        factor = tl.load(c + sample).to(tl.float32)
        product = tl.load(products + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(factor > 0, factor * product, 0.0)
        products += size
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@_jit
def _persistent(
    left, right, out, extra, partials, counter, norms, c,
    samples, bound, scale,
    T, L, R, left_b, left_t, left_l, right_b, right_t, right_r, out_l, out_r,
    TINY: tl.constexpr, EXTRA: tl.constexpr, FRESH: tl.constexpr, TILES: tl.constexpr,
    SIDE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program: one tile of the sum, over all samples. The factor is `Factors`' in the same
    operations.

    The counter only grows: sample i's barrier opens at (i + 1) programs. Partial norms alternate
    between two rows: who writes the next sample's has passed this sample's barrier, and who writes
    the one's after next knows that all have read this one's.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    every = tl.arange(0, TILES)
    rows, columns = _tile(L, R, SIDE)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for sample in range(samples):
        product = _product(
            left,
            right,
            rows,
            columns,
            T,
            L,
            R,
            left_t,
            left_l,
            right_t,
            right_r,
            SIDE,
            STEP,
            PRECISION,
            WIDEN,
        )
        left += left_b
        right += right_b
        row = partials + (sample % 2) * programs
        tl.store(row + program, tl.sum(tl.sum(product * product, 1), 0))
        tl.debug_barrier()  # the whole program has stored before one of its threads says so
        tl.atomic_add(counter, 1, sem="release")
        while tl.atomic_add(counter, 0, sem="acquire") < (sample + 1) * programs:
            pass
        tl.debug_barrier()  # and none reads before that thread has seen all others
        square = tl.sum(tl.load(row + every, mask=every < programs, other=0.0, volatile=True), 0)
        if EXTRA:
            square += tl.load(extra + sample).to(tl.float32)
        norm = tl.sqrt_rn(square) * scale
        factor = tl.where(
            norm < float("inf"), scale * tl.minimum(tl.div_rn(bound, norm + TINY), 1.0), 0.0
        )
        total += tl.where(factor > 0, factor * product, 0.0)
        if program == 0:
            tl.store(norms + sample, norm)
            tl.store(c + sample, factor)
    target = out + rows.to(tl.int64)[:, None] * out_l + columns.to(tl.int64)[None, :] * out_r
    inside = (rows < L)[:, None] & (columns < R)[None, :]
    if not FRESH:
        total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)
