"""Table and figure "lanes": what the four lanes of each rank do during one step, with whole blocks
and with slices.

The supplementary's figure 1 shows the same of four GPUs. Here the link to the host is emulated:
lanes wait.
"""

from pydantic import Field

from projects.distzo2.experiments._launch import launch
from projects.distzo2.experiments._shape import ShapeConfig, by_world
from shared import experiment


class Config(ShapeConfig):
    """See `ShapeConfig`."""

    link_megabytes_per_second: float = Field(default=100.0, gt=0)


def run(config: Config, run: experiment.Run) -> None:
    for world, modes in run.progress(list(by_world(config.modes).items()), "launches"):
        for rank, rows in enumerate(
            launch("lanes", world, {**config.model_dump(), "modes": modes})
        ):
            for row in rows:
                run.row(ranks=world, rank=rank, **row)
