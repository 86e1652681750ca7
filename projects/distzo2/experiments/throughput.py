"""Table "throughput": steps of one global batch by one process and by several, in turns.

A Llama-shaped model of `layers` x `hidden` at the cpu scale; OPT's shapes on GPUs.
"""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field

from projects.distzo2.experiments.common import Rows, ShapeConfig, launch_modes
from projects.distzo2.experiments.engines import make_batch, make_engine, make_model, options
from projects.distzo2.labels import one_process
from projects.zo2 import ZO2
from shared import experiment


class Config(ShapeConfig):
    """On one machine with two cores only two ranks can show a gain of wall time."""

    alone_threads: list[int] = Field(min_length=1)
    """of the one process that the ranks are compared with, while they rest"""
    repeats: int = Field(ge=1)
    """recorded rounds, in each of which every mode makes a step (6 make an interval)"""


def run(config: Config, run: experiment.Run) -> None:
    model = config.model or f"llama {config.layers} x {config.hidden}"
    tokens = config.shares * config.batch_size * config.tokens
    for world, ranks in launch_modes("throughput", config, run):
        for rank, rows in enumerate(ranks):
            for row in rows:
                run.row(model=model, ranks=world, rank=rank, tokens=tokens, **row)


def on_rank(config: dict[str, Any], folder: Path) -> Rows:
    """Seconds of a step of the same global batch, of each mode in turns: by one process (while the
    other ranks rest) and by all.
    """
    rank = dist.get_rank()
    work: dict[str, Callable[[int], None]] = {}
    if rank == 0:
        alone = ZO2(make_model(config), storage="ram", **options(config))
    for threads in config["alone_threads"]:

        def one(step: int, threads: int = threads) -> None:
            if rank == 0:
                torch.set_num_threads(threads)
                alone.step(make_batch(config, step, config["shares"]))
                torch.set_num_threads(1)

        work[one_process(threads)] = one
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder)
        work[mode] = lambda step, ddp=ddp: ddp.step(make_batch(config, step, config["shares"]))  # type: ignore[misc]
    rows: Rows = []
    for repeat in range(-1, config["repeats"]):
        for mode, step in work.items():
            dist.barrier()
            start, own = perf_counter(), process_time()
            step(repeat + 1)
            own = process_time() - own  # before the barrier: gloo waits in a loop
            dist.barrier()
            if repeat >= 0:
                rows.append(
                    {
                        "mode": mode,
                        "repeat": repeat,
                        "step_seconds": perf_counter() - start,
                        "process_seconds": own,
                    }
                )
    return rows
