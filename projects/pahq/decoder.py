"""A decoder as the patched forward needs it: per layer the norms, the projections of every
receiver, the output matrix of every head, and the MLP. What a family of models calls
these, `families` knows.

Legend of shapes: B prompts, T tokens, P scored positions of a prompt, D the residual stream, E a
head, H heads, K key-value heads, R = H + 2K receivers of a layer's attention (Q, then K, then V).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from projects.pahq.graph import Graph

# (name, x [..., in]) -> [..., out]: a product with the matrix of that name, in whatever precision
Apply = Callable[[str, Tensor], Tensor]
# q [n, B, T, E], k [m, B, T, E] -> the same with norms of heads and rotary positions
Place = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Matrix:
    """weight [out, in] and bias [out]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        qkv: [R, E, D], a matrix for each receiver of the attention; `qkv_bias` [R, E].
        out: [H, E, D], what a head writes for its mixed values; `out_bias` [D] belongs to no head.
        scale: of the scores q k^T.
        mlp: of normed inputs [..., D], by the matrices that it names; None without an MLP.
    """

    attention_norm: Norm
    qkv: Tensor
    qkv_bias: Tensor | None
    place: Place
    scale: float
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Norm | None = None
    mlp: Callable[[Tensor, Apply], Tensor] | None = None


@dataclass(frozen=True)
class Decoder:
    """A whole model.

    Attributes:
        family: of which it was made, for messages.
        embed: tokens [B, T] -> [B, T, D], positions included where they are learned.
        matrices: of MLPs and the unembedding, by name.
        unembed: [..., D] after the final norm -> logits.
        logits: the model's own way from tokens to logits [B, T, vocabulary], to check against.
    """

    family: str
    graph: Graph
    layers: tuple[Layer, ...]
    embed: Callable[[Tensor], Tensor]
    final_norm: Norm
    matrices: Mapping[str, Matrix]
    unembed: Callable[[Tensor, Apply], Tensor]
    logits: Callable[[Tensor], Tensor]

    @property
    def width(self) -> int:
        """D."""
        return self.layers[0].qkv.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.layers[0].qkv.device


def unplaced(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Where positions are in the embedding."""
    return q, k
