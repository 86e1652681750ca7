"""Time: a training step of SSCBM and of CEM in turns, end to end from images; and pseudo labels of
many images, with the memory they take.
"""

import time

import torch
from pydantic import Field, PositiveInt

from projects.sscbm import labels
from projects.sscbm.model import build, named_backbone
from projects.sscbm.pseudo import pseudo_labels
from projects.sscbm.training import Losses, Objective
from shared import experiment
from shared.meters import interleave, live_bytes
from shared.seeding import generator


class Config(experiment.Config):
    backbone: str
    """Network with a spatial map."""
    edge: PositiveInt
    """Pixels of an edge of the images, of noise: times do not depend on what they show."""
    channels: PositiveInt
    """Of the images."""
    concepts: PositiveInt
    """Concepts (k)."""
    classes: PositiveInt
    """Classes (l)."""
    size: PositiveInt
    """Numbers in a concept's embedding (m)."""
    batch: PositiveInt
    """Images of a step."""
    steps: PositiveInt
    """Steps that are timed at once."""
    repeats: PositiveInt
    """Rounds."""
    queries: PositiveInt
    """Images that get pseudo labels."""
    labelled: PositiveInt
    """Images among which neighbours are searched."""
    dimensions: PositiveInt
    """Numbers in a frozen feature."""
    neighbours: PositiveInt
    """K."""
    annotated: float = Field(ge=0, le=1)
    """Share of a step's images that is annotated."""
    device: str = "cpu"
    """Where steps are made: cpu, or cuda."""


def run(config: Config, run: experiment.Run) -> None:
    steps(config, run)
    neighbours(config, run)


def steps(config: Config, run: experiment.Run) -> None:
    draw = generator(config.seed, "noise")
    shape = (config.channels, config.edge, config.edge)
    images = torch.rand(config.batch, *shape, generator=draw)
    classes = torch.randint(0, config.classes, (config.batch,), generator=draw)
    concepts = torch.randint(0, 2, (config.batch, config.concepts), generator=draw).float()
    concepts[round(config.annotated * config.batch) :] = torch.nan
    pseudo = torch.rand(config.batch, config.concepts, generator=draw)
    columns = [one.to(config.device) for one in (images, classes, concepts, pseudo)]

    def work(method: str) -> object:
        kind = "cem" if method == labels.CEM else "sscbm"
        model = build(
            kind,  # type: ignore[arg-type]
            lambda: named_backbone(config.backbone, shape),
            shape,
            config.concepts,
            config.classes,
            size=config.size,
        ).to(config.device)
        model.train()
        loss = Objective(model, Losses("nothing" if kind == "cem" else "align"), config.seed)
        optimiser = torch.optim.Adam(model.parameters(), fused=True)

        def some_steps() -> None:
            for _ in range(config.steps):
                value = loss(*columns)
                optimiser.zero_grad()
                value.backward()
                optimiser.step()

        return some_steps

    variants = {method: work(method) for method in (labels.CEM, labels.SSCBM)}
    clock = time.process_time if config.device == "cpu" else time.perf_counter
    timed = interleave(
        variants,  # type: ignore[arg-type]
        config.repeats,
        clock=clock,
        progress=lambda n: run.progress(n, "rounds"),
    )
    for method, timing in timed.items():
        for repeat, seconds in enumerate(timing.seconds):
            run.row(
                kind="step",
                method=method,
                repeat=repeat,
                work_seconds=seconds / config.steps,
                backbone=config.backbone,
                device=config.device,
            )


def neighbours(config: Config, run: experiment.Run) -> None:
    """Of random features: the work is the same whatever they are."""
    draw = generator(config.seed, "features")
    features = torch.randn(config.queries, config.dimensions, generator=draw)
    concepts = torch.full((config.queries, config.concepts), torch.nan)
    known = torch.randint(0, 2, (config.labelled, config.concepts), generator=draw)
    concepts[: config.labelled] = known.float()
    start = time.process_time()
    with live_bytes() as meter:
        pseudo_labels(features, concepts, config.neighbours)
    seconds = time.process_time() - start
    run.row(
        kind="neighbours",
        queries=config.queries,
        labelled=config.labelled,
        dimensions=config.dimensions,
        k=config.neighbours,
        work_seconds=seconds,
        peak_bytes=meter.peak_bytes(),
        features_bytes=features.nbytes,
    )
