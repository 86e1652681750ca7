"""What adapting a task costs, one task at a time and many at once, and how much is trained."""

import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from projects.idp.align import FINE_TUNING, IDP, Losses, align
from projects.idp.classify import embed, ridge_head
from projects.idp.experiments.common import AlignConfig, Domain, Trained, task_seeds, trained
from projects.idp.norms import TaskNetwork
from shared import experiment


class Config(AlignConfig):
    repeats: PositiveInt
    """Rounds of the interleaved measurement."""
    single_steps: PositiveInt
    """Steps of the one task whose time is stated alone."""


def run(config: Config, run: experiment.Run) -> None:
    base = trained(run, config.device)
    for name in config.targets:
        place = base.domain(config, name)
        for shots in config.shots:
            work = Work(config, base, place, shots)
            about = {"target": name, "shots": shots, **work.about()}
            for repeat in run.progress(config.repeats, f"{name}, {shots} shots"):
                for way, call in work.ways().items():
                    seconds = seconds_of(call, config.device)
                    run.row(**about, way=way, repeat=repeat, core_seconds=seconds)


class Work:
    """The tasks of a target, to be adapted one at a time or all at once."""

    def __init__(self, config: Config, base: Trained, place: Domain, shots: int):
        self.config, self.source = config, base.source
        self.book = base.codebook("clustered", config.codebook_rows, config.seed)
        tasks = place.tasks(config, shots)
        self.support, self.query = place.images[tasks.support], place.images[tasks.query]
        self.whole = slice(0, config.tasks)
        self.singles = [slice(n, n + 1) for n in range(config.tasks)]
        self.seeds = task_seeds(config, place.name, shots, self.whole)

    def adapt(self, part: slice, losses: Losses = IDP, **how: Any) -> TaskNetwork:
        """Some of the tasks, at once."""
        return align(
            self.source.network,
            self.support[part],
            self.config.ways,
            self.book,
            self.source.scale,
            self.config.how(losses, **how),
            self.seeds[part],
        )

    def scores(self, part: slice) -> Tensor:
        """Their scores, inductive."""
        both = embed(self.adapt(part), self.support[part], self.query[part], "inductive")
        return ridge_head(*both, self.config.ways)

    def about(self) -> dict[str, Any]:
        """Sizes, and how far scores at once are from those alone."""
        alone = torch.cat([self.scores(one) for one in self.singles])
        together = self.scores(self.whole)
        trained_parameters = TaskNetwork(self.source.network, 1, self.config.scope).trained()
        return {
            "tasks": self.config.tasks,
            "steps": self.config.steps,
            "single_steps": self.config.single_steps,
            "trained": sum(p.numel() for p in trained_parameters),
            "parameters": sum(p.numel() for p in self.source.network.parameters()),
            "difference_ratio": float((alone - together).abs().max() / alone.abs().max()),
            "same_share": float((alone.argmax(-1) == together.argmax(-1)).float().mean()),
        }

    def ways(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        return {
            "one at a time": lambda: [self.adapt(one) for one in self.singles],
            "many at once": lambda: self.adapt(self.whole),
            "fine-tuning, many at once": lambda: self.adapt(self.whole, FINE_TUNING),
            "one task, all steps": lambda: self.adapt(
                self.singles[0], steps=self.config.single_steps
            ),
        }


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Of the core; on a GPU, until it is done."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start
