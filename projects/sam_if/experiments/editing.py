"""Table 1 and figure 1: taking samples out of a trained model by one solve, against retraining.

Random samples are removed. The paper compares with retraining alone; the other methods stand beside
it here. Softmax regression is at SAM's fixed point; the network is what a run of SAM with batches
ends in, and retraining is the same run without the samples. "No edit" is the model as it is, to
which any edit must be preferred. TRAK changes no weights: it predicts the loss alone. Times are in
the rows of `speed`.
"""

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from projects.sam_if import baselines, labels
from projects.sam_if.data import Case, Dataset, Images, Solution
from projects.sam_if.experiments.common import (
    RunConfig,
    estimators,
    images_of,
    recipe_of,
    removed_samples,
)
from projects.sam_if.trajectory import Gif, Recipe
from shared import experiment
from shared.influence import evaluate
from shared.influence.baselines import metric_gradient
from shared.influence.retrain import without


class Config(RunConfig):
    """Models on image sets, and the shares of their samples that are taken out."""

    datasets: list[Dataset]
    """Image sets; a model of each kind on each."""
    seeds: PositiveInt
    """Runs of a set: each draws images, the network's start, batches and removals."""
    hidden: list[PositiveInt | None]
    """Kinds of models: null is softmax regression, a number a tanh network of so many units."""
    shares: list[float] = Field(min_length=1)
    """Shares of the training images that are taken out, at random."""
    test: PositiveInt
    """Test images."""
    digits_n: int = Field(ge=20)
    """Training images of the UCI digits, which are few."""
    l2: PositiveFloat
    """Weight of softmax regression's regulariser."""
    network_l2: NonNegativeFloat
    """Weight of the networks' regulariser."""
    damping_share: PositiveFloat
    """Damping of the networks' curvature, as a share of its largest eigenvalue."""
    tol: PositiveFloat
    """What |F| must fall to in every training of softmax regression."""


def run(config: Config, run: experiment.Run) -> None:
    seeds = range(config.seed, config.seed + config.seeds)
    for dataset, seed in run.progress(
        [(dataset, seed) for dataset in config.datasets for seed in seeds], "runs"
    ):
        n = config.digits_n if dataset == "digits" else config.n
        images = images_of(config, dataset, seed, n=n, test=config.test)
        for hidden in config.hidden:
            one_model(config, run, dataset, images, hidden, seed)


def one_model(
    config: Config,
    run: experiment.Run,
    dataset: Dataset,
    images: Images,
    hidden: int | None,
    seed: int,
) -> None:
    case = Case.of(
        images,
        l2=config.l2 if hidden is None else config.network_l2,
        rho=config.rho,
        hidden=hidden,
        seed=seed,
    )
    n = case.problem.objective.n
    removals = [
        removed_samples(n, round(share * n), seed, "edit", round(1000 * share))
        for share in config.shares
    ]
    recipe = recipe_of(config, case, seed)
    damping = 0.0
    if hidden is None:
        solution = Solution.of(case, config.tol)
        w, at = solution.w, case.problem.at(solution.w)
        retrained = solution.without(removals).w
    else:
        w = recipe.train()
        at = case.problem.at(w, "ggn")
        damping = config.damping_share * at.turning() / max(at.pieces[0].c, 1e-12)
        retrained = recipe.retrain(torch.stack([without(n, removed) for removed in removals]))

    effects = {
        name: one.joint_effects(removals)
        for name, one in estimators(at, damping=damping, tol=1e-6).items()
    }
    effects[labels.SAM_GIF] = Gif(recipe).joint_effects(removals)
    effects[labels.TRACIN] = along_checkpoints(recipe, removals)
    effects[labels.NO_EDIT] = w.new_zeros(w.numel(), len(removals))
    trak = baselines.trak(case, w, case.test_loss, seed=seed)
    slope = metric_gradient(case.test_loss, w)
    loss = float(case.test_loss(w))
    common = {
        "dataset": dataset,
        "seed": seed,
        "model": "softmax regression" if hidden is None else f"network, {hidden} units",
        "n": n,
        "damping_scale": damping,
    }
    run.row(
        **common,
        removed_share=0.0,
        method=labels.BEFORE,
        test_accuracy=case.accuracy(w),
        test_loss=loss,
    )
    for column, (share, removed, true) in enumerate(
        zip(config.shares, removals, retrained, strict=True)
    ):
        true_classes, true_loss = case.predictions(true), float(case.test_loss(true))
        shown = {**common, "removed_share": share, "true_loss_difference": true_loss - loss}
        run.row(
            **shown,
            method=labels.RETRAIN,
            test_accuracy=case.accuracy(true),
            test_loss=true_loss,
            parameter_norm=float((true - w).norm()),
        )
        for name, of_sets in effects.items():
            effect = of_sets[:, column]
            edited = w + effect
            run.row(
                **shown,
                method=name,
                test_accuracy=case.accuracy(edited),
                test_loss=float(case.test_loss(edited)),
                parameter_error=float(
                    evaluate.relative_error(effect.numpy(force=True), (true - w).numpy(force=True))
                ),
                same_class_share=float((case.predictions(edited) == true_classes).double().mean()),
                predicted_loss_difference=float(slope @ effect),
            )
        run.row(**shown, method=labels.TRAK, predicted_loss_difference=float(trak[removed].sum()))


def along_checkpoints(recipe: Recipe, removals: list[list[int]]) -> Tensor:
    """TracIn's change of the weights: the gradients of each set at the checkpoints, [p, sets]."""
    n = recipe.problem.objective.n
    saved, rates = baselines.checkpoints(recipe, 5)
    changes = []
    for removed in removals:
        gone = torch.ones_like(recipe.weights) - without(n, removed).to(recipe.w0)
        objective = recipe.problem.weighted(gone).parts[0][2]
        changes.append(
            sum(
                (rate * objective.gradient(w) for w, rate in zip(saved, rates, strict=True)),
                start=torch.zeros_like(recipe.w0),
            )
        )
    return torch.stack(changes, 1)
