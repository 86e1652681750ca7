"""Table "memory": the extra bytes at the peak of a step of a pretrained model, SmolLM2-135M,
against the batch size.

Beside it one cell of a model of 21 million parameters, where the paper's claim (no memory beyond
non-private training) is checked.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from projects.flashdp import labels
from projects.flashdp.baselines import trainer
from projects.flashdp.experiments import common
from projects.flashdp.private import untie
from shared import experiment

Method = Literal[labels.METHODS]  # type: ignore[valid-type]


class Config(experiment.Config):
    """Cells are [model, batch size, tokens]; `smollm2-135m` is untied, as privacy wants it, for all
    methods.
    """

    cells: list[tuple[str, int, int]]
    methods: list[Method] = [labels.NON_PRIVATE, labels.FLASHDP, labels.EXPLICIT, labels.OPACUS]
    text: Literal["wordnet", "random"] = "wordnet"
    device: Literal["cpu", "cuda"] = "cpu"
    lr: float = Field(default=1e-4, gt=0)


def run(config: Config, run: experiment.Run) -> None:
    common.check_device(config.device, "flashdp/memory")
    work = [(cell, method) for cell in config.cells for method in config.methods]
    for (name, batch_size, tokens), method in run.progress(work, "cells"):
        row: dict[str, Any] = {
            "model": name,
            "batch_size": batch_size,
            "tokens": tokens,
            "device": config.device,
            "method": method,
        }
        model = (
            pretrained(name)
            if name not in common.DECODERS
            else common.model_of(name, tokens, config.device, config.seed)
        )
        vocabulary = common.DECODERS[name][0] if name in common.DECODERS else 2048
        ids = common.batch_of(
            config.text, vocabulary, batch_size, tokens, config.device, config.seed
        )
        parameters = sum(p.numel() for p in model.parameters())
        try:
            one = trainer(
                method, model.to(config.device), batch_size, lr=config.lr, seed=config.seed
            )
            one.step(ids)
            measured = common.peak_bytes(one, ids)
        except torch.OutOfMemoryError:
            measured = {}
        run.row(
            **row,
            clipping=labels.clipping(method),
            parameters=parameters,
            out_of_memory=not measured,
            **measured,
        )


def pretrained(name: str) -> nn.Module:
    """A pretrained model with no two parameters tied."""
    from shared.models import load_causal_lm

    model: nn.Module = load_causal_lm(name)[0]
    untie(model)
    return model
