"""Meters: bytes, time and FLOPs. A row that holds a measurement names the counter that made it.

| counter | what it counts | exact |
| --- | --- | --- |
| `allocator` | bytes of torch's CPU allocator (`live_bytes`) | yes, the same in every run |
| `cuda_allocator` | bytes handed out by torch's CUDA allocator | yes |
| `nvml` | the GPU's memory in use as its driver sees it | to the driver's page |
| `rss` | resident pages of a process at their highest (`peak_rss_bytes`, in a subprocess) | no |
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from shared.processes import die_with_parent
from shared.statistics import Timing


class LiveBytes:
    """What `live_bytes` counted: the running total of allocated bytes, with the phases that were
    marked.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._events: np.ndarray = np.empty((0, 2), dtype=np.int64)  # time in ns, change in bytes
        self._spans: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark a phase; it may be entered several times."""
        if name not in self._names:
            self._names.append(name)
        with record_function(_PHASE + name):
            yield

    def peak_bytes(self, phase: str | None = None) -> int:
        """The most bytes alive at any moment (of the phase), counted from zero at the start of the
        meter.
        """
        times, totals = self._events[:, 0], np.cumsum(self._events[:, 1])
        if phase is None:
            return int(max(0, totals.max(initial=0)))
        highest = 0
        for start, end in self._spans[phase]:
            first, last = np.searchsorted(times, [start, end])
            standing = int(totals[first - 1]) if first > 0 else 0
            highest = max(highest, standing, int(totals[first:last].max(initial=0)))
        return highest

    def _read(self, recorded: Any) -> None:
        changes: list[tuple[int, int]] = []
        for event in recorded.profiler.kineto_results.events():
            name = event.name()
            if name == "[memory]":
                changes.append((event.start_ns(), event.nbytes()))
            elif name.startswith(_PHASE):
                self._spans.setdefault(name[len(_PHASE) :], []).append(
                    (event.start_ns(), event.end_ns())
                )
        self._events = np.array(changes, dtype=np.int64).reshape(-1, 2)
        self._events = self._events[np.argsort(self._events[:, 0], kind="stable")]


_PHASE = "live_bytes:"
# or the profiler reports its start and stop on stderr, in the midst of progress bars
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@contextmanager
def live_bytes() -> Iterator[LiveBytes]:
    """Count the bytes that torch's CPU allocator hands out inside, allocation by allocation.

    Deterministic, and blind to everything that does not come from the allocator: memory maps, the
    libraries' own buffers, other threads' allocations (autograd's threads are seen). Read the
    result after the block has ended.
    """
    meter = LiveBytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield meter
    meter._read(recorded)


@contextmanager
def cuda_peak_bytes(device: torch.device | str = "cuda") -> Iterator[Callable[[], dict[str, int]]]:
    """Peaks on a GPU by two counters, as a function to call after the block: {"cuda_allocator":
    bytes, "nvml": bytes}.

    `nvml` is sampled every 5 ms by a thread, and once more after the work. It holds what other
    processes use, and not what torch had kept from before. It is absent where NVML cannot be asked
    (no nvidia-ml-py, no right to).
    """
    import threading

    index = torch.device(device).index
    if index is None:
        index = torch.cuda.current_device()  # of this thread: the sampler's is another
    torch.cuda.synchronize(index)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(index)
    peaks: dict[str, int] = {}
    stop = threading.Event()

    def sample() -> None:
        # torch knows which of NVML's devices this is when CUDA_VISIBLE_DEVICES hides some.
        peaks["nvml"] = max(peaks.get("nvml", 0), int(torch.cuda.device_memory_used(index)))

    def keep_sampling() -> None:
        while not stop.wait(0.005):
            sample()

    sampler = threading.Thread(target=keep_sampling, daemon=True)
    try:
        sample()
        sampler.start()
    except Exception:
        # a missing module, or one of NVML's own errors, which is then not there to be named
        pass
    try:
        yield lambda: peaks
    finally:
        torch.cuda.synchronize(index)
        peaks["cuda_allocator"] = int(torch.cuda.max_memory_allocated(index))
        if "nvml" in peaks:
            stop.set()
            sampler.join()
            sample()


def peak_rss_bytes() -> int:
    """The most resident memory this process has had (VmHWM of Linux)."""
    return _status_bytes("VmHWM")


def data_bytes() -> int:
    """The private writable memory of this process, which RLIMIT_DATA limits (VmData of Linux)."""
    return _status_bytes("VmData")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


@dataclass(frozen=True)
class Limited:
    """How a subprocess under a memory limit ended: its exit status, what it printed, and the last
    line of its errors.
    """

    status: int
    output: str
    error: str


def run_limited(
    module: str,
    arguments: Sequence[str],
    data_limit_bytes: int | None,
    timeout_seconds: float = 600,
) -> Limited:
    """Run `python -m module arguments` with its private writable memory limited (RLIMIT_DATA): an
    allocation beyond the limit fails.

    The limit is set inside the new process before torch is imported. One thread.
    """
    limit = (
        ""
        if data_limit_bytes is None
        else f"resource.setrlimit(resource.RLIMIT_DATA, ({data_limit_bytes},) * 2); "
    )
    code = (
        f"import resource, runpy, sys; {limit}del sys.argv[0]; runpy.run_module(sys.argv[0],"
        " run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, module, *arguments]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # Otherwise freed tensors may stay in glibc's heap, and what a process takes varies by more than
    # 100 MB from run to run.
    environment = {
        **os.environ,
        **threads,
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        env=environment,
        preexec_fn=die_with_parent,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    return Limited(done.returncode, done.stdout, errors[-1] if errors else "")


def interleave(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], Iterator[int]] = lambda total: iter(range(total)),
) -> dict[str, Timing]:
    """Time variants in turns (A B C A B C ...), so that a busy moment of the machine falls on all
    of them.

    The first `warmup` rounds are not recorded. CUDA work is waited for.
    """
    recorded: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in progress(warmup + repeats):
        for name, run in variants.items():
            _synchronise()
            start = clock()
            run()
            _synchronise()
            if round_number >= warmup:
                recorded[name].append(clock() - start)
    return {name: Timing(tuple(seconds)) for name, seconds in recorded.items()}


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in `run()` (a multiply-add
    is two).
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _synchronise() -> None:
    # where nothing has run on a GPU, asking one to wait would make a context on it
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
