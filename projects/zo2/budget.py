"""A hard limit on memory: what a run will take, computed before anything is allocated, and then
enforced.

On a CPU the budget is on what the process allocates (VmData of /proc/self/status) and the kernel
enforces it (RLIMIT_DATA): an allocation beyond it fails at once, where otherwise the machine would
begin to swap. On a GPU it is on what torch allocates there.
"""

import ctypes
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from projects.zo2.storage import Field, Layout
from projects.zo2.units import partition
from shared.errors import UserError
from shared.meters import data_bytes, peak_rss_bytes

_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_M_MMAP_THRESHOLD = -3  # of malloc.h
_THREAD = 9 << 20  # the stack of a thread and what its allocator starts with
_SLACK = 64 << 20  # scratch memory of matrix products, pieces of noise, fragments
_MARGIN = 8 << 20  # by which the program may be larger the next time
# bytes of logits that the loss looks at together; it makes about three copies of them
_LOSS_PIECE = 8 << 20
_CHOICES = ((3, True), (2, True), (1, True), (1, False))  # slots, noise kept; the fastest first


def parse_size(text: str) -> int:
    """Bytes in "2GB", "1500MB" (decimal) or "1.5GiB" (binary). Raises UserError for
    anything else.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]I?)?B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise UserError(f"'{text}' is no size; write it as 2GB, 1500MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def format_size(nbytes: int) -> str:
    """ "1.50 GB" or "350 MB", decimal."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.0f} MB"


def memory(key: Literal["VmData", "VmHWM"]) -> int:
    """What the process has allocated (VmData) or its highest resident size (VmHWM), in bytes."""
    return {"VmData": data_bytes, "VmHWM": peak_rss_bytes}[key]()


def return_freed_memory() -> None:
    """From now on, tensors of a megabyte and more go back to the system when they are freed.

    Left alone, glibc keeps more and more of them in its heap, whose holes count against the limit.
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def loss_rows(vocabulary: int) -> int:
    """How many tokens' logits the loss should look at together."""
    return max(1, _LOSS_PIECE // (4 * vocabulary))


@dataclass(frozen=True)
class Plan:
    """How a run will use memory: `parts` says what takes how many bytes."""

    slots: int
    cache_noise: bool
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {format_size(n)}" for name, n in self.parts.items() if n >= 500_000
        )
        return f"{format_size(self.total)}: {parts}"


@dataclass(frozen=True)
class Workload:
    """What a step computes, as far as memory goes."""

    batch_size: int
    accumulate: int
    length: int
    probe: str
    storage: str
    storage_dtype: torch.dtype | None
    device: torch.device
    threads: int


def make_plan(model: nn.Module, work: Workload, budget: int | None) -> Plan:
    """The fastest way to run `model` (its parameters may be on the meta device) that `budget`
    allows; without one, the fastest.

    Raises UserError, naming the smallest budget that would do, when none fits.
    """
    plans = [_plan(model, work, slots, cache_noise) for slots, cache_noise in _CHOICES]
    if work.storage == "none":
        plans = [plans[0], plans[-1]]
    for plan in plans:
        if budget is None or plan.total <= budget:
            return plan
    assert budget is not None
    leanest = min(plans, key=lambda plan: plan.total)
    enough = -(-(leanest.total + _MARGIN) // 10**7) * 10
    advice = "" if work.storage == "disk" else " (less with --storage disk)"
    raise UserError(
        f"a budget of {format_size(budget)} is too small: this run needs --memory-budget"
        f" {enough}MB{advice}: {leanest}"
    )


def _plan(model: nn.Module, work: Workload, slots: int, cache_noise: bool) -> Plan:
    parts = partition(model)
    size = Layout(
        [Field(n, tuple(p.shape), p.dtype, True) for n, p in model.named_parameters()]
    ).nbytes
    layouts = [Layout(_fields(unit.module)) for unit in parts.blocks]
    largest = max(layout.nbytes for layout in layouts)
    trainable = max(layout.writable_nbytes for layout in layouts)
    resident = size - sum(
        Layout([Field("", tuple(p.shape), p.dtype, True) for p in u.module.parameters()]).nbytes
        for u in parts.blocks
    )
    shared = sum(p.numel() * p.element_size() for p in parts.shared)
    units = [
        sum(p.numel() * p.element_size() for p in u.parameters.values() if p not in parts.shared)
        for u in parts.resident
    ]
    on_gpu = work.device.type == "cuda"

    taken = {"program": 0 if on_gpu else memory("VmData") + work.threads * _THREAD}
    if work.storage == "none":
        taken["model"] = size
    else:
        taken["resident weights"] = resident
        taken["slots"] = slots * largest
        if work.storage == "ram" and not on_gpu:
            taken["stored blocks"] = sum(
                layout.stored_as(work.storage_dtype).nbytes for layout in layouts
            )
            # Until they are in the store the blocks lie in ordinary memory.
            taken["loading"] = max(0, size - resident - slots * largest)
        elif work.storage == "disk" and work.storage_dtype is not None and not on_gpu:
            taken["staging"] = 2 * max(
                layout.stored_as(work.storage_dtype).nbytes for layout in layouts
            )
    taken["shared weights"] = shared * (2 if work.probe == "fresh" else 1)
    taken["noise"] = trainable if cache_noise else 0
    taken["fresh weights"] = max(trainable, *units, 0) if work.probe == "fresh" else 0
    taken["activations"], taken["logits"] = _activations(
        model.config, work, next(model.parameters()).element_size()
    )
    if on_gpu:  # a tensor's noise is drawn whole there
        taken["noise of a tensor"] = 2 * max(
            p.numel() * p.element_size() for p in model.parameters() if p.requires_grad
        )
    taken["reserve"] = _SLACK + sum(taken.values()) // 50
    return Plan(slots, cache_noise, taken)


def _fields(block: nn.Module) -> list[Field]:
    tensors = (*block.named_parameters(), *block.named_buffers())
    return [
        Field(n, tuple(t.shape), t.dtype, not isinstance(t, nn.Parameter) or t.requires_grad)
        for n, t in tensors
    ]


def _activations(config: Any, work: Workload, itemsize: int) -> tuple[int, int]:
    """Bytes of activations and of logits.

    Every forward of a step waits between the blocks with its embeddings, what went into the last
    block and what came out of it, and the sines and cosines of its positions; one at a time is
    inside a block. All hold their logits at the end. Norms and softmax compute in four bytes
    whatever the dtype.
    """
    forwards, rows = 2 * work.accumulate, work.batch_size * work.length
    text = config.get_text_config()
    hidden = text.hidden_size
    inner = (
        max(getattr(text, name, None) or 0 for name in ("intermediate_size", "ffn_dim", "n_inner"))
        or 4 * hidden
    )
    heads = getattr(text, "num_attention_heads", None) or 1
    rotary = getattr(text, "head_dim", None) or hidden // heads
    waiting = forwards * (3 * rows * hidden + 2 * work.length * rotary) * itemsize
    inside = rows * (8 * hidden + 4 * inner) * 4
    fused = getattr(text, "_attn_implementation", "eager") != "eager"
    scores = 0 if fused else 2 * text.num_attention_heads * rows * work.length * 4
    return waiting + inside + scores, forwards * rows * text.vocab_size * itemsize + 3 * _LOSS_PIECE


@contextmanager
def limit(budget: int | None, device: torch.device) -> Iterator[None]:
    """Inside, an allocation that would exceed `budget` fails; it is turned into a UserError."""
    if budget is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    else:
        _set_limit(budget, hard)
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _out_of_memory(error):
            raise
        raise UserError(
            f"the run needs more than the planned budget of {format_size(budget)}; run it again"
            " with a larger --memory-budget"
        ) from None
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def account_for(nbytes: int) -> None:
    """Lower the limit by memory that the kernel does not count under it (shared mappings)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        _set_limit(soft - nbytes, hard)


def _set_limit(nbytes: int, hard: int) -> None:
    resource.setrlimit(
        resource.RLIMIT_DATA,
        (nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard), hard),
    )


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    causes = ("allocate memory", "out of memory", "start new thread", "bad_alloc")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        cause in text for cause in causes
    )
