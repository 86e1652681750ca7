"""The baselines of meta-IF: EK-FAC, TRAK, TracIn, gradients and losses, on tasks as samples.

Each gets the total gradients of the tasks and of the metric, which is more than a user of an
ordinary library would have: those would take the meta-parameters for all there is. All scores are
in the package's convention, [n].
"""

from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from projects.meta_if import estimators, labels
from projects.meta_if.problems import Anil, MetaProblem
from projects.meta_if.total import Implicit, State
from projects.meta_if.training import Composed, Fitted, composed_losses
from shared.errors import UserError
from shared.influence import baselines
from shared.influence.ekfac import EKFAC, draw_labels
from shared.influence.objective import Objective
from shared.influence.products import Data
from shared.influence.solvers import cg, neumann
from shared.seeding import generator


def objective(problem: MetaProblem, lam: Tensor) -> Objective:
    """The outer objective with a task for a sample, right up to second derivatives at lam."""
    found = Composed(problem).solved(lam)
    extra = () if found is None else (found.theta, found.factor)

    def losses(w: Tensor, data: Data) -> Tensor:
        return composed_losses(problem, w, *(data[6:] or (None, None)), data[:6])

    return Objective(
        losses, (*problem.data, *extra), problem.l2, problem.weights, chunk=problem.chunk
    )


def metric(tests: MetaProblem, lam: Tensor):
    """The mean loss of test tasks as a function of the meta-parameters near lam."""
    return Composed(tests.with_weights(l2=0.0)).near(lam)


def tracin(problem: MetaProblem, tests: MetaProblem, fitted: Fitted) -> Tensor:
    """TracIn over the points of gradient descent, with the inner problems solved at each."""
    parts = [
        baselines.tracin(objective(problem, lam), [lam], [rate], metric(tests, lam))
        for lam, rate in zip(fitted.checkpoints, fitted.rates, strict=True)
    ]
    if not parts:
        raise UserError("TracIn needs points of the training; fit with steps above 0")
    return torch.stack(parts).sum(0)


def trak(
    problem: MetaProblem,
    tests: MetaProblem,
    lam: Tensor,
    *,
    dimension: int,
    seed: int,
    damping: float = 0.1,
) -> Tensor:
    """TRAK: the margin of a task is the f with loss = log(1 + exp(-f)), so that the task is one
    sample of a logistic regression.
    """
    whole = objective(problem, lam)

    def margins(w: Tensor, data: Data) -> Tensor:
        return -torch.log(torch.expm1(whole.losses(w, data)))

    return baselines.trak(
        margins,
        whole.data,
        [lam],
        metric(tests, lam),
        dimension=dimension,
        seed=seed,
        damping=damping,
    )


def ekfac(state: Implicit, seed: int) -> EKFAC:
    """EK-FAC of the Gauss-Newton matrix of the validation losses in the body, with the tasks' heads
    frozen: it knows no inner level.
    """
    problem = state.problem
    if not isinstance(problem.inner, Anil):
        raise UserError(
            "EK-FAC is offered for anil, where the meta-parameters are layers of a body"
        )
    x, t = problem.tasks.x_val.flatten(0, 1), problem.tasks.x_val.shape[1]
    heads = state.theta.repeat_interleave(t, 0)
    rows = torch.arange(len(x), device=x.device)

    def logits(lam: Tensor, x: Tensor, heads: Tensor) -> Tensor:
        features = problem.inner.body.call(lam, x)
        return vmap(lambda theta, one: problem.inner.finish(theta, one.unsqueeze(0)).squeeze(0))(
            heads, features
        )

    labels = draw_labels(logits(state.lam, x, heads).cpu(), generator(seed, "ekfac")).to(rows)

    def losses(lam: Tensor, data: Data) -> Tensor:
        return problem.sample_losses(logits(lam, data[0], data[1]), data[2])

    return EKFAC.fit(problem.inner.body, state.lam, losses, (x, heads, labels), l2=problem.l2)


def loss_value(state: State) -> Tensor:
    """Minus the validation loss of each task after adaptation: an order alone."""
    return -state.problem.outer_losses(state.lam, state.theta)


def gradient_norm(state: State) -> Tensor:
    """Minus the norm of each task's total gradient: an order alone."""
    return -state.task_gradients(range(state.problem.n)).norm(dim=1)


SCORES = (*estimators.METHODS, labels.GAMMA_SERIES, *labels.BASELINES)


def scores(
    name: str,
    state: Implicit,
    tests: MetaProblem,
    fitted: Fitted,
    *,
    seed: int,
    dimension: int = 16,
    solver: estimators.Solver = cg,
) -> Tensor:
    """Scores of all tasks for the mean loss of test tasks by one of the methods in `SCORES`, [n].

    Args:
        dimension: of TRAK's projection; below the number of tasks.
        solver: of the methods in `estimators.METHODS`.
    """
    problem, lam = state.problem, state.lam
    if name in estimators.METHODS:
        slope = estimators.metric_gradient(tests, lam)
        s, _ = estimators.adjoint(state, slope, name, solver)
        return estimators.task_scores(state, s, name)
    if name == labels.GAMMA_SERIES:
        slope = estimators.metric_gradient(tests, lam)
        s, _ = estimators.adjoint(state, slope, labels.GAMMA, partial(neumann, depth=10, tol=None))
        return estimators.task_scores(state, s)
    if name == labels.EKFAC:
        return estimators.task_scores(
            state, ekfac(state, seed).solve(estimators.metric_gradient(tests, lam))[0]
        )
    if name == labels.TRAK:
        return trak(problem, tests, lam, dimension=dimension, seed=seed)
    if name == labels.TRACIN:
        return tracin(problem, tests, fitted)
    if name == labels.GRADIENT_DOT:
        return estimators.task_scores(state, estimators.metric_gradient(tests, lam))
    if name == labels.LOSS_VALUE:
        return loss_value(state)
    if name == labels.GRADIENT_NORM:
        return gradient_norm(state)
    if name == labels.RANDOM:
        return baselines.chance(problem.n, seed).to(lam)
    raise UserError(f"there is no method '{name}'; there are {', '.join(SCORES)}")
