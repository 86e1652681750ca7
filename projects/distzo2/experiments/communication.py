"""Table "communication": what each rank sends and moves in a step, beside first-order data
parallelism of the same model.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import Field

from projects.distzo2 import DistZO2
from projects.distzo2.experiments.common import Rows, ShapeConfig, launch_modes
from projects.distzo2.experiments.engines import empty_model, make_batch, make_engine, make_model
from projects.distzo2.labels import FIRST_ORDER, MODES
from shared import experiment


class Config(ShapeConfig):
    steps: int = Field(ge=1)
    """over which bytes are averaged"""


def run(config: Config, run: experiment.Run) -> None:
    parameters = sum(p.numel() for p in empty_model(config.model_dump()).parameters())
    for world, ranks in launch_modes("communication", config, run):
        for rank, rows in enumerate(ranks):
            for row in rows:
                dp = 1 if row["mode"] == FIRST_ORDER else MODES[row["mode"]].dp
                run.row(
                    ranks=world,
                    rank=rank,
                    parameters=parameters,
                    micro_batches=-(-config.shares // dp),
                    **row,
                )


def on_rank(config: dict[str, Any], folder: Path) -> Rows:
    """Bytes of this rank a step, by what they are."""
    rows: Rows = []
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder)
        ddp.step(make_batch(config, 0, config["shares"]))
        before = moved(ddp)
        for step in range(config["steps"]):
            ddp.step(make_batch(config, step, config["shares"]))
        up, down, exchanged, sent = (
            (b - a) / config["steps"] for a, b in zip(before, moved(ddp), strict=True)
        )
        rows.append(
            {
                "mode": mode,
                "host_up_bytes": up,
                "host_down_bytes": down,
                "exchanged_bytes": exchanged,
                "scalar_bytes": sent,
            }
        )
        ddp.engine.close()
    model = make_model(config).to(config["device"])
    batch = make_batch(config, 0, 1)[0]
    model(**batch).loss.backward()
    sent = 0
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        sent += parameter.grad.nbytes
    nothing = dict.fromkeys(("host_up_bytes", "host_down_bytes", "exchanged_bytes"), 0.0)
    return [*rows, {"mode": FIRST_ORDER, **nothing, "scalar_bytes": float(sent)}]


def moved(ddp: DistZO2) -> tuple[int, int, int, int]:
    """Bytes of this rank so far: up, down, exchanged, and sent of losses."""
    traffic = ddp.engine.traffic
    return traffic.bytes_up, traffic.bytes_down, ddp.exchanged.total(), ddp.ranks.bytes_sent
