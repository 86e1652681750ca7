"""The main table: every method and control on four sets, with a tenth of the images annotated."""

import torch
from pydantic import Field

from projects.sscbm import labels
from projects.sscbm.baselines import knn, majority, propagated
from projects.sscbm.data import CLASS_LEVEL, Name
from projects.sscbm.experiments.common import (
    SETTINGS,
    Case,
    TrainConfig,
    case,
    measured,
    trained,
    weights_of,
)
from projects.sscbm.metrics import Scores, scores
from shared import experiment

# whose weights other experiments take
KEPT = (labels.SSCBM, labels.NO_PSEUDO, labels.CEM_FULL, labels.CBM_FULL)


class Config(TrainConfig):
    datasets: list[Name] = Field(min_length=1)
    """The sets."""
    ratio: float = Field(gt=0, le=1)
    """Share of the training images that is annotated; rounded up in every class."""


def run(config: Config, run: experiment.Run) -> None:
    kept: dict[str, dict[str, torch.Tensor]] = {name: {} for name in config.datasets}
    cases = [
        (name, seed)
        for name in config.datasets
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    for name, seed in run.progress(cases, "data sets and seeds"):
        frozen = run.used_tensors("features", name)
        one = case(config, name, seed, config.ratio, frozen)
        pseudo = one.pseudo()
        common = {
            "dataset": name,
            "seed": seed,
            "images": len(one.labels),
            "labelled": len(one.choice.rows),
            "labelled_share": one.ratio,
            "neighbours": one.neighbours,
            "agreement_share": one.agreement(pseudo),
        }
        for method, found in controls(one, frozen["test"]).items():
            row = {"concept_accuracy": found.concepts, "concept_auc": found.auc}
            run.row(**common, method=method, steps=0, **row, task_accuracy=found.task)
        for method, setting in SETTINGS.items():
            model, steps = trained(config, one, setting, pseudo)
            found = measured(model, one)
            run.row(**common, method=method, steps=steps, **found)
            if method == labels.CEM_FULL and name in CLASS_LEVEL:
                # A class's concepts, copied from its annotated image to all others, are all
                # concepts, so that this is the same training.
                assert torch.equal(propagated(one.labels, one.concepts), one.truth)
                run.row(**common, method=labels.PROPAGATED, steps=steps, **found)
            if method in KEPT:
                kept[name].update(weights_of(model, f"{method}/{seed}"))
    for name, tensors in kept.items():
        run.save_tensors(name, tensors)


def controls(one: Case, features: torch.Tensor) -> dict[str, Scores]:
    """Those that train nothing, on the test images, of which `features` are the frozen ones."""
    test, rows = one.data.test, one.choice.rows
    assert test.concepts is not None
    known = (one.concepts[rows], one.labels[rows])
    found = {
        labels.MAJORITY: majority(*known, len(test), len(test.classes)),
        labels.KNN: knn(*known, one.features[rows], features, one.neighbours, len(test.classes)),
    }
    return {name: scores(it, test.labels, test.concepts) for name, it in found.items()}
