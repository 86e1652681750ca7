"""Harmful-task figure: how many of the spoiled tasks are found when the tasks are inspected from
the most harmful on.
"""

import numpy as np
from pydantic import PositiveInt

from projects.meta_if import baselines
from projects.meta_if.episodes import Source
from projects.meta_if.experiments import common
from shared import experiment
from shared.influence.evaluate import auroc


class Config(common.Config):
    source: Source = "mnist"
    spoiled_shares: list[float] = [0.2, 0.4, 0.8]
    seeds: PositiveInt = 1
    methods: list[str] = [
        "task-IF", "task-IF (Gamma)", "Gauss-Newton (TLXML)", "direct-IF", "EK-FAC", "TracIn",
        "loss value", "gradient norm", "random",
    ]  # fmt: skip
    retrained: list[str] = ["task-IF", "loss value", "random"]
    # what is inspected before those of `retrained` retrain without the spoiled tasks they found
    inspected_share: float = 0.25


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
            common = {"spoiled_share": share, "seed": seed, "method": method}
            accuracy = None
            if method in config.retrained:
                inspected = order[: round(config.inspected_share * config.tasks)]
                accuracy = setting.accuracy(
                    setting.without([task for task in inspected if spoiled[task]])
                )
            run.row(
                **common,
                kind="summary",
                detection_auc=auroc(-scores.cpu(), spoiled),
                accuracy=accuracy,
                before_accuracy=setting.accuracy(setting.fitted.lam),
            )
            found = np.concatenate([[0], np.cumsum(spoiled[order])]) / spoiled.sum()
            for number, value in enumerate(found):
                run.row(
                    **common,
                    kind="curve",
                    inspected_share=number / config.tasks,
                    found_share=float(value),
                )
