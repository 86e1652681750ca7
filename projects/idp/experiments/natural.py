"""A natural-image source: EfficientNet-Lite0, trained on ImageNet, which is where a user would
start from.

Its codebook is clustered of the mean maps of CIFAR-10's classes, which stand for the ImageNet
images that it was trained on. All tasks are classified without adaptation, some with.
"""


import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from projects.idp import labels
from projects.idp.align import align
from projects.idp.backbone import Normalised
from projects.idp.baselines import nearest_mean
from projects.idp.classify import embed, ridge_head
from projects.idp.codebook import build, class_means
from projects.idp.data import target
from projects.idp.experiments.common import (
    METHODS,
    AlignConfig,
    domain,
    groups,
    right,
    task_seeds,
    trained,
)
from projects.idp.source import Source, cells_in_parts
from shared import experiment


class Config(AlignConfig):
    backbone: str
    """Name of a pretrained or random backbone (`shared.vision.backbones`)."""
    source: str
    """The target whose classes stand for the backbone's source in the codebook."""
    scale: PositiveFloat
    """Of the min-max scaled logits, which was not learned with this source."""
    adapted: list[str]
    """Targets whose tasks are adapted, too."""
    adapted_tasks: PositiveInt
    """Tasks of each of them, the first."""
    adapted_shots: PositiveInt
    """Their support images of a class."""


def run(config: Config, run: experiment.Run) -> None:
    _, roles = trained(run)
    source, book = natural(config)
    for name in run.progress(config.targets, "targets"):
        place = domain(config, name, source, roles["novel"])
        for shots in config.shots:
            tasks = place.tasks(config, shots)
            support, query = place.cells[tasks.support], place.cells[tasks.query]
            found = {
                labels.NEAREST_MEAN: right(
                    nearest_mean(support.mean(2), query.mean(2), config.ways), tasks.y_query
                ),
                labels.RIDGE: [
                    count
                    for part in groups(config.tasks, config.group)
                    for count in right(
                        ridge_head(support[part], query[part], config.ways), tasks.y_query[part]
                    )
                ],
            }
            if name in config.adapted and shots == config.adapted_shots:
                for method, losses in METHODS.items():
                    found[method] = []
                    for part in groups(config.adapted_tasks, config.group):
                        images = place.images[tasks.support[part]]
                        network = align(
                            source.network, images, config.ways, book, source.scale,
                            config.how(losses), task_seeds(config, name, shots, part),
                        )
                        both = embed(
                            network, images, place.images[tasks.query[part]], "inductive"
                        )
                        scores = ridge_head(*both, config.ways)
                        found[method] += right(scores, tasks.y_query[part])
            for number in range(config.tasks):
                counts = {
                    method: some[number] if number < len(some) else None
                    for method, some in found.items()
                }
                run.row(
                    target=name,
                    shots=shots,
                    task=number,
                    queries=config.ways * config.queries,
                    **{method: counts.get(method) for method in (labels.NEAREST_MEAN, labels.RIDGE, *METHODS)},
                )


def natural(config: Config) -> tuple[Source, Tensor]:
    """The backbone with its stand-in source, and the codebook."""
    network = Normalised.named(config.backbone, config.size)
    images = target(config.source, config.per_class, config.size, config.seed, [])
    cells = cells_in_parts(network, images.images())
    means = class_means(cells, images.labels, len(images.classes))
    book = build("clustered", config.codebook_rows, means, means, config.seed)
    return Source(network, means, means, config.scale), book
