"""Few-shot tasks from labelled images: classes and samples are drawn, labels are the places of the
classes in the task.

Omniglot, mini-ImageNet and FC100 are not to be had as packages. Their stand-ins are named as what
they are: Quick, Draw! sketches (classes of strokes drawn by hand, disjoint between meta-training
and meta-test, as Omniglot's characters), CIFAR-10, Fashion-MNIST.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from projects.meta_if.problems import Tasks
from shared.errors import UserError
from shared.seeding import step_seed

Source = Literal[
    "quickdraw",
    "mnist",
    "cifar10",
    "fashion_mnist",
    "synthetic",
    "random_images",
    "omniglot",
    "folder",
]
SKETCHES = 80  # classes of Quick, Draw!, by name: three quarters for meta-training
PER_CLASS = 400  # images of a class that are used at most


class Pool(NamedTuple):
    """Samples to draw tasks from: x [samples, ...] float64, y [samples] class numbers."""

    x: NDArray[np.float64]
    y: NDArray[np.int64]


def pools(source: Source, seed: int = 0, folder: str | None = None) -> tuple[Pool, Pool]:
    """The pools of meta-training and of meta-test, pixels from 0 to 1.

    quickdraw: disjoint classes. mnist, fashion_mnist, cifar10: the same ten classes and the
    official split of images, since five-way tasks of five classes would all be one. synthetic:
    Gaussian classes in 20 dimensions, for the wiring alone. random_images: noise of the shape [3,
    84, 84], for measures of time and memory. omniglot, folder: of torchvision, in `folder`.

    Raises:
        UserError: the data have not been fetched, or the folder is not there.
    """
    if source == "synthetic":
        return _synthetic(seed, 0, 20), _synthetic(seed, 1, 10)
    if source == "random_images":
        draw = np.random.default_rng(step_seed(seed, "noise"))
        return tuple(Pool(draw.random((400, 3, 84, 84)), np.arange(400) % 20) for _ in range(2))
    if source in ("omniglot", "folder"):
        return _torchvision(source, folder)
    from shared.data.loaders import images

    if source == "quickdraw":
        drawings, names = images.quickdraw()
        chosen = np.random.default_rng(step_seed(0, "sketches")).permutation(len(names))[:SKETCHES]
        cut = 3 * SKETCHES // 4
        return _by_class(drawings[chosen[:cut]]), _by_class(drawings[chosen[cut:]])
    found = {
        "mnist": images.mnist,
        "fashion_mnist": images.fashion_mnist,
        "cifar10": images.cifar10,
    }[source]()
    return _some(found.train_images, found.train_labels), _some(
        found.test_images, found.test_labels
    )


def _by_class(drawings: NDArray[np.float32]) -> Pool:
    """Drawings [classes, each, height, width]."""
    classes, each = drawings.shape[:2]
    return Pool(
        drawings.reshape(classes * each, *drawings.shape[2:]).astype(np.float64),
        np.repeat(np.arange(classes), each),
    )


def _some(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Pool:
    """The first images of each class."""
    rows = np.concatenate([np.flatnonzero(labels == one)[:PER_CLASS] for one in np.unique(labels)])
    return Pool(images[rows].astype(np.float64) / 255, labels[rows])


def _synthetic(seed: int, part: int, classes: int) -> Pool:
    draw = np.random.default_rng(step_seed(seed, "synthetic", part))
    # what the body can find: four directions of twenty
    mixing = np.random.default_rng(step_seed(seed, "mixing")).normal(size=(4, 20))
    centres = 2 * draw.normal(size=(classes, 4)) @ mixing / 2
    y = np.repeat(np.arange(classes), 40)
    return Pool(centres[y] + 1.5 * draw.normal(size=(len(y), 20)), y)


def _torchvision(source: str, folder: str | None) -> tuple[Pool, Pool]:
    """Omniglot in torchvision's layout, or a folder with train/ and test/ of a folder of images per
    class.
    """
    from pathlib import Path

    if folder is None or not Path(folder).is_dir():
        wanted = (
            "torchvision's Omniglot (omniglot-py/)"
            if source == "omniglot"
            else "train/ and test/ with a folder of images per class"
        )
        raise UserError(f"there is no folder {folder}: set `folder` to one that holds {wanted}")
    from torchvision import datasets, transforms

    size = 28 if source == "omniglot" else 84
    shape = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])
    try:
        if source == "omniglot":
            parts = [
                datasets.Omniglot(folder, background=background, transform=shape)
                for background in (True, False)
            ]
        else:
            parts = [
                datasets.ImageFolder(f"{folder}/{part}", transform=shape)
                for part in ("train", "test")
            ]
    except (RuntimeError, FileNotFoundError) as error:
        raise UserError(f"{folder}: {str(error).splitlines()[0]}") from None
    found = []
    for part in parts:
        x, y = zip(*(part[row] for row in range(len(part))), strict=True)
        found.append(Pool(torch.stack(x).double().numpy(), np.array(y, np.int64)))
    return found[0], found[1]


def principal_components(train: Pool, test: Pool, dimension: int) -> tuple[Pool, Pool]:
    """Both pools in the first principal components of the training pool, scaled by one number to a
    mean variance of 1.
    """
    flat = train.x.reshape(len(train.x), -1)
    if not 0 < dimension <= min(flat.shape):
        raise UserError(
            f"{dimension} components cannot be had of {flat.shape[0]} samples of {flat.shape[1]}"
            " numbers"
        )
    mean = flat.mean(0)
    _, vectors = np.linalg.eigh((flat - mean).T @ (flat - mean))
    basis = vectors[:, ::-1][:, :dimension]
    # or the sign of a component would be the library's whim
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(dimension)])
    scale = ((flat - mean) @ basis).std()
    return tuple(
        Pool((pool.x.reshape(len(pool.x), -1) - mean) @ basis / scale, pool.y)
        for pool in (train, test)
    )


def sample_tasks(pool: Pool, n: int, ways: int, shots: int, queries: int, seed: int) -> Tasks:
    """n tasks of `ways` classes with `shots` training and `queries` validation samples each; no
    sample is twice in a task.

    Raises:
        UserError: there are too few classes, or too few samples of one.
    """
    classes = np.unique(pool.y)
    by_class = {one: np.flatnonzero(pool.y == one) for one in classes}
    fewest = min(len(rows) for rows in by_class.values())
    if ways > len(classes) or shots + queries > fewest:
        raise UserError(
            f"tasks of {ways} classes with {shots} + {queries} samples cannot be drawn from"
            f" {len(classes)} classes of at least {fewest}"
        )
    train, val = [], []
    for number in range(n):
        draw = np.random.default_rng(step_seed(seed, "task", number))
        rows = np.stack(
            [
                draw.permutation(by_class[one])[: shots + queries]
                for one in draw.permutation(classes)[:ways]
            ]
        )
        train.append(rows[:, :shots].reshape(-1))
        val.append(rows[:, shots:].reshape(-1))
    x = torch.from_numpy(pool.x)
    y_train, y_val = (
        torch.arange(ways).repeat_interleave(each).expand(n, -1).contiguous()
        for each in (shots, queries)
    )
    return Tasks(
        x[torch.from_numpy(np.stack(train))], y_train, x[torch.from_numpy(np.stack(val))], y_val
    )


def spoil_tasks(tasks: Tasks, fraction: float, seed: int) -> tuple[Tasks, Tensor]:
    """Permute the labels of a fraction of the tasks over their samples, training and validation
    apart, and return the mask [n] of them.

    Within a task the labels then have nothing to do with the images. (Renaming the classes of a
    task consistently would harm nothing.)
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"a fraction of the tasks lies between 0 and 1, not {fraction:g}")
    n = tasks.x_train.shape[0]
    chosen = np.random.default_rng(step_seed(seed, "spoil")).permutation(n)[: round(fraction * n)]
    y_train, y_val, mask = (
        tasks.y_train.clone(),
        tasks.y_val.clone(),
        torch.zeros(n, dtype=torch.bool),
    )
    for k in chosen.tolist():
        for number, y in enumerate((y_train, y_val)):
            order = np.random.default_rng(step_seed(seed, "labels", k, number)).permutation(
                y.shape[1]
            )
            y[k] = y[k, torch.from_numpy(order)]
        mask[k] = True
    return Tasks(tasks.x_train, y_train, tasks.x_val, y_val), mask
