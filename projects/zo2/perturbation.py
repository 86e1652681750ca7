"""What a step does to the weights of a unit that is on the device: the pending update,
theta + eps z, theta - eps z, and back to theta.

The arithmetic of a visit, on tensors that are there. It knows nothing of forwards, of the order of
units, or of where a unit rests between its visits.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from projects.zo2.noise import Noise, Scratch, doubles_exactly
from projects.zo2.options import Options
from projects.zo2.storage import ALIGNMENT, round_up
from projects.zo2.units import Partition, Unit

Phase = Literal["plus", "minus", "home"]

# In place: by how many eps z the weights move from one phase to another.
_MOVES: dict[tuple[Phase, Phase], float] = {
    ("home", "plus"): 1.0,
    ("plus", "minus"): -2.0,
    ("minus", "home"): 1.0,
    ("plus", "home"): -1.0,
    ("home", "minus"): -1.0,
}


@dataclass
class Pending:
    """An update that has not reached all parameters. `applied` holds the units it has reached."""

    seed: int
    g: float
    lr: float
    applied: set[str] = field(default_factory=set)


class Visit:
    """A unit on the device: its own parameters as (parameter, home, cached noise, work copy), and
    where the noise stream stood.
    """

    def __init__(self, unit: Unit):
        self.unit = unit
        self.tensors: list[tuple[nn.Parameter, Tensor, Tensor | None, Tensor | None]] = []
        self.state: Tensor | None = None
        self.began = 0.0
        self.phase: Phase = "home"


class Perturbation:
    """The two noise streams of a step and the buffers they fill.

    Attributes:
        pending: the update that has not reached all parameters; None where there is none.
    """

    def __init__(self, parts: Partition, options: Options, device: torch.device):
        self.options = options
        self.pending: Pending | None = None
        self._shared, self._alignment = parts.shared, ALIGNMENT[device.type]
        units = (*parts.resident, *parts.blocks)
        trainable = {
            *parts.root.values(),
            *parts.shared,
            *(p for unit in units for p in unit.parameters.values()),
        }
        scratch = Scratch(device, max(p.numel() for p in trainable))
        self.probe_noise, self.update_noise = Noise(scratch), Noise(scratch)
        cache_noise = options.cache_noise and all(
            doubles_exactly(p.dtype) for unit in parts.blocks for p in unit.parameters.values()
        )

        def buffer(served: Iterable[Unit]) -> Tensor:
            nbytes = max(
                sum(self._aligned(p) for p in u.parameters.values() if p not in parts.shared)
                for u in served
            )
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

        self._cache = buffer(parts.blocks) if cache_noise else None
        self._work = buffer(units) if options.probe == "fresh" else None
        # shared parameter: (home, plus, minus)
        self._twins: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}
        self._twin_states: dict[nn.Parameter, Tensor] = {}

    def begin(self, seed: int) -> None:
        """Start the streams of a step: its own, and that of the update which is pending."""
        self.probe_noise.seed(seed)
        if self.pending is not None:
            self.update_noise.seed(self.pending.seed)

    def apply_pending(self, unit: Unit) -> None:
        """theta_t from theta_{t-1}, unless this unit has had it."""
        if self.pending is None:
            return
        for name, parameter in unit.owned.items():
            if unit.name in self.pending.applied:
                self.update_noise.skip(parameter.data)
            else:
                decay = self.options.decay(name)
                self.update_noise.update(parameter.data, self.pending.lr, self.pending.g, decay)

    def reached(self, unit: Unit) -> None:
        """The pending update has reached all of the unit."""
        if self.pending is not None:
            self.pending.applied.add(unit.name)

    # ---- a unit's own parameters -----------------------------------------------------------------

    def open(self, visit: Visit) -> None:
        """Draw what the visit needs; its unit is at theta, with the pending update in."""
        unit = visit.unit
        cached = unit.block is not None and self._cache is not None
        cache_at = work_at = 0
        for parameter in unit.owned.values():
            if parameter in self._shared:
                self.make_twins(parameter)
                continue
            home = parameter.data
            noise = work = None
            if cached:
                noise, cache_at = self._carve(self._cache, cache_at, home)
                self.probe_noise.draw(noise, self.options.eps)
            if self._work is not None:
                work, work_at = self._carve(self._work, work_at, home)
            visit.tensors.append((parameter, home, noise, work))
        visit.state = None if cached else self.probe_noise.state()

    def move(self, visit: Visit, phase: Phase) -> None:
        """Take the visiting unit's own parameters to theta + eps z, theta - eps z or back
        to theta.
        """
        if phase == visit.phase:
            return
        inplace = self.options.probe == "inplace"
        if visit.state is not None and (inplace or phase != "home"):
            self.probe_noise.restore(visit.state)
        for parameter, home, noise, work in visit.tensors:
            if inplace:
                self._add(home, home, _MOVES[visit.phase, phase], noise)
            elif phase == "home":
                parameter.data = home
            else:
                assert work is not None
                self._add(work, home, 1.0 if phase == "plus" else -1.0, noise)
                parameter.data = work
        visit.phase = phase

    def _add(self, target: Tensor, source: Tensor, scale: float, noise: Tensor | None) -> None:
        if noise is None:
            self.probe_noise.add([(target, source, scale)], self.options.eps)
        else:
            torch.add(source, noise, alpha=scale, out=target)

    # ---- parameters that several places use ------------------------------------------------------

    def make_twins(self, parameter: nn.Parameter) -> None:
        """Form theta + eps z and theta - eps z of a shared parameter side by side, both from one
        draw.
        """
        home = parameter.data
        self._twin_states[parameter] = self.probe_noise.state()
        plus = torch.empty_like(home)
        if self.options.probe == "inplace":
            minus = home
            self.probe_noise.add([(plus, home, 1.0), (home, plus, -2.0)], self.options.eps)
        else:
            minus = torch.empty_like(home)
            self.probe_noise.add([(plus, home, 1.0), (minus, home, -1.0)], self.options.eps)
        self._twins[parameter] = (home, plus, minus)

    def show_twins(self, minus: bool) -> None:
        """Bind the shared parameters to their copies at theta + eps z, or at theta - eps z."""
        for parameter, copies in self._twins.items():
            parameter.data = copies[2 if minus else 1]

    def end_twins(self) -> None:
        """Restore the shared parameters."""
        for parameter, (home, _, _) in self._twins.items():
            parameter.data = home
            if self.options.probe == "inplace":
                self.probe_noise.restore(self._twin_states[parameter])
                self.probe_noise.add([(home, home, 1.0)], self.options.eps)
        self._twins.clear()
        self._twin_states.clear()

    def forget(self, visit: Visit | None) -> None:
        """Bind all parameters to their homes again, whatever these hold now."""
        for parameter, (home, _, _) in self._twins.items():
            parameter.data = home
        if visit is not None:
            for parameter, home, _, _ in visit.tensors:
                parameter.data = home
        self._twins.clear()
        self._twin_states.clear()

    # ---- buffers ---------------------------------------------------------------------------------

    def _aligned(self, tensor: Tensor) -> int:
        """What a tensor takes in one of the buffers."""
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
