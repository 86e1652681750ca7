"""Table 1 and figure 1: taking samples out of a trained model by one solve, against retraining.

Random samples are removed. The paper compares with retraining alone; the other methods stand beside
it here. Softmax regression is at SAM's fixed point; the network is what a run of SAM with batches
ends in, and retraining is the same run without the samples. TRAK changes no weights: it predicts
the loss alone. Times are in the rows of `speed`.
"""

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from projects.sam_if import baselines, labels
from projects.sam_if.experiments.common import (
    RunConfig,
    estimators,
    images_of,
    recipe_of,
    removed_samples,
)
from projects.sam_if.problems import Case, Dataset, Images, Solution
from projects.sam_if.trajectory import Gif
from shared import experiment
from shared.influence import evaluate
from shared.influence.baselines import metric_gradient
from shared.influence.retrain import without


class Config(RunConfig):
    """Models on image sets, and the shares of their samples that are taken out."""

    datasets: list[Dataset]
    """Image sets; a model of each kind on each."""
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
    for dataset, hidden in run.progress(
        [(dataset, hidden) for dataset in config.datasets for hidden in config.hidden], "models"
    ):
        n = config.digits_n if dataset == "digits" else config.n
        images = images_of(config, dataset, config.seed, n=n, test=config.test)
        one_model(config, run, dataset, images, hidden)


def one_model(
    config: Config, run: experiment.Run, dataset: Dataset, images: Images, hidden: int | None
) -> None:
    case = Case.of(
        images,
        l2=config.l2 if hidden is None else config.network_l2,
        rho=config.rho,
        hidden=hidden,
        seed=config.seed,
    )
    n = case.problem.objective.n
    recipe = recipe_of(config, case, config.seed)
    damping = 0.0
    if hidden is None:
        solution = Solution.of(case, config.tol)
        w, at = solution.w, case.problem.at(solution.w)

        def retrain(removed: list[int]) -> Tensor:
            return solution.without([removed]).w[0]
    else:
        w = recipe.train()
        at = case.problem.at(w, "ggn")
        damping = config.damping_share * at.turning() / max(at.pieces[0].c, 1e-12)

        def retrain(removed: list[int]) -> Tensor:
            return recipe.train(without(n, removed))

    by_solve = estimators(at, damping=damping, tol=1e-6)
    trak = baselines.trak(case, w, case.test_loss, seed=config.seed)
    saved, rates = baselines.checkpoints(recipe, 5)
    slope = metric_gradient(case.test_loss, w)
    loss = float(case.test_loss(w))
    common = {
        "dataset": dataset,
        "model": "softmax regression" if hidden is None else f"network, {hidden} units",
        "n": n,
    }
    run.row(
        **common,
        removed_share=0.0,
        method=labels.BEFORE,
        test_accuracy=case.accuracy(w),
        test_loss=loss,
    )
    for share in config.shares:
        removed = removed_samples(n, round(share * n), config.seed, "edit", round(1000 * share))
        true = retrain(removed)
        true_classes, true_loss = case.predictions(true), float(case.test_loss(true))
        common |= {
            "removed_share": share,
            "damping_scale": damping,
            "true_loss_difference": true_loss - loss,
        }
        run.row(
            **common,
            method=labels.RETRAIN,
            test_accuracy=case.accuracy(true),
            test_loss=true_loss,
            parameter_norm=float((true - w).norm()),
        )
        effects = {name: one.removal_effect(removed) for name, one in by_solve.items()}
        effects[labels.SAM_GIF] = Gif(recipe).removal_effect(removed)
        gone = torch.ones(n, dtype=w.dtype, device=w.device) - without(n, removed).to(w)
        effects[labels.TRACIN] = sum(
            (
                rate * case.problem.weighted(gone).parts[0][2].gradient(point)
                for point, rate in zip(saved, rates, strict=True)
            ),
            start=torch.zeros_like(w),
        )
        for name, effect in effects.items():
            edited = w + effect
            run.row(
                **common,
                method=name,
                test_accuracy=case.accuracy(edited),
                test_loss=float(case.test_loss(edited)),
                parameter_error=float(
                    evaluate.relative_error(effect.numpy(force=True), (true - w).numpy(force=True))
                ),
                same_class_share=float((case.predictions(edited) == true_classes).double().mean()),
                predicted_loss_difference=float(slope @ effect),
            )
        run.row(**common, method=labels.TRAK, predicted_loss_difference=float(trak[removed].sum()))
