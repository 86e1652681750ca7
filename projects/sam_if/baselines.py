"""The baselines of SAM-IF on its small problems: TracIn from a run's checkpoints, EK-FAC, TRAK, the
gradient dot product.
"""

import torch
from torch import Tensor

from projects.sam_if import labels
from projects.sam_if.problems import Case
from projects.sam_if.trajectory import Recipe
from shared.influence import baselines
from shared.influence.baselines import Metric
from shared.influence.ekfac import EKFAC, draw_labels
from shared.seeding import generator

TRAK_DIMENSION = 512
TRAK_DAMPING = 1e-3


def checkpoints(recipe: Recipe, count: int) -> tuple[list[Tensor], list[float]]:
    """Weights of the run at equal distances, the end among them, each with the sum of the learning
    rates of the steps up to it (with momentum: what they come to).
    """
    total = len(recipe.steps)
    places = [round(total * (number + 1) / count) for number in range(count)]
    saved = {step: w for step, (_, w, _) in enumerate(recipe.states()) if step in places} | {
        total: recipe.train()
    }
    rates, before = [], 0
    for place in places:
        rates.append(sum(step.lr for step in recipe.steps[before:place]) / (1 - recipe.momentum))
        before = place
    return [saved[place] for place in places], rates


def tracin(recipe: Recipe, metric: Metric, count: int = 5) -> Tensor:
    """TracIn's scores from `count` checkpoints of the run."""
    saved, rates = checkpoints(recipe, count)
    return baselines.tracin(recipe.problem.objective, saved, rates, metric)


def trak(
    case: Case, w: Tensor, metric: Metric, *, seed: int, dimension: int = TRAK_DIMENSION
) -> Tensor:
    """TRAK's scores from one model."""
    return baselines.trak(
        case.margins,
        case.problem.objective.data,
        [w],
        metric,
        dimension=dimension,
        seed=seed,
        damping=TRAK_DAMPING,
    )


def ekfac(case: Case, w: Tensor, metric: Metric, *, seed: int) -> Tensor:
    """Influence with EK-FAC's curvature, its labels drawn from the model."""
    objective = case.problem.objective
    draw = generator(seed, "fisher")

    def drawn(at: Tensor, data: tuple[Tensor, ...]) -> Tensor:
        logits = case.parameters.call(at, data[0])
        return torch.nn.functional.cross_entropy(
            logits, draw_labels(logits, draw), reduction="none"
        )

    fitted = EKFAC.fit(
        case.parameters,
        w,
        drawn,
        objective.data,
        damping=0.0 if objective.l2 else None,
        l2=objective.l2,
    )
    return baselines.influence(objective, w, metric, fitted.solve)


def from_final_weights(case: Case, w: Tensor, metric: Metric, *, seed: int) -> dict[str, Tensor]:
    """Scores by the methods that need the final weights alone and know nothing of SAM."""
    return {
        labels.EKFAC: ekfac(case, w, metric, seed=seed),
        labels.TRAK: trak(case, w, metric, seed=seed),
        labels.GRADIENT_DOT: baselines.gradient_dot(case.problem.objective, w, metric),
    }
