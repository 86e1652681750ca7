"""Principal components of the training images, and standardisation by them."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from shared.errors import UserError

Sign = Literal["largest", "sum", "solver"]


@dataclass(frozen=True, eq=False)
class Projection:
    """Rows x [n, d] -> (x - mean) @ components, [n, k].

    Numpy arrays or float64 tensors, as those that it was fitted to.

    Attributes:
        mean: [d] of the training rows.
        components: [d, k], orthonormal, the direction of the greatest variance first.
    """

    mean: Any
    components: Any

    def __call__(self, x: Any) -> Any:
        return (x - self.mean) @ self.components

    @classmethod
    def fit(
        cls,
        train: Any,
        dimensions: int,
        sign: Sign = "largest",
        gram: Literal["features", "smaller"] = "smaller",
    ) -> "Projection":
        """The first components of training rows [n, d] in float64.

        Each paper's numbers were made with its own choices of the last two arguments, and in numpy
        or torch, so these are kept to the last bit.

        Args:
            sign: what is made positive, as an eigenvector has no sign of its own: its largest
                entry, the sum of its entries, or nothing ("solver").
            gram: "smaller" takes the eigenvectors of the smaller of the two Gram matrices and
                leaves out directions in which the rows do not differ, so that there may be fewer
                than `dimensions`; "features" takes those of [d, d].

        Raises:
            UserError: there cannot be so many components, in "features"; there are none to find.
        """
        most = min(train.shape) if gram == "features" else dimensions
        if not 0 < dimensions <= most:
            raise UserError(
                f"{dimensions} components cannot be had of {train.shape[0]} samples of"
                f" {train.shape[1]} numbers"
            )
        library: ModuleType = torch if isinstance(train, torch.Tensor) else np
        mean = train.mean(0)
        centred = train - mean
        wide = gram == "smaller" and train.shape[0] < train.shape[1]
        # numpy multiplies an array by its own transpose in another order than by a copy's, and
        # the numbers of each paper were made with one of the two
        other = centred if gram == "smaller" else train - mean
        values, vectors = library.linalg.eigh(centred @ other.T if wide else centred.T @ other)
        kept = dimensions
        if gram == "smaller":
            kept = min(dimensions, int((values > 1e-9 * values[-1]).sum()))
        basis = library.flip(vectors, (1,))[:, :kept]
        if wide:
            basis = centred.T @ basis / library.sqrt(library.flip(values, (0,))[:kept])
        if sign == "largest":
            places = library.abs(basis).argmax(0)
            basis = basis * library.sign(basis[places, library.arange(kept)])
        elif sign == "sum":
            basis = basis * library.sign(basis.sum(0))
        return cls(mean, basis)


@dataclass(frozen=True, eq=False)
class Standardisation:
    """Images [n, c, h, w] -> shifted and scaled by the training images' mean and deviation in each
    channel, which are [1, c, 1, 1].
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.deviation

    @classmethod
    def fit(cls, train: torch.Tensor) -> "Standardisation":
        """Of training images [n, c, h, w]; a channel that is constant is only shifted."""
        mean, deviation = (
            train.mean((0, 2, 3), keepdim=True),
            train.std((0, 2, 3), keepdim=True),
        )
        return cls(mean, torch.where(deviation > 0, deviation, 1))
