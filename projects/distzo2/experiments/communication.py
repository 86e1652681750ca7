"""Table "communication": what each rank sends and moves in a step, beside first-order data
parallelism of the same model.
"""

from pydantic import Field

from projects.distzo2.experiments import _ranks
from projects.distzo2.experiments._launch import launch
from projects.distzo2.experiments._shape import ShapeConfig, by_world
from shared import experiment


class Config(ShapeConfig):
    """See `ShapeConfig`."""

    steps: int = Field(default=4, ge=1)


def run(config: Config, run: experiment.Run) -> None:
    parameters = sum(p.numel() for p in _ranks.empty_model(config.model_dump()).parameters())
    for world, modes in run.progress(list(by_world(config.modes).items()), "launches"):
        for rank, rows in enumerate(
            launch("communication", world, {**config.model_dump(), "modes": modes})
        ):
            for row in rows:
                dp = 1 if row["mode"] == "first-order DDP" else _ranks.MODES[row["mode"]][0]
                micro_batches = -(-config.shares // dp)
                run.row(
                    ranks=world,
                    rank=rank,
                    parameters=parameters,
                    micro_batches=micro_batches,
                    **row,
                )
