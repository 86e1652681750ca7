"""Table and figure "lanes": what the four lanes of each rank do during one step, with whole blocks
and with slices.

The supplementary's figure 1 shows the same of four GPUs. Here the link to the host is emulated:
lanes wait.
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
    link_megabytes_per_second: float = Field(gt=0)
    """of the emulated link that the ranks share"""


def run(config: Config, run: experiment.Run) -> None:
    for world, ranks in launch_modes("lanes", config, run):
        for rank, rows in enumerate(ranks):
            for row in rows:
                run.row(ranks=world, rank=rank, **row)


def on_rank(config: dict[str, Any], folder: Path) -> Rows:
    """What each lane of this rank does during one step over an emulated link, in seconds from the
    step's start.
    """
    rows: Rows = []
    rate = 1e6 * config["link_megabytes_per_second"] / dist.get_world_size()
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder, trace=True)
        emulate_link(ddp.engine, rate)
        for step in range(3):
            ddp.step(make_batch(config, step, config["shares"]))
        dist.barrier()
        start = perf_counter()
        ddp.step(make_batch(config, 3, config["shares"]))
        end = perf_counter()
        dist.barrier()
        for span in ddp.engine.spans:
            if span.end > start and span.start < end:
                own = {
                    "begin_seconds": max(span.start, start) - start,
                    "end_seconds": min(span.end, end) - start,
                }
                rows.append(
                    {
                        "mode": mode,
                        "lane": span.lane,
                        "block": span.block,
                        **own,
                        "step_seconds": end - start,
                    }
                )
        ddp.engine.close()
    return rows
