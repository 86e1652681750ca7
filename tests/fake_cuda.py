"""The streams of a GPU where there is none: what is queued on a stream is computed at once, on the
CPU, and what a GPU would promise about its order is written down.

Each thread of the host and each stream is a line of events. One event is *before* another only
where something makes it so: the same line; queueing (what the thread had done before); an event of
a stream that is waited for; a future that a thread waited for. Two accesses of the same memory, one
of them a write, that are ordered neither way are a **race**, whatever the order in which they
happened to run here. So one run finds the races of all timings (vector clocks: Fidge 1988, Mattern
1989).

    gpu = FakeCuda(monkeypatch, lanes, storage)      # these modules' `torch` is now this one
    buffer = gpu.torch.empty(64, dtype=torch.uint8, device="cuda")
    gpu.launch(writes=[buffer])                      # a kernel on the thread's current stream
    assert gpu.races == []
"""

import ctypes
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Clock = dict[int, int]  # line -> how many of its events are before


@dataclass
class Access:
    """One read or write of bytes [start, end): its line and its number there."""

    line: int
    number: int
    write: bool
    what: str
    start: int
    end: int


@dataclass
class Memory:
    """What has been done to bytes [start, end) since they were allocated."""

    start: int
    end: int
    where: str
    kept: Any = None  # what nobody here allocated must not be given out again
    accesses: list[Access] = field(default_factory=list)


class DeviceTensor(Tensor):
    """Memory of the GPU. Copies to and from it are queued on the current stream."""

    gpu: "FakeCuda"

    @property
    def is_cuda(self) -> bool:
        return True

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.copy_:
            target, source = args[0], args[1]
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            cls.gpu.copied(target, source, waits)
        elif function in (Tensor.clone, Tensor.cpu):
            where = "device" if function is Tensor.clone else "host"
            made = cls.gpu.allocate(args[0].shape, args[0].dtype, where, locked=False)
            made.copy_(args[0], where == "device")
            return made
        return super().__torch_function__(function, types, args, kwargs)


class FakeCuda:
    """See the module.

    Attributes:
        torch: stands for torch in the modules.
        races: what was found, a line each.
        pageable: copies that were not to wait, from or to host memory that is not page-locked.
        overlapping: collectives of two groups that could be under way at the same time.
    """

    def __init__(self, monkeypatch: Any, *modules: ModuleType):
        self.races: list[str] = []
        self.pageable: list[str] = []
        self.overlapping: list[str] = []
        self._lock = threading.RLock()
        self._clocks: dict[int, Clock] = {}
        self._memories: list[Memory] = []
        self._locked: list[tuple[int, int]] = []  # bytes of the host that are page-locked
        self._lines = 0
        self._threads = threading.local()
        self._collectives: list[tuple[int, int, str]] = []  # line, number there, group
        self.torch = _FakeTorch(self)
        self._device = type("OnDevice", (DeviceTensor,), {"gpu": self})
        for module in modules:
            if hasattr(module, "torch"):
                monkeypatch.setattr(module, "torch", self.torch)
            if hasattr(module, "ThreadPoolExecutor"):
                monkeypatch.setattr(module, "ThreadPoolExecutor", self.executor)
            if hasattr(module, "Future"):
                monkeypatch.setattr(module, "Future", self.future)
            if hasattr(module, "_transfer"):
                monkeypatch.setattr(module, "_transfer", self._watched(module._transfer))

    # ---- lines and clocks ------------------------------------------------------------------------

    def new_line(self) -> int:
        with self._lock:
            self._lines += 1
            self._clocks[self._lines] = {}
            return self._lines

    def here(self) -> int:
        """The line of this thread."""
        if not hasattr(self._threads, "line"):
            self._threads.line = self.new_line()
        return int(self._threads.line)

    def stream(self) -> "Stream":
        """The current stream of this thread."""
        if not hasattr(self._threads, "stream"):
            self._threads.stream = self._default()
        return self._threads.stream

    def _default(self) -> "Stream":
        # one for all threads
        if not hasattr(self, "_default_stream"):
            self._default_stream = Stream(self)
        return self._default_stream

    def now(self, line: int) -> Clock:
        with self._lock:
            return dict(self._clocks[line])

    def join(self, line: int, before: Clock) -> None:
        """All of `before` is before what comes next on the line."""
        with self._lock:
            clock = self._clocks[line]
            for other, number in before.items():
                clock[other] = max(clock.get(other, 0), number)

    # ---- what is done ----------------------------------------------------------------------------

    def launch(
        self, reads: Iterable[Tensor] = (), writes: Iterable[Tensor] = (), what: str = "kernel"
    ) -> None:
        """Queue something on the current stream."""
        stream = self.stream()
        self.join(stream.line, self.now(self.here()))
        self._touch(stream.line, reads, writes, what)

    def on_host(
        self, reads: Iterable[Tensor] = (), writes: Iterable[Tensor] = (), what: str = "host"
    ) -> None:
        """Something that this thread does itself."""
        self._touch(self.here(), reads, writes, what)

    def copied(self, target: Tensor, source: Tensor, waits: bool) -> None:
        for side in (target, source):
            memory, start, end = self._bytes(side)
            locked = any(first <= start and end <= last for first, last in self._locked)
            if not isinstance(side, DeviceTensor) and not waits and not locked:
                self.pageable.append(memory.where)
        self.launch([source], [target], "copy")
        if waits:
            self.stream().synchronize()

    def collective(self, group: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """An exchange with other ranks, queued on the current stream."""
        self.launch(reads, writes, f"collective of {group}")
        line = self.stream().line
        with self._lock:
            clock = self._clocks[line]
            for other_line, number, other in self._collectives:
                if other != group and clock.get(other_line, 0) < number:
                    self.overlapping.append(f"{other} and {group}")
            self._collectives.append((line, clock[line], group))

    def _touch(
        self, line: int, reads: Iterable[Tensor], writes: Iterable[Tensor], what: str
    ) -> None:
        touched = [(*self._bytes(tensor), False) for tensor in reads]
        touched += [(*self._bytes(tensor), True) for tensor in writes]
        self._record(line, touched, what)

    def _record(
        self, line: int, touched: Iterable[tuple[Memory, int, int, bool]], what: str
    ) -> None:
        """The next event of a line, with all that it reads or writes."""
        with self._lock:
            clock = self._clocks[line]
            number = clock[line] = clock.get(line, 0) + 1
            for memory, start, end, write in touched:
                access = Access(line, number, write, what, start, end)
                for earlier in memory.accesses:
                    same = earlier.start < end and start < earlier.end
                    ordered = clock.get(earlier.line, 0) >= earlier.number
                    if same and (earlier.write or write) and not ordered:
                        self.races.append(f"{memory.where}: {earlier.what} and {what}")
                memory.accesses.append(access)

    # ---- memory ----------------------------------------------------------------------------------

    def _bytes(self, tensor: Tensor) -> tuple[Memory, int, int]:
        """The memory of a tensor without gaps, and which bytes of it are the tensor's."""
        storage, start = tensor.untyped_storage(), tensor.data_ptr()
        memory = self._at(storage.data_ptr(), storage.nbytes(), storage)
        return memory, start, start + tensor.numel() * tensor.element_size()

    def _at(self, address: int, nbytes: int, kept: Any = None) -> Memory:
        """The memory that holds an address; made known where nobody has seen it."""
        with self._lock:
            for memory in self._memories:
                if memory.start <= address < memory.end:
                    return memory
            memory = Memory(address, address + nbytes, f"host {len(self._memories)}", kept)
            self._memories.append(memory)
            return memory

    def allocate(self, size: Any, dtype: torch.dtype, where: str, locked: bool) -> Tensor:
        """New memory, on the GPU or (page-locked or not) on the host."""
        plain = torch.empty(size, dtype=dtype)
        tensor = plain.as_subclass(self._device) if where == "device" else plain
        start = plain.data_ptr()
        memory = Memory(start, start + plain.nbytes, f"{where} {len(self._memories)}")
        if locked:
            self.lock(start, plain.nbytes)
        with self._lock:
            self._memories.append(memory)
        stream = self.stream().line if where == "device" else None
        weakref.finalize(tensor, self._freed, memory, stream)
        return tensor

    def _freed(self, memory: Memory, stream: int | None) -> None:
        """Whoever gets the memory next may write to it: on a GPU torch gives it to what is queued
        next on the stream on which it was allocated, on the host to anybody at once.
        """
        if stream is not None:
            self.join(stream, self.now(self.here()))
        line = self.here() if stream is None else stream
        self._record(line, [(memory, memory.start, memory.end, True)], "freed")
        with self._lock:
            self._memories.remove(memory)

    def lock(self, address: int, nbytes: int) -> int:
        self._locked.append((address, address + nbytes))
        return 0

    def unlock(self, address: int) -> int:
        self._locked = [each for each in self._locked if each[0] != address]
        return 0

    def _watched(self, transfer: Any) -> Any:
        """A system call that reads into, or writes from, memory of the host."""

        def watched(call: Any, descriptor: int, views: Sequence[memoryview], *rest: Any) -> Any:
            into, touched = call.__name__ == "preadv", []
            for view in views:
                start = ctypes.addressof(ctypes.c_char.from_buffer(view))
                touched.append((self._at(start, len(view)), start, start + len(view), into))
            self._record(self.here(), touched, call.__name__)
            return transfer(call, descriptor, views, *rest)

        return watched

    # ---- threads ---------------------------------------------------------------------------------

    def future(self) -> "RecordedFuture":
        return RecordedFuture(self)

    def executor(self, workers: int, **options: Any) -> "RecordedExecutor":
        return RecordedExecutor(self, workers, options)


class Stream:
    """A queue of the GPU."""

    def __init__(self, gpu: FakeCuda):
        self.gpu, self.line = gpu, gpu.new_line()

    def synchronize(self) -> None:
        self.gpu.join(self.gpu.here(), self.gpu.now(self.line))

    def record_event(self) -> "Event":
        return Event(self.gpu, self.line)

    def wait_event(self, event: "Event") -> None:
        self.gpu.join(self.line, event.before)

    def wait_stream(self, other: "Stream") -> None:
        self.gpu.join(self.line, self.gpu.now(other.line))


class Event:
    """All that its stream had queued when it was recorded."""

    def __init__(self, gpu: FakeCuda, line: int):
        gpu.join(line, gpu.now(gpu.here()))
        self.gpu, self.before = gpu, gpu.now(line)

    def synchronize(self) -> None:
        self.gpu.join(self.gpu.here(), self.before)


class RecordedFuture(Future):  # type: ignore[type-arg]
    """What was before its end is before what follows a wait for it."""

    def __init__(self, gpu: FakeCuda):
        super().__init__()
        self._gpu, self._before = gpu, {}  # type: ignore[var-annotated]

    def set_result(self, result: Any) -> None:
        self._before = self._gpu.now(self._gpu.here())
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        self._before = self._gpu.now(self._gpu.here())
        super().set_exception(exception)

    def result(self, timeout: float | None = None) -> Any:
        try:
            return super().result(timeout)
        finally:
            self._gpu.join(self._gpu.here(), self._before)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        found = super().exception(timeout)
        self._gpu.join(self._gpu.here(), self._before)
        return found


class RecordedExecutor:
    """A pool whose tasks know what was before they were submitted."""

    def __init__(self, gpu: FakeCuda, workers: int, options: dict[str, Any]):
        self._gpu, self._pool = gpu, ThreadPoolExecutor(workers, **options)

    def submit(self, task: Any, *arguments: Any) -> RecordedFuture:
        future, before = RecordedFuture(self._gpu), self._gpu.now(self._gpu.here())

        def run() -> None:
            self._gpu.join(self._gpu.here(), before)
            try:
                result = task(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._pool.submit(run)
        return future

    def shutdown(self, wait: bool = True) -> None:
        self._pool.shutdown(wait=wait)


class _FakeTorch:
    """torch, but for what concerns a GPU and for where memory lies."""

    def __init__(self, gpu: FakeCuda):
        self._gpu = gpu
        own = {
            "Stream": lambda device=None: Stream(gpu),
            "stream": self._stream,
            "current_stream": lambda device=None: gpu.stream(),
            "cudart": lambda: SimpleNamespace(
                cudaHostRegister=lambda address, nbytes, flags: gpu.lock(address, nbytes),
                cudaHostUnregister=gpu.unlock,
            ),
        }
        self.cuda = SimpleNamespace(**{**vars(torch.cuda), **own})

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(
        self, size: Any, *, dtype: Any = torch.uint8, device: Any = "cpu", pin_memory: bool = False
    ) -> Tensor:
        where = "device" if torch.device(device).type == "cuda" else "staging"
        return self._gpu.allocate(size, dtype, where, pin_memory)

    @contextmanager
    def _stream(self, stream: Stream) -> Any:
        before = self._gpu.stream()
        self._gpu._threads.stream = stream
        try:
            yield
        finally:
            self._gpu._threads.stream = before
