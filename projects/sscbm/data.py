"""Four sets of real images with concepts, of two kinds as in the paper: concepts of the class
(Fashion-MNIST, CIFAR-10), and concepts of each image (strokes of MNIST; scenes of two digits, of
which it is known where each is). And frozen features, in which neighbours are searched.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from projects.sscbm import morphology
from shared.errors import UserError
from shared.seeding import generator, step_seed
from shared.vision import images as vision
from shared.vision.backbones import backbone
from shared.vision.images import LabelledImages

Name = Literal[
    "fashion", "cifar10", "strokes", "scenes", "synthetic",
    "cub", "cub-images", "awa2", "derm7pt", "wbcatt",
]  # fmt: skip
Features = Literal["efficientnet-lite0", "pixels"]
# of the paper's sets, in their published layout
FOLDERS = {
    "cub": "CUB_200_2011",
    "cub-images": "CUB_200_2011",
    "awa2": "Animals_with_Attributes2",
    "derm7pt": "release_v0",
    "wbcatt": "wbcatt",
}
ATTRIBUTES = Path(__file__).parent / "attributes"
CLASS_LEVEL = (
    "fashion",
    "cifar10",
    "synthetic",
    "cub",
    "awa2",
)  # all images of a class have the same concepts
SCENE, QUADRANT = 32, 16  # edges in pixels
LITE0_PIXELS = 64  # that EfficientNet-Lite0 reads; it halves them five times
LITE0_LAYER = 3  # after the fourth


@dataclass(frozen=True, eq=False)
class ConceptSet:
    """Images with all their concepts.

    Attributes:
        pool: from which each seed draws its training images.
        test: always the same.
        places: int64 [test images, k], the quadrant of each concept (0 to 3, row by row), -1 where
            it is absent; None where the place is not known.
        groups: columns of concepts that an expert tells at once.
    """

    name: str
    pool: LabelledImages
    test: LabelledImages
    groups: tuple[tuple[int, ...], ...]
    places: Tensor | None = None


def load(
    name: Name,
    pool: int | None,
    test: int | None,
    root: Path | None = None,
    edge: int | None = None,
) -> ConceptSet:
    """One of the sets, its images drawn at random (the same at every call).

    Args:
        pool, test: how many images; None takes all of one of the paper's sets.
        root, edge: for one of the paper's sets: a folder that holds its folder (`FOLDERS`) in the
            published layout, and the pixels that images are brought to.

    Raises:
        UserError: its images have not been fetched, are not there, or are fewer.
    """
    if name in FOLDERS:
        if root is None or edge is None:
            raise UserError(
                f"{name} is read from a folder of yours: set `root` to one that holds"
                f" {FOLDERS[name]}/, and `edge`"
            )
        return _of_the_paper(name, root, edge, pool, test)
    if pool is None or test is None:
        raise UserError(f"set `pool` and `test` to numbers of images of {name}")
    return _MAKERS[name](pool, test)


def _of_the_paper(
    name: str, root: Path, edge: int, pool: int | None, test: int | None
) -> ConceptSet:
    from projects.sscbm.folders import LOADERS

    known, held, groups = LOADERS[name](root / FOLDERS[name], edge)
    parts = []
    for part, count, what in ((known, pool, "training"), (held, test, "test")):
        if count is not None and count > len(part):
            raise UserError(f"{name} has {len(part)} {what} images; {count} were asked for")
        order = torch.randperm(len(part), generator=generator(0, "images", what))
        parts.append(part.pick(order[:count]))
    return ConceptSet(name, parts[0], parts[1], groups)


def attribute_table(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """Names of attributes and of classes, and float32 [classes, attributes], of a table with a row
    per attribute.

    Raises:
        UserError: it is not such a table, holds others than 0 and 1, or two classes are alike.
    """
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    classes = tuple(header[1:-1])
    try:
        table = np.array([[{"0": 0.0, "1": 1.0}[v] for v in row[1:-1]] for row in rows], np.float32)
    except (KeyError, ValueError):
        raise UserError(f"{path}: attributes are 0 or 1, one for each class") from None
    if len(np.unique(table.T, axis=0)) < len(classes):
        raise UserError(f"{path}: two classes have the same attributes")
    return tuple(row[0] for row in rows), classes, table.T.copy()


def _class_level(images: str, pool: int, test: int, name: str) -> ConceptSet:
    names, classes, table = attribute_table(ATTRIBUTES / f"{images}.csv")

    def described(n: int, split: str) -> LabelledImages:
        found = vision.load(images, n, split, seed=0, classes=classes)
        concepts = torch.from_numpy(table)[found.labels]
        return replace(found, concepts=concepts, concept_names=names)

    groups = tuple((column,) for column in range(len(names)))
    return ConceptSet(name, described(pool, "train"), described(test, "test"), groups)


def _strokes(pool: int, test: int) -> ConceptSet:
    parts = [vision.load("mnist", n, part, seed=0) for n, part in ((pool, "train"), (test, "test"))]
    measured = [morphology.measures(part.images()[:, 0].numpy()) for part in parts]
    at = morphology.cuts(measured[0])
    known, held = (
        replace(
            part,
            concepts=torch.from_numpy(morphology.concepts(found, at)),
            concept_names=morphology.NAMES,
        )
        for part, found in zip(parts, measured, strict=True)
    )
    ends = np.cumsum([len(names) for names in morphology.GROUPS.values()]).tolist()
    groups = tuple(tuple(range(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True))
    return ConceptSet("strokes", known, held, groups)


def _scenes(pool: int, test: int) -> ConceptSet:
    digits = vision.load("mnist", 2 * pool, "train", seed=1)
    held = vision.load("mnist", 2 * test, "test", seed=1)
    known, _ = scenes(digits, pool, 0)
    last, places = scenes(held, test, 1)
    return ConceptSet("scenes", known, last, tuple((digit,) for digit in range(10)), places)


def scenes(digits: LabelledImages, n: int, seed: int) -> tuple[LabelledImages, Tensor]:
    """n scenes of 32 x 32: two digits of different classes, each in a quadrant of its own, with the
    concepts "contains digit d". The class is the larger digit, so that there is no class of zero.

    Raises:
        UserError: there is a digit of which there is no image.

    Returns:
        The scenes, and int64 [n, 10]: the quadrant of each digit, -1 where it is absent.
    """
    draw = np.random.default_rng(step_seed(seed, "scenes"))
    # MNIST's digits lie within 20 x 20 of their 28 x 28
    size = (QUADRANT, QUADRANT)
    small = interpolate(digits.images()[:, :, 4:24, 4:24], size, mode="area")
    small = (255 * small[:, 0]).round().byte()
    by_class = [(digits.labels == digit).nonzero().squeeze(1).numpy() for digit in range(10)]
    if min(map(len, by_class)) == 0:
        raise UserError(f"{len(digits)} images hold not all ten digits; ask for more scenes")
    canvas = torch.zeros(n, 1, SCENE, SCENE, dtype=torch.uint8)
    places = torch.full((n, 10), -1)
    for row in range(n):
        pair, quadrants = draw.permutation(10)[:2], draw.permutation(4)[:2]
        for digit, quadrant in zip(pair.tolist(), quadrants.tolist(), strict=True):
            top, left = (QUADRANT * edge for edge in divmod(quadrant, 2))
            chosen = int(draw.choice(by_class[digit]))
            canvas[row, 0, top : top + QUADRANT, left : left + QUADRANT] = small[chosen]
            places[row, digit] = quadrant
    there = places >= 0
    largest = (there * torch.arange(10)).amax(1)
    names = tuple(f"contains {digit}" for digit in digits.classes)
    return (
        LabelledImages(canvas, largest - 1, digits.classes[1:], there.float(), names),
        places,
    )


def _synthetic(pool: int, test: int) -> ConceptSet:
    """Random patterns with random concepts of their class, for pipeline checks."""
    images = vision.synthetic(pool + test, classes=4, size=8, channels=1)
    draw = np.random.default_rng(step_seed(0, "synthetic concepts"))
    table = np.concatenate([np.eye(4), draw.integers(0, 2, (4, 3))], axis=1).astype(np.float32)
    images = replace(
        images,
        concepts=torch.from_numpy(table)[images.labels],
        concept_names=tuple(f"concept {number}" for number in range(7)),
    )
    places = torch.where(images.concepts[pool:] > 0, images.labels[pool:, None], -1)
    groups = ((0, 1, 2, 3), (4,), (5,), (6,))
    return ConceptSet(
        "synthetic", images.pick(slice(pool)), images.pick(slice(pool, None)), groups, places
    )


_MAKERS: dict[str, Callable[[int, int], ConceptSet]] = {
    "fashion": lambda pool, test: _class_level("fashion-mnist", pool, test, "fashion"),
    "cifar10": lambda pool, test: _class_level("cifar10", pool, test, "cifar10"),
    "strokes": _strokes,
    "scenes": _scenes,
    "synthetic": _synthetic,
}


# ---- the frozen network --------------------------------------------------------------------------


class Frozen(NamedTuple):
    """What a frozen network makes of images.

    Attributes:
        features: float32 [n, d], in which neighbours are searched.
        maps: [n, channels, h, w], which small networks are trained on: a layer's output, or the
            images themselves.
    """

    features: Tensor
    maps: Tensor


def frozen(images: Tensor, kind: Features, batch: int = 64) -> Frozen:
    """Features and maps of images [n, channels, height, width], uint8 or float from 0 to 1.

    Args:
        kind: "pixels": the images are both. "efficientnet-lite0" was trained on ImageNet: its
            pooled output, and the map of 112 channels at a sixteenth of 64 pixels (grey images get
            three equal channels).
        batch: images at once.

    Raises:
        UserError: the network has not been fetched.
    """
    if kind == "pixels":
        return Frozen(as_float(images).flatten(1), as_float(images))
    network = backbone(kind, (3, LITE0_PIXELS, LITE0_PIXELS))
    parts = [_lite0(network, as_float(part)) for part in images.split(batch)]
    return Frozen(*(torch.cat(column) for column in zip(*parts, strict=True)))


def as_float(images: Tensor) -> Tensor:
    return images / 255 if images.dtype == torch.uint8 else images


@torch.no_grad()
def _lite0(network: Any, images: Tensor) -> Frozen:
    colour = images.expand(-1, 3, -1, -1)
    size = (LITE0_PIXELS, LITE0_PIXELS)
    large = interpolate(colour, size, mode="bilinear", antialias=True, align_corners=False)
    last, (maps,) = network.model.forward_intermediates(
        (255 * large - 127) / 128, indices=[LITE0_LAYER]
    )
    return Frozen(network.model.forward_head(last, pre_logits=True), maps)
