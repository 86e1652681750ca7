"""What is proved of schedules, on random instances: every violation is counted.

Synthetic durations (uniform, log-normal, two or three modes), up to 40 jobs on up to 8 slots. Plans
are compared with the best of all assignments on instances small enough for that.
"""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from projects.infinite_sampling.scheduler import Queue, lower_bound, plan, replay
from shared import experiment
from shared.seeding import step_seed


class Config(experiment.Config):
    instances: int = Field(ge=1)
    """random sets of durations that are scheduled"""
    small: int = Field(ge=1)
    """sets small enough to try all assignments"""
    eps: list[float]
    """of the plans that are compared with the best assignment"""


def run(config: Config, run: experiment.Run) -> None:
    rng = np.random.default_rng(step_seed(config.seed, "theorems"))
    wrong: Counter[str] = Counter()
    for _ in run.progress(config.instances, "instances"):
        slots = int(rng.integers(1, 9))
        durations = _durations(rng, int(rng.integers(1, 41)))
        micro = replay(durations, slots, Queue(durations, slots), barrier=True).steps
        fifo = replay(durations, slots, Queue(durations, slots)).steps
        shortest = replay(durations, slots, Queue(durations, slots, "sjf_global")).steps
        chunks = sum(sorted(durations, reverse=True)[::slots])
        longest = replay(durations, slots, Queue(durations, slots, "lpt_global")).steps
        least, graham = (
            lower_bound(durations, slots),
            sum(durations) / slots + (1 - 1 / slots) * max(durations),
        )
        wrong["continuous takes no more steps than micro groups in the same order"] += fifo > micro
        wrong["shortest first takes exactly the steps of sorted micro groups"] += shortest != chunks
        wrong["work-conserving steps lie between the lower bound and Graham's"] += any(
            not least <= steps <= graham + 1e-9 for steps in (fifo, shortest, longest)
        )
    for theorem, violations in wrong.items():
        run.row(theorem=theorem, instances=config.instances, violations=violations)
    wrong.clear()
    statuses: Counter[str] = Counter()
    for _ in run.progress(config.small, "small instances"):
        slots = int(rng.integers(2, 4))
        durations = _durations(rng, int(rng.integers(slots, 9 if slots == 2 else 8)))
        best = _optimum(durations, slots)
        for eps in config.eps:
            made = plan(durations, slots, eps)
            statuses[made.status] += 1
            wrong["a plan is within (1 + eps) of the best of all assignments"] += (
                made.value > (1 + eps) * best + 1e-9
            )
            wrong["a plan's certificate and lower bound are true"] += (
                made.lower_bound > best or made.value > made.certificate * best + 1e-9
            )
    for theorem, violations in wrong.items():
        run.row(theorem=theorem, instances=config.small * len(config.eps), violations=violations)
    for status, count in sorted(statuses.items()):
        run.row(
            theorem=f"plans that ended as {status}",
            instances=config.small * len(config.eps),
            violations=None,
            plans=count,
        )


def _durations(rng: np.random.Generator, jobs: int) -> list[int]:
    match int(rng.integers(3)):
        case 0:
            found = rng.integers(0, 100, jobs)
        case 1:
            found = np.clip(rng.lognormal(3, 0.8, jobs), 0, 400)
        case _:
            found = rng.choice([3, 18, 35], jobs) + rng.integers(0, 3, jobs)
    return [int(d) for d in found]


def _optimum(durations: Sequence[int], slots: int) -> int:
    best = sum(durations)
    for rest in itertools.product(range(slots), repeat=len(durations) - 1):
        loads = [0] * slots
        for duration, slot in zip(durations, (0, *rest), strict=True):
            loads[slot] += duration
        best = min(best, max(loads))
    return best
