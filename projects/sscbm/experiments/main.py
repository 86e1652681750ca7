"""The main table: every method and control on four sets, with a tenth of the images annotated."""

import torch
from pydantic import Field

from projects.sscbm import labels
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
from projects.sscbm.metrics import auc, concept_accuracy
from projects.sscbm.pseudo import nearest
from projects.sscbm.pseudo import weights_of as weights
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
        run.row(**common, method=labels.MAJORITY, steps=0, **majority(one))
        run.row(**common, method=labels.KNN, steps=0, **knn(one, frozen["test"]))
        for method, setting in SETTINGS.items():
            model, steps = trained(config, one, setting, pseudo)
            found = measured(model, one)
            run.row(**common, method=method, steps=steps, **found)
            if method == labels.CEM_FULL and name in CLASS_LEVEL:
                # A class's concepts, copied from its annotated image to all others, are all
                # concepts, so that this is the same training.
                assert torch.equal(propagated(one), one.truth)
                run.row(**common, method=labels.PROPAGATED, steps=steps, **found)
            if method in KEPT:
                kept[name].update(weights_of(model, f"{method}/{seed}"))
    for name, tensors in kept.items():
        run.save_tensors(name, tensors)


def propagated(one: Case) -> torch.Tensor:
    """The concepts of each image's class, from the first annotated image of the class."""
    found = torch.empty_like(one.concepts)
    for label in one.choice.per_class:
        of_class = one.labels == label
        annotated = (of_class & ~one.concepts.isnan().any(1)).nonzero()[0]
        found[of_class] = one.concepts[annotated]
    return found


def majority(one: Case) -> dict[str, float]:
    """Of each concept and of the classes, what most annotated images have."""
    test, known = one.data.test, one.choice.rows
    assert test.concepts is not None
    guess = one.concepts[known].mean(0).expand(len(test), -1)
    commonest = one.labels[known].bincount().argmax()
    return {
        "concept_accuracy": concept_accuracy(guess, test.concepts),
        "concept_auc": auc(guess, test.concepts),
        "task_accuracy": float((test.labels == commonest).double().mean()),
    }


def knn(one: Case, features: torch.Tensor) -> dict[str, float]:
    """The pseudo labels of the test images themselves, and the neighbours' weighted vote for the
    class.
    """
    test, known = one.data.test, one.choice.rows
    assert test.concepts is not None
    distances, rows = nearest(features, one.features[known], one.neighbours)
    w = weights(distances).float().unsqueeze(2)
    guess = (w * one.concepts[known][rows]).sum(1).clamp(0, 1)
    votes = torch.nn.functional.one_hot(one.labels[known][rows], len(test.classes))
    return {
        "concept_accuracy": concept_accuracy(guess, test.concepts),
        "concept_auc": auc(guess, test.concepts),
        "task_accuracy": float(((w * votes).sum(1).argmax(1) == test.labels).double().mean()),
    }
