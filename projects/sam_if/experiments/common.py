"""What the experiments share: fields of their configuration, the images, and the estimators under
the names of their rows.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from projects.sam_if import baselines, labels
from projects.sam_if.data import Case, Dataset, Images, Solution, load
from projects.sam_if.estimators import Estimator
from projects.sam_if.fixed_point import Linearised
from projects.sam_if.trajectory import Gif, Recipe
from shared import experiment
from shared.influence.baselines import Metric
from shared.seeding import step_seed


class Config(experiment.Config):
    """A problem: how many images, how they are described, and what is trained on them."""

    n: int = Field(ge=20)
    """Training images."""
    features: PositiveInt
    """Principal components that describe an image."""
    rho: NonNegativeFloat
    """Length of SAM's perturbation."""
    l2: NonNegativeFloat
    """Weight of the regulariser (l2 / 2) |w|^2."""
    device: str = "cpu"
    """Where tensors live: cpu, or cuda."""


class RunConfig(Config):
    """A problem, and a run of SAM with batches on it."""

    epochs: PositiveInt
    """Passes over the training images."""
    batch: PositiveInt
    """Images of a batch."""
    lr: PositiveFloat
    """Learning rate."""
    momentum: float = Field(ge=0, lt=1)
    """Momentum of the steps."""


def images_of(
    config: Config,
    dataset: Dataset,
    seed: int,
    *,
    n: int | None = None,
    validation: int = 0,
    test: int = 500,
) -> Images:
    """The images of a configuration; `n` replaces its number of training images."""
    return load(
        dataset,
        n or config.n,
        features=config.features,
        seed=seed,
        validation=validation,
        test=test,
        device=config.device,
    )


def recipe_of(config: RunConfig, case: Case, seed: int) -> Recipe:
    """The run of SAM with batches from the case's own start, kept; `seed` draws the batches."""
    return Recipe.epochs(
        case.problem,
        case.parameters.flat(),
        epochs=config.epochs,
        batch=config.batch,
        lr=config.lr,
        seed=seed,
        momentum=config.momentum,
        kept=True,
    )


def removed_samples(n: int, count: int, seed: int, *names: object) -> list[int]:
    """`count` of the n samples, drawn at random; `names` tell one draw of a seed from another."""
    draw = np.random.default_rng(step_seed(seed, *(names or ("removed",))))
    return draw.permutation(n)[:count].tolist()


def slopes(solution: Solution, samples: Sequence[int], step: float) -> np.ndarray:
    """How the solution moves as each sample is taken out, to first order: the central difference of
    solutions found anew with the sample's weight `step` down and up, [samples, p].
    """
    found = []
    for sample in samples:
        ends = []
        for sign in (-1, 1):
            weights = torch.ones(solution.case.problem.objective.n, dtype=torch.float64)
            weights[sample] += sign * step
            ends.append(solution.train(weights).w)
        found.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(found).numpy(force=True)


def estimators(at: Linearised, **options: object) -> dict[str, Estimator]:
    """SAM-HIF, SAM-IF and IF by name; `options` are the estimators' own."""
    return {
        name: Estimator(at, kind, **options)  # type: ignore[arg-type]
        for name, kind in labels.ESTIMATORS.items()
    }


def exact_estimators(at: Linearised) -> dict[str, Estimator]:
    """The three, and SAM-HIF with one of its two terms left out; dense solves, so that nothing
    hangs on a tolerance.
    """
    make = partial(Estimator, at, "sam_hif", solver="dense", tol=1e-6)
    return estimators(at, solver="dense", tol=1e-6) | {
        name: make(**{option: True}) for name, option in labels.ABLATIONS.items()
    }


def trajectory_scores(recipe: Recipe, metric: Metric) -> dict[str, Tensor]:
    """Scores by the methods that follow the run: SAM-GIF over all its steps, and TracIn."""
    return {
        labels.SAM_GIF: Gif(recipe).scores(metric),
        labels.TRACIN: baselines.tracin(recipe, metric),
    }
