"""Main table, task rows: some tasks are spoiled; what each method finds most harmful is removed by
editing and by retraining.
"""

from collections.abc import Iterator
from functools import partial

import torch
from pydantic import Field, PositiveInt

from projects.meta_if import baselines, estimators, labels
from projects.meta_if.data import Source
from projects.meta_if.experiments import common
from projects.meta_if.experiments.common import timed
from projects.meta_if.total import Implicit
from projects.meta_if.training import fit
from shared import experiment
from shared.influence.evaluate import auroc


class Config(common.Config):
    """The problem with spoiled tasks, and what ranks and removes them."""

    sources: list[Source] = Field(min_length=1)
    """Where the tasks' images come from."""
    seeds: PositiveInt
    """Runs of a source: each draws tasks, which are spoiled, and the body."""
    spoiled_share: float = Field(gt=0, lt=1)
    """Share of the tasks whose labels are permuted; as many are removed."""
    methods: list[str] = Field(min_length=1)
    """What ranks the tasks, of `baselines.SCORES`."""
    repeated: list[str] = Field(min_length=1)
    """Of these, what does so in every run; the others in the first of each source."""


def run(config: Config, run: experiment.Run) -> None:
    cells = [(source, seed) for source in config.sources for seed in range(config.seeds)]
    for source, seed in run.progress(cells, "sources and seeds"):
        setting = common.prepare(config, source, seed, config.spoiled_share)
        count = round(config.spoiled_share * config.tasks)
        shown = {
            "source": source,
            "stands_for": labels.STAND_INS.get(source, source),
            "seed": seed,
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
        for method in config.repeated if seed else config.methods:
            for row in one_method(config, setting, method, seed):
                run.row(**shown, **row)


def one_method(
    config: Config, setting: common.Setting, method: str, seed: int
) -> Iterator[dict[str, object]]:
    """The rows of a method; after task-IF's those of no edit, and of training from the start."""

    def rank() -> tuple[Implicit, torch.Tensor]:
        # the inner problems solved once more: nothing of another method is used
        state = Implicit(setting.problem, setting.fitted.lam)
        return state, baselines.scores(
            method, state, setting.tests, setting.fitted, seed=seed, solver=common.robust
        )

    (state, scores), rank_seconds = timed(rank)
    found = common.most_harmful(scores, round(config.spoiled_share * config.tasks))
    retrained, retrain_seconds = timed(partial(setting.without, found))
    row: dict[str, object] = {
        "kind": "method",
        "method": method,
        "rank_seconds": rank_seconds,
        "retrain_seconds": retrain_seconds,
        "detection_auc": auroc(-scores.cpu(), setting.spoiled),
    }
    if method in estimators.METHODS or method == labels.EKFAC:
        edited, row["edit_seconds"] = timed(partial(edit, state, found, method, seed))
        yield row | setting.compare(edited, retrained)
    else:
        yield row | {"retrain_accuracy": setting.accuracy(retrained)}
    if method != labels.TASK_IF:
        return
    yield {
        "kind": "method",
        "method": labels.NO_EDIT,
        **setting.compare(setting.fitted.lam, retrained),
    }
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
    yield {
        "kind": "scratch",
        "method": labels.FROM_SCRATCH,
        "retrain_accuracy": setting.accuracy(fresh.lam),
        "retrain_seconds": seconds,
    }


def edit(state: Implicit, found: list[int], method: str, seed: int) -> torch.Tensor:
    """lam* plus the sum of the predicted effects of removing the tasks: one solve."""
    if method == labels.EKFAC:
        side = state.task_gradients(found).T @ state.problem.task_weights[found]
        return state.lam + baselines.ekfac(state, seed).solve(side)[0]
    chosen = estimators.METHODS[method]
    side = state.task_gradients(found, direct=chosen.direct).T @ state.problem.task_weights[found]
    return state.lam + common.robust(partial(state.product, curvature=chosen.curvature), side)[0]
