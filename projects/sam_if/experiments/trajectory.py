"""Figure 3 for a network that is at no fixed point: a small tanh network after a few epochs of SAM
with batches.

The truth is the same run (same start, same batches) with the sample's weight 0. The ceiling is the
agreement of that truth with the one of a run whose start and batches are drawn anew.
"""

import numpy as np
import torch
from pydantic import Field

from projects.sam_if.estimators import Estimator
from projects.sam_if.experiments._methods import checkpoints, other_scores, trajectory_scores
from projects.sam_if.problems import Case, Dataset, load
from projects.sam_if.trajectory import Gif, Recipe, gif_checkpoints, unrolled_effects
from shared import experiment
from shared.influence import evaluate, retrain
from shared.influence.noise import flip_labels
from shared.influence.retrain import Root, without
from shared.seeding import step_seed


class Config(experiment.Config):
    """The damping is relative to the largest curvature of the Gauss-Newton matrix at the perturbed
    weights.
    """

    datasets: list[Dataset] = ["mnist", "fashion-mnist"]
    seeds: int = Field(default=3, ge=1)
    n: int = Field(default=400, ge=20)
    features: int = Field(default=32, ge=1)
    hidden: int = Field(default=16, ge=1)
    rho: float = Field(default=0.1, ge=0)
    l2: float = Field(default=1e-3, ge=0)
    flipped: float = Field(default=0.1, ge=0, lt=1)
    damping_share: float = Field(default=0.01, gt=0)
    removals: int = Field(default=30, ge=4)
    subsets: int = Field(default=20, ge=4)
    queries: int = Field(default=10, ge=1)
    epochs: int = Field(default=5, ge=1)
    batch: int = Field(default=50, ge=1)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
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
    case, recipe = start(config, images, labels, seed, again=0)
    metric, w = case.metrics(config.queries), recipe.train()
    removed = (
        np.random.default_rng(step_seed(seed, "removed"))
        .permutation(config.n)[: config.removals]
        .tolist()
    )
    true_w = torch.stack([recipe.train(without(config.n, [one])) for one in removed])
    true_loss = (torch.stack([metric(one) for one in true_w]) - metric(w))[:, 0].numpy(force=True)
    true_w = (true_w - w).numpy(force=True)
    other_case, other = start(config, images, labels, seed, again=1)
    w_other, other_metric = other.train(), other_case.metrics(1)
    other_loss = [
        float(other_metric(other.train(without(config.n, [one])))[0] - other_metric(w_other)[0])
        for one in removed
    ]

    def train(weights: torch.Tensor) -> Root:
        return Root(recipe.train(weights), 0.0, len(recipe.steps))

    kept = retrain.subsets(config.n, 0.5, config.subsets, seed)
    halves = retrain.retrain(train, config.n, [(~one).nonzero().flatten().tolist() for one in kept])
    outcomes = torch.stack([metric(one) for one in halves.w])[:, 1:].numpy(force=True)

    at = case.problem.at(w, "ggn")
    damping = (
        config.damping_share * at.turning() / at.pieces[0].c
        if at.pieces[0].c
        else config.damping_share
    )
    scores, effects = {}, {}
    for name, kind in (("SAM-HIF", "sam_hif"), ("SAM-IF", "sam_if"), ("IF", "if")):
        estimator = Estimator(at, kind, damping=damping, solver="dense", tol=1e-6)
        scores[name] = estimator.scores(metric)
        effects[name] = estimator.removal_effects(removed).T.numpy(force=True)
    exact = unrolled_effects(recipe, range(config.n), chunk=200)
    scores["SAM-GIF, unrolled"] = (torch.func.jacrev(metric)(w) @ exact).T
    effects["SAM-GIF, unrolled"] = exact[:, removed].T.numpy(force=True)
    effects["SAM-GIF"] = Gif(recipe).removal_effects(removed).T.numpy(force=True)
    saved, rates = checkpoints(recipe, 5)
    scores["SAM-GIF, checkpoints"] = gif_checkpoints(case.problem, saved, rates, metric)
    scores |= trajectory_scores(recipe, metric) | other_scores(case, w, metric, seed=seed)
    shown = {
        "dataset": dataset,
        "seed": seed,
        "n": config.n,
        "rho_scale": config.rho,
        "l2_scale": config.l2,
        "damping_scale": damping,
    }
    shown |= {
        "residual_norm": float(case.problem.field(w).norm()),
        "test_accuracy": case.accuracy(w),
    }
    run.row(
        method="the run with another seed", **shown, **correlations(np.array(other_loss), true_loss)
    )
    for name, found in scores.items():
        values = found.numpy(force=True)
        row = correlations(values[removed, 0], true_loss) | {
            "lds_correlation": evaluate.lds(values[:, 1:], kept, outcomes)
        }
        if name in effects:
            row["parameter_error"] = evaluate.relative_error(effects[name], true_w).mean()
            row["parameter_cosine"] = evaluate.cosine(effects[name], true_w).mean()
        run.row(method=name, **shown, **row)


def start(
    config: Config, images: object, labels: torch.Tensor, seed: int, again: int
) -> tuple[Case, Recipe]:
    """The network and the run; `again` draws another start and other batches for the same data."""
    own = step_seed(seed, "run", again) % 2**31
    case = Case.of(
        images, l2=config.l2, rho=config.rho, hidden=config.hidden, seed=own, labels=labels
    )  # type: ignore[arg-type]
    options = {
        "epochs": config.epochs,
        "batch": config.batch,
        "lr": config.lr,
        "momentum": config.momentum,
    }
    return case, Recipe.epochs(case.problem, case.parameters.flat(), seed=own, **options)


def correlations(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    return {
        "pearson_correlation": evaluate.pearson(predicted, true),
        "spearman_correlation": evaluate.spearman(predicted, true),
    }
