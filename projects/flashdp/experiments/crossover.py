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
from projects.flashdp.experiments.common import check_device
from projects.flashdp.factors import Factors
from shared import experiment, meters


class Config(experiment.Config):
    """Shapes are [rows, columns] of a weight; the batch size is `total_tokens` over the sequence
    length.
    """

    shapes: list[tuple[int, int]] = [(3072, 768)]
    tokens: list[int] = [16, 32, 64, 128, 256, 512, 1024]
    total_tokens: int = Field(default=2048, ge=1)
    backends: list[str] = ["loop", "ghost", "recompute", "explicit"]
    repeats: int = Field(default=6, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"


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
