"""Figure 3 for a network that is at no fixed point: a small tanh network after a few epochs of SAM
with batches.

The truth is the same run (same start, same batches) with the sample's weight 0. The ceiling is the
agreement of that truth with the one of a run whose start and batches are drawn anew.
"""

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from projects.sam_if import baselines, labels
from projects.sam_if.data import Case, Dataset, Images
from projects.sam_if.experiments.common import (
    RunConfig,
    estimators,
    images_of,
    recipe_of,
    removed_samples,
    trajectory_scores,
)
from projects.sam_if.trajectory import Gif, Recipe, gif_checkpoints, unrolled_effects
from shared import experiment
from shared.influence import evaluate, retrain
from shared.influence.noise import flip_labels
from shared.influence.retrain import without
from shared.seeding import step_seed


class Config(RunConfig):
    """A small network, left-out samples, and halves of the data for the LDS."""

    datasets: list[Dataset]
    """Image sets; all seeds of each."""
    seeds: PositiveInt
    """Runs of a set: each draws images, wrong labels, the start and removals."""
    hidden: PositiveInt
    """Units of the hidden layer."""
    flipped: float = Field(ge=0, lt=1)
    """Share of the labels that are wrong."""
    damping_share: PositiveFloat
    """Damping, as a share of the largest curvature of the Gauss-Newton matrix at the perturbed
    weights."""
    removals: int = Field(ge=4)
    """Samples left out one at a time."""
    subsets: int = Field(ge=4)
    """Random halves of the data that are trained on, for the LDS."""
    queries: PositiveInt
    """Test images whose single losses the LDS is over."""


def run(config: Config, run: experiment.Run) -> None:
    for dataset, seed in run.progress(
        [(dataset, seed) for dataset in config.datasets for seed in range(config.seeds)], "runs"
    ):
        one_run(config, run, dataset, seed + config.seed)


def one_run(config: Config, run: experiment.Run, dataset: Dataset, seed: int) -> None:
    images = images_of(config, dataset, seed)
    wrong_labels = flip_labels(images.y, config.flipped, images.classes, seed)[0]
    case, recipe = start(config, images, wrong_labels, seed, draw=0)
    metric, w = case.metrics(config.queries), recipe.train()
    removed = removed_samples(config.n, config.removals, seed)
    one_less = torch.stack([without(config.n, [sample]) for sample in removed])
    true_w = recipe.retrain(one_less)
    true_loss = (torch.stack([metric(end) for end in true_w]) - metric(w))[:, 0].numpy(force=True)
    true_w = (true_w - w).numpy(force=True)
    other_case, other = start(config, images, wrong_labels, seed, draw=1)
    other_metric = other_case.metrics(1)
    before = other_metric(other.train())[0]
    other_loss = [float(other_metric(end)[0] - before) for end in other.retrain(one_less)]
    kept = retrain.subsets(config.n, 0.5, config.subsets, seed)
    outcomes = torch.stack([metric(end)[1:] for end in recipe.retrain(kept)]).numpy(force=True)

    at = case.problem.at(w, "ggn", formed=True)
    damping = (
        config.damping_share * at.turning() / at.pieces[0].c
        if at.pieces[0].c
        else config.damping_share
    )
    scores, effects = {}, {}
    for name, estimator in estimators(at, damping=damping, solver="dense", tol=1e-6).items():
        scores[name] = estimator.scores(metric)
        effects[name] = estimator.removal_effects(removed).T.numpy(force=True)
    exact = unrolled_effects(recipe, range(config.n), chunk=200)
    scores[labels.SAM_GIF_UNROLLED] = (torch.func.jacrev(metric)(w) @ exact).T
    effects[labels.SAM_GIF_UNROLLED] = exact[:, removed].T.numpy(force=True)
    effects[labels.SAM_GIF] = Gif(recipe).removal_effects(removed).T.numpy(force=True)
    saved, rates = baselines.checkpoints(recipe, 5)
    scores[labels.SAM_GIF_CHECKPOINTS] = gif_checkpoints(case.problem, saved, rates, metric)
    scores |= trajectory_scores(recipe, metric)
    scores |= baselines.from_final_weights(case, w, metric, seed=seed)
    shown = {
        "dataset": dataset,
        "seed": seed,
        "n": config.n,
        "rho_scale": config.rho,
        "l2_scale": config.l2,
        "damping_scale": damping,
        "residual_norm": float(case.problem.field(w).norm()),
        "test_accuracy": case.accuracy(w),
    }
    run.row(method=labels.OTHER_SEED, **shown, **correlations(np.array(other_loss), true_loss))
    run.row(
        method=labels.NO_EDIT,
        **shown,
        parameter_error=evaluate.relative_error(np.zeros_like(true_w), true_w).mean(),
    )
    for name, own_scores in scores.items():
        values = own_scores.numpy(force=True)
        row = correlations(values[removed, 0], true_loss) | {
            "lds_correlation": evaluate.lds(values[:, 1:], kept, outcomes)
        }
        if name in effects:
            row["parameter_error"] = evaluate.relative_error(effects[name], true_w).mean()
            row["parameter_cosine"] = evaluate.cosine(effects[name], true_w).mean()
        run.row(method=name, **shown, **row)


def start(
    config: Config, images: Images, wrong_labels: torch.Tensor, seed: int, draw: int
) -> tuple[Case, Recipe]:
    """The network and the run; another `draw` is another start and other batches for the same
    data.
    """
    own = step_seed(seed, "run", draw) % 2**31
    case = Case.of(
        images, l2=config.l2, rho=config.rho, hidden=config.hidden, seed=own, labels=wrong_labels
    )
    return case, recipe_of(config, case, own)


def correlations(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    return {
        "pearson_correlation": evaluate.pearson(predicted, true),
        "spearman_correlation": evaluate.spearman(predicted, true),
    }
