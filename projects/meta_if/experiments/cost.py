"""Time of influence against retraining, in turns, and what the solve consists of."""

import time
from functools import partial

import torch
from pydantic import PositiveFloat, PositiveInt

from projects.meta_if import estimators, labels
from projects.meta_if.data import Source
from projects.meta_if.experiments import common
from projects.meta_if.total import at
from projects.meta_if.training import Composed, polish
from shared import experiment
from shared.influence.retrain import Root, minimise
from shared.influence.solvers import cg
from shared.meters import interleave


class Config(common.Config):
    """The problem, and how often everything is timed."""

    source: Source
    """Where the tasks' images come from."""
    repeats: PositiveInt
    """Rounds in which every variant runs once, in turn."""
    solve_tol: PositiveFloat
    """Relative residual of the solves."""
    retrain_tol: PositiveFloat
    """Gradient norm that ends a retraining: looser than elsewhere, as a user would have it."""


def run(config: Config, run: experiment.Run) -> None:
    setting = common.prepare(config, config.source, config.seed)
    problem, lam = setting.problem, setting.fitted.lam
    slope = estimators.metric_gradient(setting.tests, lam)
    setting.hessian  # noqa: B018  (shared by all retrainings, which are not charged for it)
    solver = partial(cg, tol=config.solve_tol)
    weights = torch.ones(config.tasks, dtype=torch.float64)
    weights[0] = 0
    changed = problem.with_weights(weights=weights)

    state = at(problem, lam)
    before = state.inner_solves
    s, info = estimators.adjoint(state, slope, solver=solver)
    solved = state.inner_solves - before
    estimators.task_scores(state, s)
    run.row(
        kind="counts",
        tasks=config.tasks,
        meta_parameters=lam.numel(),
        task_parameters=problem.inner.theta_size,
        iterations=info.iterations,
        products=info.products,
        inner_solves=solved,
        inner_solves_scoring=state.inner_solves - before - solved,
        residual_ratio=info.relative_residual,
    )

    def score() -> None:
        fresh = at(problem, lam)  # the inner problems solved once more: nothing is prepared
        gradient = estimators.metric_gradient(setting.tests, lam)
        estimators.task_scores(fresh, estimators.adjoint(fresh, gradient, solver=solver)[0])

    def by_lbfgs() -> Root:
        composed = Composed(changed)
        return minimise(
            composed.value,
            lam,
            tol=config.retrain_tol,
            polish=False,
            both=composed.gradient_and_value,
        )

    variants = {
        labels.SCORE_ALL: score,
        labels.EDIT_ONE: lambda: estimators.task_removal(at(problem, lam), [0], solver=solver),
        labels.RETRAIN_WITH_HESSIAN: lambda: polish(
            Composed(changed), lam, tol=config.retrain_tol, matrix=setting.hessian
        ),
        labels.RETRAIN_BY_LBFGS: by_lbfgs,
    }
    timings = interleave(
        variants,
        config.repeats,
        clock=time.process_time,
        progress=partial(run.progress, description="rounds"),
    )
    for name, timing in timings.items():
        for repeat, seconds in enumerate(timing.seconds):
            run.row(
                kind="time", variant=name, repeat=repeat, work_seconds=seconds, tasks=config.tasks
            )
