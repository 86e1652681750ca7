"""The main table: 5-way tasks of every target, the same for all methods, 1 and 5 shots."""

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from projects.idp import labels
from projects.idp.align import align
from projects.idp.baselines import nearest_mean, peer_scores, peers
from projects.idp.classify import embed, propagate, ridge_head
from projects.idp.experiments.common import (
    METHODS,
    AlignConfig,
    Domain,
    centre,
    groups,
    right,
    task_seeds,
    trained,
)
from projects.idp.source import Source
from shared import experiment


class Config(AlignConfig):
    peer_steps: PositiveInt
    """Steps of easyfsl's Finetune and TIM."""
    peer_rate: PositiveFloat
    """Their rate."""


def run(config: Config, run: experiment.Run) -> None:
    base = trained(run, config.device)
    source = base.source
    book = base.codebook("clustered", config.codebook_rows, config.seed)
    others = peers(centre(source), config.peer_steps, config.peer_rate)
    for name in run.progress(config.targets, "targets"):
        place = base.domain(config, name)
        for shots in config.shots:
            found = frozen(config, place, shots, others)
            for part in run.progress(list(groups(config.tasks, config.group)), f"{name}, {shots}"):
                for method, counts in adapted(config, place, shots, source, book, part).items():
                    found.setdefault(method, []).extend(counts)
            for number in range(config.tasks):
                run.row(
                    target=name,
                    shots=shots,
                    task=number,
                    queries=config.ways * config.queries,
                    **{method: found[method][number] for method in labels.METHODS},
                )


def frozen(
    config: Config, place: Domain, shots: int, others: dict[str, object]
) -> dict[str, list[int]]:
    """Right answers of each task by the methods that leave the network as it is."""
    tasks = place.tasks(config, shots)
    found: dict[str, list[int]] = {}
    support, query = place.cells[tasks.support], place.cells[tasks.query]
    for part in groups(config.tasks, config.group):
        scores = ridge_head(support[part], query[part], config.ways)
        found.setdefault(labels.RIDGE, []).extend(right(scores, tasks.y_query[part]))
    pooled, asked = support.mean(2), query.mean(2)
    found[labels.NEAREST_MEAN] = right(nearest_mean(pooled, asked, config.ways), tasks.y_query)
    for method, peer in others.items():
        scores = torch.stack(
            [peer_scores(peer, *one) for one in zip(pooled, tasks.y_support, asked, strict=True)]
        )
        found[method] = right(scores, tasks.y_query)
    return found


def adapted(
    config: AlignConfig, place: Domain, shots: int, source: Source, book: Tensor, part: slice
) -> dict[str, list[int]]:
    """Right answers of some tasks by the methods that need the images."""
    tasks = place.tasks(config, shots)
    support, query = place.images[tasks.support[part]], place.images[tasks.query[part]]
    seeds, y = task_seeds(config, place.name, shots, part), tasks.y_query[part]
    found: dict[str, list[int]] = {}

    def transductive(network: object, method: str) -> None:
        s, q = embed(network, support, query, "transductive")  # type: ignore[arg-type]
        scores = ridge_head(s, q, config.ways)
        found[f"{method}_batch"] = right(scores, y)
        found[f"{method}_propagated"] = right(propagate(scores, q.mean(2)), y)

    plain = align(
        source.network, support, config.ways, book, source.scale, config.how(steps=0), seeds
    )
    transductive(plain, labels.RIDGE)
    for method, losses in METHODS.items():
        network = align(
            source.network, support, config.ways, book, source.scale, config.how(losses), seeds
        )
        s, q = embed(network, support, query, "inductive")
        found[method] = right(ridge_head(s, q, config.ways), y)
        if method == labels.IDP:
            transductive(network, method)
    return found
