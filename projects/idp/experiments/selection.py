"""How the rate, the layers and the codebook were chosen: on validation classes of the source alone,
as drawn and under shifts that are no target (negatives, blur), so that adaptation has something to
do.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from projects.idp.experiments.common import METHODS, AlignConfig, Domain, adapted_counts, trained
from projects.idp.norms import Scope
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
    base = trained(run, config.device)
    drawings = base.images("validation", config)
    for shift in config.targets:
        images = shifted(drawings.images(), shift).to(config.device)
        place = Domain.of(shift, drawings, images, base.source)
        for shots in config.shots:
            plain = config.how(steps=0)
            default = base.codebook("clustered", config.codebook_rows, config.seed)
            before = adapted_counts(config, place, shots, base.source, default, plain)
            for one in run.progress(list(tried(config)), f"{shift}, {shots} shots"):
                book = base.codebook("clustered", one.rows, config.seed)
                how = config.how(METHODS[one.method], rate=one.rate, scope=one.scope)
                counts = adapted_counts(config, place, shots, base.source, book, how)
                for number, (count, ridge) in enumerate(zip(counts, before, strict=True)):
                    run.row(
                        shift=shift,
                        shots=shots,
                        task=number,
                        method=one.method,
                        rate_ratio=one.rate,
                        scope=one.scope,
                        rows=one.rows,
                        queries=config.ways * config.queries,
                        right=count,
                        ridge=ridge,
                    )


class Trial(NamedTuple):
    """One setting that is tried."""

    method: str
    rate: float
    scope: Scope
    rows: int


def tried(config: Config) -> Iterator[Trial]:
    """Each rate, the other layers and the other codebooks, one at a time."""
    for method in METHODS:
        for rate in config.rates:
            yield Trial(method, rate, config.scope, config.codebook_rows)
        for scope in config.scopes:
            yield Trial(method, config.rate, scope, config.codebook_rows)
    for rows in config.sizes:
        yield Trial("idp", config.rate, config.scope, rows)
