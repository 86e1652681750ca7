"""Table "equality": in how many bits ZO2 differs from MeZO, over steps with a changing learning
rate and weight decay.

Small models with random weights (equality is a property of the arithmetic). Beside the variants
that must be equal stand known bugs of public implementations, to show what each does: no flush
before the weights are read, the next step's learning rate for the pending update, and tied
embeddings perturbed twice.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from projects.zo2 import ZO2, MeZO
from projects.zo2.data import random_tokens
from projects.zo2.labels import KNOWN_BUG, MUST_BE_EQUAL
from shared import experiment
from shared.models import causal_lm_config, random_causal_lm

FAMILIES = {
    "opt (tied)": ("opt", True),
    "opt (untied)": ("opt", False),
    "gpt2": ("gpt2", True),
    "llama": ("llama", True),
    "qwen3": ("qwen3", True),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "on the device": {"storage": None},
    "RAM, 3 slots": {"storage": "ram"},
    "RAM, no overlap": {"storage": "ram", "overlap": False},
    "RAM, 1 slot": {"storage": "ram", "slots": 1},
    "RAM, 2 slots, noise not cached": {"storage": "ram", "slots": 2, "cache_noise": False},
    "RAM, tensor by tensor": {"storage": "ram", "bucket": False},
    "disk, 3 slots": {"storage": "disk"},
    "disk, no overlap": {"storage": "disk", "overlap": False},
}


class Config(experiment.Config):
    steps: int = Field(ge=2)
    """of training"""
    layers: int = Field(ge=1)
    """blocks"""
    hidden: int = Field(ge=8, multiple_of=8)
    """width of a block"""
    vocabulary: int = Field(ge=16)
    """tokens that the embedding knows"""
    batch_size: int = Field(ge=1)
    """sequences of a step"""
    tokens: int = Field(ge=2)
    """of a sequence"""
    lr: float = Field(gt=0)
    """learning rate of the first step; that of step t is a (1 + t)-th of it"""
    weight_decay: float = Field(ge=0)
    """of all but biases and norms"""


def run(config: Config, run: experiment.Run) -> None:
    def rate(step: int) -> float:
        return config.lr / (1 + step)

    batches = random_tokens(
        config.vocabulary, config.batch_size, config.tokens, config.steps, config.seed
    )
    common: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
    for family, (kind, tied) in run.progress(list(FAMILIES.items()), "models"):
        shape = causal_lm_config(
            kind, config.layers, config.hidden, 4, config.vocabulary, positions=64, tied=tied
        )
        model = random_causal_lm(shape, config.seed)
        order: list[str] = []
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            for variant, options in VARIANTS.items():
                where = (
                    {"storage": Path(folder) / f"{variant}.safetensors"}
                    if options["storage"] == "disk"
                    else {}
                )
                engine = ZO2(copy.deepcopy(model), **common, **{**options, **where})
                steps = [engine.step(batch, seed=i) for i, batch in enumerate(batches)]
                results[variant] = (
                    [(s.loss, s.projected_gradient) for s in steps],
                    engine.state_dict(),
                )
                order = engine.parameter_order()
                engine.close()
        reference = copy.deepcopy(model)
        named = dict(reference.named_parameters())
        mezo = MeZO(reference, parameters=[(name, named[name]) for name in order], **common)
        expected = [mezo.step(batch, i) for i, batch in enumerate(batches)]
        weights = {name: p.data for name, p in reference.named_parameters()}

        broken = known_bugs(model, batches, order, common, config)
        for kind_of_run, runs in ((MUST_BE_EQUAL, results), (KNOWN_BUG, broken)):
            for variant, (losses, found) in runs.items():
                bits, largest = differing_bits(weights, found)
                run.row(
                    model=family,
                    variant=variant,
                    kind=kind_of_run,
                    steps=config.steps,
                    parameters=sum(p.numel() for p in weights.values()),
                    differing_losses=sum(
                        a[0] != b[0] for a, b in zip(losses, expected, strict=True)
                    ),
                    differing_gradients=sum(
                        a[1] != b[1] for a, b in zip(losses, expected, strict=True)
                    ),
                    differing_bits=bits,
                    largest_difference=largest,
                )


def known_bugs(
    model: Any, batches: list[Any], order: list[str], common: dict[str, Any], config: Config
) -> dict[str, tuple[list[tuple[float, float]], dict[str, torch.Tensor]]]:
    """What goes wrong in public implementations, done here on purpose."""
    results = {}
    late = ZO2(copy.deepcopy(model), **common, storage=None)
    steps = [late.step(batch, seed=i) for i, batch in enumerate(batches)]
    unflushed = {name: p.data.clone() for name, p in late.model.named_parameters()}
    results["not flushed before the weights are read"] = (
        [(s.loss, s.projected_gradient) for s in steps],
        unflushed,
    )

    copied = copy.deepcopy(model)
    named = dict(copied.named_parameters())
    wrong_rate = MeZO(
        copied,
        parameters=[(name, named[name]) for name in order],
        lr=lambda step: common["lr"](step + 1),
        weight_decay=config.weight_decay,
    )
    losses = [wrong_rate.step(batch, i) for i, batch in enumerate(batches)]
    results["next step's learning rate for the pending update"] = (
        losses,
        {n: p.data for n, p in copied.named_parameters()},
    )

    if model.config.tie_word_embeddings:
        # Walking the modules with a tied head perturbs the shared matrix once as the embedding and
        # once as the head, with two directions: exactly what untied copies of it would get.
        untied = copy.deepcopy(model)
        head = untied.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        named = dict(untied.named_parameters())
        last = next(name for name, p in named.items() if p is head.weight)
        twice = MeZO(untied, parameters=[(name, named[name]) for name in [*order, last]], **common)
        losses = [twice.step(batch, i) for i, batch in enumerate(batches)]
        results["tied embedding perturbed twice"] = (
            losses,
            {n: p.data for n, p in untied.named_parameters() if n != last},
        )
    return results


def differing_bits(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> tuple[int, float]:
    """How many bits of float32 tensors differ, and the largest difference of two values."""
    bits, largest = 0, 0.0
    for name, value in expected.items():
        flipped = value.view(torch.int32).numpy() ^ found[name].view(torch.int32).numpy()
        bits += int(np.bitwise_count(flipped.view(np.uint32)).sum())
        largest = max(largest, float((value - found[name]).abs().max()))
    return bits, largest
