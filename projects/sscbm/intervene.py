"""An expert who corrects concepts at test time: in which order, and what the model is then told.

Orders are over groups of concepts that are known together (the shapes of a bill); of single
concepts where there are no groups.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.seeding import step_seed

Order = Literal["random", "by uncertainty"]
Groups = Sequence[Sequence[int]]


def random_order(images: int, groups: Groups, seed: int) -> Tensor:
    """Groups in an order of its own for each image: int64 [images, groups]."""
    draw = np.random.default_rng(step_seed(seed, "interventions"))
    return torch.from_numpy(draw.permuted(np.tile(np.arange(len(groups)), (images, 1)), axis=1))


def uncertain_order(probabilities: Tensor, groups: Groups) -> Tensor:
    """Groups with the mean probability nearest to 0.5 first, by the distances of their concepts:
    int64 [n, groups] of probabilities [n, k].
    """
    away = (probabilities - 0.5).abs()
    by_group = torch.stack([away[:, list(columns)].mean(1) for columns in groups], dim=1)
    return by_group.argsort(dim=1, stable=True)


def told(values: Tensor, order: Tensor, groups: Groups, count: int) -> Tensor:
    """What a model is given after an expert has spoken of `count` groups of each image.

    Args:
        values: [n, k], what the expert says: the truth, or for one who is always wrong
            1 - the truth. NaN where the expert does not know.
        order: int64 [n, groups].

    Returns:
        [n, k]: the values of those groups, NaN elsewhere.
    """
    said = torch.zeros(len(values), len(groups), dtype=torch.bool)
    said.scatter_(1, order[:, :count], True)
    group_of = torch.empty(values.shape[1], dtype=torch.int64)
    for number, columns in enumerate(groups):
        group_of[list(columns)] = number
    return values.masked_fill(~said[:, group_of], torch.nan)
