"""Stage 1: training the source network, and what is kept of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.idp.codebook import cells_of, class_means
from projects.idp.network import DensePrototypes, ResidualNet
from shared.errors import UserError
from shared.seeding import generator, step_seed
from shared.vision.backbones import Backbone
from shared.vision.training import batches


@dataclass(frozen=True, eq=False)
class Source:
    """A trained source network and what its classes leave behind.

    Attributes:
        network: in eval mode.
        means: the classes' mean maps as cells [classes, r, d], which the codebook is clustered of.
        learned: the dense prototypes [classes, n, d].
        scale: of the logits.
    """

    network: Backbone
    means: Tensor
    learned: Tensor
    scale: float

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, which `Source.of_tensors` takes."""
        weights = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return {**weights, "means": self.means, "learned": self.learned, "scale": scale}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Source":
        """A source with a `ResidualNet`.

        Raises:
            UserError: they are of something else.
        """
        if absent := {"means", "learned", "scale"} - set(tensors):
            raise UserError(f"no source of IDP: it lacks {', '.join(sorted(absent))}")
        weights = {
            name.removeprefix("network."): value
            for name, value in tensors.items()
            if name.startswith("network.")
        }
        network = ResidualNet.of_weights(weights)
        return cls(network, tensors["means"], tensors["learned"], float(tensors["scale"]))


@torch.no_grad()
def cells_in_parts(network: nn.Module, images: Tensor, part: int = 256) -> Tensor:
    """Cells [n, r, d] of images [n, channels, h, w], by parts, with running statistics."""
    return torch.cat([cells_of(network.spatial_map(some)) for some in images.split(part)])  # type: ignore


class Training:
    """Stage 1: a network and dense prototypes, trained together an epoch at a time.

    Cross-entropy with label smoothing 0.1; SGD with Nesterov's momentum, whose rate falls to a
    tenth after 4/7 and after 6/7 of the epochs (the authors' 200 and 300 of 350). Images are
    mirrored at random. What an epoch does depends on the weights, its number and the seed alone.

    Args:
        images: [n, channels, h, w] from 0 to 1.
        rows: of a class's prototypes.
    """

    def __init__(
        self,
        network: Backbone,
        images: Tensor,
        labels: Tensor,
        classes: int,
        *,
        rows: int,
        epochs: int,
        batch: int,
        rate: float,
        weight_decay: float,
        seed: int,
    ):
        self.network, self.images, self.labels, self.classes = network, images, labels, classes
        self.epochs, self.batch, self.rate, self.seed = epochs, batch, rate, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step_seed(seed, "dense prototypes"))
            self.head = DensePrototypes(classes, rows, network.width).to(images.device)
        self.both = nn.ModuleDict({"network": network, "head": self.head})
        self.optimiser = torch.optim.SGD(
            self.both.parameters(),
            lr=rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=weight_decay,
        )

    def state(self) -> dict[str, Tensor]:
        """All that an epoch changes, by name: parameters and running statistics."""
        return {**dict(self.both.named_parameters()), **dict(self.both.named_buffers())}

    def epoch(self, number: int) -> tuple[float, float]:
        """Train for epoch `number`, from 1. Returns the mean loss and the accuracy of its images as
        they were trained on.

        Raises:
            UserError: the loss is not finite.
        """
        falls = sum(number > round(share * self.epochs) for share in (4 / 7, 6 / 7))
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * 0.1**falls
        coins = generator(self.seed, "mirrored", number)
        total, right = 0.0, 0
        self.both.train()
        for rows in batches(len(self.images), self.batch, self.seed, number):
            x, y = self.images[rows], self.labels[rows]
            mirrored = torch.rand(len(x), 1, 1, 1, generator=coins).to(x.device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
            try:
                logits = self.head(cells_of(self.network.spatial_map(x)))
                loss = F.cross_entropy(logits, y, label_smoothing=0.1)
            except torch.linalg.LinAlgError:  # of numbers too large to be squared, or none
                loss = torch.full((), torch.nan)
            if not loss.isfinite():
                raise UserError(
                    f"the loss is {loss.item():g} in epoch {number}; lower the learning rate or"
                    " the weight decay, or look at the images"
                )
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            total += float(loss.detach()) * len(rows)
            right += int((logits.argmax(-1) == y).sum())
        self.both.eval()
        return total / len(self.images), right / len(self.images)

    def source(self) -> Source:
        """What is kept of the training."""
        means = class_means(cells_in_parts(self.network, self.images), self.labels, self.classes)
        learned = self.head.rows.detach().clone()
        return Source(self.network, means, learned, float(self.head.scale.detach()))
