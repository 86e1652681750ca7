"""Figure "crossover": the time of one layer's clipped sum by each backend against the sequence
length, over the plain weight gradient.

Beside each measured time stands what the cost model predicts, since `auto` decides by it.
"""

from time import perf_counter, process_time
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from projects.flashdp import backends
from projects.flashdp.experiments.common import Device, check_device
from projects.flashdp.factors import Factors
from shared import experiment, meters


class Config(experiment.Config):
    shapes: list[tuple[int, int]] = Field(min_length=1)
    """[rows, columns] of each weight"""
    tokens: list[int] = Field(min_length=1)
    """the lengths of sequences"""
    total_tokens: int = Field(ge=1)
    """tokens of a batch: its size is this over the length of a sequence"""
    backends: list[str] = Field(min_length=1)
    """those that are timed, by name"""
    repeats: int = Field(ge=1)
    """rounds in which every backend is timed once"""
    dtype: Literal["float32", "bfloat16"]
    """number format of both factors of a gradient"""
    device: Device = "cpu"
    """where it runs"""


def run(config: Config, run: experiment.Run) -> None:
    check_device(config.device, "flashdp/crossover")
    for rows, columns in config.shapes:
        for tokens in config.tokens:
            batch_size = max(1, config.total_tokens // tokens)
            generator = torch.Generator(config.device).manual_seed(config.seed)
            made = {
                "generator": generator,
                "device": config.device,
                "dtype": getattr(torch, config.dtype),
            }
            left, right = (
                torch.randn(batch_size, tokens, width, **made) for width in (rows, columns)
            )
            work = {
                "plain": lambda left=left, right=right: left.flatten(0, 1).T @ right.flatten(0, 1)
            }
            work |= {
                name: lambda name=name, left=left, right=right: clipped(name, left, right)
                for name in config.backends
            }
            timings = meters.interleave(
                work,
                config.repeats,
                clock=perf_counter if config.device == "cuda" else process_time,
                progress=lambda total, label=f"{rows} x {columns}, {tokens} tokens": run.progress(
                    total, label
                ),
            )
            chosen = backends.choose(
                batch_size, tokens, rows, columns, config.device, left.element_size()
            )
            for name, timing in timings.items():
                shape = (batch_size, tokens, rows, columns, config.device, left.element_size())
                predicted = None if name == "plain" else backends.cost(name, *shape)
                for repeat, seconds in enumerate(timing.seconds):
                    run.row(
                        rows=rows, columns=columns, tokens=tokens, batch_size=batch_size,
                        backend=name, chosen=name == chosen,
                        predicted_ratio=predicted, repeat=repeat, layer_seconds=seconds,
                    )  # fmt: skip


def clipped(backend: str, left: Tensor, right: Tensor) -> Tensor:
    """The clipped sum with a bound that clips about half."""
    out = left.new_empty(left.shape[2], right.shape[2], dtype=torch.float32)
    bound = (left.shape[1] * left.shape[2] * right.shape[2]) ** 0.5
    backends.BACKENDS[backend](left, right, out, True, Factors(bound, 1, None, []))
    return out
