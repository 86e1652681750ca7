"""Real images as small SAM problems: features, models, SAM's solution, and training again without
samples.

CIFAR-100 and Mini-ImageNet, which the paper's readers name among its data, are in no package;
MNIST, Fashion-MNIST, CIFAR-10 and the UCI digits stand here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from projects.sam_if.fixed_point import SAMProblem, fit
from shared.errors import UserError
from shared.influence import retrain
from shared.influence.baselines import margins
from shared.influence.objective import Objective, class_losses
from shared.influence.params import Parameters
from shared.influence.products import Data
from shared.seeding import generator, step_seed

Dataset = Literal["mnist", "fashion-mnist", "cifar10", "digits", "blobs"]
CLASSES = 10


@dataclass(frozen=True)
class Images:
    """Training, validation and test images, labels [.], and the pictures they come from.

    `x` are features [., d] in float64 or, where none were asked for, pixels [., channels, height,
    width] in float32.
    """

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    pictures: Tensor  # uint8 [n, height, width(, 3)] of the training images
    test_pictures: Tensor

    @property
    def classes(self) -> int:
        return CLASSES


def load(
    name: Dataset,
    n: int,
    *,
    features: int | None,
    seed: int,
    validation: int = 500,
    test: int = 2000,
    device: str = "cpu",
) -> Images:
    """Draw n training, then validation images from the official training part, and test images from
    the test part (the UCI digits and the blobs have no parts: all are drawn from one). Features are
    the first principal components of the training images, all divided by one number so that the
    mean square of a feature is 1; the components stay as they are when samples are removed.
    `features` None keeps the pixels, shifted and scaled by the training images' mean and deviation
    in each channel.

    "blobs" are random numbers around ten random centres: for wiring and tests, without a download.
    """
    pictures, labels, test_pictures, test_labels = _raw(name, seed)
    order = torch.randperm(len(pictures), generator=generator(seed, "images"))
    if test_pictures is None:
        chosen, kept = order[: n + validation], order[n + validation :][:test]
        test_pictures, test_labels = pictures[kept], labels[kept]
    else:
        chosen = order[: n + validation]
        kept = torch.randperm(len(test_pictures), generator=generator(seed, "test images"))[:test]
        test_pictures, test_labels = test_pictures[kept], test_labels[kept]
    if len(chosen) < n + validation or not len(test_labels):
        raise UserError(
            f"{name} has {len(pictures)} images, fewer than {n} to train on, {validation} to"
            " validate and one to test"
        )
    train, held = chosen[:n], chosen[n:]
    project = (
        _pixels(pictures[train], device)
        if features is None
        else _components(pictures[train], features, device)
    )

    return Images(
        project(pictures[train]), labels[train].to(device), project(pictures[held]),
        labels[held].to(device), project(test_pictures),
        test_labels.to(device), pictures[train], test_pictures,
    )  # fmt: skip


def _components(pictures: Tensor, features: int, device: str) -> Callable[[Tensor], Tensor]:
    flat = pictures.double().flatten(1)
    centre = flat.mean(0)
    basis = torch.linalg.eigh((flat - centre).T @ (flat - centre))[1].flip(1)[:, :features]
    basis = basis * basis.sum(0).sign()  # eigenvectors have no sign of their own
    scale = ((flat - centre) @ basis).square().mean().sqrt()
    return lambda images: ((images.double().flatten(1) - centre) @ basis / scale).to(device)


def _pixels(pictures: Tensor, device: str) -> Callable[[Tensor], Tensor]:
    def channels_first(images: Tensor) -> Tensor:
        return (images.unsqueeze(-1) if images.dim() == 3 else images).float().movedim(-1, 1)

    own = channels_first(pictures)
    centre, scale = own.mean((0, 2, 3), keepdim=True), own.std((0, 2, 3), keepdim=True)
    return lambda images: ((channels_first(images) - centre) / scale).contiguous().to(device)


@cache
def _raw(name: Dataset, seed: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    if name == "blobs":
        draw = np.random.default_rng(step_seed(seed, "blobs"))
        labels = draw.integers(CLASSES, size=4000)
        centres = np.random.default_rng(step_seed(0, "centres")).normal(size=(CLASSES, 64))
        values = 128 + 25 * (0.5 * centres[labels] + draw.normal(size=(4000, 64)))
        return (
            torch.from_numpy(values.clip(0, 255).astype(np.uint8).reshape(-1, 8, 8)),
            torch.from_numpy(labels),
            None,
            torch.empty(0),
        )
    from shared.data.loaders import images

    if name == "digits":
        pictures, labels = images.digits()
        return torch.from_numpy(pictures * 15), torch.from_numpy(labels), None, torch.empty(0)
    if name not in get_args(Dataset):
        raise UserError(f"there are no images '{name}'; there are {', '.join(get_args(Dataset))}")
    found = {
        "mnist": images.mnist,
        "fashion-mnist": images.fashion_mnist,
        "cifar10": images.cifar10,
    }[name]()
    train, train_labels, test, test_labels = (
        torch.from_numpy(np.ascontiguousarray(one)) for one in found
    )
    return train, train_labels, test, test_labels


def network(features: int, hidden: int | None, seed: int, classes: int = CLASSES) -> nn.Module:
    """Softmax regression (`hidden` None), or a tanh network of one hidden layer; float64, in eval
    mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "network") % 2**31)
        if hidden is None:
            return nn.Sequential(nn.Linear(features, classes)).double().eval()
        return (
            nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes))
            .double()
            .eval()
        )


class _GroupNorm(nn.GroupNorm):
    """In plain operations: forward mode through torch's own fails where a tangent's layout is not
    that of its input (torch 2.13).
    """

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], self.num_groups, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        normalised = centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normalised.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]


def resnet18(channels: int, widths: Sequence[int], seed: int, classes: int = CLASSES) -> nn.Module:
    """ResNet-18 as it is used on images of 32 pixels: a stem of 3 x 3 without stride and pooling;
    float32, in eval mode.

    GroupNorm stands in for BatchNorm, with which a sample's loss would depend on the other samples
    of its batch.
    """
    from timm.models.resnet import BasicBlock, ResNet

    def norm(width: int, **options: Any) -> nn.Module:
        return _GroupNorm(max(1, width // 16), width, **options)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "network") % 2**31)
        options = {
            "num_classes": classes,
            "in_chans": channels,
            "channels": tuple(widths),
            "norm_layer": norm,
        }
        # in place has no forward mode
        model = ResNet(
            BasicBlock, (2, 2, 2, 2), **options, act_layer=lambda inplace=False, **_: nn.ReLU()
        )
        model.conv1, model.maxpool = (
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            nn.Identity(),
        )
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model.eval()


@dataclass(frozen=True, eq=False)
class Case:
    """A model on images as a SAM problem, and the metrics that scores are about."""

    images: Images
    parameters: Parameters
    problem: SAMProblem

    @classmethod
    def of(
        cls,
        images: Images,
        *,
        l2: float,
        rho: float,
        hidden: int | None = None,
        seed: int = 0,
        labels: Tensor | None = None,
        model: nn.Module | None = None,
        chunk: int | None = None,
    ) -> "Case":
        """`labels` replace those of the training images (flipped ones); `model` replaces the
        network of `hidden` units.
        """
        parameters = Parameters.of(
            (model or network(images.x.shape[1], hidden, seed)).to(images.x.device)
        )
        objective = Objective.of_outputs(
            lambda w, part: parameters.call(w, part[0]),
            lambda z, part: class_losses(z, part[1]),
            (images.x, images.y if labels is None else labels),
            l2,
            chunk=chunk,
        )
        return cls(images, parameters, SAMProblem(objective, rho))

    def with_rho(self, rho: float) -> "Case":
        """The same with another radius."""
        return replace(self, problem=replace(self.problem, rho=rho))

    def margins(self, w: Tensor, data: Data) -> Tensor:
        """TRAK's margins, log p / (1 - p) of each sample's label: [samples]."""
        return margins(self.parameters.call(w, data[0]), data[1])

    def test_loss(self, w: Tensor) -> Tensor:
        """Mean loss on the test images, a scalar."""
        return cross_entropy(self.parameters.call(w, self.images.x_test), self.images.y_test)

    def validation_loss(self, w: Tensor) -> Tensor:
        """Mean loss on the validation images."""
        return cross_entropy(
            self.parameters.call(w, self.images.x_validation), self.images.y_validation
        )

    def metrics(self, queries: int) -> Callable[[Tensor], Tensor]:
        """w -> [1 + queries]: the mean loss on the test images, then the losses of the first of
        them.
        """
        x, y = self.images.x_test, self.images.y_test

        def of(w: Tensor) -> Tensor:
            losses = cross_entropy(self.parameters.call(w, x), y, reduction="none")
            return torch.cat([losses.mean().unsqueeze(0), losses[:queries]])

        return of

    def predictions(self, w: Tensor) -> Tensor:
        """Predicted classes of the test images."""
        with torch.no_grad():
            return self.parameters.call(w, self.images.x_test).argmax(1)

    def accuracy(self, w: Tensor) -> float:
        """Share of the test images whose class is right."""
        return float((self.predictions(w) == self.images.y_test).double().mean())


@dataclass(frozen=True, eq=False)
class Solution:
    """SAM's fixed point of a case, and the means to find those of its neighbours."""

    case: Case
    w: Tensor
    inverse: Callable[[Tensor], Tensor]
    tol: float

    @classmethod
    def of(cls, case: Case, tol: float = 1e-9) -> "Solution":
        root = fit(case.problem, case.parameters.flat(), tol=tol)
        return cls(case, root.w, retrain.factored_jacobian(case.problem.field, root.w), tol)

    def train(self, weights: Tensor) -> retrain.Root:
        """The fixed point with other sample weights [n], from this one; the 1/n of the samples that
        stay is kept.
        """
        return retrain.broyden_root(
            self.case.problem.weighted(weights.to(self.w)).field, self.w, self.inverse, tol=self.tol
        )

    def without(
        self, removals: Iterable[Iterable[int]], progress: Callable = lambda items: items
    ) -> retrain.Retrained:
        """One training per set of removed samples."""
        return retrain.retrain(
            self.train,
            self.case.problem.objective.n,
            [list(one) for one in removals],
            progress=progress,
        )
