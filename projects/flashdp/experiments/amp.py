"""Table "amp": mixed precision. Clipped gradients under bfloat16 autocast against float32, and the
time with and without it.
"""

import copy
from time import perf_counter, process_time
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from projects.flashdp import labels
from projects.flashdp.baselines import PerLayer, Trainer
from projects.flashdp.experiments import common
from shared import experiment, meters


class Config(experiment.Config):
    model: Literal[tuple(common.DECODERS)]  # type: ignore[valid-type]
    """a decoder by its name"""
    batch_size: int = Field(ge=1)
    """samples in the batch"""
    tokens: int = Field(ge=2)
    """tokens of a sample"""
    repeats: int = Field(ge=1)
    """rounds in which every method makes one timed step in each number format"""
    text: common.Text
    """WordNet's glosses, or token ids drawn at random"""
    device: common.Device = "cpu"
    """where it runs"""


def run(config: Config, run: experiment.Run) -> None:
    common.check_device(config.device, "flashdp/amp")
    model = common.model_of(config.model, config.tokens, config.device, config.seed)
    ids = common.batch_of(
        config.text,
        common.DECODERS[config.model][0],
        config.batch_size,
        config.tokens,
        config.device,
        config.seed,
    )
    for backend in ("loop", "ghost"):
        wide, narrow = (clipped(model, ids, backend, dtype) for dtype in (None, torch.bfloat16))
        for name, gradient in wide.items():
            difference = (narrow[name] - gradient).norm() / gradient.norm()
            run.row(
                kind="gradient",
                backend=backend,
                parameter=name,
                relative_difference=float(difference),
            )
        # What one sample adds to one group, over the group's bound: above 1 the sensitivity would
        # not hold.
        run.row(
            kind="bound",
            backend=backend,
            largest_contribution_ratio=largest_contribution(model, ids, backend),
        )

    trainers = {
        (method, name): kind(
            copy.deepcopy(model), config.batch_size, seed=config.seed, autocast=dtype
        )
        for method, kind in ((labels.NON_PRIVATE, Trainer), (labels.FLASHDP, PerLayer))
        for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16))
    }
    timings = meters.interleave(
        {
            f"{method}|{dtype}": lambda one=one: one.step(ids)
            for (method, dtype), one in trainers.items()
        },
        config.repeats,
        clock=perf_counter if config.device == "cuda" else process_time,
        progress=lambda total: run.progress(total, "steps"),
    )
    for name, timing in timings.items():
        method, dtype = name.split("|")
        for repeat, seconds in enumerate(timing.seconds):
            run.row(kind="time", method=method, autocast=dtype, repeat=repeat, step_seconds=seconds)


def clipped(
    model: nn.Module, ids: Tensor, backend: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The clipped sums without noise."""
    one = PerLayer(copy.deepcopy(model), len(ids), backend=backend, sigma=0.0, autocast=dtype)
    one.backward(ids, ids)
    return {name: p.grad for name, p in one.model.named_parameters()}


def largest_contribution(model: nn.Module, ids: Tensor, backend: str) -> float:
    """The largest norm, over the bound, that a sample alone leaves in a group's gradient under
    bfloat16 autocast.
    """
    largest = 0.0
    for sample in ids:
        one = PerLayer(
            copy.deepcopy(model), 1, backend=backend, sigma=0.0, autocast=torch.bfloat16, clip=0.1
        )
        one.backward(sample[None], sample[None])
        gradients = {name: p.grad.double() for name, p in one.model.named_parameters()}
        for group in one.private.groups:
            norm = torch.stack([gradients[name].norm() for name in group.parameters]).norm()
            largest = max(largest, float(norm) / group.bound)
    return largest
