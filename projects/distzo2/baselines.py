"""The obvious way to share out the two perturbed forwards, which lets the replicas drift apart."""

from projects.zo2 import ZO2
from projects.zo2.perturbation import Phase, Visit
from projects.zo2.walk import Walk


class _OwnSides(Walk):
    """Skips the perturbation of a side that does not run here."""

    def move(self, visit: Visit, phase: Phase) -> None:
        runs = {"plus": self._plus > 0, "minus": self._streams > self._plus, "home": True}
        if runs[phase]:
            super().move(visit, phase)


class NaiveRestore(ZO2):
    """Each rank makes only the perturbation it needs: one goes +eps z, -eps z and the other -eps z,
    +eps z.

    Both ways back round differently, so that the two ranks hold other weights after a step, and
    soon other gradients. Takes the arguments of `ZO2`.
    """

    walk_type = _OwnSides
