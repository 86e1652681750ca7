"""Table "sequence_length": throughput and memory of every method against the length of the
sequences, at one number of tokens.
"""

from projects.flashdp.experiments.common import SpeedConfig, measure
from shared import experiment


class Config(SpeedConfig):
    """See `SpeedConfig`."""


def run(config: Config, run: experiment.Run) -> None:
    measure(config, run)
