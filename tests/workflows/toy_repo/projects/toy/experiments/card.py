"""Never runs in the tests: it is there to be planned."""

from shared import experiment


class Config(experiment.Config):
    pass


def run(config: Config, run: experiment.Run) -> None:
    raise RuntimeError("no GPU in the tests")
