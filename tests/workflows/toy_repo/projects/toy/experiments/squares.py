"""Table 1: squares."""

from typing import Literal

import numpy as np
from projects.toy.method import square
from pydantic import Field

from shared import experiment


class Config(experiment.Config):
    numbers: list[int] = Field(min_length=1)
    factor_scale: float = Field(default=1.0, gt=0)
    mode: Literal["exact", "rough"] = "exact"


def run(config: Config, run: experiment.Run) -> None:
    for number in run.progress(config.numbers, "numbers"):
        run.row(
            number=number,
            square=square(number),
            scaled_ratio=config.factor_scale * square(number),
            mode=config.mode,
        )
    run.array("grid", np.arange(len(config.numbers), dtype=np.float64))
