"""A rollout's jobs while it runs: a completion on its way, its prompt, and what rows of cache may
ask of the run that fills them.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from projects.infinite_sampling.cache import Prefix
from projects.infinite_sampling.rollout import Finish, Schedule, Stats
from projects.infinite_sampling.sampler import Sampler


@dataclass
class Job:
    number: int
    prompt: int
    index: int
    uniforms: list[float]
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    fed: int = 0  # of its tokens, how many have their keys and values in the row
    finish: Finish | None = None
    hidden: Tensor | None = None
    since: int = 0  # the step at which it took its row


@dataclass
class Prompt:
    tokens: list[int]
    jobs: int  # that are not finished
    logits: Tensor | None = None  # [1, vocabulary]
    hidden: Tensor | None = None
    prefix: Prefix | None = None  # all of it, or (paged) what does not fill a page
    pages: list[int] = field(default_factory=list)


class RowsOwner(Protocol):
    """What rows of cache know of the run that owns them.

    Attributes:
        engine: drives the model.
        slots: rows that the schedule has, at most one per job.
        longest: tokens of the longest prompt and its new ones.
    """

    engine: Sampler
    schedule: Schedule
    stats: Stats
    prompts: list[Prompt]
    slots: int
    longest: int

    def known(self, jobs: list[Job]) -> tuple[Tensor, Tensor, Tensor]:
        """What jobs that had been put aside must be fed before they can go on; see `run.Run`."""

    def note_prompts(self) -> None:
        """Keep the most bytes that prompts have taken beside the cache."""
