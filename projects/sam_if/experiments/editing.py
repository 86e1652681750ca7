"""Table 1 and figure 1: taking samples out of a trained model by one solve, against training it
again.

Random samples are removed. The paper compares with training again alone; the other methods stand
beside it here. Softmax regression is at SAM's fixed point; the network is what a run of SAM with
batches ends in, and training again is the same run without the samples. TRAK changes no weights: it
foretells the loss alone. Times are in the rows of `speed`.
"""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from projects.sam_if.estimators import Estimator
from projects.sam_if.experiments._methods import checkpoints, other_scores
from projects.sam_if.problems import Case, Dataset, Images, Solution, load
from projects.sam_if.trajectory import Gif, Recipe
from shared import experiment
from shared.influence import baselines, evaluate
from shared.influence.retrain import without
from shared.seeding import step_seed


class Config(experiment.Config):
    """`hidden` None: softmax regression, once per data set; a number: a tanh network of so many
    units.
    """

    datasets: list[Dataset] = ["mnist", "fashion-mnist", "cifar10", "digits"]
    hidden: list[int | None] = [None, 32]
    shares: list[float] = [0.01, 0.05, 0.1]
    n: int = Field(default=2000, ge=20)
    digits_n: int = Field(default=1200, ge=20)
    features: int = Field(default=64, ge=1)
    rho: float = Field(default=0.1, ge=0)
    l2: float = Field(default=0.01, gt=0)
    network_l2: float = Field(default=1e-3, ge=0)
    damping_share: float = Field(default=0.01, gt=0)
    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=100, ge=1)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    tol: float = Field(default=1e-8, gt=0)
    device: str = "cpu"


def run(config: Config, run: experiment.Run) -> None:
    for dataset, hidden in run.progress(
        [(one, hidden) for one in config.datasets for hidden in config.hidden], "models"
    ):
        n = config.digits_n if dataset == "digits" else config.n
        images = load(
            dataset,
            n,
            features=config.features,
            seed=config.seed,
            validation=0,
            device=config.device,
        )
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
    options = {
        "epochs": config.epochs,
        "batch": config.batch,
        "lr": config.lr,
        "momentum": config.momentum,
        "seed": config.seed,
    }
    recipe = Recipe.epochs(case.problem, case.parameters.flat(), **options)
    damping = 0.0
    if hidden is None:
        solution = Solution.of(case, config.tol)
        w, at = solution.w, case.problem.at(solution.w)

        def again(removed: list[int]) -> Tensor:
            return solution.without([removed]).w[0]
    else:
        w = recipe.train()
        at = case.problem.at(w, "ggn")
        damping = config.damping_share * at.turning() / max(at.pieces[0].c, 1e-12)

        def again(removed: list[int]) -> Tensor:
            return recipe.train(without(n, removed))

    estimators = {
        name: Estimator(at, kind, damping=damping, tol=1e-6)
        for name, kind in (("SAM-HIF", "sam_hif"), ("SAM-IF", "sam_if"), ("IF", "if"))
    }
    foretold = other_scores(case, w, case.test_loss, seed=config.seed)["TRAK"]
    saved, rates = checkpoints(recipe, 5)
    loss = float(case.test_loss(w))
    shown = {
        "dataset": dataset,
        "model": "softmax regression" if hidden is None else f"network, {hidden} units",
        "n": n,
    }
    run.row(
        **shown, removed_share=0.0, method="before", test_accuracy=case.accuracy(w), test_loss=loss
    )
    for share in config.shares:
        removed = (
            np.random.default_rng(step_seed(config.seed, "edit", round(1000 * share)))
            .permutation(n)[: round(share * n)]
            .tolist()
        )
        true = again(removed)
        true_classes, true_loss = case.predictions(true), float(case.test_loss(true))
        shown |= {
            "removed_share": share,
            "damping_scale": damping,
            "true_loss_difference": true_loss - loss,
        }
        run.row(
            **shown,
            method="Retrain",
            test_accuracy=case.accuracy(true),
            test_loss=true_loss,
            parameter_norm=float((true - w).norm()),
        )
        effects = {name: one.removal_effect(removed) for name, one in estimators.items()}
        effects["SAM-GIF"] = Gif(recipe).removal_effect(removed)
        weights = torch.ones(n, dtype=w.dtype, device=w.device) - without(n, removed).to(w)
        effects["TracIn"] = sum(
            (
                rate * case.problem.weighted(weights).parts[0][2].gradient(one)
                for one, rate in zip(saved, rates, strict=True)
            ),
            start=torch.zeros_like(w),
        )
        for name, effect in effects.items():
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
                foretold_loss_difference=float(
                    baselines.metric_gradient(case.test_loss, w) @ effect
                ),
            )
        run.row(**shown, method="TRAK", foretold_loss_difference=float(foretold[removed].sum()))
