"""Table "accuracy" and figure "accuracy": the same fine-tuning by MeZO, by ZO2, and by ranks that
share it out in each mode.

All walk the same global batches, cut into the same micro-batches in order. The claim is that they
are one, so the weights' digests stand in the table. That what they all are has learnt something is
seen over several seeds of ZO2 against the model as it was. Nothing is tuned on the test split.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field

from projects.distzo2.data import global_batches, make_task, noise_seed
from projects.distzo2.experiments.common import TrainConfig, by_world, check_device, launch
from projects.distzo2.experiments.training import on_rank
from projects.distzo2.labels import MEZO, START
from projects.distzo2.labels import ZO2 as ZO2_LABEL
from projects.zo2 import ZO2, MeZO
from projects.zo2.digests import unordered_digest
from shared import experiment

__all__ = ["Config", "on_rank", "run"]


class Config(TrainConfig):
    alone: list[Literal[START, ZO2_LABEL, MEZO]]  # type: ignore[valid-type]
    """what the ranks are compared with: the model as it was, and training in one process"""
    batch_size: int = Field(ge=1)
    """examples of a step's global batch"""
    seeds: list[int] = Field(min_length=1)
    """of batches and noise; all modes have the first, ZO2 the others as well"""


def run(config: Config, run: experiment.Run) -> None:
    torch.set_num_threads(1)
    check_device("accuracy", config.device, 1)
    first = config.seeds[0]
    values = {**config.model_dump(), "seed": first}
    task = make_task(values)
    batches = global_batches(task, values, config.batch_size)
    common: dict[str, Any] = {"lr": config.lr, "eps": config.eps, "loss": task.loss}

    def emit(
        mode: str,
        ranks: int,
        losses: list[float],
        scores: list[tuple[float, float]],
        digests: list[str],
        seed: int = first,
    ) -> None:
        for number, loss in enumerate(losses):
            run.row(
                mode=mode,
                kind="step",
                seed=seed,
                ranks=ranks,
                step=number,
                train_loss=loss if math.isfinite(loss) else None,
            )
        for accuracy, loss in scores:
            one = digests[0] if len(set(digests)) == 1 else "the ranks differ"
            run.row(
                mode=mode,
                kind="end",
                seed=seed,
                ranks=ranks,
                step=len(losses),
                test_accuracy=accuracy,
                test_loss=loss,
                weights_sha256=one,
            )

    if START in config.alone:
        model = task.model().to(config.device)
        emit(
            START,
            1,
            [],
            [task.evaluate(model, config.test_rows)],
            [unordered_digest(model.named_parameters())],
        )
    order: list[str] = []
    for seed in config.seeds if ZO2_LABEL in config.alone else ():
        model = task.model()
        named = {name for name, _ in model.named_parameters()}
        engine = ZO2(model, storage="ram", device=config.device, **common)
        own = (
            batches
            if seed == first
            else global_batches(task, {**values, "seed": seed}, config.batch_size)
        )
        losses = [
            engine.step(batch, seed=noise_seed(seed, number)).loss
            for number, batch in enumerate(run.progress(own, f"{ZO2_LABEL}, seed {seed}"))
        ]
        scores = engine.forward(lambda model: task.evaluate(model, config.test_rows))
        emit(
            ZO2_LABEL,
            1,
            losses,
            [scores],
            [
                unordered_digest(
                    (name, tensor) for name, tensor in engine.tensors() if name in named
                )
            ],
            seed,
        )
        order = engine.parameter_order()
        engine.close()
    if MEZO in config.alone:
        model = task.model().to(config.device)
        parameters = dict(model.named_parameters())
        mezo = MeZO(
            model, parameters=[(name, parameters[name]) for name in order or parameters], **common
        )
        losses = [
            mezo.step(batch, noise_seed(first, number))[0]
            for number, batch in enumerate(run.progress(batches, MEZO))
        ]
        emit(
            MEZO,
            1,
            losses,
            [task.evaluate(model, config.test_rows)],
            [unordered_digest(model.named_parameters())],
        )
        del mezo, model, parameters
    for world, modes in run.progress(list(by_world(config.modes).items()), "launches"):
        ranks = launch(
            "accuracy", world, {**values, "modes": modes, "batch_sizes": [config.batch_size]}
        )
        for place, mode in enumerate(modes):
            found = [rank[place] for rank in ranks]
            assert all(one["losses"] == found[0]["losses"] for one in found)
            emit(
                mode,
                world,
                found[0]["losses"],
                [found[0]["scores"]],
                [one["weights"] for one in found],
            )
