"""The perturbed forwards of a step: which of them this process runs, and what their losses come to.

ZO2 alone runs both sides and averages what it has. Several processes share the forwards out and
tell one another the losses: they give the engine an object of their own with these two members
(`projects.distzo2.ranks.Ranks`).
"""

from typing import Literal, Protocol

Side = Literal["plus", "minus"]


class Forwards(Protocol):
    """What an engine asks about the forwards at theta + eps z ("plus") and theta - eps z ("minus").

    `sides` are those that run here, in order: both, or one. The weights go through both
    perturbations in either case, so that they are restored by the same roundings everywhere.
    """

    @property
    def sides(self) -> tuple[Side, ...]: ...

    def agree(self, plus: list[float], minus: list[float]) -> tuple[float, float]:
        """The step's losses at theta + eps z and theta - eps z.

        Args:
            plus, minus: the losses of this process's micro-batches; empty for a side that does not
                run here.
        """
        ...


class BothHere:
    """One process: both sides, every micro-batch counts the same."""

    sides: tuple[Side, ...] = ("plus", "minus")

    def agree(self, plus: list[float], minus: list[float]) -> tuple[float, float]:
        """Means over the micro-batches."""
        return sum(plus) / len(plus), sum(minus) / len(minus)
