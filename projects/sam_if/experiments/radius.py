"""How each estimator's error grows with the radius of the perturbation, with one term of SAM-HIF
left out as well.

Two errors of the parameters' change: against retraining without the sample, and against its
derivative, which is the finite difference of the solution found anew with the sample's weight a
little up and down. The first holds what any first-order estimate leaves out; the second does not.
"""

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from projects.sam_if import labels
from projects.sam_if.data import Case, Dataset, Solution
from projects.sam_if.experiments import common
from shared import experiment
from shared.influence import evaluate
from shared.influence.noise import flip_labels


class Config(experiment.Config):
    """Softmax regression at SAM's fixed point, by radius."""

    dataset: Dataset
    """The image set."""
    seeds: PositiveInt
    """Runs: each draws images, wrong labels and removals."""
    radii: list[NonNegativeFloat] = Field(min_length=1)
    """Lengths of SAM's perturbation."""
    n: int = Field(ge=20)
    """Training images."""
    features: PositiveInt
    """Principal components that describe an image."""
    l2: PositiveFloat
    """Weight of the regulariser, without which there is no fixed point."""
    flipped: float = Field(ge=0, lt=1)
    """Share of the labels that are wrong."""
    removals: PositiveInt
    """Samples left out one at a time."""
    differences: PositiveInt
    """Of these, how many get a finite difference."""
    step: PositiveFloat
    """Change of a sample's weight, up and down, of the finite difference."""
    tol: PositiveFloat
    """What |F| must fall to in every training."""
    device: str = "cpu"
    """Where tensors live: cpu, or cuda."""


def run(config: Config, run: experiment.Run) -> None:
    for seed in run.progress(range(config.seed, config.seed + config.seeds), "seeds"):
        images = common.images_of(config, config.dataset, seed)
        wrong_labels = flip_labels(images.y, config.flipped, images.classes, seed)[0]
        case = Case.of(images, l2=config.l2, rho=0.0, labels=wrong_labels)
        for rho in run.progress(config.radii, "radii"):
            one_radius(config, run, case.with_rho(rho), seed)


def one_radius(config: Config, run: experiment.Run, case: Case, seed: int) -> None:
    solution = Solution.of(case, config.tol)
    removed = common.removed_samples(config.n, config.removals, seed)
    true = (solution.without([[sample] for sample in removed]).w - solution.w).numpy(force=True)
    slope = common.slopes(solution, removed[: config.differences], config.step)
    at = case.problem.at(solution.w, formed=True)
    shown = {
        "seed": seed,
        "rho_scale": case.problem.rho,
        "n": config.n,
        "perturbation_ratio": at.pieces[0].c,
        "turning_ratio": at.turning(),
        "residual_norm": float(case.problem.field(solution.w).norm()),
    }
    scores = {}
    for name, estimator in common.exact_estimators(at).items():
        effects = estimator.removal_effects(removed).T.numpy(force=True)
        scores[name] = estimator.scores(case.test_loss)
        whole = scores[labels.SAM_HIF]
        run.row(
            method=name,
            **shown,
            parameter_error=evaluate.relative_error(effects, true).mean(),
            derivative_error=evaluate.relative_error(effects[: config.differences], slope).max(),
            score_difference=float((scores[name] - whole).abs().max() / whole.abs().max()),
        )
