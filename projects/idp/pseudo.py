"""Pseudo queries: changed copies of the support images, which stand for queries while a task's
network is adapted.
"""

import torch
from torch import Tensor

from shared.seeding import generator

DRAWS = 12  # random numbers an image


def pseudo_queries(support: Tensor, ways: int, count: int, seeds: list[int], step: int) -> Tensor:
    """`count` changed copies for each class of each task.

    A copy is, with the probabilities of the released code: made darker (power of 1 to 1.5; 0.3),
    its channels shuffled (0.3), mirrored along either axis (0.5), turned by 90, 180 or 270 degrees
    (0.5; by 180 where it is not square), a rectangle of it erased with its mean (0.5).

    Args:
        support: [tasks, ways * shots, channels, h, w] from 0 to 1, class after class.
        seeds: of the tasks; a task's copies depend on its own seed, the step and its images.

    Returns:
        [tasks, ways * count, channels, h, w], class after class.
    """
    tasks, n, channels, height, width = support.shape
    shots = n // ways
    draws = torch.stack(
        [
            torch.rand(ways * count, DRAWS + channels, generator=generator(seed, "pseudo", step))
            for seed in seeds
        ]
    ).to(support)
    place = torch.arange(count, device=support.device) % shots
    rows = (torch.arange(ways, device=support.device)[:, None] * shots + place).flatten()
    images = support[:, rows].flatten(0, 1)
    changed = _change(images, draws.flatten(0, 1))
    return changed.view(tasks, ways * count, channels, height, width)


def _change(images: Tensor, draws: Tensor) -> Tensor:
    """Images [n, c, h, w] changed by draws [n, DRAWS + c] of 0..1."""
    n, channels, height, width = images.shape
    u = [column.view(n, 1, 1, 1) for column in draws[:, :DRAWS].unbind(1)]
    images = torch.where(u[0] < 0.3, images.clamp(0, 1) ** (1 + u[1] / 2), images)
    shuffled = draws[:, DRAWS:].argsort(1).view(n, channels, 1, 1).expand_as(images)
    images = torch.where(u[2] < 0.3, images.gather(1, shuffled), images)
    axis = torch.where(u[4] < 0.5, images.flip(-1), images.flip(-2))
    images = torch.where(u[3] < 0.5, axis, images)
    turn = 1 + (3 * u[6]).floor().clamp(max=2) if height == width else torch.full_like(u[6], 2)
    turn = torch.where(u[5] < 0.5, turn, 0)
    for quarter in (1, 2, 3) if height == width else (2,):
        images = torch.where(turn == quarter, images.rot90(quarter, (-2, -1)), images)
    area, ratio = 0.02 + 0.31 * u[8], 0.3 * 11 ** u[9]  # as torchvision's RandomErasing
    high, wide = ((area * ratio) ** 0.5).clamp(max=1), ((area / ratio) ** 0.5).clamp(max=1)
    top, left = u[10] * (1 - high), u[11] * (1 - wide)
    y = (torch.arange(height, device=images.device) + 0.5).view(1, 1, -1, 1) / height
    x = (torch.arange(width, device=images.device) + 0.5).view(1, 1, 1, -1) / width
    inside = (y >= top) & (y < top + high) & (x >= left) & (x < left + wide) & (u[7] < 0.5)
    return torch.where(inside, images.mean((1, 2, 3), keepdim=True), images)
