"""What it costs to score all training samples for one query, and to take samples out of a trained
model. Timed in turns, on one thread.

Scoring starts from the trained weights and ends with n scores. Retraining for that means n
trainings; one is timed, and its time multiplied by n. TracIn is there twice: captum's, from the
gradients of single samples, which is what one installs, and this package's own, a forward-mode pass
per checkpoint. dattri's cg runs with several limits of iterations, and the score of each is held
against the exact one of its own kind, so that times can be compared at equal accuracy.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy

from projects.sam_if import baselines as own_baselines
from projects.sam_if import labels
from projects.sam_if.data import Case, Dataset, Solution, network
from projects.sam_if.estimators import Estimator
from projects.sam_if.experiments.common import RunConfig, images_of, recipe_of
from projects.sam_if.trajectory import Gif
from shared import experiment
from shared.influence import baselines, peers
from shared.influence.objective import class_losses
from shared.influence.params import Parameters
from shared.influence.products import count_passes
from shared.influence.retrain import without
from shared.meters import interleave


class Config(RunConfig):
    """Softmax regression, what scores it, and how often all is timed. The fields of a run are those
    of the timed training with batches.
    """

    dataset: Dataset
    """The image set."""
    l2: PositiveFloat
    """Weight of the regulariser, without which there is no fixed point."""
    tol: PositiveFloat
    """Relative residual of this package's solves in float64."""
    single_tol: PositiveFloat
    """The same in float32."""
    trak_dimension: PositiveInt
    """Dimensions of TRAK's projection."""
    cg_iterations: list[PositiveInt]
    """Limits of iterations at which dattri's conjugate gradients are tried."""
    queries: list[PositiveInt]
    """Numbers of queries, besides a single one, for which the methods that solve are timed too, in
    float32; dattri's conjugate gradients with the middle limit."""
    removed_share: float = Field(gt=0, lt=1)
    """Share of the training images that an edit takes out."""
    repeats: PositiveInt
    """Rounds in which every variant runs once, in turn."""
    ekfac: bool
    """Whether kronfluence is timed as well, which is slow to set up."""


def sample_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return class_losses(outputs, labels.long())


def run(config: Config, run: experiment.Run) -> None:
    images = images_of(config, config.dataset, config.seed)
    case = Case.of(images, l2=config.l2, rho=config.rho)
    solution = Solution.of(case)
    w, objective = solution.w, case.problem.objective
    x, y = images.x_test[:1], images.y_test[:1]
    recipe = replace(recipe_of(config, case, config.seed), kept=False)  # each call makes it anew
    saved, rates = own_baselines.checkpoints(recipe, 5)
    removed = list(range(round(config.removed_share * config.n)))
    model = copy.deepcopy(network(config.features, None, 0)).float().to(config.device)
    single = Parameters.of(model)
    states = []
    for one in [*saved, w]:
        single.load(one.float())
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    train, query = (images.x.float(), images.y), (x.float(), y)

    def metric(at: Tensor) -> Tensor:
        return cross_entropy(case.parameters.call(at, x), y)

    def estimate(kind: str, tol: float, solver: str = "auto") -> Tensor:
        return Estimator(case.problem.at(w), kind, tol=tol, solver=solver).scores(metric)  # type: ignore[arg-type]

    same = Parameters.of(case.parameters.model, dtype=torch.float32)
    single_problem = replace(
        case.problem,
        objective=replace(
            objective,
            data=train,
            losses=lambda at, part: class_losses(same.call(at, part[0]), part[1]),
            outputs=None,
            output_losses=None,
        ),
    )

    def estimate_single(kind: str, count: int | None = None) -> Tensor:
        """Scores of the first query [n], or of each of the first queries [n, count]."""
        x_query, y_query = images.x_test[: count or 1].float(), images.y_test[: count or 1]

        def losses(at: Tensor) -> Tensor:
            found = class_losses(same.call(at, x_query), y_query)
            return found[0] if count is None else found

        estimator = Estimator(single_problem.at(w.float()), kind, tol=config.single_tol)  # type: ignore[arg-type]
        return estimator.scores(losses)

    scoring: dict[str, Callable[[], Tensor]] = {
        labels.SAM_HIF: partial(estimate, "sam_hif", config.tol),
        labels.SAM_IF: partial(estimate, "sam_if", config.tol),
        labels.IF: partial(estimate, "if", config.tol),
        labels.SAM_HIF_FLOAT32: partial(estimate_single, "sam_hif"),
        labels.IF_FLOAT32: partial(estimate_single, "if"),
        labels.SAM_GIF: lambda: Gif(recipe).scores(metric),
        labels.TRAK: lambda: own_baselines.trak(
            case, w, metric, seed=0, dimension=config.trak_dimension
        ),
        labels.TRACIN_CAPTUM: (
            lambda: peers.captum_tracin(
                model, train, query, sample_loss, checkpoints=states[:-1], learning_rates=rates
            ).flatten()
        ),
        labels.TRACIN_FORWARD: lambda: baselines.tracin(objective, saved, rates, metric),
        labels.IF_DATTRI_EXPLICIT: (
            lambda: peers.dattri_influence(model, train, query, sample_loss, l2=config.l2).flatten()
        ),
    }
    if config.ekfac:
        scoring[labels.EKFAC_KRONFLUENCE] = lambda: peers.kronfluence_ekfac(
            model, train, query, sample_loss, damping=config.l2
        ).flatten()
    for count in config.cg_iterations:
        scoring[labels.if_dattri_cg(count)] = lambda count=count: peers.dattri_influence(
            model, train, query, sample_loss, l2=config.l2, method="cg", iterations=count
        ).flatten()
    training: dict[str, Callable[[], Tensor]] = {
        labels.RETRAIN_BATCHES: lambda: recipe.train(without(config.n, removed)),
        labels.RETRAIN_WARM: lambda: solution.train(without(config.n, removed)).w,
        labels.EDIT_BY_HIF: (
            lambda: Estimator(case.problem.at(w), "sam_hif", tol=config.tol).removal_effect(removed)
        ),
        labels.EDIT_BY_GIF: lambda: Gif(recipe).removal_effect(removed),
    }
    exact = {"sam_hif": estimate("sam_hif", 1e-6, "dense"), "if": estimate("if", 1e-6, "dense")}
    shown = {"n": config.n, "parameters": w.numel(), "queries": 1}
    for name, work in scoring.items():
        with count_passes() as passes:
            found = work().double()
        own = (
            exact["sam_hif"]
            if name.startswith(labels.SAM_HIF)
            else exact["if"]
            if name.startswith(labels.IF)
            else None
        )
        counted = {
            "gradients": passes.gradients, "curvature_products": passes.curvature_products,
            "forward_mode": passes.forward_mode,
            "per_sample_gradients": passes.per_sample_gradients,
        }  # fmt: skip
        ours = "(" not in name or name == labels.TRACIN_FORWARD
        error = None if own is None else float((found - own).norm() / own.norm())
        run.row(
            kind="cost",
            **shown,
            task="score",
            method=name,
            score_error=error,
            **(counted if ours else {}),
        )
    with count_passes() as passes:
        _, info = Estimator(case.problem.at(w), "sam_hif", tol=config.tol).solve(
            baselines.metric_gradient(metric, w), transposed=True
        )
    run.row(kind="solve", **shown, method=labels.SAM_HIF, products=info.products,
    curvature_products=passes.curvature_products,
            gradients=passes.gradients, solve_error=info.relative_residual)  # fmt: skip
    for work in training.values():
        work()
    rounds(config, run, {**scoring, **training}, shown, set(scoring))

    def exact_of(kind: str, count: int) -> Tensor:
        x_query, y_query = images.x_test[:count], images.y_test[:count]
        estimator = Estimator(case.problem.at(w, formed=True), kind, solver="dense", tol=1e-6)  # type: ignore[arg-type]
        return estimator.scores(lambda at: class_losses(case.parameters.call(at, x_query), y_query))

    limit = sorted(config.cg_iterations)[len(config.cg_iterations) // 2]
    for count in config.queries:
        several = (images.x_test[:count].float(), images.y_test[:count])
        ours = {
            labels.SAM_HIF_FLOAT32: partial(estimate_single, "sam_hif", count),
            labels.IF_FLOAT32: partial(estimate_single, "if", count),
        }
        theirs = partial(peers.dattri_influence, model, train, several, sample_loss, l2=config.l2)
        works: dict[str, Callable[[], Tensor]] = {
            **ours,
            labels.IF_DATTRI_EXPLICIT: theirs,
            labels.if_dattri_cg(limit): partial(theirs, method="cg", iterations=limit),
        }
        wanted = {kind: exact_of(kind, count) for kind in ("sam_hif", "if")}
        shown = {**shown, "queries": count}
        for name, work in works.items():
            with count_passes() as passes:
                found = work().double()
            truth = wanted["sam_hif" if name == labels.SAM_HIF_FLOAT32 else "if"]
            errors = (found - truth).norm(dim=0) / truth.norm(dim=0)
            products = {"curvature_products": passes.curvature_products} if name in ours else {}
            run.row(
                kind="cost",
                **shown,
                task="score",
                method=name,
                score_error=float(errors.max()),
                **products,
            )
        rounds(config, run, works, shown, set(works))


def rounds(
    config: Config,
    run: experiment.Run,
    works: dict[str, Callable[[], Tensor]],
    shown: dict[str, int],
    scoring: set[str],
) -> None:
    """Time the works, each of which has run once, in turns."""
    timings = interleave(
        works,
        config.repeats,
        warmup=0,
        clock=time.process_time,
        progress=lambda total: run.progress(total, "rounds"),
    )
    for name, timing in timings.items():
        for repeat, seconds in enumerate(timing.seconds):
            run.row(
                kind="time",
                **shown,
                task="score" if name in scoring else "train",
                method=name,
                repeat=repeat,
                work_seconds=seconds,
            )
