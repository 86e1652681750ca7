"""Table "peers": what other installable implementations do on the same inputs.

`mezo` 0.0.1 draws the update of a large tensor row by row and its perturbation whole: the cosine of
the two directions shows when they are the same. accelerate's disk offload is compared on a forward
alone, because its parameters are on the meta device and cannot be trained this way.
"""

import importlib.util
import math
import sys
from typing import Any

import torch
from pydantic import Field

from projects.zo2 import ZO2
from projects.zo2.data import random_tokens
from projects.zo2.experiments import common
from projects.zo2.labels import IN_MEMORY
from projects.zo2.noise import Noise, Scratch
from shared import data, experiment, meters
from shared.models import causal_lm_config, random_causal_lm


class Config(experiment.Config):
    tensors: list[list[int]] = Field(min_length=1)
    """shapes of tensors whose directions are compared"""
    layers: int = Field(ge=1)
    """blocks of the model whose forward is timed"""
    hidden: int = Field(ge=8)
    """width of a block"""
    heads: int = Field(ge=1)
    """attention heads"""
    vocabulary: int = Field(ge=16)
    """tokens that the embedding knows"""
    tokens: int = Field(ge=2)
    """of the one sequence of a forward"""
    repeats: int = Field(ge=1)
    """recorded rounds of forwards (6 make an interval)"""


def run(config: Config, run: experiment.Run) -> None:
    peer = load_mezo()
    for shape in run.progress(config.tensors, "directions"):
        run.row(
            what="direction of the update against the probe's",
            shape=" x ".join(map(str, shape)),
            peer="mezo 0.0.1",
            peer_cosine=_cosine(*_peer_directions(peer, shape)),
            zo2_cosine=_cosine(*_own_directions(shape)),
        )
    forward(config, run)


def load_mezo() -> Any:
    """The module of the package as published, from the data cache (it cannot be installed beside
    current libraries).
    """
    file = next(data.path("mezo-pypi").rglob("mezo.py"))
    spec = importlib.util.spec_from_file_location("peer_mezo", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_mezo"] = module
    spec.loader.exec_module(module)
    return module


def _peer_directions(peer: Any, shape: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    probe, update = torch.zeros(shape), torch.zeros(shape)
    peer.perturb_parameters([probe], 1.0, 0)
    peer.update_params(
        [update], random_seed=0, learning_rate=-1.0, projected_grad=torch.tensor(1.0)
    )
    return probe, update


def _own_directions(shape: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    probe, update = torch.zeros(shape), torch.zeros(shape)
    noise = Noise(Scratch(torch.device("cpu"), math.prod(shape)))
    noise.seed(0)
    noise.add([(probe, probe, 1.0)], 1.0)
    noise.seed(0)
    noise.update(update, -1.0, 1.0, 0.0)
    return probe, update


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(
        torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
    )


def forward(config: Config, run: experiment.Run) -> None:
    """Time of a forward with all blocks on disk."""
    from accelerate import disk_offload

    shape = causal_lm_config(
        "opt", config.layers, config.hidden, config.heads, config.vocabulary, tied=False
    )
    batch = random_tokens(config.vocabulary, 1, config.tokens, 1, config.seed)[0]
    with common.scratch() as folder, torch.no_grad():
        plain = random_causal_lm(shape, config.seed)
        parameters = len(list(plain.parameters()))
        peer = disk_offload(
            random_causal_lm(shape, config.seed),
            folder / "peer",
            execution_device=torch.device("cpu"),
        )
        engine = ZO2(random_causal_lm(shape, config.seed), storage=folder / "own.safetensors")
        expected = plain(**batch).loss.item()
        variants = {
            IN_MEMORY: lambda: plain(**batch).loss.item(),
            "accelerate 1.15 disk_offload": lambda: peer(**batch).loss.item(),
            "ZO2 forward from disk": lambda: engine.evaluate(batch),
        }
        equal = {name: variant() == expected for name, variant in variants.items()}
        timings = meters.interleave(
            variants, config.repeats, progress=lambda total: run.progress(total, "forwards")
        )
        trainable = {
            IN_MEMORY: parameters,
            "accelerate 1.15 disk_offload": sum(not p.is_meta for p in peer.parameters()),
            "ZO2 forward from disk": parameters,
        }
        engine.close()
    for name, timing in timings.items():
        for number, seconds in enumerate(timing.seconds):
            run.row(
                what="forward with the blocks on disk",
                peer=name,
                repeat=number,
                forward_seconds=seconds,
                equal_loss=equal[name],
                trainable_tensors=trainable[name],
                tensors=parameters,
            )
