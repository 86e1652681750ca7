"""The commands that damaged input is given to; see tests/fuzz.py."""

from pathlib import Path

import numpy as np
from fuzz import Command
from PIL import Image

from projects.idp.command import main, parser

SMALL = ("--steps", "1", "--pseudo", "1")


def prepare(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name, classes, each in (("base", 2, 4), ("few", 2, 1), ("labelled", 2, 3)):
        for label in range(classes):
            place = folder / name / f"class-{label}"
            place.mkdir(parents=True)
            for n in range(each):
                pixels = draw.integers(0, 256, (10, 10, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{n}.png")
    (folder / "new").mkdir()
    for n in range(2):
        Image.fromarray(draw.integers(0, 256, (10, 10), np.uint8)).save(folder / "new" / f"{n}.png")


def pretrained(folder: Path) -> None:
    prepare(folder)
    given = ["--images", f"{folder}/base", "--out", f"{folder}/source", "--size", "8"]
    assert main(["pretrain", *given, "--epochs", "1", "--batch", "4"]) == 0


COMMANDS = [
    Command(
        "idp pretrain",
        main,
        parser,
        prepare,
        ("pretrain", "--images", "{}/base", "--size", "8", "--epochs", "1", "--batch", "4"),
        "made",
        {"--images": "images"},
    ),
    Command(
        "idp adapt",
        main,
        parser,
        pretrained,
        ("adapt", "--source", "{}/source", "--support", "{}/few", "--query", "{}/new", *SMALL),
        "predictions.csv",
        {"--support": "images"},
    ),
    Command(
        "idp evaluate",
        main,
        parser,
        pretrained,
        (
            "evaluate", "--source", "{}/source", "--target", "{}/labelled", "--ways", "2",
            "--shots", "1", "--queries", "2", "--tasks", "2", *SMALL,
        ),
        "accuracy.csv",
        {"--target": "images"},
    ),
]  # fmt: skip
