"""What the experiments share: the source that one of them trains, targets and their tasks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from projects.idp import data
from projects.idp.align import FINE_TUNING, IDP, Alignment, Losses, align
from projects.idp.classify import embed, ridge_head
from projects.idp.codebook import Kind, build
from projects.idp.norms import Scope
from projects.idp.source import Source, cells_in_parts
from shared import experiment
from shared.seeding import step_seed
from shared.vision.episodes import Episodes, sample_episodes
from shared.vision.images import LabelledImages


class ImagesConfig(experiment.Config):
    """Pools of images."""

    targets: list[str] = Field(min_length=1)
    """Domains that images are of."""
    per_class: PositiveInt
    """Images of a class in a domain's pool, at most."""
    size: PositiveInt
    """Pixels an edge."""
    root: str | None
    """Folder of the published data sets, where one of them is named."""
    device: str = "cpu"
    """Where tensors live: cpu, or cuda."""


class TaskConfig(ImagesConfig):
    """Tasks of target domains. Tasks depend on the seed, the target and the shots alone, so that
    all experiments with these settings have the same ones.
    """

    shots: list[PositiveInt] = Field(min_length=1)
    """Support images of a class."""
    tasks: PositiveInt
    """Tasks of each target and number of shots."""
    ways: PositiveInt
    """Classes of a task."""
    queries: PositiveInt
    """Query images of a class."""


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
class Trained:
    """The source that the experiment `source` trained.

    Attributes:
        classes: by role: base, validation, novel.
        dataset: that the classes are of.
    """

    source: Source
    classes: dict[str, list[str]]
    dataset: data.Source

    def images(self, role: str, config: "ImagesConfig") -> LabelledImages:
        """Of the classes of a role."""
        return data.source_images(
            self.dataset,
            role,
            self.classes[role],
            config.per_class,
            config.size,
            config.seed,
            config.root,
        )

    def codebook(self, kind: Kind, rows: int, seed: int) -> Tensor:
        """A codebook of the source."""
        return build(kind, rows, self.source.means, self.source.learned, seed)

    def domain(self, config: "ImagesConfig", name: str) -> "Domain":
        """The pool of a target, ready for tasks."""
        novel = self.classes["novel"]
        pool = data.target(name, config.per_class, config.size, config.seed, novel, config.root)
        return Domain.of(name, pool, pool.images().to(config.device), self.source)


@dataclass(frozen=True, eq=False)
class Domain:
    """A pool of a target with its cells under the source network, and tasks from it."""

    name: str
    pool: LabelledImages
    images: Tensor
    cells: Tensor

    @classmethod
    def of(cls, name: str, pool: LabelledImages, images: Tensor, source: Source) -> "Domain":
        return cls(name, pool, images, cells_in_parts(source.network, images))

    def tasks(self, config: TaskConfig, shots: int) -> Episodes:
        seed = step_seed(config.seed, "tasks", self.name, shots)
        return sample_episodes(
            self.pool.labels, config.tasks, config.ways, shots, config.queries, seed
        )


def tensors_of(network: int) -> str:
    """The name of the tensors of one of the networks of the experiment `source`."""
    return f"source_{network}"


def trained(run: experiment.Run, device: str, network: int = 0) -> Trained:
    """A source that the experiment `source` trained, on a device."""
    classes: dict[str, list[str]] = {"base": [], "validation": [], "novel": []}
    dataset = ""
    for row in run.used_rows("source"):
        if row["part"] == "class":
            classes[str(row["role"])].append(str(row["name"]))
        elif row["part"] == "network":
            dataset = str(row["dataset"])
    tensors = run.used_tensors("source", tensors_of(network))
    source = Source.of_tensors({name: value.to(device) for name, value in tensors.items()})
    source.network.to(device)
    return Trained(source, classes, dataset)  # type: ignore[arg-type]


def groups(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def adapted_counts(
    config: AlignConfig,
    place: Domain,
    shots: int,
    source: Source,
    book: Tensor,
    how: Alignment,
    count: int | None = None,
) -> list[int]:
    """Right answers of each task, or of the first `count`, adapted as `how` says, inductive."""
    tasks = place.tasks(config, shots)
    found: list[int] = []
    for part in groups(config.tasks if count is None else count, config.group):
        support, query = place.images[tasks.support[part]], place.images[tasks.query[part]]
        seeds = task_seeds(config, place.name, shots, part)
        network = align(source.network, support, config.ways, book, source.scale, how, seeds)
        scores = ridge_head(*embed(network, support, query, "inductive"), config.ways)
        found += right(scores, tasks.y_query[part])
    return found


def task_seeds(config: TaskConfig, name: str, shots: int, part: slice) -> list[int]:
    """The seeds of some tasks."""
    return [
        step_seed(config.seed, "adapt", name, shots, number)
        for number in range(part.start, part.stop)
    ]


def right(scores: Tensor, labels: Tensor) -> list[int]:
    """How many queries of each task have their class on top: of scores [tasks, q, ways]."""
    return (scores.argmax(-1) == labels.to(scores.device)).sum(-1).tolist()


def centre(source: Source) -> Tensor:
    """The mean pooled feature of the source's classes, [d]."""
    return torch.mean(source.means, (0, 1))
