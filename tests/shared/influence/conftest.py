"""Small problems on the digits, in float64: a convex one with its exact optimum, and a net of 213
parameters that is at none.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from shared.influence import retrain
from shared.influence.objective import Objective
from shared.influence.params import Parameters

torch.set_num_threads(1)


@dataclass(frozen=True, eq=False)
class Problem:
    """A model with its objective at w, and some samples that it was not trained on."""

    model: nn.Module
    parameters: Parameters
    objective: Objective
    w: Tensor
    query: tuple[Tensor, Tensor]

    def train(self, weights: Tensor) -> retrain.Root:
        """The optimum for other weights of the samples, from w on. Its objective is written out, so
        that no estimator's code is used.
        """
        x, y = self.objective.data
        l2 = self.objective.l2

        def loss(w: Tensor) -> Tensor:
            losses = F.cross_entropy(self.parameters.call(w, x), y, reduction="none")
            return (weights * losses).sum() / len(y) + l2 / 2 * (w @ w)

        return retrain.minimise(loss, self.w, tol=1e-11)

    def metric(self, w: Tensor) -> Tensor:
        """The loss of each query sample, [q]."""
        return F.cross_entropy(
            self.parameters.call(w, self.query[0]), self.query[1], reduction="none"
        )


def digits(features: int, classes: int, n: int) -> tuple[Tensor, Tensor]:
    images, labels = load_digits(n_class=classes, return_X_y=True)
    small = PCA(features, random_state=0).fit_transform(images / 16)[:n]
    return torch.from_numpy(small), torch.from_numpy(labels[:n]).long()


def make(
    model: nn.Module, features: int, classes: int, n: int, l2: float, chunk: int | None
) -> Problem:
    x, y = digits(features, classes, n + 5)
    parameters = Parameters.of(model.double().eval())
    objective = Objective.of_outputs(
        lambda w, data: parameters.call(w, data[0]),
        lambda z, data: F.cross_entropy(z, data[1], reduction="none"),
        (x[:n], y[:n]),
        l2=l2,
        chunk=chunk,
    )
    return Problem(model, parameters, objective, parameters.flat(), (x[n:], y[n:]))


@cache
def _convex() -> Problem:
    torch.manual_seed(0)
    start = make(nn.Linear(6, 4), 6, 4, 61, 0.03, 17)
    return Problem(
        start.model, start.parameters, start.objective, start.train(torch.ones(61)).w, start.query
    )


@cache
def _net() -> Problem:
    torch.manual_seed(1)
    return make(
        nn.Sequential(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 5)),
        7,
        5,
        53,
        0.02,
        20,
    )


@pytest.fixture
def convex() -> Problem:
    """Softmax regression, 28 parameters, at its optimum."""
    return _convex()


@pytest.fixture
def net() -> Problem:
    """A tanh net, 213 parameters, at its initial values."""
    return _net()
