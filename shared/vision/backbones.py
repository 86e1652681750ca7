"""Backbones by name: images to features, with the spatial map that the features are the mean of.

Nothing is downloaded. Weights are random but for efficientnet-lite0, which is in the catalogue.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError

NAMES = (
    "mlp-WIDTH[-WIDTH...]",
    "conv4-FILTERS",
    "residual-WIDTH[-WIDTH...]",
    "quarter-WIDTH[-WIDTH...]",
    "resnet10",
    "resnet18",
    "resnet34",
    "efficientnet-lite0",
    "timm:NAME",
)


class Backbone(nn.Module):
    """images [n, channels, h, w] -> features [n, width].

    `spatial_map(images)` is what the features are pooled from: [n, width, h', w'] (some models of
    timm have a layer between, and another number of channels).
    """

    width: int

    def spatial_map(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class Layers(nn.Sequential, Backbone):
    """Layers, the last two of which pool and flatten; an mlp's do not."""

    def __init__(self, *layers: nn.Module, width: int):
        super().__init__(*layers)
        self.width = width

    def spatial_map(self, images: Tensor) -> Tensor:
        *layers, pool, _ = self
        if not isinstance(pool, nn.AdaptiveAvgPool2d):
            raise UserError("an mlp has no spatial map; take a convolutional backbone")
        for layer in layers:
            images = layer(images)
        return images


class Timm(Backbone):
    """A model of timm without its head."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.width = getattr(model, "head_hidden_size", None) or model.num_features

    def spatial_map(self, images: Tensor) -> Tensor:
        found = self.model.forward_features(images)
        if found.dim() != 4:
            raise UserError(f"{type(self.model).__name__} gives no spatial map, but tokens")
        channels_last = found.shape[1] != self.model.num_features  # as Swin's
        return found.movedim(-1, 1) if channels_last else found

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


def backbone(
    name: str, shape: Sequence[int], *, seed: int | None = None, logits: bool = False
) -> Backbone:
    """A backbone in eval mode.

    Args:
        name: mlp-W1-W2-... (tanh layers of these widths), conv4-F (F filters, softplus, no norm),
            residual-W1-W2-... (a residual block a width, each of which halves the map),
            quarter-W1-W2-... (a convolution with batch norm a width; the map is a quarter of the
            image), resnet10, resnet18, resnet34 (for images of some 64 pixels and more: they
            shrink them by 32), timm:NAME (any model of timm, random weights), efficientnet-lite0
            (trained on ImageNet; takes RGB as (255 x - 127) / 128 for x in 0..1).
        shape: of one sample, [channels, height, width]; of an mlp's, any.
        seed: of torch's generator for the weights, which is left as it was; None goes on with it.
        logits: the last layer of an mlp has no tanh.

    Raises:
        UserError: there is no such backbone, or it does not take such samples.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return _named(name, tuple(shape), logits).eval()


def _named(name: str, shape: tuple[int, ...], logits: bool) -> Backbone:
    kind, *numbers = name.split("-")
    if kind == "mlp" and _widths(numbers):
        return mlp([torch.Size(shape).numel(), *map(int, numbers)], logits)
    many = {"conv4": len(numbers) == 1, "residual": True, "quarter": True}.get(
        kind, False
    ) and _widths(numbers)
    known = name in ("resnet10", "resnet18", "resnet34", "efficientnet-lite0")
    if not (many or known or name.startswith("timm:")):
        raise UserError(
            f"there is no backbone '{name}'; use {', '.join(NAMES)}, or module:function where a"
            " command takes one"
        )
    if len(shape) != 3:
        raise UserError(
            f"backbone '{name}' takes images [channels, height, width], not samples {list(shape)}"
        )
    if kind == "conv4":
        return conv4(shape[0], int(numbers[0]))
    if kind == "residual":
        return residual(shape[0], [int(number) for number in numbers])
    if kind == "quarter":
        return quarter(shape[0], [int(number) for number in numbers])
    if name == "efficientnet-lite0":
        return _lite0(shape)
    return Timm(_timm(name, shape[0]))


def _widths(numbers: Sequence[str]) -> bool:
    return bool(numbers) and all(number.isdigit() and int(number) > 0 for number in numbers)


def mlp(sizes: Sequence[int], last: bool = False) -> Layers:
    """Linear layers with tanh after each, but for the last one where `last` says that it gives
    logits; takes inputs of any shape.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (a, b) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if not (last and number == len(sizes) - 2):
            layers.append(nn.Tanh())
    return Layers(*layers, width=sizes[-1])


def conv4(channels: int, filters: int = 64) -> Layers:
    """The four-block convolutional body of few-shot learning, with softplus and no batch norm, then
    a mean over what is left.

    Without norms, as torch's third derivatives of most of them are wrong, and meta-IF takes some.
    """
    layers: list[nn.Module] = []
    for number in range(4):
        layers += [
            nn.Conv2d(channels if number == 0 else filters, filters, 3, stride=2, padding=1),
            nn.Softplus(),
        ]
    return Layers(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), width=filters)


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm beside a 1 x 1 one, added, then halved by a max-pool."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.way = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        )
        self.end = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.way(x) + self.shortcut(x))


def residual(channels: int, widths: Sequence[int]) -> Layers:
    """The small residual network of few-shot learning: a block a width; 28 pixels through three
    blocks are a map of 3 x 3.
    """
    blocks = [ResidualBlock(a, b) for a, b in pairwise([channels, *widths])]
    return Layers(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), width=widths[-1])


def quarter(channels: int, widths: Sequence[int]) -> Layers:
    """Convolutions with batch norm, of which the first two halve the map and the others keep it: a
    small network whose map still shows where things are.
    """
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(pairwise([channels, *widths])):
        stride = 2 if number < 2 else 1
        layers += [
            nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
        ]
    return Layers(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), width=widths[-1])


def initialised(model: nn.Module, seed: int) -> nn.Module:
    """The model with its weights drawn again from a seed (each layer's own default law); torch's
    global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return model


def _timm(name: str, channels: int) -> Any:
    import timm
    from timm.models import resnet

    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if name == "resnet10":
        block: Any = resnet.BasicBlock  # timm's annotation asks for an instance
        return resnet.ResNet(block, (1, 1, 1, 1), **options)
    plain = name.removeprefix("timm:")
    if not timm.is_model(plain):  # nor an id of the hub, which would be downloaded
        raise UserError(f"timm has no model '{plain}'; timm.list_models() lists them")
    try:
        return timm.create_model(plain, pretrained=False, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"backbone '{name}': {' '.join(str(error).split())}") from None


def _lite0(shape: tuple[int, ...]) -> Timm:
    from shared.models.vision import load_efficientnet_lite0

    if shape[0] != 3:
        raise UserError(f"efficientnet-lite0 takes RGB images, not {shape[0]} channels")
    return Timm(load_efficientnet_lite0())
