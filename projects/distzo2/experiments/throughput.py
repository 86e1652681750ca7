"""Table "throughput": steps of one global batch by one process and by several, in turns.

A Llama-shaped model of `layers` x `hidden` at the cpu scale; OPT's shapes on GPUs.
"""

from pydantic import Field

from projects.distzo2.experiments._launch import launch
from projects.distzo2.experiments._shape import ShapeConfig, by_world
from shared import experiment


class Config(ShapeConfig):
    """See `ShapeConfig`. On one machine with two cores only two ranks can show a gain of
    wall time.
    """

    alone_threads: list[int] = [1, 2]
    repeats: int = Field(default=5, ge=1)


def run(config: Config, run: experiment.Run) -> None:
    model = config.model or f"llama {config.layers} x {config.hidden}"
    tokens = config.shares * config.batch_size * config.tokens
    for world, modes in run.progress(list(by_world(config.modes).items()), "launches"):
        for rank, rows in enumerate(
            launch("throughput", world, {**config.model_dump(), "modes": modes})
        ):
            for row in rows:
                run.row(model=model, ranks=world, rank=rank, tokens=tokens, **row)
