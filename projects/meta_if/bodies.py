"""Small bodies and networks by name, without norms: torch's third derivatives of most of them are
wrong, and meta-IF takes some.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from shared.errors import UserError


def mlp(sizes: Sequence[int], last: bool = False) -> nn.Sequential:
    """Linear layers with tanh after each, but for the last one where `last` says that it gives
    logits; takes inputs of any shape.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (a, b) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if not (last and number == len(sizes) - 2):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def conv4(channels: int, filters: int = 64) -> nn.Sequential:
    """The four-block convolutional body of few-shot learning, with softplus and no batch norm, then
    a mean over what is left.
    """
    layers: list[nn.Module] = []
    for number in range(4):
        layers += [
            nn.Conv2d(channels if number == 0 else filters, filters, 3, stride=2, padding=1),
            nn.Softplus(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def initialised(model: nn.Module, seed: int) -> nn.Module:
    """The model with its weights drawn again from a seed (each layer's own default law); torch's
    global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def named(name: str, example_shape: Sequence[int], logits: bool = False) -> nn.Module:
    """`mlp-W1-W2-...` (tanh layers of these widths; with `logits` the last has no tanh) or
    `conv4-F` (F filters; inputs [channels, height, width]).
    """
    kind, *numbers = name.split("-")
    if (
        kind not in ("mlp", "conv4")
        or not numbers
        or not all(one.isdigit() and int(one) > 0 for one in numbers)
    ):
        raise UserError(
            f"there is no body '{name}'; use mlp-WIDTH[-WIDTH...], conv4-FILTERS, or"
            " module:function"
        )
    if kind == "mlp":
        return mlp([int(torch.Size(example_shape).numel()), *map(int, numbers)], logits)
    if len(example_shape) != 3 or len(numbers) > 1:
        raise UserError(
            f"body '{name}' takes images [channels, height, width] and one number of filters, not"
            f" inputs {tuple(example_shape)}"
        )
    return conv4(example_shape[0], int(numbers[0]))
