"""What ranks fine-tune on: ZO2's tasks, and handwritten digits for where many steps are to be
seen; and the global batches that they share out.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from projects.zo2.data import Classification
from projects.zo2.data import classification as zo2_task

TaskName = Literal["fine-food", "sst2", "digits"]


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
    """The task of a `common.TrainConfig`."""
    if config["task"] == "digits":
        return Digits()
    found: Classification = zo2_task(
        config["task"], config["model"], config["tokens"], getattr(torch, config["dtype"])
    )
    return found


def noise_seed(seed: int, step: int) -> int:
    """The seed of a step's direction in a training of that seed: no two have the same."""
    return seed * 1_000_000 + step


def global_batches(
    task: Classification, config: dict[str, Any], batch_size: int
) -> list[list[dict[str, Any]]]:
    """For each step the micro-batches of a global batch of `batch_size` rows, in order."""
    shares = config["shares"]
    parts = task.train_batches(config["steps"] * shares, batch_size // shares, config["seed"])
    return [parts[step * shares : (step + 1) * shares] for step in range(config["steps"])]
