"""What ZO2 is compared with besides MeZO: the same offloading without its ideas, and first-order
training.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from projects.zo2.engine import ZO2, Step
from projects.zo2.mezo import Loss, model_loss
from projects.zo2.units import Unit
from shared.seeding import step_seed


class NaiveOffload(ZO2):
    """MeZO's own three passes over blocks that are away: perturb and forward, perturb and forward,
    restore and update.

    Every block goes up and down three times a step. Takes the arguments of `ZO2` (with
    `probe="inplace"`).
    """

    _scale: float | None = None

    @torch.no_grad()
    def step(self, batch: Any, *, seed: int | None = None, lr: float | None = None) -> Step:
        seed = step_seed(self.seed, self.steps) if seed is None else seed
        if lr is None:
            lr = self.lr(self.steps) if callable(self.lr) else self.lr
        plus, minus = self._pass(batch, seed, 1.0), self._pass(batch, seed, -2.0)
        g = (plus - minus) / (2 * self.eps)
        self._order = [self._root, *self._visited]
        self._probe_noise.seed(seed)
        self._update_noise.seed(seed)
        for unit in self._order:
            with self._at_home(unit, write=True):
                for name, parameter in unit.owned.items():
                    self._probe_noise.add([(parameter.data, parameter.data, 1.0)], self.eps)
                    decay = (
                        0.0 if any(part in name for part in self.no_decay) else self.weight_decay
                    )
                    self._update_noise.update(parameter.data, lr, g, decay)
        result = Step(self.steps, plus, g, lr, seed)
        self.steps += 1
        return result

    def _pass(self, batch: Any, seed: int, scale: float) -> float:
        self._probe_noise.seed(seed)
        self._scale, self._mode, self._visited = scale, "forward", []
        self._shift(self._root)
        loss = float(self.loss(self.model, batch).item())
        self._scale = self._mode = None
        return loss

    def _enter_forward(self, unit: Unit) -> None:
        super()._enter_forward(unit)
        if self._scale is not None and unit not in self._visited:
            self._claim(unit, [self._root, *self._visited])
            self._visited.append(unit)
            self._shift(unit)

    def _leave_forward(self) -> None:
        visit, self._visit = self._visit, None
        assert visit is not None
        self._unbind(visit.unit, write=self._scale is not None)

    def _shift(self, unit: Unit) -> None:
        assert self._scale is not None
        for parameter in unit.owned.values():
            self._probe_noise.add([(parameter.data, parameter.data, self._scale)], self.eps)


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
