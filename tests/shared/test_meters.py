"""Meters: bytes to the byte, time by a clock that can be read, limits that limit."""

import gc
import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from shared.meters import (
    count_flops,
    cuda_peak_bytes,
    data_bytes,
    interleave,
    live_bytes,
    peak_rss_bytes,
    run_limited,
)

KIB = 1024


def _bytes(count):
    return torch.empty(count, dtype=torch.uint8)


# ---- live bytes ----------------------------------------------------------------------------------


def test_the_peak_is_the_sum_of_what_lives_at_once():
    with live_bytes() as meter:
        a = _bytes(1000)
        b = _bytes(500)
        del a
        c = _bytes(600)
        del b, c
        d = _bytes(64)
    assert meter.peak_bytes() == 1500
    del d


def test_what_was_there_before_does_not_count():
    before = _bytes(5000)
    with live_bytes() as meter:
        a = _bytes(10)
        del before
        b = _bytes(100)
    assert meter.peak_bytes() == 110, "and it is not deducted when it is freed"
    del a, b


def test_the_temporary_of_an_operation_counts():
    a = torch.ones(1000)
    with live_bytes() as meter:
        b = (a * a) + a  # the product lives until the sum is made
    assert meter.peak_bytes() == 8000
    del b


def test_nothing_allocated_is_zero():
    with live_bytes() as meter:
        pass
    assert meter.peak_bytes() == 0


def test_each_phase_has_a_peak_of_its_own():
    with live_bytes() as meter:
        kept = _bytes(100)
        with meter.phase("load"):
            a = _bytes(1000)
            del a
        with meter.phase("work"):
            b = _bytes(300)
        with meter.phase("rest"):
            pass
        c = _bytes(5000)
        del c
        with meter.phase("load"):
            d = _bytes(700)
    # more than the 1100 of the first time is not, less is not either
    assert meter.peak_bytes("load") == 100 + 300 + 700
    assert meter.peak_bytes("work") == 400
    assert meter.peak_bytes("rest") == 400, "what stands at the start of a phase counts"
    assert meter.peak_bytes() == 5400
    del kept, b, d


def test_a_phase_inside_a_phase():
    with live_bytes() as meter, meter.phase("outer"):
        a = _bytes(100)
        with meter.phase("inner"):
            b = _bytes(50)
            del b
        c = _bytes(500)
        del c
    assert meter.peak_bytes("inner") == 150
    assert meter.peak_bytes("outer") == 600
    del a


def test_an_unknown_phase_is_an_error():
    with live_bytes() as meter:
        pass
    with pytest.raises(KeyError):
        meter.peak_bytes("never")


def test_the_same_work_gives_the_same_number_every_time():
    def work():
        gc.collect()
        model = torch.nn.Sequential(
            torch.nn.Linear(33, 65), torch.nn.ReLU(), torch.nn.Linear(65, 7)
        )
        with live_bytes() as meter:
            model(torch.ones(9, 33)).sum().backward()
        return meter.peak_bytes()

    work()
    assert len({work() for _ in range(3)}) == 1


def test_a_thousand_phases():
    with live_bytes() as meter:
        for index in range(1000):
            with meter.phase("p"):
                a = _bytes(index)
                del a
    assert meter.peak_bytes("p") == 999


# ---- a GPU's memory ------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """A GPU that is not there: the calls that were made of it, in order, and the bytes that NVML
    says are in use.
    """
    calls, used = [], {"now": 700}

    def says(name, value=None):
        return lambda *arguments: (calls.append((name, *arguments)), value)[1]

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, says(name))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", says("max_memory_allocated", 500))
    monkeypatch.setattr(
        torch.cuda,
        "device_memory_used",
        lambda index: (calls.append(("nvml", index)), used["now"])[1],
    )
    return calls, used


def test_the_counters_of_a_gpu(card):
    calls, used = card
    with cuda_peak_bytes("cuda") as peaks:
        used["now"] = 900
    assert peaks() == {
        "nvml": 900,
        "cuda_allocator": 500,
    }, "the last sample is taken after the work"
    names = [name for name, *_ in calls]
    assert names.index("empty_cache") < names.index("nvml"), (
        "what torch kept from before is not this work's"
    )
    assert {index for name, *rest in calls for index in rest} == {3}, (
        "an index that torch maps, whichever thread asks"
    )


def test_the_counter_of_a_gpu_sees_what_is_gone_again(card):
    calls, used = card
    with cuda_peak_bytes("cuda:1") as peaks:
        used["now"] = 2000
        before = len(calls)
        while len(calls) < before + 2:  # until the sampler has looked
            time.sleep(0.001)
        used["now"] = 600
    assert peaks()["nvml"] == 2000


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("nvidia-ml-py"), RuntimeError("no permission")]
)
def test_without_nvml_there_is_no_such_counter(card, monkeypatch, error):
    asked = []

    def refuse(index):
        asked.append(index)
        raise error

    monkeypatch.setattr(torch.cuda, "device_memory_used", refuse)
    with cuda_peak_bytes("cuda") as peaks:
        pass
    assert peaks() == {"cuda_allocator": 500}
    assert asked == [3], "once"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_counters_of_a_real_gpu():
    with cuda_peak_bytes("cuda") as peaks:
        held = torch.empty(256 * KIB * KIB, dtype=torch.uint8, device="cuda")
        del held
    assert 256 * KIB * KIB <= peaks()["cuda_allocator"] < 258 * KIB * KIB
    assert peaks().get("nvml", 256 * KIB * KIB) >= 256 * KIB * KIB


# ---- processes -----------------------------------------------------------------------------------


def test_the_process_knows_its_memory():
    gc.collect()
    gc.disable()  # or what earlier tests left may go in between
    try:
        before = data_bytes()
        # more than a heap has free after all other tests
        held = np.ones(1024 * KIB * KIB, dtype=np.uint8)
        assert data_bytes() - before >= 1023 * KIB * KIB
        assert peak_rss_bytes() >= held.nbytes
    finally:
        gc.enable()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a module which `run_limited` can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source):
        (tmp_path / "limited_example.py").write_text(source)
        return "limited_example"

    return write


TAKES = """
import sys
held = bytearray(int(sys.argv[1]))
for i in range(0, len(held), 4096): held[i] = 1
sys.stdout.write(f"took {len(held)} {sys.argv} {__name__}")
"""


def test_a_process_within_its_limit_finishes(module):
    done = run_limited(module(TAKES), [str(50 * 2**20), "--flag"], 200 * 2**20)
    assert (done.status, done.error) == (0, "")
    assert done.output.startswith(f"took {50 * 2**20} [")
    assert done.output.endswith("'--flag'] __main__")


def test_a_process_beyond_its_limit_fails(module):
    done = run_limited(module(TAKES), [str(300 * 2**20)], 200 * 2**20)
    assert done.status != 0
    assert done.output == ""
    assert done.error == "MemoryError"
    assert run_limited(module(TAKES), [str(300 * 2**20)], None).status == 0


def test_the_limit_holds_for_torch(module):
    source = (
        "import sys, torch\nx = torch.ones(int(sys.argv[1]),"
        " dtype=torch.uint8)\nsys.stdout.write(str(torch.get_num_threads()))"
    )
    done = run_limited(module(source), [str(3 * 2**30)], 2 * 2**30)
    assert done.status != 0
    assert "memory" in done.error.lower()


# ---- time ----------------------------------------------------------------------------------------


class Clock:
    """A clock that only moves when something runs."""

    def __init__(self):
        self.now, self.ran = 100.0, []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        durations = itertools.cycle(seconds)

        def run():
            self.ran.append(name)
            self.now += next(durations)

        return run


def test_variants_run_in_turns_and_warm_up_is_not_recorded():
    clock = Clock()
    timings = interleave(
        {"a": clock.work("a", [9, 1, 2, 3]), "b": clock.work("b", [8, 4, 5, 6])},
        repeats=3,
        clock=clock,
    )
    assert "".join(clock.ran) == "ab" * 4
    assert timings["a"].seconds == (1, 2, 3)
    assert timings["b"].seconds == (4, 5, 6)
    assert (timings["a"].median, timings["b"].median) == (2, 5)


@pytest.mark.parametrize("initialised", [False, True])
def test_a_gpu_is_waited_for_where_one_is_in_use(monkeypatch, initialised):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    interleave({"a": lambda: None}, repeats=2, warmup=0)
    assert len(waited) == (4 if initialised else 0)


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_number_of_warm_ups_can_be_chosen(warmup):
    clock, shown = Clock(), []

    def progress(total):
        shown.append(total)
        return iter(range(total))

    timings = interleave(
        {"a": clock.work("a", [1])}, repeats=2, warmup=warmup, clock=clock, progress=progress
    )
    assert len(clock.ran) == warmup + 2
    assert shown == [warmup + 2]
    assert timings["a"].seconds == (1, 1)


# ---- FLOPs ---------------------------------------------------------------------------------------


def test_a_matrix_product_takes_two_operations_for_each_multiply_add():
    assert count_flops(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7


def test_a_convolution_counts_and_the_rest_does_not():
    image, kernel = torch.ones(1, 2, 8, 8), torch.ones(4, 2, 3, 3)
    assert (
        count_flops(lambda: torch.relu(torch.nn.functional.conv2d(image, kernel)) + 1)
        == 2 * 4 * 2 * 9 * 6 * 6
    )


def test_a_backward_pass_takes_twice_the_forward():
    weight = torch.ones(5, 7, requires_grad=True)
    x = torch.ones(3, 5, requires_grad=True)
    assert count_flops(lambda: (x @ weight).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_meters_print_nothing():
    code = (
        "import shared.meters as m, torch\nwith m.live_bytes() as meter: torch.ones(2, 2) @"
        " torch.ones(2, 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
