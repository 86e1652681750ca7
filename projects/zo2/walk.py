"""The walk of a model's own forwards through its units: hooks that say when one is entered and
left, and what is done to it then.

All forwards of a step pass through a unit while it is on the device. At the first, the unit
*arrives* (it is uploaded and bound, the pending update is applied, it goes to theta + eps z); at
the first on the other side it goes to theta - eps z; after the last it *departs* (back to theta,
and offloaded). What cannot be walked so is refused here, by name.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from projects.zo2.changes import UNUSABLE, Changes
from projects.zo2.lanes import Span
from projects.zo2.perturbation import Perturbation, Phase, Visit
from projects.zo2.placement import Placement
from projects.zo2.streams import DIFFERENT_PATHS, Lockstep
from projects.zo2.units import Unit
from shared.errors import UserError


class Walk:
    """The units of one model in the order in which its forwards reach them.

    Attributes:
        root: the parameters of the model itself, which draw their noise first.
        units: all others by name.
        order: units in the order of the last step, `root` first; empty before the first step.
        visited: units that this step or forward has reached, without `root`.
        visit: what is on the device for a forward; None between units.
        mode: which walk is under way; None where nobody may run the model.
    """

    def __init__(
        self, placement: Placement, perturbation: Perturbation, changes: Changes, inplace: bool
    ):
        self.placement, self.perturbation, self.changes = placement, perturbation, changes
        self._inplace, parts = inplace, placement.parts
        self._shared = parts.shared
        self.root = Unit("", placement.model, parts.root, owned=dict(parts.root))
        self.units = {unit.name: unit for unit in (*parts.resident, *parts.blocks)}
        self.order: list[Unit] = []
        self.visited: list[Unit] = []
        self.visit: Visit | None = None
        self.mode: Literal["step", "forward"] | None = None
        self._lockstep = Lockstep()
        self._streams = self._plus = 1
        self._hooks: list[Any] = []
        for unit in self.units.values():
            self._attach(unit)

    # ---- whole walks -----------------------------------------------------------------------------

    def step(self, seed: int, forwards: Sequence[Callable[[], Tensor]], plus: int) -> list[Tensor]:
        """Run the forwards side by side, the first `plus` of them at theta + eps z and the others
        at theta - eps z; returns their losses, with all weights at theta.

        After an exception of a forward's own the weights are at theta, with the update in that was
        pending; after one amid a change of weights `changes` says that they are unusable.
        """
        self._plus, self._streams = plus, len(forwards)

        def shown(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                self.show_twins()
                return forward()

            return run

        try:
            self.begin(seed)
            self.mode = "step"
            losses = self._lockstep.run([shown(forward) for forward in forwards])
            self.mode = None
            self.follow_order(None)
            self.end_twins()
        except BaseException as error:
            self.mode = None
            if self.changes.under_way:
                self.changes.unusable = True
                error.add_note(UNUSABLE)
            else:
                self.changes.unusable = True  # unless recovering succeeds
                self._recover()
                self.changes.unusable = False
            raise
        self.order = [self.root, *self.visited]
        self.perturbation.pending = None
        return losses

    def forward(self, run: Callable[[], Any]) -> Any:
        """`run()`, inside which the model may run as often as it likes, at theta."""
        self.mode, self.visited = "forward", []
        try:
            return run()
        finally:
            self.mode = None
            if self.visit is not None:
                self._leave_forward()

    def again(self, seed: int) -> None:
        """A step without forwards, in the order of the last."""
        self.begin(seed)
        for unit in self.order[1:]:
            self.visit = self.arrive(unit)
            self.minus()
            self.depart()
        self.end_twins()

    def flush(self) -> None:
        """Apply the pending update to every parameter it has not reached."""
        pending = self.perturbation.pending
        if pending is None:
            return
        self.perturbation.update_noise.seed(pending.seed)
        for unit in self.order:
            if unit.name in pending.applied:
                self.perturbation.apply_pending(unit)
            else:
                with self.placement.at_home(unit, write=True):
                    self.perturbation.apply_pending(unit)
        self.perturbation.pending = None

    def take_order(self, names: Sequence[str]) -> None:
        """Make `names` the order of units. Raises UserError for a name that the model has not."""
        by_name = {"": self.root, **self.units}
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise UserError(
                f"the log names '{unknown[0]}', which this model does not have: it belongs to"
                " another model"
            )
        self.order = [by_name[name] for name in names]
        for place, unit in enumerate(self.order[1:], 1):
            self.claim(unit, self.order[:place])

    def forget(self) -> None:
        """Give up what an unusable engine was doing; the weights are about to be replaced."""
        self.perturbation.forget(self.visit)
        self.visit = None
        self.placement.abandon()

    @property
    def attached(self) -> bool:
        """Whether the model still has the hooks."""
        return bool(self._hooks)

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _recover(self) -> None:
        """After an exception inside a step: take the perturbation away and finish the update that
        was under way.
        """
        if self.visit is not None:
            self.depart()
        self.end_twins()
        if self.order:
            self.flush()
        self.perturbation.pending = None

    # ---- a visit ---------------------------------------------------------------------------------

    def claim(self, unit: Unit, earlier: Sequence[Unit]) -> None:
        """Let `unit` own those of its parameters that no earlier unit owns, shared ones first."""
        claimed = {p for other in earlier for p in other.owned.values()}
        mine = [(name, p) for name, p in unit.parameters.items() if p not in claimed]
        unit.owned = dict(sorted(mine, key=lambda item: item[1] not in self._shared))

    def follow_order(self, unit: Unit | None) -> None:
        """Before `unit` is visited, or at the end: if the last step went on with another unit,
        apply what is pending to all that it went on with, because its noise comes in that order and
        this step may not reach them.
        """
        with self.changes():
            left = self.order[len(self.visited) + 1 :]
            if self.perturbation.pending is None or (left[0] if left else None) is unit:
                return
            for late in left:
                with self.placement.at_home(late, write=True):
                    self.perturbation.apply_pending(late)
            self.perturbation.pending = None

    def begin(self, seed: int) -> None:
        """Start a step: the noise, and what is the model's own."""
        with self.changes():
            self.visited = []
            self.perturbation.begin(seed)
            self.perturbation.apply_pending(self.root)
            for parameter in self.root.parameters.values():
                self.perturbation.make_twins(parameter)
            self.show_twins()

    def arrive(self, unit: Unit) -> Visit:
        """The unit is on the device, at theta + eps z."""
        with self.changes():
            visit = Visit(unit)
            if unit.block is not None:
                self.placement.bind(unit)
            visit.began = time.perf_counter()
            self.perturbation.apply_pending(unit)
            self.perturbation.open(visit)
            self.show_twins()
            self.visit = visit
            self.move(visit, "plus")
            return visit

    def minus(self) -> None:
        """The visiting unit is at theta - eps z."""
        with self.changes():
            assert self.visit is not None
            self.move(self.visit, "minus")

    def depart(self) -> None:
        """The visiting unit is at theta; a block leaves the device."""
        with self.changes():
            visit, self.visit = self.visit, None
            assert visit is not None
            self.move(visit, "home")
            self.perturbation.reached(visit.unit)
            if visit.unit.block is not None:
                pager = self.placement.pager
                if pager is not None and pager.spans is not None:
                    pager.spans.append(
                        Span("compute", visit.unit.block, visit.began, time.perf_counter())
                    )
                self.placement.unbind(
                    visit.unit, write=self.placement.changes_something(visit.unit)
                )

    def move(self, visit: Visit, phase: Phase) -> None:
        """See `Perturbation.move`."""
        self.perturbation.move(visit, phase)

    def show_twins(self) -> None:
        """Bind the shared parameters to the copies of the forward that is running."""
        minus = self._lockstep.active >= self._plus
        self.perturbation.show_twins(minus)

    def end_twins(self) -> None:
        """Restore the shared parameters."""
        with self.changes():
            self.perturbation.end_twins()
            self.perturbation.reached(self.root)

    # ---- hooks -----------------------------------------------------------------------------------

    def _attach(self, unit: Unit) -> None:
        module = unit.module
        self._hooks.append(module.register_forward_pre_hook(self._entered(unit), prepend=True))
        self._hooks.append(module.register_forward_hook(self._left(unit)))
        for name, child in module.named_children():
            if any(
                unit.block is not None or (p.requires_grad and p not in self._shared)
                for p in child.parameters()
            ):
                self._hooks.append(
                    child.register_forward_pre_hook(self._entered_child(unit, name), prepend=True)
                )

    def _entered(self, unit: Unit) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            if self.mode == "forward":
                self._enter_forward(unit)
            elif self.mode == "step":
                self._enter_step(unit)
            elif unit.block is not None and self.placement.pager is not None:
                raise UserError(
                    "the model's blocks are away: call it through engine.step, engine.evaluate or"
                    " engine.forward"
                )

        return hook

    def _entered_child(self, unit: Unit, name: str) -> Callable[..., None]:
        """Refuses a part of a unit that runs while the unit does not, as the layers of an iterated
        list of lists would.
        """

        def hook(module: Any, args: Any) -> None:
            away = unit.block is not None and self.placement.pager is not None
            needed = self.mode == "step" or away
            if needed and (self.visit is None or self.visit.unit is not unit):
                remedy = (
                    "call the model through the engine"
                    if self.mode is None
                    else f"choose blocks=[...] so that '{unit.name}' is called itself"
                )
                raise UserError(
                    f"'{unit.name}.{name}' runs outside '{unit.name}', whose weights are not there:"
                    f" {remedy}"
                )

        return hook

    def _left(self, unit: Unit) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.mode == "forward":
                if unit.block is not None:
                    self._leave_forward()
            elif self.mode == "step":
                if self._lockstep.active == self._streams - 1:
                    if self.visit is not None and self.visit.phase == "plus" and self._inplace:
                        # nobody runs there, but theta is to be restored by the same roundings as
                        # where somebody does
                        self.minus()
                    self.depart()
                self._lockstep.pause(unit.name)
                self.show_twins()

        return hook

    def _enter_step(self, unit: Unit) -> None:
        # An autocast context that the loss opens turns this on; it would serve the first forward's
        # casts of the weights to the second.
        torch.set_autocast_cache_enabled(False)
        if self._lockstep.active == 0:
            self._refuse(unit)
            if unit not in self.visited:
                self.follow_order(unit)
                self.claim(unit, [self.root, *self.visited])
                self.visited.append(unit)
                self.visit = self.arrive(unit)
                if self._plus == 0:
                    self.minus()
            else:
                self.visit = Visit(unit)
        elif self.visit is None or self.visit.unit is not unit:
            raise UserError(DIFFERENT_PATHS)
        elif self._lockstep.active == self._plus:
            self.minus()

    def _refuse(self, unit: Unit) -> None:
        """Raises UserError where the first forward enters a unit that it may not."""
        if self.visit is not None:
            raise UserError(
                f"'{unit.name}' runs inside '{self.visit.unit.name}': what one block computes"
                " must be a part of it"
            )
        if unit in self.visited and (
            unit.block is not None or not all(p in self._shared for p in unit.parameters.values())
        ):
            remedy = (
                "blocks cannot be shared across depth"
                if unit.block is not None
                else "name it in shared=[...]"
            )
            raise UserError(
                f"one forward runs '{unit.name}' twice, which would perturb it twice: {remedy}"
            )

    def _enter_forward(self, unit: Unit) -> None:
        if unit.block is not None:
            self.visit = Visit(unit)
            self.placement.bind(unit)

    def _leave_forward(self) -> None:
        visit, self.visit = self.visit, None
        assert visit is not None
        self.placement.unbind(visit.unit, write=False)
