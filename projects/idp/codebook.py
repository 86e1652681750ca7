"""The source codebook: a few rows that stand for all that the source network knows."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.seeding import generator, step_seed

Kind = Literal["clustered", "learned", "random"]


def cells_of(maps: Tensor) -> Tensor:
    """Maps [..., d, h, w] as cells [..., h w, d]."""
    return maps.flatten(-2).mT


def class_means(cells: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean map of each class as cells, [classes, r, d], from cells [n, r, d] of n images."""
    sums = torch.zeros(classes, *cells.shape[1:], dtype=cells.dtype, device=cells.device)
    sums.index_add_(0, labels, cells)
    return sums / torch.bincount(labels, minlength=classes).clamp_min(1).view(-1, 1, 1)


def cluster(rows: Tensor, k: int, seed: int) -> Tensor:
    """At most k centres of rows [n, d] by k-means (scikit-learn's, ten starts); the rows themselves
    where they are no more than k.
    """
    if len(rows) <= k:
        return rows
    from sklearn.cluster import KMeans

    values = rows.detach().cpu().double().numpy()
    k = min(k, len(np.unique(values, axis=0)))
    model = KMeans(k, n_init=10, random_state=step_seed(seed, "k-means") % 2**32)
    return torch.from_numpy(model.fit(values).cluster_centers_).to(rows)


def build(kind: Kind, rows: int, means: Tensor, learned: Tensor, seed: int) -> Tensor:
    """The source codebook U [<= rows, d].

    Args:
        kind: "clustered": k-means centres of the classes' mean maps, the default reading;
            "learned": of the dense prototypes that the source network was trained with (as the
            released tester seems to use them; all of them where `rows` is as many);
            "random": rows of a normal law, scaled to the mean length of the mean maps' cells, a
            control.
        means: [classes, r, d] of `class_means`.
        learned: [classes, n, d].
    """
    if kind == "random":
        d = means.shape[-1]
        drawn = torch.randn(rows, d, generator=generator(seed, "random codebook")).to(means)
        return drawn * (means.norm(dim=-1).mean() / d**0.5)
    return cluster((means if kind == "clustered" else learned).flatten(0, 1), rows, seed)


def class_codebooks(cells: Tensor, ways: int, most: int | None = None) -> Tensor:
    """The class codebooks [tasks, ways, n, d] of tasks from their support's cells [tasks,
    ways * shots, r, d], class after class: all cells of a class, or where these are more than
    `most`, that many centres of them.
    """
    books = cells.unflatten(1, (ways, -1)).flatten(2, 3)
    if most is None or books.shape[2] <= most:
        return books
    return torch.stack([torch.stack([cluster(one, most, 0) for one in task]) for task in books])
