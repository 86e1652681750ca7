"""Stage 1: the source network, trained with dense prototypes on the base classes of its source.

The other experiments take its weights and its split of the classes.
"""

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from projects.idp import data
from projects.idp.experiments.common import tensors_of
from projects.idp.network import ResidualNet
from projects.idp.source import Training
from shared import experiment
from shared.seeding import step_seed
from shared.vision.images import LabelledImages


class Config(experiment.Config):
    dataset: data.Source
    """Whose classes the network is trained on."""
    root: str | None
    """Folder of the published data sets, where the source is one of them."""
    base: PositiveInt
    """Classes that the network is trained on."""
    validation: PositiveInt
    """Classes that settings are chosen on."""
    novel: PositiveInt
    """Classes of the nearest target."""
    per_class: PositiveInt
    """Drawings of a base class, at most."""
    size: PositiveInt
    """Pixels an edge."""
    stem: PositiveInt
    """Filters of the first layer."""
    kernel: PositiveInt
    """Their edge."""
    widths: list[PositiveInt]
    """Channels of the blocks."""
    networks: PositiveInt
    """Networks that are trained, from other weights and in another order; the first is the source
    of all experiments, the others are for what depends on the network."""
    rows: PositiveInt
    """Learnable rows of a class."""
    epochs: PositiveInt
    """Passes over the images."""
    batch: PositiveInt
    """Images of a step."""
    rate: PositiveFloat
    """First learning rate of SGD."""
    weight_decay: NonNegativeFloat
    """Of SGD."""
    device: str = "cpu"
    """Where tensors live: cpu, or cuda."""


def run(config: Config, run: experiment.Run) -> None:
    roles = data.source_roles(
        config.dataset, config.base, config.validation, config.novel, config.seed, config.root
    )
    for role, names in roles.items():
        for name in names:
            run.row(part="class", role=role, name=name)
    images = data.source_images(
        config.dataset,
        "base",
        roles["base"],
        config.per_class,
        config.size,
        config.seed,
        config.root,
    )
    for network in range(config.networks):
        seed = config.seed if network == 0 else step_seed(config.seed, "network", network)
        source = one(config, run, network, images, seed)
        run.save_tensors(tensors_of(network), source)


def one(
    config: Config, run: experiment.Run, number: int, images: LabelledImages, seed: int
) -> dict[str, Tensor]:
    """Train a network, and return what is kept of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "source network"))
        network = ResidualNet(3, config.stem, config.kernel, config.widths)
    training = Training(
        network.to(config.device),
        images.images().to(config.device),
        images.labels.to(config.device),
        len(images.classes),
        rows=config.rows,
        epochs=config.epochs,
        batch=config.batch,
        rate=config.rate,
        weight_decay=config.weight_decay,
        seed=seed,
    )
    for epoch in run.progress(range(1, config.epochs + 1), "epochs"):
        loss, accuracy = training.epoch(epoch)
        run.row(part="epoch", network=number, epoch=epoch, loss=loss, accuracy=accuracy)
    source = training.source()
    run.row(
        part="network",
        network=number,
        dataset=config.dataset,
        parameters=sum(p.numel() for p in network.parameters()),
        cells=source.means.shape[1],
        width=network.width,
        scale_ratio=source.scale,
    )
    return {name: value.cpu() for name, value in source.tensors().items()}
