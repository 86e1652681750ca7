"""The host tier: where blocks rest while they are not on the device.

A block travels as one byte buffer. `Layout` says where each of its tensors lies; trainable tensors
and buffers come first, so that writing a block back is one prefix and frozen weights never travel
back. `RamStore` keeps the blocks in host memory (page-locked when the device is a GPU), `DiskStore`
in a safetensors file that is trained in place: after a flush it is an ordinary checkpoint.

Both may keep the floating-point tensors in a narrower dtype than the one computed with (paper:
low-bit transfer). An update smaller than half a step of the stored dtype is then lost by rounding
to nearest; stochastic rounding keeps it in expectation.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from projects.zo2.noise import PIECE
from shared.errors import UserError
from shared.files import replacing

# Bytes at which torch's allocators begin a tensor: matrix products may round differently on other
# alignments.
ALIGNMENT = {"cpu": 64, "cuda": 512}

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def round_up(nbytes: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


@dataclass(frozen=True)
class Field:
    """One tensor of a block: its full name, shape and dtype, and whether it is written back."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    writable: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """Where the tensors of one block lie in a byte buffer of `nbytes`; the first `writable_nbytes`
    of it are written back.
    """

    def __init__(self, fields: Sequence[Field], alignment: int = ALIGNMENT["cpu"]):
        self.alignment = alignment
        self.fields = sorted(fields, key=lambda f: not f.writable)  # stable: writable ones first
        self.offsets: list[int] = []
        self.nbytes = self.writable_nbytes = 0
        for f in self.fields:
            self.offsets.append(self.nbytes)
            self.nbytes += round_up(f.nbytes, alignment)
            if f.writable:
                self.writable_nbytes = self.nbytes

    def views(self, raw: Tensor) -> list[Tensor]:
        """The tensors as views into `raw` (uint8, at least `nbytes` long), in the order of
        `fields`.
        """
        return [
            raw[o : o + f.nbytes].view(f.dtype).view(f.shape)
            for f, o in zip(self.fields, self.offsets, strict=True)
        ]

    def stored_as(self, dtype: torch.dtype | None) -> "Layout":
        """The same tensors with the floating-point ones held as `dtype`."""
        if dtype is None:
            return self
        fields = [
            Field(f.name, f.shape, dtype if f.dtype.is_floating_point else f.dtype, f.writable)
            for f in self.fields
        ]
        return Layout(fields, self.alignment)

    def same_bytes(self, other: "Layout") -> bool:
        return [f.dtype for f in self.fields] == [f.dtype for f in other.fields]


def round_stochastically(source: Tensor, target: Tensor, generator: torch.Generator) -> None:
    """target = source, rounded up or down to the target's dtype with the probability that makes the
    expectation exact.

    What the target dtype can hold stays as it is; values beyond its largest finite number become
    that number.
    """
    info = torch.finfo(target.dtype)
    mantissa_bits = round(-math.log2(info.eps))
    smallest_exponent = round(math.log2(info.tiny))
    source = source.float()
    exponent = torch.frexp(source).exponent.sub_(1).clamp_(min=smallest_exponent)
    ulp = torch.ldexp(
        torch.ones(exponent.shape, device=source.device), exponent.sub_(mantissa_bits)
    )
    steps = source / ulp  # exact, as all that follows: ulp is a power of two
    inner = steps.trunc()  # the neighbour towards zero
    outwards = (
        torch.rand(source.shape, generator=generator, device=source.device) < (steps - inner).abs_()
    )
    target.copy_(inner.add_(steps.sign_().mul_(outwards)).mul_(ulp).clamp_(info.min, info.max))


class Codec:
    """Copies a block between its buffer on the device and its stored form, casting where the dtypes
    differ.
    """

    def __init__(self, layout: Layout, stored: Layout, stochastic: bool):
        self.layout, self.stored, self.stochastic = layout, stored, stochastic
        self.plain = layout.same_bytes(stored)

    def decode(self, stored: Tensor, device: Tensor, bucket: bool = True) -> None:
        """stored bytes -> device bytes. `bucket` moves them in one copy, otherwise tensor by
        tensor.
        """
        if self.plain and bucket:
            device[: self.layout.nbytes].copy_(stored[: self.layout.nbytes], non_blocking=True)
            return
        for source, target in zip(
            self.stored.views(stored), self.layout.views(device), strict=True
        ):
            target.copy_(source, non_blocking=True)

    def encode(
        self, device: Tensor, stored: Tensor, generator: torch.Generator | None, bucket: bool = True
    ) -> None:
        """device bytes -> stored bytes, of the fields that are written back."""
        if self.plain and bucket:
            stored[: self.layout.writable_nbytes].copy_(
                device[: self.layout.writable_nbytes], non_blocking=True
            )
            return
        for f, source, target in zip(
            self.layout.fields, self.layout.views(device), self.stored.views(stored), strict=True
        ):
            if not f.writable:
                break
            if self.stochastic and source.dtype != target.dtype:
                assert generator is not None
                # In pieces, because rounding takes several times the memory of what it rounds.
                for whole, kept in zip(
                    source.view(-1).split(PIECE), target.view(-1).split(PIECE), strict=True
                ):
                    rounded = torch.empty(whole.shape, dtype=target.dtype, device=whole.device)
                    round_stochastically(whole, rounded, generator)
                    kept.copy_(rounded)
            else:
                target.copy_(source, non_blocking=True)


class RamStore:
    """Blocks in host memory. `nbytes` is what they take there.

    The memory is an anonymous mapping, outside torch's allocators: a count of the CPU allocator's
    bytes is the device's alone, and page-locked memory (`pinned`, for a GPU) is not rounded up to a
    power of two. Pages come into being as blocks are filled, so that a model moves here block by
    block.
    """

    def __init__(self, codecs: Sequence[Codec], pinned: bool, bucket: bool = True):
        self.codecs, self.pinned, self.bucket = codecs, pinned, bucket
        starts = [0]
        for codec in codecs:
            starts.append(
                starts[-1] + round_up(codec.stored.nbytes, mmap.PAGESIZE if pinned else 1)
            )
        self.nbytes = starts[-1]
        memory = torch.frombuffer(mmap.mmap(-1, max(1, self.nbytes)), dtype=torch.uint8)
        self._blocks = [memory[a:b] for a, b in pairwise(starts)]
        self._locked: list[Tensor] = []

    def read(self, block: int, device: Tensor) -> int:
        """Bring `block` into the device buffer; returns the bytes that travelled."""
        self.codecs[block].decode(self._blocks[block], device, self.bucket)
        return self.codecs[block].stored.nbytes

    def write(self, block: int, device: Tensor, generator: torch.Generator | None = None) -> int:
        """Put the writable part of `block` back; returns the bytes that travelled."""
        self.codecs[block].encode(device, self._blocks[block], generator, self.bucket)
        return self.codecs[block].stored.writable_nbytes

    def fill(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """First content of `block`."""
        _copy_all(self.codecs[block].stored, self._blocks[block], tensors)
        if self.pinned:
            memory = self._blocks[block]
            status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
            if status != 0:
                raise UserError(
                    f"the host does not let {self.nbytes / 1e9:.1f} GB be page-locked (CUDA error"
                    f" {status})"
                )
            self._locked.append(memory)

    def close(self) -> None:
        for memory in self._locked:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._locked.clear()
        self._blocks.clear()


class DiskStore:
    """Blocks in a safetensors file at `path`, read and written in place with one scattered system
    call per contiguous run.

    `drop_cache` writes each block through to the disk and drops it from the page cache after use,
    so that every read is a real one. With `part` = (rank, ranks) only one of equal slices of each
    block is read and written.
    """

    def __init__(
        self, path: Path, codecs: Sequence[Codec], device: torch.device, drop_cache: bool = False
    ):
        self.path, self.codecs, self.drop_cache = path, codecs, drop_cache
        self.part = (0, 1)
        header, start = read_header(path)
        self._fd = os.open(path, os.O_RDWR)
        if drop_cache:  # the file may be in the page cache from being written
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.nbytes = os.fstat(self._fd).st_size
        self._at: list[list[int]] = []
        for codec in codecs:
            for f in codec.stored.fields:
                entry = header.get(f.name)
                if entry is None:
                    raise UserError(
                        f"{path} holds no tensor '{f.name}'; it is not a checkpoint of this model"
                    )
                if (
                    tuple(entry["shape"]) != f.shape
                    or SAFETENSORS_DTYPES.get(entry["dtype"]) != f.dtype
                ):
                    raise UserError(
                        f"{path}: '{f.name}' is {entry['dtype']} {entry['shape']}, the model wants"
                        f" {_NAMES[f.dtype]} {list(f.shape)}"
                    )
            self._at.append(
                [start + header[f.name]["data_offsets"][0] for f in codec.stored.fields]
            )
        # A buffer of its own for each lane where bytes cannot go straight into the device buffer.
        indirect = device.type != "cpu" or any(not c.plain for c in codecs)
        size = max(c.stored.nbytes for c in codecs) if indirect else 0
        self._staging = (
            [
                torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
                for _ in range(2)
            ]
            if indirect
            else None
        )

    def read(self, block: int, device: Tensor) -> int:
        codec = self.codecs[block]
        raw = self._staging[0] if self._staging else device
        moved = 0
        for offset, views in self._runs(block, raw, writable_only=False):
            nbytes = sum(len(v) for v in views)
            _transfer(os.preadv, self._fd, views, offset, self.path)
            self._forget(offset, nbytes)
            moved += nbytes
        if self._staging:
            own = self.own(block)
            (
                codec.decode(raw, device)
                if self.part[1] == 1
                else device[own].copy_(raw[own], non_blocking=True)
            )
        return moved

    @property
    def identity(self) -> tuple[int, int]:
        """Device and number of the file: the same for two processes that have the same one open."""
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino

    def slice_nbytes(self, block: int) -> int:
        """What each rank's slice of a block takes in its buffer; the last may be shorter,
        or empty.
        """
        return round_up(-(-self.codecs[block].stored.nbytes // self.part[1]), ALIGNMENT["cpu"])

    def own(self, block: int) -> slice:
        """This rank's slice of the buffer of a block."""
        size, nbytes = self.slice_nbytes(block), self.codecs[block].stored.nbytes
        return slice(min(self.part[0] * size, nbytes), min((self.part[0] + 1) * size, nbytes))

    def write(self, block: int, device: Tensor, generator: torch.Generator | None = None) -> int:
        codec = self.codecs[block]
        raw = self._staging[1] if self._staging else device
        if self._staging:
            own = self.own(block)
            (
                codec.encode(device, raw, generator)
                if self.part[1] == 1
                else raw[own].copy_(device[own], non_blocking=True)
            )
            if device.is_cuda:
                torch.cuda.current_stream(device.device).synchronize()
        runs = list(self._runs(block, raw, writable_only=True))
        # before: a transfer uses the views up
        moved = [sum(len(v) for v in views) for _, views in runs]
        for offset, views in runs:
            _transfer(os.pwritev, self._fd, views, offset, self.path)
        if self.drop_cache:
            os.fdatasync(self._fd)
            for offset, nbytes in zip((offset for offset, _ in runs), moved, strict=True):
                self._forget(offset, nbytes)
        return sum(moved)

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        """Put one tensor that does not travel (a resident one) into the file."""
        header, start = read_header(self.path)
        entry = header[name]
        stored = tensor.detach().to("cpu", SAFETENSORS_DTYPES[entry["dtype"]]).contiguous()
        _transfer(
            os.pwritev, self._fd, [_bytes(stored)], start + entry["data_offsets"][0], self.path
        )

    def sync(self) -> None:
        """Wait until the file's bytes are on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _runs(
        self, block: int, raw: Tensor, writable_only: bool
    ) -> Iterator[tuple[int, list[memoryview]]]:
        """(file offset, buffers) of each run of tensors that lie side by side in the file."""
        layout = self.codecs[block].stored
        data = memoryview(raw.numpy())
        own = self.own(block)
        clipped = (
            (
                at + max(0, own.start - o),
                max(o, own.start),
                min(o + f.nbytes, own.stop) - max(o, own.start),
            )
            for f, o, at in zip(layout.fields, layout.offsets, self._at[block], strict=True)
            if f.writable or not writable_only
        )
        wanted = sorted((at, o, nbytes) for at, o, nbytes in clipped if nbytes > 0)
        start, end, views = -1, -1, []  # type: ignore[var-annotated]
        for at, offset, nbytes in wanted:
            if at != end or len(views) == 512:  # the system takes 1024 buffers a call
                if views:
                    yield start, views
                start, views = at, []
            views.append(data[offset : offset + nbytes])
            end = at + nbytes
        if views:
            yield start, views

    def _forget(self, offset: int, nbytes: int) -> None:
        if self.drop_cache:
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """The tensor entries of a safetensors file and the offset at which its data begins. Raises
    UserError when it is not one.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= 100_000_000:
                raise ValueError("header length")
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is not a safetensors file") from None
    if size != end:
        raise UserError(f"{path} is truncated; fetch or save it again")
    return entries, 8 + length


class SafetensorsReader:
    """Reads a safetensors file tensor by tensor into memory of their own.

    safetensors' own `safe_open` maps the whole file privately, which counts in full against a limit
    on the memory of the process (RLIMIT_DATA), and its tensors are views into that mapping.
    """

    def __init__(self, path: Path):
        self.path = path
        self._header, self._start = read_header(path)

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def names(self) -> set[str]:
        return set(self._header)

    def read(self, name: str) -> Tensor:
        """A copy of the tensor `name`. Raises UserError when its dtype is none that torch
        has here.
        """
        entry = self._header[name]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(f"{self.path}: '{name}' is {entry['dtype']}, which is not supported")
        tensor = torch.empty(entry["shape"], dtype=dtype)
        if tensor.numel():
            fd = os.open(self.path, os.O_RDONLY)
            try:
                _transfer(
                    os.preadv,
                    fd,
                    [_bytes(tensor)],
                    self._start + entry["data_offsets"][0],
                    self.path,
                )
            finally:
                os.close(fd)
        return tensor


class SafetensorsWriter:
    """Appends tensors to a safetensors file; see `safetensors_writer`."""

    def __init__(self, path: Path, fields: Sequence[Field], file: BinaryIO):
        self.path, self.left, self._file = path, list(fields), file

    def write(self, tensor: Tensor) -> None:
        """The next tensor."""
        f = self.left.pop(0)
        assert tuple(tensor.shape) == f.shape, f.name
        self._file.write(_bytes(tensor.detach().to("cpu", f.dtype).contiguous()))


@contextmanager
def safetensors_writer(
    path: Path, fields: Sequence[Field], metadata: Mapping[str, str] | None = None
) -> Iterator[SafetensorsWriter]:
    """Write a safetensors file tensor by tensor, so that no more than one of them is in memory. The
    file appears at `path` when it is whole.

    Args:
        path: of the file.
        fields: every one must be written, in their order; they lie without gaps, as the format
            demands.
        metadata: text that is kept with them.

    Raises:
        UserError: no space is left.
    """
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(_header(fields, metadata or {}))
        writer = SafetensorsWriter(path, fields, file)
        yield writer
        assert not writer.left, f"{path}: '{writer.left[0].name}' was not written"


def _header(fields: Sequence[Field], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for f in fields:
        header[f.name] = {
            "dtype": _NAMES[f.dtype],
            "shape": list(f.shape),
            "data_offsets": [offset, offset + f.nbytes],
        }
        offset += f.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _copy_all(layout: Layout, raw: Tensor, tensors: Mapping[str, Tensor]) -> None:
    for f, view in zip(layout.fields, layout.views(raw), strict=True):
        view.copy_(tensors[f.name])


def _transfer(call, fd: int, views: list[memoryview], offset: int, path: Path) -> None:  # type: ignore[no-untyped-def]
    """preadv or pwritev until every byte has moved."""
    while views:
        moved = call(fd, views, offset)
        if moved == 0:
            raise OSError(f"{path} ended at byte {offset}: it was truncated while in use")
        offset += moved
        while views and moved >= len(views[0]):
            moved -= len(views.pop(0))
        if views and moved:
            views[0] = views[0][moved:]
