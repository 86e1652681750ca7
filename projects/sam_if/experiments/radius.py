"""How each estimator's error grows with the radius of the perturbation, with one term of SAM-HIF
left out as well.

Two errors of the parameters' change: against training again without the sample, and against its
derivative, which is the finite difference of the solution found anew with the sample's weight a
little up and down. The first holds what any first-order estimate leaves out; the second does not.
"""

import numpy as np
import torch
from pydantic import Field

from projects.sam_if.experiments._methods import fixed_point_estimators
from projects.sam_if.problems import Case, Dataset, Solution, load
from shared import experiment
from shared.influence import evaluate
from shared.influence.noise import flip_labels
from shared.seeding import step_seed


class Config(experiment.Config):
    dataset: Dataset = "mnist"
    seeds: int = Field(default=5, ge=1)
    radii: list[float] = [0.0, 0.01, 0.05, 0.1, 0.2, 0.5]
    n: int = Field(default=500, ge=20)
    features: int = Field(default=20, ge=1)
    l2: float = Field(default=0.01, gt=0)
    flipped: float = Field(default=0.1, ge=0, lt=1)
    removals: int = Field(default=20, ge=1)
    differences: int = Field(default=3, ge=1)
    step: float = Field(default=1e-3, gt=0)
    tol: float = Field(default=1e-11, gt=0)
    device: str = "cpu"


def run(config: Config, run: experiment.Run) -> None:
    for seed, rho in run.progress(
        [(seed, rho) for seed in range(config.seeds) for rho in config.radii], "radii"
    ):
        one_run(config, run, seed + config.seed, rho)


def one_run(config: Config, run: experiment.Run, seed: int, rho: float) -> None:
    images = load(
        config.dataset,
        config.n,
        features=config.features,
        seed=seed,
        validation=0,
        test=500,
        device=config.device,
    )
    labels = flip_labels(images.y, config.flipped, images.classes, seed)[0]
    solution = Solution.of(Case.of(images, l2=config.l2, rho=rho, labels=labels), config.tol)
    problem = solution.case.problem
    removed = (
        np.random.default_rng(step_seed(seed, "removed"))
        .permutation(config.n)[: config.removals]
        .tolist()
    )
    true = (solution.without([[one] for one in removed]).w - solution.w).numpy(force=True)
    slopes = []
    for one in removed[: config.differences]:
        ends = []
        for sign in (1, -1):
            weights = torch.ones(config.n, dtype=torch.float64)
            weights[one] += sign * config.step
            ends.append(solution.train(weights).w)
        slopes.append((ends[1] - ends[0]) / (2 * config.step))
    slope = torch.stack(slopes).numpy(force=True)
    at = problem.at(solution.w)
    shown = {
        "seed": seed,
        "rho_scale": rho,
        "n": config.n,
        "perturbation_ratio": at.pieces[0].c,
        "turning_ratio": at.turning(),
    }
    shown |= {"residual_norm": float(problem.field(solution.w).norm())}
    scores = {}
    for name, estimator in fixed_point_estimators(at).items():
        effects = estimator.removal_effects(removed).T.numpy(force=True)
        scores[name] = estimator.scores(solution.case.test_loss)
        run.row(
            method=name,
            **shown,
            parameter_error=evaluate.relative_error(effects, true).mean(),
            derivative_error=evaluate.relative_error(effects[: config.differences], slope).max(),
            score_difference=float(
                (scores[name] - scores["SAM-HIF"]).abs().max() / scores["SAM-HIF"].abs().max()
            ),
        )
