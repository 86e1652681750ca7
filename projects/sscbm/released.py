"""Three faults of the authors' code, to show what they do. Nothing but the ablation uses this.

1. Neighbours are found among annotated images, and their numbers there are then taken for rows of
   the whole set: concepts come from unrelated images, annotated or not.
2. Weights sum to 1, and the sum is divided by K once more: no pseudo label exceeds 1 / K.
3. RandInt gives the true concepts of images that are not annotated.

Whoever calls this hands over the hidden truth, which no other function takes.
"""

from dataclasses import dataclass

from torch import Tensor

from projects.sscbm.pseudo import nearest, weights_of
from projects.sscbm.training import Data, Objective


def released_pseudo_labels(
    features: Tensor, truth: Tensor, annotated: Tensor, k: int, *, index: bool, twice: bool
) -> Tensor:
    """Pseudo labels [n, c] with the first fault, the second, or both.

    Args:
        features: [n, d].
        truth: [n, c], also of images that are not annotated.
        annotated: rows of those that are.
    """
    distances, places = nearest(features, features[annotated], k)
    values = truth[places if index else annotated[places]]
    mixed = (weights_of(distances).float().unsqueeze(2) * values).sum(1)
    return (mixed / k if twice else mixed).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class LeakedData(Data):
    """With the truth [n, k] of all images as one more column."""

    truth: Tensor

    @property
    def columns(self) -> tuple[Tensor, ...]:
        return (*super().columns, self.truth)


class LeakingObjective(Objective):
    """RandInt by the truth, of whichever image."""

    def __call__(self, *columns: Tensor) -> Tensor:
        *seen, self._truth = columns
        return super().__call__(*seen)

    def randint(self, concepts: Tensor) -> Tensor | None:
        return super().randint(self._truth)


def leaked(data: Data, truth: Tensor) -> LeakedData:
    return LeakedData(data.images, data.labels, data.concepts, data.pseudo, truth)
