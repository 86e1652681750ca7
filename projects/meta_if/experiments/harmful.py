"""Harmful-task figure: how many of the spoiled tasks are found when the tasks are inspected from
the most harmful on.
"""

import numpy as np
from pydantic import Field, PositiveInt

from projects.meta_if import baselines
from projects.meta_if.episodes import Source
from projects.meta_if.experiments import common
from shared import experiment
from shared.influence.evaluate import auroc


class Config(common.Config):
    """The problem with spoiled tasks, and what looks for them."""

    source: Source
    """Where the tasks' images come from."""
    spoiled_shares: list[float] = Field(min_length=1)
    """Shares of the tasks whose labels are permuted."""
    seeds: PositiveInt
    """Runs of a share: each draws tasks, which are spoiled, and the body."""
    methods: list[str] = Field(min_length=1)
    """What ranks the tasks, of `baselines.SCORES`."""
    retrained: list[str]
    """Of these, what the problem is retrained for: without the spoiled tasks that were found."""
    inspected_share: float = Field(gt=0, le=1)
    """Share of the tasks that is inspected before the retraining."""


def run(config: Config, run: experiment.Run) -> None:
    cells = [(share, seed) for share in config.spoiled_shares for seed in range(config.seeds)]
    for share, seed in run.progress(cells, "shares and seeds"):
        setting = common.prepare(config, config.source, seed, share)
        spoiled = setting.spoiled.numpy()
        for method in config.methods:
            scores = baselines.scores(
                method,
                setting.state,
                setting.tests,
                setting.fitted,
                seed=seed,
                solver=common.robust,
            )
            order = common.most_harmful(scores, config.tasks)
            shown = {"spoiled_share": share, "seed": seed, "method": method}
            accuracy = None
            if method in config.retrained:
                inspected = order[: round(config.inspected_share * config.tasks)]
                accuracy = setting.accuracy(
                    setting.without([task for task in inspected if spoiled[task]])
                )
            run.row(
                **shown,
                kind="summary",
                detection_auc=auroc(-scores.cpu(), spoiled),
                accuracy=accuracy,
                before_accuracy=setting.accuracy(setting.fitted.lam),
            )
            found = np.concatenate([[0], np.cumsum(spoiled[order])]) / spoiled.sum()
            for number, value in enumerate(found):
                run.row(
                    **shown,
                    kind="curve",
                    inspected_share=number / config.tasks,
                    found_share=float(value),
                )
