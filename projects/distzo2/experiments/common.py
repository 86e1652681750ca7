"""What the experiments share: fields of their configurations, and `launch`, which starts ranks and
brings home what they measured.

A rank runs the function `on_rank(config, folder)` of the experiment's own module (`worker.py`).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from projects.distzo2.data import TaskName
from projects.distzo2.experiments import worker
from projects.distzo2.labels import MODES
from shared import experiment
from shared.errors import UserError
from shared.models.shapes import OPT_SHAPES
from shared.paths import ROOT
from shared.processes import die_with_parent

Rows = list[dict[str, Any]]
ModeName = Literal[tuple(MODES)]  # type: ignore[valid-type]
Dtype = Literal["float32", "float16", "bfloat16"]
Device = Literal["cpu", "cuda"]

# On GPUs these need one for each rank; the others are as good on ranks that share one.
TIMED = ("throughput", "link", "lanes", "cost")


class ModelConfig(experiment.Config):
    """A Llama-shaped model with random weights on random tokens: neither bits, bytes nor speed
    depend on what they are.
    """

    vocabulary: int = Field(ge=16)
    """tokens that the embedding knows"""
    batch_size: int = Field(ge=1)
    """sequences of a micro-batch"""
    shares: int = Field(ge=1)
    """micro-batches of a step's global batch, whatever the number of ranks"""
    lr: float = Field(gt=0)
    """learning rate; large enough that the weights move"""


class ShapeConfig(ModelConfig):
    """One size of it, in several modes."""

    model: Literal["", *OPT_SHAPES]  # type: ignore[valid-type]
    """one of OPT's shapes in place of `layers`, `hidden`, `heads` and `vocabulary`; or empty"""
    dtype: Dtype
    """of the weights"""
    device: Device = "cpu"
    """where ranks compute"""
    layers: int = Field(ge=1)
    """blocks"""
    hidden: int = Field(ge=8)
    """width of a block"""
    heads: int = Field(ge=1)
    """attention heads"""
    tokens: int = Field(ge=2)
    """of a sequence"""
    modes: list[ModeName] = Field(min_length=1)
    """rows of the table"""


class TrainConfig(experiment.Config):
    """A task, and how to train on it."""

    task: TaskName
    """what is learnt"""
    model: str
    """the language model of the task "sst2"; empty for the others"""
    dtype: Dtype
    """of the weights"""
    device: Device = "cpu"
    """where ranks compute"""
    tokens: int = Field(ge=4)
    """the most tokens of an example"""
    shares: int = Field(ge=1)
    """micro-batches of equal size of a step's global batch, whatever the number of ranks"""
    steps: int = Field(ge=2)
    """of training"""
    lr: float = Field(gt=0)
    """learning rate"""
    eps: float = Field(gt=0)
    """size of the perturbation"""
    test_rows: int = Field(ge=1)
    """held-out examples"""
    modes: list[ModeName] = Field(min_length=1)
    """rows of the table"""


def by_world(modes: Sequence[str]) -> dict[int, list[str]]:
    """Modes by the number of ranks they take: one launch serves all of one world size."""
    launches: dict[int, list[str]] = {}
    for mode in modes:
        launches.setdefault(MODES[mode].world, []).append(mode)
    return launches


def check_device(name: str, device: Device, world: int) -> None:
    """Raises UserError where the experiment `name` wants GPUs on `world` ranks that this machine
    has not.
    """
    if device == "cpu":
        return
    count, wanted = torch.cuda.device_count(), world if name in TIMED else 1
    if count < wanted:
        raise UserError(
            f"distzo2/{name} wants {wanted} GPU{'s' * (wanted > 1)} and here are {count}; run it"
            " with --scale cpu"
        )


def launch(name: str, world: int, config: Mapping[str, Any]) -> list[Rows]:
    """Run `on_rank` of the experiment `name` on `world` ranks of one thread each; the rows of each
    rank.

    Raises UserError where GPUs are missing, and with the last line that a failed rank said.
    """
    check_device(name, config.get("device", "cpu"), world)
    with tempfile.TemporaryDirectory(
        prefix="distzo2-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as folder:
        command = [sys.executable, "-m", worker.__name__, name, str(world)]
        command += [json.dumps(config), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            preexec_fn=die_with_parent,
            capture_output=True,
            text=True,
            check=False,
        )
        files = [Path(folder) / f"{rank}.json" for rank in range(world)]
        if done.returncode or not all(file.exists() for file in files):
            said = [line for line in done.stderr.splitlines() if "Error" in line]
            raise UserError(
                f"distzo2/{name} on {world} ranks failed:"
                f" {said[-1] if said else done.stderr[-200:]}"
            )
        return [json.loads(file.read_text()) for file in files]


def launch_modes(
    name: str, config: ShapeConfig, run: experiment.Run
) -> list[tuple[int, list[Rows]]]:
    """Launch each world size once with its modes: the number of ranks, and the rows of each."""
    values = config.model_dump()
    return [
        (world, launch(name, world, {**values, "modes": modes}))
        for world, modes in run.progress(list(by_world(config.modes).items()), "launches")
    ]
