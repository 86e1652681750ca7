"""Plans against brute force, refills, and the theorems about steps, on random instances."""

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from projects.infinite_sampling.scheduler import (
    REFILLS,
    Queue,
    lower_bound,
    lpt,
    makespan,
    multifit,
    plan,
    replay,
    replay_framework,
)


def optimum(durations: list[int], slots: int) -> int:
    """By all assignments."""
    best = sum(durations)
    for assignment in itertools.product(range(slots), repeat=len(durations)):
        loads = [0] * slots
        for job, slot in enumerate(assignment):
            loads[slot] += durations[job]
        best = min(best, max(loads))
    return best


def instances(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        n, slots = int(rng.integers(1, 8)), int(rng.integers(1, 4))
        yield [int(d) for d in rng.integers(0, int(rng.choice([3, 12, 200])), n)], slots


def solved(durations: list[int], slots: int) -> int:
    """The optimum of larger instances, as a mixed-integer programme that HiGHS solves: job j is on
    slot s where x_js is 1.
    """
    n = len(durations)
    once = LinearConstraint(np.hstack([np.kron(np.eye(n), np.ones(slots)), np.zeros((n, 1))]), 1, 1)
    loads = LinearConstraint(
        np.hstack([np.kron(np.array(durations), np.eye(slots)), -np.ones((slots, 1))]), -np.inf, 0
    )
    cost = np.append(np.zeros(n * slots), 1.0)
    whole = Bounds(np.zeros(n * slots + 1), np.append(np.ones(n * slots), np.inf))
    found = milp(
        cost,
        constraints=[once, loads],
        integrality=np.ones(n * slots + 1),
        bounds=whole,
        options={"mip_rel_gap": 0.0},
    )
    assert found.status == 0
    return round(found.fun)


def larger(count: int, seed: int):
    """Durations as of rollouts: log-normal, or of two or three lengths; 12 to 20 jobs on 3 to 5
    slots.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        n, slots = int(rng.integers(12, 21)), int(rng.integers(3, 6))
        if rng.random() < 0.5:
            yield [int(d) for d in np.clip(rng.lognormal(3.5, 0.8, n), 1, 200)], slots
        else:
            yield [int(d) for d in rng.choice([9, 22, 35], n) + rng.integers(0, 3, n)], slots


GRAHAM = {p: [d for k in range(p, 2 * p) for d in (k, k)][2:][::-1] + [p] * 3 for p in range(2, 6)}


@pytest.mark.parametrize("eps", [0.5, 0.1, 0.01])
def test_a_plan_is_within_eps_of_the_optimum_and_its_certificate_is_true(eps):
    statuses = set()
    for durations, slots in instances(150):
        best = optimum(durations, slots)
        found = plan(durations, slots, eps)
        assert sorted(job for queue in found.queues for job in queue) == list(range(len(durations)))
        assert found.value == makespan(durations, found.queues)
        assert found.lower_bound <= best <= found.value
        assert found.value <= (1 + eps) * best + 1e-9
        assert found.value <= found.certificate * best + 1e-9
        statuses.add(found.status)
    assert "lpt_certified" in statuses
    assert eps == 0.5 or "dp" in statuses or "simple_within" in statuses


@pytest.fixture(scope="module")
def larger_with_optima():
    return [(durations, slots, solved(durations, slots)) for durations, slots in larger(30, seed=7)]


@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_a_plan_is_within_eps_of_the_optimum_of_instances_that_brute_force_cannot_do(
    eps, larger_with_optima
):
    beyond_simple = 0
    for durations, slots, best in larger_with_optima:
        found = plan(durations, slots, eps, max_states=50_000)
        assert found.lower_bound <= best <= found.value
        assert found.value <= found.certificate * best + 1e-9
        if found.status != "capped":
            assert found.value <= (1 + eps) * best + 1e-9
        beyond_simple += found.status in ("dp", "simple_within")
    assert eps == 0.1 or beyond_simple > 2


@pytest.mark.parametrize("slots", GRAHAM)
def test_the_programme_solves_what_has_known_optima(slots):
    assert solved(GRAHAM[slots], slots) == 3 * slots
    for durations, few in instances(10, seed=8):
        assert solved(durations, few) == optimum(durations, few)


@pytest.mark.parametrize("slots", GRAHAM)
def test_grahams_instances_on_which_longest_first_is_worst(slots):
    durations = GRAHAM[slots]
    assert makespan(durations, lpt(durations, slots)) == 4 * slots - 1
    found = plan(durations, slots, eps=0.05, max_states=100_000)
    assert found.value == 3 * slots
    assert found.status in ("multifit_certified", "dp")
    assert found.certificate == 1.0


def test_too_many_states_are_said_and_the_fallback_is_no_worse_than_longest_first():
    statuses = set()
    for durations, slots in instances(300, seed=6):
        found = plan(durations, slots, eps=0.001, max_states=3)
        statuses.add(found.status)
        if found.status == "capped":
            assert found.states > 3
            assert found.value == min(
                makespan(durations, rule(durations, slots)) for rule in (lpt, multifit)
            )
            assert found.certificate == found.value / found.lower_bound > 1.001
    assert "capped" in statuses


def test_the_value_does_not_depend_on_the_order_of_jobs():
    rng = np.random.default_rng(1)
    for durations, slots in instances(40, seed=2):
        shuffled = [durations[i] for i in rng.permutation(len(durations))]
        assert plan(durations, slots, 0.05).value == plan(shuffled, slots, 0.05).value


def test_multifit_within_13_elevenths():
    for durations, slots in instances(100, seed=3):
        assert (
            makespan(durations, multifit(durations, slots))
            <= 13 / 11 * optimum(durations, slots) + 1e-9
        )


@pytest.mark.parametrize("durations", [[], [0], [0, 0, 0], [5], [4, 4, 4, 4, 4], [7, 0, 0, 7]])
@pytest.mark.parametrize("slots", [1, 2, 6])
def test_edges(durations, slots):
    found = plan(durations, slots)
    assert len(found.queues) == slots
    assert found.value == optimum(durations, slots)


@pytest.mark.parametrize(
    ("eps", "slots", "durations"), [(0.0, 2, [1]), (0.1, 0, [1]), (0.1, 2, [-1])]
)
def test_what_is_no_instance_is_refused(eps, slots, durations):
    with pytest.raises(ValueError, match="must"):
        plan(durations, slots, eps)


def test_the_theorems_hold_on_random_instances():
    rng = np.random.default_rng(4)
    for _ in range(1500):
        n, slots = int(rng.integers(1, 40)), int(rng.integers(1, 9))
        durations = [int(d) for d in rng.integers(0, 50, n)]
        known = durations
        micro = replay(durations, slots, Queue(known, slots), barrier=True).steps
        fifo = replay(durations, slots, Queue(known, slots)).steps
        shortest = replay(durations, slots, Queue(known, slots, "sjf_global")).steps
        chunks = sum(sorted(durations, reverse=True)[::slots])
        assert fifo <= micro
        assert shortest == chunks  # shortest first is exactly sorting the micro groups
        for refill in REFILLS:
            if refill != "plan_static":
                steps = replay(durations, slots, Queue(known, slots, refill)).steps
                assert (
                    lower_bound(durations, slots)
                    <= steps
                    <= sum(durations) / slots + (1 - 1 / slots) * max(durations) + 1e-9
                )


def by_ticks(durations, slots, queue, barrier):
    """Step by step, without events."""
    left, slot_of, steps = dict(enumerate(durations)), {}, 0
    while True:
        if not (barrier and slot_of):
            for slot in range(slots):
                while slot not in slot_of and (job := queue.take(slot)) is not None:
                    if left[job]:
                        slot_of[slot] = job
                    if barrier:
                        break
        if not slot_of:
            if not queue.waiting or not barrier:
                return steps
            continue
        steps += 1
        for slot, job in list(slot_of.items()):
            left[job] -= 1
            if not left[job]:
                del slot_of[slot]


@pytest.mark.parametrize("refill", REFILLS)
def test_the_replay_by_events_is_the_replay_by_ticks(refill):
    rng = np.random.default_rng(5)
    for _ in range(80):
        n, slots = int(rng.integers(1, 20)), int(rng.integers(1, 6))
        durations = [int(d) for d in rng.integers(0, 12, n)]
        guessed = [d * float(rng.uniform(0.5, 2)) for d in durations]
        for barrier in (
            (False, True) if refill in ("fifo", "sjf_global", "lpt_global") else (False,)
        ):
            events = replay(durations, slots, Queue(guessed, slots, refill), barrier)
            assert events.steps == by_ticks(
                durations, slots, Queue(guessed, slots, refill), barrier
            )
            assert events.busy == sum(durations)
            assert sorted(job for _, job, _, _ in events.spans) == [
                job for job, d in enumerate(durations) if d
            ]
            for slot in range(slots):  # a slot has one job at a time
                spans = sorted((begin, end) for s, _, begin, end in events.spans if s == slot)
                assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


def test_refills_take_what_they_say():
    lengths = [5, 1, 9, 3, 7, 2]
    assert [Queue(lengths, 2, "fifo").take(1) for _ in range(1)] == [0]
    order = Queue(lengths, 2, "sjf_global")
    assert [order.take(0) for _ in range(7)] == [1, 5, 3, 0, 4, 2, None]
    order = Queue(lengths, 2, "lpt_global")
    assert [order.take(1) for _ in range(6)] == [2, 4, 0, 3, 5, 1]
    # longest first: slot 0 has 9, 3, 2 (jobs 2, 3, 5), slot 1 has 7, 5, 1 (jobs 4, 0, 1)
    assert plan(lengths, 2).value == 14
    for refill, mine, stolen in (("plan_sjf", [5, 3, 2], 1), ("plan_lpt", [2, 3, 5], 4)):
        order = Queue(lengths, 2, refill)
        assert order.plan.queues in (((2, 3, 5), (4, 0, 1)), ((4, 0, 1), (2, 3, 5)))
        slot = order.plan.queues.index((2, 3, 5))
        assert [order.take(slot) for _ in range(3)] == mine
        assert order.take(slot) == stolen
    order = Queue(lengths, 2, "plan_static")
    slot = order.plan.queues.index((2, 3, 5))
    assert [order.take(slot) for _ in range(4)] == [2, 3, 5, None]
    assert order.waiting == 3
    with pytest.raises(ValueError, match="refill"):
        Queue(lengths, 2, "random")


def test_a_freed_slot_steals_from_the_queue_with_the_largest_load_that_waits():
    lengths = [6, 5, 4, 4, 1, 1]
    order = Queue(lengths, 3, "plan_sjf")
    queues = order.plan.queues
    for _ in queues[0]:
        order.take(0)
    loads = {slot: sum(lengths[j] for j in queues[slot]) for slot in (1, 2)}
    largest = max(loads, key=lambda slot: (loads[slot], -slot))
    assert order.take(0) == min(queues[largest], key=lambda j: (lengths[j], j))


def test_the_framework_has_the_steps_of_its_phases():
    lengths = [1, 2, 5, 9, 4, 12, 3]
    asked = []

    def predict(jobs):
        asked.extend(jobs)
        return [lengths[j] - 3 for j in jobs]

    found, made = replay_framework(lengths, 2, prefix=3, predict=predict, refill="plan_lpt")
    assert asked == [2, 3, 4, 5]  # those longer than the prefix
    assert made.lower_bound == max(9, -(-(2 + 6 + 1 + 9) // 2))
    head = 1 + 2 + 2 + 2  # rounds (1, 2), (5, 9), (4, 12), (3): the longest of min(length, 3) - 1
    assert found.steps == head + 9
    assert found.busy == sum(length - 1 for length in lengths)
    unprefixed, made = replay_framework(
        lengths, 2, prefix=0, predict=lambda jobs: [lengths[j] for j in jobs], refill="plan_lpt"
    )
    assert made == plan([n - 1 for n in lengths], 2)  # in steps, not in tokens
    unprefixed, _ = replay_framework(
        lengths, 2, prefix=0, predict=lambda jobs: [lengths[j] for j in jobs], refill="lpt_global"
    )
    assert (
        unprefixed.steps
        == replay([n - 1 for n in lengths], 2, Queue(lengths, 2, "lpt_global")).steps
    )
