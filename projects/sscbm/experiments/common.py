"""What the experiments share: a data set with some of its concepts hidden, and a trained method."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from projects.sscbm import labels, metrics
from projects.sscbm.data import ConceptSet, Name, load
from projects.sscbm.model import ConceptModel, Method, Similarity, build, named_backbone, start_from
from projects.sscbm.pseudo import Choice, choose_labelled, neighbours_for, pseudo_labels
from projects.sscbm.training import Data, Losses, TaskLabels, Unlabelled, hide, train
from shared import experiment
from shared.seeding import generator
from shared.vision.training import batches


class SetConfig(experiment.Config):
    """Sizes of the sets."""

    pool: PositiveInt | None
    """Training images of a set, of which frozen features are taken; null: all of the paper's."""
    test: PositiveInt | None
    """Test images of a set; null: all of the paper's."""
    root: str | None
    """Folder that holds the paper's sets (projects.sscbm.data.FOLDERS); null where none is run."""
    edge: PositiveInt | None
    """Pixels of an edge that the paper's images are brought to."""


class TrainConfig(SetConfig):
    """A set's training images, and how every method is trained on them."""

    train: PositiveInt | None
    """Images that a seed draws from the pool; null: all."""
    seeds: PositiveInt
    """Runs; each draws the images, those that are annotated, the weights and the batches."""
    backbone: str
    """Network with a spatial map, by its name (sscbm.model.named_backbone)."""
    size: PositiveInt
    """Numbers in a concept's embedding (m)."""
    end_to_end: bool
    """Train from the images, not from the frozen network's maps."""
    weights: str | None
    """A safetensors file that the backbone starts from, with the names of timm; null: random."""
    epochs: PositiveInt
    """Epochs on all training images; a method with fewer images makes as many steps."""
    batch: PositiveInt
    """Images of a batch."""
    rate: PositiveFloat
    """Learning rate of Adam at the start; it falls to 0 along a line."""
    lambda_1: float = Field(ge=0)
    """Weight of the loss of annotated concepts."""
    lambda_2: float = Field(ge=0)
    """Weight of the alignment loss."""
    randint: float = Field(ge=0, le=1)
    """Probability that RandInt gives a concept of a batch its annotated value."""
    device: str = "cpu"
    """Where models are trained: cpu, or cuda."""


@dataclass(frozen=True)
class Setting:
    """How a row of the main table is trained.

    Attributes:
        model: the network.
        unlabelled: what is done where concepts are hidden.
        task_labels: of which images the class is known.
        labelled_only: the other images are not there.
        full: no concept is hidden.
    """

    model: Method = "cem"
    unlabelled: Unlabelled = "nothing"
    task_labels: TaskLabels = "all"
    labelled_only: bool = False
    full: bool = False


SETTINGS = {
    labels.LABELLED_ONLY: Setting(labelled_only=True),
    labels.NO_PSEUDO: Setting(),
    labels.CBM_SSL: Setting("cbm", "direct"),
    labels.CEM_SSL: Setting("cem", "direct"),
    labels.FIXMATCH: Setting("cem", "fixmatch"),
    labels.SSCBM: Setting("sscbm", "align"),
    labels.SSCBM_LABELED: Setting("sscbm", "align", "labeled"),
    labels.CBM_FULL: Setting("cbm", full=True),
    labels.CEM_FULL: Setting("cem", full=True),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One seed of a set at one ratio.

    Attributes:
        rows: int64 [n], of the pool: the training images.
        truth: [n, k], all concepts. Nothing that trains a method is given it, but where the method
            is one with all annotations.
        concepts: [n, k], NaN where hidden.
        features: [n, d], frozen.
        images, test: what models are trained and tested on: a frozen network's maps, or images.
    """

    data: ConceptSet
    seed: int
    rows: Tensor
    images: Tensor
    test: Tensor
    labels: Tensor
    truth: Tensor
    concepts: Tensor
    choice: Choice
    features: Tensor
    neighbours: int

    @property
    def ratio(self) -> float:
        return self.choice.ratio(len(self.labels))

    def pseudo(self, neighbours: int | None = None) -> Tensor:
        """Pseudo labels from the K nearest; None: K by the authors' rule."""
        return pseudo_labels(self.features, self.concepts, neighbours or self.neighbours)

    def agreement(self, pseudo: Tensor) -> float:
        """Share of the hidden concepts that their pseudo labels, cut at 0.5, are right about."""
        hidden = self.concepts.isnan()
        return float(((pseudo > 0.5) == (self.truth > 0.5))[hidden].double().mean())


def loaded(config: SetConfig, name: Name) -> ConceptSet:
    """A set of the configuration's size, read once."""
    return _loaded(name, config.pool, config.test, config.root, config.edge)


@cache
def _loaded(
    name: Name, pool: int | None, test: int | None, root: str | None, edge: int | None
) -> ConceptSet:
    return load(name, pool, test, None if root is None else Path(root), edge)


def case(
    config: TrainConfig, name: Name, seed: int, ratio: float, frozen: dict[str, Tensor]
) -> Case:
    """A seed's images, of which some are annotated. `frozen` are the tensors of `features`."""
    data = loaded(config, name)
    order = torch.randperm(len(data.pool), generator=generator(seed, "training images"))
    rows = order[: config.train]
    part = data.pool.pick(rows)
    assert part.concepts is not None
    choice = choose_labelled(part.labels, ratio, seed)
    concepts = torch.full_like(part.concepts, torch.nan)
    concepts[choice.rows] = part.concepts[choice.rows]
    return Case(
        data,
        seed,
        rows,
        part.pixels if config.end_to_end else frozen["pool_maps"][rows],
        data.test.pixels if config.end_to_end else frozen["test_maps"],
        part.labels,
        part.concepts,
        concepts,
        choice,
        frozen["pool"][rows],
        neighbours_for(choice),
    )


def training_data(one: Case, setting: Setting, pseudo: Tensor) -> Data:
    """What a method sees of a case."""
    concepts = one.truth if setting.full else one.concepts
    known = hide(one.labels, concepts, setting.task_labels)
    data = Data(one.images, known, concepts, pseudo)
    if setting.labelled_only:
        data = Data(*(column[one.choice.rows] for column in data.columns))
    return data


def new_model(
    config: TrainConfig, one: Case, method: Method, similarity: Similarity = "dot"
) -> ConceptModel:
    """An untrained model of the case's seed."""
    shape = tuple(one.images.shape[1:])
    model = build(
        method,
        lambda: named_backbone(config.backbone, shape),
        shape,  # type: ignore[arg-type]
        one.truth.shape[1],
        len(one.data.pool.classes),
        size=config.size,
        similarity=similarity,
        seed=one.seed,
    )
    if config.weights is not None:
        start_from(model.encoder.backbone, Path(config.weights))
    return model.to(config.device)


def losses_of(config: TrainConfig, setting: Setting) -> Losses:
    """A concept bottleneck has no embeddings to mix, and so no RandInt."""
    randint = 0.0 if setting.model == "cbm" else config.randint
    return Losses(setting.unlabelled, config.lambda_1, config.lambda_2, randint)


def trained(
    config: TrainConfig,
    one: Case,
    setting: Setting,
    pseudo: Tensor,
    similarity: Similarity = "dot",
) -> tuple[ConceptModel, int]:
    """A model trained as the setting says, and its steps, which are those of all images."""
    model = new_model(config, one, setting.model, similarity)
    data = training_data(one, setting, pseudo)
    data = Data(*(column.to(config.device) for column in data.columns))
    steps = train(
        model,
        data,
        losses_of(config, setting),
        epochs=epochs_for(config, len(data.labels), len(one.labels)),
        batch=config.batch,
        rate=config.rate,
        seed=one.seed,
    )
    return model, steps


def epochs_for(config: TrainConfig, images: int, of: int) -> int:
    """Epochs that make as many steps with so many images as `epochs` do with all `of` them."""
    a_step, whole = (len(batches(n, config.batch, 0, 1)) for n in (images, of))
    return max(1, round(config.epochs * whole / a_step))


def measured(model: ConceptModel, one: Case) -> dict[str, Any]:
    """A row's columns on the test images."""
    test = one.data.test
    assert test.concepts is not None
    found = metrics.scores(metrics.predict(model, one.test), test.labels, test.concepts)
    return {
        "concept_accuracy": found.concepts,
        "concept_auc": found.auc,
        "task_accuracy": found.task,
    }


def weights_of(model: ConceptModel, key: str) -> dict[str, Tensor]:
    """A model's weights as tensors that an experiment saves, under a key."""
    return {f"{key}/{name}": value.cpu() for name, value in model.state_dict().items()}


def put_weights(model: ConceptModel, tensors: dict[str, Tensor], key: str) -> ConceptModel:
    """Such weights back into a model, in eval mode."""
    start = f"{key}/"
    own = {
        name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)
    }
    model.load_state_dict(own)
    return model.eval()
