"""Table "lowbit": the blocks stored in fewer bits than they are computed with, rounded to nearest
or stochastically.

MiniLM on fine-food reviews (real weights, real text). The probe is "fresh", so that a stored value
changes by updates alone and not by the drift of restoring. Reported: bytes, how much of one update
survives storage, how far the losses drift from those of float32 storage, and the test loss.
"""

from typing import Any, Literal

import torch
from pydantic import Field

from projects.zo2 import ZO2
from projects.zo2.data import FineFood
from shared import experiment

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3": torch.float8_e4m3fn,
}


class Config(experiment.Config):
    dtypes: list[Literal[tuple(DTYPES)]]  # type: ignore[valid-type]
    """what the blocks are stored as; the losses are compared with those of the first"""
    steps: int = Field(ge=2)
    """of training"""
    batch_size: int = Field(ge=1)
    """reviews of a step"""
    tokens: int = Field(ge=4)
    """the most tokens of a review"""
    test_rows: int = Field(ge=1)
    """held-out reviews"""
    lr: float = Field(gt=0)
    """learning rate"""


def run(config: Config, run: experiment.Run) -> None:
    task = FineFood(config.tokens)
    batches = task.train_batches(config.steps, config.batch_size, config.seed)
    work = [
        (name, rounding)
        for name in config.dtypes
        for rounding in (["nearest"] if name == "float32" else ["nearest", "stochastic"])
    ]
    reference: list[float] = []
    for name, rounding in run.progress(work, "storage dtypes"):
        options: dict[str, Any] = {
            "storage_dtype": DTYPES[name],
            "rounding": rounding,
            "probe": "fresh",
        }
        engine = ZO2(task.model(), loss=task.loss, lr=config.lr, storage="ram", **options)
        before = engine.state_dict()
        losses = [engine.step(batches[0], seed=0).loss]
        engine.flush()
        survived, cosine = surviving(engine, before, config)
        for number, batch in enumerate(batches[1:], 1):
            losses.append(engine.step(batch, seed=number).loss)
        reference = reference or losses
        accuracy, test_loss = engine.forward(lambda model: task.evaluate(model, config.test_rows))
        moved = engine.traffic
        run.row(
            storage_dtype=name,
            rounding=rounding,
            host_bytes=engine.host_nbytes,
            offloaded_bytes=moved.bytes_down // sum(moved.offloads.values()),
            surviving_share=survived,
            update_cosine=cosine,
            largest_loss_difference=max(abs(a - b) for a, b in zip(losses, reference, strict=True)),
            test_loss=test_loss,
            test_accuracy=accuracy,
            steps=config.steps,
        )
        engine.close()


def surviving(
    engine: ZO2, before: dict[str, torch.Tensor], config: Config
) -> tuple[float, float | None]:
    """Share of the trainable stored elements that one update changed, and the cosine of the change
    with the update's direction.
    """
    after = engine.state_dict()
    generator = torch.Generator().manual_seed(0)
    changed = total = 0
    dot = length = norm = 0.0
    for name in engine.parameter_order():
        direction = torch.randn(before[name].shape, generator=generator)
        change = (after[name] - before[name]).double()
        changed += int((change != 0).sum())
        total += change.numel()
        dot += float((change * direction).sum())
        length += float(change.square().sum())
        norm += float(direction.double().square().sum())
    return changed / total, abs(dot) / (length * norm) ** 0.5 if length else None
