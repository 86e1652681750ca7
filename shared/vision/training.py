"""One seeded training loop by mini-batches, for backbones and what stands on them."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.seeding import generator

Model = TypeVar("Model", bound=nn.Module)


def batches(n: int, size: int, seed: int, epoch: int) -> list[Tensor]:
    """Rows of an epoch's batches, every sample once, in an order that only seed and epoch decide.

    A last sample that would be alone joins the batch before it: a batch norm needs two.
    """
    rows = torch.randperm(n, generator=generator(seed, "batches", epoch))
    parts = list(rows.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def train(
    model: Model,
    data: tuple[Tensor, ...],
    loss: Callable[..., Tensor],
    *,
    epochs: int,
    batch: int,
    seed: int,
    optimiser: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    callback: Callable[[int, float], None] | None = None,
) -> Model:
    """Train in place, in train mode, and return the model in eval mode.

    Args:
        data: tensors [n, ...] on the model's device, such as images and labels.
        loss: of the rows of a batch, one argument for each tensor of `data`, to a mean.
        seed: of the order of samples alone. What the model itself draws, as dropout does, is
            torch's.
        optimiser: of the parameters, as `partial(torch.optim.Adam, lr=1e-3)`.
        callback: called after each epoch with its number, from 1, and the mean loss of its samples.

    Raises:
        UserError: the loss is not finite.
    """
    steps = optimiser(parameter for parameter in model.parameters() if parameter.requires_grad)
    for epoch in range(1, epochs + 1):
        mean = train_epoch(model, data, loss, batch=batch, seed=seed, epoch=epoch, steps=steps)
        if callback is not None:
            callback(epoch, mean)
    return model.eval()


def train_epoch(
    model: nn.Module,
    data: tuple[Tensor, ...],
    loss: Callable[..., Tensor],
    *,
    batch: int,
    seed: int,
    epoch: int,
    steps: torch.optim.Optimizer,
) -> float:
    """One epoch of `train`, for a loop that keeps its state between epochs: the model is in train
    mode after it.

    Args:
        data, loss, batch, seed: as of `train`.
        epoch: its number, from 1, which decides the order of samples.
        steps: the optimiser, which goes on from epoch to epoch.

    Returns:
        The mean loss of the samples.

    Raises:
        UserError: the loss is not finite.
    """
    model.train()
    total, n = 0.0, len(data[0])
    for rows in batches(n, batch, seed, epoch):
        value = loss(*(column[rows] for column in data))
        if not value.isfinite():
            raise UserError(
                f"the loss is {value.item():g} in epoch {epoch}; lower the learning rate, or look"
                " at the data"
            )
        steps.zero_grad()
        value.backward()
        steps.step()
        total += float(value.detach()) * len(rows)
    return total / n
