"""Table "equality": bits in which the ranks of each mode differ from one another and from one
process.

The reference is ZO2 in this process, which walks the micro-batches in order. One row each a mode.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from projects.distzo2.experiments.common import Rows, ShapeConfig, check_device, launch_modes
from projects.distzo2.experiments.engines import make_batch, make_engine, make_model, options
from projects.distzo2.labels import MODES
from projects.zo2 import ZO2
from projects.zo2.digests import digest
from shared import experiment


class Config(ShapeConfig):
    steps: int = Field(ge=2)
    """of training"""


def run(config: Config, run: experiment.Run) -> None:
    torch.set_num_threads(1)
    check_device("equality", config.device, 1)
    values = config.model_dump()
    alone = ZO2(make_model(values), storage="ram", **options(values))
    steps = [alone.step(make_batch(values, step, config.shares)) for step in range(config.steps)]
    losses, gradients = (
        [one.loss.hex() for one in steps],
        [one.projected_gradient.hex() for one in steps],
    )
    weights = digest(alone.tensors()).hex()
    for world, ranks in launch_modes("equality", config, run):
        for found in zip(*ranks, strict=True):
            mode = found[0]["mode"]
            dp, pert, transfer = MODES[mode]
            off = [
                abs(float.fromhex(a) - float.fromhex(b))
                for a, b in zip(found[0]["gradients"], gradients, strict=True)
            ]
            run.row(
                mode=mode, ranks=world, dp=dp, pert=pert, transfer=transfer, steps=config.steps,
                replicas_equal=len({one["weights"] for one in found}) == 1,
                losses_differing=sum(a != b for one in found for a, b in zip(one["losses"], losses,
                strict=True)),
                gradients_differing=sum(a != b for one in found for a, b in zip(one["gradients"],
                gradients, strict=True)),
                weights_equal=all(one["weights"] == weights for one in found),
                largest_gradient_error_ratio=max(off)
                / max(abs(float.fromhex(g)) for g in gradients),
            )  # fmt: skip


def on_rank(config: dict[str, Any], folder: Path) -> Rows:
    """Losses, gradients and the digest of all weights after each mode's steps."""
    rows: Rows = []
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder)
        steps = [
            ddp.step(make_batch(config, step, config["shares"])) for step in range(config["steps"])
        ]
        rows.append(
            {
                "mode": mode,
                "losses": [one.loss.hex() for one in steps],
                "gradients": [one.projected_gradient.hex() for one in steps],
                "weights": digest(ddp.engine.tensors()).hex(),
            }
        )
        ddp.engine.close()
    return rows
