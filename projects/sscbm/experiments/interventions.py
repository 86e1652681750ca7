"""Interventions: task accuracy after an expert, right or always wrong, has told more and more
groups of concepts, at random or the most uncertain first.

Trains nothing: the models are those of `main`.
"""

from pydantic import Field

from projects.sscbm import labels
from projects.sscbm.data import Name
from projects.sscbm.experiments.common import (
    SETTINGS,
    TrainConfig,
    case,
    new_model,
    put_weights,
)
from projects.sscbm.intervene import random_order, told, uncertain_order
from projects.sscbm.metrics import predict
from shared import experiment

MODELS = (labels.SSCBM, labels.NO_PSEUDO, labels.CEM_FULL, labels.CBM_FULL)


class Config(TrainConfig):
    datasets: list[Name] = Field(min_length=1)
    """The sets."""
    ratio: float = Field(gt=0, le=1)
    """Share of the training images that was annotated in `main`."""
    stops: int = Field(ge=2)
    """Numbers of groups at which the accuracy is measured, from none to all."""


def run(config: Config, run: experiment.Run) -> None:
    jobs = [
        (name, seed)
        for name in config.datasets
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    for name, seed in run.progress(jobs, "data sets and seeds"):
        frozen = run.used_tensors("features", name)
        one = case(config, name, seed, config.ratio, frozen)
        weights = run.used_tensors("main", name)
        test, groups = one.data.test, one.data.groups
        assert test.concepts is not None
        counts = [round(step * len(groups) / (config.stops - 1)) for step in range(config.stops)]
        for method in MODELS:
            model = put_weights(
                new_model(config, one, SETTINGS[method].model), weights, f"{method}/{seed}"
            )
            orders = {
                labels.RANDOM_ORDER: random_order(len(test), groups, seed),
                labels.UNCERTAIN_ORDER: uncertain_order(
                    predict(model, one.test).probabilities, groups
                ),
            }
            for order, places in orders.items():
                for expert, values in (
                    (labels.RIGHT, test.concepts),
                    (labels.WRONG, 1 - test.concepts),
                ):
                    for count in dict.fromkeys(counts):
                        given = told(values, places, groups, count)
                        found = predict(model, one.test, given).logits.argmax(1)
                        run.row(
                            dataset=name,
                            seed=seed,
                            method=method,
                            order=order,
                            expert=expert,
                            groups=count,
                            told_share=count / len(groups),
                            task_accuracy=float((found == test.labels).double().mean()),
                        )
