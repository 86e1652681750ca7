"""Table "memory": the extra bytes at the peak of a step of a pretrained model, SmolLM2-135M,
against the batch size.

Beside it one cell of a model of 21 million parameters, where the paper's claim (no memory beyond
non-private training) is checked.
"""

import torch
from pydantic import Field
from torch import nn

from projects.flashdp import labels
from projects.flashdp.baselines import trainer
from projects.flashdp.experiments import common
from projects.flashdp.private import untie
from shared import experiment


class Config(experiment.Config):
    cells: list[tuple[str, int, int]] = Field(min_length=1)
    """what is measured: [model, batch size, tokens of a sequence] of each; a model of the catalogue
    is untied, as privacy wants it, for all methods
    """
    methods: list[common.Method] = Field(min_length=1)
    """those that are compared, by their names in tables"""
    text: common.Text
    """WordNet's glosses, or token ids drawn at random"""
    lr: float = Field(gt=0)
    """learning rate of AdamW"""
    device: common.Device = "cpu"
    """where it runs"""


def run(config: Config, run: experiment.Run) -> None:
    common.check_device(config.device, "flashdp/memory")
    work = [(cell, method) for cell in config.cells for method in config.methods]
    for (name, batch_size, tokens), method in run.progress(work, "cells"):
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
            # A trainer of its own for each cell: Opacus keeps tensors from step to step.
            one = trainer(
                method, model.to(config.device), batch_size, lr=config.lr, seed=config.seed
            )
            one.step(ids[:1])  # makes the optimizer's state
            peak = common.peak_bytes(one, ids)
        except torch.OutOfMemoryError:
            peak = {}
        run.row(
            model=name,
            batch_size=batch_size,
            tokens=tokens,
            device=config.device,
            method=method,
            clipping=labels.clipping(method),
            parameters=parameters,
            out_of_memory=not peak,
            **peak,
        )


def pretrained(name: str) -> nn.Module:
    """A pretrained model with no two parameters tied."""
    from shared.models import load_causal_lm

    model: nn.Module = load_causal_lm(name)[0]
    untie(model)
    return model
