"""The commands that damaged input is given to; see tests/fuzz.py."""

from pathlib import Path

import numpy as np
from fuzz import Command

from projects.meta_if.command import main, parser


def prepare(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name, tasks in (("tasks", 5), ("test", 3)):
        centres = 1.5 * draw.normal(size=(tasks, 3, 4))
        arrays = {}
        for part, n in (("train", 6), ("val", 7)):
            y = np.tile(np.arange(n) % 3, (tasks, 1))
            arrays[f"y_{part}"] = y
            picked = centres[np.arange(tasks)[:, None], y]
            arrays[f"x_{part}"] = picked + draw.normal(size=picked.shape)
        np.savez(folder / f"{name}.npz", **arrays)


def trained(folder: Path) -> None:
    prepare(folder)
    line = ["--model", "mlp-2", "--data", f"{folder}/tasks.npz", "--steps", "10"]
    assert main(["fit", *line, "--out", f"{folder}/meta.safetensors"]) == 0


COMMANDS = [
    Command(
        "meta_if fit",
        main,
        parser,
        prepare,
        ("fit", "--model", "mlp-2", "--data", "{}/tasks.npz", "--steps", "10"),
        "made.safetensors",
        {"--data": "arrays"},
    ),
    Command(
        "meta_if score",
        main,
        parser,
        trained,
        (
            "score", "--model", "mlp-2", "--weights", "{}/meta.safetensors",
            "--data", "{}/tasks.npz", "--query", "{}/test.npz",
        ),
        "scores.csv",
        {"--weights": "weights", "--data": "arrays", "--query": "arrays"},
    ),
]  # fmt: skip
