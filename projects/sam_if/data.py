"""Real images as small SAM problems: features, models, SAM's solution, and retraining without
samples.

CIFAR-100 and Mini-ImageNet, which the paper's readers name among its data, are in no package;
MNIST, Fashion-MNIST, CIFAR-10 and the UCI digits stand here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from shared.vision import images as vision
from shared.vision.images import LabelledImages
from shared.vision.projection import Projection, Standardisation

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

    "blobs" are random numbers around ten random centres: for a pipeline check and tests, without a
    download.
    """
    known, tests = _drawn(name, n + validation, test, seed)
    train, held = known.pick(slice(n)), known.pick(slice(n, None))
    project = _pixels(train) if features is None else _components(train, features)
    return Images(
        project(train).to(device), train.labels.to(device), project(held).to(device),
        held.labels.to(device), project(tests).to(device), tests.labels.to(device),
        train.pictures(), tests.pictures(),
    )  # fmt: skip


def _drawn(
    name: Dataset, known: int, test: int, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Images of uint8 to train and validate with, and to test with."""
    if name not in ("digits", "blobs"):
        return vision.load(name, known, "train", seed), vision.load(name, test, "test", seed)
    whole = _blobs(seed)
    if name == "digits":
        whole = vision.load("digits", split="all")
        whole = replace(whole, pixels=(240 * whole.pixels).byte())  # their 16 levels, 15 apart
    if len(whole) <= known:
        raise UserError(
            f"{name} has {len(whole)} images, too few for {known} to train on and validate, and one"
            " to test"
        )
    order = torch.randperm(len(whole), generator=generator(seed, "images"))
    return whole.pick(order[:known]), whole.pick(order[known:][:test])


def _components(train: LabelledImages, features: int) -> Callable[[LabelledImages], Tensor]:
    def flat(data: LabelledImages) -> Tensor:
        return data.pictures().double().flatten(1)

    project = Projection.fit(flat(train), features, sign="sum")
    scale = project(flat(train)).square().mean().sqrt()
    return lambda data: project(flat(data)) / scale


def _pixels(train: LabelledImages) -> Callable[[LabelledImages], Tensor]:
    def floats(data: LabelledImages) -> Tensor:  # in memory as files hold them, channels last
        return data.pixels.float().contiguous(memory_format=torch.channels_last)

    standardise = Standardisation.fit(floats(train))
    return lambda data: standardise(floats(data)).contiguous()


def _blobs(seed: int) -> LabelledImages:
    draw = np.random.default_rng(step_seed(seed, "blobs"))
    labels = draw.integers(CLASSES, size=4000)
    centres = np.random.default_rng(step_seed(0, "centres")).normal(size=(CLASSES, 64))
    values = 128 + 25 * (0.5 * centres[labels] + draw.normal(size=(4000, 64)))
    return LabelledImages(
        torch.from_numpy(values.clip(0, 255).astype(np.uint8).reshape(-1, 1, 8, 8)),
        torch.from_numpy(labels),
        tuple(f"blob {label}" for label in range(CLASSES)),
    )


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
