"""Table "accuracy" and figure "loss_curves": fine-tuning with MeZO, with ZO2, with ZO2 that nobody
flushes, and with first-order training.

The paper's claim is that MeZO and ZO2 are the same, so the weights' digests stand in the table: all
methods are trained with the first seed. Two models that learnt nothing would be the same as well;
so ZO2 is trained with further seeds, to be compared with the model as it was. At the cpu scale the
progress of zeroth-order training over these few steps is small, and reported as it is; nothing is
tuned on the test split.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field

from projects.zo2 import ZO2, MeZO
from projects.zo2.baselines import FirstOrder
from projects.zo2.data import TaskName, classification
from projects.zo2.digests import unordered_digest
from projects.zo2.experiments.common import Device, Dtype
from projects.zo2.labels import ACCURACY, FIRST_ORDER, MEZO, UNFLUSHED, ZERO_SHOT
from projects.zo2.labels import ZO2 as ZO2_LABEL
from shared import experiment

Method = Literal[ACCURACY]
NOISE_SEEDS = 1_000_000  # more than a run has steps: no two seeds have a direction in common


class Config(experiment.Config):
    task: TaskName
    """what is learnt"""
    model: str
    """the language model of the task "sst2"; empty for the others"""
    methods: list[Method] = Field(min_length=1)
    """rows of the table"""
    dtype: Dtype
    """of the weights"""
    device: Device = "cpu"
    """where to compute"""
    steps: int = Field(ge=2)
    """of training"""
    batch_size: int = Field(ge=1)
    """examples of a step"""
    tokens: int = Field(ge=4)
    """the most tokens of an example"""
    test_rows: int = Field(ge=1)
    """held-out examples"""
    lr: float = Field(gt=0)
    """learning rate of zeroth-order training"""
    first_order_lr: float = Field(gt=0)
    """learning rate of AdamW"""
    seeds: list[int] = Field(min_length=1)
    """of batches and noise; all methods have the first, ZO2 the others as well"""


def run(config: Config, run: experiment.Run) -> None:
    task = classification(config.task, config.model, config.tokens, getattr(torch, config.dtype))
    first, *others = config.seeds
    batches = task.train_batches(config.steps, config.batch_size, first)
    common: dict[str, Any] = {"lr": config.lr, "loss": task.loss}

    def evaluate(model: Any) -> tuple[float, float]:
        return task.evaluate(model, config.test_rows)

    def train(step: Callable[[Any, int], float], name: str, seed: int = first) -> list[float]:
        given = (
            batches if seed == first else task.train_batches(config.steps, config.batch_size, seed)
        )
        return [
            step(batch, number + seed * NOISE_SEEDS)
            for number, batch in enumerate(run.progress(given, name))
        ]

    def emit(
        method: str,
        losses: list[float],
        scores: tuple[float, float],
        weights: Iterable[tuple[str, torch.Tensor]],
        seed: int = first,
    ) -> None:
        for number, loss in enumerate(losses):
            run.row(
                method=method,
                kind="step",
                seed=seed,
                step=number,
                train_loss=loss if math.isfinite(loss) else None,
            )
        accuracy, loss = scores
        run.row(
            method=method,
            kind="end",
            seed=seed,
            step=len(losses),
            test_accuracy=accuracy,
            test_loss=loss,
            weights_sha256=unordered_digest(weights),
        )

    # One model is alive at a time; each method builds its own.
    if ZERO_SHOT in config.methods:
        model = task.model().to(config.device)
        emit(ZERO_SHOT, [], evaluate(model), model.named_parameters())
        del model
    order: list[str] = []
    if ZO2_LABEL in config.methods:
        model = task.model()
        named = {name for name, _ in model.named_parameters()}
        engine = ZO2(model, storage="ram", device=config.device, **common)
        losses = train(lambda batch, number: engine.step(batch, seed=number).loss, ZO2_LABEL)
        # as public code does: the weights are read with an update pending
        if UNFLUSHED in config.methods:
            unflushed = task.model()
            unflushed.load_state_dict(
                {name: tensor.clone() for name, tensor in engine.tensors(flush=False)}, strict=False
            )
            emit(UNFLUSHED, losses, evaluate(unflushed), unflushed.named_parameters())
            del unflushed
        scores = engine.forward(evaluate)
        emit(
            ZO2_LABEL,
            losses,
            scores,
            ((name, tensor) for name, tensor in engine.tensors() if name in named),
        )
        order = engine.parameter_order()
        engine.close()
        del engine, model
        for seed in others:
            engine = ZO2(task.model(), storage="ram", device=config.device, **common)
            losses = train(
                lambda batch, number, engine=engine: engine.step(batch, seed=number).loss,  # type: ignore[misc]
                f"{ZO2_LABEL}, seed {seed}",
                seed,
            )
            scores = engine.forward(evaluate)
            weights = ((name, tensor) for name, tensor in engine.tensors() if name in named)
            emit(ZO2_LABEL, losses, scores, weights, seed)
            engine.close()
    if MEZO in config.methods:
        model = task.model().to(config.device)
        parameters = dict(model.named_parameters())
        mezo = MeZO(
            model, parameters=[(name, parameters[name]) for name in order or parameters], **common
        )
        emit(
            MEZO,
            train(lambda batch, number: mezo.step(batch, number)[0], MEZO),
            evaluate(model),
            model.named_parameters(),
        )
        del mezo, model, parameters
    if FIRST_ORDER in config.methods:
        model = task.model().to(config.device)
        trainer = FirstOrder(model, torch.optim.AdamW, config.first_order_lr, task.loss)
        losses = train(lambda batch, _: trainer.step(batch), "AdamW")
        emit(FIRST_ORDER, losses, evaluate(model), model.named_parameters())
