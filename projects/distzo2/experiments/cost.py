"""Table "cost": steps of one process and of two, of several sizes, to fit the cost model on some
and to hold it against the others.

One row a step and rank: seconds, and what each lane moved and how long it was at it. The rates come
from rows of kind "fit": those of computing from steps of ZO2, those of links and exchange from how
long the lanes of DDP were at it. PertP at any size, and every mode at the sizes and over the
emulated links that are held out, tell the fit nothing. All in turns, in one run.

`processes` is how many ranks work at the same time: in the mode "ZO2, twice" both make the same
steps and say nothing to one another, which tells what a second busy core costs the first.
"""

from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field

from projects.distzo2 import DistZO2
from projects.distzo2.experiments.common import ModelConfig, Rows, launch
from projects.distzo2.experiments.engines import (
    emulate_link,
    make_batch,
    make_engine,
    make_model,
    options,
)
from projects.distzo2.labels import (
    DDP,
    FIT,
    GATHER,
    HELD_OUT,
    LANES,
    PERTP,
    SLICED,
    ZO2_TWICE,
)
from projects.distzo2.labels import ZO2 as ZO2_LABEL
from projects.zo2 import ZO2
from shared import experiment


class Case(BaseModel):
    """A size of the model and of a sequence."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    layers: int = Field(ge=1)
    """blocks"""
    hidden: int = Field(ge=8)
    """width of a block"""
    heads: int = Field(ge=1)
    """attention heads"""
    tokens: int = Field(ge=2)
    """of a sequence"""
    fit: bool
    """whether the rates may be fitted on it"""


class Config(ModelConfig):
    cases: list[Case] = Field(min_length=4)
    """sizes"""
    modes: list[Literal[PERTP, PERTP + SLICED, DDP, DDP + SLICED]]  # type: ignore[valid-type]
    """modes of two ranks"""
    link_megabytes_per_second: list[float]
    """of emulated links, on the cases that are held out"""
    repeats: int = Field(ge=1)
    """recorded rounds"""


def run(config: Config, run: experiment.Run) -> None:
    values = {**config.model_dump(), "model": "", "dtype": "float32", "device": "cpu"}
    for rank, rows in enumerate(launch("cost", 2, values)):
        for row in rows:
            run.row(rank=rank, **row)


def on_rank(config: dict[str, Any], folder: Path) -> Rows:
    """Steps of each case and mode in turns, with what each lane did in them; and how long the ranks
    take to gather their losses.
    """
    rank = dist.get_rank()
    # what the row says, who, the case, bytes a second
    work: list[tuple[dict[str, Any], ZO2 | DistZO2, dict[str, Any], float]] = []
    for case in config["cases"]:
        own = {**config, **case}
        said = {
            "kind": FIT if case["fit"] else HELD_OUT,
            "shape": f"{case['layers']} x {case['hidden']}",
        }
        said |= {
            name: own[name]
            for name in (
                "layers",
                "hidden",
                "heads",
                "vocabulary",
                "tokens",
                "batch_size",
                "shares",
            )
        }
        alone = ZO2(make_model(own), storage="ram", **options(own, trace=True))
        work += [
            ({**said, "mode": mode, "processes": count}, alone, own, 0.0)
            for mode, count in ((ZO2_LABEL, 1), (ZO2_TWICE, 2))
        ]
        for mode in config["modes"]:
            ddp = make_engine(mode, own, folder, trace=True)
            said_too = {**said, "mode": mode, "processes": 2}
            if PERTP in mode:
                said_too["kind"] = HELD_OUT
            rates = (
                [0.0]
                if case["fit"] or PERTP in mode
                else [0.0, *config["link_megabytes_per_second"]]
            )
            work += [(said_too, ddp, own, 1e6 * rate) for rate in rates]
    rows: Rows = []
    for repeat in range(-1, config["repeats"]):
        for said, who, own, rate in work:
            engine = who.engine if isinstance(who, DistZO2) else who
            remove = emulate_link(engine, rate / 2)
            batch = make_batch(own, repeat + 1, own["shares"])
            before = moved(who)
            engine.spans.clear()
            dist.barrier()
            start = perf_counter()
            if said["processes"] == 2 or rank == 0:
                who.step(batch)
            seconds = perf_counter() - start
            dist.barrier()
            up, down, exchanged = (b - a for a, b in zip(before, moved(who), strict=True))
            remove()
            if repeat < 0 or (said["processes"] == 1 and rank > 0):
                continue
            busy = {
                f"{lane}_busy_seconds": sum(s.end - s.start for s in engine.spans if s.lane == lane)
                for lane in LANES
            }
            nbytes = {
                "uploaded_bytes": up,
                "offloaded_bytes": down,
                "exchanged_bytes": exchanged,
            }
            link = {"emulated": rate > 0, "link_gigabytes_per_second": rate / 1e9}
            rows.append(
                {**said, **link, "repeat": repeat, "step_seconds": seconds, **busy, **nbytes}
            )
    return [*rows, *gathers()]


def moved(who: ZO2 | DistZO2) -> tuple[int, int, int]:
    """Bytes so far: up, down, exchanged."""
    traffic = (who.engine if isinstance(who, DistZO2) else who).traffic
    exchanged = who.exchanged.total() if isinstance(who, DistZO2) else 0
    return traffic.bytes_up, traffic.bytes_down, exchanged


def gathers(repeats: int = 50) -> Rows:
    """How long the ranks take to gather their losses."""
    scalars = torch.zeros(3, 1, dtype=torch.float64)
    gathered = [torch.empty_like(scalars) for _ in range(dist.get_world_size())]
    rows: Rows = []
    for repeat in range(repeats):
        start = perf_counter()
        dist.all_gather(gathered, scalars)
        seconds = perf_counter() - start
        rows.append({"kind": GATHER, "processes": 2, "repeat": repeat, "step_seconds": seconds})
    return rows
