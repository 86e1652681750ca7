"""Gaussian directions that are never stored, and the arithmetic of MeZO on them.

z ~ N(0, I) is drawn again from its seed whenever it is needed. Two properties make the block-wise
walk of ZO2 equal to MeZO to the last bit:

- a generator that walks the tensors in the same order draws the same numbers, wherever the walk
  pauses;
- every expression keeps MeZO's rounding: noise is `(scale * z) * eps` in the tensor's own dtype
  (scales are +-1 and +-2, exact in binary, so `scale * (z * eps)` is the same except where z * eps
  is subnormal: in float16), the update is `theta - lr * (g * z + decay * theta)`, or `theta - lr *
  (g * z)`.

On a CPU z is drawn in cache-sized pieces. The Gaussian stream of torch's CPU generator can be cut
at multiples of 16 elements when both sides keep at least 16, so the pieces do not change a bit. A
CUDA generator cannot be cut, there a tensor is drawn whole.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# elements drawn at a time on a CPU: 256 KiB of float32, inside a second-level cache
PIECE = 1 << 16

# (target, source, scale): target = source + scale * z * eps
Addition = tuple[Tensor, Tensor, float]


def pieces(numel: int, piece: int = PIECE) -> Iterator[slice]:
    """Cut `range(numel)` at multiples of 16 that leave at least 16 elements on either side."""
    start = 0
    while numel - start >= piece + 16:
        yield slice(start, start + piece)
        start += piece
    if start < numel or numel == 0:
        yield slice(start, numel)


def doubles_exactly(dtype: torch.dtype) -> bool:
    """Whether 2 * (z * eps) is (2 * z) * eps to the last bit: not in float16, where z * eps is
    often subnormal.
    """
    return dtype != torch.float16


class Scratch:
    """Memory for one piece of noise (and one more for weight decay), shared by the streams, which
    are never used at the same time.

    `longest` is the element count of the largest tensor they will meet: the size of a piece on
    CUDA, where a tensor is drawn whole.
    """

    def __init__(self, device: torch.device, longest: int):
        self.device = device
        self.piece = PIECE if device.type == "cpu" else longest
        self._size = min(longest, self.piece + 15)
        self._rows: dict[tuple[torch.dtype, int], Tensor] = {}

    def row(self, dtype: torch.dtype, index: int = 0) -> Tensor:
        """One-dimensional memory of `dtype`, with arbitrary content."""
        if (dtype, index) not in self._rows:
            self._rows[dtype, index] = torch.empty(self._size, device=self.device, dtype=dtype)
        return self._rows[dtype, index]


class Noise:
    """A private generator that walks tensors; the user's global generators are never touched."""

    def __init__(self, scratch: Scratch):
        self.generator = torch.Generator(scratch.device)
        self._scratch = scratch

    def seed(self, seed: int) -> None:
        """Start the stream of `seed`. Zero is a seed like any other."""
        self.generator.manual_seed(seed)

    def state(self) -> Tensor:
        """Where the stream stands (16 bytes on CUDA, 5056 on a CPU)."""
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        self.generator.set_state(state)

    def draw(self, target: Tensor, eps: float) -> None:
        """target = z * eps, in the target's dtype."""
        target.normal_(generator=self.generator).mul_(eps)

    def skip(self, tensor: Tensor) -> None:
        """Advance the stream past one tensor."""
        for piece in self._pieces(tensor):
            self._z(tensor, piece)

    def add(self, additions: Sequence[Addition], eps: float) -> None:
        """For each (target, source, scale) in turn: target = source + scale * z * eps, all with the
        same z (one draw).
        """
        first = additions[0][0]
        for piece in self._pieces(*(tensor for addition in additions for tensor in addition[:2])):
            z = self._z(first, piece)
            if doubles_exactly(z.dtype):
                z.mul_(eps)
            for target, source, scale in additions:
                noise, alpha = z, scale
                if not doubles_exactly(z.dtype):
                    noise = torch.mul(z, scale, out=self._like(z)).mul_(eps)
                    alpha = 1.0
                torch.add(_part(source, piece), noise, alpha=alpha, out=_part(target, piece))

    def update(self, theta: Tensor, lr: float, g: float, decay: float) -> None:
        """theta = theta - lr * (g * z + decay * theta); a `decay` of zero costs nothing, and adding
        its zeros would change no bit of a finite theta.
        """
        for piece in self._pieces(theta):
            z, part = self._z(theta, piece), _part(theta, piece)
            z.mul_(g)
            if decay:
                z.add_(torch.mul(part, decay, out=self._like(z)))
            part.sub_(z.mul_(lr))

    def _pieces(self, *tensors: Tensor) -> Iterator[slice | None]:
        if all(tensor.is_contiguous() for tensor in tensors):
            yield from pieces(tensors[0].numel(), self._scratch.piece)
        else:
            # z follows the logical order of the elements, which a flat view of these tensors would
            # not
            yield None

    def _z(self, tensor: Tensor, piece: slice | None) -> Tensor:
        if piece is None:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).normal_(
                generator=self.generator
            )
        return self._scratch.row(tensor.dtype)[: piece.stop - piece.start].normal_(
            generator=self.generator
        )

    def _like(self, z: Tensor) -> Tensor:
        """Memory of the shape of `z`, which `_z` returned: a second piece, or new where z was drawn
        whole.
        """
        row = self._scratch.row(z.dtype, 1)
        return row[: z.numel()].view_as(z) if z.numel() <= row.numel() else torch.empty_like(z)


def _part(tensor: Tensor, piece: slice | None) -> Tensor:
    return tensor if piece is None else tensor.view(-1)[piece]
