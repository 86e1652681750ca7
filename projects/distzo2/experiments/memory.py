"""Table "memory": the most bytes that a rank has on the device in a step, against the number of
ranks and of blocks.
"""

import gc
import resource
from pathlib import Path
from typing import Any

from pydantic import Field

from projects.distzo2.experiments.common import Rows, ShapeConfig, launch_modes
from projects.distzo2.experiments.engines import make_batch, make_engine
from shared import experiment, meters


class Config(ShapeConfig):
    depths: list[int] = Field(min_length=1)
    """numbers of blocks, in place of `layers`"""


def run(config: Config, run: experiment.Run) -> None:
    for world, ranks in launch_modes("memory", config, run):
        for rank, rows in enumerate(ranks):
            for row in rows:
                run.row(ranks=world, rank=rank, **row)


def on_rank(config: dict[str, Any], folder: Path) -> Rows:
    """The most bytes that torch hands out on this rank in a step, for each depth."""
    rows: Rows = []
    for mode in config["modes"]:
        for layers in config["depths"]:
            deep = {**config, "layers": layers}
            if config["device"] == "cpu":
                with meters.live_bytes() as meter:
                    ddp = make_engine(mode, deep, folder)
                    gc.collect()
                    ddp.step(make_batch(deep, 0, config["shares"]))
                    with meter.phase("step"):
                        ddp.step(make_batch(deep, 1, config["shares"]))
                    ddp.engine.close()
                counter, device_peak = "allocator", meter.peak_bytes("step")
            else:
                with meters.cuda_peak_bytes(config["device"]) as peaks:
                    ddp = make_engine(mode, deep, folder)
                    ddp.step(make_batch(deep, 0, config["shares"]))
                    ddp.step(make_batch(deep, 1, config["shares"]))
                    ddp.engine.close()
                counter, device_peak = "cuda_allocator", peaks()["cuda_allocator"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            row = {
                "mode": mode,
                "layers": layers,
                "counter": counter,
                "device_peak_bytes": device_peak,
            }
            rows.append({**row, "process_peak_bytes": peak})
            del ddp
            gc.collect()
    return rows
