"""The source's classes and the target domains, by name; every image RGB and of one size."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch

from projects.idp import published
from shared.data import loaders
from shared.errors import UserError
from shared.vision.episodes import class_split
from shared.vision.images import LabelledImages, load, quickdraw_classes, synthetic

Target = Literal[
    "quickdraw", "mnist", "digits", "letters", "fashion-mnist", "emoji", "cifar10", "photos"
]
Source = Literal["quickdraw", "mini-imagenet", "synthetic"]
TARGETS: tuple[Target, ...] = get_args(Target)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TILE = 64  # pixels an edge of a photograph's tile


def source_classes(base: int, validation: int, novel: int, seed: int) -> list[list[str]]:
    """Disjoint classes of Quick, Draw!: base, validation, novel."""
    return class_split(quickdraw_classes(), [base, validation, novel], seed, "quickdraw")


def source_roles(
    name: Source, base: int, validation: int, novel: int, seed: int, root: str | None
) -> dict[str, list[str]]:
    """The source's classes by role; mini-ImageNet's are its own, whatever the numbers."""
    if name == "mini-imagenet":
        return {role: list(published.mini_imagenet(role, root).files) for role in published.ROLES}
    if name == "synthetic":
        names = [f"pattern {n}" for n in range(base + validation + novel)]
        parts = class_split(names, [base, validation, novel], seed, "synthetic")
    else:
        parts = source_classes(base, validation, novel, seed)
    return dict(zip(published.ROLES, parts, strict=True))


def source_images(
    name: Source,
    role: str,
    classes: list[str],
    per_class: int,
    size: int,
    seed: int,
    root: str | None,
) -> LabelledImages:
    """At most `per_class` images of each of the source's classes of a role.

    Raises:
        UserError: its data is not there.
    """
    if name == "mini-imagenet":
        return published.mini_imagenet(role, root).read(per_class, size, seed)
    if name == "synthetic":
        count = 1 + max(int(one.removeprefix("pattern ")) for one in classes)
        images = synthetic(2 * per_class * count, count, 16, seed=seed).of_classes(classes)
        return _ready(images.per_class(per_class, seed), size)
    drawings = load("quickdraw", split="all", classes=classes)
    return _ready(drawings.per_class(per_class, seed), size)


def target(
    name: str, per_class: int, size: int, seed: int, novel: list[str], root: str | None = None
) -> LabelledImages:
    """A target domain: at most `per_class` images of each class, drawn at random.

    Args:
        name: one of `TARGETS`; one of `published.LAYOUTS`; or "synthetic" (random patterns, for
            pipeline checks).
        novel: the classes of "quickdraw".
        root: folder of the published sets.

    Raises:
        UserError: there is no such target, or its data is not there.
    """
    if name in published.LAYOUTS:
        return published.index(name, root).read(per_class, size, seed)
    if name not in _READERS:
        raise UserError(f"there is no target '{name}'; there are {', '.join(_READERS)}")
    whole = _READERS[name](novel)
    return _ready(whole.per_class(per_class, seed), size)


def _ready(images: LabelledImages, size: int) -> LabelledImages:
    """RGB at `size` x `size`."""
    small = images.resized(size)
    return replace(small, pixels=small.pixels.expand(-1, 3, -1, -1).contiguous())


def _emoji(_: object) -> LabelledImages:
    """The sub-categories with at least 20 emoji: 5 + 15 of a task."""
    whole = load("emoji", split="all")
    counts = np.bincount(whole.labels.numpy(), minlength=len(whole.classes))
    return whole.of_classes(
        [name for name, count in zip(whole.classes, counts, strict=True) if count >= 20]
    )


def _letters(_: object) -> LabelledImages:
    """Capital letters drawn in 250 free fonts: rendered, not photographed."""
    glyphs, present, fonts = loaders.font_glyphs(LETTERS)
    fonts_of, letters = np.nonzero(present)
    return LabelledImages(
        torch.from_numpy(glyphs[fonts_of, letters]).unsqueeze(1),
        torch.from_numpy(letters),
        tuple(LETTERS),
        ids=tuple(fonts[row] for row in fonts_of),
    )


def _photos(_: object) -> LabelledImages:
    """Tiles of scikit-image's photographs that do not overlap; a class is a photograph, so that the
    tiles of a class are correlated.
    """
    tiles, labels, names = [], [], []
    for name, photo in loaders.photos().items():
        colour = photo if photo.ndim == 3 else np.repeat(photo[..., None], 3, 2)
        high, wide = (edge // TILE for edge in colour.shape[:2])
        cut = colour[: high * TILE, : wide * TILE].reshape(high, TILE, wide, TILE, 3)
        found = cut.transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)
        if len(found) >= 20:
            tiles.append(found)
            labels.append(np.full(len(found), len(names)))
            names.append(name)
    return LabelledImages(
        torch.from_numpy(np.concatenate(tiles)),
        torch.from_numpy(np.concatenate(labels)),
        tuple(names),
    )


_READERS: dict[str, Callable[[list[str]], LabelledImages]] = {
    "quickdraw": lambda novel: load("quickdraw", split="all", classes=novel),
    "mnist": lambda _: load("mnist"),
    "digits": lambda _: load("digits", split="all"),
    "letters": _letters,
    "fashion-mnist": lambda _: load("fashion-mnist"),
    "emoji": _emoji,
    "cifar10": lambda _: load("cifar10"),
    "photos": _photos,
    "synthetic": lambda _: synthetic(800, classes=8, size=16, seed=1),
}
