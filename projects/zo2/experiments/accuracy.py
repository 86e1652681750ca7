"""Table "accuracy" and figure "loss_curves": fine-tuning with MeZO, with ZO2, with ZO2 that nobody
flushes, and with first-order training.

The paper's claim is that MeZO and ZO2 are the same, so the weights' digests stand in the table. At
the cpu scale the progress of zeroth-order training over these few steps is small, and reported as
it is; nothing is tuned on the test split.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field

from projects.zo2 import ZO2, MeZO
from projects.zo2.baselines import FirstOrder
from projects.zo2.tasks import TaskName, classification
from shared import experiment

Method = Literal["zero-shot", "ZO2", "ZO2, not flushed", "MeZO", "AdamW (first order)"]


class Config(experiment.Config):
    task: TaskName = "fine-food"
    model: str = ""
    methods: list[Method] = ["zero-shot", "ZO2, not flushed", "ZO2", "MeZO", "AdamW (first order)"]
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
    common: dict[str, Any] = {"lr": config.lr, "loss": task.loss}

    def evaluate(model: Any) -> tuple[float, float]:
        return task.evaluate(model, config.test_rows)

    def train(step: Callable[[Any, int], float], name: str) -> list[float]:
        return [step(batch, number) for number, batch in enumerate(run.progress(batches, name))]

    def emit(
        method: str,
        losses: list[float],
        scores: tuple[float, float],
        weights: Iterable[tuple[str, torch.Tensor]],
    ) -> None:
        for number, loss in enumerate(losses):
            run.row(
                method=method,
                kind="step",
                step=number,
                train_loss=loss if math.isfinite(loss) else None,
            )
        accuracy, loss = scores
        run.row(
            method=method,
            kind="end",
            step=len(losses),
            test_accuracy=accuracy,
            test_loss=loss,
            weights_sha256=digest(weights),
        )

    # One model is alive at a time; each method builds its own.
    if "zero-shot" in config.methods:
        model = task.model().to(config.device)
        emit("zero-shot", [], evaluate(model), model.named_parameters())
        del model
    order: list[str] = []
    if "ZO2" in config.methods:
        model = task.model()
        named = {name for name, _ in model.named_parameters()}
        engine = ZO2(model, storage="ram", device=config.device, **common)
        losses = train(lambda batch, number: engine.step(batch, seed=number).loss, "ZO2")
        # as public code does: the weights are read with an update pending
        if "ZO2, not flushed" in config.methods:
            unflushed = task.model()
            unflushed.load_state_dict(
                {name: tensor.clone() for name, tensor in engine.tensors(flush=False)}, strict=False
            )
            emit("ZO2, not flushed", losses, evaluate(unflushed), unflushed.named_parameters())
            del unflushed
        scores = engine.forward(evaluate)
        emit(
            "ZO2",
            losses,
            scores,
            ((name, tensor) for name, tensor in engine.tensors() if name in named),
        )
        order = engine.parameter_order()
        engine.close()
        del engine, model
    if "MeZO" in config.methods:
        model = task.model().to(config.device)
        parameters = dict(model.named_parameters())
        mezo = MeZO(
            model, parameters=[(name, parameters[name]) for name in order or parameters], **common
        )
        emit(
            "MeZO",
            train(lambda batch, number: mezo.step(batch, number)[0], "MeZO"),
            evaluate(model),
            model.named_parameters(),
        )
        del mezo, model, parameters
    if "AdamW (first order)" in config.methods:
        model = task.model().to(config.device)
        trainer = FirstOrder(model, torch.optim.AdamW, config.first_order_lr, task.loss)
        losses = train(lambda batch, _: trainer.step(batch), "AdamW")
        emit("AdamW (first order)", losses, evaluate(model), model.named_parameters())


def digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names and bits, whatever the order in which the tensors come."""
    parts = {
        name: hashlib.sha256(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        ).digest()
        for name, tensor in weights
    }
    found = hashlib.sha256()
    for name in sorted(parts):
        found.update(name.encode() + parts[name])
    return found.hexdigest()[:16]
