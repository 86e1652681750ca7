"""Small trained problems in odd shapes, and the loss written as loops over pairs, which shares
nothing with the project's.
"""

import math

import torch
from torch import Tensor

from projects.ecif import Contrastive, Heads, Pairs, TwoTower
from shared.influence.retrain import minimise

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_loss(s: Tensor, rows: list[int] | None = None) -> float:
    """The symmetric loss of one batch's logits [B, B] over the pairs `rows` (all), pair by pair."""
    kept = range(len(s)) if rows is None else rows
    total = 0.0
    for n in kept:
        own = float(s[n, n])
        total += math.log(sum(math.exp(float(s[n, j]) - own) for j in kept))
        total += math.log(sum(math.exp(float(s[j, n]) - own) for j in kept))
    return total


def make(
    n: int = 11,
    batch: int = 4,
    delta: float = 6.0,
    seed: int = 0,
    inputs: tuple[Tensor, Tensor] | None = None,
) -> Contrastive:
    """Heads 5 -> 3 and 7 -> 3 on random features; the last batch is short."""
    towers = TwoTower(Heads(5, 7, 3, seed))
    texts, images = inputs or (normal(n, 5, seed=seed + 1), normal(n, 7, seed=seed + 2))
    return Contrastive(
        towers, Pairs.of((texts, images), batch, seed), delta, towers.parameters.flat()
    )


def train(problem: Contrastive, start: Tensor | None = None) -> Tensor:
    """The minimum, to a gradient of 1e-11, from theta_0 or from `start`."""
    return minimise(problem.objective(), problem.centre if start is None else start, tol=1e-11).w
