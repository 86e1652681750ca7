"""Figures 2 and 3 for what the paper is about: a ResNet-18 trained with SAM on images, some of
whose labels are wrong.

The network is at no fixed point, so curvature is Gauss-Newton's, damped, and solves are truncated
at a loose tolerance that is reported. Harm is the predicted fall of the loss on clean validation
images; the most harmful are taken out and the same run is made again without them. LDS: the same
run on random halves of the images, for the losses of single test images. Scales gpu and paper only.
"""

import torch
from pydantic import Field
from torch import Tensor

from projects.sam_if.estimators import Estimator
from projects.sam_if.experiments._methods import checkpoints
from projects.sam_if.problems import Case, Dataset, Images, load, resnet18
from projects.sam_if.trajectory import Gif, Recipe
from shared import experiment
from shared.influence import baselines, evaluate, retrain
from shared.influence.noise import flip_labels
from shared.influence.objective import class_losses
from shared.influence.products import chunks
from shared.influence.retrain import Root, without
from shared.influence.solvers import spectral_radius
from shared.seeding import step_seed


class Config(experiment.Config):
    """The damping is relative to the largest curvature; `widths` are the channels of the four
    stages, `chunk` the images of one pass.
    """

    dataset: Dataset = "cifar10"
    n: int = Field(default=10000, ge=20)
    validation: int = Field(default=2000, ge=1)
    test: int = Field(default=5000, ge=1)
    widths: list[int] = [64, 128, 256, 512]
    rho: float = Field(default=0.05, ge=0)
    l2: float = Field(default=5e-4, ge=0)
    flipped: float = Field(default=0.2, ge=0, lt=1)
    damping_share: float = Field(default=0.01, gt=0)
    tol: float = Field(default=0.05, gt=0)
    shares: list[float] = [0.1, 0.2, 0.3]
    subsets: int = Field(default=16, ge=4)
    queries: int = Field(default=10, ge=1)
    epochs: int = Field(default=30, ge=1)
    batch: int = Field(default=128, ge=1)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    trak_dimension: int = Field(default=1024, ge=1)
    chunk: int = Field(default=500, ge=1)
    sample_chunk: int = Field(default=20, ge=1)
    device: str = "cpu"


def run(config: Config, run: experiment.Run) -> None:
    options = {
        "seed": config.seed,
        "validation": config.validation,
        "test": config.test,
        "device": config.device,
    }
    images = load(config.dataset, config.n, features=None, **options)
    labels, wrong = flip_labels(images.y, config.flipped, images.classes, config.seed)
    case = Case.of(
        images,
        l2=config.l2,
        rho=config.rho,
        labels=labels,
        model=model_of(config, images),
        chunk=config.chunk,
    )
    training = {
        "epochs": config.epochs,
        "batch": config.batch,
        "lr": config.lr,
        "momentum": config.momentum,
        "cosine": True,
    }
    recipe = Recipe.epochs(case.problem, case.parameters.flat(), seed=config.seed, **training)
    w = recipe.train()

    def metric(at: Tensor) -> Tensor:
        """The mean loss on the validation images, then the losses of single test images."""
        held = [
            losses_of(case, at, *piece).sum()
            for piece in chunks((images.x_validation, images.y_validation), config.chunk)
        ]
        single = losses_of(
            case, at, images.x_test[: config.queries], images.y_test[: config.queries]
        )
        return torch.cat([torch.stack(held).sum().unsqueeze(0) / len(images.y_validation), single])

    scores, solved = scores_of(config, case, recipe, w, metric)
    shown = {
        "dataset": config.dataset,
        "seed": config.seed,
        "n": config.n,
        "parameters": w.numel(),
        "flipped_share": config.flipped,
    }
    shown |= {"residual_norm": float(case.problem.field(w).norm())}

    def accuracy(at: Tensor) -> float:
        with torch.no_grad():
            right = [
                (case.parameters.call(at, x).argmax(1) == y).sum()
                for x, y in chunks((images.x_test, images.y_test), config.chunk)
            ]
        return float(torch.stack(right).sum()) / len(images.y_test)

    def again(weights: Tensor) -> Root:
        return Root(recipe.train(weights), 0.0, len(recipe.steps))

    kept = retrain.subsets(config.n, 0.5, config.subsets, config.seed)
    halves = [again(one).w for one in run.progress(list(kept), "halves")]
    outcomes = torch.stack([metric(one)[1:] for one in halves]).double().numpy(force=True)
    run.row(
        kind="curve", **shown, method="none removed", removed_share=0.0, test_accuracy=accuracy(w)
    )
    for name, found in run.progress(list(scores.items()), "methods"):
        harm, mask = -found[:, 0].double().cpu().numpy(), wrong.cpu().numpy()
        lds = (
            None
            if name in ("loss", "chance")
            else evaluate.lds(found[:, 1:].double().numpy(force=True), kept, outcomes)
        )
        auc = evaluate.auroc(harm, mask) if mask.any() else None
        run.row(
            kind="scores",
            **shown,
            method=name,
            lds_correlation=lds,
            detection_auc=auc,
            **solved.get(name, {}),
        )
        accuracies = evaluate.removal_curve(
            harm, config.shares, lambda gone: accuracy(again(without(config.n, gone)).w)
        )
        for share, value in zip(config.shares, accuracies, strict=True):
            run.row(kind="curve", **shown, method=name, removed_share=share, test_accuracy=value)


def model_of(config: Config, images: Images) -> torch.nn.Module:
    return resnet18(
        images.x.shape[1], config.widths, step_seed(config.seed, "resnet"), images.classes
    )


def losses_of(case: Case, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return class_losses(case.parameters.call(w, x), y)


def scores_of(
    config: Config, case: Case, recipe: Recipe, w: Tensor, metric: baselines.Metric
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Scores [n, 1 + queries] by method, and how each system was solved."""
    objective, at = case.problem.objective, case.problem.at(w, "ggn")
    damping = config.damping_share * spectral_radius(at.pieces[0].there, w, 20)
    gradients = baselines.metric_gradient(metric, w)
    scores, solved = {}, {}
    for name, kind in (("SAM-HIF", "sam_hif"), ("SAM-IF", "sam_if"), ("IF", "if")):
        estimator = Estimator(at, kind, damping=damping, tol=config.tol)
        s, info = estimator.solve(gradients, transposed=True)
        scores[name] = estimator.along(s)
        solved[name] = {
            "solve_error": info.relative_residual,
            "products": info.products,
            "damping_scale": damping,
        }
    saved, rates = checkpoints(recipe, 5)
    scores["SAM-GIF"] = Gif(recipe).scores(metric)
    scores["TracIn"] = baselines.tracin(objective, saved, rates, metric)
    options = {
        "dimension": config.trak_dimension,
        "seed": config.seed,
        "damping": 1e-3,
        "chunk": config.sample_chunk,
    }
    scores["TRAK"] = baselines.trak(case.margins, objective.data, [w], metric, **options)
    scores["gradient dot"] = baselines.gradient_dot(objective, w, metric)
    every = 1 + config.queries
    scores["loss"] = baselines.loss_value(objective, w).unsqueeze(1).expand(-1, every)
    scores["chance"] = baselines.chance(config.n, config.seed).unsqueeze(1).expand(-1, every)
    return scores, solved
