"""The common ground of the experiments: tasks of a source, a body, a meta-trained problem and test
tasks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.func import vmap

from projects.meta_if import estimators
from projects.meta_if.data import (
    SEEDED,
    Pool,
    Source,
    pools,
    principal_components,
    sample_tasks,
    show_labels,
    spoil_tasks,
)
from projects.meta_if.problems import Anil, MetaProblem, Tasks
from projects.meta_if.total import Implicit
from projects.meta_if.training import Composed, Fitted, fit, polish
from shared import experiment
from shared.errors import UserError
from shared.influence.solvers import Operator, Solved, cg, dense
from shared.seeding import step_seed
from shared.vision.backbones import backbone

SMALL = 500  # meta-parameters, up to which `robust` forms the matrix


class Config(experiment.Config):
    """Tasks, body and training."""

    components: NonNegativeInt
    """Principal components that stand for an image; 0 leaves the images as they are."""
    body: str
    """`mlp-...` or `conv4-...`, see `shared.vision.backbones`."""
    ways: PositiveInt
    """Classes of a task."""
    shots: PositiveInt
    """Training samples of a class."""
    queries: PositiveInt
    """Validation samples of a class."""
    tasks: PositiveInt
    """Tasks that are meta-trained on."""
    test_tasks: PositiveInt
    """Tasks that the test loss is the mean of."""
    test_queries: PositiveInt
    """Validation samples of a class of a test task."""
    head_penalty: PositiveFloat
    """Weight mu of the inner problem's (mu / 2) |theta|^2."""
    l2: PositiveFloat
    """Weight of the outer problem's (l2 / 2) |lam|^2."""
    steps: NonNegativeInt
    """Steps of gradient descent, before L-BFGS and Newton."""
    rate: PositiveFloat
    """Learning rate of these steps."""
    tol: PositiveFloat
    """What the norm of the total gradient must fall to."""
    chunk: PositiveInt | None
    """Tasks handled at once; null: all."""
    folder: str | None
    """Where the images of sources lie that are in no package."""
    dtype: str = Field(pattern="^float(32|64)$")
    """What is computed in."""
    device: str = "cpu"
    """Where tensors live: cpu, or cuda."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A meta-trained problem, with the mask of its spoiled tasks, and the test tasks."""

    problem: MetaProblem
    tests: MetaProblem
    fitted: Fitted
    spoiled: Tensor
    start: Tensor

    @cached_property
    def state(self) -> Implicit:
        """The total derivatives at the trained meta-parameters."""
        return Implicit(self.problem, self.fitted.lam)

    @cached_property
    def hessian(self) -> Tensor:
        """The total Hessian by autodiff of the composed objective, [q, q]: what retraining starts
        with.
        """
        return Composed(self.problem).hessian(self.fitted.lam)

    @cached_property
    def matrices(self) -> dict[str, Tensor]:
        """The curvature of each method as a matrix, formed once for many right-hand sides."""
        eye = torch.eye(self.fitted.lam.numel()).to(self.fitted.lam)
        return {
            name: self.state.product(eye, method.curvature)
            for name, method in estimators.METHODS.items()
        }

    def solver(self, method: str):
        """A solver for the method that uses its matrix."""
        return lambda _operator, b: dense(self.matrices[method], b)

    def retrain(self, **weights: Tensor) -> Tensor:
        """lam* of the problem with other weights, from the full solution: with the Hessian there
        where one task or sample is gone, and where more are by L-BFGS first, for it is far away.
        """
        changed = self.problem.with_weights(**weights)
        if sum(int((weight == 0).sum()) for weight in weights.values()) > 1:
            return fit(changed, self.fitted.lam, steps=0, tol=self.tol).lam
        return polish(Composed(changed), self.fitted.lam, tol=self.tol, matrix=self.hessian).w

    @property
    def tol(self) -> float:
        """What the gradient's norm must fall to in a retraining: that of the training."""
        return max(1e-9, self.fitted.gradient_norm)

    def without(self, tasks) -> Tensor:
        """lam* without some tasks."""
        weights = torch.ones(self.problem.n, dtype=torch.float64)
        weights[list(tasks)] = 0
        return self.retrain(weights=weights)

    def loss(self, lam: Tensor) -> float:
        """The mean loss of the test tasks."""
        return estimators.meta_test_loss(self.tests, lam)

    def answers(self, lam: Tensor) -> Tensor:
        """The classes that are given to the test tasks' samples after adaptation, [n, t]."""
        found = self.tests.adapt(lam)
        x = self.tests.tasks.x_val
        outputs = vmap(lambda theta, one: self.tests.outputs(lam, theta, one))(found.theta, x)
        return outputs.argmax(-1)

    def accuracy(self, lam: Tensor) -> float:
        """The share of right answers on the test tasks after adaptation."""
        return float((self.answers(lam) == self.tests.tasks.y_val).double().mean())

    def compare(self, edited: Tensor, retrained: Tensor) -> dict[str, float]:
        """How near the meta-parameters after an edit are to those after retraining: columns of a
        row. No edit is `edited` = the trained ones, and has a relative error of 1.
        """
        found, wanted = self.answers(edited), self.answers(retrained)
        y = self.tests.tasks.y_val
        return {
            "edit_accuracy": float((found == y).double().mean()),
            "retrain_accuracy": float((wanted == y).double().mean()),
            "same_answers_share": float((found == wanted).double().mean()),
            "edit_relative_error": float(
                (edited - retrained).norm() / (self.fitted.lam - retrained).norm()
            ),
        }


def _to(tasks: Tasks, config: Config) -> Tasks:
    dtype = getattr(torch, config.dtype)
    x_train, y_train, x_val, y_val = (part.to(config.device) for part in tasks)
    return Tasks(x_train.to(dtype), y_train, x_val.to(dtype), y_val)


@lru_cache(maxsize=2)  # the seeds of a source share it
def _pools(source: Source, seed: int, folder: str | None, components: int) -> tuple[Pool, Pool]:
    train, test = pools(source, seed, folder)
    return principal_components(train, test, components) if components else (train, test)


def drawn(config: Config, source: Source, seed: int) -> tuple[Tasks, Tasks]:
    """Meta-training and meta-test tasks of a source."""
    train, test = _pools(source, seed if source in SEEDED else 0, config.folder, config.components)
    draw = partial(sample_tasks, ways=config.ways, shots=config.shots)
    return (
        _to(
            draw(train, config.tasks, queries=config.queries, seed=step_seed(seed, "train")), config
        ),
        _to(
            draw(
                test, config.test_tasks, queries=config.test_queries, seed=step_seed(seed, "test")
            ),
            config,
        ),
    )


def prepare(
    config: Config, source: Source, seed: int, spoiled: float = 0.0, shortcut: bool = False
) -> Setting:
    """Draw, spoil a fraction of the tasks, with a `shortcut` to their labels or without, and
    meta-train.
    """
    train, test = drawn(config, source, seed)
    train, mask = spoil_tasks(train, spoiled, seed)
    if shortcut:
        train = show_labels(train, mask, seed)
    body = backbone(config.body, train.x_train.shape[2:], seed=step_seed(seed, "body") % 2**31)
    body = body.to(config.device, getattr(torch, config.dtype))
    inner = Anil.of(body, train.x_train[0], config.ways, config.head_penalty)
    tol = 1e-10 if config.dtype == "float64" else 1e-5
    problem = MetaProblem(inner, train, l2=config.l2, chunk=config.chunk, inner_tol=tol)
    tests = MetaProblem(inner, test, chunk=config.chunk, inner_tol=tol)
    start = inner.parameters.flat()
    fitted = fit(problem, start, steps=config.steps, rate=config.rate, tol=config.tol)
    return Setting(problem, tests, fitted, mask, start)


def robust(operator: Operator, b: Tensor, tol: float = 1e-4) -> Solved:
    """LU of the whole matrix where that is small, since products with many directions at once cost
    little; else conjugate gradients, and LU again where the matrix is not positive definite.
    """
    if b.shape[0] <= SMALL:
        return dense(operator, b)
    try:
        return cg(operator, b, tol=tol)
    except UserError:
        return dense(operator, b)


def most_harmful(scores: Tensor, count: int) -> list[int]:
    """The tasks with the lowest scores; of equal ones the first."""
    return np.argsort(scores.cpu().numpy(), kind="stable")[:count].tolist()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the processor seconds it took."""
    start = time.process_time()
    return work(), time.process_time() - start
