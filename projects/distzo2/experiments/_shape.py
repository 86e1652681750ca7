"""What the experiments share: the shape of the model and of a step."""

from typing import Literal

from pydantic import Field

from projects.distzo2.experiments._ranks import MODES, world_of
from shared import experiment
from shared.models.shapes import OPT_SHAPES

Mode = Literal[tuple(MODES)]  # type: ignore[valid-type]


class ShapeConfig(experiment.Config):
    """A Llama-shaped model with random weights on random tokens: neither bits, bytes nor speed
    depend on what they are.

    A step's global batch is `shares` micro-batches of `batch_size` x `tokens`, whatever the number
    of ranks. `model` names one of OPT's shapes, which takes the place of `layers`, `hidden`,
    `heads` and `vocabulary`.
    """

    model: Literal["", *OPT_SHAPES] = ""  # type: ignore[valid-type]
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    layers: int = Field(default=4, ge=1)
    hidden: int = Field(default=64, ge=8)
    heads: int = Field(default=4, ge=1)
    vocabulary: int = Field(default=512, ge=16)
    tokens: int = Field(default=32, ge=2)
    batch_size: int = Field(default=1, ge=1)
    shares: int = Field(default=4, ge=1)
    lr: float = Field(default=1e-5, gt=0)
    modes: list[Mode]


def by_world(modes: list[str]) -> dict[int, list[str]]:
    """Modes by the number of ranks they take: one launch serves all of one world size."""
    found: dict[int, list[str]] = {}
    for mode in modes:
        found.setdefault(world_of(mode), []).append(mode)
    return found
