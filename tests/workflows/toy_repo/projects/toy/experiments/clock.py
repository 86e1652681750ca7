"""Table 2: a timing."""

import time

from shared import experiment


class Config(experiment.Config):
    pass


def run(config: Config, run: experiment.Run) -> None:
    start = time.perf_counter()
    run.row(step="nothing", step_seconds=time.perf_counter() - start)
