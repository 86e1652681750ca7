"""What adapting a task costs, one task at a time and many at once, and how much is trained."""

import time
from collections.abc import Callable

import torch
from pydantic import PositiveInt

from projects.idp.align import align
from projects.idp.classify import embed, ridge_head
from projects.idp.experiments.common import (
    METHODS,
    AlignConfig,
    codebook,
    domain,
    task_seeds,
    trained,
)
from projects.idp.norms import TaskNetwork
from shared import experiment


class Config(AlignConfig):
    repeats: PositiveInt
    """Rounds of the interleaved measurement."""
    single_steps: PositiveInt
    """Steps of the one task whose time is stated alone."""


def run(config: Config, run: experiment.Run) -> None:
    source, roles = trained(run)
    book = codebook(source, config.codebook_rows, config.seed)
    for name in config.targets:
        place = domain(config, name, source, roles["novel"])
        for shots in config.shots:
            tasks = place.tasks(config, shots)
            support, query = place.images[tasks.support], place.images[tasks.query]
            whole = slice(0, config.tasks)
            seeds = task_seeds(config, name, shots, whole)

            def adapt(part: slice, **how: object) -> TaskNetwork:
                return align(
                    source.network, support[part], config.ways, book, source.scale,  # noqa: B023
                    config.how(**how), seeds[part],  # noqa: B023
                )

            def scores(part: slice) -> torch.Tensor:
                both = embed(adapt(part), support[part], query[part], "inductive")  # noqa: B023
                return ridge_head(*both, config.ways)

            singles = [slice(n, n + 1) for n in range(config.tasks)]
            alone = torch.cat([scores(one) for one in singles])
            together = scores(whole)
            plain = TaskNetwork(source.network, 1)
            about = {
                "target": name,
                "shots": shots,
                "tasks": config.tasks,
                "steps": config.steps,
                "trained": sum(p.numel() for p in plain.trained()),
                "parameters": sum(p.numel() for p in source.network.parameters()),
                "difference_ratio": float((alone - together).abs().max() / alone.abs().max()),
                "same_share": float(
                    (alone.argmax(-1) == together.argmax(-1)).float().mean()
                ),
            }
            ways: dict[str, Callable[[], object]] = {
                "one at a time": lambda: [adapt(one) for one in singles],  # noqa: B023
                "many at once": lambda: adapt(whole),  # noqa: B023
                "fine-tuning, many at once": lambda: adapt(  # noqa: B023
                    whole, losses=METHODS["fine_tuning"]
                ),
                "one task, all steps": lambda: adapt(  # noqa: B023
                    singles[0], steps=config.single_steps  # noqa: B023
                ),
            }
            for repeat in run.progress(config.repeats, f"{name}, {shots} shots"):
                for way, work in ways.items():
                    start = time.process_time()
                    work()
                    run.row(
                        **about, way=way, repeat=repeat,
                        core_seconds=time.process_time() - start,
                    )
