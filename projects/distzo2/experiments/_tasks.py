"""What ranks fine-tune on: ZO2's tasks, and handwritten digits for where many steps are to
be seen.
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from projects.zo2.tasks import Classification
from projects.zo2.tasks import classification as zo2_task
from shared import experiment

TaskName = Literal["fine-food", "sst2", "digits"]


class TaskConfig(experiment.Config):
    """A task, and how to train on it.

    A step's global batch is `shares` micro-batches of equal size, whatever the number of ranks.
    """

    task: TaskName
    model: str = ""  # the language model of "sst2"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    tokens: int = Field(default=32, ge=4)
    shares: int = Field(default=2, ge=1)
    steps: int = Field(default=30, ge=2)
    lr: float = Field(default=5e-5, gt=0)
    eps: float = Field(default=1e-3, gt=0)


class Digits(Classification):
    """The 1,797 handwritten digits of 8 x 8 pixels; every fifth is held out."""

    def __init__(self) -> None:
        from shared.data.loaders import digits

        images, labels = digits()
        held = np.arange(len(labels)) % 5 == 0
        pixels = list(images.reshape(len(images), 64).astype(np.float32) / 16)
        parts = [
            ([pixels[i] for i in np.flatnonzero(rows)], labels[rows]) for rows in (~held, held)
        ]
        super().__init__(*parts)  # type: ignore[arg-type]

    def model(self) -> nn.Module:
        """A small residual network with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _Residual()

    def encode(self, texts: list[Any]) -> dict[str, Tensor]:
        return {"pixels": torch.from_numpy(np.stack(texts))}

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        return model(inputs["pixels"].to(next(model.parameters()).device))


class _Residual(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.entry = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def make_task(config: dict[str, Any]) -> Classification:
    """The task of a `TaskConfig`."""
    if config["task"] == "digits":
        return Digits()
    found: Classification = zo2_task(
        config["task"], config["model"], config["tokens"], getattr(torch, config["dtype"])
    )
    return found


def global_batches(
    task: Classification, config: dict[str, Any], batch_size: int
) -> list[list[dict[str, Any]]]:
    """For each step the micro-batches of a global batch of `batch_size` rows, in order."""
    shares = config["shares"]
    parts = task.train_batches(config["steps"] * shares, batch_size // shares, config["seed"])
    return [parts[step * shares : (step + 1) * shares] for step in range(config["steps"])]
