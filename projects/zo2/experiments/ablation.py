"""Table "ablation": bytes moved and time per step with each part of ZO2 taken away. The losses must
not change by a bit.

A small Llama shape with random weights. "tier" is where the blocks rest: RAM, or a file that is
read from and written to the disk each time.
"""

from typing import Any

from pydantic import Field

from projects.zo2.data import random_tokens
from projects.zo2.experiments import common
from projects.zo2.experiments.common import COLD, RAM, SYNC, TimedModelConfig
from projects.zo2.labels import (
    FULL,
    IN_RAM,
    NO_DEFERRED_UPDATE,
    NO_REUSED_SLOTS,
    NOISE_NOT_CACHED,
    ON_DISK,
    ONE_SLOT,
    SYNCHRONOUS,
    TENSOR_BY_TENSOR,
    THREE_VISITS,
    TWO_SLOTS,
)
from shared import experiment
from shared.models import causal_lm_config, random_causal_lm

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    FULL: ("zo2", {}),
    SYNCHRONOUS: ("zo2", SYNC),
    NO_DEFERRED_UPDATE: ("unfused", {}),
    THREE_VISITS: ("naive", {}),
    NO_REUSED_SLOTS: ("zo2", {"reuse": False}),
    TWO_SLOTS: ("zo2", {"slots": 2}),
    ONE_SLOT: ("zo2", {"slots": 1}),
    NOISE_NOT_CACHED: ("zo2", {"cache_noise": False}),
    TENSOR_BY_TENSOR: ("zo2", {"bucket": False}),
}
RAM_ONLY = (TENSOR_BY_TENSOR,)  # a file is read tensor by tensor in any case, in one call


class Config(TimedModelConfig):
    tokens: int = Field(ge=2)
    """of the one sequence of a step"""


def run(config: Config, run: experiment.Run) -> None:
    shape = causal_lm_config(
        "llama", config.layers, config.hidden, config.heads, config.vocabulary, tied=True
    )
    batch = random_tokens(config.vocabulary, 1, config.tokens, 1, config.seed)[0]
    for tier, storage in ((IN_RAM, RAM), (ON_DISK, COLD)):
        with common.scratch() as folder:
            steppers = {
                name: common.make(
                    kind,
                    random_causal_lm(shape, config.seed),
                    batch,
                    {**storage, **options},
                    folder,
                    "cpu",
                )
                for name, (kind, options) in VARIANTS.items()
                if tier == IN_RAM or name not in RAM_ONLY
            }
            found = common.measure(run, steppers, config.repeats, tier)
        reference = steppers[FULL].losses
        for variant, rounds in found.items():
            for record in rounds:
                run.row(
                    tier=tier,
                    variant=variant,
                    **record,
                    buffers=len(steppers[variant].trainer.slot_pointers)
                    if variant != NO_REUSED_SLOTS
                    else None,
                    differing_losses=sum(
                        a != b for a, b in zip(steppers[variant].losses, reference, strict=True)
                    ),
                    blocks=config.layers,
                )
