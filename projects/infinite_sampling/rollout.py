"""What goes into a rollout and what comes out: a schedule, completions, and what they took."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from projects.infinite_sampling.scheduler import Plan, Refill

Mode = Literal["full", "micro", "continuous", "dynamic"]
Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Schedule:
    """How a rollout is decoded. It changes steps, seconds and bytes, and no completion.

    Attributes:
        mode: see `engine`.
        slots: rows of the cache. More than there are jobs are not made.
        refill: see `scheduler.Queue`; with `dynamic` one without a plan.
        prefix: tokens generated before lengths are predicted.
        predictor: of lengths. Without one, refills by length have nothing to go by and keep the
            order.
        eps: of the plan.
        budget_tokens: of `dynamic`, tokens of cache in all; None: as many as `slots` fixed rows
            would have.
        page: of `dynamic`, tokens in a page.
    """

    mode: Mode = "dynamic"
    slots: int = 8
    refill: Refill = "fifo"
    prefix: int = 0
    predictor: "Predictor | None" = None
    eps: float = 0.1
    budget_tokens: int | None = None
    page: int = 8

    def __post_init__(self) -> None:
        if self.slots < 1 or self.page < 1 or self.prefix < 0:
            raise ValueError("slots and page must be at least 1, prefix at least 0")
        if self.prefix and self.mode in ("full", "micro"):
            raise ValueError(f"mode {self.mode} has no prefix phase")
        if self.mode == "dynamic" and self.refill.startswith("plan_"):
            raise ValueError(
                "dynamic rows have no planned queues; use fifo, sjf_global or lpt_global"
            )


@dataclass(frozen=True)
class Completion:
    """One sampled completion: `tokens` (the end token included, if it came), their
    log-probabilities, and why it ended.
    """

    prompt: int
    index: int
    tokens: list[int]
    logprobs: list[float]
    finish: Finish


@dataclass
class Stats:
    """What a rollout took.

    Attributes:
        steps: forwards of all rows, one token each; `prefix_steps` of them before the plan.
        busy: rows with a job, summed over steps; `rows`: rows, summed over steps.
        prefills: forwards of prompts. reingests: forwards of tokens of jobs that had been put
            aside, `reingested_tokens` in all.
        preemptions: jobs that lost their row for want of a page.
        cache_bytes: the cache that was allocated; prompt_bytes: the most that prompts' keys and
            values took beside it, at any one time.
        token_bytes: keys and values of a token.
        plan: of the refill, if it has one. plan_seconds, predict_seconds, seconds: process time
            (CPU) of the plan, of predicting, of all.
        spans: (row, job, first step, step after its last), job by its number in the rollout.
    """

    steps: int = 0
    prefix_steps: int = 0
    busy: int = 0
    rows: int = 0
    prefills: int = 0
    reingests: int = 0
    reingested_tokens: int = 0
    preemptions: int = 0
    cache_bytes: int = 0
    prompt_bytes: int = 0
    token_bytes: int = 0
    tokens: int = 0
    plan: Plan | None = None
    plan_seconds: float = 0.0
    predict_seconds: float = 0.0
    seconds: float = 0.0
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def kv_bytes(self) -> int:
        """The peak of keys and values."""
        return self.cache_bytes + self.prompt_bytes

    @property
    def occupancy(self) -> float:
        """The share of row-steps that had a job."""
        return self.busy / self.rows if self.rows else 1.0


@dataclass(frozen=True)
class Rollout:
    """Completions in the order of the jobs, and what they took."""

    completions: list[Completion]
    stats: Stats


class Predictor(Protocol):
    """What the engine asks of a predictor of lengths (`predictor.py` has some)."""

    needs_hidden: bool

    def predict(self, prefixes: "Prefixes") -> np.ndarray:
        """The tokens that remain of each unfinished completion, float64 [jobs]."""


@dataclass(frozen=True)
class Prefixes:
    """The beginnings of unfinished completions.

    Attributes:
        prompts: each one's prompt, tokens.
        tokens: the first k tokens of each.
        jobs: (prompt, index) of each.
        hidden: [jobs, features], the state that produced the k-th token beside that token's
            embedding; or None.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    jobs: list[tuple[int, int]]
    hidden: Tensor | None = None
