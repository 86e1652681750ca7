"""The paper's figure 2 and its table of harmful removal: captions of a share of the pairs are
exchanged, and every method ranks the pairs.

Detection: whether exchanged pairs are the most harmful. Removal: the model is retrained without
each method's most harmful tenth. Scores are for the loss of a clean validation set; no method sees
which captions were exchanged.
"""

from collections.abc import Callable

import numpy as np
import torch
from pydantic import Field, PositiveInt

from projects.ecif import Contrastive, Pairs, labels, relative
from projects.ecif.baselines import all_scores
from projects.ecif.data import Name
from projects.ecif.experiments.common import Case, SplitConfig, build
from shared import experiment
from shared.influence.baselines import metric_gradient
from shared.influence.evaluate import auroc, average_precision, cosine, most_harmful, precision_at

DETECTION_ONLY = (
    labels.LARGER_CLEAN_SET,
    labels.RELATIVE_LARGER_CLEAN_SET,
    labels.SMALLER_CLEAN_SET,
    labels.NEGATIVE_ONLY,
)  # not removed: the larger set has the test pairs in it; the rest tells why


class Config(SplitConfig):
    """Problems with exchanged captions, and what looks for them."""

    cells: list[tuple[Name, float, PositiveInt]] = Field(min_length=1, strict=False)
    """Data set, share of the captions that are exchanged, and test pairs."""
    seeds: PositiveInt
    """Runs of a cell: each draws the split, the exchanged captions, the batches and the heads."""
    removed: float = Field(gt=0, lt=1)
    """Share of the pairs that is removed: those that a method finds most harmful."""
    dimension: PositiveInt
    """Dimensions of TRAK's projection."""


def run(config: Config, run: experiment.Run) -> None:
    cases = [
        (cell, seed)
        for cell in config.cells
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    for (dataset, share, test), seed in run.progress(cases, "cells and seeds"):
        case = build(config, dataset, seed, test, shuffled_share=share)
        problem, w = case.problem, case.fitted.w
        common = {
            "dataset": dataset,
            "shuffled_share": share,
            "seed": seed,
            "pairs": problem.pairs.n,
        }

        def judged(method: str, at: torch.Tensor, norm: float, **values: object) -> None:
            losses = {
                "validation_loss": float(case.validation.mean_loss(at)),  # noqa: B023
                "test_loss": float(case.test.mean_loss(at)),  # noqa: B023
            }
            run.row(
                **common,  # noqa: B023
                method=method,
                test_accuracy=case.accuracy(at),  # noqa: B023
                **losses,
                gradient_norm=norm,
                **values,
            )

        gradients = [
            metric_gradient(one.mean_loss, w).cpu() for one in (case.validation, case.test)
        ]
        judged(
            labels.NO_REMOVAL,
            w,
            case.fitted.gradient_norm,
            clean_gradient_cosine=float(cosine(*gradients)),
        )
        corrupted = case.corrupted.numpy()
        known = case.fitted.without(
            np.flatnonzero(corrupted)[: round(config.removed * problem.pairs.n)].tolist()
        )
        judged(labels.KNOWN_EXCHANGED, known.w, known.residual)
        for method, scored in methods(case, config, seed).items():
            harm = -scored().cpu().numpy()
            removed = most_harmful(harm)[: round(config.removed * problem.pairs.n)].tolist()
            found = {
                "detection_auc": auroc(harm, corrupted),
                "average_precision": average_precision(harm, corrupted),
                "ten_precision": precision_at(harm, corrupted, 10),
                "removed_precision": float(corrupted[removed].mean()),
                "clean_pairs": clean_pairs(case, method),
            }
            if method in DETECTION_ONLY:
                run.row(**common, method=method, **found)
            else:
                root = case.fitted.without(removed)
                judged(method, root.w, root.residual, **found)


def clean_pairs(case: Case, method: str) -> int:
    """How many clean pairs a method was given."""
    if method in (labels.SELF_INFLUENCE, labels.CLIP_SCORE, labels.PAIR_LOSS, labels.RANDOM):
        return 0
    if method == labels.SMALLER_CLEAN_SET:
        return smaller(case).pairs.n
    larger = method in (labels.LARGER_CLEAN_SET, labels.RELATIVE_LARGER_CLEAN_SET)
    return case.validation.pairs.n + (case.test.pairs.n if larger else 0)


def smaller(case: Case) -> Contrastive:
    """The first quarter of the clean batches."""
    pairs = case.validation.pairs
    quarter = max(1, pairs.batches // 4)
    present = pairs.present[:quarter]
    part = Pairs(
        tuple(one[:quarter] for one in pairs.inputs),
        present,
        torch.arange(int(present.sum()), device=present.device),
    )
    return Contrastive(case.validation.towers, part, 0.0)


def methods(case: Case, config: Config, seed: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Every method's scores as a call. The larger clean set has the test pairs, too: more than
    the others have.
    """
    problem, w, metric, solve = (
        case.problem,
        case.fitted.w,
        case.validation.mean_loss,
        case.fitted.solve,
    )
    found = all_scores(
        problem, w, metric, solve, start=case.start, seed=seed, dimension=config.dimension
    )

    def both(at: torch.Tensor) -> torch.Tensor:
        own, other = case.validation.pairs.n, case.test.pairs.n
        return (own * metric(at) + other * case.test.mean_loss(at)) / (own + other)

    found[labels.SMALLER_CLEAN_SET] = lambda: problem.scores(w, smaller(case).mean_loss, solve)
    found[labels.LARGER_CLEAN_SET] = lambda: problem.scores(w, both, solve)
    found[labels.NEGATIVE_ONLY] = lambda: problem.scores(w, metric, solve, "exact", "negative")
    effects = problem.pair_effects(w, solve)  # for both clean sets
    found[labels.RELATIVE] = lambda: relative(*effects, metric_gradient(metric, w)).signed
    found[labels.RELATIVE_LARGER_CLEAN_SET] = lambda: (
        relative(*effects, metric_gradient(both, w)).signed
    )
    return found
