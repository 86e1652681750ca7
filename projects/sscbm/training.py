"""The losses, and the loop that all methods are trained with.

A concept that is NaN is not annotated, and a class of -1 is not known; what is hidden from a method
is not in its data at all, so that nothing can be read by mistake.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy

from projects.sscbm.model import ConceptModel, Output
from shared.errors import UserError
from shared.seeding import generator
from shared.vision.training import train_epoch

Unlabelled = Literal["nothing", "direct", "align", "fixmatch"]
TaskLabels = Literal["all", "labeled"]
CONFIDENT = 0.95  # a probability this far on either side makes a label in FixMatch
UNKNOWN = -1  # a class that is hidden


@dataclass(frozen=True)
class Losses:
    """L = L_task + lambda_1 L_c + lambda_2 L_align, and what the baselines have in its place.

    Attributes:
        unlabelled: what is done where concepts are not annotated: "nothing"; "direct": pseudo
            labels are targets of the concept head, weight 1 (the +SSL baselines); "align": of the
            heat maps (SSCBM); "fixmatch": the head's own confident answers on the image as it is
            are targets on a distorted one.
        lambda_1: weight of the annotated concepts.
        lambda_2: weight of the alignment.
        randint: probability with which a concept of a batch is replaced by its annotation.
        imbalance: concepts weigh N / N_positive - 1 in L_c, both terms alike (CUB and Derm7pt in
            the authors' code).
    """

    unlabelled: Unlabelled = "align"
    lambda_1: float = 1.0
    lambda_2: float = 0.1
    randint: float = 0.25
    imbalance: bool = False


@dataclass(frozen=True, eq=False)
class Data:
    """What a method may see of its training images.

    Attributes:
        images: [n, channels, height, width], uint8 or float from 0 to 1.
        labels: int64 [n], classes, -1 where hidden.
        concepts: float32 [n, k], 0 or 1, NaN where not annotated.
        pseudo: float32 [n, k] in [0, 1]; its annotated cells are not used.
    """

    images: Tensor
    labels: Tensor
    concepts: Tensor
    pseudo: Tensor

    def __post_init__(self) -> None:
        sizes = {len(column) for column in self.columns}
        if len(sizes) > 1 or self.concepts.shape != self.pseudo.shape:
            raise UserError(
                f"images, classes, concepts and pseudo labels of {len(self.images)},"
                f" {len(self.labels)}, {list(self.concepts.shape)}, {list(self.pseudo.shape)} do"
                " not fit one another"
            )
        if not bool((self.labels >= 0).any()):
            raise UserError("no image has a class; give the classes of some")

    @property
    def columns(self) -> tuple[Tensor, ...]:
        return self.images, self.labels, self.concepts, self.pseudo


def hide(labels: Tensor, concepts: Tensor, task_labels: TaskLabels) -> Tensor:
    """Classes as a method sees them: all, or those of images with an annotated concept."""
    if task_labels == "all":
        return labels
    return labels.masked_fill(concepts.isnan().all(1), UNKNOWN)


def mean_where(values: Tensor, cells: Tensor) -> Tensor:
    """The mean over cells that are true; 0, with a gradient of 0, where none is."""
    return torch.where(cells, values, 0.0).sum() / cells.sum().clamp(min=1)


def imbalance_of(concepts: Tensor) -> Tensor:
    """N / N_positive - 1 of each concept over its annotated images, [k]; 1 where none has it."""
    known = ~concepts.isnan()
    positive = torch.where(known, concepts, 0.0).sum(0)
    return torch.where(positive > 0, known.sum(0) / positive.clamp(min=1) - 1, 1.0)


class Objective:
    """The loss of a batch; it counts its steps, which decide what is drawn.

    Args:
        model: that is trained.
        losses: see `Losses`.
        seed: of RandInt and of FixMatch's distortions.
        step: steps made before, where a run goes on.
        weights: [k] of the annotated concepts, or None for 1.
    """

    def __init__(
        self,
        model: ConceptModel,
        losses: Losses,
        seed: int,
        step: int = 0,
        weights: Tensor | None = None,
    ):
        self.model, self.losses, self.seed, self.step = model, losses, seed, step
        self.weights = weights

    def __call__(self, images: Tensor, labels: Tensor, concepts: Tensor, pseudo: Tensor) -> Tensor:
        out = self.model(images, self.randint(concepts))
        known = ~concepts.isnan()
        total = task_loss(out.logits, labels)
        total = total + self.losses.lambda_1 * self.concept_loss(out, concepts, known)
        if self.losses.unlabelled != "nothing":
            total = total + self.unlabelled(out, images, known, pseudo)
        self.step += 1
        return total

    def randint(self, concepts: Tensor) -> Tensor | None:
        """The same concepts of all images of a batch, where they are annotated (RandInt)."""
        if not self.losses.randint:
            return None
        draw = generator(self.seed, "randint", self.step)
        chosen = torch.rand(concepts.shape[1], generator=draw) < self.losses.randint
        return concepts.masked_fill(~chosen.to(concepts.device), torch.nan)

    def concept_loss(self, out: Output, concepts: Tensor, known: Tensor) -> Tensor:
        terms = bce(out.concept_logits, concepts.nan_to_num(), reduction="none")
        return mean_where(terms if self.weights is None else self.weights * terms, known)

    def unlabelled(self, out: Output, images: Tensor, known: Tensor, pseudo: Tensor) -> Tensor:
        kind = self.losses.unlabelled
        if kind == "fixmatch":
            p = out.probabilities.detach()
            sure = ~known & ((p > CONFIDENT) | (p < 1 - CONFIDENT))
            distorted = self.model(distort(images, generator(self.seed, "distort", self.step)))
            return mean_where(
                bce(distorted.concept_logits, (p > 0.5).to(p.dtype), reduction="none"), sure
            )
        if kind == "direct":
            return mean_where(bce(out.concept_logits, pseudo, reduction="none"), ~known)
        if out.alignment is None:
            raise ValueError("a model without heat maps has nothing to align")
        return self.losses.lambda_2 * mean_where(
            bce(out.alignment, pseudo, reduction="none"), ~known
        )


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the images whose class is known; 0 where none is."""
    terms = cross_entropy(logits, labels.clamp(min=0), reduction="none")
    return mean_where(terms, labels >= 0)


def distort(images: Tensor, draw: torch.Generator) -> Tensor:
    """FixMatch's strong view of a batch of images or maps: a shift of up to an eighth (at least one
    place), a gain for each channel of each image, and a hole of a quarter of the edge with the
    channel's mean.
    """
    images = images / 255 if images.dtype == torch.uint8 else images
    height, width = images.shape[2:]

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    reach = [max(1, edge // 8) for edge in (height, width)]
    moved = images.roll(tuple(integer(-most, most) for most in reach), (2, 3))
    mean = images.mean((2, 3), keepdim=True)
    gain = 0.5 + torch.rand(mean.shape, generator=draw).to(images.device)
    found = mean + gain * (moved - mean)
    tall, wide = max(1, height // 4), max(1, width // 4)
    top, left = integer(0, height - tall), integer(0, width - wide)
    found[:, :, top : top + tall, left : left + wide] = mean
    return found


def standardise(model: ConceptModel, images: Tensor, block: int = 1024) -> None:
    """Have the model shift and scale its images by these images' mean and deviation a channel (of a
    channel that is constant, only shift).
    """
    scale = 255 if images.dtype == torch.uint8 else 1
    sums, squares = (
        sum((part.double() / scale).pow(power).sum((0, 2, 3)) for part in images.split(block))
        for power in (1, 2)
    )
    count = len(images) * images.shape[2] * images.shape[3]
    mean = sums / count
    deviation = (squares / count - mean**2).clamp(min=0).sqrt()
    encoder = model.encoder
    encoder.mean.copy_(mean.view(1, -1, 1, 1))
    encoder.deviation.copy_(torch.where(deviation > 1e-6, deviation, 1).view(1, -1, 1, 1))


def rate_of(rate: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch, from 1: it falls along a straight line that would end at 0
    after the last one.
    """
    return rate * (1 - (epoch - 1) / epochs)


def train(
    model: ConceptModel,
    data: Data,
    losses: Losses,
    *,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    objective: Callable[..., Objective] = Objective,
) -> int:
    """Train in place with Adam, leave the model in eval mode, and return the steps that were made.

    Args:
        objective: makes the loss; another one is for the ablation alone.
    """
    standardise(model, data.images)
    weights = imbalance_of(data.concepts) if losses.imbalance else None
    loss = objective(model, losses, seed, weights=weights)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    for epoch in range(1, epochs + 1):
        for group in optimiser.param_groups:
            group["lr"] = rate_of(rate, epoch, epochs)
        train_epoch(model, data.columns, loss, batch=batch, seed=seed, epoch=epoch, steps=optimiser)
    model.eval()
    return loss.step
