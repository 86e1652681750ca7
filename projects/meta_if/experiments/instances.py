"""Main table, instance rows: single training and validation samples left out, and a tenth of them
removed by editing.
"""

from functools import partial

import numpy as np
import torch
from pydantic import Field, PositiveInt

from projects.meta_if import estimators, labels
from projects.meta_if.data import Source
from projects.meta_if.experiments import common
from projects.meta_if.experiments.common import timed
from shared import experiment
from shared.influence.baselines import chance
from shared.influence.evaluate import cosine, pearson, relative_error, spearman
from shared.seeding import step_seed


class Config(common.Config):
    """The problem, and the samples that are left out."""

    cells: list[tuple[Source, PositiveInt]] = Field(min_length=1)
    """Where the tasks' images come from, and seeds of each source."""
    samples: PositiveInt
    """Samples left out one at a time, of each level."""
    removed_share: float = Field(gt=0, lt=1)
    """Share of the samples that is removed at once, the most harmful ones."""


def run(config: Config, run: experiment.Run) -> None:
    for source, seed in run.progress(
        [(source, seed) for source, seeds in config.cells for seed in range(seeds)],
        "sources and seeds",
    ):
        setting = common.prepare(config, source, seed)
        for level in ("train", "val"):
            for method, row in one_level(config, setting, level, seed).items():
                run.row(
                    source=source,
                    stands_for=labels.STAND_INS.get(source, source),
                    seed=seed,
                    level=level,
                    method=method,
                    **row,
                )


def one_level(
    config: Config, setting: common.Setting, level: str, seed: int
) -> dict[str, dict[str, float]]:
    """By method: correlations over single removals, then accuracy and seconds of removing many."""
    problem, state, lam = setting.problem, setting.state, setting.fitted.lam
    per_task = (problem.tasks.y_train if level == "train" else problem.tasks.y_val).shape[1]
    of_level = {
        "train": (estimators.train_scores, estimators.train_removal),
        "val": (estimators.val_scores, estimators.val_removal),
    }
    all_scores, removal = of_level[level]

    slope = estimators.metric_gradient(setting.tests, lam)

    def score() -> torch.Tensor:
        s, _ = estimators.adjoint(
            state, estimators.metric_gradient(setting.tests, lam), solver=common.robust
        )
        return all_scores(state, s)

    scores, score_seconds = timed(score)
    others = {
        labels.GRADIENT_DOT: all_scores(state, slope),
        labels.RANDOM: chance(scores.numel(), seed).view_as(scores),
    }
    draw = np.random.default_rng(step_seed(seed, "instances", level))
    chosen = [
        divmod(int(one), per_task)
        for one in draw.permutation(problem.n * per_task)[: config.samples]
    ]
    before, true, effects, changes = setting.loss(lam), [], [], []
    for task, sample in chosen:
        without = setting.retrain(
            **{f"{level}_weights": _mask(problem.n, per_task, [(task, sample)])}
        )
        true.append(setting.loss(without) - before)
        changes.append((without - lam).numpy(force=True))
        effects.append(
            removal(state, task, [sample], setting.solver(labels.TASK_IF))[0][:, 0].numpy(
                force=True
            )
        )

    count = round(config.removed_share * scores.numel())
    harmful = [divmod(one, per_task) for one in common.most_harmful(scores.flatten(), count)]
    weights = _mask(problem.n, per_task, harmful)
    retrained, retrain_seconds = timed(partial(setting.retrain, **{f"{level}_weights": weights}))

    def edit() -> torch.Tensor:
        # at the same solutions: the weights enter linearly
        gone = problem.with_weights(**{f"{level}_weights": 1 - weights})
        effect = _many(state, gone, level)
        return lam + common.robust(state.product, effect)[0]

    edited, edit_seconds = timed(edit)

    def agreement(values: torch.Tensor) -> dict[str, float]:
        predicted = [float(values[place]) for place in chosen]
        return {
            "loo_correlation": pearson(predicted, true),
            "loo_rank_correlation": spearman(predicted, true),
        }

    own = {
        "loo_cosine": float(np.mean(cosine(np.stack(effects), np.stack(changes)))),
        "loo_relative_error": float(np.mean(relative_error(np.stack(effects), np.stack(changes)))),
        "removed_samples": count,
        "score_seconds": score_seconds,
        "edit_seconds": edit_seconds,
        "retrain_seconds": retrain_seconds,
    }
    return {
        labels.INSTANCE_IF: agreement(scores) | own | setting.compare(edited, retrained),
        labels.NO_EDIT: setting.compare(lam, retrained),
        **{name: agreement(values) for name, values in others.items()},
    }


def _many(state, gone, level: str) -> torch.Tensor:
    """The right-hand side of removing many samples at once, [q]: the sum of theirs, task by
    task.
    """
    total = torch.zeros_like(state.lam)
    weights = gone.data[2 if level == "train" else 5]
    for task in range(gone.n):
        samples = weights[task].nonzero().flatten().tolist()
        if samples and level == "train":
            total = total - (
                weights[task, samples] * gone.task_weights[task]
            ) @ state.train_gradients(task, samples)
        elif samples:
            total = total + (
                weights[task, samples] * gone.task_weights[task]
            ) @ state.val_gradients(task, samples)
    return total


def _mask(n: int, per_task: int, removed: list[tuple[int, int]]) -> torch.Tensor:
    weights = torch.ones(n, per_task, dtype=torch.float64)
    for task, sample in removed:
        weights[task, sample] = 0
    return weights
