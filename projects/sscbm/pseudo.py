"""Which images are annotated, and pseudo concept labels for the others: a weighted mean over the
nearest annotated images in a space of frozen features (SSCBM, section on pseudo labels;
reconstructed).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from shared.errors import UserError
from shared.seeding import step_seed

EPSILON = 1e-6  # added to a distance before its reciprocal
# Candidates beyond K that the search in single precision hands to the one in double precision.
_SPARE = 8


@dataclass(frozen=True)
class Choice:
    """Rows of the images whose concepts are annotated, sorted, and how many of each class."""

    rows: Tensor
    per_class: dict[int, int]

    def ratio(self, images: int) -> float:
        """The real share of annotated images, which rounding up makes larger than asked for."""
        return len(self.rows) / images


def choose_labelled(labels: Tensor, ratio: float, seed: int) -> Choice:
    """Draw the images that are annotated: ceil(ratio N / l) of each of the l classes that occur, or
    all of a class that has fewer; so never a class without one.

    Args:
        labels: int64 [N], classes.
        ratio: share of the images, above 0 and at most 1.
        seed: of the draw.

    Raises:
        UserError: the ratio is not such a share, or there are no images.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"the ratio of annotated images is above 0 and at most 1, not {ratio:g}")
    if not len(labels):
        raise UserError("there are no images to annotate")
    classes, draw = labels.unique().tolist(), np.random.default_rng(step_seed(seed, "labelled"))
    # a ratio such as 0.1 is no exact number: 0.1 x 30 / 3 must not become 2
    count = math.ceil(ratio * len(labels) / len(classes) - 1e-9)
    chosen = []
    for label in classes:
        rows = (labels == label).nonzero().squeeze(1)
        chosen.append(rows[torch.from_numpy(draw.permutation(len(rows)))[:count]])
    per_class = {label: len(rows) for label, rows in zip(classes, chosen, strict=True)}
    return Choice(torch.cat(chosen).sort().values, per_class)


def neighbours_for(choice: Choice) -> int:
    """K as the authors' code sets it: the annotated images of a class where these are one or two,
    else 3 (of the class that has the fewest).
    """
    return min(3, *choice.per_class.values())


def nearest(
    queries: Tensor, references: Tensor, k: int, block: int = 1024
) -> tuple[Tensor, Tensor]:
    """The k nearest references under the cosine distance, 1 - cos; the nearest first, of equals the
    one with the lower row.

    Args:
        queries: [n, d]; references: [r, d], r at least k.
        block: queries at once, so that the whole matrix of distances is never in memory.

    Returns:
        Distances float64 [n, k], at least 0, and rows of `references` int64 [n, k].
    """
    unit, wide = normalize(references.float(), dim=1), normalize(references.double(), dim=1)
    kept = min(k + _SPARE, len(references))
    distances, rows = [], []
    for part in queries.split(block):
        candidates = (normalize(part.float(), dim=1) @ unit.T).topk(kept, dim=1).indices
        candidates = candidates.sort(dim=1).values  # so that a stable sort breaks ties by row
        # Half the squared length of the difference of unit vectors is 1 - cos, without the
        # cancellation that 1 - cos has for near copies.
        away = normalize(part.double(), dim=1).unsqueeze(1) - wide[candidates]
        d, order = (away.square().sum(2) / 2).sort(dim=1, stable=True)
        distances.append(d[:, :k])
        rows.append(candidates.gather(1, order[:, :k]))
    return torch.cat(distances), torch.cat(rows)


def weights_of(distances: Tensor) -> Tensor:
    """Reciprocal distances [n, k] that sum to 1 in each row."""
    reciprocal = 1 / (distances.clamp(min=0) + EPSILON)
    return reciprocal / reciprocal.sum(1, keepdim=True)


def pseudo_labels(features: Tensor, concepts: Tensor, k: int) -> Tensor:
    """Soft concept labels of all images from their K nearest annotated ones.

    Where some cells of an image are annotated and others not, each concept takes its neighbours
    among the images that have that concept.

    Args:
        features: [n, d] of a frozen network.
        concepts: float [n, c]: 0, 1, or NaN where not annotated.
        k: neighbours at the most; fewer where fewer images are annotated.

    Returns:
        float32 [n, c] in [0, 1], also at annotated cells, where nothing uses them.

    Raises:
        UserError: a concept is annotated for no image.
    """
    known = ~concepts.isnan()
    if not bool(known.any(0).all()):
        column = int((~known.any(0)).nonzero()[0])
        raise UserError(
            f"concept {column + 1} is annotated for no image; annotate some, or drop it"
        )
    found = torch.empty(concepts.shape, dtype=torch.float32)
    patterns, of_column = known.unique(dim=1, return_inverse=True)
    for number in range(patterns.shape[1]):  # one, where images are annotated as a whole
        annotated = patterns[:, number].nonzero().squeeze(1)
        columns = (of_column == number).nonzero().squeeze(1)
        distances, rows = nearest(features, features[annotated], min(k, len(annotated)))
        values = concepts[annotated][:, columns].double()[rows]  # [n, k, columns]
        mixed = (weights_of(distances).unsqueeze(2) * values).sum(1)
        found[:, columns] = mixed.float().clamp(0, 1)  # a sum may round to more than 1
    return found
