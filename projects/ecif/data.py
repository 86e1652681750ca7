"""Image-text pairs with a clean validation and test part: emoji and their names, and image sets
captioned with their class's name.

Features are frozen: pictures through PCA of pixels or EfficientNet-Lite0, captions through
all-MiniLM-L6-v2, both reduced by a PCA of the training part and scaled to a mean square of 1 a
dimension.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.commands.key import digest
from shared.data import path, stamp
from shared.dependencies import local_imports
from shared.errors import UserError
from shared.files import atomic_write
from shared.paths import cache_dir
from shared.seeding import step_seed
from shared.vision import images as vision
from shared.vision.backbones import backbone
from shared.vision.classes import CLASSES
from shared.vision.projection import Projection

Name = Literal["emoji", "mnist", "fashion-mnist", "cifar10", "synthetic"]
PROMPTS = {
    "mnist": "a photo of the handwritten digit {}",
    "fashion-mnist": "a photo of the garment {}",
    "cifar10": "a photo of a {}",
}


@dataclass(frozen=True, eq=False)
class Part:
    """Pairs: features of captions [n, t] and of pictures [n, v] (float64), captions, a group each
    (class, sub-category), thumbnails.
    """

    texts: Tensor
    images: Tensor
    captions: list[str]
    groups: list[str]
    thumbnails: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.texts, self.images


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training, validation (clean) and test parts, and where captions are classes, each class's
    features [c, t] and caption.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    class_texts: Tensor | None = None
    class_captions: tuple[str, ...] = ()


def load(name: Name, train: int, validation: int, test: int, dimensions: int, seed: int) -> Dataset:
    """A data set, split at random by the seed. UserError when it is not fetched or too small."""
    if name == "synthetic":
        texts, images, captions, groups, thumbnails = _synthetic(train + validation + test, seed)
    elif name == "emoji":
        texts, images, captions, groups, thumbnails = _emoji()
    else:
        texts, images, captions, groups, thumbnails = _classes(
            name, train + validation + test, seed
        )
    sizes = (train, validation, test)
    if sum(sizes) > len(captions):
        raise UserError(f"{name} has {len(captions)} pairs; {sum(sizes)} were asked for")
    order = np.random.default_rng(step_seed(seed, "split")).permutation(len(captions))
    ranges = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    reduced_texts, reduced_images = (_reduced(x, ranges[0], dimensions) for x in (texts, images))
    parts = [
        Part(
            reduced_texts[rows],
            reduced_images[rows],
            [captions[i] for i in rows],
            [groups[i] for i in rows],
            None if thumbnails is None else thumbnails[rows],
        )
        for rows in ranges
    ]
    if name not in PROMPTS:
        return Dataset(name, *parts)
    names = _captions(name)
    firsts = [captions.index(caption) for caption in names]
    return Dataset(name, *parts, class_texts=reduced_texts[firsts], class_captions=tuple(names))


def _reduced(x: np.ndarray, train: np.ndarray, dimensions: int) -> Tensor:
    """PCA of the training rows, without the directions that hold nothing, at a mean square of 1 a
    dimension.
    """
    project = Projection.fit(x[train], dimensions, sign="solver")
    found = project(x)
    return torch.from_numpy(found / np.sqrt((found[train] ** 2).mean())).double()


def _captions(name: str) -> list[str]:
    return [PROMPTS[name].format(label.lower()) for label in CLASSES[name]]


def _classes(
    name: str, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray, list[str], list[str], None]:
    """n training pictures, as many of each class, through their pixels; captions repeat."""
    data = vision.load(name).per_class(-(-n // 10), seed)
    labels, known = data.labels.tolist(), _captions(name)
    pixels = (data.pictures().flatten(1).double() / 255).numpy()
    return (
        _class_captions(name)[labels],
        pixels,
        [known[c] for c in labels],
        [data.classes[c] for c in labels],
        None,
    )


@cache
def _class_captions(name: str) -> np.ndarray:
    """The features of the classes' captions, in the order of the labels."""
    return _kept(name, ["minilm-l6"], lambda: {"texts": _sentences(_captions(name))})["texts"]


@cache
def _emoji() -> tuple[np.ndarray, np.ndarray, list[str], list[str], np.ndarray]:
    """Emoji and their names; the sub-category is the group. The same arrays for all seeds."""
    data = vision.load("emoji", split="all")
    pictures, captions = data.pictures().numpy(), list(data.ids or ())
    found = _kept(
        "emoji",
        ["emoji", "minilm-l6", "efficientnet-lite0"],
        lambda: {"texts": _sentences(captions), "images": _pictures(pictures)},
    )
    groups = [data.classes[c] for c in data.labels.tolist()]
    return found["texts"], found["images"], captions, groups, pictures


def _kept(
    name: str, entries: Sequence[str], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Features, from the cache where they have been made: a quarter of a minute, once.

    Args:
        name: what they are of.
        entries: of the catalogue, of which they are made.
        make: gives the arrays by name.
    """
    for entry in entries:
        path(entry)  # says what to fetch
    # All that the features depend on: the versions of the data and the models, and the code.
    inputs = [stamp(entry) for entry in entries]
    key = digest({"inputs": inputs, "code": local_imports(Path(__file__))})
    file = cache_dir() / ".converted" / f"ecif-{name}-{key[:16]}.npz"
    if not file.exists():
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **make())
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, buffer.getvalue())
    with np.load(file, allow_pickle=False) as saved:
        return dict(saved)


def _sentences(sentences: Sequence[str]) -> np.ndarray:
    from shared.models import load_sentence_encoder

    encoder = load_sentence_encoder()
    with torch.inference_mode():
        found = [
            encoder(**encoder.tokens(list(sentences[i : i + 128])))
            for i in range(0, len(sentences), 128)
        ]
    return torch.cat(found).double().numpy()


def _pictures(pictures: np.ndarray, size: int = 128) -> np.ndarray:
    """The 1280 features below EfficientNet-Lite0's head, of pictures uint8 [n, h, w, 3] at `size`
    pixels.
    """
    model, found = backbone("efficientnet-lite0", (3, size, size)), []
    with torch.inference_mode():
        for piece in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(64):
            x = torch.nn.functional.interpolate(
                piece.float(), size=(size, size), mode="bilinear", align_corners=False
            )
            found.append(model((x - 127) / 128))
    return torch.cat(found).double().numpy()


def _synthetic(
    n: int, seed: int
) -> tuple[np.ndarray, np.ndarray, list[str], list[str], np.ndarray]:
    """For a pipeline check: texts and pictures are noisy linear views of one latent vector, in
    groups that share most of it.
    """
    draw = np.random.default_rng(step_seed(seed, "synthetic"))
    groups = draw.integers(0, 8, n)
    latent = draw.normal(size=(8, 6))[groups] + 0.7 * draw.normal(size=(n, 6))
    views = [
        latent @ draw.normal(size=(6, size)) + 0.3 * draw.normal(size=(n, size))
        for size in (12, 16)
    ]
    thumbnails = draw.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)
    return (
        views[0],
        views[1],
        [f"pair {i}" for i in range(n)],
        [f"group {g}" for g in groups],
        thumbnails,
    )
