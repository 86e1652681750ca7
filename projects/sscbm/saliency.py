"""What a concept's prediction looked at: heat maps brought to the size of the image, how well they
point, and how they are drawn over it.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

# of the authors' code: the edge that maps are brought to, and half of the box's around the peak
EDGE, HALF_BOX = 224, 45


def upsampled(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps [n, k, h, w] at the size of the image (bicubic)."""
    return interpolate(maps, (height, width), mode="bicubic", align_corners=False)


def visible(maps: Tensor) -> Tensor:
    """Maps [..., h, w] over their largest value, cut to 0..1; 0 where nothing is positive."""
    top = maps.amax((-2, -1), keepdim=True)
    return torch.where(top > 0, maps / top.clamp(min=1e-12), 0.0).clamp(0, 1)


def peaks(maps: Tensor) -> Tensor:
    """Row and column of the largest value of each map: int64 [n, k, 2] of [n, k, h, w]."""
    width = maps.shape[3]
    at = maps.flatten(2).argmax(2)
    return torch.stack([at // width, at % width], dim=2)


def quadrant_of(at: Tensor, height: int, width: int) -> Tensor:
    """0 to 3, row by row, of rows and columns [..., 2]."""
    return 2 * (at[..., 0] >= height / 2).long() + (at[..., 1] >= width / 2).long()


def box_hits(maps: Tensor, points: Tensor, half: int = HALF_BOX, edge: int = EDGE) -> Tensor:
    """Whether a box around a map's peak holds a point where the concept's part is (the authors'
    metric of trust; box and map as in their code).

    Args:
        maps: [n, k, h, w].
        points: [n, k, parts, 2], rows and columns as shares of the image (0 to 1); NaN for a part
            that is not seen.

    Returns:
        float32 [n, k]: 1, 0, or NaN where no part is seen.
    """
    seen = ~points.isnan().any(3).all(2)
    hits = torch.full(seen.shape, torch.nan)
    # a map at a time is 200 kB, and most concepts of an image are absent
    pairs = zip(maps[seen].split(256), points[seen].split(256), strict=True)
    found = [
        ((at * edge - peaks(upsampled(some.unsqueeze(1), edge, edge))).abs() <= half).all(2).any(1)
        for some, at in pairs  # a comparison with NaN is false
    ]
    hits[seen] = torch.cat(found).float() if found else torch.empty(0)
    return hits


def location_accuracy(hits: Tensor) -> float:
    """The mean over images for each concept, then over concepts, of hits [n, k] with NaN."""
    return float(hits.nanmean(0).nanmean())


def overlay(picture: NDArray[np.uint8], heat: NDArray[np.float32]) -> Image.Image:
    """A picture [h, w, 3] turned to grey, with a map of its size from 0 to 1 over it in red."""
    grey = picture.astype(np.float32).mean(2, keepdims=True).repeat(3, axis=2)
    share = 0.65 * heat[..., None]
    mixed = (1 - share) * (0.7 * grey + 0.3 * picture) + share * np.array([255.0, 40.0, 0.0])
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
