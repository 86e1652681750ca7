"""Table "drift": what perturbing and restoring alone does to the weights, against what an update
does, by dtype and probe.

MeZO shifts the weights there and back by additions that round, so that a step changes them even
where the learning rate is zero. The steps here are replayed, without forwards, from the projected
gradient of a real one: with a learning rate of zero, and with the default one. The yardstick is the
exact update, computed in float64 from the same directions.

MiniLM on fine-food reviews: real weights, real text.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from projects.zo2 import ZO2, Step
from projects.zo2.data import FineFood
from projects.zo2.experiments.common import Dtype
from shared import experiment

Weights = dict[str, Tensor]


class Config(experiment.Config):
    dtypes: list[Dtype] = Field(min_length=1)
    """of the weights"""
    probes: list[Literal["inplace", "fresh"]] = Field(min_length=1)
    """how theta + eps z and theta - eps z are formed"""
    steps: int = Field(ge=1)
    """that are replayed"""
    batch_size: int = Field(ge=1)
    """reviews of the step that finds the projected gradient"""
    tokens: int = Field(ge=4)
    """the most tokens of a review"""
    lr: float = Field(gt=0)
    """learning rate"""


def run(config: Config, run: experiment.Run) -> None:
    task = FineFood(config.tokens)
    engine = ZO2(task.model(), loss=task.loss, storage=None)
    batch = task.train_batches(1, config.batch_size, config.seed)[0]
    g = engine.step(batch, seed=0).projected_gradient
    order, names = engine.order, engine.parameter_order()
    engine.close()

    def replayed(dtype: torch.dtype, probe: Any, lr: float) -> Weights:
        engine = ZO2(task.model().to(dtype), storage=None, probe=probe)
        engine.replay([Step(i, 0.0, g, lr, i) for i in range(config.steps)], order)
        state = engine.state_dict()
        engine.close()
        return {name: state[name].double() for name in names}

    for name in run.progress(config.dtypes, "dtypes"):
        dtype = getattr(torch, name)
        named = dict(task.model().to(dtype).named_parameters())
        before = {name: named[name].detach() for name in names}
        exact = exact_update(before, config.steps, config.lr * g)
        for probe in config.probes:
            drift = change(before, replayed(dtype, probe, 0.0))
            update = change(before, replayed(dtype, probe, config.lr))
            run.row(
                dtype=name,
                probe=probe,
                steps=config.steps,
                learning_rate=config.lr,
                projected_gradient=g,
                drifted_share=_share(drift),
                drift_norm=_norm(drift),
                update_norm=_norm(exact),
                drift_ratio=_norm(drift) / _norm(exact),
                updated_share=_share(update),
                update_cosine=_dot(update, exact) / (_norm(update) * _norm(exact))
                if _norm(update)
                else None,
            )


def exact_update(weights: Weights, steps: int, rate: float) -> Weights:
    """What `steps` steps at lr * g = `rate` add to the weights, in float64, with the directions
    that tensors of these dtypes draw.
    """
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in weights.items()}
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for name, value in weights.items():
            z = torch.normal(0.0, 1.0, value.shape, generator=generator, dtype=value.dtype)
            total[name] -= rate * z.double()
    return total


def change(before: Weights, after: Weights) -> Weights:
    """after - before, in float64."""
    return {name: after[name] - value.double() for name, value in before.items()}


def _share(change: Weights) -> float:
    return sum(int((value != 0).sum()) for value in change.values()) / _size(change)


def _size(values: Weights) -> int:
    return sum(value.numel() for value in values.values())


def _dot(a: Weights, b: Weights) -> float:
    return sum(float((value * b[name]).sum()) for name, value in a.items())


def _norm(values: Weights) -> float:
    return _dot(values, values) ** 0.5
