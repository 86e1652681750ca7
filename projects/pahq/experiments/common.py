"""What the experiments share: policies by name, small models trained in place, random shapes."""

from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from projects.pahq.data import SMALL, Small, Task
from projects.pahq.decoder import Decoder
from projects.pahq.engine import Engine
from projects.pahq.labels import FP32, KINDS
from projects.pahq.policy import Policy
from projects.pahq.quantise import Format
from projects.pahq.tiny import TinyDecoder
from shared import experiment
from shared.seeding import step_seed

HEADS, WIDTH = 8, 64  # of the small models


class DeviceConfig(experiment.Config):
    """Of an experiment that a GPU can run."""

    device: str = "cpu"
    """cpu or cuda"""


class RepeatsConfig(DeviceConfig):
    """Of an experiment that takes times in turns."""

    repeats: PositiveInt
    """rounds of timings"""


def policy(method: str, form: Format = "int8", **options: Any) -> Policy:
    """The policy of a method's name in `labels`."""
    return Policy(KINDS[method], form, **options)  # type: ignore[arg-type]


def variants(formats: list[Format], methods: tuple[str, ...]) -> list[tuple[str, Format | None]]:
    """fp32 once, and each of `methods` in each format."""
    return [(FP32, None), *((method, form) for form in formats for method in methods)]


def empty_model(small: Small) -> TinyDecoder:
    """Of a small task's shape, its weights to be trained."""
    return TinyDecoder(small.layers, HEADS, WIDTH, small.vocabulary, small.length, small.inner)


def trained_model(run: experiment.Run, name: str, seed: int) -> TinyDecoder:
    """A model that the experiment `models` trained."""
    model = empty_model(SMALL[name])
    model.load_state_dict(run.used_tensors("models", tensors_name(name, seed)))
    return model.eval().requires_grad_(False)


def tensors_name(name: str, seed: int) -> str:
    """Under which `models` keeps a model's weights."""
    return f"{name.replace('-', '_')}_{seed}"


def prompts(name: str, count: int, seed: int, what: str) -> Task:
    """Prompts of a small task; `what` tells those of a search from held-out ones."""
    return SMALL[name].make(count, torch.Generator().manual_seed(step_seed(seed, name, what)))


def engine_of(decoder: Decoder, task: Task, how: Policy | None = None, **options: Any) -> Engine:
    """For a task's prompts."""
    return Engine(decoder, task.clean, task.corrupted, task.positions, how, **options)


@torch.no_grad()
def reference(decoder: Decoder, task: Task) -> Tensor:
    """The full model's logits in full precision at the scored positions, [B, P, vocabulary]."""
    return engine_of(decoder, task).logits()


class GridConfig(experiment.Config):
    """A grid of thresholds on a logarithmic scale."""

    thresholds: PositiveInt
    """how many"""
    lowest: float = Field(gt=0)
    """the smallest threshold"""
    highest: float = Field(gt=0)
    """the largest threshold"""
