"""Table "accuracy" and figure "loss_curves": fine-tuning with MeZO, with ZO2, with ZO2 that nobody flushes, and with
first-order training.

The paper's claim is that MeZO and ZO2 are the same, so the weights' digests stand in the table. At the cpu scale the
progress of zeroth-order training over these few steps is small, and reported as it is; nothing is tuned on the test
split.
"""

import copy
import hashlib
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field

from projects.zo2 import ZO2, MeZO
from projects.zo2.baselines import FirstOrder
from projects.zo2.tasks import TaskName, classification
from shared import experiment


class Config(experiment.Config):
    task: TaskName = "fine-food"
    model: str = ""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    steps: int = Field(default=60, ge=2)
    batch_size: int = Field(default=32, ge=1)
    tokens: int = Field(default=48, ge=4)
    test_rows: int = Field(default=400, ge=1)
    lr: float = Field(default=5e-5, gt=0)
    first_order_lr: float = Field(default=2e-5, gt=0)


def run(config: Config, run: experiment.Run) -> None:
    task = classification(config.task, config.model, config.tokens, getattr(torch, config.dtype))
    batches = task.train_batches(config.steps, config.batch_size, config.seed)
    model = task.model()
    common: dict[str, Any] = {"lr": config.lr, "loss": task.loss}

    def result(method: str, trained: Any, losses: list[float], weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for number, loss in enumerate(losses):
            run.row(method=method, kind="step", step=number, train_loss=loss)
        accuracy, loss = task.evaluate(trained, config.test_rows)
        run.row(method=method, kind="end", step=len(losses), test_accuracy=accuracy, test_loss=loss, weights_sha256=digest(weights))

    result("zero-shot", model, [], model.named_parameters())

    engine = ZO2(copy.deepcopy(model), storage="ram", device=config.device, **common)
    losses = [engine.step(batch, seed=i).loss for i, batch in enumerate(run.progress(batches, "ZO2"))]
    unflushed = copy.deepcopy(model)
    pending = engine._pending
    engine._pending = None  # as public code does: reading the weights without flushing them
    unflushed.load_state_dict(engine.state_dict(), strict=False)
    engine._pending = pending
    result("ZO2, not flushed", unflushed, losses, unflushed.named_parameters())
    order = engine.parameter_order()
    trained = engine.unwrap()
    result("ZO2", trained, losses, trained.named_parameters())

    reference = copy.deepcopy(model).to(config.device)
    named = dict(reference.named_parameters())
    mezo = MeZO(reference, parameters=[(name, named[name]) for name in order], **common)
    losses = [mezo.step(batch, i)[0] for i, batch in enumerate(run.progress(batches, "MeZO"))]
    result("MeZO", reference, losses, reference.named_parameters())

    first = copy.deepcopy(model).to(config.device)
    trainer = FirstOrder(first, torch.optim.AdamW, config.first_order_lr, task.loss)
    losses = [trainer.step(batch) for batch in run.progress(batches, "AdamW")]
    result("AdamW (first order)", first, losses, first.named_parameters())


def digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names and bits."""
    found = hashlib.sha256()
    for name, tensor in weights:
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
