"""Table and figure "largebatch": the loss of each step for small and large global batches, which
ranks share out.

The supplementary's figure 3 shows the same of OPT-13B with a batch of 256.
"""

import math

from pydantic import Field

from projects.distzo2.data import make_task
from projects.distzo2.experiments.common import TrainConfig, by_world, check_device, launch
from projects.distzo2.experiments.training import on_rank
from shared import experiment

__all__ = ["Config", "on_rank", "run"]


class Config(TrainConfig):
    batch_sizes: list[int] = Field(min_length=2)
    """examples of a step's global batch"""


def run(config: Config, run: experiment.Run) -> None:
    check_device("largebatch", config.device, 1)
    make_task(config.model_dump())  # what is missing is said here, before ranks are started
    for world, modes in run.progress(list(by_world(config.modes).items()), "launches"):
        for one in launch("largebatch", world, {**config.model_dump(), "modes": modes})[0]:
            common = {
                "task": config.task,
                "mode": one["mode"],
                "ranks": world,
                "batch_size": one["batch_size"],
            }
            for number, loss in enumerate(one["losses"]):
                run.row(
                    **common,
                    kind="step",
                    step=number,
                    train_loss=loss if math.isfinite(loss) else None,
                )
            accuracy, loss = one["scores"]
            run.row(
                **common,
                kind="end",
                step=len(one["losses"]),
                test_accuracy=accuracy,
                test_loss=loss,
            )
