"""The commands that damaged input is given to; see tests/fuzz.py."""

from pathlib import Path

import numpy as np
from fuzz import Command

from projects.ecif.command import main, parser


def prepare(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name, n in (("train", 11), ("clean", 9)):
        np.savez(
            folder / f"{name}.npz", text=draw.normal(size=(n, 5)), image=draw.normal(size=(n, 7))
        )


COMMANDS = [
    Command(
        "ecif score",
        main,
        parser,
        prepare,
        (
            "score", "--model", "heads", "--batch", "4", "--size", "3", "--delta", "6",
            "--data", "{}/train.npz", "--query", "{}/clean.npz",
        ),
        "scores.csv",
        {"--data": "arrays", "--query": "arrays"},
    ),
]  # fmt: skip
