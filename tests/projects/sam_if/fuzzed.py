"""The commands that damaged input is given to; see tests/fuzz.py."""

from pathlib import Path

import numpy as np
from fuzz import Command

from projects.sam_if.command import main, parser

PROBLEM = ("--rho", "0.2", "--l2", "0.02")


def prepare(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name, n in (("train", 20), ("query", 4)):
        x, y = draw.normal(size=(n, 3)), np.arange(n) % 3
        np.savez(folder / f"{name}.npz", x=x + y[:, None], y=y)


def trained(folder: Path) -> None:
    prepare(folder)
    line = ["--data", f"{folder}/train.npz", *PROBLEM, "--out", f"{folder}/model.safetensors"]
    assert main(["train", *line]) == 0


COMMANDS = [
    Command(
        "sam_if train",
        main,
        parser,
        prepare,
        ("train", "--data", "{}/train.npz", *PROBLEM),
        "made.safetensors",
        {"--data": "arrays"},
    ),
    Command(
        "sam_if score",
        main,
        parser,
        trained,
        (
            "score", "--model", "{}/model.safetensors", "--architecture", "softmax",
            "--data", "{}/train.npz", "--query", "{}/query.npz", *PROBLEM,
        ),
        "scores.csv",
        {"--model": "weights", "--data": "arrays", "--query": "arrays"},
    ),
]  # fmt: skip
