"""Table "link": whole blocks against slices when the link to the host is slow. The link is
emulated: lanes wait.

Two ranks of one machine share a link of so many bytes a second, as those of a node share their bus:
with whole blocks each rank has a half of it for all of the block, with slices a half of it for a
half.
"""

from pydantic import Field

from projects.distzo2.experiments._launch import launch
from projects.distzo2.experiments._shape import ShapeConfig, by_world
from shared import experiment


class Config(ShapeConfig):
    """See `ShapeConfig`; a rate of 0 is the link as it is."""

    link_megabytes_per_second: list[float] = Field(
        default=[0.0, 400.0, 200.0, 100.0, 50.0], min_length=2
    )
    repeats: int = Field(default=3, ge=1)


def run(config: Config, run: experiment.Run) -> None:
    for world, modes in run.progress(list(by_world(config.modes).items()), "launches"):
        for rank, rows in enumerate(launch("link", world, {**config.model_dump(), "modes": modes})):
            for row in rows:
                rate = row.pop("link_megabytes_per_second")
                run.row(
                    ranks=world,
                    rank=rank,
                    emulated=rate > 0,
                    link_gigabytes_per_second=rate / 1000,
                    **row,
                )
