"""Frozen features of all sets, in which neighbours are searched, and the maps that models are
trained on; and how well three neighbours tell the class.
"""

import torch
from pydantic import Field

from projects.sscbm.data import Features, Name, frozen
from projects.sscbm.experiments.common import SetConfig, loaded
from projects.sscbm.pseudo import choose_labelled, nearest
from shared import experiment


class Config(SetConfig):
    datasets: list[Name] = Field(min_length=1)
    """The sets."""
    kinds: list[Features] = Field(min_length=1)
    """Frozen networks; the first one's features and maps are what other experiments take."""
    ratio: float = Field(gt=0, le=1)
    """Share of the pool that neighbours are searched among."""
    repeats: int = Field(ge=1)
    """Draws of these."""


def run(config: Config, run: experiment.Run) -> None:
    for name in run.progress(config.datasets, "data sets"):
        data = loaded(config, name)
        both = {
            kind: [frozen(part.pixels, kind) for part in (data.pool, data.test)]
            for kind in config.kinds
        }
        pool, test = both[config.kinds[0]]
        run.save_tensors(
            name,
            {
                "pool": pool.features,
                "pool_maps": pool.maps.clone(),
                "test": test.features,
                "test_maps": test.maps.clone(),
            },
        )
        for kind, ((known, _), (held, _)) in both.items():
            for seed in range(config.seed, config.seed + config.repeats):
                rows = choose_labelled(data.pool.labels, config.ratio, seed).rows
                found = nearest(held, known[rows], min(3, len(rows)))[1]
                votes = torch.nn.functional.one_hot(data.pool.labels[rows][found]).sum(1)
                right = votes.argmax(1) == data.test.labels
                run.row(
                    dataset=name,
                    features=kind,
                    seed=seed,
                    dimensions=known.shape[1],
                    labelled=len(rows),
                    class_accuracy=float(right.double().mean()),
                )
