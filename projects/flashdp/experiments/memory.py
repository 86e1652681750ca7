"""Table "memory": the extra bytes at the peak of a step of a pretrained model, SmolLM2-135M,
against the batch size.

Beside it one cell of a model of 21 million parameters, where the paper's claim (no memory beyond
non-private training) is checked.
"""

from typing import Any

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
    # A method's batches of one model in turn, with one trainer.
    models = list(dict.fromkeys(name for name, _, _ in config.cells))
    work = [(name, method) for name in models for method in config.methods]
    peaks: dict[tuple[common.Cell, str], dict[str, Any]] = {}
    parameters: dict[str, int] = {}
    for name, method in run.progress(work, "models and methods"):
        cells = [cell for cell in config.cells if cell[0] == name]
        model = (
            pretrained(name)
            if name not in common.DECODERS
            else common.model_of(
                name, max(tokens for _, _, tokens in cells), config.device, config.seed
            )
        )
        vocabulary = common.DECODERS[name][0] if name in common.DECODERS else 2048
        parameters[name] = sum(p.numel() for p in model.parameters())
        one = trainer(
            method,
            model.to(config.device),
            max(batch_size for _, batch_size, _ in cells),
            lr=config.lr,
            seed=config.seed,
        )
        for number, cell in enumerate(cells):
            ids = common.batch_of(config.text, vocabulary, *cell[1:], config.device, config.seed)
            try:
                if number == 0:
                    one.step(ids[:1, :8])  # makes the optimizer's state
                # Opacus keeps gradients, zeroed; freed in the next step they would lower its peak.
                for parameter in one.model.parameters():
                    parameter.grad = None
                peaks[cell, method] = common.peak_bytes(one, ids)
            except torch.OutOfMemoryError:
                one.optimizer.zero_grad()
        del one, model
    for cell in config.cells:
        name, batch_size, tokens = cell
        for method in config.methods:
            run.row(
                model=name,
                batch_size=batch_size,
                tokens=tokens,
                device=config.device,
                method=method,
                clipping=labels.clipping(method),
                parameters=parameters[name],
                out_of_memory=(cell, method) not in peaks,
                **peaks.get((cell, method), {}),
            )


def pretrained(name: str) -> nn.Module:
    """A pretrained model with no two parameters tied."""
    from shared.models import load_causal_lm

    model: nn.Module = load_causal_lm(name)[0]
    untie(model)
    return model
