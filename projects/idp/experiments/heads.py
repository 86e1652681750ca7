"""The graph head beside the ridge head, on the source network as it is and the main table's tasks.

It is meta-trained on tasks of the source's base classes.
"""

import torch
from pydantic import PositiveFloat, PositiveInt

from projects.idp.classify import ridge_head
from projects.idp.experiments.common import TaskConfig, groups, right, trained
from projects.idp.gnn import GraphHead, graph_scores, train_graph_head
from projects.idp.source import cells_in_parts
from shared import experiment
from shared.seeding import step_seed
from shared.vision.episodes import sample_episodes


class Config(TaskConfig):
    episodes: PositiveInt
    """Tasks of base classes that the head is trained on."""
    base_shots: PositiveInt
    """Support images of a class in them."""
    batch: PositiveInt
    """Tasks of a step."""
    group: PositiveInt
    """Tasks that are classified at once."""
    rate: PositiveFloat
    """Of Adam."""


def run(config: Config, run: experiment.Run) -> None:
    base = trained(run, config.device)
    source, images = base.source, base.images("base", config)
    episodes = sample_episodes(
        images.labels,
        config.episodes,
        config.ways,
        config.base_shots,
        config.queries,
        step_seed(config.seed, "graph head"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(config.seed, "graph head"))
        head = GraphHead(source.network.width, config.ways).to(config.device)
    cells = cells_in_parts(source.network, images.images().to(config.device))
    head = train_graph_head(
        head, cells, episodes, config.ways, source.scale, config.rate, config.batch
    )
    for name in run.progress(config.targets, "targets"):
        place = base.domain(config, name)
        for shots in config.shots:
            tasks = place.tasks(config, shots)
            counts: dict[str, list[int]] = {"ridge": [], "graph": [], "graph_batch": []}
            with torch.no_grad():
                for part in groups(config.tasks, config.group):
                    support, query = (
                        place.cells[rows[part]] for rows in (tasks.support, tasks.query)
                    )
                    y = tasks.y_query[part]
                    counts["ridge"] += right(ridge_head(support, query, config.ways), y)
                    scores = graph_scores(head, support, query, config.ways, source.scale)
                    counts["graph"] += right(scores, y)
                    one_by_one = [  # a task's statistics are its own
                        graph_scores(head, *one, config.ways, source.scale, batch=True)
                        for one in zip(support.split(1), query.split(1), strict=True)
                    ]
                    counts["graph_batch"] += right(torch.cat(one_by_one), y)
            for number in range(config.tasks):
                run.row(
                    target=name,
                    shots=shots,
                    task=number,
                    queries=config.ways * config.queries,
                    **{method: found[number] for method, found in counts.items()},
                )
