"""One row per process that torchrun started."""

import os

from shared import experiment


class Config(experiment.Config):
    pass


def run(config: Config, run: experiment.Run) -> None:
    run.row(rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]))
