"""The two levels of meta-learning: tasks, what adapts to a task, and the objective whose minimum
the meta-parameters are.

Sizes: n tasks, s training and t validation samples of a task, q meta-parameters lam, p task
parameters theta of each task.

    inner:  theta_k(lam) = argmin_theta (1/s) sum_i w_ki l_i(lam, theta) + penalty(lam, theta)
    training samples of task k outer:  lam* = argmin_lam (1/n) sum_k m_k L_O^k(lam, theta_k(lam)) +
    (l2/2) |lam|^2
            L_O^k = (1/t) sum_i w'_ki l_i(lam, theta_k)
            validation samples

Weights m, w, w' are 1; a removed task or sample has 0, and nothing is divided by n - 1. The paper
has the sum over tasks and a weight delta: its solution is this one with l2 = delta / n.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, hessian, vmap

from shared.errors import UserError
from shared.influence.objective import class_curvature, class_losses
from shared.influence.params import (
    Parameters,
    refuse_unseen_modes,
    refuse_wrong_third_derivatives,
)
from shared.influence.products import Data

# outputs [samples, ...], y [samples, ...] -> [samples]
SampleLosses = Callable[[Tensor, Tensor], Tensor]
DENSE_INNER = 2500  # the inner Hessian of a task is a matrix of this size at most


class Tasks(NamedTuple):
    """n tasks of one shape: x_train [n, s, ...], y_train [n, s], x_val [n, t, ...], y_val
    [n, t].
    """

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor

    def pick(self, rows: Sequence[int] | Tensor | slice) -> "Tasks":
        """Some of the tasks."""
        return Tasks(*(part[rows] for part in self))


# ---- what adapts to a task -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Anil:
    """lam is a body, theta_k a linear head with an L2 penalty: the inner problem is strongly convex
    and Newton's method solves it.

    Attributes:
        body: x [samples, ...] -> features [samples, d], as a function of lam.
        features, ways: d and the number of classes; theta is [ways, d + 1], flat, its last column
            the biases.
        penalty_weight: mu of (mu/2) |theta|^2.
    """

    body: Parameters
    features: int
    ways: int
    penalty_weight: float = 0.01
    name: str = "anil"
    convex: bool = True  # one minimum, wherever it is searched from

    @classmethod
    def of(
        cls,
        body: nn.Module,
        example: Tensor,
        ways: int,
        penalty_weight: float = 0.01,
        dtype: torch.dtype | None = None,
    ) -> "Anil":
        """With the sizes found from an example [samples, ...].

        Raises:
            UserError: torch gets the third derivatives of the body wrong; the body draws at random,
                mixes samples, or does not give a vector of features a sample.
        """
        refuse_wrong_third_derivatives(body)
        parameters = Parameters.of(body.eval(), dtype=dtype)
        with torch.no_grad():
            try:
                found = parameters.call(parameters.flat(), example.to(parameters.dtype))
            except RuntimeError as error:
                raise UserError(
                    f"the body does not take inputs of shape {tuple(example.shape[1:])}:"
                    f" {str(error).splitlines()[0]}"
                ) from None
        if found.dim() != 2:
            raise UserError(
                "the body must give one vector of features a sample, not outputs of shape"
                f" {tuple(found.shape[1:])}"
            )
        refuse_unseen_modes(parameters, example.to(parameters.dtype))
        return cls(parameters, found.shape[1], ways, penalty_weight)

    @property
    def parameters(self) -> Parameters:
        """What lam is a vector of."""
        return self.body

    @property
    def theta_size(self) -> int:
        """p."""
        return self.ways * (self.features + 1)

    def prepare(self, lam: Tensor, x: Tensor) -> Tensor:
        """What does not depend on theta: the features [samples, d]."""
        return self.body.call(lam, x)

    def finish(self, theta: Tensor, features: Tensor) -> Tensor:
        """Logits [samples, ways] of features [samples, d]."""
        head = theta.view(self.ways, self.features + 1)
        return features @ head[:, :-1].T + head[:, -1]

    def curvature(
        self,
        losses: SampleLosses,
        lam: Tensor,
        theta: Tensor,
        prepared: Tensor,
        y: Tensor,
        w: Tensor,
    ) -> Tensor:
        """The inner Hessian [p, p]. The head is linear in theta, so it is the sum over samples of a
        Kronecker product.
        """
        one_more = torch.cat([prepared, torch.ones_like(prepared[:, :1])], 1)
        z = self.finish(theta, prepared)
        if losses is class_losses:  # every inner solve goes through here, so in closed form
            bend_SCC = class_curvature(z)
        else:
            bend_SCC = vmap(
                hessian(lambda one, label: losses(one.unsqueeze(0), label.unsqueeze(0)).squeeze(0))
            )(z, y)
        samples, size = one_more.shape
        outer_SFG = one_more.unsqueeze(2) * one_more.unsqueeze(1)
        # one product of matrices, [classes classes, samples] by [samples, size size]
        found = (w.view(-1, 1, 1) * bend_SCC).view(samples, -1).T @ outer_SFG.view(samples, -1)
        found = found.view(self.ways, self.ways, size, size).transpose(1, 2)
        found = found.reshape(self.theta_size, self.theta_size)
        return found + self.penalty_weight * torch.eye(
            self.theta_size, dtype=theta.dtype, device=theta.device
        )

    def penalty(self, lam: Tensor, theta: Tensor) -> Tensor:
        """(mu/2) |theta|^2."""
        return self.penalty_weight / 2 * theta.square().sum()

    def start(self, lam: Tensor) -> Tensor:
        """Where the inner problem is solved from."""
        return lam.new_zeros(self.theta_size)


@dataclass(frozen=True, eq=False)
class Imaml:
    """theta_k is a whole network that is pulled to lam: penalty (mu/2) |theta - lam|^2 (Rajeswaran
    et al. 2019). L_O has no explicit lam, so that the direct gradient, and with it direct-IF, is 0.
    """

    model: Parameters
    penalty_weight: float = 1.0
    name: str = "imaml"
    convex: bool = False  # theta_k(lam) is the minimum that is found from lam

    @classmethod
    def of(
        cls, model: nn.Module, penalty_weight: float = 1.0, dtype: torch.dtype | None = None
    ) -> "Imaml":
        """UserError for a model whose third derivatives torch gets wrong."""
        refuse_wrong_third_derivatives(model)
        return cls(Parameters.of(model.eval(), dtype=dtype), penalty_weight)

    @property
    def parameters(self) -> Parameters:
        """What lam is a vector of."""
        return self.model

    @property
    def theta_size(self) -> int:
        """p = q."""
        return self.model.size

    def prepare(self, lam: Tensor, x: Tensor) -> Tensor:
        """What does not depend on theta: the inputs."""
        return x

    def finish(self, theta: Tensor, x: Tensor) -> Tensor:
        """The network's outputs at theta."""
        return self.model.call(theta, x)

    def curvature(
        self,
        losses: SampleLosses,
        lam: Tensor,
        theta: Tensor,
        prepared: Tensor,
        y: Tensor,
        w: Tensor,
    ) -> Tensor:
        """The inner Hessian [p, p]."""
        return hessian(
            lambda one: (w * losses(self.finish(one, prepared), y)).sum() + self.penalty(lam, one)
        )(theta)

    def penalty(self, lam: Tensor, theta: Tensor) -> Tensor:
        """(mu/2) |theta - lam|^2."""
        return self.penalty_weight / 2 * (theta - lam).square().sum()

    def start(self, lam: Tensor) -> Tensor:
        """Where the inner problem is solved from."""
        return lam


@dataclass(frozen=True, eq=False)
class MamlUnrolled(Imaml):
    """theta_k is the network after `steps` steps of gradient descent from lam (Finn et al. 2017):
    no minimum of anything.
    """

    penalty_weight: float = 0.0
    name: str = "maml_unrolled"
    steps: int = 5
    rate: float = 0.1


Inner = Anil | Imaml | MamlUnrolled


# ---- the objective -------------------------------------------------------------------------------


class Adapted(NamedTuple):
    """The solved inner problems at some lam: theta [n, p], Cholesky factors of the inner Hessians
    [n, p, p], largest gradient norm.
    """

    theta: Tensor
    factor: Tensor
    residual: float


@dataclass(frozen=True, eq=False)
class MetaProblem:
    """The bilevel problem of this module's docstring.

    Attributes:
        l2: weight of (l2/2) |lam|^2.
        weights: m [n]; train_weights: w [n, s]; val_weights: w' [n, t]; None means 1 everywhere.
        chunk: tasks handled at once; None means all.
        inner_tol: norm of a task's inner gradient at which it counts as solved.
    """

    inner: Inner
    tasks: Tasks
    l2: float = 0.0
    weights: Tensor | None = None
    train_weights: Tensor | None = None
    val_weights: Tensor | None = None
    sample_losses: SampleLosses = class_losses
    chunk: int | None = None
    inner_tol: float = 1e-10

    def __post_init__(self) -> None:
        if self.n == 0:
            raise UserError("there are no tasks")
        if self.tasks.x_train.shape[1] == 0 or self.tasks.x_val.shape[1] == 0:
            raise UserError("a task needs at least one training and one validation sample")

    @property
    def n(self) -> int:
        """How many tasks there are, removed ones included."""
        return self.tasks.x_train.shape[0]

    def with_weights(self, **changes: Tensor | float) -> "MetaProblem":
        """The problem with other weights (`weights`, `train_weights`, `val_weights`) or another
        `l2`.
        """
        return replace(self, **changes)

    @cached_property
    def task_weights(self) -> Tensor:
        """m_k / n, [n]."""
        ones = torch.ones(
            self.n, dtype=self.inner.parameters.dtype, device=self.tasks.x_train.device
        )
        return (ones if self.weights is None else self.weights.to(ones)) / self.n

    @cached_property
    def data(self) -> Data:
        """The tasks with their samples' weights over s and t: (x_train, y_train, w / s, x_val,
        y_val, w' / t).
        """
        like = self.task_weights

        def scaled(weights: Tensor | None, y: Tensor) -> Tensor:
            ones = torch.ones(y.shape[:2], dtype=like.dtype, device=like.device)
            return (ones if weights is None else weights.to(ones)) / y.shape[1]

        t = self.tasks
        return (
            t.x_train,
            t.y_train,
            scaled(self.train_weights, t.y_train),
            t.x_val,
            t.y_val,
            scaled(self.val_weights, t.y_val),
        )

    def outputs(self, lam: Tensor, theta: Tensor, x: Tensor) -> Tensor:
        """The model's outputs [samples, ...] at lam and a task's parameters."""
        return self.inner.finish(theta, self.inner.prepare(lam, x))

    def inner_loss(self, lam: Tensor, theta: Tensor, task: Data) -> Tensor:
        """L_I of one task, a scalar."""
        x, y, w, *_ = task
        return self.prepared_loss(lam, theta, (self.inner.prepare(lam, x), y, w))

    def prepared_loss(self, lam: Tensor, theta: Tensor, task: Data) -> Tensor:
        """L_I of one task whose training inputs went through `inner.prepare`, a scalar."""
        prepared, y, w = task
        return (
            w * self.sample_losses(self.inner.finish(theta, prepared), y)
        ).sum() + self.inner.penalty(lam, theta)

    def outer_loss(self, lam: Tensor, theta: Tensor, task: Data) -> Tensor:
        """L_O of one task, a scalar."""
        *_, x, y, w = task
        return (w * self.sample_losses(self.outputs(lam, theta, x), y)).sum()

    def outer_losses(self, lam: Tensor, theta: Tensor) -> Tensor:
        """L_O of every task at given task parameters [n, p]: [n]. UserError for one that is not
        finite.
        """
        found = self.by_chunks(
            lambda rows: vmap(lambda th, task: self.outer_loss(lam, th, task))(
                theta[rows], self.part(rows)
            )
        )
        if not found.isfinite().all():
            bad = int((~found.isfinite()).nonzero()[0])
            raise UserError(
                f"the validation loss of task {bad} is {float(found[bad]):g}; look at its samples"
            )
        return found

    def part(self, rows: slice) -> Data:
        """The data of some tasks."""
        return tuple(one[rows] for one in self.data)

    def chunks(self) -> list[slice]:
        """The tasks in pieces of at most `chunk`."""
        size = self.chunk or self.n
        return [slice(start, min(start + size, self.n)) for start in range(0, self.n, size)]

    def by_chunks(self, work: Callable[[slice], Tensor]) -> Tensor:
        """What `work` gives for each piece, one after the other."""
        return torch.cat([work(rows) for rows in self.chunks()])

    # ---- the inner level ----

    def adapt(self, lam: Tensor, start: Tensor | None = None, iterations: int = 100) -> Adapted:
        """Solve every task's inner problem at lam by Newton's method; all tasks of a chunk at once.

        Args:
            start: task parameters to start from, [n, p]; by default `inner.start`.

        Raises:
            UserError: a task's gradient does not fall to `inner_tol`, is not finite, or its Hessian
                is not positive definite where it ends.
        """
        if self.inner.theta_size > DENSE_INNER:
            raise UserError(
                f"the inner problem has {self.inner.theta_size} parameters a task, above"
                f" {DENSE_INNER}: use anil, whose head is small"
            )
        with torch.no_grad():
            pieces = [
                self._newton(lam, rows, None if start is None else start[rows], iterations)
                for rows in self.chunks()
            ]
        return Adapted(
            torch.cat([a.theta for a in pieces]),
            torch.cat([a.factor for a in pieces]),
            max(a.residual for a in pieces),
        )

    def _newton(self, lam: Tensor, rows: slice, start: Tensor | None, iterations: int) -> Adapted:
        x, y, w, *_ = self.part(rows)
        count = x.shape[0]
        data = (vmap(lambda one: self.inner.prepare(lam, one))(x), y, w)
        theta = self.inner.start(lam).expand(count, -1).clone() if start is None else start.clone()

        def loss(one: Tensor, task: Data) -> Tensor:
            return self.prepared_loss(lam, one, task)

        def bend_of(one: Tensor, task: Data) -> Tensor:
            return self.inner.curvature(self.sample_losses, lam, one, *task)

        both, bends = vmap(grad_and_value(loss)), vmap(bend_of)
        slope, value = both(theta, data)
        for step in range(iterations + 1):
            bend = bends(theta, data)
            sizes = slope.norm(dim=1)
            if not sizes.isfinite().all():
                bad = rows.start + int((~sizes.isfinite()).nonzero()[0])
                raise UserError(
                    f"the inner loss of task {bad} is not finite; look at its training samples"
                )
            factor, info = torch.linalg.cholesky_ex(bend)
            if float(sizes.max()) <= self.inner_tol:
                if int(info.max()):
                    bad = rows.start + int(info.nonzero()[0])
                    raise UserError(
                        f"the inner Hessian of task {bad} is not positive definite; raise the"
                        " penalty of the inner problem"
                    )
                return Adapted(theta, factor, float(sizes.max()))
            if step == iterations:
                break
            move = torch.cholesky_solve(slope.unsqueeze(2), factor).squeeze(2)
            # not convex here: the Hessian with its eigenvalues made positive
            for bad in info.nonzero().flatten().tolist():
                values, vectors = torch.linalg.eigh(bend[bad])
                move[bad] = vectors @ (
                    (vectors.T @ slope[bad])
                    / values.abs().clamp(min=1e-3 * float(values.abs().max()))
                )
            scale = torch.ones(count, dtype=theta.dtype, device=theta.device)
            # near the minimum a step lowers the loss by less than it is rounded
            slack = 1e-12 * value.abs().clamp(min=1)
            for _ in range(31):
                there = theta - scale.unsqueeze(1) * move
                slope, after = both(there, data)
                worse = ~(after <= value + slack)
                if not worse.any():
                    break
                scale = torch.where(worse, scale / 2, scale)
            theta, value = there, after
        worst = rows.start + int(sizes.argmax())
        raise UserError(
            f"the inner problem of task {worst} stopped at a gradient of norm"
            f" {float(sizes.max()):.2g} after {iterations} Newton steps, not {self.inner_tol:g};"
            " raise its penalty, or use float64"
        )
