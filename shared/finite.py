"""NaN and infinity are found before anything is computed with them, or saved."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shared.errors import UserError


def check_finite(tensors: nn.Module | Iterable[tuple[str, Tensor]], what: str) -> None:
    """Refuse NaN and infinity, reading tensor by tensor and holding none of them twice.

    Args:
        tensors: a model, of which parameters and what is saved with them are looked at, or pairs
            of name and tensor. Whole numbers pass.
        what: begins the message: "/models/mine (llama)", "the trained model".

    Raises:
        UserError: names the first tensor that holds either.
    """
    pairs = tensors.state_dict().items() if isinstance(tensors, nn.Module) else tensors
    for name, tensor in pairs:
        if not is_finite(tensor):
            raise UserError(
                f"{what}: '{name}' holds NaN or infinity; nothing can be computed with it"
            )


def check_trained(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """The gate that trained weights pass on their way to a file, as (name, tensor).

    Raises:
        UserError: one of them holds NaN or infinity: the training has failed.
    """
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise UserError(
                f"the trained model: '{name}' holds NaN or infinity, and it is not saved; try"
                " another --out with a smaller learning rate"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of `tensor`, of any shape, is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.dtype.itemsize == 1:  # torch finds no extremes of 8 bits
        tensor = tensor.float()
    # the extremes need no memory of the tensor's size, as a mask would, and NaN is both of them
    least, largest = torch.aminmax(tensor.detach())
    return bool(least.isfinite()) and bool(largest.isfinite())
