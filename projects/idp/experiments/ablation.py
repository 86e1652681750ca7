"""The ablation: losses, steps, codebook, penalty, layers, the released loop; on the same tasks."""

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import PositiveFloat, PositiveInt

from projects.idp.align import FINE_TUNING, IDP, Alignment, Losses
from projects.idp.codebook import Kind
from projects.idp.experiments.common import AlignConfig, adapted_counts, trained
from projects.idp.ridge import effective_dimension
from shared import experiment

LOSSES = {
    "T": FINE_TUNING,
    "P": Losses(0.0, 1.0, 0.0),
    "KL": Losses(0.0, 0.0, 1.0),
    "T + P": Losses(1.0, 1.0, 0.0),
    "T + KL": Losses(1.0, 0.0, 1.0),
    "T + P + KL": IDP,
}


class Config(AlignConfig):
    losses: bool
    """Whether combinations of the losses are tried."""
    other_steps: list[int]
    """Numbers of steps beside the default."""
    codebooks: list[tuple[Kind, PositiveInt]]
    """Codebooks beside the default, by how they are made and their rows."""
    penalties: list[PositiveFloat]
    """Multipliers of the proxies' ridge penalty beside 1."""
    scopes: list[str]
    """Which BatchNorm layers are trained, beside the default."""


class Setting(NamedTuple):
    """One line of the ablation."""

    what: str
    value: str
    how: Alignment
    kind: Kind
    rows: int


def settings(config: Config) -> Iterator[Setting]:
    """The default first."""
    default, rows = config.how(), config.codebook_rows
    yield Setting("default", "", default, "clustered", rows)
    yield Setting("steps", "0", config.how(steps=0), "clustered", rows)
    yield Setting("losses", "T", config.how(FINE_TUNING), "clustered", rows)
    if config.losses:
        for name, losses in LOSSES.items():
            if losses not in (IDP, FINE_TUNING):
                yield Setting("losses", name, config.how(losses), "clustered", rows)
    for steps in config.other_steps:
        yield Setting("steps", str(steps), config.how(steps=steps), "clustered", rows)
    for kind, size in config.codebooks:
        yield Setting("codebook", f"{kind}, {size} rows", default, kind, size)
    for lam in config.penalties:
        yield Setting("penalty", f"x {lam:g}", config.how(lam=lam), "clustered", rows)
    for scope in config.scopes:
        yield Setting("layers", scope, config.how(scope=scope), "clustered", rows)
    yield Setting(
        "released", "random class codebooks", config.how(released=True), "clustered", rows
    )


def run(config: Config, run: experiment.Run) -> None:
    base = trained(run, config.device)
    lines = list(settings(config))
    for name in config.targets:
        place = base.domain(config, name)
        for shots in config.shots:
            for line in run.progress(lines, f"{name}, {shots} shots"):
                book = base.codebook(line.kind, line.rows, config.seed)
                counts = adapted_counts(config, place, shots, base.source, book, line.how)
                for number, count in enumerate(counts):
                    run.row(
                        target=name,
                        shots=shots,
                        task=number,
                        what=line.what,
                        value=line.value,
                        queries=config.ways * config.queries,
                        right=count,
                        dimension_ratio=effective_dimension(book) / book.shape[1],
                    )
