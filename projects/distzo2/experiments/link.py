"""Table "link": whole blocks against slices when the link to the host is slow. The link is
emulated: lanes wait.

Two ranks of one machine share a link of so many bytes a second, as those of a node share their bus:
with whole blocks each rank has a half of it for all of the block, with slices a half of it for a
half.
"""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch.distributed as dist
from pydantic import Field

from projects.distzo2.experiments.common import Rows, ShapeConfig, launch_modes
from projects.distzo2.experiments.engines import emulate_link, make_batch, make_engine
from shared import experiment


class Config(ShapeConfig):
    link_megabytes_per_second: list[float] = Field(min_length=2)
    """of the link that the ranks share; 0 is the link as it is, all others are emulated"""
    repeats: int = Field(ge=1)
    """recorded steps at each rate"""


def run(config: Config, run: experiment.Run) -> None:
    for world, ranks in launch_modes("link", config, run):
        for rank, rows in enumerate(ranks):
            for row in rows:
                rate = row.pop("link_megabytes_per_second")
                run.row(
                    ranks=world,
                    rank=rank,
                    emulated=rate > 0,
                    link_gigabytes_per_second=rate / 1000,
                    **row,
                )


def on_rank(config: dict[str, Any], folder: Path) -> Rows:
    """Seconds of a step when the ranks share a link to the host of so many bytes a second, which is
    emulated by waiting.
    """
    rows: Rows = []
    world = dist.get_world_size()
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder)
        for megabytes in config["link_megabytes_per_second"]:
            remove = emulate_link(ddp.engine, 1e6 * megabytes / world)
            ddp.step(make_batch(config, 0, config["shares"]))
            before = ddp.engine.traffic.bytes_up
            for repeat in range(config["repeats"]):
                dist.barrier()
                start = perf_counter()
                ddp.step(make_batch(config, repeat, config["shares"]))
                dist.barrier()
                seconds = perf_counter() - start
                row = {
                    "mode": mode,
                    "link_megabytes_per_second": megabytes,
                    "repeat": repeat,
                    "step_seconds": seconds,
                }
                rows.append({**row, "uploaded_bytes": ddp.engine.traffic.bytes_up - before})
                before = ddp.engine.traffic.bytes_up
            remove()
        ddp.engine.close()
    return rows
