"""What a user hands over: folders of images, and a source by folder, name or own code."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from projects.idp.align import Alignment, Losses, check_finite
from projects.idp.backbone import Normalised
from projects.idp.codebook import build, class_means
from projects.idp.command import Adaptation
from projects.idp.norms import TaskNetwork
from projects.idp.source import Source, cells_in_parts
from shared.commands.inputs import (
    Array,
    load_weights,
    user_arrays,
    user_code,
    user_model,
    user_weights,
)
from shared.commands.options import device_of
from shared.errors import UserError
from shared.vision import reading
from shared.vision.images import SUFFIXES, LabelledImages, folder

SCALE, SIZE = 8.0, 224  # of a backbone that was not pretrained here


def class_folders(path: Path, option: str, size: int, mode: reading.Mode) -> LabelledImages:
    """A folder with a folder of images for each class.

    Raises:
        UserError: there is no such folder, a class is empty, there are fewer than two, or an image
            lies beside them.
    """
    if not path.is_dir():
        raise UserError(f"{option} {path}: there is no such folder")
    loose = [file.name for file in sorted(path.iterdir()) if _is_image(file)]
    if loose:
        raise UserError(f"{option} {path}: {loose[0]} is in no class's folder; move it into one")
    names = sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    for name in names:
        if not any(_is_image(file) for file in (path / name).iterdir()):
            raise UserError(
                f"{option} {path}: the class {name} has no images; add some or remove it"
            )
    if len(names) < 2:
        raise UserError(f"{option} {path} needs a folder of images for each of two classes or more")
    return folder(path, mode=mode, size=size)


def pictures(
    path: Path, size: int, mode: reading.Mode, classes: tuple[str, ...]
) -> tuple[list[str], Tensor, Tensor | None]:
    """Query images: their names below `path`, pixels from 0 to 1, and their labels where they lie
    in folders of the support's classes.

    Raises:
        UserError: there are none, or a folder is no class of the support.
    """
    if not path.is_dir():
        raise UserError(f"--query {path}: there is no such folder")
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    loose = sorted(file for file in path.iterdir() if _is_image(file))
    if folders and loose:
        raise UserError(
            f"--query {path} has images beside folders of images; give folders of the support's"
            " classes, or images alone"
        )
    for one in folders:
        if one.name not in classes:
            raise UserError(
                f"--query {path}: {one.name} is no class of --support, which has"
                f" {', '.join(classes)}; put unlabelled images into one folder"
            )
    files = loose or [file for one in folders for file in sorted(one.iterdir()) if _is_image(file)]
    if not files:
        raise UserError(f"--query {path} holds no images ({', '.join(SUFFIXES[:3])}, ...)")
    found = torch.stack([_floats(reading.read_image(file, mode, size)) for file in files])
    labels = None if loose else torch.tensor([classes.index(f.parent.name) for f in files])
    return [str(file.relative_to(path)) for file in files], found, labels


def _is_image(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in SUFFIXES and file.name[0] != "."


def _floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


@dataclass(frozen=True, eq=False)
class Given:
    """A source as it is used: with its codebook and how images must look.

    Attributes:
        size, mode: of images.
        codebook: [n, d]; of no use where no loss takes proxies.
    """

    source: Source
    codebook: Tensor
    size: int
    mode: reading.Mode
    device: torch.device


def load_source(options: argparse.Namespace, recipe: Adaptation) -> Given:
    """The source of --source and its codebook.

    Raises:
        UserError: there is no such source, it has no BatchNorm or spatial map, or there is no
            codebook and a loss needs one.
    """
    device = device_of(recipe.device)
    path = Path(options.source) / "source.safetensors"
    if path.is_file():
        tensors, about = user_weights(path)
        source = Source.of_tensors(tensors)
        size = int(recipe.size or about.get("size", 0))
        if not size:
            raise UserError(f"{path} does not say its images' size; give --size")
        mode: reading.Mode = "RGB"
        means = source.means
    else:
        size = recipe.size or SIZE
        network, mode = _backbone(options, size)
        means = None
        source = Source(network, torch.empty(0), torch.empty(0), SCALE)  # type: ignore[arg-type]
    _check(source.network, size, mode)
    source.network.to(device)
    if options.source_images is not None:
        images = class_folders(options.source_images, "--source-images", size, mode)
        cells = cells_in_parts(source.network, images.images().to(device))
        means = class_means(cells, images.labels.to(device), len(images.classes))
    book = _codebook(options, recipe, means)
    scale = recipe.scale or source.scale
    return Given(
        Source(source.network, source.means, source.learned, scale),
        book.to(device),
        size,
        mode,
        device,
    )


def _codebook(options: argparse.Namespace, recipe: Adaptation, means: Tensor | None) -> Tensor:
    if options.codebook is not None:
        arrays = user_arrays(options.codebook, {"codebook": Array("f", ("rows", "channels"))})
        return torch.from_numpy(np.asarray(arrays["codebook"], dtype=np.float32))
    if means is None:
        if recipe.steps and (recipe.proxy_weight or recipe.agreement_weight):
            raise UserError(
                f"--source {options.source} has no codebook for proxies: give --source-images or"
                " --codebook, or fine-tune without proxies (--proxy-weight 0 --agreement-weight 0)"
            )
        return torch.empty(0, 0)
    return build("clustered", recipe.codebook_rows or means.shape[1], means, means, recipe.seed)


def _backbone(options: argparse.Namespace, size: int) -> tuple[nn.Module, reading.Mode]:
    """A backbone by name, or the user's own."""
    name = options.source
    if ":" in name and not name.startswith("timm:"):
        model = user_model(name, "--source").eval()
        if not callable(getattr(model, "spatial_map", None)):
            raise UserError(
                f"--source {name}: a {type(model).__name__} has no spatial_map(images), which gives"
                " [n, channels, h, w]"
            )
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = 3 if first is None else first.in_channels
        if channels not in (1, 3):
            raise UserError(
                f"--source {name} takes images of {channels} channels; image files have 1 or 3"
            )
        return model, "L" if channels == 1 else "RGB"
    if name != "efficientnet-lite0" and not name.startswith("timm:"):
        raise UserError(
            f"--source {name}: neither a folder that pretrain made, nor efficientnet-lite0,"
            " timm:NAME or FILE.py:FUNCTION"
        )
    if name.startswith("timm:") and options.weights is None:
        raise UserError(f"--source {name} has random weights; give its own with --weights FILE")
    network = Normalised.named(name, size)
    if options.weights is not None:
        load_weights(network.body.model, user_weights(options.weights)[0], str(options.weights))  # type: ignore[union-attr]
    return network, "RGB"


def _check(network: nn.Module, size: int, mode: reading.Mode) -> None:
    """The network has what IDP needs, and task-wise BatchNorm gives its own numbers."""
    images = torch.rand(3, 3 if mode == "RGB" else 1, size, size)
    with torch.no_grad(), user_code("--source"):
        found = network.spatial_map(images)  # type: ignore[operator]
    if not isinstance(found, Tensor) or found.dim() != 4:
        raise UserError("--source gives no spatial map [n, channels, h, w]")
    own = cells_in_parts(network, images)
    check_finite(own)
    with torch.no_grad():
        ours = TaskNetwork(network, 3)(images.unsqueeze(1)).squeeze(1)
    if not torch.allclose(ours, own, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise UserError(
            "--source computes something else once its BatchNorm layers are each task's own; its"
            " layers cannot be adapted"
        )


def alignment(recipe: Adaptation, losses: Losses | None = None) -> Alignment:
    """As the options say, or with other losses."""
    return Alignment(
        steps=recipe.steps,
        rate=recipe.rate,
        pseudo=recipe.pseudo,
        losses=losses or Losses(recipe.target_weight, recipe.proxy_weight, recipe.agreement_weight),
        scope=recipe.layers,
        lam=recipe.lam,
    )
