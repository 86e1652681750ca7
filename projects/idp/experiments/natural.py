"""A natural-image source: EfficientNet-Lite0, trained on ImageNet, which is where a user would
start from.

Its codebook is clustered of the mean maps of CIFAR-10's classes, which stand for the ImageNet
images that it was trained on. All tasks are classified without adaptation, some with.
"""

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from projects.idp import labels
from projects.idp.backbone import Normalised
from projects.idp.baselines import nearest_mean
from projects.idp.classify import ridge_head
from projects.idp.codebook import build, class_means
from projects.idp.data import target
from projects.idp.experiments.common import (
    METHODS,
    AlignConfig,
    Domain,
    Trained,
    adapted_counts,
    groups,
    right,
    trained,
)
from projects.idp.source import Source, cells_in_parts
from shared import experiment

COLUMNS = (labels.NEAREST_MEAN, labels.RIDGE, *METHODS)


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
    base = trained(run, config.device)  # for the classes of the nearest target
    source, book = natural(config)
    for name in run.progress(config.targets, "targets"):
        place = Trained(source, base.classes, base.dataset).domain(config, name)
        for shots in config.shots:
            found = frozen_counts(config, place, shots)
            if name in config.adapted and shots == config.adapted_shots:
                for method, losses in METHODS.items():
                    found[method] = adapted_counts(
                        *(config, place, shots, source, book, config.how(losses)),
                        count=config.adapted_tasks,
                    )
            for number in range(config.tasks):
                run.row(
                    target=name,
                    shots=shots,
                    task=number,
                    queries=config.ways * config.queries,
                    **{
                        method: found[method][number] if number < len(found[method]) else None
                        for method in COLUMNS
                    },
                )


def frozen_counts(config: Config, place: Domain, shots: int) -> dict[str, list[int]]:
    """Right answers of each task without adaptation; none yet for the methods that adapt."""
    tasks = place.tasks(config, shots)
    found: dict[str, list[int]] = {method: [] for method in COLUMNS}
    for part in groups(config.tasks, 10):
        support, query = place.cells[tasks.support[part]], place.cells[tasks.query[part]]
        means = nearest_mean(support.mean(2), query.mean(2), config.ways)
        found[labels.NEAREST_MEAN] += right(means, tasks.y_query[part])
        scores = ridge_head(support, query, config.ways)
        found[labels.RIDGE] += right(scores, tasks.y_query[part])
    return found


def natural(config: Config) -> tuple[Source, Tensor]:
    """The backbone with its stand-in source, and the codebook."""
    network = Normalised.named(config.backbone, config.size).to(config.device)
    images = target(config.source, config.per_class, config.size, config.seed, [], config.root)
    cells = cells_in_parts(network, images.images().to(config.device))
    means = class_means(cells, images.labels.to(config.device), len(images.classes))
    book = build("clustered", config.codebook_rows, means, means, config.seed)
    return Source(network, means, means, config.scale), book
