"""What pseudo labels are worth by K, features and the faults of the authors' code; and SSCBM
trained with some of these, with a stronger alignment and with cosines for heat maps.
"""

from collections.abc import Callable

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from projects.sscbm import labels
from projects.sscbm.data import Name
from projects.sscbm.experiments.common import (
    SETTINGS,
    Case,
    TrainConfig,
    case,
    losses_of,
    measured,
    new_model,
    put_weights,
    trained,
    training_data,
)
from projects.sscbm.model import ConceptModel
from projects.sscbm.pseudo import pseudo_labels
from projects.sscbm.released import LeakingObjective, leaked, released_pseudo_labels
from projects.sscbm.training import train
from shared import experiment

SETTING = SETTINGS[labels.SSCBM]


class Config(TrainConfig):
    datasets: list[Name] = Field(min_length=1)
    """The sets."""
    ratio: float = Field(gt=0, le=1)
    """Share of the training images that is annotated, as in `main`."""
    neighbours: list[PositiveInt] = Field(min_length=1)
    """Values of K."""
    strong: float = Field(gt=0)
    """A larger weight of the alignment."""


def run(config: Config, run: experiment.Run) -> None:
    jobs = [
        (name, seed)
        for name in config.datasets
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    for name, seed in run.progress(jobs, "data sets and seeds"):
        one = case(config, name, seed, config.ratio, run.used_tensors("features", name))
        common = {"dataset": name, "seed": seed, "labelled_share": one.ratio}
        own = own_features(config, one, run.used_tensors("main", name))
        pixels = one.data.pool.images()[one.rows].flatten(1)
        for features, values in (
            (labels.FROZEN, one.features),
            (labels.PIXELS, pixels),
            (labels.OWN, own),
        ):
            for k in config.neighbours:
                found = one.agreement(pseudo_labels(values, one.concepts, k))
                run.row(**common, kind="labels", variant=features, k=k, agreement_share=found)
        for variant, pseudo in released(one).items():
            run.row(
                **common,
                kind="labels",
                variant=variant,
                k=one.neighbours,
                agreement_share=one.agreement(pseudo),
                largest_probability=float(pseudo[one.concepts.isnan()].max()),
            )
        for variant, make in trainings(config, one, pixels).items():
            run.row(**common, kind="training", variant=variant, **measured(make(), one))


def own_features(config: Config, one: Case, weights: dict[str, Tensor]) -> Tensor:
    """The vectors that CEM has for the images, trained with all class labels: [n, width]."""
    key = f"{labels.NO_PSEUDO}/{one.seed}"
    model = put_weights(new_model(config, one, "cem"), weights, key)
    with torch.no_grad():
        return torch.cat([model.encoder(part)[1] for part in one.images.split(256)])


def released(one: Case) -> dict[str, Tensor]:
    """Pseudo labels with the faults of the authors' code."""

    def faulty(index: bool, twice: bool) -> Tensor:
        return released_pseudo_labels(
            one.features, one.truth, one.choice.rows, one.neighbours, index=index, twice=twice
        )

    return {
        labels.WRONG_INDEX: faulty(True, False),
        labels.TWICE_NORMALISED: faulty(False, True),
        labels.AS_RELEASED: faulty(True, True),
    }


def trainings(config: Config, one: Case, pixels: Tensor) -> dict[str, Callable[[], ConceptModel]]:
    """SSCBM trained in other ways, by variant."""
    plain, faulty = one.pseudo(), released(one)
    stronger = config.model_copy(update={"lambda_2": config.strong})
    by_pixels = pseudo_labels(pixels, one.concepts, one.neighbours)
    return {
        labels.STRONGER: lambda: trained(stronger, one, SETTING, plain)[0],
        labels.COSINE: lambda: trained(config, one, SETTING, plain, "cosine")[0],
        labels.BY_PIXELS: lambda: trained(config, one, SETTING, by_pixels)[0],
        labels.WRONG_INDEX: lambda: trained(config, one, SETTING, faulty[labels.WRONG_INDEX])[0],
        labels.TWICE_NORMALISED: lambda: trained(
            config, one, SETTING, faulty[labels.TWICE_NORMALISED]
        )[0],
        labels.LEAKED: lambda: leaking(config, one, plain),
        labels.AS_RELEASED: lambda: leaking(config, one, faulty[labels.AS_RELEASED]),
    }


def leaking(config: Config, one: Case, pseudo: Tensor) -> ConceptModel:
    """Trained with RandInt by the hidden truth."""
    model = new_model(config, one, "sscbm")
    train(
        model,
        leaked(training_data(one, SETTING, pseudo), one.truth),
        losses_of(config, SETTING),
        epochs=config.epochs,
        batch=config.batch,
        rate=config.rate,
        seed=one.seed,
        objective=LeakingObjective,
    )
    return model
