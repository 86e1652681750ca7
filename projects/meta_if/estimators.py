"""The paper's estimators, in the package's convention of signs: removal effects predict lam_without
- lam*, scores the change of a metric.

| here | paper | what |
| --- | --- | --- |
| `task_removal` | minus task-IF | + H_tot^-1 D L_O^k m_k / n |
| `val_removal` | minus instance-IF, validation | + H_tot^-1 D l(z) m_k w'_z / (n t) |
| `train_removal` | instance-IF, training | - H_tot^-1 D P m_k w_z / (n s); P: z deleted in L_O^k |
| method `direct` | direct-IF (eq. 2) | d_lam for D, and the direct Hessian |
| method `gamma` | theorem 5.1 | four terms + Gamma I for H_tot |

Scores of all tasks or samples for a metric m(lam) need one solve: s = H_tot^-1 D m, and then
forward-mode passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from projects.meta_if import labels
from projects.meta_if.problems import MetaProblem
from projects.meta_if.total import Implicit, State, at
from shared.errors import UserError
from shared.influence.solvers import Info, Operator, Solved, cg

# e.g. partial(cg, damping=...), partial(neumann, depth=...)
Solver = Callable[[Operator, Tensor], Solved]


@dataclass(frozen=True)
class Method:
    """Which matrix is inverted, and whether the effect on the objective is the direct gradient
    alone.
    """

    curvature: str
    direct: bool = False


METHODS = {
    labels.TASK_IF: Method("exact"),
    labels.GAMMA: Method("gamma"),
    labels.FOUR_TERMS: Method("four terms"),
    labels.GAUSS_NEWTON: Method("gauss-newton"),
    labels.DIRECT_HESSIAN: Method("direct"),
    labels.DIRECT_IF: Method("direct", direct=True),
}


def metric_gradient(tests: MetaProblem, lam: Tensor) -> Tensor:
    """D m [q] of m(lam) = mean loss of test tasks after adaptation: total as well, and without a
    regulariser.
    """
    return at(tests.with_weights(l2=0.0), lam).gradient()


def meta_test_loss(tests: MetaProblem, lam: Tensor) -> float:
    """m(lam)."""
    from projects.meta_if.training import Composed

    return float(Composed(tests.with_weights(l2=0.0)).value(lam))


def task_removal(
    state: State, tasks: Sequence[int], method: str = labels.TASK_IF, solver: Solver = cg
) -> tuple[Tensor, Info]:
    """Predicted lam_without_k - lam* of each task: columns of [q, tasks]. A task of weight 0 has
    exactly 0.
    """
    chosen = _method(method)
    options = {"direct": True} if chosen.direct else {}
    sides = state.task_gradients(tasks, **options).T * state.problem.task_weights[list(tasks)]
    return _solve(state, sides, chosen, solver)


def val_removal(
    state: Implicit, task: int, samples: Sequence[int], solver: Solver = cg
) -> tuple[Tensor, Info]:
    """Predicted lam_without_z - lam* of validation samples of a task: columns of [q, samples]."""
    weights = state.problem.task_weights[task] * state.problem.data[5][task, list(samples)]
    return _solve(
        state, state.val_gradients(task, samples).T * weights, METHODS[labels.TASK_IF], solver
    )


def train_removal(
    state: Implicit, task: int, samples: Sequence[int], solver: Solver = cg
) -> tuple[Tensor, Info]:
    """Predicted lam_without_z - lam* of training samples of a task: columns of [q, samples].

    The task's own parameters change at fixed lam too, by `Implicit.inner_effect`; a metric on the
    same task needs that besides.
    """
    weights = state.problem.task_weights[task] * state.problem.data[2][task, list(samples)]
    return _solve(
        state, -state.train_gradients(task, samples).T * weights, METHODS[labels.TASK_IF], solver
    )


def adjoint(
    state: State, metric: Tensor, method: str = labels.TASK_IF, solver: Solver = cg
) -> tuple[Tensor, Info]:
    """s = A^-1 D m [q], all that scores need to know of the metric; `metric` is D m."""
    return _solve(state, metric, _method(method), solver)


def task_scores(state: State, s: Tensor, method: str = labels.TASK_IF) -> Tensor:
    """Predicted change of the metric when each task is removed, [n]; for a loss, positive is
    helpful.
    """
    options = {"direct": True} if _method(method).direct else {}
    return state.task_dots(s, **options) * state.problem.task_weights


def val_scores(state: State, s: Tensor) -> Tensor:
    """Predicted change of the metric when each validation sample is removed, [n, t]."""
    return state.val_dots(s) * state.problem.task_weights.unsqueeze(1) * state.problem.data[5]


def train_scores(state: State, s: Tensor) -> Tensor:
    """Predicted change of the metric, through lam, when each training sample is removed, [n, s]."""
    return -state.train_dots(s) * state.problem.task_weights.unsqueeze(1) * state.problem.data[2]


def _method(name: str) -> Method:
    if name not in METHODS:
        raise UserError(f"there is no method '{name}'; there are {', '.join(METHODS)}")
    return METHODS[name]


def _solve(state: State, b: Tensor, method: Method, solver: Solver) -> tuple[Tensor, Info]:
    if method.direct and state.problem.inner.name != "anil":
        raise UserError(
            f"with {state.problem.inner.name} the outer loss has no explicit meta-parameters, and"
            " direct-IF is 0 for all; use anil"
        )
    return solver(partial(state.product, curvature=method.curvature), b)
