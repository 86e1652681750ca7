"""Style and content of proxies, as the paper's empirical study asks for them (reconstructed: the
paper measures perceptual losses of a VGG; here, statistics of the source network's own cells).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Style(NamedTuple):
    """Of a domain's cells: mean and deviation by channel [d], and the Gram matrix [d, d]."""

    mean: Tensor
    deviation: Tensor
    gram: Tensor


def style(cells: Tensor) -> Style:
    """Of cells [n, r, d] of n images."""
    flat = cells.flatten(0, 1)
    return Style(flat.mean(0), flat.std(0), flat.T @ flat / len(flat))


def moments_distance(a: Style, b: Style) -> float:
    """Euclidean distance of the vectors of means and deviations."""
    return float(torch.cat([a.mean - b.mean, a.deviation - b.deviation]).norm())


def gram_distance(a: Style, b: Style) -> float:
    """Frobenius distance of the Gram matrices, per channel."""
    return float((a.gram - b.gram).norm() / len(a.mean))


class Content(NamedTuple):
    """How much of the cells is in their proxies.

    Attributes:
        error: |P - T|^2 / |T|^2 over all cells.
        centred: the same relative to the cells' spread about their mean, which does not fall where
            all cells of a domain share a large part.
        cosine: mean over cells.
    """

    error: float
    centred: float
    cosine: float


def content(cells: Tensor, proxies: Tensor) -> Content:
    """Of cells T and proxies P, [n, r, d]."""
    left = (proxies - cells).square().sum()
    spread = (cells - cells.mean((0, 1))).square().sum()
    error, centred = float(left / cells.square().sum()), float(left / spread)
    return Content(error, centred, float(F.cosine_similarity(proxies, cells, dim=-1).mean()))
