"""Small problems in odd sizes, in float64, and SAM written a second time: naive loops over samples,
nothing of the library's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from projects.sam_if import SAMProblem, fit, partition
from shared.influence.objective import Objective
from shared.influence.params import Parameters

torch.set_num_threads(1)

N, D, CLASSES = 31, 5, 3


@dataclass(frozen=True, eq=False)
class Made:
    """A SAM problem with its model's outputs, its solution w, and a metric on other samples."""

    problem: SAMProblem
    outputs: Callable[[Tensor, Tensor], Tensor]
    parameters: Parameters
    w: Tensor
    metric: Callable[[Tensor], Tensor]

    def losses(self, w: Tensor) -> Tensor:
        """l_i(w), one sample after the other."""
        x, y = self.problem.objective.data
        return torch.stack(
            [cross_entropy(self.outputs(w, x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
        )


def data(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes, so that no model fits all."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=draw)
    centres = torch.randn(
        CLASSES, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64
    )
    return centres[y] + torch.randn(n, D, generator=draw, dtype=torch.float64), y


def objective_of(
    model: nn.Module, n: int = N, l2: float = 0.02, **options
) -> tuple[Objective, Parameters]:
    parameters = Parameters.of(model.eval(), dtype=torch.float64)
    objective = Objective.of_outputs(
        lambda w, part: parameters.call(w, part[0]),
        lambda z, part: cross_entropy(z, part[1], reduction="none"),
        data(n),
        l2,
        **options,
    )
    return objective, parameters


def make(
    rho: float = 0.3, batches: int | None = None, hidden: int | None = None, **options
) -> Made:
    """Softmax regression, or a tanh network with `hidden` units, at SAM's fixed point."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = (
            [nn.Linear(D, CLASSES)]
            if hidden is None
            else [nn.Linear(D, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)]
        )
        model = nn.Sequential(*layers).double()
    objective, parameters = objective_of(model, l2=0.02 if hidden is None else 0.05, **options)
    problem = SAMProblem(
        objective, rho, None if batches is None else partition(objective.n, batches, seed=1)
    )
    w = fit(problem, parameters.flat(), tol=1e-13).w
    x, y = data(4, seed=5)

    def metric(at: Tensor) -> Tensor:
        return cross_entropy(parameters.call(at, x), y)

    return Made(problem, lambda at, inputs: parameters.call(at, inputs), parameters, w, metric)


@pytest.fixture(scope="session")
def convex() -> Made:
    return make()


@pytest.fixture(scope="session", params=["full", "batch", "chunked", "network"])
def case(request: pytest.FixtureRequest) -> Made:
    options = {
        "full": {},
        "batch": {"batches": 7},
        "chunked": {"chunk": 9},
        "network": {"hidden": 4, "rho": 0.1},
    }
    return make(**options[request.param])


# ---- the same a second time ----------------------------------------------------------------------


def naive_field(made: Made, w: Tensor, weights: Tensor | None = None) -> Tensor:
    """F(w) by autograd's backward over a sum of single samples' losses."""
    n = made.problem.objective.n
    m = torch.ones(n, dtype=torch.float64) if weights is None else weights
    batches = made.problem.batches or (torch.arange(n),)
    total = made.problem.objective.l2 * w
    for rows in batches:
        at = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(
            (m * made.losses(at))[rows].sum() / len(rows), at, create_graph=w.requires_grad
        )
        there = w + made.problem.rho * g / (g.norm() + 1e-12)
        there = there if w.requires_grad else there.detach().requires_grad_()
        (slope,) = torch.autograd.grad(
            (m * made.losses(there))[rows].sum() / len(rows), there, create_graph=w.requires_grad
        )
        total = total + len(rows) / n * slope
    return total


def solve_again(made: Made, weights: Tensor) -> Tensor:
    """The fixed point with other weights of the samples: steps on the naive F with one Jacobian of
    finite differences.
    """
    if made not in _JACOBIANS:
        h, eye = 1e-6, torch.eye(made.w.numel(), dtype=torch.float64)
        columns = [
            (naive_field(made, made.w + h * e) - naive_field(made, made.w - h * e)) / (2 * h)
            for e in eye
        ]
        _JACOBIANS[made] = torch.linalg.inv(torch.stack(columns, 1))
    w = made.w.clone()
    for _ in range(300):
        value = naive_field(made, w, weights)
        if float(value.norm()) < 1e-13:
            return w
        w = w - _JACOBIANS[made] @ value
    raise AssertionError(f"no fixed point: {float(value.norm())}")


_JACOBIANS: dict[Made, Tensor] = {}


@pytest.fixture(scope="session")
def helpers() -> SimpleNamespace:
    return SimpleNamespace(
        make=make,
        data=data,
        objective_of=objective_of,
        naive_field=naive_field,
        solve_again=solve_again,
    )
