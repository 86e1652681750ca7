"""Table "throughput": tokens per second of MeZO, of ZO2 with all blocks on the device, and of ZO2
from each storage tier.

SmolLM2-135M on real text at the cpu scale; OPT shapes with random weights on a GPU. One step of
each variant in turns.
"""

from typing import Any, Literal

import torch
from pydantic import Field

from projects.zo2.experiments import _timing
from projects.zo2.experiments._timing import COLD, RAM, RESIDENT, SYNC, WARM
from projects.zo2.tasks import random_tokens, text_tokens
from shared import experiment
from shared.models import causal_lm_config, random_causal_lm
from shared.models.shapes import OPT_SHAPES

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "MeZO": ("mezo", {}),
    "ZO2, all on the device": ("zo2", RESIDENT),
    "ZO2, RAM": ("zo2", RAM),
    "ZO2, RAM, no overlap": ("zo2", {**RAM, **SYNC}),
    "ZO2, disk warm": ("zo2", WARM),
    "ZO2, disk cold": ("zo2", COLD),
    "ZO2, disk cold, no overlap": ("zo2", {**COLD, **SYNC}),
}


SHAPES = {**OPT_SHAPES, "opt-tiny": (3, 64, 4)}  # the last for the wiring


class Config(experiment.Config):
    models: list[str] = ["smollm2-135m"]
    variants: list[Literal[tuple(VARIANTS)]] = list(VARIANTS)  # type: ignore[valid-type]
    batch_size: int = Field(default=1, ge=1)
    tokens: int = Field(default=256, ge=2)
    repeats: int = Field(default=6, ge=1)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"


def run(config: Config, run: experiment.Run) -> None:
    _timing.check_device(config.device, "zo2/throughput")
    for name in config.models:
        with _timing.scratch() as folder:
            steppers = {}
            for variant in config.variants:
                kind, options = VARIANTS[variant]
                model, batch = load(name, config)
                steppers[variant] = _timing.make(kind, model, batch, options, folder, config.device)
            for variant, rounds in _timing.measure(run, steppers, config.repeats, name).items():
                for record in rounds:
                    run.row(
                        model=name,
                        variant=variant,
                        tokens=config.batch_size * config.tokens,
                        dtype=config.dtype,
                        device=config.device,
                        **record,
                        last_loss=steppers[variant].losses[-1],
                    )


def load(name: str, config: Config) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model by the name of a shape (random weights, random tokens) or of a pretrained one (real
    text), and a batch.
    """
    dtype = getattr(torch, config.dtype)
    if name in SHAPES:
        model = random_causal_lm(
            causal_lm_config("opt", *SHAPES[name], positions=2048, tied=False), config.seed, dtype
        )
        return model, random_tokens(50272, config.batch_size, config.tokens, 1, config.seed)[0]
    from shared.data.loaders import wiki100
    from shared.models import load_causal_lm

    model, tokenizer = load_causal_lm(name, dtype)
    return model, text_tokens(
        tokenizer, list(wiki100().values()), config.batch_size, config.tokens, 1
    )[0]
