"""Images with labels or names: photographs, digits, sketches, emoji, rendered letters. Names of
classes are in `shared.vision.classes`.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shared.data.cache import path
from shared.errors import UserError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Labelled(NamedTuple):
    """A labelled image set with its official split."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


def mnist() -> Labelled:
    """Handwritten digits: images uint8 [60000 and 10000, 28, 28] (0 background, 255 ink), labels
    int64 0 to 9.
    """
    folder = path("mnist")
    return Labelled(*(_idx((folder / name).read_bytes()) for name in _IDX_NAMES))


def fashion_mnist() -> Labelled:
    """Photographs of clothing: images uint8 [60000 and 10000, 28, 28], labels int64 0 to 9."""
    folder = path("fashion-mnist")
    return Labelled(
        *(_idx(gzip.decompress((folder / f"{name}.gz").read_bytes())) for name in _IDX_NAMES)
    )


_IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx(data: bytes) -> NDArray:
    """An IDX file: two zero bytes, 8 for uint8, the number of axes, their lengths as big-endian
    uint32, the values.
    """
    assert data[:3] == b"\0\0\x08"
    shape = np.frombuffer(data, ">u4", data[3], 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    return values.copy() if values.ndim > 1 else values.astype(np.int64)


def cifar10() -> Labelled:
    """Small photographs: images uint8 [50000 and 10000, 32, 32, 3] (RGB), labels int64 0 to 9."""
    folder = path("cifar10")
    train = np.concatenate([_sheet(folder / f"data_batch_{number}.png") for number in range(1, 6)])
    train_labels, test_labels = (
        np.array(json.loads((folder / f"{part}_lables.json").read_text()), np.int64)
        for part in ("train", "test")
    )
    return Labelled(train, train_labels, _sheet(folder / "test_batch.png"), test_labels)


def _sheet(file: Path) -> Images:
    """10,000 images of 32x32, one a row of 1024 pixels."""
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)


def digits() -> tuple[Images, Labels]:
    """Handwritten digits of the UCI optdigits test set: images uint8 [1797, 8, 8] with values 0 to
    16, labels int64 0 to 9.
    """
    with gzip.open(path("digits") / "digits.csv.gz") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.int64)
    return table[:, :64].reshape(-1, 8, 8).astype(np.uint8), table[:, 64]


def quickdraw(classes: Sequence[str] | None = None) -> tuple[NDArray[np.float32], list[str]]:
    """Sketches: float32 [classes, 100, 28, 28] in [0, 1] (1: ink), and the classes' names.

    `classes` picks some of the 345 by name, in that order; None takes all, by name. Raises
    UserError for a name that is not there.
    """
    folder = path("quickdraw")
    names = sorted(file.name.removesuffix(".ndjson.gz") for file in folder.glob("*.ndjson.gz"))
    if classes is not None:
        if unknown := sorted(set(classes) - set(names)):
            raise UserError(
                f"Quick, Draw! has no class {unknown[0]!r}; the {len(names)} names are the files in"
                f" {folder}"
            )
        names = list(classes)
    drawings = np.empty((len(names), 100, 28, 28), np.float32)
    for index, name in enumerate(names):
        lines = gzip.decompress((folder / f"{name}.ndjson.gz").read_bytes()).splitlines()
        drawings[index] = np.array([json.loads(line) for line in lines], np.float32).reshape(
            100, 28, 28
        )
    return drawings, names


def emoji(vendor: Literal["google", "twitter"] = "google") -> tuple[Images, pd.DataFrame]:
    """1,911 emoji without their skin-tone variants: images uint8 [1911, 64, 64, 4] (RGBA), and a
    row for each image.

    Columns, all str: `name` (lower case), `short_name`, `category` (10), `subcategory` (about 100),
    `unified` (code points in hexadecimal), by Unicode's order.
    """
    from PIL import Image

    folder = path("emoji" if vendor == "google" else "emoji-twitter")
    entries = [
        item
        for item in json.loads((folder / "emoji.json").read_text())
        if item[f"has_img_{vendor}"]
    ]
    entries.sort(key=lambda item: item["sort_order"])
    images = np.empty((len(entries), 64, 64, 4), np.uint8)
    for index, item in enumerate(entries):
        with Image.open(folder / "img" / vendor / "64" / item["image"]) as image:
            images[index] = np.asarray(image.convert("RGBA"))
    names = pd.DataFrame(entries)[["name", "short_name", "category", "subcategory", "unified"]]
    return images, names.assign(name=names["name"].str.lower())


def photos() -> dict[str, Images]:
    """Photographs and textures by name (`retina`, `ihc`, `brick`, `grass`, ...): uint8 [height,
    width] or [height, width, 3].
    """
    from PIL import Image

    found = {}
    for file in sorted(path("photos").iterdir()):
        if file.suffix in (".png", ".jpg"):
            with Image.open(file) as image:
                found[file.stem] = np.asarray(image.convert("L" if image.mode == "L" else "RGB"))
    return found


def font_glyphs(characters: str, size: int = 28) -> tuple[Images, NDArray[np.bool_], list[str]]:
    """`characters` drawn in each of 250 fonts, centred on their ink, the font's size 0.75 of the
    image's.

    Returns images uint8 [fonts, characters, size, size] (0 background, 255 ink), whether the font
    has the character bool [fonts, characters] (its image is empty otherwise), and the fonts' names
    (folder and file, by name).
    """
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont

    folder = path("fonts")
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".ttf", ".otf"))
    images = np.zeros((len(files), len(characters), size, size), np.uint8)
    present = np.zeros((len(files), len(characters)), np.bool_)
    for row, file in enumerate(files):
        with TTFont(file, lazy=True) as tables:
            known = tables.getBestCmap()
        font = ImageFont.truetype(
            str(file), round(0.75 * size), layout_engine=ImageFont.Layout.BASIC
        )
        for column, character in enumerate(characters):
            if ord(character) not in known:
                continue
            left, top, right, bottom = font.getbbox(character)
            canvas = Image.new("L", (size, size))
            ImageDraw.Draw(canvas).text(
                ((size - left - right) / 2, (size - top - bottom) / 2), character, 255, font
            )
            images[row, column] = np.asarray(canvas)
            present[row, column] = bool(images[row, column].any())
    return images, present, [str(file.relative_to(folder).with_suffix("")) for file in files]
