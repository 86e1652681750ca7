"""Circuits that are built, so that their edges are known: weights are written down, with decoy
heads and MLPs that work on the same inputs and write where nobody of the circuit reads.

The residual stream has a named subspace for each kind of content. All of it is then turned by a
random rotation, which changes no logit (there are no norms) and makes every weight dense, so that
rounding reaches every part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from projects.pahq.graph import Mask
from projects.pahq.tiny import TinyBlock, TinyDecoder

TOKENS, LENGTH = 6, 8  # the vocabulary, and tokens of a prompt
SHARP = 60.0  # scores of a head that attends to one place
HEADS, WIDTH = 4, 16  # of a layer; of a head (the largest subspace is narrower)


@dataclass(frozen=True)
class Built:
    """A model, its true edges, and prompts for it."""

    name: str
    model: TinyDecoder
    true: Mask
    clean: Tensor
    corrupted: Tensor
    positions: Tensor


def _spaces(**sizes: int) -> tuple[dict[str, slice], int]:
    """Subspaces one after the other, and the width of all, a multiple of what the heads need."""
    spaces, start = {}, 0
    for name, size in sizes.items():
        spaces[name] = slice(start, start + size)
        start += size
    width = HEADS * WIDTH
    assert start <= width
    return spaces, width


def _empty(layers: int, width: int, inner: int, outputs: int) -> TinyDecoder:
    model = TinyDecoder(layers, HEADS, width, TOKENS, LENGTH, inner, norm=False).eval()
    model.unembedding = nn.Linear(width, outputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model.requires_grad_(False)


def _embed(model: TinyDecoder, token: slice, place: slice) -> None:
    model.embedding.weight[:, token] = torch.eye(TOKENS)
    model.position.weight[:, place] = torch.eye(LENGTH)


def _attend(
    block: nn.Module,
    head: int,
    *,
    q: tuple[slice, Tensor] | None = None,
    k: tuple[slice, Tensor] | None = None,
    v: slice,
    to: slice,
) -> None:
    """Write a head: Q and K read a subspace through a matrix (none: attention is uniform over what
    is before), V reads a subspace and the head writes it into another.
    """
    assert isinstance(block, TinyBlock)
    width = block.out.weight.shape[0]
    for letter, read in enumerate((q, k)):
        if read is not None:
            space, matrix = read
            row = letter * width + head * WIDTH
            block.qkv.weight[row : row + len(matrix), space] = matrix
    size = v.stop - v.start
    row = 2 * width + head * WIDTH
    block.qkv.weight[row : row + size, v] = torch.eye(size)
    block.out.weight[to, head * WIDTH : head * WIDTH + size] = torch.eye(to.stop - to.start, size)


def _sharp(matrix: Tensor) -> Tensor:
    """Q's matrix so that the score of a match is `SHARP` (scores are divided by sqrt(WIDTH))."""
    return SHARP * WIDTH**0.5 * matrix


def _shift(by: int) -> Tensor:
    """Position t to the unit vector of t - by; nothing for the first ones."""
    matrix = torch.zeros(LENGTH, LENGTH)
    for t in range(by, LENGTH):
        matrix[t - by, t] = 1.0
    return matrix


def _mirror() -> Tensor:
    """Position t of the second half to the mirrored one of the first."""
    matrix = torch.zeros(LENGTH, LENGTH)
    for t in range(LENGTH // 2, LENGTH):
        matrix[LENGTH - 1 - t, t] = 1.0
    return matrix


def _decoys(model: TinyDecoder, layer: int, heads: list[int], reads: slice, to: slice) -> None:
    """Heads that copy, by attention of different kinds, into a subspace that only decoys read."""
    place = slice(TOKENS, TOKENS + LENGTH)
    for number, head in enumerate(heads):
        q = (place, _sharp(_shift(number + 1)))
        _attend(model.blocks[layer], head, q=q, k=(place, torch.eye(LENGTH)), v=reads, to=to)


def _reverse() -> tuple[TinyDecoder, list[tuple[str, str]]]:
    """The second half of the positions gives the first half's tokens backwards."""
    spaces, width = _spaces(token=TOKENS, place=LENGTH, found=TOKENS, decoy=TOKENS, more=TOKENS)
    model = _empty(2, width, 0, TOKENS)
    _embed(model, spaces["token"], spaces["place"])
    place = spaces["place"]
    _attend(
        model.blocks[1], 2,
        q=(place, _sharp(_mirror())), k=(place, torch.eye(LENGTH)),
        v=spaces["token"], to=spaces["found"],
    )  # fmt: skip
    _decoys(model, 0, [0, 1, 3], spaces["token"], spaces["decoy"])
    _decoys(model, 1, [0, 1, 3], spaces["decoy"], spaces["more"])
    model.unembedding.weight[:, spaces["found"]] = torch.eye(TOKENS)
    letters = [("emb", f"{letter}1.2") for letter in "qkv"]
    return model, [*letters, ("a1.2", "out")]


def _induction() -> tuple[TinyDecoder, list[tuple[str, str]]]:
    """What came after this token when it was here before: a head that copies the token before, and
    one that looks for it.
    """
    spaces, width = _spaces(
        token=TOKENS, place=LENGTH, before=TOKENS, found=TOKENS, decoy=TOKENS, more=TOKENS
    )
    model = _empty(2, width, 0, TOKENS)
    _embed(model, spaces["token"], spaces["place"])
    token, place = spaces["token"], spaces["place"]
    _attend(
        model.blocks[0], 1,
        q=(place, _sharp(_shift(1))), k=(place, torch.eye(LENGTH)), v=token, to=spaces["before"],
    )  # fmt: skip
    _attend(
        model.blocks[1], 3,
        q=(token, _sharp(torch.eye(TOKENS))), k=(spaces["before"], torch.eye(TOKENS)),
        v=token, to=spaces["found"],
    )  # fmt: skip
    _decoys(model, 0, [0, 2, 3], token, spaces["decoy"])
    _decoys(model, 1, [0, 1, 2], spaces["decoy"], spaces["more"])
    model.unembedding.weight[:, spaces["found"]] = torch.eye(TOKENS)
    own = [("emb", f"{letter}0.1") for letter in "qkv"]
    later = [("emb", "q1.3"), ("a0.1", "k1.3"), ("emb", "v1.3"), ("a1.3", "out")]
    return model, own + later


def _proportion() -> tuple[TinyDecoder, list[tuple[str, str]]]:
    """The share of tokens so far that are the first of the vocabulary: an MLP marks them, a head
    takes the mean. (xproportion of Tracr's examples.)
    """
    spaces, width = _spaces(token=TOKENS, place=LENGTH, mark=1, share=1, decoy=TOKENS, more=1)
    model = _empty(2, width, 2, 1)
    _embed(model, spaces["token"], spaces["place"])
    first, second = model.blocks
    assert isinstance(first, TinyBlock)
    assert isinstance(second, TinyBlock)
    assert first.up is not None
    assert first.down is not None
    assert second.up is not None
    assert second.down is not None
    first.up.weight[0, spaces["token"].start] = 1.0
    first.down.weight[spaces["mark"], 0] = 1.0
    _attend(second, 0, v=spaces["mark"], to=spaces["share"])
    _decoys(model, 0, [0, 1, 2], spaces["token"], spaces["decoy"])
    _decoys(model, 1, [1, 2, 3], spaces["token"], spaces["decoy"])
    second.up.weight[0, spaces["decoy"]] = 1.0
    second.down.weight[spaces["more"], 0] = 1.0
    model.unembedding.weight[0, spaces["share"]] = 1.0
    return model, [("emb", "m0"), ("m0", "v1.0"), ("a1.0", "out")]


_BUILDERS: dict[str, Callable[[], tuple[TinyDecoder, list[tuple[str, str]]]]] = {
    "reverse": _reverse,
    "induction": _induction,
    "proportion": _proportion,
}
NAMES = tuple(_BUILDERS)


def _rotate(model: TinyDecoder, generator: torch.Generator) -> None:
    """Turn the basis of the residual stream, and of the values of each head."""
    width = model.unembedding.weight.shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    for embedding in (model.embedding, model.position):
        embedding.weight.copy_(embedding.weight @ turn)
    for block in model.blocks:
        assert isinstance(block, TinyBlock)
        block.qkv.weight.copy_(block.qkv.weight @ turn)
        block.out.weight.copy_(turn.T @ block.out.weight)
        if block.up is not None and block.down is not None:
            block.up.weight.copy_(block.up.weight @ turn)
            block.down.weight.copy_(turn.T @ block.down.weight)
    model.unembedding.weight.copy_(model.unembedding.weight @ turn)


@torch.no_grad()
def build(name: str, seed: int, prompts: int) -> Built:
    """A built circuit of `NAMES` with its prompts; seed: of the rotation and the prompts."""
    model, edges = _BUILDERS[name]()
    generator = torch.Generator().manual_seed(seed)
    _rotate(model, generator)
    clean, corrupted = torch.randint(TOKENS, (2, prompts, LENGTH), generator=generator)
    if name == "induction":  # so that every token of the second half was here before
        half = LENGTH // 2
        order = torch.stack(
            [torch.randperm(TOKENS, generator=generator)[:half] for _ in range(prompts)]
        )
        clean = torch.cat([order, order], dim=1)
    positions = torch.arange(LENGTH // 2, LENGTH).expand(prompts, -1)
    graph = model.decoder().graph
    true = np.zeros((graph.receivers, graph.senders), dtype=bool)
    for sender, receiver in edges:
        true[graph.receiver_of(receiver), graph.sender_of(sender)] = True
    return Built(name, model, true, clean, corrupted, positions)
