"""What a rank works with: a model with random weights, global batches of random tokens, an engine
in a mode, and a link to the host that is emulated by waiting.

Each takes the values of a `common.ShapeConfig` as a dictionary.
"""

import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from projects.distzo2 import DistZO2, Ranks, device_mesh
from projects.distzo2.baselines import NaiveRestore
from projects.distzo2.engine import shared_engine
from projects.distzo2.labels import MODES, NAIVE
from projects.zo2 import ZO2
from projects.zo2.data import Batch, random_tokens
from shared.models import causal_lm_config, empty_causal_lm_of, random_causal_lm
from shared.models.shapes import OPT_SHAPES


def configuration(config: dict[str, Any]) -> Any:
    """The configuration of the model."""
    if config["model"]:
        return causal_lm_config(
            "opt", *OPT_SHAPES[config["model"]], positions=max(2048, config["tokens"])
        )
    return causal_lm_config(
        "llama",
        config["layers"],
        config["hidden"],
        config["heads"],
        config["vocabulary"],
        positions=config["tokens"],
    )


def make_model(config: dict[str, Any]) -> Any:
    """A model of that configuration with random weights."""
    return random_causal_lm(configuration(config), config["seed"], getattr(torch, config["dtype"]))


def empty_model(config: dict[str, Any]) -> Any:
    """The same without memory for its parameters."""
    return empty_causal_lm_of(configuration(config), getattr(torch, config["dtype"]))


def make_batch(config: dict[str, Any], step: int, shares: int) -> list[Batch]:
    """A global batch of `shares` micro-batches."""
    vocabulary = configuration(config).vocab_size
    drawn = random_tokens(
        vocabulary, config["batch_size"], config["tokens"], shares, config["seed"] + 1000 * step
    )
    return [
        {name: tensor.to(config["device"]) for name, tensor in batch.items()} for batch in drawn
    ]


def options(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Of the engines."""
    return {
        "lr": config["lr"],
        "seed": config["seed"],
        "device": config["device"],
        **more,
    }


def make_engine(mode: str, config: dict[str, Any], folder: Path, **more: Any) -> DistZO2:
    """This rank's part of a mode.

    Args:
        folder: where ranks with sliced transfers have their file.
        more: options of the engine.
    """
    dp, pert, transfer = MODES[mode]
    ranks, chosen = Ranks(device_mesh(dp, pert)), options(config, **more)
    if transfer == "sliced":
        number = len(list(folder.glob("*.safetensors")))
        dist.barrier()
        engine = shared_engine(
            lambda: make_model(config),
            folder / f"{mode}-{number}.safetensors",
            ranks,
            lambda: empty_model(config),
            **chosen,
        )
    else:
        kind = NaiveRestore if mode == NAIVE else ZO2
        engine = kind(make_model(config), forwards=ranks, storage="ram", **chosen)
    return DistZO2(engine, transfer, check_every=0)


def throttled(move: Callable[..., int], bytes_per_second: float) -> Callable[..., int]:
    """`move`, which returns how many bytes it moved, at no more than so many bytes a second; 0: as
    it is.
    """

    def slowly(*arguments: Any) -> int:
        start = perf_counter()
        moved = move(*arguments)
        if bytes_per_second:
            time.sleep(max(0.0, moved / bytes_per_second - (perf_counter() - start)))
        return moved

    return slowly


def emulate_link(engine: ZO2, bytes_per_second: float) -> Callable[[], None]:
    """From now on this rank's part of the link to the host has that rate; 0: as it is.

    Returns what takes the emulation away.
    """
    store = engine.store
    assert store is not None
    plain = {"read": store.read, "write": store.write}
    for name, move in plain.items():
        setattr(store, name, throttled(move, bytes_per_second))

    def remove() -> None:
        for name, move in plain.items():
            setattr(store, name, move)

    return remove
