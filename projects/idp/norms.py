"""A network whose BatchNorm layers are each task's own, so that many tasks run as one batch.

Tasks share all other weights. Images are interleaved, task by task within image, so that a layer's
input [n T, c, h, w] is, without a copy, [n, T c, h, w]: one BatchNorm call over T c channels gives
every task its own statistics and affine parameters.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.idp.codebook import cells_of
from shared.errors import UserError

Scope = Literal["all", "main", "early", "late"]
SHORTCUTS = ("shortcut", "downsample")


class TaskNorm(nn.Module):
    """A BatchNorm layer with parameters and running statistics [tasks, channels].

    In train mode it normalises with the statistics of each task's batch and moves the running ones
    by `momentum`; in eval mode with the running ones. What a subclass of timm does afterwards (its
    dropout and activation) is done here as well.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d, tasks: int):
        super().__init__()
        channels = norm.num_features
        like = next((p for p in (norm.weight, norm.running_mean) if p is not None), torch.ones(1))

        def each(values: Tensor | None, default: float) -> Tensor:
            start = like.new_full((channels,), default) if values is None else values.detach()
            return start.expand(tasks, -1).clone()

        self.weight = nn.Parameter(each(norm.weight, 1.0))
        self.bias = nn.Parameter(each(norm.bias, 0.0))
        self.register_buffer("running_mean", each(norm.running_mean, 0.0))
        self.register_buffer("running_var", each(norm.running_var, 1.0))
        self.eps, self.momentum = norm.eps, 0.0
        self.after = nn.Sequential(
            *(part for part in (getattr(norm, name, None) for name in ("drop", "act")) if part)
        )

    def forward(self, x: Tensor) -> Tensor:
        tasks, channels = self.weight.shape
        together = x.contiguous().view(-1, tasks * channels, *x.shape[2:])
        found = F.batch_norm(
            together,
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.view(-1),
            self.bias.view(-1),
            self.training,
            self.momentum,
            self.eps,
        )
        return self.after(found.view(x.shape))


class TaskNetwork(nn.Module):
    """Copies of one network for several tasks, which differ in their BatchNorm layers alone.

    Args:
        network: has `spatial_map(images [n, ...]) -> [n, d, h, w]`; it is copied, and left as it
            is.
        tasks: how many.
        scope: whose affine parameters may be trained: "all"; "main" (not those of shortcuts, as
            the released code has it); the "early" or the "late" half, in the order of the layers.

    Raises:
        UserError: it has no BatchNorm, or gives other numbers with these layers than with its own.
    """

    def __init__(self, network: nn.Module, tasks: int, scope: Scope = "all"):
        super().__init__()
        self.tasks = tasks
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        names = [
            name
            for name, module in self.network.named_modules()
            if isinstance(module, nn.BatchNorm2d)
        ]
        if not names:
            raise UserError(
                f"{type(network).__name__} has no BatchNorm2d layer, and nothing else is adapted;"
                " name a network that has some"
            )
        self.norms: dict[str, TaskNorm] = {}
        for name in names:
            parent, _, last = name.rpartition(".")
            holder = self.network.get_submodule(parent)
            norm = TaskNorm(holder.get_submodule(last), tasks)  # type: ignore[arg-type]
            setattr(holder, last, norm)
            self.norms[name] = norm
        chosen = set(in_scope(names, scope))
        for name, norm in self.norms.items():
            norm.requires_grad_(name in chosen)
        self.use_batch(False)

    def use_batch(self, batch: bool) -> None:
        """Normalise with the batch's statistics, or with the running ones."""
        for norm in self.norms.values():
            norm.training = batch

    def set_momentum(self, momentum: float) -> None:
        """How far the running statistics move towards those of each batch."""
        for norm in self.norms.values():
            norm.momentum = momentum

    def trained(self) -> list[nn.Parameter]:
        """The affine parameters that may be trained."""
        return [p for norm in self.norms.values() for p in norm.parameters() if p.requires_grad]

    def forward(self, images: Tensor) -> Tensor:
        """images [tasks, n, channels, h, w] -> cells [tasks, n, r, d]."""
        tasks, n = images.shape[:2]
        if tasks != self.tasks:
            raise ValueError(f"images of {tasks} tasks for a network of {self.tasks}")
        maps = self.network.spatial_map(images.transpose(0, 1).flatten(0, 1))  # type: ignore
        return cells_of(maps.unflatten(0, (n, tasks)).transpose(0, 1))


def in_scope(names: list[str], scope: Scope) -> list[str]:
    """Of the names of a network's BatchNorm layers, in order, those that a scope takes."""
    half = (len(names) + 1) // 2
    match scope:
        case "main":
            return [name for name in names if not any(part in name for part in SHORTCUTS)]
        case "early":
            return names[:half]
        case "late":
            return names[half:]
        case _:
            return names
