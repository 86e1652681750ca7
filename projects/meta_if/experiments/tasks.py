"""Main table, task rows: some tasks are spoiled; what each method finds most harmful is removed by
editing and by training again.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import Field

from projects.meta_if import estimators, rivals
from projects.meta_if.episodes import Source
from projects.meta_if.experiments import _setting
from projects.meta_if.training import fit
from shared import experiment
from shared.influence.evaluate import auroc

# ours: for the paper's
STAND_INS = {
    "quickdraw": "Omniglot",
    "mnist": "MNIST",
    "cifar10": "MINI-ImageNet",
    "fashion-mnist": "FC100",
}


class Config(_setting.Config):
    sources: list[Source] = ["quickdraw", "mnist", "cifar10", "fashion-mnist"]
    spoiled_share: float = Field(0.4, gt=0, lt=1)
    methods: list[str] = [
        "task-IF",
        "task-IF (Gamma)",
        "direct-IF",
        "EK-FAC",
        "TRAK",
        "TracIn",
        "loss value",
        "random",
    ]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the processor seconds it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def run(config: Config, run: experiment.Run) -> None:
    for source in run.progress(config.sources, "sources"):
        setting = _setting.prepare(config, source, config.seed, config.spoiled_share)
        count = round(config.spoiled_share * config.tasks)
        setting.hessian  # noqa: B018  (made here, so that no training again is charged for it)
        common = {
            "source": source,
            "stands_for": STAND_INS.get(source, source),
            "removed_tasks": count,
        }
        run.row(
            **common,
            kind="whole",
            method="all tasks",
            retrain_accuracy=setting.accuracy(setting.fitted.lam),
        )
        run.row(
            **common,
            kind="whole",
            method="without the spoiled tasks",
            retrain_accuracy=setting.accuracy(
                setting.without(setting.spoiled.nonzero().flatten().tolist())
            ),
        )
        for method in config.methods:
            scores, rank_seconds = timed(
                partial(
                    rivals.scores,
                    method,
                    setting.state,
                    setting.tests,
                    setting.fitted,
                    seed=config.seed,
                    solver=_setting.robust,
                )
            )
            found = _setting.most_harmful(scores, count)
            again, retrain_seconds = timed(partial(setting.without, found))
            row = {
                "rank_seconds": rank_seconds,
                "retrain_seconds": retrain_seconds,
                "retrain_accuracy": setting.accuracy(again),
                "detection_auc": auroc(-scores.cpu(), setting.spoiled),
            }
            edited = None
            if method in estimators.METHODS or method == "EK-FAC":
                edited, row["edit_seconds"] = timed(
                    partial(edit, setting, found, method, config.seed)
                )
                row["edit_accuracy"] = setting.accuracy(edited)
                change = again - setting.fitted.lam
                row["edit_cosine"] = float(
                    (edited - setting.fitted.lam)
                    @ change
                    / (edited - setting.fitted.lam).norm()
                    / change.norm()
                )
            run.row(**common, kind="method", method=method, **row)
            if method == "task-IF":
                weights = torch.ones(config.tasks, dtype=torch.float64)
                weights[found] = 0
                fresh, seconds = timed(
                    partial(
                        fit,
                        setting.problem.with_weights(weights=weights),
                        setting.start,
                        steps=config.steps,
                        rate=config.rate,
                        tol=config.tol,
                    )
                )
                run.row(
                    **common,
                    kind="scratch",
                    method="Retrain",
                    retrain_accuracy=setting.accuracy(fresh.lam),
                    retrain_seconds=seconds,
                )


def edit(setting: _setting.Setting, found: list[int], method: str, seed: int) -> torch.Tensor:
    """lam* plus the sum of the predicted effects of removing the tasks: one solve."""
    state = setting.state
    if method == "EK-FAC":
        side = state.task_gradients(found).T @ state.problem.task_weights[found]
        return state.lam + rivals.ekfac(state, seed).solve(side)[0]
    chosen = estimators.METHODS[method]
    side = state.task_gradients(found, direct=chosen.direct).T @ state.problem.task_weights[found]
    return state.lam + _setting.robust(partial(state.product, curvature=chosen.curvature), side)[0]
