"""Table "memory": the most bytes that a rank has on the device in a step, against the number of
ranks and of blocks.
"""

from pydantic import Field

from projects.distzo2.experiments._launch import launch
from projects.distzo2.experiments._shape import ShapeConfig, by_world
from shared import experiment


class Config(ShapeConfig):
    """See `ShapeConfig`; `depths` replaces `layers`."""

    depths: list[int] = Field(default=[4, 12], min_length=1)


def run(config: Config, run: experiment.Run) -> None:
    for world, modes in run.progress(list(by_world(config.modes).items()), "launches"):
        for rank, rows in enumerate(
            launch("memory", world, {**config.model_dump(), "modes": modes})
        ):
            for row in rows:
                run.row(ranks=world, rank=rank, **row)
