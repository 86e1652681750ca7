"""Table "cost": steps of one process and of two, of several sizes, to fit the cost model on some
and to hold it against the others.

One row a step and rank: seconds, and what each lane moved and how long it was at it. The rates come
from rows of kind "fit": those of computing from steps of ZO2, those of links and exchange from how
long the lanes of DDP were at it. PertP at any size, and every mode at the sizes and over the
emulated links that are held out, tell the fit nothing. All in turns, in one run.

`processes` is how many ranks work at the same time: in the mode "ZO2, twice" both make the same
steps and say nothing to one another, which tells what a second busy core costs the first.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from projects.distzo2.experiments._launch import launch
from shared import experiment


class Case(BaseModel):
    """A size, as in `ShapeConfig`; `fit`: the rates may be fitted on it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layers: int = Field(ge=1)
    hidden: int = Field(ge=8)
    heads: int = Field(ge=1)
    tokens: int = Field(ge=2)
    fit: bool = False


class Config(experiment.Config):
    """`link_megabytes_per_second`: of emulated links, on the cases that are held out."""

    cases: list[Case] = Field(min_length=4)
    vocabulary: int = Field(default=1024, ge=16)
    batch_size: int = Field(default=1, ge=1)
    shares: int = Field(default=2, ge=1)
    lr: float = Field(default=1e-5, gt=0)
    modes: list[Literal["PertP", "PertP, sliced", "DDP", "DDP, sliced"]]
    link_megabytes_per_second: list[float] = []
    repeats: int = Field(default=4, ge=1)


def run(config: Config, run: experiment.Run) -> None:
    values = {**config.model_dump(), "model": "", "dtype": "float32", "device": "cpu"}
    for rank, rows in enumerate(launch("cost", 2, values)):
        for row in rows:
            run.row(rank=rank, **row)
