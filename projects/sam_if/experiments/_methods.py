"""The methods that the tables compare, under the names of their rows."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from projects.sam_if.estimators import Estimator
from projects.sam_if.fixed_point import Linearised
from projects.sam_if.problems import Case
from projects.sam_if.trajectory import Gif, Recipe
from shared.influence import baselines
from shared.influence.ekfac import EKFAC, draw_labels
from shared.seeding import generator

Metric = Callable[[Tensor], Tensor]
ABLATIONS = {
    "HIF, no term in r": {"drop_eq9_term": True},
    "HIF, no term in J": {"drop_matrix_term": True},
}


def fixed_point_estimators(
    at: Linearised, damping: float = 0.0, ablations: bool = True
) -> dict[str, Estimator]:
    """The three estimators, and SAM-HIF with one of its two terms left out; dense solves, so that
    nothing hangs on a tolerance.
    """
    make = partial(Estimator, at, damping=damping, solver="dense", tol=1e-6)
    found = {"SAM-HIF": make("sam_hif"), "SAM-IF": make("sam_if"), "IF": make("if")}
    return {
        **found,
        **(
            {name: make("sam_hif", **options) for name, options in ABLATIONS.items()}
            if ablations
            else {}
        ),
    }


def checkpoints(recipe: Recipe, count: int) -> tuple[list[Tensor], list[float]]:
    """Weights of the run at equal distances, the end among them, each with the sum of the learning
    rates of the steps up to it (with momentum: what they come to).
    """
    total = len(recipe.steps)
    places = [round(total * (one + 1) / count) for one in range(count)]
    saved = {step: w for step, (_, w, _) in enumerate(recipe.states()) if step in places} | {
        total: recipe.train()
    }
    rates, before = [], 0
    for place in places:
        rates.append(sum(step.lr for step in recipe.steps[before:place]) / (1 - recipe.momentum))
        before = place
    return [saved[place] for place in places], rates


def trajectory_scores(recipe: Recipe, metric: Metric, count: int = 5) -> dict[str, Tensor]:
    """SAM-GIF over the run, and TracIn from `count` checkpoints."""
    saved, rates = checkpoints(recipe, count)
    return {
        "SAM-GIF": Gif(recipe).scores(metric),
        "TracIn": baselines.tracin(recipe.problem.objective, saved, rates, metric),
    }


def other_scores(
    case: Case, w: Tensor, metric: Metric, *, seed: int, trak_dimension: int = 512
) -> dict[str, Tensor]:
    """What needs the final weights alone and knows nothing of SAM."""
    objective = case.problem.objective
    draw = generator(seed, "fisher")

    def drawn(at: Tensor, data: tuple[Tensor, ...]) -> Tensor:
        logits = case.parameters.call(at, data[0])
        return torch.nn.functional.cross_entropy(
            logits, draw_labels(logits, draw), reduction="none"
        )

    ekfac = EKFAC.fit(
        case.parameters,
        w,
        drawn,
        objective.data,
        damping=0.0 if objective.l2 else None,
        l2=objective.l2,
    )
    return {
        "EK-FAC": baselines.influence(objective, w, metric, ekfac.solve),
        "TRAK": baselines.trak(
            case.margins,
            objective.data,
            [w],
            metric,
            dimension=trak_dimension,
            seed=seed,
            damping=1e-3,
        ),
        "gradient dot": baselines.gradient_dot(objective, w, metric),
    }
