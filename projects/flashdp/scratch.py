"""Memory that layers use one after another, so that it is allocated once."""

import torch
from torch import Tensor


class Scratch:
    """One buffer for all layers, as large as the largest asked for: layers use it one after
    another.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def get(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor of `shape` with the device and dtype of `like`; its content is whatever was
        there.
        """
        key, size = (like.device, like.dtype), torch.Size(shape).numel()
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers.pop(key, None)
            self._buffers[key] = torch.empty(size, device=like.device, dtype=like.dtype)
        return self._buffers[key][:size].view(shape)

    def release(self) -> None:
        """Give the memory back."""
        self._buffers.clear()

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())


SCRATCH_BUFFER = Scratch()
