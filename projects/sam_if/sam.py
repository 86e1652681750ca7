"""Sharpness-aware minimisation (Foret et al. 2021) around any optimizer of torch.

The gradient is taken at w + rho g / |g|, where g is the gradient at w, and is applied to w. As in
the original algorithm the perturbation is a constant of the step: nothing is differentiated through
it. ASAM, which measures the perturbation in units of |w|, is not here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from shared.errors import UserError

# added to |g|, so that a gradient of 0 perturbs nothing; the estimators differentiate the same
# formula
TINY = 1e-12


class SAM(Optimizer):
    """A base optimizer that is given the gradient at the perturbed point.

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1,
        momentum=0.9)

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    or, by hand, `loss(...).backward(); optimizer.first_step(zero_grad=True); loss(...).backward();
    optimizer.second_step(zero_grad=True)`. Weight decay belongs to the base optimizer: it is not
    part of the gradient that perturbs.

    Args:
        base_optimizer: a class of torch.optim, or another with its signature; `options` are its
            own.
        rho: length of the perturbation, over all parameters together; may differ by parameter
            group.
        model: where its BatchNorm layers are. Their running statistics then come from the first
            pass alone; the second, at weights that nobody will use, leaves them as they are.
            Without BatchNorm it is not needed.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        model: nn.Module | None = None,
        **options: Any,
    ):
        if not 0 <= rho < float("inf"):
            raise UserError(f"rho must be a number of at least 0, not {rho:g}")
        super().__init__(params, {"rho": rho, **options})
        self.base = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base.param_groups
        self.defaults.update(self.base.defaults)
        self._norms = [
            one
            for one in (model.modules() if model is not None else ())
            if isinstance(one, _BatchNorm)
        ]
        self._paused: list[_BatchNorm] = []
        self._moved: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """From w, whose gradients are in `.grad`, to w + rho g / |g|."""
        if self._moved:
            raise UserError("first_step was called twice; second_step comes after it")
        given = [
            (group, one)
            for group in self.param_groups
            for one in group["params"]
            if one.grad is not None
        ]
        if not given:
            raise UserError("no parameter has a gradient; call backward before the step")
        size = torch.stack([one.grad.norm() for _, one in given]).norm()
        if not size.isfinite():
            raise UserError(
                f"the gradient's norm is {float(size)}; look at the data, or take a smaller"
                " learning rate"
            )
        for group, one in given:
            self._moved.append((one, one.clone()))
            one.add_(one.grad * (group["rho"] / (size + TINY)).to(one))
        self._pause_statistics()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Back to w, and a step of the base optimizer with the gradients that are in
        `.grad` now.
        """
        self._back()
        self.base.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, *closures: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """A whole step. A closure clears the gradients, computes a loss, calls backward and returns
        the loss.

        Several closures are the parts of one batch, each with a perturbation of its own
        (m-sharpness); the step is taken with the mean of their gradients. Returns the mean loss at
        w.
        """
        if not closures:
            raise UserError(
                "SAM needs the loss twice a step: give step() a closure, or call first_step and"
                " second_step"
            )
        losses, total = [], {}
        for closure in closures:
            with torch.enable_grad():
                losses.append(closure().detach())
            self.first_step()
            try:
                with torch.enable_grad():
                    closure()
            finally:
                self._back()
            for one in (
                one
                for group in self.param_groups
                for one in group["params"]
                if one.grad is not None
            ):
                share = one.grad / len(closures)
                total[one] = total[one] + share if one in total else share
        for one, gradient in total.items():
            one.grad = gradient
        self.base.step()
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        """That of the base optimizer; SAM has no state of its own between steps."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups

    def _pause_statistics(self) -> None:
        self._paused = [one for one in self._norms if one.track_running_stats]
        for one in self._paused:
            one.track_running_stats = False  # in train mode it goes on normalising by the batch

    def _back(self) -> None:
        if not self._moved:
            raise UserError("second_step comes after first_step")
        for one, before in self._moved:
            one.copy_(before)
        for norm in self._paused:
            norm.track_running_stats = True
        self._moved, self._paused = [], []
