"""The series and its depth, Gamma against the exact total Hessian: error against differences of the
re-solved problem, and time; and the depth that is needed against the eigenvalues of the matrix.
"""

from functools import partial

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from projects.meta_if import estimators, labels
from projects.meta_if.data import Source
from projects.meta_if.experiments import common
from projects.meta_if.experiments.common import timed
from projects.meta_if.total import Implicit
from projects.meta_if.training import retrain
from shared import experiment
from shared.errors import UserError
from shared.influence.evaluate import cosine, relative_error
from shared.influence.solvers import cg, dense, neumann

NEUMANN_MARGIN = 1.05  # the scale over the largest eigenvalue, as in `solvers.neumann`


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
    conditioned: list[tuple[PositiveFloat, PositiveInt]] = Field(min_length=1)
    """Weights of the outer regulariser, and seeds of each, whose series is held against the
    eigenvalues."""
    fixed_depth: PositiveInt
    """Depth at which the error of these series is taken."""
    wanted_error: float = Field(gt=0, lt=1)
    """Relative error that these series are to reach."""
    most_depth: PositiveInt
    """Depth that they have for it at most."""


def run(config: Config, run: experiment.Run) -> None:
    setting = common.prepare(config, config.source, config.seed)
    errors(config, run, setting)
    cells = [(l2, seed) for l2, seeds in config.conditioned for seed in range(seeds)]
    for l2, seed in run.progress(cells, "regularisers and seeds"):
        if (l2, seed) != (config.l2, config.seed):
            changed = config.model_copy(update={"l2": l2})
            conditioning(config, run, common.prepare(changed, config.source, seed), seed)
        else:
            conditioning(config, run, setting, seed)


def conditioning(config: Config, run: experiment.Run, setting: common.Setting, seed: int) -> None:
    """Eigenvalues of a matrix, and how near the series comes to what it gives when solved."""
    rows = list(range(config.tasks_checked))
    sides = setting.state.task_gradients(rows).T
    eye = torch.eye(setting.fitted.lam.numel()).to(setting.fitted.lam)
    for method in (labels.TASK_IF, labels.GAMMA):
        matrix = setting.state.product(eye, estimators.METHODS[method].curvature)
        values = torch.linalg.eigvalsh(matrix)
        if values[0] <= 0:
            raise UserError(
                f"with l2 = {setting.problem.l2:g} and seed {seed} the matrix of {method} has the"
                f" eigenvalue {float(values[0]):.2g}: its series diverges; raise l2"
            )
        errors = series_errors(matrix, sides, config.wanted_error, config.most_depth)
        run.row(
            kind="conditioning",
            method=method,
            seed=seed,
            l2_scale=setting.problem.l2,
            smallest_eigenvalue_scale=float(values[0]),
            largest_eigenvalue_scale=float(values[-1]),
            depth=config.fixed_depth,
            # shorter than that: it was good enough before, and the error falls
            solved_relative_error=errors[min(config.fixed_depth, len(errors) - 1)],
            depth_needed=len(errors) - 1 if errors[-1] <= config.wanted_error else None,
        )


def series_errors(matrix: torch.Tensor, b: torch.Tensor, wanted: float, most: int) -> list[float]:
    """Relative errors, mean over columns, of the Neumann series of a symmetric matrix for A^-1 b by
    depth from 0 on, until one is at most `wanted` or the depth is `most`.
    """
    solution = torch.linalg.solve(matrix, b)
    scale = NEUMANN_MARGIN * float(torch.linalg.eigvalsh(matrix).abs().max())
    x = term = b / scale
    found = []
    for depth in range(most + 1):
        found.append(float(((x - solution).norm(dim=0) / solution.norm(dim=0)).mean()))
        if found[-1] <= wanted or depth == most:
            break
        term = term - matrix @ term / scale
        x = x + term
    return found


def errors(config: Config, run: experiment.Run, setting: common.Setting) -> None:
    """Of all matrices and solvers, against differences and against leaving a task out."""
    lam = setting.fitted.lam
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

    def compared(effects: np.ndarray) -> dict[str, float]:
        return {
            "relative_error": float(np.mean(relative_error(effects, np.stack(truth)))),
            "cosine": float(np.mean(cosine(effects, np.stack(truth)))),
            "loo_relative_error": float(np.mean(relative_error(effects, without))),
            "loo_cosine": float(np.mean(cosine(effects, without))),
        }

    def emit(method: str, solver_name: str, depth: int | None, solver) -> None:
        # a fresh state: no solve is spared the graphs of another
        fresh = Implicit(setting.problem, lam)
        (found, info), seconds = timed(
            partial(estimators.task_removal, fresh, chosen, method, solver)
        )
        run.row(
            kind="error",
            method=method,
            solver=solver_name,
            depth=depth,
            **compared(found.T.numpy(force=True)),
            residual_ratio=info.relative_residual,
            products=info.products,
            solve_seconds=seconds,
        )

    run.row(kind="error", method=labels.NO_EDIT, **compared(np.zeros_like(without)))

    for method in run.progress(list(estimators.METHODS), "curvatures"):
        emit(method, labels.DENSE, None, dense)
    emit(labels.TASK_IF, "CG, 1e-8", None, partial(cg, tol=1e-8))
    emit(labels.TASK_IF, "CG, 1e-4", None, partial(cg, tol=1e-4))
    for method in (labels.TASK_IF, labels.GAMMA):
        for depth in config.depths:
            emit(method, labels.NEUMANN, depth, partial(neumann, depth=depth, tol=None))
