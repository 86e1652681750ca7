"""What scoring all pairs for one metric costs, and one edit, beside what else there is: time in
turns, and passes over the data.

Solves are as exact as a ranking needs; how far that leaves the scores from those of the whole
matrix is in the rows.
"""

import time
from functools import partial

import torch
from pydantic import PositiveFloat, PositiveInt

from projects.ecif import Contrastive, labels
from projects.ecif.baselines import checkpoints, if_ekfac, tracin, tracin_by_gradients, trak
from projects.ecif.data import Name
from projects.ecif.experiments.common import ProblemConfig, build
from projects.ecif.fit import fit, solver
from shared import experiment
from shared.influence.evaluate import spearman
from shared.influence.products import count_passes
from shared.influence.solvers import dense, matrix_of
from shared.meters import interleave


class Config(ProblemConfig):
    """The problem, what is edited out, and how often everything is timed."""

    dataset: Name
    """The data set."""
    removed: PositiveInt
    """Pairs that are edited out, or retrained without."""
    checkpoints: PositiveInt
    """Points of the training that TracIn takes."""
    dimension: PositiveInt
    """Dimensions of TRAK's projection."""
    repeats: PositiveInt
    """Rounds in which every variant runs once, in turn."""
    tol: PositiveFloat
    """Relative residual of the solves."""


def run(config: Config, run: experiment.Run) -> None:
    case = build(config, config.dataset, config.seed, config.test)
    problem, w, metric = case.problem, case.fitted.w, case.validation.mean_loss
    points = checkpoints(problem, case.start, w, config.checkpoints)
    gone = list(range(config.removed))
    less = problem.without(gone)

    def edit() -> torch.Tensor:
        return problem.removal_effect(w, [gone], solver(problem, w, "cg", tol=config.tol))[:, 0]

    work = {
        "score": {
            labels.ECIF: lambda: problem.scores(
                w, metric, solver(problem, w, "cg", tol=config.tol)
            ),
            labels.GAUSS_NEWTON_ECIF: lambda: problem.scores(
                w, metric, solver(problem, w, "ggn", tol=config.tol)
            ),
            labels.IF_EKFAC: lambda: if_ekfac(problem, w, metric),
            labels.TRAK: lambda: trak(
                problem, w, metric, dimension=config.dimension, seed=config.seed
            ),
            labels.TRACIN_BY_GRADIENTS: lambda: tracin_by_gradients(problem, points, metric),
            labels.TRACIN_FORWARD: lambda: tracin(problem, points, metric),
        },
        "edit": {
            labels.ECIF: edit,
            labels.RETRAIN: lambda: fit(
                Contrastive(less.towers, less.pairs, less.delta, less.centre),
                case.start,
                hessian=False,
            ),
            labels.RETRAIN_WARM: lambda: fit(less, w, hessian=False),
            labels.RETRAIN_WITH_HESSIAN: lambda: case.fitted.without(gone),
        },
    }
    ggn = matrix_of(problem.objective().ggn(w), w)
    exact = {
        labels.ECIF: problem.scores(w, metric, case.fitted.solve),
        labels.GAUSS_NEWTON_ECIF: problem.scores(w, metric, partial(dense, ggn)),
    }
    common = {
        "dataset": config.dataset,
        "pairs": problem.pairs.n,
        "parameters": w.numel(),
        "device": config.device,
    }
    for task, variants in work.items():
        for method, call in variants.items():
            with count_passes() as passes:
                found = call()
            error = {}
            if method in exact and task == "score":
                away = (found - exact[method]).norm() / exact[method].norm()
                ranks = spearman(found.cpu(), exact[labels.ECIF].cpu())
                error = {"score_error": float(away), "rank_correlation": ranks}
            run.row(**common, task=task, method=method, kind="passes", **vars(passes), **error)
    clock = time.process_time if config.device == "cpu" else time.perf_counter
    flat = {
        (task, method): call for task, variants in work.items() for method, call in variants.items()
    }
    names = {f"{task}: {method}": (task, method) for task, method in flat}
    timed = interleave(
        {name: flat[key] for name, key in names.items()},
        config.repeats,
        warmup=0,  # every variant has run once by now
        clock=clock,
        progress=lambda n: run.progress(n, "rounds"),
    )
    for name, timing in timed.items():
        task, method = names[name]
        for repeat, seconds in enumerate(timing.seconds):
            run.row(
                **common, task=task, method=method, kind="time", repeat=repeat, work_seconds=seconds
            )
