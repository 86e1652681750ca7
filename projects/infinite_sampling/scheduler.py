"""Which completion decodes when: plans from predicted lengths, the refill of slots, and a replay of
any schedule from lengths alone.

The slots of a rollout are identical machines and completions are jobs, so that the decoding steps
of a rollout are the makespan of a schedule (P||C_max). The paper plans globally with an FPTAS and
refills slots shortest first; the objective, its epsilon and the trimming are reconstructed here, as
README.md says. An FPTAS exists for a fixed number of slots only (Pm||C_max; Horowitz and Sahni
1976): the problem is strongly NP-hard when the number of slots is part of the input.

A job's *duration* is its length in tokens less one: the first token is drawn from the prompt's
logits and takes no step.
"""

import copy
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import numpy as np

Refill = Literal["fifo", "sjf_global", "lpt_global", "plan_static", "plan_sjf", "plan_lpt"]
REFILLS: tuple[str, ...] = get_args(Refill)
Status = Literal["lpt_certified", "multifit_certified", "dp", "simple_within", "capped"]
MAX_STATES = 5_000


# ---- plans ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """An assignment of jobs to slots.

    Attributes:
        queues: for each slot its jobs, longest first.
        value: the largest load of a slot.
        lower_bound: no assignment has a smaller largest load.
        status: `lpt_certified`, `multifit_certified` longest-first or MULTIFIT is within (1 + eps)
            of the lower bound; `dp` the dynamic programme found it; `simple_within` the dynamic
            programme found nothing better than those two, the better of which therefore is within
            (1 + eps) of the best; `capped` too many states: the better of the two, with no promise
            but `value / lower_bound`.
        states: how many states the dynamic programme made.
    """

    queues: tuple[tuple[int, ...], ...]
    value: int
    lower_bound: int
    status: Status
    eps: float
    states: int = 0

    @property
    def certificate(self) -> float:
        """The proven bound on value / optimum."""
        posterior = self.value / self.lower_bound if self.lower_bound else 1.0
        return (
            posterior
            if self.status not in ("dp", "simple_within")
            else min(1 + self.eps, posterior)
        )


def lower_bound(durations: Sequence[int], slots: int) -> int:
    """No schedule on `slots` slots is shorter: the longest job, the mean load, and the two jobs
    that must share a slot.
    """
    if not len(durations):
        return 0
    ordered = sorted((int(d) for d in durations), reverse=True)
    shared = ordered[slots - 1] + ordered[slots] if len(ordered) > slots else 0
    return max(ordered[0], -(-sum(ordered) // slots), shared)


def lpt(durations: Sequence[int], slots: int) -> tuple[tuple[int, ...], ...]:
    """Longest first to the least loaded slot; ties by index. At most 4/3 - 1/(3 slots) of the best
    (Graham 1969).
    """
    loads = [(0, slot) for slot in range(slots)]
    queues: list[list[int]] = [[] for _ in range(slots)]
    for job in _descending(durations):
        load, slot = heapq.heappop(loads)
        queues[slot].append(job)
        heapq.heappush(loads, (load + int(durations[job]), slot))
    return tuple(map(tuple, queues))


def multifit(durations: Sequence[int], slots: int) -> tuple[tuple[int, ...], ...]:
    """The least capacity into which first-fit decreasing packs all jobs, by bisection (Coffman,
    Garey, Johnson 1978).
    """
    order = _descending(durations)

    def packed(capacity: int) -> list[list[int]] | None:
        room = [capacity] * slots
        queues: list[list[int]] = [[] for _ in range(slots)]
        for job in order:
            slot = next((s for s in range(slots) if room[s] >= durations[job]), None)
            if slot is None:
                return None
            room[slot] -= int(durations[job])
            queues[slot].append(job)
        return queues

    best = lpt(durations, slots)
    low, high = lower_bound(durations, slots), makespan(durations, best)
    while low < high:
        middle = (low + high) // 2
        found = packed(middle)
        if found is None:
            low = middle + 1
        else:
            best, high = tuple(map(tuple, found)), middle
    return best


def makespan(durations: Sequence[int], queues: Sequence[Sequence[int]]) -> int:
    """The largest load of a slot."""
    return max((sum(int(durations[job]) for job in queue) for queue in queues), default=0)


def plan(
    durations: Sequence[int], slots: int, eps: float = 0.1, max_states: int = MAX_STATES
) -> Plan:
    """An assignment whose largest load is at most (1 + eps) of the best one's, unless its status
    says `capped`.

    The better of longest-first and MULTIFIT is certified against the lower bound where it can be.
    Otherwise a dynamic programme over vectors of loads, job by job, longest first: loads are kept
    sorted (slots are identical), vectors with equal loads after rounding to multiples of eps LB / n
    are merged, so that each job adds an error of at most eps LB / n to a load.

    Args:
        durations: whole numbers, at least 0.
        eps: above 0.
        max_states: states in all before it gives up, and says so.
    """
    if slots < 1:
        raise ValueError(f"{slots} slots; there must be at least 1")
    if eps <= 0:
        raise ValueError(f"eps is {eps}; it must be above 0")
    if any(d < 0 for d in durations):
        raise ValueError("durations must not be negative")
    bound = lower_bound(durations, slots)
    first = lpt(durations, slots)
    upper, status = makespan(durations, first), "lpt_certified"
    if upper > bound:  # MULTIFIT is cheap, and often better even where longest-first would do
        second = multifit(durations, slots)
        if makespan(durations, second) < upper:
            first, upper, status = second, makespan(durations, second), "multifit_certified"
    if upper <= (1 + eps) * bound:
        return Plan(first, upper, bound, cast(Status, status), eps)
    step = eps * bound / len(durations)
    order = _descending(durations)
    # rounded loads -> loads
    layer: dict[tuple[int, ...], tuple[int, ...]] = {(0,) * slots: (0,) * slots}
    parents: list[dict[tuple[int, ...], tuple[tuple[int, ...], int]]] = []
    states = 0
    for job in order:
        made: dict[tuple[int, ...], tuple[int, ...]] = {}
        came: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
        for key, loads in layer.items():
            for place, load in enumerate(loads):
                grown = load + int(durations[job])
                if grown >= upper:
                    break  # loads ascend: the rest is no better
                if place and load == loads[place - 1]:
                    continue
                new = tuple(sorted((*loads[:place], grown, *loads[place + 1 :])))
                rounded = tuple(int(value // step) for value in new)
                if rounded not in made:
                    made[rounded], came[rounded] = new, (key, place)
        states += len(made)
        if states > max_states:
            return Plan(first, upper, bound, "capped", eps, states)
        if not made:
            return Plan(first, upper, bound, "simple_within", eps, states)
        layer = made
        parents.append(came)
    key = min(layer, key=lambda one: layer[one][-1])
    value = layer[key][-1]
    places = []
    for came in reversed(parents):
        key, place = came[key]
        places.append(place)
    queues: list[list[int]] = [[] for _ in range(slots)]
    for job, place in zip(order, reversed(places), strict=True):
        queues[place].append(job)
        # as the loads of a state are
        queues.sort(key=lambda queue: sum(int(durations[j]) for j in queue))
    assert makespan(durations, queues) == value
    return Plan(tuple(map(tuple, queues)), value, bound, "dp", eps, states)


def _descending(durations: Sequence[int]) -> list[int]:
    return sorted(range(len(durations)), key=lambda job: (-durations[job], job))


# ---- refill --------------------------------------------------------------------------------------


class Queue:
    """The jobs that wait, and which of them a freed slot takes.

    | refill | a freed slot takes |
    | --- | --- |
    | `fifo` | the next in order |
    | `sjf_global`, `lpt_global` | the shortest, the longest of all that wait |
    | `plan_static` | the next of its own planned queue; nothing when that is empty |
    | `plan_sjf` | the shortest of its own queue, then of the longest waiting one (the paper's) |
    | `plan_lpt` | the longest of its own queue, then of the longest waiting one |

    The longest waiting queue is the one whose waiting jobs have the largest load.
    Ties go to the lower index. Lengths are predictions; a wrong one costs steps and changes no
    completion.
    """

    def __init__(
        self,
        predicted: Sequence[float],
        slots: int,
        refill: Refill = "fifo",
        eps: float = 0.1,
        max_states: int = MAX_STATES,
    ) -> None:
        if refill not in REFILLS:
            raise ValueError(f"'{refill}' is no refill; there are: {', '.join(REFILLS)}")
        self.predicted = [max(0, round(float(value))) for value in predicted]
        self.refill = refill
        self.plan: Plan | None = None
        if refill.startswith("plan_"):
            self.plan = plan(self.predicted, slots, eps, max_states)
            self._queues = [list(queue) for queue in self.plan.queues]
        else:
            sign = {"fifo": 0, "sjf_global": 1, "lpt_global": -1}[refill]
            order = sorted(
                range(len(self.predicted)), key=lambda job: (sign * self.predicted[job], job)
            )
            self._queues = [order]
        self.waiting = len(self.predicted)

    def ahead(self, count: int) -> list[int]:
        """The jobs that `count` free slots would take now; none is taken."""
        twin = copy.copy(self)
        twin._queues = [list(queue) for queue in self._queues]
        return [job for slot in range(count) if (job := twin.take(slot)) is not None]

    def take(self, slot: int) -> int | None:
        """The job for a slot that is free, or None."""
        queues = self._queues
        own = queues[slot if self.plan is not None and slot < len(queues) else 0] if queues else []
        if self.plan is None or self.refill == "plan_static":
            job = own.pop(0) if own else None
        else:
            if not own:
                own = max(
                    queues, key=lambda queue: sum(self.predicted[j] for j in queue) if queue else -1
                )
            sign = 1 if self.refill == "plan_sjf" else -1
            job = min(own, key=lambda j: (sign * self.predicted[j], j), default=None)
            if job is not None:
                own.remove(job)
        self.waiting -= job is not None
        return job


# ---- replay --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """What a schedule does, from lengths alone.

    Attributes:
        steps: decoding steps until the last job ends.
        busy: row-steps in which a slot had a job.
        spans: (slot, job, first step, step after its last), one for each job with a duration; for
            the Gantt chart.
    """

    steps: int
    busy: int
    slots: int
    spans: tuple[tuple[int, int, int, int], ...] = field(default=())

    @property
    def occupancy(self) -> float:
        """The share of row-steps that had a job."""
        return self.busy / (self.steps * self.slots) if self.steps else 1.0


def replay(durations: Sequence[int], slots: int, queue: Queue, barrier: bool = False) -> Replay:
    """Play a schedule by events. With `barrier`, slots are refilled only when all are free:
    sequential micro groups.

    Legitimate because completions do not depend on the schedule (`streams`): only their lengths
    matter here.
    """
    spans: list[tuple[int, int, int, int]] = []
    clock = 0
    if barrier:
        while queue.waiting:
            end = clock
            for slot in range(slots):
                job = queue.take(slot)
                if job is not None:
                    spans.append((slot, job, clock, clock + int(durations[job])))
                    end = max(end, spans[-1][3])
            clock = end
    else:
        free = [(0, slot) for slot in range(slots)]
        while free:
            now, slot = heapq.heappop(free)
            job = queue.take(slot)
            if job is not None:
                spans.append((slot, job, now, now + int(durations[job])))
                clock = max(clock, spans[-1][3])
                heapq.heappush(free, (spans[-1][3], slot))
    return Replay(
        clock,
        int(np.sum([durations[job] for _, job, _, _ in spans])),
        slots,
        tuple(s for s in spans if s[3] > s[2]),
    )


def replay_framework(
    lengths: Sequence[int],
    slots: int,
    prefix: int,
    predict: Callable[[list[int]], Sequence[float]],
    refill: Refill = "plan_sjf",
    eps: float = 0.1,
) -> tuple[Replay, Plan | None]:
    """The full framework: `prefix` tokens of every job in rounds, a prediction of the rest, a plan,
    continuous decoding.

    Args:
        lengths: in tokens, the end token counted.
        prefix: tokens generated before the plan; 0 plans before anything is generated.
        predict: from the indices of the unfinished jobs to what remains of each, in tokens.
    """
    start = Replay(0, 0, slots)
    done = 0 if not prefix else 1  # tokens that took no step
    if prefix:
        heads = [min(length, prefix) - 1 for length in lengths]
        start = replay(heads, slots, Queue(heads, slots), barrier=True)
    left = [job for job, length in enumerate(lengths) if length > prefix]
    queue = Queue([value - (1 - done) for value in predict(left)], slots, refill, eps)  # in steps
    rest = replay([lengths[job] - prefix - (1 - done) for job in left], slots, queue)
    shifted = [
        (slot, left[job], begin + start.steps, end + start.steps)
        for slot, job, begin, end in rest.spans
    ]
    return (
        Replay(start.steps + rest.steps, start.busy + rest.busy, slots, (*start.spans, *shifted)),
        queue.plan,
    )
