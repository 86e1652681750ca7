"""What the experiments share: the source that one of them trains, targets and their tasks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from projects.idp import data
from projects.idp.align import FINE_TUNING, IDP, Alignment, Losses
from projects.idp.codebook import build
from projects.idp.norms import Scope
from projects.idp.source import Source, cells_in_parts
from shared import experiment
from shared.seeding import step_seed
from shared.vision.episodes import Episodes, sample_episodes
from shared.vision.images import LabelledImages


class TaskConfig(experiment.Config):
    """Tasks of target domains. Tasks depend on the seed, the target and the shots alone, so that
    all experiments with these settings have the same ones.
    """

    targets: list[str] = Field(min_length=1)
    """Domains that tasks are drawn from."""
    shots: list[PositiveInt] = Field(min_length=1)
    """Support images of a class."""
    tasks: PositiveInt
    """Tasks of each target and number of shots."""
    ways: PositiveInt
    """Classes of a task."""
    queries: PositiveInt
    """Query images of a class."""
    per_class: PositiveInt
    """Images of a class in the pool that tasks are drawn from, at most."""
    size: PositiveInt
    """Pixels an edge."""


class AlignConfig(TaskConfig):
    """The same with how tasks are adapted."""

    steps: PositiveInt
    """Steps of Adam."""
    rate: PositiveFloat
    """Rate of Adam."""
    scope: Scope
    """Which BatchNorm layers are trained."""
    pseudo: PositiveInt
    """Pseudo queries of a class in a step."""
    codebook_rows: PositiveInt
    """Rows of the source codebook, clustered of the classes' mean maps."""
    group: PositiveInt
    """Tasks that are adapted at once."""

    def how(self, losses: Losses = IDP, **other: Any) -> Alignment:
        """As these settings say, with other losses or whatever else of `Alignment`."""
        names = ("steps", "rate", "scope", "pseudo")
        own = {name: getattr(self, name) for name in names}
        return Alignment(**{**own, "losses": losses, **other})


METHODS = {"fine_tuning": FINE_TUNING, "idp": IDP}


@dataclass(frozen=True, eq=False)
class Domain:
    """A pool of a target with its cells under the source network, and tasks from it."""

    name: str
    pool: LabelledImages
    images: Tensor
    cells: Tensor

    def tasks(self, config: TaskConfig, shots: int) -> Episodes:
        seed = step_seed(config.seed, "tasks", self.name, shots)
        return sample_episodes(
            self.pool.labels, config.tasks, config.ways, shots, config.queries, seed
        )


def trained(run: experiment.Run) -> tuple[Source, dict[str, list[str]]]:
    """The source that the experiment `source` trained, and its classes by role."""
    roles: dict[str, list[str]] = {"base": [], "validation": [], "novel": []}
    for row in run.used_rows("source"):
        if row["part"] == "class":
            roles[str(row["role"])].append(str(row["name"]))
    return Source.of_tensors(run.used_tensors("source", "source")), roles


def codebook(source: Source, rows: int, seed: int) -> Tensor:
    """The default codebook of a source."""
    return build("clustered", rows, source.means, source.learned, seed)


def domain(config: TaskConfig, name: str, source: Source, novel: list[str]) -> Domain:
    """The pool of a target, ready for tasks."""
    pool = data.target(name, config.per_class, config.size, config.seed, novel)
    images = pool.images()
    return Domain(name, pool, images, cells_in_parts(source.network, images))


def groups(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def task_seeds(config: TaskConfig, name: str, shots: int, part: slice) -> list[int]:
    """The seeds of some tasks."""
    return [
        step_seed(config.seed, "adapt", name, shots, number)
        for number in range(part.start, part.stop)
    ]


def right(scores: Tensor, labels: Tensor) -> list[int]:
    """How many queries of each task have their class on top: of scores [tasks, q, ways]."""
    return (scores.argmax(-1) == labels).sum(-1).tolist()


def centre(source: Source) -> Tensor:
    """The mean pooled feature of the source's classes, [d]."""
    return torch.mean(source.means, (0, 1))
