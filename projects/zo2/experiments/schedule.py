"""Figure "lanes": what the three lanes do during one step, with and without overlap, from a cold
disk.

With overlap the last upload of a step is that of block 0 for the next one, and its first has come
with the step before.
"""

from pydantic import Field

from projects.zo2.data import random_tokens
from projects.zo2.experiments import common
from projects.zo2.experiments.common import COLD, SYNC, SmallModelConfig
from projects.zo2.labels import LANES, OVERLAP, SYNCHRONOUS
from shared import experiment
from shared.models import causal_lm_config, random_causal_lm


class Config(SmallModelConfig):
    tokens: int = Field(ge=2)
    """of the one sequence of a step"""
    steps: int = Field(ge=2)
    """made before the lanes are read; they show the last"""


def run(config: Config, run: experiment.Run) -> None:
    shape = causal_lm_config(
        "llama", config.layers, config.hidden, config.heads, config.vocabulary, tied=True
    )
    batch = random_tokens(config.vocabulary, 1, config.tokens, 1, config.seed)[0]
    for variant, options in run.progress([(OVERLAP, {}), (SYNCHRONOUS, SYNC)], "variants"):
        with common.scratch() as folder:
            model = random_causal_lm(shape, config.seed)
            stepper = common.make(
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
