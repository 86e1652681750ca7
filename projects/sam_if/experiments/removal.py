"""Figure 2: a fifth of the labels are wrong; the most harmful samples by each score are taken out
and the model is retrained.

Harm is the predicted fall of the loss on clean validation images. Every method scores the same
model, and all are retrained by the same solver. The loss of the sample itself and chance stand
beside them. The rows also say how well each order finds the wrong labels.
"""

from functools import partial

from pydantic import Field, PositiveFloat, PositiveInt

from projects.sam_if import baselines as own_baselines
from projects.sam_if import labels
from projects.sam_if.experiments.common import (
    RunConfig,
    estimators,
    images_of,
    recipe_of,
    trajectory_scores,
)
from projects.sam_if.problems import Case, Dataset, Solution
from shared import experiment
from shared.influence import baselines, evaluate
from shared.influence.noise import flip_labels
from shared.influence.solvers import dense, matrix_of


class Config(RunConfig):
    """Softmax regression on wrong labels, and the shares that are taken out."""

    datasets: list[Dataset]
    """Image sets; all seeds of each."""
    seeds: PositiveInt
    """Runs of a set: each draws images and wrong labels."""
    validation: PositiveInt
    """Clean validation images, which harm is about."""
    test: PositiveInt
    """Test images, which the accuracy is of."""
    flipped: float = Field(gt=0, lt=1)
    """Share of the labels that are wrong."""
    shares: list[float] = Field(min_length=1)
    """Shares of the training images that are taken out, the most harmful first."""
    l2: PositiveFloat
    """Weight of the regulariser, without which there is no fixed point."""
    tol: PositiveFloat
    """What |F| must fall to in every training."""


def run(config: Config, run: experiment.Run) -> None:
    for dataset, seed in run.progress(
        [(dataset, seed) for dataset in config.datasets for seed in range(config.seeds)], "runs"
    ):
        one_run(config, run, dataset, seed + config.seed)


def one_run(config: Config, run: experiment.Run, dataset: Dataset, seed: int) -> None:
    images = images_of(config, dataset, seed, validation=config.validation, test=config.test)
    given_labels, wrong = flip_labels(images.y, config.flipped, images.classes, seed)
    case = Case.of(images, l2=config.l2, rho=config.rho, labels=given_labels)
    solution = Solution.of(case, config.tol)
    w, objective, metric = solution.w, case.problem.objective, case.validation_loss
    scores = {
        name: estimator.scores(metric) for name, estimator in estimators(case.problem.at(w)).items()
    }
    scores |= trajectory_scores(recipe_of(config, case, seed), metric)
    scores |= own_baselines.from_final_weights(case, w, metric, seed=seed)
    hessian = matrix_of(objective.hessian(w), w)
    scores[labels.SELF_INFLUENCE] = -baselines.self_influence(objective, w, partial(dense, hessian))
    scores[labels.LOSS] = baselines.loss_value(objective, w)
    scores[labels.CHANCE] = baselines.chance(config.n, seed)

    def accuracy_without(removed: list[int]) -> float:
        return case.accuracy(solution.without([removed]).w[0])

    shown = {"dataset": dataset, "seed": seed, "n": config.n, "flipped_share": config.flipped}
    run.row(
        kind="curve",
        **shown,
        method=labels.NONE_REMOVED,
        removed_share=0.0,
        test_accuracy=case.accuracy(w),
    )
    run.row(
        kind="curve",
        **shown,
        method=labels.ALL_WRONG_REMOVED,
        removed_share=config.flipped,
        test_accuracy=accuracy_without(wrong.nonzero().flatten().tolist()),
    )
    for name, own_scores in scores.items():
        harm, mask = -own_scores.double().cpu().numpy(), wrong.cpu().numpy()
        count = int(mask.sum())
        detected = {
            "detection_auc": evaluate.auroc(harm, mask),
            "detection_precision": evaluate.precision_at(harm, mask, count),
        }
        run.row(kind="detection", **shown, method=name, **detected)
        accuracies = evaluate.removal_curve(harm, config.shares, accuracy_without)
        for share, accuracy in zip(config.shares, accuracies, strict=True):
            run.row(kind="curve", **shown, method=name, removed_share=share, test_accuracy=accuracy)
