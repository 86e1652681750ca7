"""What a user may choose about a run of ZO2: names, defaults, and the choices that are refused.

It knows nothing of how a choice is carried out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from projects.zo2.mezo import NO_DECAY, Loss, model_loss
from shared.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `ZO2`.

    Attributes:
        blocks: names of the containers whose children are offloaded; default the largest ModuleList
            or Sequential.
        shared: names of modules outside the blocks that one forward calls more than once (tied
            weights are found without it).
        lr: learning rate, or a function of the step number. Stored with each step's pending update.
        eps: size of the perturbation.
        weight_decay, no_decay: the update is lr * (g z + weight_decay theta); parameters whose
            names contain a part of `no_decay` do not decay.
        seed: the step's seeds derive from it and the step number; `step(seed=...)` overrides.
        probe: "inplace" perturbs and restores the weights as MeZO does (bitwise equal to it, with
            its rounding drift); "fresh" forms the perturbed weights beside pristine ones (no drift;
            one more block of device memory).
        storage: "ram", a path of a safetensors file, or None to keep every block on the device.
        storage_dtype, rounding: keep floating-point tensors of the blocks in a narrower dtype,
            rounded to "nearest" or "stochastic"ally.
        slots: how many blocks the device holds.
        overlap: move blocks while computing.
        cache_noise: keep the noise of the visiting block in a buffer (one more block of device
            memory) and draw it once instead of three times. Without effect in float16, where it
            would not be MeZO's to the last bit.
        reuse, bucket: keep the slots for good; move a block as one copy. Off only to show what they
            are worth.
        drop_cache: for a file, read and write the disk itself and not the page cache.
        device: where to compute; default the device of the first parameter (a CPU for the meta
            device).
        loss: `loss(model, batch)`, a scalar; default the loss of a Hugging Face model.
        trace: record what each lane did in `ZO2.spans`.

    Raises UserError for a value that is not allowed and for options that contradict each other.
    """

    blocks: Sequence[str] | None = None
    shared: Sequence[str] = ()
    lr: float | Callable[[int], float] = 1e-6
    eps: float = 1e-3
    weight_decay: float = 0.0
    no_decay: Sequence[str] = NO_DECAY
    seed: int = 0
    probe: Literal["inplace", "fresh"] = "inplace"
    storage: Literal["ram"] | Path | None = "ram"
    storage_dtype: torch.dtype | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    slots: int = 3
    overlap: bool = True
    cache_noise: bool = True
    reuse: bool = True
    bucket: bool = True
    drop_cache: bool = False
    device: torch.device | str | None = None
    loss: Loss = model_loss
    trace: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise UserError(f"eps must be positive and finite, not {self.eps}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay must be at least 0 and finite, not {self.weight_decay}")
        if self.slots < 1:
            raise UserError(f"slots must be at least 1, not {self.slots}")
        for name, value, allowed in (
            ("probe", self.probe, ("inplace", "fresh")),
            ("rounding", self.rounding, ("nearest", "stochastic")),
        ):
            if value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        if not (self.storage is None or self.storage == "ram" or isinstance(self.storage, Path)):
            raise UserError(
                "storage must be 'ram', a pathlib.Path of a safetensors file, or None, not"
                f" {self.storage!r}"
            )
        if self.storage is None and self.storage_dtype is not None:
            raise UserError(
                "storage_dtype needs a storage: blocks that never leave the device are not stored"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr(step) if callable(self.lr) else self.lr

    def decay(self, name: str) -> float:
        """The weight decay of the parameter called `name`."""
        return 0.0 if any(part in name for part in self.no_decay) else self.weight_decay
