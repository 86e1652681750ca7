"""Agreement with retraining without a task: each estimator of the total Hessian, and the baselines,
over seeds.
"""

import numpy as np
from pydantic import Field, PositiveInt

from projects.meta_if import baselines, estimators
from projects.meta_if.data import Source
from projects.meta_if.experiments import common
from shared import experiment
from shared.influence.evaluate import cosine, pearson, relative_error, spearman
from shared.seeding import step_seed


class Config(common.Config):
    """The problem, and the tasks that are left out."""

    source: Source
    """Where the tasks' images come from."""
    seeds: PositiveInt
    """Runs: each draws tasks, the body, and which tasks are left out."""
    removed: PositiveInt
    """Tasks left out one at a time."""
    methods: list[str] = Field(min_length=1)
    """What predicts the change, of `baselines.SCORES`."""


def run(config: Config, run: experiment.Run) -> None:
    for seed in run.progress(range(config.seeds), "seeds"):
        setting = common.prepare(config, config.source, seed)
        state, lam = setting.state, setting.fitted.lam
        draw = np.random.default_rng(step_seed(seed, "left out"))
        left_out = draw.permutation(config.tasks)[: config.removed].tolist()
        trained = [setting.without([task]) for task in run.progress(left_out, "tasks left out")]
        before = setting.loss(lam)
        true = [setting.loss(one) - before for one in trained]
        changes = np.stack([(one - lam).numpy(force=True) for one in trained])
        slope = estimators.metric_gradient(setting.tests, lam)
        accuracies = {
            "start_accuracy": setting.accuracy(setting.start),
            "accuracy": setting.accuracy(lam),
        }
        for method in config.methods:
            row: dict[str, object] = {}
            # by its matrix, for the four terms are not positive definite and have no CG
            if method in estimators.METHODS:
                s, _ = estimators.adjoint(state, slope, method, setting.solver(method))
                scores = estimators.task_scores(state, s, method)
                effects = estimators.task_removal(state, left_out, method, setting.solver(method))[
                    0
                ].T.numpy(force=True)
                row["cosine"] = float(np.mean(cosine(effects, changes)))
                row["relative_error"] = float(np.mean(relative_error(effects, changes)))
                row["smallest_eigenvalue_scale"] = float(
                    np.linalg.eigvalsh(setting.matrices[method].numpy(force=True))[0]
                )
            else:
                scores = baselines.scores(method, state, setting.tests, setting.fitted, seed=seed)
            predicted = scores[left_out].numpy(force=True)
            run.row(
                seed=seed,
                method=method,
                loss_correlation=pearson(predicted, true),
                loss_rank_correlation=spearman(predicted, true),
                left_out_tasks=len(left_out),
                gradient_norm=setting.fitted.gradient_norm,
                **accuracies,
                **row,
            )
