"""The paper's source and its eight targets, in the layouts in which they are published.

Nothing is downloaded: each lies in a folder of its name under a root of the user's. What stands of
them in the field's code was reconstructed: the novel classes of CUB, Cars, Places and Plantae are
every fourth (50, 49, 91 and 50 of them).
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shared.errors import UserError
from shared.seeding import step_seed
from shared.vision.images import SUFFIXES, LabelledImages
from shared.vision.reading import read_image

CHEST = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule"),
    "Pneumothorax",
)
ROLES = {"base": "train", "validation": "val", "novel": "test"}


@dataclass(frozen=True)
class Index:
    """Files by class; images are read when they are drawn."""

    files: dict[str, list[Path]]

    def read(self, per_class: int, size: int, seed: int) -> LabelledImages:
        """At most `per_class` images of each class, drawn at random, RGB at `size` x `size`."""
        draw = np.random.default_rng(step_seed(seed, "published"))
        pixels, labels = [], []
        for label, name in enumerate(self.files):
            files = self.files[name]
            for row in draw.permutation(len(files))[:per_class]:
                found = read_image(files[row], "RGB", size)
                deep = found.is_floating_point()  # grey of 16 bits
                pixels.append((255 * found).round().to(torch.uint8) if deep else found)
                labels.append(label)
        return LabelledImages(torch.stack(pixels), torch.tensor(labels), tuple(self.files))


def index(name: str, root: str | None) -> Index:
    """The files of a target's test classes.

    Args:
        name: one of `LAYOUTS`.
        root: the folder that holds a folder of each.

    Raises:
        UserError: it is not there, or not laid out as it is published.
    """
    if root is None:
        raise UserError(
            f"{name} must lie on this machine: --set root=FOLDER, with {LAYOUTS[name].layout}"
        )
    place = Path(root) / name
    if not place.is_dir():
        raise UserError(f"there is no folder {place}; it should hold {LAYOUTS[name].layout}")
    try:
        found = LAYOUTS[name].files(place)
    except (OSError, KeyError, ValueError, StopIteration) as error:
        raise UserError(f"{place} is not laid out as {LAYOUTS[name].layout}: {error}") from None
    if not any(found.values()):
        raise UserError(f"{place} holds no images; it should hold {LAYOUTS[name].layout}")
    return Index({name: files for name, files in found.items() if files})


def mini_imagenet(role: str, root: str | None) -> Index:
    """The classes of a role: base (64), validation (16), novel (20)."""
    start = f"{ROLES[role]}/"
    whole = index("mini-imagenet", root).files
    return Index({n.removeprefix(start): f for n, f in whole.items() if n.startswith(start)})


# ---- layouts -------------------------------------------------------------------------------------


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _folders(place: Path) -> dict[str, list[Path]]:
    """A folder for each class."""
    return {one.name: _images(one) for one in sorted(place.iterdir()) if one.is_dir()}


def _fourth(files: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Every fourth class: the novel ones."""
    return dict(list(files.items())[3::4])


def _by_class(pairs: Iterator[tuple[str, Path]]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for name, file in pairs:
        found.setdefault(name, []).append(file)
    return dict(sorted(found.items()))


def _mini_imagenet(place: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for split in ROLES.values():
        table = place / f"{split}.csv"
        if table.is_file():
            with open(table, encoding="utf-8", newline="") as stream:
                pairs = [
                    (line["label"], place / "images" / line["filename"])
                    for line in csv.DictReader(stream)
                ]
            classes = _by_class(iter(pairs))
        else:
            classes = _folders(place / split)
        found |= {f"{split}/{name}": files for name, files in classes.items()}
    return found


def _cars(place: Path) -> dict[str, list[Path]]:
    from scipy.io import loadmat

    table = loadmat(str(place / "cars_annos.mat"), simplify_cells=True)["annotations"]
    pairs = ((f"{int(one['class']):03d}", place / one["relative_im_path"]) for one in table)
    return _fourth(_by_class(pairs))


def _plantae(place: Path) -> dict[str, list[Path]]:
    """The 200 species of most images."""
    folders = _folders(place)
    largest = sorted(folders, key=lambda name: -len(folders[name]))[:200]
    return _fourth({name: folders[name] for name in sorted(largest)})


def _chest(place: Path) -> dict[str, list[Path]]:
    """Images with one finding, of seven."""
    with open(place / "Data_Entry_2017.csv", encoding="utf-8", newline="") as stream:
        pairs = [
            (line["Finding Labels"], place / "images" / line["Image Index"])
            for line in csv.DictReader(stream)
            if line["Finding Labels"] in CHEST
        ]
    return _by_class(iter(pairs))


def _isic(place: Path) -> dict[str, list[Path]]:
    table = place / "ISIC2018_Task3_Training_GroundTruth.csv"
    with open(table, encoding="utf-8", newline="") as stream:
        pairs = []
        for line in csv.DictReader(stream):
            file = place / "ISIC2018_Task3_Training_Input" / f"{line.pop('image')}.jpg"
            pairs.append((next(name for name, value in line.items() if float(value) == 1), file))
    return _by_class(iter(pairs))


@dataclass(frozen=True)
class Layout:
    """What a folder holds, in words, and how its files are found."""

    layout: str
    files: Callable[[Path], dict[str, list[Path]]]


LAYOUTS = {
    "mini-imagenet": Layout(
        "train/, val/ and test/ with a folder for each class, or train.csv, val.csv and test.csv"
        " (filename, label) beside images/",
        _mini_imagenet,
    ),
    "cub": Layout(
        "images/ with a folder for each class, as CUB_200_2011",
        lambda place: _fourth(_folders(place / "images")),
    ),
    "cars": Layout("car_ims/ and cars_annos.mat", _cars),
    "places": Layout(
        "train/ with a folder for each class, as places365_standard",
        lambda place: _fourth(_folders(place / "train")),
    ),
    "plantae": Layout("a folder for each species of iNaturalist 2018's Plantae", _plantae),
    "chestx": Layout("Data_Entry_2017.csv and images/, as ChestX-ray8", _chest),
    "isic": Layout(
        "ISIC2018_Task3_Training_GroundTruth.csv and ISIC2018_Task3_Training_Input/", _isic
    ),
    "eurosat": Layout("2750/ with a folder for each class", lambda place: _folders(place / "2750")),
    "cropdiseases": Layout(
        "train/ with a folder for each class, as PlantVillage",
        lambda place: _folders(place / "train"),
    ),
}
