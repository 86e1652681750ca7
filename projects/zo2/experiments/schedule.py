"""Figure "lanes": what the three lanes do during one step, with and without overlap, from a cold
disk.

With overlap the last upload of a step is that of block 0 for the next one, and its first has come
with the step before.
"""

from pydantic import Field

from projects.zo2.experiments import _timing
from projects.zo2.experiments._timing import COLD, SYNC
from projects.zo2.tasks import random_tokens
from shared import experiment
from shared.models import causal_lm_config, random_causal_lm

LANES = ("upload", "compute", "offload")


class Config(experiment.Config):
    layers: int = Field(default=8, ge=1)
    hidden: int = Field(default=576, ge=8)
    heads: int = Field(default=9, ge=1)
    vocabulary: int = Field(default=2048, ge=16)
    tokens: int = Field(default=256, ge=2)
    steps: int = Field(default=3, ge=2)


def run(config: Config, run: experiment.Run) -> None:
    shape = causal_lm_config(
        "llama", config.layers, config.hidden, config.heads, config.vocabulary, tied=True
    )
    batch = random_tokens(config.vocabulary, 1, config.tokens, 1, config.seed)[0]
    for variant, options in run.progress([("overlap", {}), ("no overlap", SYNC)], "variants"):
        with _timing.scratch() as folder:
            model = random_causal_lm(shape, config.seed)
            stepper = _timing.make(
                "zo2", model, batch, {**COLD, **options, "trace": True}, folder, "cpu"
            )
            for _ in range(config.steps):
                stepper()
            stepper.close()
        lanes = {
            lane: [span for span in stepper.trainer.spans if span.lane == lane][-config.layers :]
            for lane in LANES
        }
        start = lanes["compute"][0].start
        for span in (span for of_lane in lanes.values() for span in of_lane):
            run.row(
                variant=variant,
                lane=span.lane,
                block=span.block,
                start_seconds=span.start - start,
                end_seconds=span.end - start,
            )
