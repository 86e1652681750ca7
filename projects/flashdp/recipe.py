"""The settings of a private fine-tuning run, and the noise that follows from them."""

import argparse
import decimal
import math
from dataclasses import dataclass, fields

import torch

from projects.flashdp import accounting
from projects.flashdp.accounting import Mechanism
from shared.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """The settings that decide which weights a run ends with and what it spends. A run goes on only
    with the same ones.
    """

    epsilon: float | None
    noise_multiplier: float | None
    delta: float
    accountant: str
    clip: float
    noise_seed: int | None
    steps: int
    batch_size: int
    micro_batch: int
    sequence_length: int
    optimizer: str
    lr: float
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    seed: int
    lora_rank: int | None
    lora_alpha: int | None
    lora_targets: str | None
    backend: str
    dtype: str
    device: str
    gradient_checkpointing: bool

    @classmethod
    def of(cls, options: argparse.Namespace, records: int) -> "Recipe":
        """From the command line, with the defaults that depend on other options or on the data."""
        given = {f.name: getattr(options, f.name) for f in fields(cls)}
        if options.lora_rank is None and (options.lora_alpha or options.lora_targets):
            raise UserError("--lora-alpha and --lora-targets need --lora-rank")
        if options.lora_rank is not None and options.lora_alpha is None:
            given["lora_alpha"] = 2 * options.lora_rank
        if options.noise_seed is not None and options.noise_seed >= 1 << 256:
            raise UserError("--noise-seed must be below 2**256")
        if options.lr is None:
            given["lr"] = 1e-4 if options.lora_rank is None else 1e-3
        if options.delta is None:
            given["delta"] = default_delta(records)
        if options.steps is None:
            given["steps"] = max(1, round(options.epochs * records / options.batch_size))
        given["device"] = torch.device(options.device).type
        return cls(**given)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        along = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        match self.lr_schedule:
            case "linear":
                return self.lr * (1 - along)
            case "cosine":
                return self.lr * (1 + math.cos(math.pi * along)) / 2
        return self.lr


def default_delta(records: int) -> float:
    """A tenth of one over the number of records, rounded down to one digit."""
    return float(
        decimal.Context(prec=1, rounding=decimal.ROUND_DOWN).divide(
            decimal.Decimal(1), decimal.Decimal(10 * records)
        )
    )


def calibrated(recipe: Recipe, records: int) -> dict[str, float]:
    """The noise multiplier and the epsilon of all steps."""
    if recipe.batch_size > records:
        raise UserError(
            f"--batch-size {recipe.batch_size} is more than the {records} records of --data"
        )
    accounting.check_delta(recipe.delta, records)
    rate, sigma = recipe.batch_size / records, recipe.noise_multiplier
    if sigma is None:
        assert recipe.epsilon is not None
        sigma = accounting.noise_multiplier(
            recipe.epsilon, recipe.delta, rate, recipe.steps, recipe.accountant
        )
    return {
        "noise_multiplier": sigma,
        "promised": accounting.epsilon(
            [Mechanism(sigma, rate, recipe.steps)], recipe.delta, recipe.accountant
        ),
    }
