"""Labelled images: the one container, and where they come from: the catalogue, a folder of the
reader's, random patterns for tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.data import loaders
from shared.data import path as cached
from shared.errors import UserError
from shared.seeding import generator, step_seed
from shared.vision import reading
from shared.vision.classes import CLASSES

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one size, with a class each.

    Attributes:
        pixels: [n, channels, height, width] as they are stored, which is exact: uint8, or float32
            from 0 to 1 where the source has more than 8 bits. `images()` gives numbers to compute
            with.
        labels: int64 [n], places in `classes`.
        classes: the classes' names.
        concepts: float32 [n, k], NaN where an image is not annotated; None: there are none.
        concept_names: of its k columns.
        ids: a name of each image (a file, a character); None: they have none.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    concepts: Tensor | None = None
    concept_names: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.pixels)
        if self.pixels.dim() != 4 or self.pixels.dtype not in (torch.uint8, torch.float32):
            raise UserError(
                "pixels are uint8 or float32 [n, channels, height, width], not"
                f" {self.pixels.dtype} {list(self.pixels.shape)}"
            )
        if n and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise UserError(
                f"labels from {int(self.labels.min())} to {int(self.labels.max())} are not those of"
                f" {len(self.classes)} classes"
            )
        columns = {"labels": self.labels, "concepts": self.concepts, "ids": self.ids}
        for what, column in columns.items():
            if column is not None and len(column) != n:
                raise UserError(f"there are {n} images and {len(column)} {what}; give as many")
        if self.concepts is not None and self.concepts.shape != (n, len(self.concept_names)):
            raise UserError(
                f"concepts of shape {list(self.concepts.shape)} do not fit {n} images and"
                f" {len(self.concept_names)} concept names"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, channels, height, width] from 0 to 1. Made at each call."""
        values = self.pixels.to(dtype)
        return values / 255 if self.pixels.dtype == torch.uint8 else values

    def pictures(self) -> Tensor:
        """`pixels` as plots take them: [n, height, width] where they are grey, else [n, height,
        width, 3].
        """
        last = self.pixels.movedim(1, -1)
        return (last.squeeze(-1) if last.shape[-1] == 1 else last).contiguous()

    def pick(self, rows: Tensor | NDArray[np.int64] | Sequence[int] | slice) -> "LabelledImages":
        """Some of the images, in the order of `rows`."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, dtype=torch.int64)
        chosen = np.arange(len(self))[rows if isinstance(rows, slice) else rows.numpy()].tolist()
        return replace(
            self,
            pixels=self.pixels[rows],
            labels=self.labels[rows],
            concepts=None if self.concepts is None else self.concepts[rows],
            ids=None if self.ids is None else tuple(self.ids[row] for row in chosen),
        )

    def split(self, *sizes: int, seed: int) -> tuple["LabelledImages", ...]:
        """Disjoint parts of these sizes, drawn at random.

        Raises:
            UserError: they are more than there are.
        """
        if sum(sizes) > len(self):
            raise UserError(f"{sum(sizes)} images were asked for; there are {len(self)}")
        order = torch.randperm(len(self), generator=generator(seed, "split"))
        return tuple(self.pick(rows) for rows in order[: sum(sizes)].split(sizes))

    def per_class(self, count: int, seed: int | None = None) -> "LabelledImages":
        """Up to `count` images of each class, one class after the other: the first, or with a seed
        random ones.
        """
        draw = None if seed is None else np.random.default_rng(step_seed(seed, "pictures"))
        labels, chosen = self.labels.numpy(), []
        for label in range(len(self.classes)):
            rows = np.flatnonzero(labels == label)
            chosen.append((rows if draw is None else draw.permutation(rows))[:count])
        return self.pick(np.concatenate(chosen))

    def of_classes(self, names: Sequence[str]) -> "LabelledImages":
        """The images of some classes, whose labels are now places in `names`.

        Raises:
            UserError: a name that is no class.
        """
        if unknown := [name for name in names if name not in self.classes]:
            raise UserError(f"there is no class '{unknown[0]}' among {', '.join(self.classes)}")
        places = torch.full((len(self.classes),), -1)
        places[[self.classes.index(name) for name in names]] = torch.arange(len(names))
        labels = places[self.labels]
        kept = (labels >= 0).nonzero().squeeze(1)
        return replace(self.pick(kept), labels=labels[kept], classes=tuple(names))

    def resized(self, size: int) -> "LabelledImages":
        """The same at `size` x `size` pixels (`reading.square`)."""
        if self.pixels.shape[2:] == (size, size):
            return self
        pixels = torch.empty(len(self), self.pixels.shape[1], size, size, dtype=self.pixels.dtype)
        for row, one in enumerate(self.pixels):
            pixels[row] = reading.to_pixels(reading.square(reading.to_picture(one), size))
        return replace(self, pixels=pixels if pixels.dtype == torch.uint8 else pixels.clamp(0, 1))


# ---- the catalogue -------------------------------------------------------------------------------


def load(
    name: str,
    n: int | None = None,
    split: str = "train",
    seed: int | None = None,
    size: int | None = None,
    classes: Sequence[str] | None = None,
) -> LabelledImages:
    """A set of the catalogue, by the name that it has there.

    mnist, fashion-mnist, cifar10 have the parts "train" and "test"; digits, quickdraw, emoji,
    emoji-twitter and "synthetic" (random patterns, for tests) have the one part "all". Emoji are on
    white, without flags and components; their class is the sub-category, their id the name.

    Args:
        n: how many images; None takes all.
        seed: draws them in a random order; None takes the first, in the order of the files.
        size: brings them to so many pixels an edge.
        classes: takes these classes only, in this order.

    Raises:
        UserError: it has not been fetched, has no such part or class, or fewer images.
    """
    if name not in _READERS:
        raise UserError(f"there are no images '{name}'; there are {', '.join(_READERS)}")
    parts = ("train", "test") if name in _OFFICIAL else ("all",)
    if split not in parts:
        raise UserError(f"{name} has no part '{split}'; it has {' and '.join(parts)}")
    if name == "quickdraw":  # 345 files, of which the rest need not be read
        whole = _quickdraw(classes)
    else:
        whole = _READERS[name](split)
        whole = whole if classes is None else whole.of_classes(classes)
    if n is not None and n > len(whole):
        raise UserError(f"{name} has {len(whole)} images in '{split}'; {n} were asked for")
    if seed is not None:
        key = "test images" if split == "test" else "images"
        whole = whole.pick(torch.randperm(len(whole), generator=generator(seed, key))[:n])
    elif n is not None:
        whole = whole.pick(slice(n))
    return whole if size is None else whole.resized(size)


def _official(name: str) -> Callable[[str], LabelledImages]:
    """Sets whose files hold a training and a test part."""
    # asked each time, so that a set that is not there is refused each time
    return lambda split: _parts(name, cached(name))[split]


@cache
def _parts(name: str, folder: Path) -> dict[str, LabelledImages]:
    found = {
        "mnist": loaders.mnist,
        "fashion-mnist": loaders.fashion_mnist,
        "cifar10": loaders.cifar10,
    }[name]()
    return {
        "train": _of_arrays(found.train_images, found.train_labels, CLASSES[name]),
        "test": _of_arrays(found.test_images, found.test_labels, CLASSES[name]),
    }


def _of_arrays(
    arrays: NDArray[Any], labels: NDArray[np.int64], classes: Sequence[str], **more: Any
) -> LabelledImages:
    """Of images [n, height, width] or [n, height, width, channels]."""
    pixels = torch.from_numpy(np.require(arrays, requirements=["C", "W"]))
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.movedim(-1, 1).contiguous()
    return LabelledImages(
        pixels, torch.from_numpy(np.ascontiguousarray(labels)), tuple(classes), **more
    )


def _digits(split: str) -> LabelledImages:
    values, labels = loaders.digits()
    return _of_arrays((values / 16).astype(np.float32), labels, CLASSES["digits"])


def _quickdraw(classes: Sequence[str] | None) -> LabelledImages:
    drawings, names = loaders.quickdraw(classes)
    labels = np.repeat(np.arange(len(names)), drawings.shape[1])
    return _of_arrays(drawings.reshape(-1, *drawings.shape[2:]), labels, names)


def quickdraw_classes() -> list[str]:
    """The 345 names of Quick, Draw!'s classes, sorted, without reading the drawings."""
    return sorted(
        file.name.removesuffix(".ndjson.gz") for file in cached("quickdraw").glob("*.ndjson.gz")
    )


def _emoji(split: str, vendor: Any = "google") -> LabelledImages:
    images, table = loaders.emoji(vendor)
    kept = ~table["category"].isin(["Component", "Flags"]).to_numpy()  # skin tones, hair; countries
    table = table[kept]
    kinds, labels = np.unique(table["subcategory"], return_inverse=True)
    return _of_arrays(
        reading.on_white(images[kept]), labels, kinds.tolist(), ids=tuple(table["name"])
    )


def synthetic(
    n: int = 4096, classes: int = 8, size: int = 8, channels: int = 3, seed: int = 0
) -> LabelledImages:
    """No photographs: a random pattern of 4 x 4 squares a class under noise, for tests and for
    measures of time and memory. `size` is a multiple of 4.
    """
    draw = np.random.default_rng(step_seed(seed, "synthetic images"))
    patterns = draw.integers(0, 256, (classes, channels, 4, 4))
    labels = draw.integers(0, classes, n)
    small = patterns[labels] + draw.integers(-60, 61, (n, channels, 4, 4))
    pixels = torch.from_numpy(small.clip(0, 255).astype(np.uint8))
    times = size // 4
    return LabelledImages(
        pixels.repeat_interleave(times, 2).repeat_interleave(times, 3),
        torch.from_numpy(labels),
        tuple(f"pattern {label}" for label in range(classes)),
    )


_OFFICIAL = ("mnist", "fashion-mnist", "cifar10")
_READERS: dict[str, Callable[[str], LabelledImages]] = {
    **{name: _official(name) for name in _OFFICIAL},
    "digits": _digits,
    "quickdraw": lambda split: _quickdraw(None),
    "emoji": _emoji,
    "emoji-twitter": lambda split: _emoji(split, "twitter"),
    "synthetic": lambda split: synthetic(),
}


# ---- a folder of the reader's --------------------------------------------------------------------


def folder(
    path: Path,
    classes: Sequence[str] | None = None,
    mode: reading.Mode | None = None,
    size: int | None = None,
) -> LabelledImages:
    """A folder with a folder of images for each class; an image's id is its file's name below
    `path`.

    Args:
        classes: the names that the classes have, in the order of their labels; None takes the
            folders' own, sorted.
        mode, size: see `reading.read_image`.

    Raises:
        UserError: there are no images, one cannot be read, a folder is no class, or the images are
            not of one shape.
    """
    names = sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    known = tuple(names if classes is None else classes)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{path}: there is no class '{unknown[0]}' among {', '.join(known)}")
    files = [
        (known.index(name), file)
        for name in names
        for file in sorted((path / name).iterdir())
        if file.suffix.lower() in SUFFIXES and file.name[0] != "."
    ]
    if not files:
        raise UserError(
            f"{path} holds no images; give a folder with a folder of .png or .jpg files for each"
            " class"
        )
    found = [reading.read_image(file, mode, size) for _, file in files]
    for (_, file), pixels in zip(files, found, strict=True):
        if pixels.shape != found[0].shape:
            raise UserError(
                f"{file} is of shape {list(pixels.shape)} and {files[0][1]} of"
                f" {list(found[0].shape)}; make all alike"
            )
    if len({pixels.dtype for pixels in found}) > 1:  # some of 8 bits, some of 16
        found = [one / 255 if one.dtype == torch.uint8 else one for one in found]
    return LabelledImages(
        torch.stack(found),
        torch.tensor([label for label, _ in files]),
        known,
        ids=tuple(str(file.relative_to(path)) for _, file in files),
    )
