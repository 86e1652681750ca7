"""Main table, task rows: some tasks are spoiled; what each method finds most harmful is removed by
editing and by retraining.
"""

from functools import partial

import torch
from pydantic import Field

from projects.meta_if import baselines, estimators, labels
from projects.meta_if.episodes import Source
from projects.meta_if.experiments import common
from projects.meta_if.experiments.common import timed
from projects.meta_if.training import fit
from shared import experiment
from shared.influence.evaluate import auroc


class Config(common.Config):
    """The problem with spoiled tasks, and what ranks and removes them."""

    sources: list[Source] = Field(min_length=1)
    """Where the tasks' images come from: a row of the table each."""
    spoiled_share: float = Field(gt=0, lt=1)
    """Share of the tasks whose labels are permuted; as many are removed."""
    methods: list[str] = Field(min_length=1)
    """What ranks the tasks, of `baselines.SCORES`."""


def run(config: Config, run: experiment.Run) -> None:
    for source in run.progress(config.sources, "sources"):
        setting = common.prepare(config, source, config.seed, config.spoiled_share)
        count = round(config.spoiled_share * config.tasks)
        setting.hessian  # noqa: B018  (made here, so that no retraining is charged for it)
        shown = {
            "source": source,
            "stands_for": labels.STAND_INS.get(source, source),
            "removed_tasks": count,
        }
        run.row(
            **shown,
            kind="whole",
            method=labels.ALL_TASKS,
            retrain_accuracy=setting.accuracy(setting.fitted.lam),
        )
        run.row(
            **shown,
            kind="whole",
            method=labels.WITHOUT_SPOILED,
            retrain_accuracy=setting.accuracy(
                setting.without(setting.spoiled.nonzero().flatten().tolist())
            ),
        )
        for method in config.methods:
            scores, rank_seconds = timed(
                partial(
                    baselines.scores,
                    method,
                    setting.state,
                    setting.tests,
                    setting.fitted,
                    seed=config.seed,
                    solver=common.robust,
                )
            )
            found = common.most_harmful(scores, count)
            retrained, retrain_seconds = timed(partial(setting.without, found))
            row = {
                "rank_seconds": rank_seconds,
                "retrain_seconds": retrain_seconds,
                "retrain_accuracy": setting.accuracy(retrained),
                "detection_auc": auroc(-scores.cpu(), setting.spoiled),
            }
            edited = None
            if method in estimators.METHODS or method == labels.EKFAC:
                edited, row["edit_seconds"] = timed(
                    partial(edit, setting, found, method, config.seed)
                )
                row["edit_accuracy"] = setting.accuracy(edited)
                change = retrained - setting.fitted.lam
                row["edit_cosine"] = float(
                    (edited - setting.fitted.lam)
                    @ change
                    / (edited - setting.fitted.lam).norm()
                    / change.norm()
                )
            run.row(**shown, kind="method", method=method, **row)
            if method == labels.TASK_IF:
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
                    **shown,
                    kind="scratch",
                    method=labels.FROM_SCRATCH,
                    retrain_accuracy=setting.accuracy(fresh.lam),
                    retrain_seconds=seconds,
                )


def edit(setting: common.Setting, found: list[int], method: str, seed: int) -> torch.Tensor:
    """lam* plus the sum of the predicted effects of removing the tasks: one solve."""
    state = setting.state
    if method == labels.EKFAC:
        side = state.task_gradients(found).T @ state.problem.task_weights[found]
        return state.lam + baselines.ekfac(state, seed).solve(side)[0]
    chosen = estimators.METHODS[method]
    side = state.task_gradients(found, direct=chosen.direct).T @ state.problem.task_weights[found]
    return state.lam + common.robust(partial(state.product, curvature=chosen.curvature), side)[0]
