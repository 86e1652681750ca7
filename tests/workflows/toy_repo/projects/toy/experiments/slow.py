"""Takes `seconds`; stands for an experiment that is killed or fails."""

import time
from pathlib import Path

from pydantic import Field

from shared import experiment


class Config(experiment.Config):
    seconds: float = Field(ge=0)
    fails: bool = False


def run(config: Config, run: experiment.Run) -> None:
    run.log("slow has begun")
    time.sleep(config.seconds)
    if config.fails or Path("fail").exists():
        raise RuntimeError("this experiment fails")
    run.row(slept_seconds=config.seconds)
