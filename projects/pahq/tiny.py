"""A small decoder for circuits that are built by hand or trained in place: learned positions, any
number of layers, with or without MLPs and norms. Its own forward is dense; the patched one is the
engine's, as for every family.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.pahq.decoder import Apply, Decoder, Layer, Matrix, unplaced
from projects.pahq.graph import Graph


class TinyBlock(nn.Module):
    """Q, K, V, O [D, D], a ReLU MLP of `inner` (none where 0)."""

    def __init__(self, width: int, heads: int, inner: int, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up = nn.Linear(width, inner) if inner else None
        self.down = nn.Linear(inner, width) if inner else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        if self.up is None or self.down is None:
            return x
        return x + self.down(F.relu(self.up(self.mlp_norm(x))))


class TinyDecoder(nn.Module):
    """See the module. Logits [B, T, vocabulary] of tokens [B, T].

    Args:
        inner: width of the MLPs; 0: attention only.
        norm: LayerNorm before each part and at the end; False: none, for built circuits.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        vocabulary: int,
        positions: int,
        inner: int = 0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(TinyBlock(width, heads, inner, norm) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.unembedding = nn.Linear(width, vocabulary)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T, D]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.embedding(tokens) + self.position(places)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembedding(self.norm(x))

    def decoder(self) -> Decoder:
        """Its parts, for the engine."""
        matrices = {"unembed": Matrix(self.unembedding.weight, self.unembedding.bias)}
        layers = []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, TinyBlock)
            width = block.out.weight.shape[0] // block.heads
            if block.up is not None and block.down is not None:
                matrices[f"{number}.up"] = Matrix(block.up.weight, block.up.bias)
                matrices[f"{number}.down"] = Matrix(block.down.weight, block.down.bias)
            layers.append(
                Layer(
                    attention_norm=block.norm,
                    qkv=block.qkv.weight.unflatten(0, (-1, width)),
                    qkv_bias=block.qkv.bias.view(-1, width),
                    place=unplaced,
                    scale=width**-0.5,
                    out=block.out.weight.T.unflatten(0, (-1, width)).contiguous(),
                    out_bias=block.out.bias,
                    mlp_norm=block.mlp_norm,
                    mlp=None if block.up is None else partial(_mlp, number),
                )
            )
        heads = self.blocks[0].heads  # type: ignore[union-attr]
        graph = Graph(len(layers), heads, heads, mlp=bool(matrices.keys() - {"unembed"}))  # type: ignore[arg-type]
        return Decoder(
            "tiny", graph, tuple(layers), self.embed, self.norm, matrices,
            lambda x, apply: apply("unembed", x), self,
        )  # fmt: skip


def _mlp(number: int, x: Tensor, apply: Apply) -> Tensor:
    return apply(f"{number}.down", F.relu(apply(f"{number}.up", x)))
