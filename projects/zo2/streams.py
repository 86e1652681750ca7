"""Several forwards of one unmodified model, in lockstep.

ZO2 needs the forwards at theta + eps z and at theta - eps z to pass through each block while it is
on the device. Rewriting the forward of every architecture would do; instead each forward runs as a
coroutine (a greenlet) of its own and pauses after every unit, so that the model's own code between
the units runs as it stands, for any architecture. All run in the calling thread.

What torch keeps per thread (gradient mode, autocast) would leak from one forward into another at a
pause, so it is saved and restored.
"""

from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from shared.errors import UserError

DIFFERENT_PATHS = (
    "the perturbed forwards took different paths through the model; its control flow depends on the"
    " data"
)


class Lockstep:
    """Runs closures side by side; each must call `pause(label)` the same number of times with the
    same labels.

    `active` is the index of the closure that is running.
    """

    def __init__(self) -> None:
        self.active = 0
        self._inference = False

    def pause(self, label: str) -> None:
        """End this closure's turn. Called from inside a closure."""
        # it cannot be switched at a pause, and would stay on afterwards
        if torch.is_inference_mode_enabled() != self._inference:
            raise UserError(
                "the loss must not enter torch.inference_mode; a step computes without gradients"
                " anyway"
            )
        parent = getcurrent().parent
        assert parent is not None
        parent.switch(label)

    def run(self, closures: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run all closures to their ends, a turn each round, and return their results.

        An exception in one of them unwinds the others and propagates. Raises UserError when the
        closures pause at different labels.
        """
        self._inference = torch.is_inference_mode_enabled()
        coroutines = [greenlet(closure) for closure in closures]
        for coroutine in coroutines:
            # a coroutine of its own would see none of the caller's context variables
            coroutine.gr_context = copy_context()
        contexts = [_torch_context() for _ in closures]
        outside = contexts[0]
        try:
            while True:
                turns: list[Any] = []
                for index, coroutine in enumerate(coroutines):
                    self.active = index
                    _set_torch_context(contexts[index])
                    turns.append(coroutine.switch())
                    contexts[index] = _torch_context()
                ended = [coroutine.dead for coroutine in coroutines]
                if all(ended):
                    return turns
                if any(ended) or any(turn != turns[0] for turn in turns):
                    raise UserError(DIFFERENT_PATHS)
        finally:
            for index, coroutine in enumerate(coroutines):
                if coroutine and not coroutine.dead:
                    self.active = index
                    coroutine.throw()
            _set_torch_context(outside)
            self.active = 0


_DEVICES = ("cpu", "cuda")


def _torch_context() -> tuple[Any, ...]:
    autocast = tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in _DEVICES
    )
    return torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), autocast


def _set_torch_context(context: tuple[Any, ...]) -> None:
    grad, cache, autocast = context
    torch.set_grad_enabled(grad)
    torch.set_autocast_cache_enabled(cache)
    for device, enabled, dtype in autocast:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
