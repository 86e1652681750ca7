"""The paper's empirical study: content and style of proxies, from the source to far domains; and
what proxies look like.
"""

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from projects.idp.codebook import Kind
from projects.idp.experiments.common import ImagesConfig, Trained, trained
from projects.idp.ridge import effective_dimension, reconstruct
from projects.idp.source import cells_in_parts
from projects.idp.style import Style, content, gram_distance, moments_distance, style
from shared import experiment
from shared.seeding import generator


class Config(ImagesConfig):
    draws: PositiveInt
    """Disjoint draws of images of each domain."""
    images: PositiveInt
    """Images of a draw."""
    codebooks: list[tuple[Kind, PositiveInt]] = Field(min_length=1, strict=False)
    """Codebooks, by how they are made and their rows; the first one is that of the pictures."""
    shown: list[str]
    """Targets in the picture."""
    pictures: PositiveInt
    """Images of each of them."""


def run(config: Config, run: experiment.Run) -> None:
    networks = [row["network"] for row in run.used_rows("source") if row["part"] == "network"]
    gallery: list[np.ndarray] = []
    for network in networks:
        base = trained(run, config.device, int(str(network)))
        study(config, run, base, int(str(network)), gallery)
    if gallery:
        run.array("gallery", np.stack(gallery))


def study(
    config: Config, run: experiment.Run, base: Trained, network: int, gallery: list[np.ndarray]
) -> None:
    """Rows of one source network; pictures of the first."""
    drawings = base.images("base", config).images().to(config.device)
    base_cells = cells_in_parts(base.source.network, drawings)
    reference = style(base_cells)
    books = {
        (kind, rows): base.codebook(kind, rows, config.seed) for kind, rows in config.codebooks
    }
    first = next(iter(books.values()))
    for name in run.progress(["source", *config.targets], "domains"):
        if name == "source":
            cells = base_cells
        else:
            place = base.domain(config, name)
            cells = place.cells
            if name in config.shown and network == 0:
                rows = order(len(cells), config.seed, name)[: config.pictures]
                gallery.append(
                    mosaics(place.images[rows], cells[rows], first, drawings, base_cells)
                )
        parts = order(len(cells), config.seed, name).split(config.images)[: config.draws]
        for draw, rows in enumerate(part for part in parts if len(part) == config.images):
            for (kind, size), book in books.items():
                run.row(
                    domain=name,
                    network=network,
                    codebook=kind,
                    rows=size,
                    draw=draw,
                    dimension_ratio=effective_dimension(book) / book.shape[1],
                    **measures(cells[rows], book, reference),
                )


def measures(cells: Tensor, book: Tensor, reference: Style) -> dict[str, float]:
    """Content and style of the proxies of cells."""
    proxies = reconstruct(cells, book)
    kept, own, worn = content(cells, proxies), style(cells), style(proxies)
    found = {
        "error_ratio": kept.error,
        "centred_ratio": kept.centred,
        "cosine_ratio": kept.cosine,
    }
    for measure, distance in (("moments", moments_distance), ("gram", gram_distance)):
        for pair, a, b in (
            ("target_source", own, reference),
            ("proxy_source", worn, reference),
            ("proxy_target", worn, own),
        ):
            found[f"{measure}_{pair}_ratio"] = distance(a, b)
    return found


def order(n: int, seed: int, name: str) -> Tensor:
    """Rows of a domain's images at random."""
    return torch.randperm(n, generator=generator(seed, "draws", name))


def mosaics(
    images: Tensor, cells: Tensor, book: Tensor, base_images: Tensor, base_cells: Tensor
) -> np.ndarray:
    """Of each image: itself; the patches of source images whose cells are nearest to its cells; and
    those nearest to its proxies. uint8 [n, 3, size, size, 3].
    """
    edge = int(cells.shape[1] ** 0.5)
    size = images.shape[-1] // edge * edge
    side = size // edge
    whole = F.interpolate(base_images, (size, size))
    patches = F.unfold(whole, side, stride=side)  # [m, 3 side side, edge edge]
    found = []
    unit = F.normalize(base_cells.flatten(0, 1), dim=-1)
    for image, own in zip(images, cells, strict=True):
        pictures = [F.interpolate(image[None], (size, size))[0]]
        for wanted in (own, reconstruct(own, book)):
            nearest = (F.normalize(wanted, dim=-1) @ unit.T).argmax(1)
            chosen = torch.stack(
                [patches[n // edge**2, :, n % edge**2] for n in nearest.tolist()], 1
            )
            pictures.append(F.fold(chosen[None], (size, size), side, stride=side)[0])
        found.append(torch.stack(pictures).movedim(1, -1))
    return (255 * torch.stack(found)).round().to(torch.uint8).cpu().numpy()
