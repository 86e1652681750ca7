"""Stage 1: training the source network, and what is kept of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.idp.codebook import cells_of, class_means
from projects.idp.network import DensePrototypes, ResidualNet
from shared.errors import UserError
from shared.seeding import generator, step_seed
from shared.vision.backbones import Backbone
from shared.vision.training import train


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
    """Cells [n, r, d] of images [n, channels, h, w], by parts, with the network's own statistics."""
    return torch.cat([cells_of(network.spatial_map(some)) for some in images.split(part)])  # type: ignore


def train_source(
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
    callback: Callable[[int, float, float], None] | None = None,
) -> Source:
    """Train with dense prototypes, cross-entropy with label smoothing 0.1 and SGD with Nesterov's
    momentum, whose rate falls to a tenth twice, near the end (at 4/7 and 6/7 of the epochs, as the
    authors' 200 and 300 of 350). Images are mirrored at random.

    Args:
        images: [n, channels, h, w] from 0 to 1.
        rows: of a class's prototypes.
        callback: called after each epoch with its number, the mean loss and the training accuracy
            of the epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "dense prototypes"))
        head = DensePrototypes(classes, rows, network.width).to(images.device)
    both = nn.ModuleList([network, head])
    optimiser: torch.optim.SGD | None = None
    coins = generator(seed, "mirrored")
    right = torch.zeros((), dtype=torch.int64)

    def make(parameters: object) -> torch.optim.SGD:
        nonlocal optimiser
        optimiser = torch.optim.SGD(
            parameters, lr=rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
        )
        return optimiser

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mirrored = torch.rand(len(x), 1, 1, 1, generator=coins).to(x.device) < 0.5
        logits = head(cells_of(network.spatial_map(torch.where(mirrored, x.flip(-1), x))))
        right.add_((logits.argmax(-1) == y).sum().cpu())
        return F.cross_entropy(logits, y, label_smoothing=0.1)

    def after(epoch: int, value: float) -> None:
        assert optimiser is not None
        if epoch in (round(4 * epochs / 7), round(6 * epochs / 7)):
            for group in optimiser.param_groups:
                group["lr"] *= 0.1
        if callback is not None:
            callback(epoch, value, float(right) / len(images))
        right.zero_()

    train(
        both,
        (images, labels),
        loss,
        epochs=epochs,
        batch=batch,
        seed=seed,
        optimiser=make,
        callback=after,
    )
    means = class_means(cells_in_parts(network, images), labels, classes)
    return Source(
        network, means, head.rows.detach().clone(), float(head.scale.detach())
    )
