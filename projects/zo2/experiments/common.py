"""What the experiments share: fields of their configurations, engines on every storage tier, and
steps timed in turns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import Field

from projects.zo2 import ZO2, MeZO
from projects.zo2.baselines import NaiveOffload
from projects.zo2.data import Batch
from projects.zo2.engine import Step
from projects.zo2.lanes import Traffic
from shared import experiment, meters
from shared.errors import UserError
from shared.paths import cache_dir

ON_DEVICE: dict[str, Any] = {"storage": None}
RAM: dict[str, Any] = {"storage": "ram"}
WARM: dict[str, Any] = {"storage": "disk"}
COLD: dict[str, Any] = {"storage": "disk", "drop_cache": True}
SYNC: dict[str, Any] = {"overlap": False}


Dtype = Literal["float32", "float16", "bfloat16"]
Device = Literal["cpu", "cuda"]


class SmallModelConfig(experiment.Config):
    """A small model with random weights."""

    layers: int = Field(ge=1)
    """blocks"""
    hidden: int = Field(ge=8)
    """width of a block"""
    heads: int = Field(ge=1)
    """attention heads"""
    vocabulary: int = Field(ge=16)
    """tokens that the embedding knows"""


class TimedModelConfig(SmallModelConfig):
    """A small model whose steps are timed."""

    repeats: int = Field(ge=1)
    """recorded rounds, in each of which every variant makes a step (6 make an interval)"""


def check_device(device: Device, name: str) -> None:
    """Raises UserError when a GPU is wanted and none is there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{name} wants a GPU at this scale and none is here; run it with --scale cpu"
        )


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for working files beside the data cache, where there is a real disk (a temporary
    folder may be in memory).
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache_dir(), prefix=".zo2-") as folder:
        yield Path(folder)


class Stepper:
    """A trainer that makes one step on the same batch each time it is called, with a new direction
    each time.
    """

    def __init__(self, trainer: ZO2 | MeZO, batch: Batch, flush: bool = False):
        self.trainer, self.batch, self.flush = trainer, batch, flush
        self.losses: list[float] = []

    def __call__(self) -> None:
        number = len(self.losses)
        found = self.trainer.step(self.batch, seed=number)
        self.losses.append(found.loss if isinstance(found, Step) else found[0])
        if self.flush and isinstance(self.trainer, ZO2):
            self.trainer.flush()

    def traffic(self) -> dict[str, float]:
        """What has moved so far, and how long the compute lane has waited for it."""
        moved = self.trainer.traffic if isinstance(self.trainer, ZO2) else Traffic()
        return {
            "uploads": sum(moved.uploads.values()),
            "offloads": sum(moved.offloads.values()),
            "bytes_up": moved.bytes_up,
            "bytes_down": moved.bytes_down,
            "waited_seconds": moved.waited,
        }

    def close(self) -> None:
        if isinstance(self.trainer, ZO2):
            self.trainer.close()


def make(
    kind: str, model: Any, batch: Batch, options: dict[str, Any], folder: Path, device: str
) -> Stepper:
    """A stepper of `kind` "mezo", "zo2", "unfused" (flush after each step) or "naive" on
    `model`.
    """
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if kind == "mezo":
        return Stepper(MeZO(model.to(device)), batch)
    options = dict(options)
    if options.get("storage") == "disk":
        options["storage"] = folder / f"{len(list(folder.iterdir()))}.safetensors"
    engine = NaiveOffload if kind == "naive" else ZO2
    return Stepper(engine(model, device=device, **options), batch, flush=kind == "unfused")


def measure(
    run: experiment.Run, steppers: dict[str, Stepper], repeats: int, description: str
) -> dict[str, list[dict[str, Any]]]:
    """Step all in turns, one round to warm up; per stepper a list of one dictionary a recorded
    round.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in steppers}

    def timed(name: str, stepper: Stepper) -> Callable[[], None]:
        def step() -> None:
            before = stepper.traffic()
            stepper()
            found[name].append(
                {key: after - before[key] for key, after in stepper.traffic().items()}
            )

        return step

    timings = meters.interleave(
        {name: timed(name, stepper) for name, stepper in steppers.items()},
        repeats,
        progress=lambda total: run.progress(total, description),
    )
    for name, timing in timings.items():
        del found[name][:-repeats]
        for number, (record, seconds) in enumerate(zip(found[name], timing.seconds, strict=True)):
            record.update(repeat=number, step_seconds=seconds)
    for stepper in steppers.values():
        stepper.close()
    return found
