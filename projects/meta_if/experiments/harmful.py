"""Harmful-task figure: how many of the spoiled tasks are found when the tasks are inspected from
the most harmful on.
"""

from itertools import product
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt

from projects.meta_if import baselines, labels
from projects.meta_if.data import Source
from projects.meta_if.experiments import common
from shared import experiment
from shared.influence.evaluate import auroc

CURVE_POINTS = 11  # of a curve, from nothing inspected to all


class Config(common.Config):
    """The problem with spoiled tasks, and what looks for them."""

    source: Source
    """Where the tasks' images come from."""
    settings: list[Literal["permuted labels", "permuted labels, shown in the images"]]
    """How tasks are spoiled, `labels.PERMUTED` or `labels.SHORTCUT`."""
    spoiled_shares: list[float] = Field(min_length=1)
    """Shares of the tasks that are spoiled."""
    seeds: PositiveInt
    """Runs of a setting and share: each draws tasks, which are spoiled, and the body."""
    methods: list[str] = Field(min_length=1)
    """What ranks the tasks, of `baselines.SCORES`."""
    retrained: list[str]
    """Of these, what the problem is retrained for, in the first run: without the spoiled tasks that
    were found."""
    inspected_share: float = Field(gt=0, le=1)
    """Share of the tasks that is inspected before the retraining."""


def run(config: Config, run: experiment.Run) -> None:
    cells = list(product(config.settings, config.spoiled_shares, range(config.seeds)))
    for kind, share, seed in run.progress(cells, "settings, shares and seeds"):
        setting = common.prepare(
            config, config.source, seed, share, shortcut=kind == labels.SHORTCUT
        )
        spoiled = setting.spoiled.numpy()
        before = setting.accuracy(setting.fitted.lam)
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
            shown = {"setting": kind, "spoiled_share": share, "seed": seed, "method": method}
            accuracy = None
            if method in config.retrained and seed == 0:
                inspected = order[: round(config.inspected_share * config.tasks)]
                accuracy = setting.accuracy(
                    setting.without([task for task in inspected if spoiled[task]])
                )
            run.row(
                **shown,
                kind="summary",
                detection_auc=auroc(-scores.cpu(), spoiled),
                accuracy=accuracy,
                before_accuracy=before,
            )
            found = np.concatenate([[0], np.cumsum(spoiled[order])]) / spoiled.sum()
            for inspected in np.linspace(0, 1, CURVE_POINTS):
                run.row(
                    **shown,
                    kind="curve",
                    inspected_share=float(inspected),
                    found_share=float(found[round(inspected * config.tasks)]),
                )
