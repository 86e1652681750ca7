"""Image-text pairs with a clean validation and test part: emoji and their names, and image sets
captioned with their class's name.

Features are frozen: pictures through PCA of pixels or EfficientNet-Lite0, captions through
all-MiniLM-L6-v2, both reduced by a PCA of the training part and scaled to a mean square of 1 a
dimension.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from shared.data import loaders, path, stamp
from shared.data.loaders import CIFAR10_CLASSES, FASHION_MNIST_CLASSES
from shared.errors import UserError
from shared.paths import cache_dir
from shared.rows import atomic_write
from shared.seeding import step_seed

Name = Literal["emoji", "mnist", "fashion-mnist", "cifar10", "synthetic"]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = {
    "mnist": ("a photo of the handwritten digit {}", DIGITS),
    "fashion-mnist": ("a photo of the garment {}", FASHION_MNIST_CLASSES),
    "cifar10": ("a photo of a {}", CIFAR10_CLASSES),
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
    centred = x - x[train].mean(0)
    known = centred[train]
    wide = known.shape[0] < known.shape[1]  # the smaller of the two Gram matrices
    values, vectors = np.linalg.eigh(known @ known.T if wide else known.T @ known)
    kept = np.flatnonzero(values > 1e-9 * values[-1])[::-1][:dimensions]
    directions = known.T @ vectors[:, kept] / np.sqrt(values[kept]) if wide else vectors[:, kept]
    found = centred @ directions
    return torch.from_numpy(found / np.sqrt((found[train] ** 2).mean())).double()


def _captions(name: str) -> list[str]:
    prompt, classes = PROMPTS[name]
    return [prompt.format(one.lower()) for one in classes]


def _classes(
    name: str, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray, list[str], list[str], None]:
    """n training pictures, as many of each class, through their pixels; captions repeat."""
    found = {
        "mnist": loaders.mnist,
        "fashion-mnist": loaders.fashion_mnist,
        "cifar10": loaders.cifar10,
    }[name]()
    draw = np.random.default_rng(step_seed(seed, "pictures"))
    rows = np.concatenate(
        [
            draw.permutation(np.flatnonzero(found.train_labels == c))[: -(-n // 10)]
            for c in range(10)
        ]
    )
    labels = found.train_labels[rows]
    known = _captions(name)
    texts = _class_captions(name)[labels]
    pixels = found.train_images[rows].reshape(len(rows), -1) / 255.0
    return (
        texts,
        pixels,
        [known[c] for c in labels],
        [str(PROMPTS[name][1][c]) for c in labels],
        None,
    )


@cache
def _class_captions(name: str) -> np.ndarray:
    """The features of the classes' captions, in the order of the labels."""
    return _sentences(_captions(name))


def emoji_on_white() -> tuple[np.ndarray, pd.DataFrame]:
    """Emoji without flags and components (skin tones and hair), on white: uint8 [n, 64, 64, 3], and
    the loader's row for each.
    """
    images, table = loaders.emoji()
    kept = ~table["category"].isin(["Component", "Flags"]).to_numpy()
    alpha = images[kept][..., 3:] / 255.0
    pictures = (images[kept][..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return pictures, table[kept]


@cache
def _emoji() -> tuple[np.ndarray, np.ndarray, list[str], list[str], np.ndarray]:
    """Emoji and their names; the sub-category is the group. The same arrays for all seeds."""
    pictures, table = emoji_on_white()
    captions = table["name"].tolist()
    for one in ("minilm-l6", "efficientnet-lite0"):
        path(one)  # says what to fetch
    stamps = [
        str(stamp(one).stat().st_mtime_ns) for one in ("emoji", "minilm-l6", "efficientnet-lite0")
    ]
    file = (
        cache_dir()
        / ".converted"
        / f"ecif-emoji-{hashlib.sha256(' '.join(stamps).encode()).hexdigest()[:16]}.npz"
    )
    if not file.exists():  # a quarter of a minute, once
        buffer = io.BytesIO()
        np.savez(buffer, texts=_sentences(captions), images=_pictures(pictures))
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, buffer.getvalue())
    with np.load(file, allow_pickle=False) as saved:
        texts, features = saved["texts"], saved["images"]
    return texts, features, captions, table["subcategory"].tolist(), pictures


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
    from shared.models import load_efficientnet_lite0

    model = load_efficientnet_lite0()
    found = []
    with torch.inference_mode():
        for piece in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(64):
            x = torch.nn.functional.interpolate(
                piece.float(), size=(size, size), mode="bilinear", align_corners=False
            )
            found.append(
                model.forward_head(model.forward_features((x - 127) / 128), pre_logits=True)
            )
    return torch.cat(found).double().numpy()


def _synthetic(
    n: int, seed: int
) -> tuple[np.ndarray, np.ndarray, list[str], list[str], np.ndarray]:
    """For wiring: texts and pictures are noisy linear views of one latent vector, in groups that
    share most of it.
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
