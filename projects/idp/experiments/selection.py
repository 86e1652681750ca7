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
    other_steps: list[PositiveInt]
    """Numbers of steps that are tried beside the default."""


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
                losses = METHODS[one.method]
                how = config.how(losses, rate=one.rate, scope=one.scope, steps=one.steps)
                counts = adapted_counts(config, place, shots, base.source, book, how)
                for number, (count, ridge) in enumerate(zip(counts, before, strict=True)):
                    run.row(
                        shift=shift,
                        shots=shots,
                        task=number,
                        method=one.method,
                        steps=one.steps,
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
    steps: int
    rate: float
    scope: Scope
    rows: int


def tried(config: Config) -> Iterator[Trial]:
    """Each rate, and the other steps, layers and codebooks, one at a time."""
    for method in METHODS:
        default = Trial(method, config.steps, config.rate, config.scope, config.codebook_rows)
        yield from (default._replace(rate=rate) for rate in config.rates)
        yield from (default._replace(steps=steps) for steps in config.other_steps)
        yield from (default._replace(scope=scope) for scope in config.scopes)
        if method == "idp":  # the other has no codebook
            yield from (default._replace(rows=rows) for rows in config.sizes)
