"""Figure 3: how well each method predicts retraining, on softmax regression at SAM's fixed point.

The truth is the fixed point found anew with the sample's weight set to 0, to |F| below a tolerance.
The derivative, for some of the samples, is that with the weight a little up and down.
It does not depend on a seed of the optimizer, so the ceiling of a correlation is 1. The paper's
figure compares with attribution methods, TRAK among them; we had no access to its numbers.
`curvature_change_share` is |(Ht - H) d| / |H d| for the true changes d, the mean: what SAM-IF has
before IF is that it takes Ht, and what it lacks is the turning of the perturbation, so where the
curvature is nearly that of w it has nothing before IF.
"""

from dataclasses import replace

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from projects.sam_if import baselines, labels
from projects.sam_if.data import Case, Dataset, Solution
from projects.sam_if.experiments.common import (
    RunConfig,
    exact_estimators,
    images_of,
    recipe_of,
    removed_samples,
    slopes,
    trajectory_scores,
)
from shared import experiment
from shared.influence import evaluate, retrain
from shared.influence.noise import flip_labels


class Config(RunConfig):
    """Softmax regression, left-out samples, and halves of the data for the LDS."""

    datasets: list[Dataset]
    """Image sets; all seeds of each."""
    seeds: PositiveInt
    """Runs of a set: each draws images, wrong labels and removals."""
    l2: PositiveFloat
    """Weight of the regulariser, without which there is no fixed point."""
    flipped: float = Field(ge=0, lt=1)
    """Share of the labels that are wrong."""
    removals: int = Field(ge=4)
    """Samples left out one at a time."""
    subsets: int = Field(ge=4)
    """Random halves of the data that are trained on, for the LDS."""
    queries: PositiveInt
    """Test images whose single losses the LDS is over."""
    differences: PositiveInt
    """Of the samples left out, how many get a finite difference."""
    step: PositiveFloat
    """Change of a sample's weight, up and down, of the finite difference."""
    slope_tol: PositiveFloat
    """What |F| must fall to in the training of all, and for a finite difference."""
    tol: PositiveFloat
    """The same when a sample is left out."""
    half_tol: PositiveFloat
    """The same when half the data are left out."""


def run(config: Config, run: experiment.Run) -> None:
    for dataset, seed in run.progress(
        [(dataset, seed) for dataset in config.datasets for seed in range(config.seeds)], "runs"
    ):
        one_run(config, run, dataset, seed + config.seed)


def one_run(config: Config, run: experiment.Run, dataset: Dataset, seed: int) -> None:
    images = images_of(config, dataset, seed)
    wrong_labels = flip_labels(images.y, config.flipped, images.classes, seed)[0]
    case = Case.of(images, l2=config.l2, rho=config.rho, labels=wrong_labels)
    solution = Solution.of(case, config.slope_tol)
    metric = case.metrics(config.queries)
    before = metric(solution.w)
    removed = removed_samples(config.n, config.removals, seed)
    retrained = replace(solution, tol=config.tol).without([[sample] for sample in removed])
    moved = (retrained.w - solution.w).T
    true_w = moved.T.numpy(force=True)
    true_loss = torch.stack([metric(w) for w in retrained.w]).sub(before)[:, 0].numpy(force=True)
    kept = retrain.subsets(config.n, 0.5, config.subsets, seed)
    halves = replace(solution, tol=config.half_tol).without(
        [(~half).nonzero().flatten().tolist() for half in kept]
    )
    outcomes = torch.stack([metric(w) for w in halves.w])[:, 1:].numpy(force=True)

    at = case.problem.at(solution.w, formed=True)
    scores, effects = {}, {}
    for name, estimator in exact_estimators(at).items():
        scores[name] = estimator.scores(metric)
        effects[name] = estimator.removal_effects(removed).T.numpy(force=True)
    slope = slopes(solution, removed[: config.differences], config.step)
    scores |= trajectory_scores(recipe_of(config, case, seed), metric)
    scores |= baselines.from_final_weights(case, solution.w, metric, seed=seed)
    here, there = at.pieces[0].here(moved), at.pieces[0].there(moved)
    common = {
        "dataset": dataset,
        "seed": seed,
        "n": config.n,
        "rho_scale": config.rho,
        "l2_scale": config.l2,
        "perturbation_ratio": at.pieces[0].c,
        "turning_ratio": at.turning(),
        "residual_norm": float(retrained.residuals.max()),
        "curvature_change_share": float(((there - here).norm(dim=0) / here.norm(dim=0)).mean()),
    }
    null = np.zeros_like(true_w)
    run.row(
        method=labels.NO_EDIT,
        **common,
        parameter_error=evaluate.relative_error(null, true_w).mean(),
        derivative_error=evaluate.relative_error(null[: config.differences], slope).max(),
    )
    for name, own_scores in scores.items():
        values = own_scores.numpy(force=True)
        predicted = values[removed, 0]
        row = {
            "pearson_correlation": evaluate.pearson(predicted, true_loss),
            "spearman_correlation": evaluate.spearman(predicted, true_loss),
            "lds_correlation": evaluate.lds(values[:, 1:], kept, outcomes),
        }
        if name in effects:
            errors = evaluate.relative_error(effects[name], true_w)
            row |= {
                "parameter_error": errors.mean(),
                "derivative_error": evaluate.relative_error(
                    effects[name][: config.differences], slope
                ).max(),
                "parameter_cosine": evaluate.cosine(effects[name], true_w).mean(),
            }
            row["nearer_than_hif_share"] = float(
                (errors < evaluate.relative_error(effects[labels.SAM_HIF], true_w)).mean()
            )
        run.row(method=name, **common, **row)
