"""Corrupted data whose truth is known: wrong labels, captions of other pictures.

Each function returns a corrupted copy and the mask of what was changed. The mask is for the
evaluation; scores must not see it.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError
from shared.seeding import step_seed


def flip_labels(labels: Tensor, fraction: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Give a fraction of the samples another class, each other class equally likely.

    Returns:
        The labels [n] and a mask [n] (bool) of the flipped ones.
    """
    if classes < 2:
        raise UserError(f"labels of {classes} class cannot be flipped; at least 2 are needed")
    draw = np.random.default_rng(step_seed(seed, "flip"))
    chosen = _choose(len(labels), fraction, draw)
    shift = torch.from_numpy(draw.integers(1, classes, size=len(chosen))).to(labels)
    flipped, mask = labels.clone(), torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    flipped[chosen] = (labels[chosen] + shift) % classes
    mask[chosen] = True
    return flipped, mask


def shuffle_captions(
    captions: Sequence[Hashable], fraction: float, seed: int
) -> tuple[list[int], Tensor]:
    """Exchange captions within a fraction of the pairs so that each of them gets a caption that
    differs from its own.

    Returns:
        Where the caption of each pair now comes from, n indices (the pair itself where nothing was
        changed), and a mask [n] of the others.

    Raises:
        UserError: more than half of the chosen captions are the same, so that some would keep
            theirs.
    """
    draw = np.random.default_rng(step_seed(seed, "captions"))
    chosen = _choose(len(captions), fraction, draw).tolist()
    if len(chosen) == 1:
        raise UserError(
            f"a fraction {fraction:g} of {len(captions)} pairs is one pair, which has nothing to"
            " exchange with; take more"
        )
    most = Counter(captions[one] for one in chosen).most_common(1)
    if most and 2 * most[0][1] > len(chosen):
        raise UserError(
            f"caption '{most[0][0]}' is that of {most[0][1]} of {len(chosen)} chosen pairs; they"
            " cannot all get another"
        )
    source = list(range(len(captions)))
    for pair, other in zip(chosen, draw.permutation(chosen).tolist(), strict=True):
        source[pair] = other
    unchanged = [pair for pair in chosen if captions[source[pair]] == captions[pair]]
    # exchange with a pair where both differ then; the bound on equal captions leaves such pairs
    while unchanged:
        pair = unchanged.pop()
        if captions[source[pair]] != captions[pair]:
            continue
        fit = [
            o
            for o in chosen
            if captions[source[o]] != captions[pair] and captions[source[pair]] != captions[o]
        ]
        other = fit[int(draw.integers(len(fit)))]
        source[pair], source[other] = source[other], source[pair]
    mask = torch.zeros(len(captions), dtype=torch.bool)
    mask[chosen] = True
    return source, mask


def _choose(n: int, fraction: float, draw: np.random.Generator) -> np.ndarray:
    if not 0 <= fraction <= 1:
        raise UserError(f"a fraction of the samples lies between 0 and 1, not {fraction:g}")
    return np.sort(draw.permutation(n)[: round(fraction * n)])
