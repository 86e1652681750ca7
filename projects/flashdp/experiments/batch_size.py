"""Table "batch_size" (the paper's table 1): throughput and memory of every method against the batch
size.
"""

from projects.flashdp.experiments.common import SpeedConfig, measure
from shared import experiment


class Config(SpeedConfig):
    """See `SpeedConfig`."""


def run(config: Config, run: experiment.Run) -> None:
    measure(config, run)
