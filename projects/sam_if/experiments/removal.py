"""Figure 2: a fifth of the labels are wrong; the most harmful samples by each score are taken out
and the model is trained again.

Harm is the predicted fall of the loss on clean validation images. Every method scores the same
model, and all are trained again by the same solver. The loss of the sample itself and chance stand
beside them. The rows also say how well each order finds the wrong labels.
"""

from functools import partial

from pydantic import Field

from projects.sam_if.estimators import Estimator
from projects.sam_if.experiments._methods import other_scores, trajectory_scores
from projects.sam_if.problems import Case, Dataset, Solution, load
from projects.sam_if.trajectory import Recipe
from shared import experiment
from shared.influence import baselines, evaluate
from shared.influence.noise import flip_labels
from shared.influence.solvers import dense, matrix_of


class Config(experiment.Config):
    datasets: list[Dataset] = ["mnist", "fashion-mnist", "cifar10"]
    seeds: int = Field(default=3, ge=1)
    n: int = Field(default=1000, ge=20)
    features: int = Field(default=32, ge=1)
    validation: int = Field(default=500, ge=1)
    test: int = Field(default=2000, ge=1)
    flipped: float = Field(default=0.2, gt=0, lt=1)
    shares: list[float] = [0.05, 0.1, 0.2, 0.3, 0.4]
    rho: float = Field(default=0.1, ge=0)
    l2: float = Field(default=0.01, gt=0)
    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=100, ge=1)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    tol: float = Field(default=1e-7, gt=0)
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
        validation=config.validation,
        test=config.test,
        device=config.device,
    )
    labels, wrong = flip_labels(images.y, config.flipped, images.classes, seed)
    case = Case.of(images, l2=config.l2, rho=config.rho, labels=labels)
    solution = Solution.of(case, config.tol)
    w, objective = solution.w, case.problem.objective
    options = {
        "epochs": config.epochs,
        "batch": config.batch,
        "lr": config.lr,
        "momentum": config.momentum,
        "seed": seed,
    }
    recipe = Recipe.epochs(case.problem, case.parameters.flat(), **options)
    at = case.problem.at(w)
    scores = {
        name: Estimator(at, kind).scores(case.validation_loss)
        for name, kind in (("SAM-HIF", "sam_hif"), ("SAM-IF", "sam_if"), ("IF", "if"))
    }
    scores |= trajectory_scores(recipe, case.validation_loss) | other_scores(
        case, w, case.validation_loss, seed=seed
    )
    hessian = matrix_of(objective.hessian(w), w)
    scores["self-influence"] = -baselines.self_influence(objective, w, partial(dense, hessian))
    scores["loss"] = baselines.loss_value(objective, w)
    scores["chance"] = baselines.chance(config.n, seed)
    shown = {"dataset": dataset, "seed": seed, "n": config.n, "flipped_share": config.flipped}
    run.row(
        kind="curve",
        **shown,
        method="none removed",
        removed_share=0.0,
        test_accuracy=case.accuracy(w),
    )
    clean = solution.without([wrong.nonzero().flatten().tolist()]).w[0]
    run.row(
        kind="curve",
        **shown,
        method="all wrong ones removed",
        removed_share=config.flipped,
        test_accuracy=case.accuracy(clean),
    )
    for name, found in scores.items():
        harm, mask = -found.double().cpu().numpy(), wrong.cpu().numpy()
        count = int(mask.sum())
        detected = {
            "detection_auc": evaluate.auroc(harm, mask),
            "detection_precision": evaluate.precision_at(harm, mask, count),
        }
        run.row(kind="detection", **shown, method=name, **detected)
        accuracies = evaluate.removal_curve(
            harm, config.shares, lambda gone: case.accuracy(solution.without([gone]).w[0])
        )
        for share, accuracy in zip(config.shares, accuracies, strict=True):
            run.row(kind="curve", **shown, method=name, removed_share=share, test_accuracy=accuracy)
