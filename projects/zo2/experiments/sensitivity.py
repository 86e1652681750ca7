"""Table "sensitivity" and figure "offloading_cost": step time with offloading to a cold disk over
step time on the device, against tokens per step.

The prediction beside it follows the paper's overlap condition: from the spans of a run without
overlap, a step with overlap takes what is outside the blocks plus the longest of the three lanes.
"""

from typing import Any

import numpy as np
from pydantic import Field

from projects.zo2.experiments import _timing
from projects.zo2.experiments._timing import COLD, RESIDENT, SYNC
from projects.zo2.tasks import random_tokens
from shared import experiment
from shared.models import causal_lm_config, random_causal_lm

VARIANTS: dict[str, dict[str, Any]] = {
    "resident": RESIDENT,
    "overlap": COLD,
    "no overlap": {**COLD, **SYNC, "trace": True},
}


class Config(experiment.Config):
    layers: int = Field(default=6, ge=1)
    hidden: int = Field(default=512, ge=8)
    heads: int = Field(default=8, ge=1)
    vocabulary: int = Field(default=4096, ge=16)
    grid: list[tuple[int, int]] = [(1, 16), (1, 64), (1, 256), (2, 256), (4, 256)]
    repeats: int = Field(default=6, ge=1)


def run(config: Config, run: experiment.Run) -> None:
    shape = causal_lm_config(
        "opt", config.layers, config.hidden, config.heads, config.vocabulary, tied=True
    )
    for batch_size, tokens in run.progress(config.grid, "batch and sequence"):
        batch = random_tokens(config.vocabulary, batch_size, tokens, 1, config.seed)[0]
        with _timing.scratch() as folder:
            steppers = {
                name: _timing.make(
                    "zo2", random_causal_lm(shape, config.seed), batch, options, folder, "cpu"
                )
                for name, options in VARIANTS.items()
            }
            found = _timing.measure(run, steppers, config.repeats, f"{batch_size} x {tokens}")
        lanes = lane_seconds(steppers["no overlap"].trainer.spans, config.repeats)
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
    for lane in ("upload", "compute", "offload"):
        mine = [span for span in spans if span.lane == lane]
        blocks = len({span.block for span in mine})
        steps = np.array([span.end - span.start for span in mine]).reshape(-1, blocks).sum(1)
        found[lane] = float(np.median(steps[-repeats:]))
    return found
