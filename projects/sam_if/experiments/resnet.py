"""Figures 2 and 3 for what the paper is about: a ResNet-18 trained with SAM on images, some of
whose labels are wrong.

The network is at no fixed point, so curvature is Gauss-Newton's, damped, and solves are truncated
at a loose tolerance that is reported. Harm is the predicted fall of the loss on clean validation
images; the most harmful are taken out and the same run is made without them. LDS: the same
run on random halves of the images, for the losses of single test images. Scales gpu and paper only.
"""

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from projects.sam_if import labels
from projects.sam_if.baselines import TRAK_DAMPING
from projects.sam_if.experiments.common import estimators, trajectory_scores
from projects.sam_if.problems import Case, Dataset, Images, load, resnet18
from projects.sam_if.trajectory import Recipe
from shared import experiment
from shared.influence import baselines, evaluate, retrain
from shared.influence.noise import flip_labels
from shared.influence.objective import class_losses
from shared.influence.products import chunks
from shared.influence.retrain import without
from shared.influence.solvers import spectral_radius
from shared.seeding import step_seed


class Config(experiment.Config):
    """A ResNet-18 on images, the shares that are taken out, and halves of the data for the LDS."""

    dataset: Dataset
    """The image set."""
    n: int = Field(ge=20)
    """Training images."""
    validation: PositiveInt
    """Clean validation images, which harm is about."""
    test: PositiveInt
    """Test images, which the accuracy is of."""
    widths: list[PositiveInt] = Field(min_length=4, max_length=4)
    """Channels of the four stages."""
    rho: NonNegativeFloat
    """Length of SAM's perturbation."""
    l2: NonNegativeFloat
    """Weight of the regulariser (l2 / 2) |w|^2."""
    flipped: float = Field(ge=0, lt=1)
    """Share of the labels that are wrong."""
    damping_share: PositiveFloat
    """Damping, as a share of the largest curvature."""
    tol: PositiveFloat
    """Relative residual of the solves."""
    shares: list[float] = Field(min_length=1)
    """Shares of the training images that are taken out, the most harmful first."""
    subsets: int = Field(ge=4)
    """Random halves of the data that are trained on, for the LDS."""
    queries: PositiveInt
    """Test images whose single losses the LDS is over."""
    epochs: PositiveInt
    """Passes over the training images."""
    batch: PositiveInt
    """Images of a batch."""
    lr: PositiveFloat
    """Learning rate where it starts; it falls as a cosine."""
    momentum: float = Field(ge=0, lt=1)
    """Momentum of the steps."""
    trak_dimension: PositiveInt
    """Dimensions of TRAK's projection."""
    chunk: PositiveInt
    """Images of one pass."""
    sample_chunk: PositiveInt
    """Images whose gradients exist at once."""
    device: str = "cpu"
    """Where tensors live: cpu, or cuda."""


def run(config: Config, run: experiment.Run) -> None:
    options = {
        "seed": config.seed,
        "validation": config.validation,
        "test": config.test,
        "device": config.device,
    }
    images = load(config.dataset, config.n, features=None, **options)
    given_labels, wrong = flip_labels(images.y, config.flipped, images.classes, config.seed)
    case = Case.of(
        images,
        l2=config.l2,
        rho=config.rho,
        labels=given_labels,
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

    kept = retrain.subsets(config.n, 0.5, config.subsets, config.seed)
    halves = [recipe.train(half) for half in run.progress(list(kept), "halves")]
    outcomes = torch.stack([metric(end)[1:] for end in halves]).double().numpy(force=True)
    run.row(
        kind="curve",
        **shown,
        method=labels.NONE_REMOVED,
        removed_share=0.0,
        test_accuracy=accuracy(w),
    )
    for name, found in run.progress(list(scores.items()), "methods"):
        harm, mask = -found[:, 0].double().cpu().numpy(), wrong.cpu().numpy()
        lds = (
            None
            if name in (labels.LOSS, labels.CHANCE)
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
            harm, config.shares, lambda gone: accuracy(recipe.train(without(config.n, gone)))
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
    for name, estimator in estimators(at, damping=damping, tol=config.tol).items():
        s, info = estimator.solve(gradients, transposed=True)
        scores[name] = estimator.along(s)
        solved[name] = {
            "solve_error": info.relative_residual,
            "products": info.products,
            "damping_scale": damping,
        }
    scores |= trajectory_scores(recipe, metric)
    options = {
        "dimension": config.trak_dimension,
        "seed": config.seed,
        "damping": TRAK_DAMPING,
        "chunk": config.sample_chunk,
    }
    scores[labels.TRAK] = baselines.trak(case.margins, objective.data, [w], metric, **options)
    scores[labels.GRADIENT_DOT] = baselines.gradient_dot(objective, w, metric)
    every = 1 + config.queries
    scores[labels.LOSS] = baselines.loss_value(objective, w).unsqueeze(1).expand(-1, every)
    scores[labels.CHANCE] = baselines.chance(config.n, config.seed).unsqueeze(1).expand(-1, every)
    return scores, solved
