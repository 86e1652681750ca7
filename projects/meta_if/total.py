"""Total derivatives in the meta-parameters: what they are once each task's own parameters follow
them.

For one task, with H = d2 L_I / d theta2, C = d2 L_I / d theta d lam [p, q] and J = d theta / d lam
= -H^-1 C (paper, section 4):

    total gradient      D L_O = d_lam L_O - C^T q_,   q_ = H^-1 d_theta L_O
    total Hessian       four terms [I, J]^T (d2 L_O) [I, J],
                        and H' = sum_i (d_theta L_O)_i d2 theta_i / d lam2

The paper replaces H' by Gamma I with Gamma = |d_theta L_O|_1 (theorem 5.1). Here the product with
the whole of it is exact, at the price of two inner solves and without a tensor of third derivatives
(our derivation): differentiate D L_O along (v, u = J v),

    psi(lam, theta) = d_theta L_I . q_ with q_ held constant
    H_tot v = dO_lam - dpsi_lam - C^T dq,   dq = H^-1 (dO_theta - dpsi_theta)

where dO and dpsi are the derivatives along (v, u) of the gradients of L_O and psi. Also our
derivation: a training sample z acts on the outer loss through P = q_ . d_theta l_z, so that D P . v
= dq . d_theta l_z + the derivative of q_ . d_theta l_z along (v, u): the derivative of H^-1 is in
dq.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from projects.meta_if.problems import Adapted, MamlUnrolled, MetaProblem
from shared.errors import UserError
from shared.influence.products import Data, Function, along, note
from shared.influence.retrain import check_removed

CURVATURES = ("exact", "four terms", "gamma", "gauss-newton", "direct")


class _State:
    """What both kinds of state share. `inner_solves` counts applications of H_in^-1: per task and
    direction.
    """

    def __init__(self, problem: MetaProblem, lam: Tensor):
        self.problem, self.lam, self.inner_solves = problem, lam, 0

    def check_tasks(self, rows: Sequence[int]) -> list[int]:
        """The tasks' indices; UserError for one that does not exist or stands there twice."""
        beyond = [int(one) for one in rows if not 0 <= int(one) < self.problem.n]
        if beyond:
            raise UserError(
                f"there is no task {beyond[0]}: the tasks are numbered 0 to {self.problem.n - 1}"
            )
        return check_removed(rows, self.problem.n)

    def check_samples(self, samples: Sequence[int], count: int) -> list[int]:
        """The indices of samples of a task; UserError for one that does not exist or stands there
        twice.
        """
        return check_removed(samples, count)


class Implicit(_State):
    """Total derivatives at lam [q] where each task's parameters minimise its inner problem (`Anil`,
    `Imaml`).

    Attributes:
        theta: the tasks' parameters, [n, p].
        adjoint: q_ = H_in^-1 d_theta L_O of each task, [n, p].
    """

    def __init__(self, problem: MetaProblem, lam: Tensor, adapted: Adapted | None = None):
        if isinstance(problem.inner, MamlUnrolled):
            raise UserError(
                "unrolled steps end at no minimum, so there is nothing implicit; use Unrolled"
            )
        super().__init__(problem, lam)
        found = adapted or problem.adapt(lam)
        self.theta, self.factor = found.theta, found.factor
        problem.outer_losses(lam, self.theta)  # refuses what is not finite

        def slopes(rows: slice) -> Tensor:
            return vmap(grad(lambda th, task: problem.outer_loss(lam, th, task)))(
                self.theta[rows], problem.part(rows)
            )

        self.outer_slope = problem.by_chunks(slopes)  # d_theta L_O [n, p]
        self.adjoint = self._solve(self.outer_slope, slice(None))
        self._products: dict[str, Function] = {}

    # ---- pieces; each takes the tasks `rows`, and theta [rows, p] ----

    def _solve(self, b: Tensor, rows: slice) -> Tensor:
        """H_in^-1 b for every task: b [rows, p]."""
        self.inner_solves += b.shape[0]
        return torch.cholesky_solve(b.unsqueeze(2), self.factor[rows]).squeeze(2)

    def _outer(self, lam: Tensor, theta: Tensor, rows: slice) -> Tensor:
        """L_O of each task, [rows]."""
        return vmap(lambda th, task: self.problem.outer_loss(lam, th, task))(
            theta, self.problem.part(rows)
        )

    def _inner_slope(self, lam: Tensor, theta: Tensor, rows: slice) -> Tensor:
        """d_theta L_I of each task, [rows, p]."""
        return vmap(lambda th, task: grad(self.problem.inner_loss, argnums=1)(lam, th, task))(
            theta, self.problem.part(rows)
        )

    def _lagrangian(self, lam: Tensor, theta: Tensor, rows: slice) -> Tensor:
        """L_O - psi of each task, [rows]: its derivative in lam is the total gradient, that in
        theta is 0.
        """
        return self._outer(lam, theta, rows) - (
            self._inner_slope(lam, theta, rows) * self.adjoint[rows]
        ).sum(1)

    def _weighted(
        self, of: Callable[[Tensor, Tensor, slice], Tensor], rows: slice
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The tasks' share of the objective, or of its Lagrangian, as a function of lam and theta
        [rows, p].
        """
        weights = self.problem.task_weights[rows]
        return lambda lam, theta: (weights * of(lam, theta, rows)).sum()

    def _follow(self, v: Tensor, rows: slice) -> Tensor:
        """u = J v of each task, [rows, p], for v [q]: an inner solve."""
        theta = self.theta[rows]
        return -self._solve(
            jvp(lambda lam: self._inner_slope(lam, theta, rows), (self.lam,), (v,))[1], rows
        )

    def _pull(self, b: Tensor, rows: slice) -> Tensor:
        """Sum over tasks of C^T b, [q], for b [rows, p]."""
        theta = self.theta[rows]
        return grad(lambda lam: (self._inner_slope(lam, theta, rows) * b).sum())(self.lam)

    # ---- gradients ----

    def gradient(self) -> Tensor:
        """The total gradient of the outer objective, regulariser included, [q]."""
        note("gradients")
        total = self.problem.l2 * self.lam
        for rows in self.problem.chunks():
            total = total + grad(self._weighted(self._lagrangian, rows))(self.lam, self.theta[rows])
        return total

    def direct_gradient(self) -> Tensor:
        """d_lam of the outer objective with the task parameters frozen, [q]: does not vanish at the
        optimum.
        """
        total = self.problem.l2 * self.lam
        for rows in self.problem.chunks():
            total = total + grad(self._weighted(self._outer, rows))(self.lam, self.theta[rows])
        return total

    def task_gradients(self, tasks: Sequence[int], direct: bool = False) -> Tensor:
        """D L_O^k of the tasks, [tasks, q], unweighted; with `direct` d_lam L_O^k."""
        note("per_sample_gradients")
        found = []
        of = self._outer if direct else self._lagrangian
        for k in self.check_tasks(tasks):
            rows = slice(k, k + 1)
            found.append(
                grad(lambda lam, rows=rows: of(lam, self.theta[rows], rows).sum())(self.lam)
            )
        return torch.stack(found)

    def val_gradients(self, task: int, samples: Sequence[int]) -> Tensor:
        """Total gradients D l(z) of validation samples of one task, [samples, q], unweighted."""
        rows, theta, data = self._one(task)
        ids = self.check_samples(samples, data[3].shape[1])
        x, y = data[3][0, ids], data[4][0, ids]
        losses = self._sample_losses(x, y)
        slopes = jacrev(lambda th: losses(self.lam, th))(theta[0])
        direct = jacrev(lambda lam: losses(lam, theta[0]))(self.lam)
        return direct - torch.stack(
            [self._pull(self._solve(slope.unsqueeze(0), rows), rows) for slope in slopes]
        )

    def train_gradients(self, task: int, samples: Sequence[int]) -> Tensor:
        """D P of training samples of one task, [samples, q], where P = d_theta L_O^k . H_in^-1
        d_theta l(z) (unweighted).

        With s_a = H_in^-1 d_theta L_O and s_b = H_in^-1 d_theta l(z) held constant, D P is the
        total derivative of d_theta L_O . s_b + s_a . d_theta l(z) - s_a . (d2_theta L_I) s_b; the
        last term is the derivative of H_in^-1.
        """
        rows, theta, data = self._one(task)
        s_a = self.adjoint[rows]
        found = []
        for z in self.check_samples(samples, data[0].shape[1]):
            losses = self._sample_losses(data[0][0, [z]], data[1][0, [z]])
            s_b = self._solve(
                grad(lambda th, losses=losses: losses(self.lam, th[0]).sum())(theta), rows
            )

            def phi(lam: Tensor, th: Tensor, losses=losses, s_b=s_b) -> Tensor:
                outer = jvp(lambda one: self._outer(lam, one, rows).sum(), (th,), (s_b,))[1]
                sample = jvp(lambda one: losses(lam, one[0]).sum(), (th,), (s_a,))[1]
                bend = jvp(lambda one: self._inner_slope(lam, one, rows), (th,), (s_b,))[1]
                return outer + sample - (s_a * bend).sum()

            in_lam, in_theta = grad(phi, argnums=(0, 1))(self.lam, theta)
            found.append(in_lam - self._pull(self._solve(in_theta, rows), rows))
        return torch.stack(found)

    def inner_effect(self, task: int, samples: Sequence[int]) -> Tensor:
        """What deleting training samples does to the task's own parameters at fixed lam: + H_in^-1
        d_theta l(z) w / s, [samples, p].
        """
        rows, theta, data = self._one(task)
        ids = self.check_samples(samples, data[0].shape[1])
        losses = self._sample_losses(data[0][0, ids], data[1][0, ids])
        slopes = jacrev(lambda th: losses(self.lam, th))(theta[0])
        return torch.cat([self._solve(slope.unsqueeze(0), rows) for slope in slopes]) * data[2][
            0, ids
        ].unsqueeze(1)

    def _one(self, task: int) -> tuple[slice, Tensor, Data]:
        (k,) = self.check_tasks([task])
        rows = slice(k, k + 1)
        return rows, self.theta[rows], self.problem.part(rows)

    def _sample_losses(self, x: Tensor, y: Tensor):
        problem = self.problem
        return lambda lam, theta: problem.sample_losses(problem.outputs(lam, theta, x), y)

    # ---- all tasks or samples along one direction s [q] ----

    def task_dots(self, s: Tensor, direct: bool = False) -> Tensor:
        """D L_O^k . s of every task, [n]: one forward-mode pass and no inner solve. With `direct`,
        d_lam L_O^k . s.
        """
        note("forward_mode")
        of = self._outer if direct else self._lagrangian
        return self.problem.by_chunks(
            lambda rows: jvp(lambda lam: of(lam, self.theta[rows], rows), (self.lam,), (s,))[1]
        )

    def val_dots(self, s: Tensor) -> Tensor:
        """D l(z) . s of every validation sample, [n, t]: an inner solve and a forward-mode pass."""
        note("forward_mode")

        def of(rows: slice) -> Tensor:
            *_, x, y, _w = self.problem.part(rows)
            moved = (s, self._follow(s, rows))
            return jvp(
                lambda lam, theta: self._losses(lam, theta, x, y),
                (self.lam, self.theta[rows]),
                moved,
            )[1]

        return self.problem.by_chunks(of)

    def train_dots(self, s: Tensor) -> Tensor:
        """D P . s of every training sample, [n, s]: two inner solves, whatever the number of
        samples.
        """
        note("forward_mode", 2)

        def of(rows: slice) -> Tensor:
            x, y, *_ = self.problem.part(rows)
            theta, u, q = self.theta[rows], self._follow(s, rows), self.adjoint[rows]
            slope = grad(lambda lam, th: self._lagrangian(lam, th, rows).sum(), argnums=1)
            dq = self._solve(jvp(slope, (self.lam, theta), (s, u))[1], rows)

            def along_q(lam: Tensor, th: Tensor) -> Tensor:
                return jvp(lambda one: self._losses(lam, one, x, y), (th,), (q,))[1]

            along_dq = jvp(lambda one: self._losses(self.lam, one, x, y), (theta,), (dq,))[1]
            return along_dq + jvp(along_q, (self.lam, theta), (s, u))[1]

        return self.problem.by_chunks(of)

    def _losses(self, lam: Tensor, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Losses of samples [rows, samples] of tasks with parameters theta [rows, p]."""
        problem = self.problem
        return vmap(lambda th, a, b: problem.sample_losses(problem.outputs(lam, th, a), b))(
            theta, x, y
        )

    # ---- curvature ----

    def gamma(self) -> float:
        """The paper's Gamma of theorem 5.1 in this scale: sum_k m_k / n |d_theta L_O^k|_1."""
        return float((self.problem.task_weights * self.outer_slope.abs().sum(1)).sum())

    def product(self, v: Tensor, curvature: str = "exact") -> Tensor:
        """A curvature matrix of the outer objective, l2 included, times v: [q] -> [q], [q, k] ->
        [q, k].

        `exact`: the total Hessian. `four terms`: without H'. `gamma`: four terms + Gamma I, the
        paper's. `gauss-newton`: the total derivative of the outputs on both sides of the loss's
        Hessian in them (TLXML's). `direct`: task parameters frozen.
        """
        if curvature not in CURVATURES:
            raise UserError(
                f"there is no curvature '{curvature}'; there are {', '.join(CURVATURES)}"
            )
        columns = 1 if v.dim() == 1 else v.shape[1]
        note("curvature_products", columns)
        total = self.problem.l2 * v
        for rows in self.problem.chunks():
            work, before = self._product(curvature, rows), self.inner_solves

            def one(direction: Tensor, work=work, before=before) -> Tensor:
                self.inner_solves = before  # a vmapped group of directions runs this once
                return work(direction)

            total = total + along(one, v)
            self.inner_solves = before + (self.inner_solves - before) * columns
        return total + self.gamma() * v if curvature == "gamma" else total

    def _product(self, curvature: str, rows: slice) -> Function:
        """v -> the share of the tasks `rows` in the product, [q] -> [q].

        Its graphs are made once and backward passes through them are a product. They are kept for
        the next call where the tasks are one chunk; of several, one chunk's exist at a time.
        """
        if curvature in self._products:
            return self._products[curvature]
        made = {
            "exact": self._exact,
            "gauss-newton": self._gauss_newton,
            "direct": self._direct,
        }.get(curvature, self._four_terms)(rows)
        if len(self.problem.chunks()) == 1:
            self._products[curvature] = made
        return made

    def _exact(self, rows: slice) -> Function:
        return self._followed(self._bends(self._lagrangian, rows), rows)

    def _four_terms(self, rows: slice) -> Function:
        return self._followed(self._bends(self._outer, rows), rows)

    def _gauss_newton(self, rows: slice) -> Function:
        problem, theta, weights = self.problem, self.theta[rows], self.problem.task_weights[rows]
        *_, x, y, w = problem.part(rows)

        def outputs(lam: Tensor, th: Tensor) -> Tensor:
            return vmap(lambda one, a: problem.outputs(lam, one, a))(th, x)

        def loss(z: Tensor) -> Tensor:
            return (weights.unsqueeze(1) * w * vmap(problem.sample_losses)(z, y)).sum()

        z, pull, *_ = vjp(outputs, self.lam, theta)
        # linear in its argument, so that its transpose is the Jacobian
        _, push, *_ = vjp(pull, torch.zeros_like(z))
        _, bend, *_ = vjp(grad(loss), z)
        return self._followed(lambda moved: pull(bend(push(moved)[0])[0]), rows)

    def _bends(
        self, of: Callable[[Tensor, Tensor, slice], Tensor], rows: slice
    ) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """(v, u) -> the Hessian of the weighted sum of `of` in (lam, theta) times it."""
        slopes = grad(self._weighted(of, rows), argnums=(0, 1))
        # a Hessian is its own transpose: a backward pass through the gradient is a product
        _, bend, *_ = vjp(slopes, self.lam, self.theta[rows])
        return bend

    def _followed(
        self, bend: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]], rows: slice
    ) -> Function:
        """v -> [I, J]^T M [I, J] v for M as its product `bend` with pairs (of lam, of theta)."""
        theta = self.theta[rows]
        _, pull, *_ = vjp(lambda lam: self._inner_slope(lam, theta, rows), self.lam)  # b -> C^T b
        _, push, *_ = vjp(lambda b: pull(b)[0], torch.zeros_like(theta))  # v -> C v

        def product(v: Tensor) -> Tensor:
            in_lam, in_theta = bend((v, -self._solve(push(v)[0], rows)))
            return in_lam - pull(self._solve(in_theta, rows))[0]

        return product

    def _direct(self, rows: slice) -> Function:
        theta = self.theta[rows]
        slope = grad(self._weighted(self._outer, rows))
        _, bend, *_ = vjp(lambda lam: slope(lam, theta), self.lam)
        return lambda v: bend(v)[0]


class Unrolled(_State):
    """The same for `MamlUnrolled`: theta_k(lam) is a program of explicit steps, and all derivatives
    are those of the program.
    """

    def __init__(self, problem: MetaProblem, lam: Tensor):
        if not isinstance(problem.inner, MamlUnrolled):
            raise UserError("these inner problems are solved to their minimum; use Implicit")
        super().__init__(problem, lam)

    def adapt(self, lam: Tensor, task: Data) -> Tensor:
        """theta after the steps, [p], of one task."""
        inner = self.problem.inner
        theta = inner.start(lam)
        for _ in range(inner.steps):
            theta = theta - inner.rate * grad(self.problem.inner_loss, argnums=1)(lam, theta, task)
        return theta

    def _outer(self, lam: Tensor, rows: slice) -> Tensor:
        return vmap(lambda task: self.problem.outer_loss(lam, self.adapt(lam, task), task))(
            self.problem.part(rows)
        )

    def _sum(self, lam: Tensor, rows: slice) -> Tensor:
        return (self.problem.task_weights[rows] * self._outer(lam, rows)).sum()

    def gradient(self) -> Tensor:
        """As `Implicit.gradient`."""
        note("gradients")
        parts = [grad(self._sum)(self.lam, rows) for rows in self.problem.chunks()]
        return self.problem.l2 * self.lam + torch.stack(parts).sum(0)

    def task_gradients(self, tasks: Sequence[int]) -> Tensor:
        """As `Implicit.task_gradients`."""
        note("per_sample_gradients")
        return torch.stack(
            [
                grad(lambda lam, k=k: self._outer(lam, slice(k, k + 1)).sum())(self.lam)
                for k in self.check_tasks(tasks)
            ]
        )

    def task_dots(self, s: Tensor) -> Tensor:
        """As `Implicit.task_dots`."""
        note("forward_mode")
        return self.problem.by_chunks(
            lambda rows: jvp(lambda lam: self._outer(lam, rows), (self.lam,), (s,))[1]
        )

    def val_dots(self, s: Tensor) -> Tensor:
        """As `Implicit.val_dots`."""
        note("forward_mode")

        def losses(lam: Tensor, task: Data) -> Tensor:
            *_, x, y, _w = task
            return self.problem.sample_losses(
                self.problem.outputs(lam, self.adapt(lam, task), x), y
            )

        def of(rows: slice) -> Tensor:
            data = self.problem.part(rows)
            return jvp(lambda lam: vmap(lambda task: losses(lam, task))(data), (self.lam,), (s,))[1]

        return self.problem.by_chunks(of)

    def train_dots(self, s: Tensor) -> Tensor:
        """As `Implicit.train_dots`: minus the derivative of L_O in the weight of each training
        sample, along s.
        """
        note("forward_mode", 2)

        def slopes(lam: Tensor, task: Data) -> Tensor:
            def loss(weights: Tensor) -> Tensor:
                changed = (*task[:2], weights, *task[3:])
                return self.problem.outer_loss(lam, self.adapt(lam, changed), changed)

            return grad(loss)(task[2])

        def of(rows: slice) -> Tensor:
            data = self.problem.part(rows)
            return -jvp(lambda lam: vmap(lambda task: slopes(lam, task))(data), (self.lam,), (s,))[
                1
            ]

        return self.problem.by_chunks(of)

    def product(self, v: Tensor, curvature: str = "exact") -> Tensor:
        """The total Hessian, l2 included, times v: [q] -> [q], [q, k] -> [q, k]. There are no
        approximations of it here.
        """
        if curvature != "exact":
            raise UserError(
                f"for unrolled steps only the exact total Hessian is there, not '{curvature}'"
            )
        note("curvature_products", 1 if v.dim() == 1 else v.shape[1])

        def one(direction: Tensor) -> Tensor:
            parts = [
                jvp(lambda lam, rows=rows: grad(self._sum)(lam, rows), (self.lam,), (direction,))[1]
                for rows in self.problem.chunks()
            ]
            return self.problem.l2 * direction + torch.stack(parts).sum(0)

        return along(one, v)


State = Implicit | Unrolled


def at(problem: MetaProblem, lam: Tensor) -> State:
    """The total derivatives of a problem at lam, of whichever kind its inner problem is."""
    return (
        Unrolled(problem, lam)
        if isinstance(problem.inner, MamlUnrolled)
        else Implicit(problem, lam)
    )
