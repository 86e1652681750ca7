"""The in-domain ceiling: the same network trained on each target's own labels, on the same tasks.

In two folds: each image of the pool is scored by a network that was trained, from the source's
weights, on the other half; a task's query gets the best of its ways. It sees hundreds of labelled
images of every class, and is what no few-shot method is expected to reach.
"""

from copy import deepcopy

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from projects.idp.experiments.common import Domain, TaskConfig, trained
from projects.idp.source import Source
from shared import experiment
from shared.seeding import generator, step_seed
from shared.vision.training import train


class Config(TaskConfig):
    epochs: PositiveInt
    """Passes over the images."""
    batch: PositiveInt
    """Images of a step."""
    rate: PositiveFloat
    """Of Adam."""


def run(config: Config, run: experiment.Run) -> None:
    base = trained(run, config.device)
    for name in run.progress(config.targets, "targets"):
        place = base.domain(config, name)
        logits = out_of_fold(config, place, base.source)
        for shots in config.shots:
            tasks = place.tasks(config, shots)
            for number, query in enumerate(tasks.query):
                labels = place.pool.labels[query]
                ways = labels.unique()
                best = ways[logits[query][:, ways].argmax(1)]
                run.row(
                    target=name,
                    shots=shots,
                    task=number,
                    queries=config.ways * config.queries,
                    ceiling=int((best == labels).sum()),
                )


def out_of_fold(config: Config, place: Domain, source: Source) -> Tensor:
    """Logits [n, classes] of each image by the network that was not trained on it."""
    n, classes = len(place.images), len(place.pool.classes)
    order = torch.randperm(n, generator=generator(config.seed, "folds", place.name))
    logits = torch.empty(n, classes)
    for fold, (own, other) in enumerate((order.chunk(2), order.chunk(2)[::-1])):
        network = deepcopy(source.network).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step_seed(config.seed, "ceiling", place.name, fold))
            model = nn.Sequential(network, nn.Linear(source.network.width, classes)).to(
                config.device
            )
        train(
            model,
            (place.images[own], place.pool.labels[own].to(config.device)),
            lambda x, y, model=model: F.cross_entropy(model(x), y),
            epochs=config.epochs,
            batch=config.batch,
            seed=config.seed,
            optimiser=lambda parameters: torch.optim.Adam(parameters, lr=config.rate),
        )
        with torch.no_grad():
            logits[other] = torch.cat(
                [model(part) for part in place.images[other].split(256)]
            ).cpu()
    return logits
