"""What the tables of speed and memory share: models by name, a batch of text, and a cell measured
for every method in turns.
"""

import gc
from collections.abc import Iterator
from time import perf_counter, process_time
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from projects.flashdp import labels
from projects.flashdp.baselines import Trainer, trainer
from projects.flashdp.data import glosses
from projects.flashdp.decoder import Decoder
from projects.flashdp.scratch import SCRATCH_BUFFER
from shared import experiment, meters
from shared.errors import UserError
from shared.models import causal_lm_config, random_causal_lm

# vocabulary, hidden size, layers, heads; the last four are GPT-2's own (Radford et al. 2019)
DECODERS = {
    "tiny": (256, 32, 2, 2),
    "4M": (2048, 256, 4, 4),
    "21M": (2048, 512, 6, 8),
    "gpt2": (50257, 768, 12, 12),
    "gpt2-medium": (50257, 1024, 24, 16),
    "gpt2-large": (50257, 1280, 36, 20),
    "gpt2-xl": (50257, 1600, 48, 25),
}
LLAMAS = {
    "llama-1b": (16, 2048, 32),
    "llama-3b": (28, 3072, 24),
    "llama-7b": (32, 4096, 32),
    "llama-13b": (40, 5120, 40),
}

Method = Literal[labels.METHODS]  # type: ignore[valid-type]


Cell = tuple[Literal[(*DECODERS, *LLAMAS)], int, int]  # type: ignore[valid-type]
Text = Literal["wordnet", "random"]
Device = Literal["cpu", "cuda"]


class SpeedConfig(experiment.Config):
    """A table of speed and memory."""

    cells: list[Cell] = Field(min_length=1)
    """what is measured: [model, batch size, tokens of a sequence] of each"""
    methods: list[Method] = Field(min_length=1)
    """those that are compared, by their names in tables"""
    repeats: int = Field(ge=1)
    """rounds in which every method makes one timed step"""
    memory: bool
    """whether the peak of one more step is measured"""
    text: Text
    """WordNet's glosses, or token ids drawn at random, for machines without the data"""
    autocast: Literal["float32", "bfloat16"]
    """number format of matrix products; parameters, sums and noise are float32"""
    device: Device = "cpu"
    """where it runs"""


def check_device(device: str, name: str) -> None:
    """Raises UserError when a GPU is wanted and none is there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{name} wants a GPU at this scale and none is here; run it with --scale cpu"
        )


def model_of(name: str, tokens: int, device: str, seed: int) -> nn.Module:
    """A model with random weights: neither speed nor memory depends on them."""
    if name in DECODERS:
        vocabulary, hidden, layers, heads = DECODERS[name]
        return Decoder(vocabulary, hidden, layers, heads, max(tokens, 128), seed).to(device)
    return random_causal_lm(
        causal_lm_config("llama", *LLAMAS[name], positions=max(tokens, 128), tied=False),
        seed,
        device=device,
    )


def batch_of(
    text: str, vocabulary: int, batch_size: int, tokens: int, device: str, seed: int
) -> Tensor:
    """Ids [batch_size, tokens]."""
    if text == "random":
        return torch.randint(
            0, vocabulary, (batch_size, tokens), generator=torch.Generator().manual_seed(seed)
        ).to(device)
    return glosses(2048, 4000, 100).pieces(batch_size, tokens).to(device)


def measure(config: SpeedConfig, run: experiment.Run) -> None:
    """One row a timed step and one a cell with the extra bytes at the peak of a step, for every
    cell and method.
    """
    check_device(config.device, "this experiment")
    for name, batch_size, tokens in config.cells:
        vocabulary = DECODERS[name][0] if name in DECODERS else 32000
        ids = batch_of(config.text, vocabulary, batch_size, tokens, config.device, config.seed)
        cell = {
            "model": name,
            "batch_size": batch_size,
            "tokens": tokens,
            "autocast": config.autocast,
            "device": config.device,
        }
        trainers, failed = build(config, name, ids)
        for method in failed:
            run.row(**cell, method=method, clipping=labels.clipping(method), out_of_memory=True)

        def rounds(total: int, label: str = f"{name}, {batch_size} x {tokens}") -> Iterator[int]:
            return run.progress(total, label)

        steps = {method: lambda one=one, ids=ids: one.step(ids) for method, one in trainers.items()}
        # `build` has made a step of each, which was the warm-up. On a CPU the process's own time
        # counts: with one thread it is the work, whatever else the machine does.
        clock = perf_counter if config.device == "cuda" else process_time
        for method, timing in meters.interleave(
            steps, config.repeats, warmup=0, clock=clock, progress=rounds
        ).items():
            for repeat, seconds in enumerate(timing.seconds):
                run.row(
                    **cell, method=method, clipping=labels.clipping(method), out_of_memory=False,
                    repeat=repeat, step_seconds=seconds,
                    tokens_per_second=ids.numel() / seconds,
                )  # fmt: skip
        if config.memory:
            for method, one in trainers.items():
                run.row(
                    **cell,
                    method=method,
                    clipping=labels.clipping(method),
                    out_of_memory=False,
                    **peak_bytes(one, ids),
                )
        del trainers, steps
        gc.collect()


def build(config: SpeedConfig, name: str, ids: Tensor) -> tuple[dict[str, Trainer], list[str]]:
    """A trainer a method, each with its own model, after one step; and the methods that ran out of
    memory.
    """
    trainers: dict[str, Trainer] = {}
    failed = []
    for method in config.methods:
        try:
            model = model_of(name, ids.shape[1], config.device, config.seed)
            narrow = None if config.autocast == "float32" else torch.bfloat16
            trainers[method] = trainer(method, model, len(ids), seed=config.seed, autocast=narrow)
            trainers[method].step(ids)
        except torch.OutOfMemoryError:
            trainers.pop(method, None)
            failed.append(method)
            gc.collect()
    return trainers, failed


def peak_bytes(one: Trainer, ids: Tensor) -> dict[str, Any]:
    """The most bytes that a step takes beyond what stands before it (parameters and optimizer
    state).
    """
    SCRATCH_BUFFER.release()  # it counts with the step that asks for it
    if ids.is_cuda:
        standing = torch.cuda.memory_allocated()
        with meters.cuda_peak_bytes() as peaks:
            one.step(ids)
        return {"counter": "cuda_allocator", "peak_bytes": peaks()["cuda_allocator"] - standing}
    with meters.live_bytes() as meter:
        one.step(ids)
    return {"counter": "allocator", "peak_bytes": meter.peak_bytes()}
