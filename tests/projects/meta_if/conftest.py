"""A small bilevel problem, and the same written once more as loops over tasks with torch's ordinary
autograd.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from projects.meta_if.problems import Anil, Imaml, MamlUnrolled, MetaProblem, Tasks
from projects.meta_if.training import fit
from shared.influence.params import Parameters
from shared.vision.backbones import initialised, mlp

WAYS, SIZE, HIDDEN, MU, L2 = 3, 4, 2, 0.05, 0.02


def make_tasks(n: int = 5, seed: int = 0, train: int = 6, val: int = 7) -> Tasks:
    """Gaussian classes around random centres; synthetic, for tests alone."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    centres = 1.5 * normal(n, WAYS, SIZE)
    y_train = torch.arange(train).remainder(WAYS).expand(n, -1).contiguous()
    y_val = torch.randint(0, WAYS, (n, val), generator=draw)

    def around(y: Tensor) -> Tensor:
        return centres[torch.arange(n)[:, None], y] + normal(*y.shape, SIZE)

    return Tasks(around(y_train), y_train, around(y_val), y_val)


@dataclass
class Solved:
    problem: MetaProblem
    lam: Tensor


@pytest.fixture(scope="session")
def anil() -> Solved:
    """A meta-trained ANIL: q = 10, p = 9, five tasks."""
    body = initialised(mlp([SIZE, HIDDEN]), 3).double()
    tasks = make_tasks()
    problem = MetaProblem(Anil.of(body, tasks.x_train[0], WAYS, MU), tasks, l2=L2, inner_tol=1e-12)
    return Solved(problem, fit(problem, problem.inner.parameters.flat(), steps=20, tol=1e-12).lam)


@pytest.fixture(scope="session")
def network() -> Parameters:
    return Parameters.of(initialised(mlp([SIZE, HIDDEN, WAYS], last=True), 1).double())


@pytest.fixture(scope="session")
def imaml(network) -> Solved:
    """A meta-trained iMAML: q = p = 19."""
    problem = MetaProblem(
        Imaml(network, penalty_weight=2.0), make_tasks(4, 1), l2=L2, inner_tol=1e-12
    )
    return Solved(problem, fit(problem, network.flat(), steps=20, tol=1e-12).lam)


@pytest.fixture(scope="session")
def unrolled(network) -> Solved:
    problem = MetaProblem(MamlUnrolled(network, steps=3, rate=0.4), make_tasks(4, 1), l2=L2)
    return Solved(problem, fit(problem, network.flat(), steps=20, tol=1e-11).lam)


# ---- the same by loops and autograd --------------------------------------------------------------


def naive_anil(problem: MetaProblem, lam: Tensor) -> Tensor:
    """The outer objective as a function of lam that autograd may differentiate twice: every inner
    problem is solved by a loop of Newton steps, the last two of which are differentiated, their
    Hessians included.
    """
    tasks, n = problem.tasks, problem.tasks.x_train.shape[0]
    weight, bias = lam[: HIDDEN * SIZE].view(HIDDEN, SIZE), lam[HIDDEN * SIZE :]
    m = torch.ones(n, dtype=lam.dtype) if problem.weights is None else problem.weights

    def logits(theta: Tensor, x: Tensor) -> Tensor:
        head = theta.view(WAYS, HIDDEN + 1)
        return torch.tanh(x @ weight.T + bias) @ head[:, :HIDDEN].T + head[:, HIDDEN]

    total = L2 / 2 * (lam**2).sum()
    for k in range(n):

        def inner(theta: Tensor, k: int = k) -> Tensor:
            losses = functional.cross_entropy(
                logits(theta, tasks.x_train[k]), tasks.y_train[k], reduction="none"
            )
            w = (
                torch.ones_like(losses)
                if problem.train_weights is None
                else problem.train_weights[k]
            )
            return (w * losses).mean() + MU / 2 * (theta**2).sum()

        theta = torch.zeros(WAYS * (HIDDEN + 1), dtype=lam.dtype, requires_grad=True)
        for step in range(40):
            keep = step >= 38
            (slope,) = torch.autograd.grad(inner(theta), theta, create_graph=True)
            bend = torch.stack(
                [
                    torch.autograd.grad(one, theta, retain_graph=True, create_graph=keep)[0]
                    for one in slope
                ]
            )
            if keep:
                theta = theta - torch.linalg.solve(bend, slope)
            else:
                theta = (theta - torch.linalg.solve(bend, slope)).detach().requires_grad_()
        losses = functional.cross_entropy(
            logits(theta, tasks.x_val[k]), tasks.y_val[k], reduction="none"
        )
        w = torch.ones_like(losses) if problem.val_weights is None else problem.val_weights[k]
        total = total + m[k] / n * (w * losses).mean()
    return total


@pytest.fixture(scope="session")
def helpers() -> SimpleNamespace:
    """The functions and sizes above, for tests."""
    return SimpleNamespace(
        make_tasks=make_tasks,
        naive_anil=naive_anil,
        ways=WAYS,
        size=SIZE,
        hidden=HIDDEN,
        mu=MU,
        l2=L2,
    )
