"""Concepts that are measured on each handwritten digit: holes, ends of strokes, thickness, slant
and proportions. They differ within a class, as annotations of single images do.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

INK = 0.5  # a pixel with more is ink
GROUPS = {
    "holes": ("no hole", "one hole", "two holes"),
    "ends": ("no end", "one end", "two ends", "three ends"),
    "thickness": ("thin", "medium", "thick"),
    "slant": ("leans left", "upright", "leans right"),
    "proportions": ("narrow", "middling", "wide"),
}
NAMES = tuple(name for names in GROUPS.values() for name in names)
_CROSS = ndimage.generate_binary_structure(2, 1)
_SQUARE = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Cuts:
    """Terciles of the measures that have no natural bounds: two numbers each."""

    thickness: tuple[float, float]
    slant: tuple[float, float]
    proportions: tuple[float, float]


def measures(images: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Measures of images [n, height, width] from 0 to 1, [n] each: holes and ends, counted;
    thickness in pixels; slant, the shift to the right per pixel up; proportions, width over height.
    """
    ink = images > INK
    thin = thinned(ink)
    rows, columns = np.indices(images.shape[1:])
    total = np.maximum(ink.sum((1, 2)), 1)
    row, column = ((ink * axis).sum((1, 2)) / total for axis in (rows, columns))
    down = rows[None] - row[:, None, None]
    across = columns[None] - column[:, None, None]
    upright = np.maximum((ink * down**2).sum((1, 2)), 1e-9)
    height, width = (ink.any(axis).sum(1) for axis in (2, 1))
    return {
        "holes": np.array([holes(one) for one in ink], dtype=float),
        "ends": ends(thin).astype(float),
        "thickness": total / np.maximum(thin.sum((1, 2)), 1),
        "slant": -(ink * down * across).sum((1, 2)) / upright,
        "proportions": width / np.maximum(height, 1),
    }


def holes(ink: NDArray[np.bool_]) -> int:
    """Regions without ink, of at least two pixels, that do not reach the edge."""
    background, count = ndimage.label(~np.pad(ink, 1), structure=_CROSS)
    sizes = np.bincount(background.ravel(), minlength=count + 1)[1:]
    return int((sizes >= 2).sum()) - 1  # less the one around


def ends(thin: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pixels of a thinned stroke [n, height, width] that have one neighbour, counted."""
    around = ndimage.convolve(thin.astype(np.int8), _SQUARE[None].astype(np.int8), mode="constant")
    return (thin & (around == 2)).sum((1, 2))


def thinned(ink: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Strokes of one pixel by Zhang and Suen's algorithm (1984), all images at once."""
    found = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    while True:
        before = found.copy()
        for first in (True, False):
            n, ne, e, se, s, sw, w, nw = (
                np.roll(found, shift, (1, 2))
                for shift in (
                    *((1, 0), (1, -1), (0, -1), (-1, -1)),
                    *((-1, 0), (-1, 1), (0, 1), (1, 1)),
                )
            )
            ring = (n, ne, e, se, s, sw, w, nw)
            neighbours = sum(one.astype(np.int8) for one in ring)
            turns = sum((~a & b).astype(np.int8) for a, b in zip(ring, (*ring[1:], n), strict=True))
            corner = ~(n & e & s) & ~(e & s & w) if first else ~(n & e & w) & ~(n & s & w)
            found = found & ~((neighbours >= 2) & (neighbours <= 6) & (turns == 1) & corner)
        if (found == before).all():
            return found[:, 1:-1, 1:-1]


def cuts(measured: dict[str, NDArray[np.float64]]) -> Cuts:
    """Terciles of a set of images: what `concepts` calls thin, upright, wide, is by them."""
    low, high = (
        {name: float(np.quantile(measured[name], share)) for name in vars(_NO_CUTS)}
        for share in (1 / 3, 2 / 3)
    )
    return Cuts(**{name: (low[name], high[name]) for name in low})


_NO_CUTS = Cuts((0, 0), (0, 0), (0, 0))


def concepts(measured: dict[str, NDArray[np.float64]], at: Cuts) -> NDArray[np.float32]:
    """float32 [n, k] of 0 and 1: one of each group, in the order of `NAMES`."""
    parts = []
    for group, names in GROUPS.items():
        values = measured[group]
        if group in vars(at):
            place = np.searchsorted(np.array(getattr(at, group)), values, side="right")
        else:
            place = np.minimum(values.astype(int), len(names) - 1)
        parts.append(np.eye(len(names), dtype=np.float32)[place])
    return np.concatenate(parts, axis=1)
