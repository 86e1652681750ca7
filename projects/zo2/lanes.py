"""Moving blocks between the host tier and the device while the device computes (paper: the
scheduler and the reusable memory).

Three lanes: upload, compute (the calling thread) and offload. Blocks live on the device in a fixed
number of slots that are allocated once; a block's parameters are views into the slot it visits.
With three slots one block computes while the next uploads and the last one drains; with one,
everything takes turns. What waits for what:

- the upload of a block waits until its slot has drained and until the block's own last write has
  reached the store;
- compute waits for the upload; the offload waits for the compute.

On a GPU each lane has a CUDA stream, and a lane's task ends when its stream has finished, so that
the rules above hold there as they stand.
"""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from projects.zo2.storage import DiskStore, RamStore


@dataclass
class Span:
    """A piece of work on a lane: `start` and `end` in seconds of `time.perf_counter`."""

    lane: str
    block: int
    start: float
    end: float


@dataclass
class Traffic:
    """What has moved since the pager was made. `waited` is how long the compute lane stood still
    for an upload, in seconds.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    uploads: Counter[int] = field(default_factory=Counter)  # per block
    offloads: Counter[int] = field(default_factory=Counter)
    waited: float = 0.0


class Lane:
    """Runs tasks one after the other: in a thread of its own, or at once in the caller's when
    `overlap` is off.
    """

    def __init__(self, name: str, device: torch.device, overlap: bool):
        self.name = name
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"zo2-{name}") if overlap else None

    @property
    def overlaps(self) -> bool:
        return self._thread is not None

    def submit(self, task: Callable[[], None]) -> Future[None]:
        if self._thread is not None:
            return self._thread.submit(self._run, task)
        done: Future[None] = Future()
        try:
            self._run(task)
        except BaseException as error:
            # as in a thread: it is raised to whoever needs what the task was to do
            done.set_exception(error)
        else:
            done.set_result(None)
        return done

    def _run(self, task: Callable[[], None]) -> None:
        if self._stream is None:
            task()
            return
        with torch.cuda.stream(self._stream):
            task()
        self._stream.synchronize()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)


class _Slot:
    """A block-sized buffer on the device. `block` is its tenant, `ready` its upload, `drained` its
    last offload.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.block: int | None = None
        self.in_use = False
        self.ready: Future[None] | None = None
        self.drained: Future[None] | None = None


class Pager:
    """Keeps the blocks of `store` moving through `slots` device buffers of `nbytes` each.

    `reuse` keeps the buffers for good; without it each upload allocates one and each offload frees
    it, as the published code does.
    """

    def __init__(
        self,
        store: RamStore | DiskStore,
        blocks: int,
        nbytes: int,
        device: torch.device,
        slots: int,
        overlap: bool,
        reuse: bool,
        trace: bool,
    ):
        self.store, self.blocks, self.nbytes, self.device, self.reuse = (
            store,
            blocks,
            nbytes,
            device,
            reuse,
        )
        self.traffic = Traffic()
        self.spans: list[Span] | None = [] if trace else None
        self.pointers: set[int] = set()  # of every buffer that has held a block
        self._upload, self._offload = (
            Lane("upload", device, overlap),
            Lane("offload", device, overlap),
        )
        self._slots = [_Slot() for _ in range(slots)]
        self._written: dict[int, Future[None]] = {}
        self._ahead = max(1, slots - 2) if overlap else 0
        if reuse:
            for slot in self._slots:
                slot.buffer = self._allocate()
        self._exchange: Lane | None = None
        self._complete: Callable[[int, Tensor], None] | None = None

    def exchange_through(self, complete: Callable[[int, Tensor], None], nbytes: int) -> None:
        """From now on an upload brings a part of a block, and `complete(block, buffer)`, on a
        fourth lane, the rest of it.

        `nbytes` is what that needs of a buffer. Call it while no block is in use.
        """
        self.drop()
        self.traffic, self.nbytes, self._complete = Traffic(), nbytes, complete
        self._exchange = Lane("exchange", self.device, self._upload.overlaps)
        for slot in self._slots if self.reuse else ():
            slot.buffer = None
            slot.buffer = self._allocate()

    def acquire(self, block: int) -> Tensor:
        """The buffer that holds `block`, once it is there. The next blocks start uploading."""
        slot = self._slot_of(block) or self._start_upload(block)
        assert slot is not None, "a block was not released before the next was acquired"
        assert slot.ready is not None
        began = time.perf_counter()
        slot.ready.result()
        self.traffic.waited += time.perf_counter() - began
        slot.in_use = True
        self._prefetch(block)
        assert slot.buffer is not None
        return slot.buffer

    def release(self, block: int, write: bool, generator: torch.Generator | None = None) -> None:
        """Give the buffer of `block` up; `write` sends its content to the store first."""
        slot = self._slot_of(block)
        assert slot is not None
        assert slot.in_use
        slot.in_use, slot.block = False, None
        computed = (
            torch.cuda.current_stream(self.device).record_event()
            if self.device.type == "cuda"
            else None
        )

        def offload() -> None:
            if computed is not None:
                computed.synchronize()
            assert slot.buffer is not None
            with self._span("offload", block):
                self.traffic.bytes_down += self.store.write(block, slot.buffer, generator)
            self.traffic.offloads[block] += 1
            if not self.reuse:
                # the memory must not be given out again while it is still being read
                if computed is not None:
                    torch.cuda.current_stream(self.device).synchronize()
                slot.buffer = None

        if write:
            slot.drained = self._written[block] = self._offload.submit(offload)
        else:
            slot.drained = (
                self._offload.submit(computed.synchronize) if computed is not None else None
            )
        self._prefetch(block)

    def settle(self) -> None:
        """Wait until the lanes have come to rest: what was to be written has been."""
        for slot in self._slots:
            for future in (slot.ready, slot.drained):
                if future is not None:
                    future.result()

    def drop(self) -> None:
        """Settle, and forget the blocks that were brought to the device ahead of time."""
        self.settle()
        for slot in self._slots:
            if not slot.in_use:
                slot.block = None

    def abandon(self) -> None:
        """Forget every block on the device, in use or not, without writing it, and whatever a lane
        has failed at.
        """
        for slot in self._slots:
            for future in (slot.ready, slot.drained):
                if future is not None:
                    future.exception()
            slot.block, slot.in_use, slot.ready, slot.drained = None, False, None, None
        self._written.clear()

    def close(self) -> None:
        self.drop()
        for lane in (self._upload, self._exchange, self._offload):
            if lane is not None:
                lane.close()
        self.store.close()

    def _slot_of(self, block: int) -> _Slot | None:
        return next((s for s in self._slots if s.block == block), None)

    def _prefetch(self, block: int) -> None:
        for step in range(1, self._ahead + 1):
            upcoming = (block + step) % self.blocks
            if (
                self._slot_of(upcoming) is None
                and self._start_upload(upcoming, evict=False) is None
            ):
                return

    def _start_upload(self, block: int, evict: bool = True) -> _Slot | None:
        """Put `block` in a free slot; a slot whose tenant was prefetched in vain is free only if
        `evict`.
        """
        free = [s for s in self._slots if s.block is None] or [
            s for s in self._slots if evict and not s.in_use
        ]
        if not free:
            return None
        slot = min(free, key=lambda s: s.drained is not None and not s.drained.done())
        before = [f for f in (slot.ready, slot.drained, self._written.get(block)) if f is not None]
        slot.block = block

        def upload() -> None:
            for future in before:
                future.result()
            if not self.reuse:
                slot.buffer = self._allocate()
            assert slot.buffer is not None
            with self._span("upload", block):
                self.traffic.bytes_up += self.store.read(block, slot.buffer)
            self.traffic.uploads[block] += 1

        slot.ready = self._upload.submit(upload)
        if self._exchange is not None:
            uploaded = slot.ready

            def exchange() -> None:
                uploaded.result()
                assert slot.buffer is not None
                assert self._complete is not None
                with self._span("exchange", block):
                    self._complete(block, slot.buffer)

            slot.ready = self._exchange.submit(exchange)
        return slot

    def _allocate(self) -> Tensor:
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        self.pointers.add(buffer.data_ptr())
        return buffer

    def _span(self, lane: str, block: int) -> "_Recorder":
        return _Recorder(self.spans, lane, block)


class _Recorder:
    """Appends a `Span` for what runs inside it, unless nobody asked for a trace."""

    def __init__(self, spans: list[Span] | None, lane: str, block: int):
        self._spans, self._lane, self._block = spans, lane, block

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._spans is not None:
            self._spans.append(Span(self._lane, self._block, self._start, time.perf_counter()))
