"""Table "sensitivity" and figure "offloading_cost": step time with offloading to a cold disk over
step time on the device, against tokens per step.

The prediction beside it follows the paper's overlap condition: from the spans of a run without
overlap, a step with overlap takes what is outside the blocks plus the longest of the three lanes.
"""

from typing import Any

import numpy as np
from pydantic import Field

from projects.zo2.data import random_tokens
from projects.zo2.experiments import common
from projects.zo2.experiments.common import COLD, ON_DEVICE, SYNC, TimedModelConfig
from projects.zo2.labels import LANES, OVERLAP, RESIDENT, SYNCHRONOUS
from shared import experiment
from shared.models import causal_lm_config, random_causal_lm

VARIANTS: dict[str, dict[str, Any]] = {
    RESIDENT: ON_DEVICE,
    OVERLAP: COLD,
    SYNCHRONOUS: {**COLD, **SYNC, "trace": True},
}


class Config(TimedModelConfig):
    grid: list[tuple[int, int]] = Field(min_length=2)
    """sequences of a step, and tokens of a sequence"""


def run(config: Config, run: experiment.Run) -> None:
    shape = causal_lm_config(
        "opt", config.layers, config.hidden, config.heads, config.vocabulary, tied=True
    )
    for batch_size, tokens in run.progress(config.grid, "batch and sequence"):
        batch = random_tokens(config.vocabulary, batch_size, tokens, 1, config.seed)[0]
        with common.scratch() as folder:
            steppers = {
                name: common.make(
                    "zo2", random_causal_lm(shape, config.seed), batch, options, folder, "cpu"
                )
                for name, options in VARIANTS.items()
            }
            found = common.measure(run, steppers, config.repeats, f"{batch_size} x {tokens}")
        lanes = lane_seconds(steppers[SYNCHRONOUS].trainer.spans, config.repeats)
        for variant, rounds in found.items():
            for record in rounds:
                run.row(
                    variant=variant,
                    batch_size=batch_size,
                    sequence=tokens,
                    tokens=batch_size * tokens,
                    **record,
                    **{f"{lane}_lane_seconds": seconds for lane, seconds in lanes.items()},
                )


def lane_seconds(spans: list[Any], repeats: int) -> dict[str, float]:
    """Median over the last `repeats` steps of what each lane spent in a step."""
    found = {}
    for lane in LANES:
        mine = [span for span in spans if span.lane == lane]
        blocks = len({span.block for span in mine})
        steps = np.array([span.end - span.start for span in mine]).reshape(-1, blocks).sum(1)
        found[lane] = float(np.median(steps[-repeats:]))
    return found
