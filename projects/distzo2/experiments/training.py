"""Real training on ranks, in each mode at each size of the global batch: what the ranks of the
experiments `accuracy` and `largebatch` do.
"""

from pathlib import Path
from typing import Any

from projects.distzo2 import DistZO2, Ranks, device_mesh
from projects.distzo2.data import global_batches, make_task, noise_seed
from projects.distzo2.experiments.common import Rows
from projects.distzo2.labels import MODES
from projects.zo2 import ZO2
from projects.zo2.digests import unordered_digest


def on_rank(config: dict[str, Any], folder: Path) -> Rows:
    """Losses of real training in each mode at each size of the global batch; scores on held-out
    rows by rank 0; digests of the weights.
    """
    rows: Rows = []
    task = make_task(config)
    for batch_size in config["batch_sizes"]:
        batches = global_batches(task, config, batch_size)
        for mode in config["modes"]:
            dp, pert, transfer = MODES[mode]
            ranks = Ranks(device_mesh(dp, pert))
            model = task.model()
            named = {name for name, _ in model.named_parameters()}
            engine = ZO2(
                model,
                forwards=ranks,
                storage="ram",
                lr=config["lr"],
                eps=config["eps"],
                loss=task.loss,
                device=config["device"],
            )
            ddp = DistZO2(engine, transfer)
            losses = [
                ddp.step(batch, seed=noise_seed(config["seed"], number)).loss
                for number, batch in enumerate(batches)
            ]
            scores = (
                engine.forward(lambda model: task.evaluate(model, config["test_rows"]))
                if ranks.rank == 0
                else None
            )
            weights = unordered_digest(
                (name, tensor) for name, tensor in engine.tensors() if name in named
            )
            rows.append(
                {
                    "mode": mode,
                    "batch_size": batch_size,
                    "losses": losses,
                    "scores": scores,
                    "weights": weights,
                }
            )
            engine.close()
    return rows
