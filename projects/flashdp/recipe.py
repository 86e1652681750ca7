"""The settings of a private fine-tuning run. No torch: the command's options are made of them."""

import argparse
import decimal
import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.commands import recipe
from shared.commands.recipe import Metavar


class Recipe(recipe.Recipe):
    """The settings that decide which weights a run ends with and what it spends. A run goes on only
    with the same ones.

    Fields with `validate_default` may be left out as options; `resolved` works them out.
    """

    epsilon: float | None = Field(None, gt=0)
    """spend this much, and find the noise for it"""

    noise_multiplier: float | None = Field(None, ge=0)
    """add this much noise, and see what it spends"""

    delta: float = Field(None, gt=0, validate_default=True)
    """(1/(10 records), rounded down to one digit); below 1/records"""

    accountant: Literal["rdp", "prv", "pld"] = "pld"
    """pld and prv are tight, rdp is fast and wastes some"""

    clip: Annotated[float, Metavar("C")] = Field(1.0, gt=0)
    """bound on what a record adds to a step's gradient"""

    noise_seed: int | None = Field(None, ge=0, lt=1 << 256)
    """for tests: noise that whoever knows N can take away again"""

    steps: int = Field(None, ge=1, validate_default=True)
    """steps in all"""

    batch_size: int = Field(64, ge=1)
    """records expected in a batch; each is drawn apart"""

    micro_batch: int = Field(8, ge=1)
    """records in a forward; for memory and speed only"""

    sequence_length: int = Field(256, ge=2)
    """tokens of a record, the rest is cut"""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """the update rule"""

    lr: float = Field(None, ge=0, validate_default=True)
    """learning rate (1e-4; with LoRA 1e-3)"""

    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """constant, or to 0"""

    warmup_steps: int = Field(0, ge=0)
    """linear warm-up"""

    weight_decay: float = Field(0.0, ge=0)
    """of the optimizer"""

    seed: int = Field(0, ge=0)
    """of the adapters' first weights; neither of noise nor batches"""

    lora_rank: Annotated[int | None, Metavar("R")] = Field(None, ge=1)
    """train adapters only and save them as PEFT does"""

    lora_alpha: int | None = Field(None, ge=1)
    """scale of the adapters (2 R)"""

    lora_targets: Annotated[str | None, Metavar("A,B")] = None
    """modules to adapt, as q_proj,v_proj (all linear ones but the head)"""

    backend: str = "auto"
    """of the clipped sums: auto, loop, ghost, recompute, ..."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """to compute in; weights are kept and saved in float32"""

    device: str = "cpu"
    """cpu or cuda"""

    gradient_checkpointing: bool = False
    """less memory, a second forward of each layer"""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.lora_rank is None and (self.lora_alpha or self.lora_targets):
            raise ValueError("--lora-alpha and --lora-targets need --lora-rank")
        return self

    @classmethod
    def resolved(cls, options: argparse.Namespace, records: int) -> "Recipe":
        """From the command line, with the defaults that depend on other options or on the number
        of records. Raises UserError where options do not fit together.
        """
        rank = options.lora_rank
        values = {
            "delta": default_delta(records),
            "steps": max(1, round(options.epochs * records / options.batch_size)),
            "lr": 1e-4 if rank is None else 1e-3,
            "lora_alpha": None if rank is None else 2 * rank,
        }
        left_out = {key: value for key, value in values.items() if getattr(options, key) is None}
        # which of several GPUs it is changes nothing
        return cls.from_options(options, **left_out, device=options.device.partition(":")[0])

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
