"""The commands that damaged input is given to; see tests/fuzz.py."""

import csv
import sys
from pathlib import Path

import numpy as np
from fuzz import Command
from PIL import Image

from projects.sscbm.command import main, parser

TRAINING = (
    "--features", "pixels", "--edge", "16", "--backbone", "quarter-4-4", "--size", "3", "--epochs",
    "1", "--batch", "8", "--mode", "L",
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Bars that stand and bars that lie, of which some are annotated."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = [["file", "class", "upright", "bright"]]
    for number in range(16):
        pixels = draw.integers(0, 60, (16, 16)).astype(np.uint8)
        upright, bright = number % 2, int(draw.integers(2))
        if upright:
            pixels[:, 5:8] = 120 + 100 * bright
        else:
            pixels[5:8] = 120 + 100 * bright
        Image.fromarray(pixels).save(folder / "images" / f"{number:02d}.png")
        known = [upright, bright] if number < 8 else ["", ""]
        rows.append([f"{number:02d}.png", "stripe" if upright else "bar", *known])
    with open(folder / "concepts.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def prepare_trained(folder: Path) -> None:
    prepare(folder)
    given = ("--images", f"{folder}/images", "--annotations", f"{folder}/concepts.csv")
    if main(["train", *given, "--out", f"{folder}/model", *TRAINING]):
        sys.exit("the model of the fuzz does not train")


COMMANDS = [
    Command(
        "sscbm train",
        main,
        parser,
        prepare,
        ("train", "--images", "{}/images", "--annotations", "{}/concepts.csv", *TRAINING),
        "model",
        {"--images": "images", "--annotations": "table"},
    ),
    Command(
        "sscbm predict",
        main,
        parser,
        prepare_trained,
        ("predict", "--model", "{}/model", "--images", "{}/images"),
        "predictions.csv",
        {"--images": "images"},
    ),
]
