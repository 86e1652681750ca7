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

This module is what a user calls. What may be chosen stands in `options.py`, the walk through the
model in `walk.py`, what it does to weights in `perturbation.py`, where they lie in `placement.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from projects.zo2.changes import Changes
from projects.zo2.forwards import BothHere, Forwards
from projects.zo2.lanes import Span, Traffic
from projects.zo2.options import Options
from projects.zo2.perturbation import Pending, Perturbation
from projects.zo2.placement import Placement
from projects.zo2.storage import DiskStore, RamStore, SafetensorsReader, safetensors_writer
from projects.zo2.walk import Walk
from shared.errors import UserError
from shared.finite import check_trained
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


class ZO2:
    """Zeroth-order fine-tuning of `model` with its blocks on a host tier.

    Args:
        model: its parameters may be anywhere; with `storage` a path they may be on the meta device,
            and the file is then trained in place.
        forwards: who runs the forwards of a step and what their losses come to; default both here.
        options: fields of `Options`, by name.

    Attributes:
        steps: how many steps have been made.

    Raises UserError for a model it cannot take apart and for options that contradict each other.
    """

    walk_type: type[Walk] = Walk

    def __init__(self, model: nn.Module, *, forwards: Forwards | None = None, **options: Any):
        self.model, self.options = model, Options(**options)
        self.forwards: Forwards = BothHere() if forwards is None else forwards
        self.steps = 0
        self._placement = Placement(
            model,
            self.options,
            lambda block: step_seed(self.options.seed, "rounding", self.steps, block),
        )
        self._perturbation = Perturbation(
            self._placement.parts, self.options, self._placement.device
        )
        self._training = {module: module.training for module in model.modules()}
        model.eval()  # a dropout that differs between the two forwards would be read as a gradient
        config = getattr(model, "config", None)
        self._use_cache = getattr(config, "use_cache", None)
        if self._use_cache is not None:
            config.use_cache = False
        self._changes = Changes()
        self._walk = self.walk_type(
            self._placement, self._perturbation, self._changes, self.options.probe == "inplace"
        )

    # ---- training --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, batch: Any, *, seed: int | None = None, lr: float | None = None) -> Step:
        """One training step on `batch`, or on a list of micro-batches whose losses are averaged
        (the blocks still travel once).

        The update it finds is pending until the next step or `flush`. An exception inside the model
        or the loss, Ctrl-C among them, leaves the weights unperturbed and nothing pending. One
        inside the engine itself (out of memory, a file that cannot be read) may leave the weights
        between two values: the engine then refuses to go on until `load`.
        """
        self._check_usable()
        if isinstance(batch, list) and any(isinstance(part, Tensor) for part in batch):
            raise UserError(
                "a list is a list of micro-batches; a batch of several tensors must be a tuple or a"
                " dictionary"
            )
        micro_batches = batch if isinstance(batch, list) else [batch]
        if not micro_batches:
            raise UserError("a step needs at least one micro-batch")
        seed = step_seed(self.options.seed, self.steps) if seed is None else seed
        lr = self.options.rate(self.steps) if lr is None else lr
        if not math.isfinite(lr):
            raise UserError(f"the learning rate of step {self.steps} is {lr}; it must be a number")
        self.model.eval()
        sides = self.forwards.sides
        plus_count = len(micro_batches) if "plus" in sides else 0
        losses = self._walk.step(
            seed, [partial(self._loss, part) for _ in sides for part in micro_batches], plus_count
        )
        values = [loss.item() for loss in losses]
        agreed = self.forwards.agree(values[:plus_count], values[plus_count:])
        plus, g = self._projected_gradient(*agreed, losses[0])
        self._perturbation.pending = Pending(seed, g, lr) if math.isfinite(g) else None
        result = Step(self.steps, plus, g, lr, seed)
        self.steps += 1
        return result

    @torch.no_grad()
    def flush(self) -> None:
        """Apply the pending update to every parameter it has not reached. Without effect when
        nothing is pending.
        """
        self._walk.flush()

    @torch.no_grad()
    def replay(self, steps: Sequence[Step], order: Sequence[str]) -> None:
        """Do again what `steps` did to the weights, without data or forwards: the weights end bit
        for bit where the run ended.

        Args:
            order: the run's `order`. Raises UserError for a unit that this model has not.
        """
        self._walk.take_order(order)
        for step in steps:
            self._walk.again(step.seed)
            self._perturbation.pending = (
                None if step.skipped else Pending(step.seed, step.projected_gradient, step.lr)
            )
            self.steps = step.number + 1

    @property
    def order(self) -> list[str]:
        """Names of the units in the order in which they draw their noise; empty before the first
        step.
        """
        return [unit.name for unit in self._walk.order]

    def parameter_order(self) -> list[str]:
        """Names of the trainable parameters in the order in which they draw their noise; a plain
        MeZO that is to be equal must use it.
        """
        return [name for unit in self._walk.order for name in unit.owned]

    # ---- running the model -----------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, run: Callable[[nn.Module], Any]) -> Any:
        """`run(model)` with the current weights; a pending update is applied first.

        May run the model several times, as a generation does. Gives the same result when called
        twice.
        """
        self._check_usable()
        self.flush()
        self.model.eval()
        return self._walk.forward(lambda: run(self.model))

    def evaluate(self, batch: Any) -> float:
        """The loss on `batch` at the current weights."""
        return self.forward(lambda model: self._loss(batch).item())

    def _loss(self, batch: Any) -> Tensor:
        return self.options.loss(self.model, batch).detach().clone()

    def _projected_gradient(self, plus: float, minus: float, like: Tensor) -> tuple[float, float]:
        """The loss at theta + eps z and (plus - minus) / (2 eps), both rounded as MeZO's are: in
        the dtype, and on the device, of `like`, a loss.
        """
        losses = torch.tensor([plus, minus], dtype=like.dtype, device=like.device)
        return losses[0].item(), ((losses[0] - losses[1]) / (2 * self.options.eps)).item()

    # ---- what it is and has done -----------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._placement.device

    @property
    def traffic(self) -> Traffic:
        """Bytes moved so far, once the lanes have come to rest."""
        pager = self._placement.pager
        if pager is None:
            return Traffic()
        pager.settle()
        return pager.traffic

    @property
    def spans(self) -> list[Span]:
        """What each lane did, where `trace` is on."""
        pager = self._placement.pager
        return (pager.spans or []) if pager else []

    @property
    def slot_pointers(self) -> set[int]:
        """Addresses of all device buffers that have ever held a block."""
        pager = self._placement.pager
        return set() if pager is None else set(pager.pointers)

    @property
    def store(self) -> RamStore | DiskStore | None:
        """The host tier; None where no block leaves the device."""
        pager = self._placement.pager
        return None if pager is None else pager.store

    @property
    def host_nbytes(self) -> int:
        """What the blocks take on the host tier."""
        store = self.store
        return 0 if store is None else store.nbytes

    def exchange_slices(
        self, place: int, ranks: int, complete: Callable[[int, Tensor], None]
    ) -> None:
        """From now on move only one of equal slices of each block over the link to the host, and
        get the others elsewhere.

        Args:
            place, ranks: which of how many slices.
            complete: `complete(block, buffer)` brings the other slices into `buffer`; the own one
                is in it, at its place. It runs on a lane of its own.

        The host tier must be a file.
        """
        pager = self._placement.pager
        assert pager is not None
        assert isinstance(pager.store, DiskStore)
        pager.store.part = (place, ranks)
        longest = max(pager.store.slice_nbytes(b) for b in range(len(pager.store.codecs)))
        pager.exchange_through(complete, ranks * longest)

    # ---- weights in and out ----------------------------------------------------------------------

    def tensors(self, flush: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Name and current value of every parameter and saved buffer, tied ones once; a value is
        valid until the next is asked for. Without `flush` the update of the last step may be
        missing.
        """
        if flush:
            self.flush()
        yield from self._placement.tensors()

    def finite_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As `tensors`. Raises UserError at the first one that holds NaN or infinity."""
        for name, tensor in self.tensors():
            check_trained([(name, tensor)])
            yield name, tensor

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of every tensor, in memory. For a model that does not fit there, use `save`."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors()}

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the weights to a safetensors file, block by block; `path` appears when it
        is whole.

        Raises UserError when one of them is not finite, or no space is left.
        """
        with safetensors_writer(path, self._placement.fields(), metadata) as writer:
            for _, tensor in self.finite_tensors():
                writer.write(tensor)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take the weights from a safetensors file that `save` wrote; a pending update is
        forgotten.

        Raises UserError where the file does not fit the model.
        """
        self._perturbation.pending = None
        if self._changes.unusable:
            self._walk.forget()
        file = SafetensorsReader(path)
        wanted = {f.name for f in self._placement.fields()}
        if file.names() != wanted:
            odd = sorted(file.names() ^ wanted)[0]
            raise UserError(
                f"{path} does not fit the model: '{odd}' is only in"
                f" {'the file' if odd in file else 'the model'}"
            )
        self._placement.fill(file)
        self._changes.renewed()

    def write_resident(self) -> None:
        """Make a file that is trained in place a whole checkpoint: the blocks are in it after a
        flush, what stays on the device is not.
        """
        self.flush()
        self._placement.write_resident()

    def unwrap(self) -> nn.Module:
        """Apply what is pending, bring the blocks back to where the model was before, and return
        it.
        """
        self._check_usable()
        self.flush()
        self._placement.bring_home(self.close)
        return self.model

    def close(self) -> None:
        """Let go of the model, the lanes and the file, without bringing the blocks back."""
        self._walk.detach()
        pager = self._placement.pager
        if pager is not None:
            if self._changes.unusable:
                pager.abandon()
            pager.close()
        for module, training in self._training.items():
            module.training = training
        if self._use_cache is not None:
            self.model.config.use_cache = self._use_cache

    def _check_usable(self) -> None:
        if not self._walk.attached:
            raise UserError("this engine has let go of the model (unwrap or close): make a new one")
        self._changes.check()
