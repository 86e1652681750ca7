"""The factors by which samples are clipped, and the norms that they follow from.

A backend forms a sample's gradient, or only its norm, and asks here for the sample's factor
c = min(1, C / norm), where C is the bound of the clip group.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-10  # added to a norm before it divides


class Factors:
    """The factors c of a clip group's samples, as a backend asks for them.

    A kernel that computes c itself takes `bound`, `scale` and `extra` for it, and tells `record`
    what it found.

    Args:
        bound: what a sample's norm is clipped to.
        scale: what a sample's gradient arrives divided by (the batch's size, with the mean of the
            losses).
        extra: squared norms, by sample, of what else is in the group.
        norms: gets the samples' norms.
    """

    def __init__(self, bound: float, scale: int, extra: Tensor | None, norms: list[Tensor]):
        self.bound, self.scale, self.extra = bound, scale, extra
        self._norms, self._found = norms, []
        self._extra: list[float] | None = None
        self._scalars: list[tuple[float, float]] = []

    def __call__(self, squares: Tensor, start: int = 0) -> Tensor:
        """c of samples start, start + 1, ...: min(1, bound / norm), or scale times it; 0 for a norm
        that is not finite.
        """
        flat = squares.reshape(-1)
        if self.extra is not None:
            flat = flat + self.extra[start : start + len(flat)]
        norms = flat.sqrt() * self.scale
        c = torch.where(
            norms.isfinite(), self.scale * (self.bound / (norms + TINY)).clamp(max=1), 0
        )
        self.record(norms, c)
        return c.view_as(squares)

    def record(self, norms: Tensor, c: Tensor) -> None:
        """Remember the next samples' norms and factors."""
        self._norms.append(norms.detach())
        self._found.append(c)

    def next(self, square: float) -> float:
        """c of the next sample, as `factors(...)` gives it but without tensors: on a CPU these
        would take longer than a small product.
        """
        if self.extra is not None:
            self._extra = self._extra or self.extra.tolist()
            square += self._extra[len(self._scalars)]
        # NaN compares false
        norm = math.sqrt(square) * self.scale if square < math.inf else math.inf
        c = self.scale * min(1.0, self.bound / (norm + TINY)) if norm < math.inf else 0.0
        self._scalars.append((norm, c))
        return c

    def of(self, squares: Tensor) -> Tensor:
        """c of all samples, by whichever way is faster on the device."""
        if squares.is_cuda:
            return self(squares)
        for square in squares.tolist():
            self.next(square)
        return self.found()

    def found(self) -> Tensor:
        """c of all samples. Call it once, when the backend is done: only then are the norms of
        `next` recorded.
        """
        if self._scalars:
            self.record(*torch.tensor(self._scalars, dtype=torch.float64).unbind(1))
        return self._found[0] if len(self._found) == 1 else torch.cat(self._found)


def square_norm(gradient: Tensor) -> Tensor:
    """‖gradient‖² of a matrix [l, r] (or of each of [B, l, r]) in two levels: rows first, then over
    the rows.

    A flat reduction in float32 loses four digits on millions of elements on a CPU; this one loses
    none. The dtype is float32 at least.
    """
    dtype = torch.float32 if gradient.dtype in (torch.bfloat16, torch.float16) else gradient.dtype
    rows = torch.linalg.vector_norm(gradient, dim=-1, dtype=dtype)
    return torch.linalg.vecdot(rows, rows)


def square_norms(gradients: Sequence[Tensor]) -> Tensor:
    """For each sample the squared norm of its gradients [B, ...] of several small
    parameters: [B].
    """
    flat = [gradient.flatten(1) for gradient in gradients]
    return torch.linalg.vector_norm(
        torch.cat(flat, 1) if len(flat) > 1 else flat[0], dim=1
    ).square_()
