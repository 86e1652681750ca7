"""The paper's four data sets, from local folders in the layout in which they are published. Nothing
is downloaded, and no pickle is read.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from projects.sscbm.annotations import grouped
from shared.errors import UserError
from shared.seeding import step_seed
from shared.vision.images import LabelledImages
from shared.vision.reading import read_image

CUB_CLASSES = 10  # an attribute is kept if this many classes have it (Koh et al. 2020)
_AWA2_PARTS = (0.8, 0.1, 0.1)
_SEBORRHEIC = "seborrheic keratosis"
DIAGNOSES = {  # of Derm7pt: what five classes are made of (Kawahara et al. 2019)
    "BCC": ("basal cell carcinoma",),
    "NEV": ("nevus",),
    "MEL": ("melanoma",),
    "SK": (_SEBORRHEIC,),
    "MISC": ("",),  # all others
}
DERM7PT_COLUMNS = (
    "pigment_network", "streaks", "pigmentation", "regression_structures",
    "dots_and_globules", "blue_whitish_veil", "vascular_structures",
)  # fmt: skip
WBCATT_COLUMNS = (
    "cell_size", "cell_shape", "nucleus_shape", "nuclear_cytoplasmic_ratio", "chromatin_density",
    "cytoplasm_vacuole", "cytoplasm_texture", "cytoplasm_colour", "granule_type", "granule_colour",
    "granularity",
)  # fmt: skip

# training and test images, and groups of concepts
Parts = tuple[LabelledImages, LabelledImages, tuple[tuple[int, ...], ...]]


def cub(root: Path, edge: int, class_level: bool = True) -> Parts:
    """CUB-200-2011: the folder with images.txt, image_class_labels.txt, train_test_split.txt,
    classes.txt, attributes/image_attribute_labels.txt and images/; attributes.txt there or beside.

    Args:
        edge: pixels that images are brought to.
        class_level: concepts are what most training images of a class have, those that hold for at
            least ten classes; or what is annotated on each image, of the same concepts.

    Raises:
        UserError: a file is not there, or not as published.
    """
    files = dict(_pairs(root / "images.txt"))
    number = {identity: row for row, identity in enumerate(files)}
    labels = _by_id(root / "image_class_labels.txt", number) - 1
    is_train = _by_id(root / "train_test_split.txt", number) == 1
    classes = tuple(name.split(".", 1)[-1] for _, name in _pairs(root / "classes.txt"))
    beside = root.parent / "attributes.txt"
    names = [name for _, name in _pairs(beside if beside.is_file() else root / "attributes.txt")]
    told = np.full((len(files), len(names)), np.nan, dtype=np.float32)
    path = root / "attributes" / "image_attribute_labels.txt"
    for line, row in enumerate(_lines(path), 1):
        try:
            image, attribute, present = row.split()[:3]
            told[number[image], int(attribute) - 1] = float(present)
        except (ValueError, KeyError, IndexError):
            raise UserError(f"{path}, line {line}: not 'IMAGE ATTRIBUTE 0|1 ...'") from None
    by_class = np.stack(
        [
            np.nanmean(told[is_train & (labels == label)], axis=0) > 0.5
            for label in range(len(classes))
        ]
    )
    kept = by_class.sum(0) >= min(CUB_CLASSES, len(classes) // 2)
    concepts = by_class.astype(np.float32)[labels] if class_level else told
    return _parts(
        [root / "images" / file for file in files.values()],
        labels, classes, concepts[:, kept],
        [name.replace("::", ":") for name, keep in zip(names, kept, strict=True) if keep],
        is_train, edge,
    )  # fmt: skip


def awa2(root: Path, edge: int, seed: int = 0) -> Parts:
    """Animals with Attributes 2: the folder with classes.txt, predicates.txt,
    predicate-matrix-binary.txt and JPEGImages/CLASS/. Four fifths of the shuffled images are for
    training, a tenth for the test (as in the authors' code).

    Raises:
        UserError: a file is not there, or not as published.
    """
    classes = tuple(name for _, name in _pairs(root / "classes.txt"))
    names = [name for _, name in _pairs(root / "predicates.txt")]
    path = root / "predicate-matrix-binary.txt"
    try:
        table = np.array(
            [[float(cell) for cell in row.split()] for row in _lines(path)], np.float32
        )
    except ValueError:
        raise UserError(f"{path}: not a matrix of 0 and 1") from None
    if table.shape != (len(classes), len(names)):
        raise UserError(
            f"{path}: {list(table.shape)} numbers for {len(classes)} classes and {len(names)}"
            " predicates"
        )
    found = [
        (label, file)
        for label, name in enumerate(classes)
        for file in sorted((root / "JPEGImages" / name).glob("*.jpg"))
    ]
    if not found:
        raise UserError(f"{root / 'JPEGImages'} holds no images CLASS/*.jpg")
    draw = np.random.default_rng(step_seed(seed, "awa2"))
    order = draw.permutation(len(found))
    train = round(_AWA2_PARTS[0] * len(found))
    test = round(_AWA2_PARTS[2] * len(found))
    chosen = [found[row] for row in [*order[:train], *order[len(found) - test :]]]
    labels = np.array([label for label, _ in chosen])
    is_train = np.arange(len(chosen)) < train
    files = [file for _, file in chosen]
    return _parts(files, labels, classes, table[labels], names, is_train, edge)


def derm7pt(root: Path, edge: int) -> Parts:
    """The seven-point checklist: the folder with meta/meta.csv, meta/train_indexes.csv,
    meta/test_indexes.csv and images/; dermoscopic images, five classes, each answer a concept of
    the group of its question.

    Raises:
        UserError: a file is not there, or not as published.
    """
    path = root / "meta" / "meta.csv"
    rows = _table(path, ("diagnosis", "derm", *DERM7PT_COLUMNS))
    parts = []
    for part in ("train", "test"):
        file = root / "meta" / f"{part}_indexes.csv"
        try:
            parts.append([int(row["indexes"]) for row in _table(file, ("indexes",))])
            chosen = [rows[index] for index in parts[-1]]
        except (ValueError, IndexError):
            raise UserError(f"{file}: an index that is none of {path}'s rows") from None
    chosen = [rows[index] for part in parts for index in part]
    labels = np.array([_diagnosis(row["diagnosis"]) for row in chosen])
    files = [root / "images" / row["derm"] for row in chosen]
    is_train = np.arange(len(chosen)) < len(parts[0])
    answers, names = _one_hot(chosen, DERM7PT_COLUMNS, path)
    return _parts(files, labels, tuple(DIAGNOSES), answers, names, is_train, edge)


def wbcatt(root: Path, edge: int) -> Parts:
    """WBCatt: a folder with pbc_attr_v1_train.csv, pbc_attr_v1_test.csv and the images of PBC below
    it, where the column `path` says (or anywhere, by `img_name`).

    Raises:
        UserError: a file is not there, or not as published.
    """
    parts = [
        _table(root / f"pbc_attr_v1_{part}.csv", ("img_name", "label", *WBCATT_COLUMNS))
        for part in ("train", "test")
    ]
    chosen = [row for part in parts for row in part]
    classes = tuple(sorted({row["label"] for row in chosen}))
    labels = np.array([classes.index(row["label"]) for row in chosen])
    below: dict[str, Path] = {}
    files = []
    for row in chosen:
        file = root / row["path"] if row.get("path") else root / "absent"
        if not file.is_file():
            below = below or {one.name: one for one in root.rglob("*.jpg")}
            file = below.get(row["img_name"], root / row["img_name"])
        files.append(file)
    answers, names = _one_hot(chosen, WBCATT_COLUMNS, root / "pbc_attr_v1_train.csv")
    is_train = np.arange(len(chosen)) < len(parts[0])
    return _parts(files, labels, classes, answers, names, is_train, edge)


LOADERS: dict[str, Callable[[Path, int], Parts]] = {
    "cub": cub,
    "cub-images": lambda root, edge: cub(root, edge, class_level=False),
    "awa2": awa2,
    "derm7pt": derm7pt,
    "wbcatt": wbcatt,
}


def _parts(
    files: Sequence[Path],
    labels: np.ndarray,
    classes: tuple[str, ...],
    concepts: np.ndarray,
    names: Sequence[str],
    is_train: np.ndarray,
    edge: int,
) -> Parts:
    plain = tuple(names)

    def part(rows: np.ndarray) -> LabelledImages:
        pixels = torch.empty(len(rows), 3, edge, edge, dtype=torch.uint8)
        for place, row in enumerate(rows.tolist()):
            if not files[row].is_file():
                raise UserError(f"there is no image {files[row]}")
            pixels[place] = read_image(files[row], "RGB", edge)
        return LabelledImages(
            pixels,
            torch.from_numpy(labels[rows].astype(np.int64)),
            classes,
            torch.from_numpy(np.ascontiguousarray(concepts[rows], dtype=np.float32)),
            plain,
            tuple(str(files[row]) for row in rows.tolist()),
        )

    return part(np.flatnonzero(is_train)), part(np.flatnonzero(~is_train)), grouped(plain)


def _diagnosis(name: str) -> int:
    """The class of a diagnosis; the last one, MISC, is in any."""
    return next(
        label
        for label, parts in enumerate(DIAGNOSES.values())
        if any(part in name.lower() for part in parts)
    )


def _one_hot(
    rows: Sequence[dict[str, str]], columns: Sequence[str], path: Path
) -> tuple[np.ndarray, list[str]]:
    """A concept COLUMN:ANSWER for each answer, [rows, answers]; NaN where there is none."""
    parts, names = [], []
    for column in columns:
        answers = sorted({row[column].strip() for row in rows} - {""})
        if not answers:
            raise UserError(f"{path}: the column '{column}' is empty")
        place = {answer: number for number, answer in enumerate(answers)}
        told = np.full((len(rows), len(answers)), np.nan, dtype=np.float32)
        for number, row in enumerate(rows):
            if row[column].strip():
                told[number] = 0.0
                told[number, place[row[column].strip()]] = 1.0
        parts.append(told)
        names += [f"{column}:{answer}" for answer in answers]
    return np.concatenate(parts, axis=1), names


def _lines(path: Path) -> Iterable[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8") from None
    return [line for line in text.splitlines() if line.strip()]


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Lines of a number and a text."""
    found = [line.split(maxsplit=1) for line in _lines(path)]
    for line, parts in enumerate(found, 1):
        if len(parts) != 2:
            raise UserError(f"{path}, line {line}: not a number and a name")
    return [(number, name.strip()) for number, name in found]


def _by_id(path: Path, number: dict[str, int]) -> np.ndarray:
    """Integers [images] by the identity of the image."""
    found = np.full(len(number), -1)
    for line, (identity, value) in enumerate(_pairs(path), 1):
        if identity not in number or not value.isdigit():
            raise UserError(f"{path}, line {line}: no image '{identity}', or '{value}' no number")
        found[number[identity]] = int(value)
    if (found < 0).any():
        raise UserError(f"{path} says nothing of image {list(number)[int(found.argmin())]}")
    return found


def _table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8: {error}") from None
    absent = [column for column in columns if not rows or column not in rows[0]]
    if absent:
        raise UserError(f"{path} has no column '{absent[0]}', or no rows")
    return rows
