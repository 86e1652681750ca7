"""Table "ablation": bytes moved and time per step with each part of ZO2 taken away. The losses must
not change by a bit.

A small Llama shape with random weights. "tier" is where the blocks rest: RAM, or a file that is
read from and written to the disk each time.
"""

from typing import Any

from pydantic import Field

from projects.zo2.experiments import _timing
from projects.zo2.experiments._timing import COLD, RAM, SYNC
from projects.zo2.tasks import random_tokens
from shared import experiment
from shared.models import causal_lm_config, random_causal_lm

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("zo2", {}),
    "no overlap": ("zo2", SYNC),
    "no deferred update": ("unfused", {}),
    "no dual forward (three visits)": ("naive", {}),
    "no reused slots": ("zo2", {"reuse": False}),
    "two slots": ("zo2", {"slots": 2}),
    "one slot": ("zo2", {"slots": 1}),
    "noise not cached": ("zo2", {"cache_noise": False}),
    "tensor by tensor": ("zo2", {"bucket": False}),
}
RAM_ONLY = ("tensor by tensor",)  # a file is read tensor by tensor in any case, in one call


class Config(experiment.Config):
    layers: int = Field(default=8, ge=1)
    hidden: int = Field(default=576, ge=8)
    heads: int = Field(default=9, ge=1)
    vocabulary: int = Field(default=2048, ge=16)
    tokens: int = Field(default=128, ge=2)
    repeats: int = Field(default=6, ge=1)


def run(config: Config, run: experiment.Run) -> None:
    shape = causal_lm_config(
        "llama", config.layers, config.hidden, config.heads, config.vocabulary, tied=True
    )
    batch = random_tokens(config.vocabulary, 1, config.tokens, 1, config.seed)[0]
    for tier, storage in (("RAM", RAM), ("disk", COLD)):
        with _timing.scratch() as folder:
            steppers = {
                name: _timing.make(
                    kind,
                    random_causal_lm(shape, config.seed),
                    batch,
                    {**storage, **options},
                    folder,
                    "cpu",
                )
                for name, (kind, options) in VARIANTS.items()
                if tier == "RAM" or name not in RAM_ONLY
            }
            found = _timing.measure(run, steppers, config.repeats, tier)
        reference = steppers["full"].losses
        for variant, rounds in found.items():
            for record in rounds:
                run.row(
                    tier=tier,
                    variant=variant,
                    **record,
                    buffers=len(steppers[variant].trainer.slot_pointers)
                    if variant != "no reused slots"
                    else None,
                    differing_losses=sum(
                        a != b for a, b in zip(steppers[variant].losses, reference, strict=True)
                    ),
                    blocks=config.layers,
                )
