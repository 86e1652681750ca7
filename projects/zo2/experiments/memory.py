"""Table "memory" and figure "memory_law": peak bytes on the device against depth, for MeZO, ZO2 and
first-order training.

OPT shapes with random weights, untied embeddings, batch 1, as in the authors' own test: memory does
not depend on the weights. On a CPU the counter is torch's allocator, event by event, with the
offloaded blocks outside it; on a GPU both the CUDA allocator and the driver.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field

from projects.zo2 import ZO2, MeZO
from projects.zo2.baselines import FirstOrder
from projects.zo2.data import random_tokens
from projects.zo2.experiments.common import Device, Dtype, check_device
from projects.zo2.labels import MEMORY
from shared import experiment, meters
from shared.models import causal_lm_config, random_causal_lm
from shared.models.shapes import OPT_SHAPES

Method = Literal[tuple(MEMORY)]  # type: ignore[valid-type]


class Config(experiment.Config):
    """Depths of one width, or OPT's own shapes."""

    hidden: int | None = Field(ge=8)
    """width of the blocks at `depths`"""
    heads: int = Field(ge=1)
    """attention heads at `depths`"""
    depths: list[int]
    """numbers of blocks of width `hidden`"""
    shapes: list[Literal[tuple(OPT_SHAPES)]]  # type: ignore[valid-type]
    """OPT's shapes by name"""
    methods: list[Method] = Field(min_length=1)
    """measured at every size"""
    sparse_methods: list[Method]
    """measured at `sparse_depths` alone"""
    sparse_depths: list[int]
    """numbers of blocks at which `sparse_methods` are measured"""
    tokens: int = Field(ge=2)
    """of the one sequence of a step"""
    dtype: Dtype
    """of the weights"""
    device: Device = "cpu"
    """whose memory is measured"""
    largest_resident_gigabytes: float = Field(gt=0)
    """what the device holds: a method that needs more for weights, gradients and optimizer state is
    not tried"""


FIRST_ORDER = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
ENGINES: dict[str, dict[str, Any]] = {
    "zo2-resident": {"storage": None},
    "zo2-3": {"storage": "ram"},
    "zo2-lean": {"storage": "ram", "slots": 1, "cache_noise": False},
}


def run(config: Config, run: experiment.Run) -> None:
    check_device(config.device, "zo2/memory")
    sizes = [
        (f"opt-h{config.hidden}", depth, config.hidden, config.heads)
        for depth in config.depths
        if config.hidden
    ]
    sizes += [(name, *OPT_SHAPES[name]) for name in config.shapes]
    work = [(size, method) for size in sizes for method in config.methods]
    work += [
        (size, method)
        for size in sizes
        for method in config.sparse_methods
        if size[1] in config.sparse_depths
    ]
    for (name, layers, hidden, heads), method in run.progress(work, "models"):
        shape = causal_lm_config("opt", layers, hidden, heads, positions=2048, tied=False)
        dtype = getattr(torch, config.dtype)
        copies = {"mezo": 1, "zo2-resident": 1, "sgd": 2, "adamw": 4}.get(method, 0)
        parameters = layers * (12 * hidden**2 + 13 * hidden) + 2 * 50272 * hidden
        if copies * parameters * dtype.itemsize > config.largest_resident_gigabytes * 1e9:
            run.row(
                **_identity(config, name, layers, hidden, method),
                peak_bytes=None,
                host_bytes=0,
                counter="not tried",
            )
            continue
        measure = _on_cpu if config.device == "cpu" else _on_cuda
        for counter, peak, host in measure(
            partial(random_causal_lm, shape, config.seed, dtype), method, config
        ):
            run.row(
                **_identity(config, name, layers, hidden, method),
                peak_bytes=peak,
                host_bytes=host,
                counter=counter,
            )


def _identity(config: Config, name: str, layers: int, hidden: int, method: str) -> dict[str, Any]:
    return {
        "model": name,
        "layers": layers,
        "hidden": hidden,
        "method": method,
        "tokens": config.tokens,
        "dtype": config.dtype,
        "device": config.device,
        "block_bytes": (12 * hidden**2 + 13 * hidden) * getattr(torch, config.dtype).itemsize,
    }


def _train(
    build: Callable[[], Any], method: str, config: Config
) -> tuple[Callable[[], None], Callable[[], None], int]:
    """What to run inside the meter, what to do afterwards, and the bytes on the host tier."""
    model = build()
    batch = random_tokens(model.config.vocab_size, 1, config.tokens, 1, config.seed)[0]
    batch = {name: tensor.to(config.device) for name, tensor in batch.items()}
    if method in ENGINES:
        engine = ZO2(model, device=config.device, **ENGINES[method])

        def steps() -> None:
            engine.step(batch, seed=0)
            engine.flush()

        return steps, engine.close, engine.host_nbytes
    model = model.to(config.device)
    if method == "mezo":
        mezo = MeZO(model)
        return lambda: (mezo.step(batch, 0), None)[1], lambda: None, 0
    trainer = FirstOrder(model, FIRST_ORDER[method], lr=1e-6)
    return lambda: (trainer.step(batch), None)[1], lambda: None, 0


def _on_cpu(build: Callable[[], Any], method: str, config: Config) -> list[tuple[str, int, int]]:
    gc.collect()
    with meters.live_bytes() as meter:
        steps, close, host = _train(build, method, config)
        with meter.phase("training"):
            steps()
        close()
    return [("allocator", meter.peak_bytes("training"), host)]


def _on_cuda(build: Callable[[], Any], method: str, config: Config) -> list[tuple[str, int, int]]:
    gc.collect()
    torch.cuda.empty_cache()
    steps, close, host = _train(build, method, config)
    with meters.cuda_peak_bytes(config.device) as peaks:
        steps()
    close()
    return [(counter, peak, host) for counter, peak in peaks().items()]
