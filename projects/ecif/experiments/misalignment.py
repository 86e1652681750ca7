"""The paper's figure 2 and its table of harmful removal: captions of a share of the pairs are
exchanged, and every method ranks the pairs.

Detection: whether exchanged pairs are the most harmful. Removal: the model is trained again without
each method's most harmful tenth. Scores are for the loss of a clean validation set; no method sees
which captions were exchanged.
"""

from collections.abc import Callable

import numpy as np
import torch
from pydantic import Field, PositiveInt

from projects.ecif import Contrastive, Pairs
from projects.ecif.baselines import all_scores
from projects.ecif.data import Name
from projects.ecif.experiments.common import Case, SplitConfig, build
from shared import experiment
from shared.influence.baselines import metric_gradient
from shared.influence.evaluate import auroc, average_precision, cosine, most_harmful, precision_at

LARGER, SMALLER, LARGER_RELATIVE = (
    "ECIF, larger clean set",
    "ECIF, smaller clean set",
    "relative ECIF, larger clean set",
)
DETECTION_ONLY = (
    LARGER,
    LARGER_RELATIVE,
    SMALLER,
    "negative only",
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
            "no removal",
            w,
            case.fitted.gradient_norm,
            clean_gradient_cosine=float(cosine(*gradients)),
        )
        corrupted = case.corrupted.numpy()
        known = case.fitted.without(
            np.flatnonzero(corrupted)[: round(config.removed * problem.pairs.n)].tolist()
        )
        judged("known exchanged", known.w, known.residual)
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
    if method in ("self-influence", "CLIP-score", "pair loss", "random"):
        return 0
    if method == SMALLER:
        return smaller(case).pairs.n
    return case.validation.pairs.n + (
        case.test.pairs.n if method in (LARGER, LARGER_RELATIVE) else 0
    )


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
    """Every method's scores as a call. `LARGER` takes the test pairs, too, for its clean loss: more
    than the others have.
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

    found[SMALLER] = lambda: problem.scores(w, smaller(case).mean_loss, solve)
    found[LARGER] = lambda: problem.scores(w, both, solve)
    found["negative only"] = lambda: problem.scores(w, metric, solve, "exact", "negative")
    found["relative ECIF"] = lambda: problem.relative_scores(w, metric, solve).signed
    found[LARGER_RELATIVE] = lambda: problem.relative_scores(w, both, solve).signed
    return found
