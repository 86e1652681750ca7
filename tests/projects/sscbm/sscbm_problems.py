"""Small models and data of the tests: odd shapes, no two sizes alike."""

import csv

import numpy as np
import torch
from PIL import Image

from projects.sscbm.model import build
from projects.sscbm.training import Data, Losses, train
from shared.vision.backbones import backbone

SHAPE = (2, 12, 20)  # channels, height, width
CONCEPTS, CLASSES, SIZE = 5, 3, 4
SSCBM_LOSSES = Losses()
SSCBM_LOSSES = Losses()


def model(method="sscbm", seed=0, shape=SHAPE, dtype=torch.float32, **more):
    return build(
        method, lambda: backbone("quarter-3-6", shape), shape, CONCEPTS, CLASSES, size=SIZE,
        seed=seed, **more,
    ).to(dtype)  # fmt: skip


def images(n=11, seed=0, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def data(n=11, labelled=4, seed=0):
    """The first `labelled` images are annotated."""
    draw = torch.Generator().manual_seed(seed)
    truth = (torch.rand(n, CONCEPTS, generator=draw) > 0.5).float()
    concepts = truth.clone()
    concepts[labelled:] = torch.nan
    labels = torch.randint(0, CLASSES, (n,), generator=draw)
    pseudo = torch.rand(n, CONCEPTS, generator=draw)
    return Data(images(n, seed), labels, concepts, pseudo), truth


def state(one):
    return {name: value.clone() for name, value in one.state_dict().items()}


def trained(method, given, losses=SSCBM_LOSSES, seed=0, epochs=2, **more):
    found = model(method, seed, **more)
    train(found, given, losses, epochs=epochs, batch=4, rate=0.01, seed=seed)
    return found


# ---- of the command ------------------------------------------------------------------------------

SMALL = ["--features", "pixels", "--edge", "16", "--backbone", "quarter-4-4", "--size", "3",
         "--epochs", "3", "--batch", "8", "--mode", "L"]  # fmt: skip


def make_folder(folder, n=40, annotated=12):
    """Bright bars: upright ones are of the class "stripe", lying ones of "bar"; the concept
    "thick" is of the image, the other two are of the class.
    """
    draw = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = [["file", "class", "way:upright", "way:lying", "thick"]]
    for number in range(n):
        upright, thick = number % 2, int(draw.integers(2))
        pixels = draw.integers(0, 60, (20, 20)).astype(np.uint8)
        at, width = int(draw.integers(3, 12)), 2 + 3 * thick
        if upright:
            pixels[:, at : at + width] = 230
        else:
            pixels[at : at + width] = 230
        name = f"{number:02d}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        known = [upright, 1 - upright, thick] if number < annotated else ["", "", ""]
        lines.append([name, "stripe" if upright else "bar", *known])
    with open(folder / "concepts.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    return folder


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))
