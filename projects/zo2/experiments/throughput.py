"""Table "throughput": tokens per second of MeZO, of ZO2 with all blocks on the device, and of ZO2
from each storage tier.

Ten blocks of SmolLM2-135M on real text at the cpu scale; OPT shapes with random weights on GPUs.
One step of each variant in turns.
"""

import copy
from typing import Any, Literal

import torch
from pydantic import Field

from projects.zo2 import labels
from projects.zo2.data import random_tokens, text_tokens
from projects.zo2.experiments import common
from projects.zo2.experiments.common import COLD, ON_DEVICE, RAM, SYNC, WARM, Device, Dtype
from shared import experiment
from shared.models import causal_lm_config, random_causal_lm
from shared.models.shapes import OPT_SHAPES

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    labels.MEZO: ("mezo", {}),
    labels.ON_DEVICE: ("zo2", ON_DEVICE),
    labels.FROM_RAM: ("zo2", RAM),
    labels.FROM_RAM + labels.NO_OVERLAP: ("zo2", {**RAM, **SYNC}),
    labels.FROM_WARM_DISK: ("zo2", WARM),
    labels.FROM_COLD_DISK: ("zo2", COLD),
    labels.FROM_COLD_DISK + labels.NO_OVERLAP: ("zo2", {**COLD, **SYNC}),
}
SHAPES = {**OPT_SHAPES, "opt-tiny": (3, 64, 4)}  # the last for the pipeline check


class Config(experiment.Config):
    models: list[str] = Field(min_length=1)
    """shapes of OPT with random weights and tokens, or pretrained models on real text"""
    variants: list[Literal[labels.THROUGHPUT]] = Field(min_length=1)
    """rows of the table"""
    batch_size: int = Field(ge=1)
    """sequences of a step"""
    tokens: int = Field(ge=2)
    """of a sequence"""
    repeats: int = Field(ge=1)
    """recorded rounds, in each of which every variant makes a step (6 make an interval)"""
    dtype: Dtype
    """of the weights"""
    blocks: int | None = Field(ge=1)
    """of a pretrained model only the first so many, each of which costs what any other does; null:
    all"""
    device: Device = "cpu"
    """where to compute"""


def run(config: Config, run: experiment.Run) -> None:
    common.check_device(config.device, "zo2/throughput")
    for name in config.models:
        model, batch = load(name, config)
        with common.scratch() as folder:
            steppers = {
                variant: common.make(
                    VARIANTS[variant][0],
                    copy.deepcopy(model),
                    batch,
                    VARIANTS[variant][1],
                    folder,
                    config.device,
                )
                for variant in config.variants
            }
            for variant, rounds in common.measure(run, steppers, config.repeats, name).items():
                for record in rounds:
                    run.row(
                        model=f"{name}, {config.blocks} blocks" if config.blocks else name,
                        variant=variant,
                        tokens=config.batch_size * config.tokens,
                        dtype=config.dtype,
                        device=config.device,
                        **record,
                        last_loss=steppers[variant].losses[-1],
                    )


def load(name: str, config: Config) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model by the name of a shape (random weights, random tokens) or of a pretrained one (real
    text), and a batch.
    """
    dtype = getattr(torch, config.dtype)
    if name in SHAPES:
        model = random_causal_lm(
            causal_lm_config("opt", *SHAPES[name], positions=2048, tied=False), config.seed, dtype
        )
        return model, random_tokens(50272, config.batch_size, config.tokens, 1, config.seed)[0]
    from shared.data.loaders import wiki100
    from shared.models import load_causal_lm

    model, tokenizer = load_causal_lm(name, dtype)
    if config.blocks:
        del model.model.layers[config.blocks :]
        model.config.num_hidden_layers = len(model.model.layers)
    return model, text_tokens(
        tokenizer, list(wiki100().values()), config.batch_size, config.tokens, 1
    )[0]
