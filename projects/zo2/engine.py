"""ZO2 (arXiv 2503.12668): MeZO with the blocks away from the device, bit for bit.

One step sends every block to the device once. While it is there, the update of the previous step is
applied, the forwards at theta + eps z and theta - eps z both pass through it, it is restored and
goes back. The projected gradient of a step is known only at its end, so its update is *pending*
until the next visit; `flush` applies it where there is no next one. The model's own forward runs
unmodified (see `streams.py`).

Works on any `nn.Module` whose blocks sit in a `ModuleList` or `Sequential`:

    engine = ZO2(model, lr=1e-6, storage="ram")
    for batch in batches:
        print(engine.step(batch).loss)
    engine.unwrap()                      # the model, trained, as it was before
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from projects.zo2.lanes import Pager, Span, Traffic
from projects.zo2.mezo import NO_DECAY, Loss, model_loss
from projects.zo2.noise import Noise, Scratch, doubles_exactly
from projects.zo2.storage import (
    ALIGNMENT,
    Codec,
    DiskStore,
    Field,
    Layout,
    RamStore,
    SafetensorsReader,
    SafetensorsWriter,
    round_up,
)
from projects.zo2.streams import DIFFERENT_PATHS, Lockstep
from projects.zo2.units import Unit, find_blocks, partition
from shared.errors import UserError
from shared.seeding import step_seed


@dataclass(frozen=True)
class Step:
    """What one step found: the loss at theta + eps z, the projected gradient, and what its update
    will use.

    A `skipped` step had a loss that is not finite; it leaves no update.
    """

    number: int
    loss: float
    projected_gradient: float
    lr: float
    seed: int

    @property
    def skipped(self) -> bool:
        return not math.isfinite(self.projected_gradient)


def _means(plus: list[float], minus: list[float]) -> tuple[float, float]:
    """The losses of the micro-batches at theta + eps z and at theta - eps z, each averaged."""
    return sum(plus) / len(plus), sum(minus) / len(minus)


_UNUSABLE = (
    "the engine was interrupted while it changed weights, which are now of no use: load a"
    " checkpoint, or start again"
)


def _change_weights(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method runs inside `_change`."""

    @wraps(method)
    def wrapped(self: "ZO2", *args: Any) -> Any:
        with self._change():
            return method(self, *args)

    return wrapped


@dataclass
class _Pending:
    """An update that has not reached all parameters. `applied` holds the units it has reached."""

    seed: int
    g: float
    lr: float
    applied: set[str] = field(default_factory=set)


class ZO2:
    """Zeroth-order fine-tuning of `model` with its blocks on a host tier.

    Args:
        model: its parameters may be anywhere; with `storage` a path they may be on the meta device,
            and the file is then trained in place.
        blocks: names of the containers whose children are offloaded; default the largest ModuleList
            or Sequential.
        shared: names of modules outside the blocks that one forward calls more than once (tied
            weights are found without it).
        lr: learning rate, or a function of the step number. Stored with each step's pending update.
        eps: size of the perturbation.
        weight_decay, no_decay: the update is lr * (g z + weight_decay theta); parameters whose
            names contain a part of `no_decay` do not decay.
        seed: the step's seeds derive from it and the step number; `step(seed=...)` overrides.
        probe: "inplace" perturbs and restores the weights as MeZO does (bitwise equal to it, with
            its rounding drift); "fresh" forms the perturbed weights beside pristine ones (no drift;
            one more block of device memory).
        storage: "ram", a path of a safetensors file, or None to keep every block on the device.
        storage_dtype, rounding: keep floating-point tensors of the blocks in a narrower dtype,
            rounded to "nearest" or "stochastic"ally.
        slots: how many blocks the device holds.
        overlap: move blocks while computing.
        cache_noise: keep the noise of the visiting block in a buffer (one more block of device
            memory) and draw it once instead of three times. Without effect in float16, where it
            would not be MeZO's to the last bit.
        reuse, bucket: keep the slots for good; move a block as one copy. Off only to show what they
            are worth.
        drop_cache: for a file, read and write the disk itself and not the page cache.
        device: where to compute; default the device of the first parameter (a CPU for the meta
            device).
        loss: `loss(model, batch)`, a scalar; default the loss of a Hugging Face model.
        trace: record what each lane did in `spans`.

    Raises UserError for a model it cannot take apart and for options that contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: Sequence[str] | None = None,
        shared: Sequence[str] = (),
        lr: float | Callable[[int], float] = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        no_decay: Sequence[str] = NO_DECAY,
        seed: int = 0,
        probe: Literal["inplace", "fresh"] = "inplace",
        storage: Literal["ram"] | Path | None = "ram",
        storage_dtype: torch.dtype | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        slots: int = 3,
        overlap: bool = True,
        cache_noise: bool = True,
        reuse: bool = True,
        bucket: bool = True,
        drop_cache: bool = False,
        device: torch.device | str | None = None,
        loss: Loss = model_loss,
        trace: bool = False,
    ):
        if eps <= 0:
            raise UserError(f"eps must be positive, not {eps}")
        if slots < 1:
            raise UserError(f"slots must be at least 1, not {slots}")
        for name, value, allowed in (
            ("probe", probe, ("inplace", "fresh")),
            ("rounding", rounding, ("nearest", "stochastic")),
        ):
            if value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        if not (storage is None or storage == "ram" or isinstance(storage, Path)):
            raise UserError(
                "storage must be 'ram', a pathlib.Path of a safetensors file, or None, not"
                f" {storage!r}"
            )
        if storage is None and storage_dtype is not None:
            raise UserError(
                "storage_dtype needs a storage: blocks that never leave the device are not stored"
            )
        self.model, self.lr, self.eps, self.weight_decay, self.no_decay = (
            model,
            lr,
            eps,
            weight_decay,
            tuple(no_decay),
        )
        self.seed, self.probe, self.loss = seed, probe, loss
        self.steps = 0
        # Which forwards run here, and what all losses of a step come to: DistZO2 shares the first
        # out and asks around for the second.
        self.sides: tuple[Literal["plus", "minus"], ...] = ("plus", "minus")
        self.agree: Callable[[list[float], list[float]], tuple[float, float]] = _means
        first = next(model.parameters(), None)
        if first is None or not any(p.requires_grad for p in model.parameters()):
            raise UserError("the model has no trainable parameter")
        # where `unwrap` brings the model back to
        self._home = torch.device("cpu") if first.is_meta else first.device
        self.device = _indexed(torch.device(device) if device is not None else self._home)
        if isinstance(storage, Path) and any(p.is_meta for p in model.parameters()):
            _adopt(model, find_blocks(model, blocks), storage, self.device)
            in_place = True
        else:
            if any(p.is_meta for p in model.parameters()):
                raise UserError(
                    "the model is on the meta device: name the file with its weights by"
                    " storage=Path(...)"
                )
            in_place = False
        self._parts = partition(model, blocks, shared)
        self._units = {unit.name: unit for unit in (*self._parts.resident, *self._parts.blocks)}
        self._root = Unit("", model, self._parts.root, owned=dict(self._parts.root))
        # units in the order in which the last step's forward reached them
        self._order: list[Unit] = []
        self._pending: _Pending | None = None
        self._stochastic = rounding == "stochastic"
        self._training = {module: module.training for module in model.modules()}
        model.eval()  # a dropout that differs between the two forwards would be read as a gradient
        config = getattr(model, "config", None)
        self._use_cache = getattr(config, "use_cache", None)
        if self._use_cache is not None:
            config.use_cache = False

        self._tensors = [_block_tensors(unit) for unit in self._parts.blocks]
        self._alignment = ALIGNMENT[self.device.type]
        fields = [
            [Field(n, tuple(t.shape), t.dtype, _writable(t)) for n, t in tensors.items()]
            for tensors in self._tensors
        ]
        layouts = [Layout(of_block, self._alignment) for of_block in fields]
        self._pager: Pager | None = None
        if storage is not None:
            codecs = [
                Codec(layout, layout.stored_as(storage_dtype), self._stochastic)
                for layout in layouts
            ]
            store = self._make_store(storage, codecs, in_place, drop_cache, bucket)
            largest = max(layout.nbytes for layout in layouts)
            self._pager = Pager(
                store, len(layouts), largest, self.device, slots, overlap, reuse, trace
            )
        else:
            model.to(self.device)
        self._layouts = layouts
        self._place_resident()

        trainable = [p for p in model.parameters() if p.requires_grad]
        scratch = Scratch(self.device, max(p.numel() for p in trainable))
        self._probe_noise, self._update_noise = Noise(scratch), Noise(scratch)
        sizes = {
            u: sum(self._aligned(p) for p in u.parameters.values() if p not in self._parts.shared)
            for u in self._units.values()
        }
        largest_block = max(sizes[u] for u in self._parts.blocks)
        cache_noise = cache_noise and all(
            doubles_exactly(p.dtype) for u in self._parts.blocks for p in u.parameters.values()
        )
        self._cache = (
            torch.empty(largest_block, dtype=torch.uint8, device=self.device)
            if cache_noise
            else None
        )
        self._work = (
            torch.empty(max(sizes.values()), dtype=torch.uint8, device=self.device)
            if probe == "fresh"
            else None
        )

        self._changing = self._unusable = False
        self._lockstep = Lockstep()
        self._mode: Literal["step", "forward"] | None = None
        self._streams = self._plus = 1
        self._visit: _Visit | None = None
        # shared parameter: (home, plus, minus)
        self._twins: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}
        self._twin_states: dict[nn.Parameter, Tensor] = {}
        self._visited: list[Unit] = []
        self._hooks = []
        for unit in self._units.values():
            self._hooks.append(
                unit.module.register_forward_pre_hook(self._entered(unit), prepend=True)
            )
            self._hooks.append(unit.module.register_forward_hook(self._left(unit)))
            for name, child in unit.module.named_children():
                if any(
                    unit.block is not None or (p.requires_grad and p not in self._parts.shared)
                    for p in child.parameters()
                ):
                    self._hooks.append(
                        child.register_forward_pre_hook(
                            self._entered_child(unit, name), prepend=True
                        )
                    )

    # ---- what a user calls -----------------------------------------------------------------------

    @torch.no_grad()
    def step(self, batch: Any, *, seed: int | None = None, lr: float | None = None) -> Step:
        """One training step on `batch`, or on a list of micro-batches whose losses are averaged
        (the blocks still travel once).

        The update it finds is pending until the next step or `flush`. An exception inside the model
        or the loss, Ctrl-C among them, leaves the weights unperturbed and nothing pending. One
        inside the engine itself (out of memory, a file that cannot be read) may leave the weights
        between two values: the engine then refuses to go on until `load`.
        """
        self._check_wrapped()
        if isinstance(batch, list) and any(isinstance(part, Tensor) for part in batch):
            raise UserError(
                "a list is a list of micro-batches; a batch of several tensors must be a tuple or a"
                " dictionary"
            )
        micro_batches = batch if isinstance(batch, list) else [batch]
        if not micro_batches:
            raise UserError("a step needs at least one micro-batch")
        seed = step_seed(self.seed, self.steps) if seed is None else seed
        if lr is None:
            lr = self.lr(self.steps) if callable(self.lr) else self.lr
        self.model.eval()
        self._plus = len(micro_batches) if "plus" in self.sides else 0
        self._streams = len(self.sides) * len(micro_batches)

        def forward(micro_batch: Any) -> float:
            self._show_twins()
            return self.loss(self.model, micro_batch).item()

        closures = [partial(forward, b) for _ in self.sides for b in micro_batches]
        try:
            self._begin(seed)
            self._mode = "step"
            losses = self._lockstep.run(closures)
            self._mode = None
            self._follow_order(None)
            self._end_twins()
        except BaseException as error:
            self._mode = None
            if self._changing:
                self._unusable = True
                error.add_note(_UNUSABLE)
            else:
                self._unusable = True  # unless recovering succeeds
                self._recover()
                self._unusable = False
            raise
        self._order = [self._root, *self._visited]
        self._pending = None
        plus, minus = self.agree(losses[: self._plus], losses[self._plus :])
        g = (plus - minus) / (2 * self.eps)
        self._pending = _Pending(seed, g, lr) if math.isfinite(g) else None
        result = Step(self.steps, plus, g, lr, seed)
        self.steps += 1
        return result

    @torch.no_grad()
    def forward(self, run: Callable[[nn.Module], Any]) -> Any:
        """`run(model)` with the current weights; a pending update is applied first.

        May run the model several times, as a generation does. Gives the same result when called
        twice.
        """
        self._check_wrapped()
        self.flush()
        self.model.eval()
        self._mode = "forward"
        self._visited = []
        try:
            return run(self.model)
        finally:
            self._mode = None
            if self._visit is not None:
                self._leave_forward()

    def evaluate(self, batch: Any) -> float:
        """The loss on `batch` at the current weights."""
        return self.forward(lambda model: self.loss(model, batch).item())

    @torch.no_grad()
    def flush(self) -> None:
        """Apply the pending update to every parameter it has not reached. Without effect when
        nothing is pending.
        """
        if self._pending is None:
            return
        self._update_noise.seed(self._pending.seed)
        for unit in self._order:
            if unit.name in self._pending.applied:
                self._apply_pending(unit)
            else:
                with self._at_home(unit, write=True):
                    self._apply_pending(unit)
        self._pending = None

    @torch.no_grad()
    def replay(self, steps: Sequence[Step], order: Sequence[str]) -> None:
        """Do again what `steps` did to the weights, without data or forwards: the weights end bit
        for bit where the run ended.

        `order` is the run's `order`.
        """
        by_name = {"": self._root, **self._units}
        unknown = [name for name in order if name not in by_name]
        if unknown:
            raise UserError(
                f"the log names '{unknown[0]}', which this model does not have: it belongs to"
                " another model"
            )
        self._order = [by_name[name] for name in order]
        for place, unit in enumerate(self._order[1:], 1):
            self._claim(unit, self._order[:place])
        for step in steps:
            self._begin(step.seed)
            for unit in self._order[1:]:
                self._visit = self._arrive(unit)
                self._minus()
                self._depart()
            self._end_twins()
            self._pending = (
                None if step.skipped else _Pending(step.seed, step.projected_gradient, step.lr)
            )
            self.steps = step.number + 1

    @property
    def order(self) -> list[str]:
        """Names of the units in the order in which they draw their noise; empty before the first
        step.
        """
        return [unit.name for unit in self._order]

    def parameter_order(self) -> list[str]:
        """Names of the trainable parameters in the order in which they draw their noise; a plain
        MeZO that is to be equal must use it.
        """
        return [name for unit in self._order for name in unit.owned]

    @property
    def traffic(self) -> Traffic:
        """Bytes moved so far, once the lanes have come to rest."""
        if self._pager is None:
            return Traffic()
        self._pager.settle()
        return self._pager.traffic

    @property
    def spans(self) -> list[Span]:
        return (self._pager.spans or []) if self._pager else []

    @property
    def slot_pointers(self) -> set[int]:
        """Addresses of all device buffers that have ever held a block."""
        return set() if self._pager is None else set(self._pager.pointers)

    @property
    def store(self) -> RamStore | DiskStore | None:
        """The host tier; None where no block leaves the device."""
        return None if self._pager is None else self._pager.store

    def exchange_through(self, complete: Callable[[int, Tensor], None], nbytes: int) -> None:
        """See `Pager.exchange_through`."""
        assert self._pager is not None
        self._pager.exchange_through(complete, nbytes)

    @property
    def host_nbytes(self) -> int:
        """What the blocks take on the host tier."""
        return self._pager.store.nbytes if self._pager else 0

    def tensors(self, flush: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Name and current value of every parameter and saved buffer, tied ones once; a value is
        valid until the next is asked for. Without `flush` the update of the last step may be
        missing.
        """
        if flush:
            self.flush()
        for name, tensor in self._resident_state().items():
            yield name, tensor.data
        for index, unit in enumerate(self._parts.blocks):
            with self._at_home(unit, write=False):
                for name, tensor in self._tensors[index].items():
                    yield name, tensor.data

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of every tensor, in memory. For a model that does not fit there, use `save`."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors()}

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the weights to a safetensors file, block by block; `path` appears when it
        is whole.
        """
        with SafetensorsWriter(path, self._fields(), metadata) as writer:
            for _, tensor in self.tensors():
                writer.write(tensor)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take the weights from a safetensors file that `save` wrote; a pending update is
        forgotten.
        """
        self._pending = None
        if self._unusable:
            self._forget_visit()
        file = SafetensorsReader(path)
        wanted = {f.name for f in self._fields()}
        if file.names() != wanted:
            odd = sorted(file.names() ^ wanted)[0]
            raise UserError(
                f"{path} does not fit the model: '{odd}' is only in"
                f" {'the file' if odd in file else 'the model'}"
            )
        for index, unit in enumerate(self._parts.blocks):
            with self._at_home(unit, write=True):
                for name, tensor in self._tensors[index].items():
                    tensor.data.copy_(file.read(name))
        for name, tensor in self._resident_state().items():
            tensor.data.copy_(file.read(name))
        self._changing = self._unusable = False

    def write_resident(self) -> None:
        """Make a file that is trained in place a whole checkpoint: the blocks are in it after a
        flush, what stays on the device is not.
        """
        assert self._pager is not None
        assert isinstance(self._pager.store, DiskStore)
        self.flush()
        self._pager.settle()
        for name, tensor in self._resident_state().items():
            self._pager.store.write_tensor(name, tensor.data)
        self._pager.store.sync()

    def unwrap(self) -> nn.Module:
        """Apply what is pending, bring the blocks back to where the model was before, and return
        it.
        """
        self._check_wrapped()
        self.flush()
        for index, unit in enumerate(self._parts.blocks if self._pager else ()):
            with self._at_home(unit, write=False):
                homes = {
                    name: tensor.data.to(self._home, copy=True)
                    for name, tensor in self._tensors[index].items()
                }
            for name, tensor in self._tensors[index].items():
                tensor.data = homes[name]
        self.close()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.to(self._home)
        return self.model

    def close(self) -> None:
        """Let go of the model, the lanes and the file, without bringing the blocks back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._pager is not None:
            if self._unusable:
                self._pager.abandon()
            self._pager.close()
        for module, training in self._training.items():
            module.training = training
        if self._use_cache is not None:
            self.model.config.use_cache = self._use_cache

    def _check_wrapped(self) -> None:
        if not self._hooks:
            raise UserError("this engine has let go of the model (unwrap or close): make a new one")
        if self._unusable:
            raise UserError(_UNUSABLE)

    # ---- a visit ---------------------------------------------------------------------------------
    #
    # arrive:  the block is uploaded and bound; the pending update is applied; theta + eps z
    # minus:   theta - eps z
    # depart:  theta; the block is offloaded

    def _claim(self, unit: Unit, earlier: Sequence[Unit]) -> None:
        """Let `unit` own those of its parameters that no earlier unit owns, shared ones first."""
        claimed = {p for other in earlier for p in other.owned.values()}
        mine = [(name, p) for name, p in unit.parameters.items() if p not in claimed]
        unit.owned = dict(sorted(mine, key=lambda item: item[1] not in self._parts.shared))

    @_change_weights
    def _follow_order(self, unit: Unit | None) -> None:
        """Before `unit` is visited, or at the end: if the last step went on with another unit,
        apply what is pending to all that it went on with, because its noise comes in that order and
        this step may not reach them.
        """
        left = self._order[len(self._visited) + 1 :]
        if self._pending is None or (left[0] if left else None) is unit:
            return
        for late in left:
            with self._at_home(late, write=True):
                self._apply_pending(late)
        self._pending = None

    @_change_weights
    def _begin(self, seed: int) -> None:
        self._visited = []
        self._probe_noise.seed(seed)
        if self._pending is not None:
            self._update_noise.seed(self._pending.seed)
        self._apply_pending(self._root)
        for parameter in self._parts.root.values():
            self._make_twins(parameter)

    @_change_weights
    def _arrive(self, unit: Unit) -> "_Visit":
        visit = _Visit(unit)
        if unit.block is not None:
            self._bind(unit)
        visit.began = time.perf_counter()
        self._apply_pending(unit)
        cached = unit.block is not None and self._cache is not None
        cache_at = 0
        work_at = 0
        for parameter in unit.owned.values():
            if parameter in self._parts.shared:
                self._make_twins(parameter)
                continue
            home = parameter.data
            noise = work = None
            if cached:
                noise, cache_at = self._carve(self._cache, cache_at, home)
                self._probe_noise.draw(noise, self.eps)
            if self._work is not None:
                work, work_at = self._carve(self._work, work_at, home)
            visit.tensors.append((parameter, home, noise, work))
        visit.state = None if cached else self._probe_noise.state()
        visit.phase = "home"
        self._visit = visit
        self._move(visit, "plus")
        return visit

    @_change_weights
    def _minus(self) -> None:
        assert self._visit is not None
        self._move(self._visit, "minus")

    @_change_weights
    def _depart(self) -> None:
        visit, self._visit = self._visit, None
        assert visit is not None
        self._move(visit, "home")
        if self._pending is not None:
            self._pending.applied.add(visit.unit.name)
        if visit.unit.block is not None:
            if self._pager is not None and self._pager.spans is not None:
                self._pager.spans.append(
                    Span("compute", visit.unit.block, visit.began, time.perf_counter())
                )
            self._unbind(visit.unit, write=self._layouts[visit.unit.block].writable_nbytes > 0)

    def _move(self, visit: "_Visit", phase: Literal["plus", "minus", "home"]) -> None:
        """Take the visiting unit's own parameters to theta + eps z, theta - eps z or back
        to theta.
        """
        if phase == visit.phase:
            return
        inplace = {
            ("home", "plus"): 1.0,
            ("plus", "minus"): -2.0,
            ("minus", "home"): 1.0,
            ("plus", "home"): -1.0,
            ("home", "minus"): -1.0,
        }
        if visit.state is not None and (self.probe == "inplace" or phase != "home"):
            self._probe_noise.restore(visit.state)
        for parameter, home, noise, work in visit.tensors:
            if self.probe == "inplace":
                self._add(home, home, inplace[visit.phase, phase], noise)
            elif phase == "home":
                parameter.data = home
            else:
                assert work is not None
                self._add(work, home, 1.0 if phase == "plus" else -1.0, noise)
                parameter.data = work
        visit.phase = phase

    def _add(self, target: Tensor, source: Tensor, scale: float, noise: Tensor | None) -> None:
        if noise is None:
            self._probe_noise.add([(target, source, scale)], self.eps)
        else:
            torch.add(source, noise, alpha=scale, out=target)

    def _apply_pending(self, unit: Unit) -> None:
        """theta_t from theta_{t-1}, unless this unit has had it."""
        if self._pending is None:
            return
        for name, parameter in unit.owned.items():
            if unit.name in self._pending.applied:
                self._update_noise.skip(parameter.data)
            else:
                decay = 0.0 if any(part in name for part in self.no_decay) else self.weight_decay
                self._update_noise.update(parameter.data, self._pending.lr, self._pending.g, decay)

    # ---- parameters that several places use ------------------------------------------------------

    def _make_twins(self, parameter: nn.Parameter) -> None:
        """Form theta + eps z and theta - eps z of a shared parameter side by side, both from one
        draw.
        """
        home = parameter.data
        self._twin_states[parameter] = self._probe_noise.state()
        plus = torch.empty_like(home)
        if self.probe == "inplace":
            minus = home
            self._probe_noise.add([(plus, home, 1.0), (home, plus, -2.0)], self.eps)
        else:
            minus = torch.empty_like(home)
            self._probe_noise.add([(plus, home, 1.0), (minus, home, -1.0)], self.eps)
        self._twins[parameter] = (home, plus, minus)
        self._show_twins()

    def _show_twins(self) -> None:
        """Bind the shared parameters to the copies of the forward that is running."""
        minus = self._lockstep.active >= self._plus
        for parameter, copies in self._twins.items():
            parameter.data = copies[2 if minus else 1]

    @_change_weights
    def _end_twins(self) -> None:
        """Restore the shared parameters."""
        for parameter, (home, _, _) in self._twins.items():
            parameter.data = home
            if self.probe == "inplace":
                self._probe_noise.restore(self._twin_states[parameter])
                self._probe_noise.add([(home, home, 1.0)], self.eps)
        self._twins.clear()
        self._twin_states.clear()
        if self._pending is not None:
            self._pending.applied.add(self._root.name)

    # ---- hooks -----------------------------------------------------------------------------------

    def _entered(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self._mode == "forward":
                self._enter_forward(unit)
            elif self._mode == "step":
                self._enter_step(unit)
            elif unit.block is not None and self._pager is not None:
                raise UserError(
                    "the model's blocks are away: call it through engine.step, engine.evaluate or"
                    " engine.forward"
                )

        return hook

    def _entered_child(self, unit: Unit, name: str) -> Callable[..., None]:
        """Refuses a part of a unit that runs while the unit does not, as the layers of an iterated
        list of lists would.
        """

        def hook(module: nn.Module, args: Any) -> None:
            needed = self._mode == "step" or (unit.block is not None and self._pager is not None)
            if needed and (self._visit is None or self._visit.unit is not unit):
                remedy = (
                    "call the model through the engine"
                    if self._mode is None
                    else f"choose blocks=[...] so that '{unit.name}' is called itself"
                )
                raise UserError(
                    f"'{unit.name}.{name}' runs outside '{unit.name}', whose weights are not there:"
                    f" {remedy}"
                )

        return hook

    def _left(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._mode == "forward":
                if unit.block is not None:
                    self._leave_forward()
            elif self._mode == "step":
                if self._lockstep.active == self._streams - 1:
                    if (
                        self._visit is not None
                        and self._visit.phase == "plus"
                        and self.probe == "inplace"
                    ):
                        # nobody runs there, but theta is to be restored by the same roundings as
                        # where somebody does
                        self._minus()
                    self._depart()
                self._lockstep.pause(unit.name)
                self._show_twins()

        return hook

    def _enter_step(self, unit: Unit) -> None:
        # An autocast context that the loss opens turns this on; it would serve the first forward's
        # casts of the weights to the second.
        torch.set_autocast_cache_enabled(False)
        if self._lockstep.active == 0:
            if self._visit is not None:
                raise UserError(
                    f"'{unit.name}' runs inside '{self._visit.unit.name}': what one block computes"
                    " must be a part of it"
                )
            if unit in self._visited and (
                unit.block is not None
                or not all(p in self._parts.shared for p in unit.parameters.values())
            ):
                remedy = (
                    "blocks cannot be shared across depth"
                    if unit.block is not None
                    else "name it in shared=[...]"
                )
                raise UserError(
                    f"one forward runs '{unit.name}' twice, which would perturb it twice: {remedy}"
                )
            if unit not in self._visited:
                self._follow_order(unit)
                self._claim(unit, [self._root, *self._visited])
                self._visited.append(unit)
                self._visit = self._arrive(unit)
                if self._plus == 0:
                    self._minus()
            else:
                self._visit = _Visit(unit)
        elif self._visit is None or self._visit.unit is not unit:
            raise UserError(DIFFERENT_PATHS)
        elif self._lockstep.active == self._plus:
            self._minus()

    def _enter_forward(self, unit: Unit) -> None:
        if unit.block is not None:
            self._visit = _Visit(unit)
            self._bind(unit)

    def _leave_forward(self) -> None:
        visit, self._visit = self._visit, None
        assert visit is not None
        self._unbind(visit.unit, write=False)

    @contextmanager
    def _change(self) -> Iterator[None]:
        """While weights change: Ctrl-C waits until the end, and any other exception is remembered
        as one in their midst.
        """
        interrupted: list[int] = []
        defer = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if defer:
            signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
        self._changing = True
        try:
            yield
            self._changing = False
        finally:
            if defer:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupted:
            raise KeyboardInterrupt

    def _forget_visit(self) -> None:
        """Give up what an unusable engine was doing; the weights are about to be replaced."""
        for parameter, (home, _, _) in self._twins.items():
            parameter.data = home
        if self._visit is not None:
            for parameter, home, _, _ in self._visit.tensors:
                parameter.data = home
        self._twins.clear()
        self._twin_states.clear()
        self._visit = None
        if self._pager is not None:
            self._pager.abandon()
            for block in range(len(self._tensors)):
                self._make_away(block)

    def _recover(self) -> None:
        """After an exception inside a step: take the perturbation away and finish the update that
        was under way.
        """
        if self._visit is not None:
            self._depart()
        self._end_twins()
        if self._order:
            self.flush()
        self._pending = None

    # ---- where blocks lie ------------------------------------------------------------------------

    def _bind(self, unit: Unit) -> None:
        """Bring a block to the device: its tensors become views into the slot."""
        if self._pager is None:
            return
        assert unit.block is not None
        slot = self._pager.acquire(unit.block)
        views = dict(
            zip(
                (f.name for f in self._layouts[unit.block].fields),
                self._layouts[unit.block].views(slot),
                strict=True,
            )
        )
        for name, tensor in self._tensors[unit.block].items():
            tensor.data = views[name]

    def _unbind(self, unit: Unit, write: bool) -> None:
        if self._pager is None:
            return
        assert unit.block is not None
        generator = None
        if self._stochastic and write:
            generator = torch.Generator(self.device).manual_seed(
                step_seed(self.seed, "rounding", self.steps, unit.block)
            )
        self._make_away(unit.block)
        self._pager.release(unit.block, write, generator)

    def _make_away(self, block: int) -> None:
        for tensor in self._tensors[block].values():
            tensor.data = _placeholder(tensor, self.device)

    @contextmanager
    def _at_home(self, unit: Unit, write: bool) -> Iterator[None]:
        """Inside, the unit's tensors hold their values."""
        if unit.block is None:
            yield
            return
        self._bind(unit)
        try:
            yield
        finally:
            self._unbind(unit, write)

    def _make_store(
        self,
        storage: "Literal['ram'] | Path",
        codecs: list[Codec],
        in_place: bool,
        drop_cache: bool,
        bucket: bool,
    ) -> RamStore | DiskStore:
        if storage == "ram":
            store = RamStore(codecs, pinned=self.device.type == "cuda", bucket=bucket)
            for index, tensors in enumerate(self._tensors):
                store.fill(index, {name: t.data for name, t in tensors.items()})
                self._make_away(index)
            return store
        path = Path(storage)
        if not in_place:
            if path.exists():
                raise UserError(
                    f"{path} exists: name a new file, or build the model on the meta device to"
                    " train this one in place"
                )
            resident = self._resident_state()
            fields = [Field(n, tuple(t.shape), t.dtype, True) for n, t in resident.items()]
            with SafetensorsWriter(
                path, fields + [f for c in codecs for f in c.stored.fields]
            ) as writer:
                for tensor in resident.values():
                    writer.write(tensor.data)
                for tensors, codec in zip(self._tensors, codecs, strict=True):
                    for f in codec.stored.fields:
                        writer.write(tensors[f.name].data)
        disk = DiskStore(path, codecs, self.device, drop_cache)
        for index in range(len(self._tensors)):
            self._make_away(index)
        return disk

    def _resident_state(self) -> dict[str, Tensor]:
        """Every saved tensor outside the blocks, tied ones once."""
        away = {name for tensors in self._tensors for name in tensors}
        distinct = {
            id(t): (n, t)
            for n, t in reversed(self.model.state_dict(keep_vars=True).items())
            if n not in away
        }
        return dict(reversed(distinct.values()))

    def _fields(self) -> list[Field]:
        """What `tensors` yields, without fetching it."""
        blocks = (item for tensors in self._tensors for item in tensors.items())
        return [
            Field(n, tuple(t.shape), t.dtype, True)
            for n, t in (*self._resident_state().items(), *blocks)
        ]

    def _place_resident(self) -> None:
        """Everything that does not travel goes to the device."""
        if self._pager is not None:
            travels = {id(tensor) for tensors in self._tensors for tensor in tensors.values()}
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                if id(tensor) not in travels:
                    tensor.data = tensor.data.to(self.device)

    def _aligned(self, tensor: Tensor) -> int:
        """What a tensor takes in one of the engine's buffers."""
        return round_up(tensor.numel() * tensor.element_size(), self._alignment)

    def _carve(self, buffer: Tensor | None, start: int, like: Tensor) -> tuple[Tensor, int]:
        """A view into `buffer` (bytes) at `start` with the shape and dtype of `like`, and where the
        next one begins.
        """
        assert buffer is not None
        view = (
            buffer[start : start + like.numel() * like.element_size()]
            .view(like.dtype)
            .view(like.shape)
        )
        return view, start + self._aligned(like)


class _Visit:
    """A unit on the device: its own parameters as (parameter, home, cached noise, work copy), and
    where the noise stream stood.
    """

    def __init__(self, unit: Unit):
        self.unit = unit
        self.tensors: list[tuple[nn.Parameter, Tensor, Tensor | None, Tensor | None]] = []
        self.state: Tensor | None = None
        self.began = 0.0
        self.phase: Literal["plus", "minus", "home"] = "home"


def _block_tensors(unit: Unit) -> dict[str, Tensor]:
    """Every tensor that travels with a block: what its state dict holds, tied tensors once. Other
    buffers stay on the device.
    """
    saved = unit.module.state_dict(prefix=f"{unit.name}.")
    named = (
        *unit.module.named_parameters(prefix=unit.name),
        *unit.module.named_buffers(prefix=unit.name),
    )
    return {name: tensor for name, tensor in named if name in saved}


def _writable(tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter) or tensor.requires_grad


def _adopt(
    model: nn.Module, blocks: dict[str, nn.Module], path: Path, device: torch.device
) -> None:
    """Take a model on the meta device off it: what lies outside the blocks gets its values from
    `path`, the blocks get placeholders.

    The Parameters are made anew, because torch does not let `.data` leave the meta device; tied
    ones stay tied.
    """
    inside = {id(m) for block in blocks.values() for m in block.modules()}
    made: dict[int, nn.Parameter] = {}
    file = SafetensorsReader(path)
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{key}" if prefix else key
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                if id(module) in inside:
                    value = _placeholder(parameter, device)
                elif name in file:
                    value = file.read(name).to(device, parameter.dtype)
                else:
                    raise UserError(
                        f"{path} holds no tensor '{name}'; it is not a checkpoint of this model"
                    )
                made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            module._parameters[key] = made[id(parameter)]


def _placeholder(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same shape and dtype that takes one element of memory; NaN, so that nobody
    computes with it unnoticed.
    """
    fill = float("nan") if tensor.dtype.is_floating_point else 0
    return torch.full((), fill, dtype=tensor.dtype, device=device).expand(tensor.shape)


def _indexed(device: torch.device) -> torch.device:
    """The same device with its number, which some of torch's functions want."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if device.type == "cuda" and device.index is None
        else device
    )
