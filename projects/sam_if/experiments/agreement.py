"""Figure 3: how well each method foretells training again, on softmax regression at SAM's fixed
point.

The truth is the fixed point found anew with the sample's weight set to 0, to |F| below a tolerance.
It does not depend on a seed of the optimizer, so the ceiling of a correlation is 1. The paper's
figure compares with attribution methods, TRAK among them; its numbers could not be had.
`curvature_change_share` is |(Ht - H) d| / |H d| for the true changes d, the mean: what SAM-IF has
before IF is that it takes Ht, and what it lacks is the turning of the perturbation, so where the
curvature is nearly that of w it has nothing before IF.
"""

import numpy as np
import torch
from pydantic import Field

from projects.sam_if.experiments._methods import (
    fixed_point_estimators,
    other_scores,
    trajectory_scores,
)
from projects.sam_if.problems import Case, Dataset, Solution, load
from projects.sam_if.trajectory import Recipe
from shared import experiment
from shared.influence import evaluate, retrain
from shared.influence.noise import flip_labels
from shared.seeding import step_seed


class Config(experiment.Config):
    """`removals` samples are left out one at a time; `subsets` of half the data are trained on for
    the LDS, over `queries` test images.
    """

    datasets: list[Dataset] = ["mnist", "fashion-mnist", "cifar10", "digits"]
    seeds: int = Field(default=5, ge=1)
    n: int = Field(default=1000, ge=20)
    features: int = Field(default=32, ge=1)
    rho: float = Field(default=0.1, ge=0)
    l2: float = Field(default=0.01, gt=0)
    flipped: float = Field(default=0.1, ge=0, lt=1)
    removals: int = Field(default=30, ge=4)
    subsets: int = Field(default=30, ge=4)
    queries: int = Field(default=10, ge=1)
    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=100, ge=1)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    tol: float = Field(default=1e-9, gt=0)
    device: str = "cpu"


def run(config: Config, run: experiment.Run) -> None:
    for dataset, seed in run.progress(
        [(one, seed) for one in config.datasets for seed in range(config.seeds)], "runs"
    ):
        one_run(config, run, dataset, seed + config.seed)


def one_run(config: Config, run: experiment.Run, dataset: Dataset, seed: int) -> None:
    images = load(
        dataset,
        config.n,
        features=config.features,
        seed=seed,
        validation=0,
        test=500,
        device=config.device,
    )
    labels = flip_labels(images.y, config.flipped, images.classes, seed)[0]
    case = Case.of(images, l2=config.l2, rho=config.rho, labels=labels)
    solution = Solution.of(case, config.tol)
    metric = case.metrics(config.queries)
    before = metric(solution.w)
    removed = (
        np.random.default_rng(step_seed(seed, "removed"))
        .permutation(config.n)[: config.removals]
        .tolist()
    )
    again = solution.without([[one] for one in removed])
    moved = (again.w - solution.w).T
    true_w = moved.T.numpy(force=True)
    true_loss = torch.stack([metric(w) for w in again.w]).sub(before)[:, 0].numpy(force=True)
    kept = retrain.subsets(config.n, 0.5, config.subsets, seed)
    halves = solution.without([(~one).nonzero().flatten().tolist() for one in kept])
    outcomes = torch.stack([metric(w) for w in halves.w])[:, 1:].numpy(force=True)

    at = case.problem.at(solution.w)
    scores, effects = {}, {}
    for name, estimator in fixed_point_estimators(at).items():
        scores[name] = estimator.scores(metric)
        effects[name] = estimator.removal_effects(removed).T.numpy(force=True)
    recipe = Recipe.epochs(
        case.problem,
        case.parameters.flat(),
        epochs=config.epochs,
        batch=config.batch,
        lr=config.lr,
        seed=seed,
        momentum=config.momentum,
    )
    scores |= trajectory_scores(recipe, metric) | other_scores(case, solution.w, metric, seed=seed)
    shown = {
        "dataset": dataset,
        "seed": seed,
        "n": config.n,
        "rho_scale": config.rho,
        "l2_scale": config.l2,
    }
    shown |= {
        "perturbation_ratio": at.pieces[0].c,
        "turning_ratio": at.turning(),
        "residual_norm": float(again.residuals.max()),
    }
    here, there = at.pieces[0].here(moved), at.pieces[0].there(moved)
    shown["curvature_change_share"] = float(((there - here).norm(dim=0) / here.norm(dim=0)).mean())
    for name, found in scores.items():
        values = found.numpy(force=True)
        predicted = values[removed, 0]
        row = {
            "pearson_correlation": evaluate.pearson(predicted, true_loss),
            "spearman_correlation": evaluate.spearman(predicted, true_loss),
        }
        row["lds_correlation"] = evaluate.lds(values[:, 1:], kept, outcomes)
        if name in effects:
            errors = evaluate.relative_error(effects[name], true_w)
            row |= {
                "parameter_error": errors.mean(),
                "parameter_cosine": evaluate.cosine(effects[name], true_w).mean(),
            }
            row["nearer_than_hif_share"] = float(
                (errors < evaluate.relative_error(effects["SAM-HIF"], true_w)).mean()
            )
        run.row(method=name, **shown, **row)
