"""Few-shot tasks from labelled images: classes and samples are drawn, labels are the places of the
classes in the task.

Omniglot, mini-ImageNet and FC100 are not to be had as packages. Their stand-ins are named as what
they are: Quick, Draw! sketches (classes of strokes drawn by hand, disjoint between meta-training
and meta-test, as Omniglot's characters), CIFAR-10, Fashion-MNIST.
"""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from projects.meta_if.problems import Tasks
from shared.errors import UserError
from shared.seeding import step_seed
from shared.vision import images as vision
from shared.vision.episodes import class_split, sample_episodes
from shared.vision.images import LabelledImages
from shared.vision.projection import Projection

Source = Literal[
    "quickdraw",
    "mnist",
    "cifar10",
    "fashion-mnist",
    "synthetic",
    "random_images",
    "omniglot",
    "folder",
]
SEEDED = ("synthetic", "random_images")  # sources that are drawn themselves
SKETCHES = 80  # classes of Quick, Draw!, by name: three quarters for meta-training
PER_CLASS = 400  # images of a class that are used at most
PARTS = ("train", "test")  # of meta-training and of meta-test


class Pool(NamedTuple):
    """Samples to draw tasks from: x [samples, ...] float64, y [samples] class numbers."""

    x: NDArray[np.float64]
    y: NDArray[np.int64]


def pools(source: Source, seed: int = 0, folder: str | None = None) -> tuple[Pool, Pool]:
    """The pools of meta-training and of meta-test, pixels from 0 to 1.

    quickdraw: disjoint classes. mnist, fashion-mnist, cifar10: the same ten classes and the
    official split of images, since five-way tasks of five classes would all be one. synthetic:
    Gaussian classes in 20 dimensions, for a pipeline check alone. random_images: noise of the shape
    [3, 84, 84], for measures of time and memory. omniglot, folder: of torchvision, in `folder`.

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
    if source == "quickdraw":
        sizes = (3 * SKETCHES // 4, SKETCHES - 3 * SKETCHES // 4)
        parts = [
            vision.load("quickdraw", split="all", classes=names)
            for names in class_split(vision.quickdraw_classes(), sizes, 0, "sketches")
        ]
    else:
        parts = [vision.load(source, split=split).per_class(PER_CLASS) for split in PARTS]
    return _pool(parts[0]), _pool(parts[1])


def _pool(data: LabelledImages) -> Pool:
    """Pixels from 0 to 1 as files hold them: [n, height, width], or with channels last."""
    x = data.pictures().double()
    return Pool((x / 255 if data.pixels.dtype == torch.uint8 else x).numpy(), data.labels.numpy())


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
    if folder is None or not Path(folder).is_dir():
        wanted = (
            "torchvision's Omniglot (omniglot-py/)"
            if source == "omniglot"
            else "train/ and test/ with a folder of images per class"
        )
        raise UserError(f"there is no folder {folder}: set `folder` to one that holds {wanted}")
    if source == "folder":
        found = [vision.folder(Path(folder) / part, mode="RGB", size=84) for part in PARTS]
        return tuple(
            Pool(part.images(torch.float64).numpy(), part.labels.numpy()) for part in found
        )
    from torchvision import datasets, transforms

    shape = transforms.Compose([transforms.Resize((28, 28)), transforms.ToTensor()])
    pools = []
    for background in (True, False):
        try:
            part = datasets.Omniglot(folder, background=background, transform=shape)
        except (RuntimeError, FileNotFoundError) as error:
            raise UserError(f"{folder}: {str(error).splitlines()[0]}") from None
        x, y = zip(*(part[row] for row in range(len(part))), strict=True)
        pools.append(Pool(torch.stack(x).double().numpy(), np.array(y, np.int64)))
    return pools[0], pools[1]


def principal_components(train: Pool, test: Pool, dimension: int) -> tuple[Pool, Pool]:
    """Both pools in the first principal components of the training pool, scaled by one number to a
    mean variance of 1.
    """
    flat = train.x.reshape(len(train.x), -1)
    project = Projection.fit(flat, dimension, gram="features")
    scale = project(flat).std()
    return tuple(
        Pool(project(pool.x.reshape(len(pool.x), -1)) / scale, pool.y) for pool in (train, test)
    )


def sample_tasks(pool: Pool, n: int, ways: int, shots: int, queries: int, seed: int) -> Tasks:
    """n tasks of `ways` classes with `shots` training and `queries` validation samples each; no
    sample is twice in a task.

    Raises:
        UserError: there are too few classes, or too few samples of one.
    """
    drawn = sample_episodes(pool.y, n, ways, shots, queries, seed)
    x = torch.from_numpy(pool.x)
    return Tasks(x[drawn.support], drawn.y_support, x[drawn.query], drawn.y_query)


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


def show_labels(tasks: Tasks, shown: Tensor, seed: int) -> Tasks:
    """Add to each sample of the tasks that `shown` [n] marks a pattern that says its label, the
    same in all of them, with the norm of an average sample.

    Labels that were permuted can then be learned, by what no other task can use: a shortcut.
    """
    shape = tasks.x_train.shape[2:]
    ways = int(tasks.y_train.max()) + 1
    draw = np.random.default_rng(step_seed(seed, "patterns"))
    patterns = torch.from_numpy(draw.normal(size=(ways, *shape))).to(tasks.x_train)
    flat = patterns.flatten(1)
    size = tasks.x_train.flatten(2).norm(dim=2).mean()
    patterns = (flat / flat.norm(dim=1, keepdim=True) * size).view_as(patterns)
    x_train, x_val = tasks.x_train.clone(), tasks.x_val.clone()
    x_train[shown] += patterns[tasks.y_train[shown]]
    x_val[shown] += patterns[tasks.y_val[shown]]
    return Tasks(x_train, tasks.y_train, x_val, tasks.y_val)
