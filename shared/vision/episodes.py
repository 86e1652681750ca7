"""Few-shot episodes: classes and samples are drawn; an episode's labels are the places of its
classes in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.seeding import step_seed


class Episodes(NamedTuple):
    """Rows of the samples of n episodes, class after class in each.

    support int64 [n, ways * shots] and query int64 [n, ways * queries] are rows of the pool;
    y_support and y_query, of the same shapes, are labels from 0 to ways - 1.
    """

    support: Tensor
    y_support: Tensor
    query: Tensor
    y_query: Tensor


def class_split(
    names: Sequence[str], sizes: Sequence[int], seed: int, *purpose: str
) -> list[list[str]]:
    """Disjoint lists of classes of these sizes, in a random order that only the seed and the
    purpose (words) decide.

    Raises:
        UserError: they are more than there are.
    """
    if sum(sizes) > len(names):
        raise UserError(f"{sum(sizes)} classes were asked for; there are {len(names)}")
    draw = np.random.default_rng(step_seed(seed, *purpose))
    order = draw.permutation(len(names)).tolist()
    ends = np.cumsum(sizes).tolist()
    return [
        [names[place] for place in order[end - size : end]]
        for size, end in zip(sizes, ends, strict=True)
    ]


def sample_episodes(
    labels: NDArray[np.int64] | Tensor, n: int, ways: int, shots: int, queries: int, seed: int
) -> Episodes:
    """n episodes of `ways` classes with `shots` support and `queries` query samples each; no sample
    is twice in an episode. Episode k depends on the seed and k alone.

    Args:
        labels: [samples], the class of each sample of the pool.

    Raises:
        UserError: there are too few classes, or too few samples of one.
    """
    labels = np.asarray(labels)
    classes = np.unique(labels)
    by_class = {label: np.flatnonzero(labels == label) for label in classes}
    fewest = min((len(rows) for rows in by_class.values()), default=0)
    if ways > len(classes) or shots + queries > fewest:
        raise UserError(
            f"tasks of {ways} classes with {shots} + {queries} samples cannot be drawn from"
            f" {len(classes)} classes of at least {fewest}"
        )
    support, query = [], []
    for number in range(n):
        draw = np.random.default_rng(step_seed(seed, "task", number))
        rows = np.stack(
            [
                draw.permutation(by_class[label])[: shots + queries]
                for label in draw.permutation(classes)[:ways]
            ]
        )
        support.append(rows[:, :shots].reshape(-1))
        query.append(rows[:, shots:].reshape(-1))
    y_support, y_query = (
        torch.arange(ways).repeat_interleave(each).expand(n, -1).contiguous()
        for each in (shots, queries)
    )
    return Episodes(
        torch.from_numpy(np.stack(support)), y_support, torch.from_numpy(np.stack(query)), y_query
    )
