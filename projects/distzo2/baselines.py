"""The obvious way to share out the two perturbed forwards, which lets the replicas drift apart."""

from typing import Any

from projects.zo2 import ZO2


class NaiveRestore(ZO2):
    """Each rank makes only the perturbation it needs: one goes +eps z, -eps z and the other -eps z,
    +eps z.

    Both ways back round differently, so that the two ranks hold other weights after a step, and
    soon other gradients.
    """

    def _move(self, visit: Any, phase: Any) -> None:
        if phase == "home" or phase in self.sides:
            super()._move(visit, phase)
