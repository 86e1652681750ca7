"""How the rate, the layers and the codebook were chosen: on validation classes of the source alone,
as drawn and under shifts that are no target (negatives, blur), so that adaptation has something to
do.
"""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from projects.idp import data
from projects.idp.align import IDP, align
from projects.idp.classify import embed, ridge_head
from projects.idp.codebook import build
from projects.idp.experiments.common import (
    METHODS,
    AlignConfig,
    Domain,
    groups,
    right,
    task_seeds,
    trained,
)
from projects.idp.norms import Scope
from projects.idp.source import cells_in_parts
from shared import experiment

Shift = Literal["as drawn", "negative", "blurred"]


class Config(AlignConfig):
    targets: list[Shift] = Field(min_length=1)  # type: ignore[assignment]
    """Shifts of the validation drawings."""
    rates: list[PositiveFloat] = Field(min_length=1)
    """Rates that are tried, the default among them."""
    scopes: list[Scope]
    """Layers that are tried beside the default."""
    sizes: list[PositiveInt]
    """Rows of the codebook that are tried beside the default."""


def shifted(images: Tensor, shift: Shift) -> Tensor:
    """Drawings [n, c, h, w] as they look in another domain."""
    if shift == "negative":
        return 1 - images
    if shift == "blurred":
        return F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return images


def run(config: Config, run: experiment.Run) -> None:
    source, roles = trained(run)
    drawings = data.quickdraw(roles["validation"], config.size).per_class(
        config.per_class, config.seed
    )
    tried = [
        *((rate, config.scope, config.codebook_rows) for rate in config.rates),
        *((config.rate, scope, config.codebook_rows) for scope in config.scopes),
        *((config.rate, config.scope, size) for size in config.sizes),
    ]
    for shift in config.targets:
        images = shifted(drawings.images(), shift)
        place = Domain(shift, drawings, images, cells_in_parts(source.network, images))
        for shots in config.shots:
            tasks = place.tasks(config, shots)

            def judge(how: object, book: Tensor) -> list[int]:
                counts: list[int] = []
                for part in groups(config.tasks, config.group):
                    support = images[tasks.support[part]]  # noqa: B023
                    seeds = task_seeds(config, shift, shots, part)  # noqa: B023
                    network = align(
                        source.network, support, config.ways, book, source.scale, how, seeds
                    )
                    query = images[tasks.query[part]]  # noqa: B023
                    scores = ridge_head(*embed(network, support, query, "inductive"), config.ways)
                    counts += right(scores, tasks.y_query[part])  # noqa: B023
                return counts

            default = build(
                "clustered", config.codebook_rows, source.means, source.learned, config.seed
            )
            plain = judge(config.how(steps=0), default)
            for rate, scope, size in run.progress(tried, f"{shift}, {shots} shots"):
                book = build("clustered", size, source.means, source.learned, config.seed)
                for method, losses in METHODS.items():
                    if losses != IDP and size != config.codebook_rows:
                        continue  # it has no codebook
                    counts = judge(config.how(losses, rate=rate, scope=scope), book)
                    for number, (count, before) in enumerate(zip(counts, plain, strict=True)):
                        run.row(
                            shift=shift,
                            shots=shots,
                            task=number,
                            method=method,
                            rate_ratio=rate,
                            scope=scope,
                            rows=size,
                            queries=config.ways * config.queries,
                            right=count,
                            ridge=before,
                        )
