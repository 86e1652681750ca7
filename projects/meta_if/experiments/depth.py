"""The series and its depth, Gamma against the exact total Hessian: error against differences of the
re-solved problem, and time.
"""

from functools import partial

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from projects.meta_if import estimators, labels
from projects.meta_if.episodes import Source
from projects.meta_if.experiments import common
from projects.meta_if.experiments.common import timed
from projects.meta_if.training import retrain
from shared import experiment
from shared.influence.evaluate import cosine, relative_error
from shared.influence.solvers import cg, dense, neumann


class Config(common.Config):
    """The problem, and the depths of the series."""

    source: Source
    """Where the tasks' images come from."""
    depths: list[PositiveInt] = Field(min_length=1)
    """Terms of the Neumann series."""
    tasks_checked: PositiveInt
    """Tasks whose predicted change is held against the truth: the first ones."""
    difference_epsilon: PositiveFloat
    """Change of a task's weight, up and down, of the finite difference."""


def run(config: Config, run: experiment.Run) -> None:
    setting = common.prepare(config, config.source, config.seed)
    state, lam = setting.state, setting.fitted.lam
    chosen = list(range(config.tasks_checked))
    trained = retrain(setting.problem, lam, setting.hessian, tol=max(config.tol, 1e-12))
    truth = []
    for task in run.progress(chosen, "differences"):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(config.tasks, dtype=torch.float64)
            weights[task] -= sign * config.difference_epsilon
            ends.append(trained(setting.problem.with_weights(weights=weights)).w)
        truth.append(((ends[0] - ends[1]) / (2 * config.difference_epsilon)).numpy(force=True))
    without = np.stack([(setting.without([task]) - lam).numpy(force=True) for task in chosen])

    def emit(method: str, solver_name: str, depth: int | None, solver) -> None:
        (found, info), seconds = timed(
            partial(estimators.task_removal, state, chosen, method, solver)
        )
        effects = found.T.numpy(force=True)
        run.row(
            method=method,
            solver=solver_name,
            depth=depth,
            relative_error=float(np.mean(relative_error(effects, np.stack(truth)))),
            cosine=float(np.mean(cosine(effects, np.stack(truth)))),
            loo_relative_error=float(np.mean(relative_error(effects, without))),
            loo_cosine=float(np.mean(cosine(effects, without))),
            residual_ratio=info.relative_residual,
            products=info.products,
            solve_seconds=seconds,
        )

    for method in run.progress(list(estimators.METHODS), "curvatures"):
        emit(method, labels.DENSE, None, dense)
    emit(labels.TASK_IF, "CG, 1e-8", None, partial(cg, tol=1e-8))
    emit(labels.TASK_IF, "CG, 1e-4", None, partial(cg, tol=1e-4))
    for method in (labels.TASK_IF, labels.GAMMA):
        for depth in config.depths:
            emit(method, labels.NEUMANN, depth, partial(neumann, depth=depth, tol=None))
