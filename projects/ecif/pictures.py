"""Picture sets with class names, as a CLIP is fine-tuned on them: every picture is captioned with
its class's name in a prompt.

Nothing is downloaded: sets of torchvision are read from a folder of the user's, others from the
catalogue's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shared.errors import UserError
from shared.seeding import step_seed
from shared.vision import images as vision
from shared.vision import reading
from shared.vision.episodes import class_split
from shared.vision.images import LabelledImages

Source = Literal[
    "fgvc-aircraft", "food101", "flowers102", "cifar100", "cifar10", "dtd", "imagenette", "mnist",
    "fashion-mnist", "emoji", "quickdraw",
    "synthetic",
]  # fmt: skip
# of Quick, Draw! for fine-tuning; the others are what a small CLIP may be trained on before
QUICKDRAW_CLASSES = 20


@dataclass(frozen=True)
class Layout:
    """A set of torchvision: its class there, the folder that it makes in its root, the arguments of
    its training parts and test part.
    """

    kind: str
    below: str
    train: tuple[dict[str, Any], ...]
    test: dict[str, Any]


def _splits(*names: str, test: str = "test") -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    return tuple({"split": name} for name in names), {"split": test}


_FLAGS = (({"train": True},), {"train": False})
TORCHVISION = {
    "fgvc-aircraft": Layout("FGVCAircraft", "fgvc-aircraft-2013b", *_splits("trainval")),
    "food101": Layout("Food101", "food-101", *_splits("train")),
    "flowers102": Layout("Flowers102", "flowers-102", *_splits("train", "val")),
    "cifar100": Layout("CIFAR100", "cifar-100-python", *_FLAGS),
    "cifar10": Layout("CIFAR10", "cifar-10-batches-py", *_FLAGS),
    "dtd": Layout("DTD", "dtd", *_splits("train", "val")),
    "imagenette": Layout("Imagenette", "imagenette2", *_splits("train", test="val")),
}


@dataclass(frozen=True, eq=False)
class Pictures:
    """Training, validation (clean) and test pictures: uint8 [n, 3, size, size]."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names."""
        return self.train.classes


# as torchvision's sets are: picture and class, decoded when asked for
Items = Sequence[tuple[Image.Image, int]]


@dataclass(frozen=True, eq=False)
class _Decoded:
    """Images of uint8 in the way of torchvision's sets."""

    data: LabelledImages

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return reading.to_picture(self.data.pixels[row]), int(self.data.labels[row])


def load(
    source: Source,
    folder: str | None,
    train: int | None,
    validation: int,
    test: int | None,
    size: int,
    seed: int,
) -> Pictures:
    """A set at `size` pixels, its training and validation pictures drawn by the seed; None takes
    all that are left.

    Test pictures are of the set's own test part where it has one. cifar10 without a folder is the
    catalogue's.

    Raises:
        UserError: it is not there, or is smaller than what is asked for.
    """
    classes, known, held = _items(source, folder, size, seed)
    draw = np.random.default_rng(step_seed(seed, "pictures"))
    order = draw.permutation(len(known))
    if held is None:  # no test part of its own
        if test is None:
            raise UserError(
                f"{source} has no test part of its own: set `test` to a number of pictures"
            )
        held, tests, order = known, order[:test], order[test:]
    else:
        tests = draw.permutation(len(held))[:test]
    chosen = order[validation:][:train]
    for name, rows, wanted in (
        ("validation", order[:validation], validation),
        ("training", chosen, train),
        ("test", tests, test),
    ):
        if len(rows) < (wanted or 1):
            raise UserError(
                f"{source} has {len(rows)} {name} pictures beside the others; {wanted or 1} were"
                " asked for"
            )
    return Pictures(
        *(
            _read(items, rows, size, classes)
            for items, rows in ((known, chosen), (known, order[:validation]), (held, tests))
        ),
    )


def quickdraw_classes() -> tuple[list[str], list[str]]:
    """Names of Quick, Draw!'s classes in a fixed random order: those for fine-tuning, and
    the rest.
    """
    names = vision.quickdraw_classes()
    chosen, rest = class_split(
        names, (QUICKDRAW_CLASSES, len(names) - QUICKDRAW_CLASSES), 0, "classes"
    )
    return chosen, rest


def sketches(classes: Sequence[str]) -> LabelledImages:
    """Drawings of some classes of Quick, Draw!, a hundred each, uint8 (255: ink)."""
    found = vision.load("quickdraw", split="all", classes=classes)
    return replace(found, pixels=(255 * found.pixels).round().byte())


def _items(
    source: Source, folder: str | None, size: int, seed: int
) -> tuple[tuple[str, ...], Items, Items | None]:
    """The classes' names, the pictures to draw training and validation ones from, and the test part
    where there is one.
    """
    if source in TORCHVISION and not (source == "cifar10" and folder is None):
        return _torchvision(source, folder)
    if source in ("mnist", "fashion-mnist", "cifar10"):
        known, held = vision.load(source), vision.load(source, split="test")
        return known.classes, _Decoded(known), _Decoded(held)
    if source == "emoji":  # a sub-category is the class
        known = vision.load("emoji", split="all")
        return tuple(kind.replace("-", " ") for kind in known.classes), _Decoded(known), None
    if source == "quickdraw":
        known = sketches(quickdraw_classes()[0])
        return known.classes, _Decoded(known), None
    return _synthetic(size, seed)


def _torchvision(source: Source, folder: str | None) -> tuple[tuple[str, ...], Items, Items]:
    layout = TORCHVISION[source]
    if folder is None or not (Path(folder) / layout.below).is_dir():
        raise UserError(
            f"there is no {Path(folder or '.') / layout.below}: set `folder` to one that holds"
            f" {layout.below}/ as torchvision's {layout.kind} lays it out ({layout.kind}(folder,"
            " download=True) makes it)"
        )
    from torch.utils.data import ConcatDataset
    from torchvision import datasets

    try:
        train = [getattr(datasets, layout.kind)(folder, **part) for part in layout.train]
        test = getattr(datasets, layout.kind)(folder, **layout.test)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{Path(folder) / layout.below} is not as torchvision's {layout.kind} lays it out:"
            f" {error}"
        ) from None
    # Imagenette's are lists of synonyms
    names = [one if isinstance(one, str) else one[0] for one in train[0].classes]
    return tuple(name.replace("_", " ") for name in names), ConcatDataset(train), test


def _synthetic(
    size: int, seed: int, n: int = 4096, classes: int = 8
) -> tuple[tuple[str, ...], Items, None]:
    """For a pipeline check, time and memory: a random pattern of 4 x 4 squares a class, under
    noise. Drawn when asked for.
    """
    draw = np.random.default_rng(step_seed(seed, "synthetic"))
    patterns = draw.integers(0, 256, (classes, 4, 4, 3))
    labels = draw.integers(0, classes, n)

    class Drawn:
        def __len__(self) -> int:
            return n

        def __getitem__(self, row: int) -> tuple[Image.Image, int]:
            noise = np.random.default_rng(step_seed(seed, "noise", row)).integers(
                -60, 61, (4, 4, 3)
            )
            small = np.clip(patterns[labels[row]] + noise, 0, 255).astype(np.uint8)
            return Image.fromarray(small).resize((size, size), Image.Resampling.NEAREST), int(
                labels[row]
            )

    return tuple(f"pattern {'abcdefgh'[one]}" for one in range(classes)), Drawn(), None


def _read(
    items: Items, rows: NDArray[np.int64], size: int, classes: tuple[str, ...]
) -> LabelledImages:
    """As CLIP's own preparation: the shorter edge to `size` (bicubic), then the middle."""
    images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    labels = torch.empty(len(rows), dtype=torch.int64)
    for place, row in enumerate(rows.tolist()):
        image, labels[place] = items[row]
        images[place] = reading.to_pixels(reading.square(image.convert("RGB"), size))
    return LabelledImages(images, labels, classes)
