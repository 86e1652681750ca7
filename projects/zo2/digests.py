"""Digests of weights: equal where every bit is."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """SHA-256 of names, types, shapes and every bit, in the order given."""
    digested = hashlib.sha256()
    for name, tensor in tensors:
        digested.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digested.update(_bits(tensor))
    return digested.digest()


def unordered_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits of names and bits, whatever the order in which the tensors come."""
    parts = {name: hashlib.sha256(_bits(tensor)).digest() for name, tensor in tensors}
    digested = hashlib.sha256()
    for name in sorted(parts):
        digested.update(name.encode() + parts[name])
    return digested.hexdigest()[:16]


def _bits(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
