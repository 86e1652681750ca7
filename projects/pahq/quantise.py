"""Matrices in a low format, and products with them.

Symmetric formats. A weight [N, K] has one scale for each block of rows (a head, or an output
channel); an activation [M, K] has one for each row, taken as it comes. The product is accumulated
in float32 (int8: int32), multiplied by both scales and left in float32: it is not rounded again.

Legend of shapes: M rows of activations, K features, N outputs.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Format = Literal["int8", "bf16", "e4m3", "int4"]
Scale = Literal["head", "channel", "none"]
FORMATS: tuple[Format, ...] = get_args(Format)
# the largest code; bf16 has no scale
LARGEST = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0}
BITS = {"int8": 8, "bf16": 16, "e4m3": 8, "int4": 4}


def scales(x: Tensor, form: Format) -> Tensor:
    """The scale of each row, [..., 1]; 1 for a row of zeros.

    Args:
        x: [..., K], finite.
    """
    largest = x.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest / LARGEST[form], 1.0)


def encode(x: Tensor, scale: Tensor, form: Format) -> Tensor:
    """Codes of x / scale: int8 (also for int4, whose codes are -7..7), bfloat16 or float8_e4m3fn.

    Values beyond the format's largest are clamped to it: older versions of torch turned those into
    NaN in e4m3.
    """
    if form == "bf16":
        return x.bfloat16()
    largest = LARGEST[form]
    scaled = (x * (1 / scale)).clamp_(-largest, largest)
    return scaled.to(torch.float8_e4m3fn) if form == "e4m3" else scaled.round_().to(torch.int8)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes stand for, float32."""
    return codes.float() * scale


@dataclass
class Rows:
    """Activations in a low format: codes [..., K] and scale [..., 1]."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor, form: Format, scaled: bool = True) -> "Rows":
        """Quantise x [..., K] row by row; not `scaled`: by 1, as the public release does."""
        if form == "bf16" or not scaled:
            scale = torch.ones_like(x[..., :1])
        else:
            scale = scales(x, form)
        return cls(encode(x, scale, form), scale)


class LowMatrix:
    """A weight [..., N, K] in a low format.

    Attributes:
        codes: [..., N, K].
        scale: [..., N, 1], the same within a block.
    """

    def __init__(self, weight: Tensor, form: Format, scale: Scale = "head", block: int = 0) -> None:
        """
        Args:
            weight: [..., N, K], float32.
            scale: head: one for each `block` rows (of all rows where 0); channel: one for each row;
                none: 1, as in the public release.
        """
        self.form = form
        self.scaled = scale != "none"
        rows = weight.shape[-2]
        if form == "bf16" or scale == "none":
            self.scale = torch.ones_like(weight[..., :1])
        elif scale == "channel":
            self.scale = scales(weight, form)
        else:
            blocks = weight.unflatten(-2, (-1, block or rows))
            per_block = scales(blocks.flatten(-2), form)  # [..., blocks, 1]
            self.scale = per_block.repeat_interleave(block or rows, dim=-2)
        self.codes = encode(weight, self.scale, form)

    @property
    def nbytes(self) -> int:
        """Of codes as stored by hardware with that format; scales are not counted."""
        return self.codes.numel() * BITS[self.form] // 8

    def rows(self, x: Tensor) -> Rows:
        """x [..., K] as this matrix takes it."""
        return Rows.of(x, self.form, self.scaled)

    def product(self, x: Rows, pick: int | list[int] | None = None) -> Tensor:
        """x W^T, [M, N'] float32.

        Args:
            x: codes [M, K].
            pick: of a weight [R, N, K]: the matrix, or the matrices one beside the other.
        """
        codes, scale = self.codes, self.scale
        if pick is not None:
            codes, scale = codes[pick], scale[pick]
        product = multiply(x.codes, codes.flatten(0, -2), self.form)
        if not self.scaled or self.form == "bf16":
            return product
        return product.mul_(x.scale).mul_(scale.flatten(0, -2).T)


def multiply(x: Tensor, w: Tensor, form: Format) -> Tensor:
    """Codes [M, K] times codes [N, K], [M, N] in float32.

    int8 and int4 are exact in int32. The product of two e4m3 numbers is exact in float32, so on a
    CPU they are multiplied there; a GPU has the instruction.
    """
    if form in ("int8", "int4"):
        if x.is_cuda and x.shape[0] <= 16:  # cuBLAS takes more rows than 16
            return torch._int_mm(F.pad(x, (0, 0, 0, 17 - x.shape[0])), w.T)[: x.shape[0]].float()
        return torch._int_mm(x, w.T).float()
    if form == "bf16":
        return (x @ w.T).float()
    if x.is_cuda:
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(
            x, w.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
        )
    return x.float() @ w.float().T


def straight_through(low: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The value of the low product with the gradient of the full one."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return low
    full = F.linear(x, weight)
    return full + (low - full).detach()
