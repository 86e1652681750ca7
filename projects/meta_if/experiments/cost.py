"""Time of influence against training again, in turns, and what the solve consists of."""

import time
from functools import partial

import torch
from pydantic import PositiveFloat, PositiveInt

from projects.meta_if import estimators
from projects.meta_if.episodes import Source
from projects.meta_if.experiments import _setting
from projects.meta_if.total import at
from projects.meta_if.training import Composed, polish
from shared import experiment
from shared.influence.retrain import minimise
from shared.influence.solvers import cg
from shared.meters import interleave


class Config(_setting.Config):
    source: Source = "mnist"
    repeats: PositiveInt = 6
    solve_tol: PositiveFloat = 1e-4
    retrain_tol: PositiveFloat = 1e-5  # looser than elsewhere: as a user would have it


def run(config: Config, run: experiment.Run) -> None:
    setting = _setting.prepare(config, config.source, config.seed)
    problem, lam = setting.problem, setting.fitted.lam
    slope = estimators.metric_gradient(setting.tests, lam)
    setting.hessian  # noqa: B018  (shared by all trainings again, which are not charged for it)
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

    variants = {
        "score all tasks": score,
        "edit one task out": lambda: estimators.task_removal(at(problem, lam), [0], solver=solver),
        "train again without one, Hessian at hand": lambda: polish(
            Composed(changed), lam, tol=config.retrain_tol, matrix=setting.hessian
        ),
        "train again without one, L-BFGS": lambda: minimise(
            Composed(changed).value, lam, tol=config.retrain_tol, polish=False
        ),
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
