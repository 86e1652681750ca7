"""A folder of the reader's images and a CSV of their annotations: what is in it, what is wrong with
it, and how it is split.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.errors import UserError
from shared.seeding import step_seed
from shared.vision.images import LabelledImages
from shared.vision.reading import Mode, read_image

_VALUES = {"1": 1.0, "0": 0.0, "": float("nan")}


@dataclass(frozen=True)
class Annotations:
    """A CSV of annotations.

    Attributes:
        files: paths below the folder of images.
        labels: places in `classes`, one for each file.
        concepts: [files, concepts], NaN where not annotated.
        groups: columns of concepts that are told at once; a concept without a group is one alone.
        repeated: lines that only said again what another one had.
    """

    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    concepts: Tensor
    groups: tuple[tuple[int, ...], ...]
    repeated: int = 0


@dataclass(frozen=True)
class Reading:
    """What was done to the files: counts for the report."""

    modes: dict[str, int] = field(default_factory=dict)
    resized: int = 0
    cropped: int = 0


def read_annotations(path: Path) -> Annotations:
    """A CSV with the columns file and class, and a column a concept with 1, 0 or nothing.

    Raises:
        UserError: it is not such a file (with the line), has one class only, no annotated image, or
            a concept that no image has annotated.
    """
    rows = _rows(path)
    names = tuple(name.strip() for name in rows[0][2:])
    seen: dict[str, tuple[str, tuple[str, ...], int]] = {}
    repeated = 0
    for line, row in enumerate(rows[1:], 2):
        if not row or not any(cell.strip() for cell in row):
            continue
        where = f"{path}, line {line}"
        if len(row) != len(names) + 2:
            raise UserError(f"{where}: {len(row)} cells; the header has {len(names) + 2}")
        file, label, *cells = (cell.strip() for cell in row)
        if not file or not label:
            raise UserError(f"{where}: file or class is empty")
        for name, cell in zip(names, cells, strict=True):
            if cell not in _VALUES:
                raise UserError(
                    f"{where}: '{name}' is '{cell}'; write 1, 0, or nothing where it is not"
                    " annotated"
                )
        if file in seen:
            if seen[file][:2] != (label, tuple(cells)):
                raise UserError(
                    f"{where}: '{file}' stands in line {seen[file][2]} with other values; keep one"
                )
            repeated += 1
            continue
        seen[file] = (label, tuple(cells), line)
    classes = tuple(sorted({label for label, _, _ in seen.values()}))
    if len(classes) < 2:
        raise UserError(
            f"{path} has {len(classes)} class{'es' if not classes else ''}; a model that tells"
            " classes apart needs two"
        )
    concepts = torch.tensor([[_VALUES[cell] for cell in cells] for _, cells, _ in seen.values()])
    _check_annotated(path, names, concepts)
    return Annotations(
        tuple(seen),
        tuple(classes.index(label) for label, _, _ in seen.values()),
        classes,
        tuple(name.split(":", 1)[-1].strip() for name in names),
        concepts,
        grouped(names),
        repeated,
    )


def _rows(path: Path) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8: {error}") from None
    if not rows or [cell.strip() for cell in rows[0][:2]] != ["file", "class"]:
        raise UserError(f"{path}: the first line must be file,class,CONCEPT,CONCEPT,...")
    names = [name.strip() for name in rows[0][2:]]
    if not names or not all(names):
        raise UserError(f"{path}: the first line names no concept, or an empty one")
    plain = [name.split(":", 1)[-1].strip() for name in names]
    if twice := [name for name, count in Counter(plain).items() if count > 1]:
        raise UserError(f"{path}: the concept '{twice[0]}' has two columns; rename one")
    return rows


def _check_annotated(path: Path, names: Sequence[str], concepts: Tensor) -> None:
    known = ~concepts.isnan()
    if not bool(known.any()):
        raise UserError(f"{path}: no image has a concept annotated; annotate some with 0 and 1")
    for name, any_known in zip(names, known.any(0).tolist(), strict=True):
        if not any_known:
            raise UserError(
                f"{path}: '{name}' is annotated for no image; annotate some, or take its column out"
            )


def grouped(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Columns GROUP:CONCEPT of one group together, each other column alone, in their order."""
    found: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        group = name.split(":", 1)[0].strip() + ":" if ":" in name else name
        found.setdefault(group, []).append(column)
    return tuple(map(tuple, found.values()))


def read_images(
    folder: Path, annotations: Annotations, mode: Mode, edge: int
) -> tuple[LabelledImages, Reading]:
    """The annotated images, all of `mode` and `edge` x `edge` pixels (the shorter edge brought to
    it, then the middle).

    Raises:
        UserError: one is not there, lies outside the folder, or cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder")
    pixels, modes, resized, cropped = [], Counter[str](), 0, 0
    for file in annotations.files:
        path = folder / file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"'{file}' lies outside {folder}; name files below it")
        if not path.is_file():
            raise UserError(f"there is no image '{file}' in {folder}, which the CSV names")
        pixels.append(read_image(path, mode, edge))
        with Image.open(path) as opened:
            modes[opened.mode] += 1
            resized += opened.size != (edge, edge)
            cropped += opened.size[0] != opened.size[1]
    if len({one.dtype for one in pixels}) > 1:  # some of 8 bits, some of 16
        pixels = [one / 255 if one.dtype == torch.uint8 else one for one in pixels]
    images = LabelledImages(
        torch.stack(pixels),
        torch.tensor(annotations.labels),
        annotations.classes,
        annotations.concepts,
        annotations.names,
        annotations.files,
    )
    return images, Reading(dict(modes), resized, cropped)


def split(images: LabelledImages, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows that are held out, sorted: the same share of the annotated images
    of each class and of the others, so that neither part has more annotations than the other.

    A class keeps at least one image, and one annotated one, for training.

    Raises:
        UserError: nothing is left to hold out.
    """
    assert images.concepts is not None
    annotated = ~images.concepts.isnan().all(1)
    draw = np.random.default_rng(step_seed(seed, "split"))
    held: list[Tensor] = []
    for label in range(len(images.classes)):
        for kind in (annotated, ~annotated):
            rows = ((images.labels == label) & kind).nonzero().squeeze(1)
            count = min(round(share * len(rows)), len(rows) - 1)
            held.append(rows[torch.from_numpy(draw.permutation(len(rows)))[: max(count, 0)]])
    out = torch.cat(held).sort().values
    if not len(out):
        raise UserError(
            f"of {len(images)} images none can be held out at --validation {share:g}; give more"
            " images, or a larger share"
        )
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[out] = False
    return rest.nonzero().squeeze(1), out
