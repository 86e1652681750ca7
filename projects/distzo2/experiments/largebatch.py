"""Table and figure "largebatch": the loss of each step for small and large global batches, which
ranks share out.

The supplementary's figure 3 shows the same of OPT-13B with a batch of 256.
"""

import math

from pydantic import Field

from projects.distzo2.experiments._launch import check_device, launch
from projects.distzo2.experiments._shape import Mode, by_world
from projects.distzo2.experiments._tasks import TaskConfig, TaskName, make_task
from shared import experiment


class Config(TaskConfig):
    task: TaskName = "digits"
    modes: list[Mode] = ["DDP"]
    batch_sizes: list[int] = Field(default=[16, 64, 256], min_length=2)
    test_rows: int = Field(default=360, ge=1)
    steps: int = Field(default=1000, ge=20)
    lr: float = Field(default=2e-3, gt=0)


def run(config: Config, run: experiment.Run) -> None:
    check_device("largebatch", config.device, 1)
    make_task(config.model_dump())  # what is missing is said here, before ranks are started
    for world, modes in run.progress(list(by_world(config.modes).items()), "launches"):
        for one in launch("train", world, {**config.model_dump(), "modes": modes})[0]:
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
