"""What ZO2 is compared with besides MeZO: the same offloading without its ideas, and first-order
training.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from projects.zo2.engine import ZO2, Step
from projects.zo2.mezo import Loss, model_loss
from projects.zo2.units import Unit
from projects.zo2.walk import Walk
from shared.seeding import step_seed


class _ThreePasses(Walk):
    """In a forward, moves each unit by `scale` eps z as it is reached, and writes it back so."""

    scale: float | None = None

    def shifted(self, seed: int, scale: float, forward: Callable[[], Tensor]) -> Tensor:
        """`forward()` with every unit moved by `scale` eps z of `seed` for good."""
        self.perturbation.probe_noise.seed(seed)
        self.scale, self.mode, self.visited = scale, "forward", []
        self.shift(self.root)
        loss = forward()
        self.scale = self.mode = None
        return loss

    def shift(self, unit: Unit) -> None:
        """Move a unit that is on the device."""
        assert self.scale is not None
        for parameter in unit.owned.values():
            self.perturbation.probe_noise.add(
                [(parameter.data, parameter.data, self.scale)], self.perturbation.options.eps
            )

    def _enter_forward(self, unit: Unit) -> None:
        super()._enter_forward(unit)
        if self.scale is not None and unit not in self.visited:
            self.claim(unit, [self.root, *self.visited])
            self.visited.append(unit)
            self.shift(unit)

    def _leave_forward(self) -> None:
        visit, self.visit = self.visit, None
        assert visit is not None
        self.placement.unbind(visit.unit, write=self.scale is not None)


class NaiveOffload(ZO2):
    """MeZO's own three passes over blocks that are away: perturb and forward, perturb and forward,
    restore and update.

    Every block goes up and down three times a step. Takes the arguments of `ZO2` (with
    `probe="inplace"`).
    """

    walk_type = _ThreePasses

    @torch.no_grad()
    def step(self, batch: Any, *, seed: int | None = None, lr: float | None = None) -> Step:
        walk, noise = self._walk, self._perturbation
        assert isinstance(walk, _ThreePasses)
        seed = step_seed(self.options.seed, self.steps) if seed is None else seed
        lr = self.options.rate(self.steps) if lr is None else lr
        losses = [walk.shifted(seed, scale, lambda: self._loss(batch)) for scale in (1.0, -2.0)]
        plus, g = self._projected_gradient(*(loss.item() for loss in losses), losses[0])
        walk.order = [walk.root, *walk.visited]
        noise.probe_noise.seed(seed)
        noise.update_noise.seed(seed)
        for unit in walk.order:
            with self._placement.at_home(unit, write=True):
                for name, parameter in unit.owned.items():
                    noise.probe_noise.add([(parameter.data, parameter.data, 1.0)], self.options.eps)
                    noise.update_noise.update(parameter.data, lr, g, self.options.decay(name))
        result = Step(self.steps, plus, g, lr, seed)
        self.steps += 1
        return result


class FirstOrder:
    """Backpropagation with SGD or AdamW on the trainable parameters."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        lr: float,
        loss: Loss = model_loss,
    ):
        self.model, self.loss = model.eval(), loss
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)

    def step(self, batch: Any) -> float:
        """One step; returns the loss before it."""
        loss = self.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())
