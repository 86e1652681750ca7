"""Table "equality": bits in which the ranks of each mode differ from one another and from one
process.

The reference is ZO2 in this process, which walks the micro-batches in order. One row each a mode.
"""

import torch
from pydantic import Field

from projects.distzo2.engine import digest
from projects.distzo2.experiments import _ranks
from projects.distzo2.experiments._launch import check_device, launch
from projects.distzo2.experiments._shape import ShapeConfig, by_world
from projects.zo2 import ZO2
from shared import experiment


class Config(ShapeConfig):
    """See `ShapeConfig`."""

    steps: int = Field(default=30, ge=2)


def run(config: Config, run: experiment.Run) -> None:
    torch.set_num_threads(1)
    check_device("equality", config.device, 1)
    values = config.model_dump()
    alone = ZO2(_ranks.make_model(values), storage="ram", **_ranks.options(values))
    steps = [
        alone.step(_ranks.make_batch(values, step, config.shares)) for step in range(config.steps)
    ]
    losses, gradients = (
        [one.loss.hex() for one in steps],
        [one.projected_gradient.hex() for one in steps],
    )
    weights = digest(alone.tensors()).hex()
    for world, modes in run.progress(list(by_world(config.modes).items()), "launches"):
        ranks = launch("equality", world, {**values, "modes": modes})
        for place, mode in enumerate(modes):
            found = [rank[place] for rank in ranks]
            dp, pert, transfer = _ranks.MODES[mode]
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
