"""The derivatives against autograd of loops, and the estimators against finite differences of the
re-solved bilevel problem.
"""

from functools import partial

import pytest
import torch
from torch.func import grad, jacrev

from projects.meta_if import estimators
from projects.meta_if.problems import Anil, Imaml, MetaProblem, Tasks
from projects.meta_if.total import Implicit, Unrolled, at
from projects.meta_if.training import Composed, fit, polish, retrain
from shared.errors import UserError
from shared.influence.params import Parameters
from shared.influence.solvers import cg, dense, matrix_of, neumann
from shared.vision.backbones import conv4, initialised, mlp

EXACT = partial(cg, tol=1e-12)


def eye(lam):
    return torch.eye(lam.numel(), dtype=lam.dtype)


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def moved(lam, seed=0, by=0.3):
    """Somewhere else: the derivatives must be right away from the optimum too."""
    return lam + by * torch.randn(
        lam.shape, generator=torch.Generator().manual_seed(seed), dtype=lam.dtype
    )


# ---- total derivatives ---------------------------------------------------------------------------


@pytest.mark.parametrize("away", [0.0, 0.3])
def test_the_total_gradient_is_that_of_the_solved_inner_problems(anil, away, helpers):
    lam = moved(anil.lam, by=away)
    at_lam = lam.clone().requires_grad_()
    (oracle,) = torch.autograd.grad(helpers.naive_anil(anil.problem, at_lam), at_lam)
    assert (Implicit(anil.problem, lam).gradient() - oracle).norm() < 1e-10
    composed = Composed(anil.problem)
    assert (composed.gradient(lam) - oracle).norm() < 1e-10
    gradient, value = composed.gradient_and_value(lam)
    assert (gradient - oracle).norm() < 1e-10
    assert float(value) == pytest.approx(float(helpers.naive_anil(anil.problem, lam)), rel=1e-12)


@pytest.mark.parametrize("away", [0.0, 0.3])
def test_the_total_hessian_is_that_of_the_solved_inner_problems(anil, away, helpers):
    lam = moved(anil.lam, by=away)
    oracle = torch.autograd.functional.hessian(
        lambda one: helpers.naive_anil(anil.problem, one), lam
    )
    found = Implicit(anil.problem, lam).product(eye(lam))
    assert (found - oracle).abs().max() < 1e-8
    assert (found - found.T).abs().max() < 1e-10
    assert (Composed(anil.problem).hessian(lam) - oracle).abs().max() < 1e-8


def test_weights_of_tasks_and_samples_are_in_all_derivatives(anil, helpers):
    problem = random_weights(anil.problem)
    oracle = torch.autograd.functional.hessian(
        lambda one: helpers.naive_anil(problem, one), anil.lam
    )
    at_lam = anil.lam.clone().requires_grad_()
    (slope,) = torch.autograd.grad(helpers.naive_anil(problem, at_lam), at_lam)
    state = at(problem, anil.lam)
    assert (state.gradient() - slope).norm() < 1e-10
    assert (state.product(eye(anil.lam)) - oracle).abs().max() < 1e-8


def test_at_the_optimum_the_total_gradient_vanishes_and_the_direct_one_does_not(anil, helpers):
    state = at(anil.problem, anil.lam)
    assert state.gradient().norm() < 1e-11
    assert state.direct_gradient().norm() > 1e-3
    gradients = state.task_gradients(range(5))
    assert relative(gradients.mean(0), -helpers.l2 * anil.lam) < 1e-9


def test_chunks_of_tasks_change_nothing(anil):
    from dataclasses import replace

    whole, parts = at(anil.problem, anil.lam), at(replace(anil.problem, chunk=2), anil.lam)
    s = moved(torch.zeros_like(anil.lam), 1)
    v = torch.stack([s, anil.lam], 1)
    for curvature in ("exact", "four terms", "gamma", "gauss-newton", "direct"):
        assert relative(parts.product(v, curvature), whole.product(v, curvature)) < 1e-12
    assert relative(parts.train_dots(s), whole.train_dots(s)) < 1e-12
    assert relative(parts.val_dots(s), whole.val_dots(s)) < 1e-12
    assert relative(parts.task_dots(s), whole.task_dots(s)) < 1e-12


def random_weights(problem, seed=5):
    """The problem with weights of tasks and of both kinds of samples between 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "train_weights": problem.tasks.y_train.shape,
        "val_weights": problem.tasks.y_val.shape,
    }
    return problem.with_weights(
        **{
            name: torch.rand(shape, generator=draw, dtype=torch.float64)
            for name, shape in {"weights": (problem.n,), **shapes}.items()
        }
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_approximate_curvatures_are_what_they_are_called(anil, helpers, weighted):
    """Each from dense blocks of second derivatives, by jacobians of one task after the other."""
    problem, lam = anil.problem, moved(anil.lam, by=0.1)
    shares = torch.full((problem.n,), 1 / problem.n, dtype=torch.float64)
    if weighted:
        problem = random_weights(problem)
        shares = problem.weights / problem.n
    state = at(problem, lam)
    four, direct, gn, gamma = (
        torch.zeros(lam.numel(), lam.numel(), dtype=lam.dtype) for _ in range(4)
    )
    for k in range(problem.n):
        task, theta = tuple(part[k] for part in problem.data), state.theta[k]
        inner = jacrev(grad(problem.inner_loss, argnums=1), argnums=(0, 1))(lam, theta, task)
        follow = -torch.linalg.solve(inner[1], inner[0])
        (ll, lt), (tl, tt) = jacrev(grad(problem.outer_loss, argnums=(0, 1)), argnums=(0, 1))(
            lam, theta, task
        )
        share = shares[k]
        four += share * (ll + lt @ follow + follow.T @ tl + follow.T @ tt @ follow)
        direct += share * ll
        gamma += (
            share * grad(problem.outer_loss, argnums=1)(lam, theta, task).abs().sum() * eye(lam)
        )
        x, y, _ = task[3:]
        given = problem.val_weights
        w = (torch.ones(len(y), dtype=lam.dtype) if given is None else given[k]) / len(y)
        z_lam, z_theta = jacrev(problem.outputs, argnums=(0, 1))(lam, theta, x)
        z = (z_lam + z_theta @ follow).reshape(-1, lam.numel())
        p = problem.outputs(lam, theta, x).softmax(1)
        bend = torch.block_diag(
            *[w[i] * (torch.diag(p[i]) - torch.outer(p[i], p[i])) for i in range(len(y))]
        )
        gn += share * z.T @ bend @ z
    for name, matrix in (
        ("four terms", four),
        ("direct", direct),
        ("gauss-newton", gn),
        ("gamma", four + gamma),
    ):
        assert (
            state.product(eye(lam), name) - matrix - helpers.l2 * eye(lam)
        ).abs().max() < 1e-10, name
    if weighted:
        return
    # H' is not small
    assert relative(state.product(eye(lam), "four terms"), state.product(eye(lam))) > 0.05


def test_a_convolutional_body_of_odd_shape():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 2, 9, 7, generator=draw, dtype=torch.float64)
    tasks = Tasks(
        x,
        torch.arange(4).expand(3, -1).remainder(2),
        x.flip(1)[:, :3] + 0.1,
        torch.tensor([[0, 1, 1]] * 3),
    )
    body = initialised(conv4(2, 3), 0).double()
    problem = MetaProblem(Anil.of(body, x[0], 2, 0.1), tasks, l2=0.1)
    lam = problem.inner.parameters.flat()
    v = moved(torch.zeros_like(lam), 2)
    slope = Composed(problem).gradient(lam)
    assert (at(problem, lam).gradient() - slope).norm() < 1e-10
    step = 1e-4
    numeric = (
        Composed(problem).gradient(lam + step * v) - Composed(problem).gradient(lam - step * v)
    ) / (2 * step)
    assert relative(at(problem, lam).product(v), numeric) < 1e-6


@pytest.mark.parametrize("kind", ["imaml", "unrolled"])
def test_other_inner_problems_against_differences_of_the_gradient(kind, request):
    solved = request.getfixturevalue(kind)
    lam, step = moved(solved.lam, by=0.1), 1e-5
    state = at(solved.problem, lam)
    v = moved(torch.zeros_like(lam), 4)

    def value(point):
        return float(Composed(solved.problem).value(point))

    numeric = (value(lam + step * v) - value(lam - step * v)) / (2 * step)
    assert float(state.gradient() @ v) == pytest.approx(numeric, rel=1e-6)
    numeric = (
        at(solved.problem, lam + step * v).gradient()
        - at(solved.problem, lam - step * v).gradient()
    ) / (2 * step)
    assert relative(state.product(v), numeric) < 1e-6
    w = moved(torch.zeros_like(lam), 5)
    assert float(w @ state.product(v)) == pytest.approx(float(v @ state.product(w)), rel=1e-9)


def test_unrolled_steps_are_those_of_a_loop(unrolled, helpers):
    """The objective by torch's own SGD steps on a module, task by task."""
    from torch.nn import functional
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    problem, lam = unrolled.problem, unrolled.lam
    total = 0.0
    for k in range(problem.n):
        model = mlp([helpers.size, helpers.hidden, helpers.ways], last=True).double()
        vector_to_parameters(lam.clone(), model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=problem.inner.rate)
        for _ in range(problem.inner.steps):
            optimizer.zero_grad()
            functional.cross_entropy(
                model(problem.tasks.x_train[k]), problem.tasks.y_train[k]
            ).backward()
            optimizer.step()
        state = Unrolled(problem, lam)
        theta = state.adapt(lam, tuple(part[k] for part in problem.data))
        assert (theta - parameters_to_vector(model.parameters()).detach()).norm() < 1e-12
        total += (
            functional.cross_entropy(model(problem.tasks.x_val[k]), problem.tasks.y_val[k]).item()
            / problem.n
        )
    assert total + helpers.l2 / 2 * float(lam @ lam) == pytest.approx(
        float(Composed(problem).value(lam)), rel=1e-12
    )


# ---- influence -----------------------------------------------------------------------------------


def difference(solved, step=1e-4, **weights):
    """d lam* / d (removal) by central differences: weights named are lowered and raised by `step`
    where their mask is 1.
    """
    ((name, mask),) = weights.items()
    retrained = retrain(solved.problem, solved.lam, tol=1e-13)
    ones = torch.ones_like(mask)
    down, up = (
        retrained(solved.problem.with_weights(**{name: ones - sign * step * mask})).w
        for sign in (1, -1)
    )
    return (down - up) / (2 * step)


def mask(shape, *where):
    found = torch.zeros(shape, dtype=torch.float64)
    found[where] = 1
    return found


@pytest.mark.parametrize("kind", ["anil", "imaml", "unrolled"])
def test_task_if_is_the_derivative_of_the_solved_bilevel_problem(kind, request):
    solved = request.getfixturevalue(kind)
    state = at(solved.problem, solved.lam)
    found, info = estimators.task_removal(state, [1, 3], solver=EXACT)
    assert info.relative_residual < 1e-11
    for column, k in enumerate((1, 3)):
        assert (
            relative(found[:, column], difference(solved, weights=mask(solved.problem.n, k))) < 1e-5
        )


@pytest.mark.parametrize("kind", ["anil", "imaml"])
def test_instance_ifs_are_derivatives_of_the_solved_bilevel_problem(kind, request):
    solved = request.getfixturevalue(kind)
    state = at(solved.problem, solved.lam)
    n = solved.problem.n
    train, _ = estimators.train_removal(state, 2, [0, 4], solver=EXACT)
    val, _ = estimators.val_removal(state, 3, [1, 6], solver=EXACT)
    for column, z in enumerate((0, 4)):
        assert (
            relative(train[:, column], difference(solved, train_weights=mask((n, 6), 2, z))) < 1e-5
        )
    for column, z in enumerate((1, 6)):
        assert relative(val[:, column], difference(solved, val_weights=mask((n, 7), 3, z))) < 1e-5


@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_the_metric_is_the_mean_loss_of_test_tasks_whatever_their_regulariser(anil, helpers, l2):
    tests = MetaProblem(anil.problem.inner, helpers.make_tasks(3, 9), l2=l2, inner_tol=1e-12)
    lam = anil.lam.clone().requires_grad_()
    loss = helpers.naive_anil(tests, lam) - helpers.l2 / 2 * (lam**2).sum()
    (oracle,) = torch.autograd.grad(loss, lam)
    assert (estimators.metric_gradient(tests, anil.lam) - oracle).norm() < 1e-10
    found = estimators.meta_test_loss(tests, anil.lam)
    assert found == pytest.approx(float(loss.detach()), rel=1e-10)


@pytest.mark.parametrize("kind", ["anil", "imaml", "unrolled"])
def test_scores_by_one_solve_are_the_derivatives_of_the_metric(kind, request, helpers):
    solved = request.getfixturevalue(kind)
    problem, state = solved.problem, at(solved.problem, solved.lam)
    tests = MetaProblem(problem.inner, helpers.make_tasks(3, 9), inner_tol=1e-12)
    metric = estimators.metric_gradient(tests, solved.lam)
    s, _ = estimators.adjoint(state, metric, solver=EXACT)
    tasks, train, val = (
        estimators.task_scores(state, s),
        estimators.train_scores(state, s),
        estimators.val_scores(state, s),
    )
    n = problem.n

    def change(step=1e-4, **weights):
        ((name, where),) = weights.items()
        retrained = retrain(problem, solved.lam, tol=1e-13)
        ends = [
            retrained(
                problem.with_weights(**{name: torch.ones_like(where) - sign * step * where})
            ).w
            for sign in (1, -1)
        ]
        return (
            estimators.meta_test_loss(tests, ends[0]) - estimators.meta_test_loss(tests, ends[1])
        ) / (2 * step)

    assert float(tasks[1]) == pytest.approx(change(weights=mask(n, 1)), rel=1e-5)
    assert float(train[2, 3]) == pytest.approx(change(train_weights=mask((n, 6), 2, 3)), rel=1e-5)
    assert float(val[0, 5]) == pytest.approx(change(val_weights=mask((n, 7), 0, 5)), rel=1e-5)


def test_scores_are_the_metric_along_the_removal_effects(anil):
    state = at(anil.problem, anil.lam)
    metric = moved(torch.zeros_like(anil.lam), 8)
    for method in estimators.METHODS:
        s, _ = estimators.adjoint(state, metric, method, solver=dense)
        effects, _ = estimators.task_removal(state, range(5), method, solver=dense)
        assert torch.allclose(
            estimators.task_scores(state, s, method), metric @ effects, rtol=1e-7, atol=1e-12
        ), method
    s, _ = estimators.adjoint(state, metric, solver=EXACT)
    train, _ = estimators.train_removal(state, 4, range(6), solver=EXACT)
    val, _ = estimators.val_removal(state, 4, range(7), solver=EXACT)
    assert torch.allclose(
        estimators.train_scores(state, s)[4], metric @ train, rtol=1e-8, atol=1e-12
    )
    assert torch.allclose(estimators.val_scores(state, s)[4], metric @ val, rtol=1e-8, atol=1e-12)


def test_the_derivative_of_the_inverse_in_the_training_instances_is_not_small(anil):
    """What leaving it out would cost, so that the difference oracle above is seen to test it."""
    state = at(anil.problem, anil.lam)
    whole = state.train_gradients(2, [0])[0]
    rows, theta, data = state._one(2)
    s_a, losses = state.adjoint[rows], state._sample_losses(data[0][0, [0]], data[1][0, [0]])
    s_b = state._solve(grad(lambda th: losses(anil.lam, th[0]).sum())(theta), rows)

    def without(lam, th):
        outer = grad(lambda one: state._outer(lam, one, rows).sum())(th)
        return (outer * s_b).sum() + (s_a * grad(lambda one: losses(lam, one[0]).sum())(th)).sum()

    in_lam, in_theta = grad(without, argnums=(0, 1))(anil.lam, theta)
    assert relative(in_lam - state._pull(state._solve(in_theta, rows), rows), whole) > 0.2


def test_the_inner_effect_is_the_derivative_of_the_tasks_own_parameters(anil):
    state, step = at(anil.problem, anil.lam), 1e-4
    found = state.inner_effect(1, [2])[0]
    ends = []
    for sign in (1, -1):
        weights = torch.ones(5, 6, dtype=torch.float64) - sign * step * mask((5, 6), 1, 2)
        ends.append(anil.problem.with_weights(train_weights=weights).adapt(anil.lam).theta[1])
    assert relative(found, (ends[0] - ends[1]) / (2 * step)) < 1e-6


def test_removing_what_has_no_weight_changes_nothing(anil):
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    problem = anil.problem.with_weights(weights=weights)
    lam = fit(problem, anil.lam, steps=0, tol=1e-11).lam
    state = at(problem, lam)
    effects, _ = estimators.task_removal(state, [1], solver=EXACT)
    assert effects.abs().max() == 0
    s, _ = estimators.adjoint(state, lam, solver=EXACT)
    assert estimators.task_scores(state, s)[1] == 0
    assert estimators.train_scores(state, s)[1].abs().max() == 0
    assert estimators.val_scores(state, s)[1].abs().max() == 0
    assert torch.equal(retrain(problem, lam, tol=1e-10)(problem).w, lam)


# ---- linear-quadratic: a closed form -------------------------------------------------------------


class Linear:
    """Outputs x_a . theta + x_b . lam of inputs [x_a (2), x_b (3)], with (mu/2) |theta|^2:
    everything is quadratic.
    """

    name, theta_size, penalty_weight, convex = "anil", 2, 0.3, True

    def __init__(self):
        self.parameters = Parameters.of(torch.nn.Linear(3, 1, bias=False).double())

    def prepare(self, lam, x):
        return torch.cat([x[:, :2], (x[:, 2:] @ lam).unsqueeze(1)], 1)

    def finish(self, theta, prepared):
        return prepared[:, :2] @ theta + prepared[:, 2]

    def penalty(self, lam, theta):
        return self.penalty_weight / 2 * theta @ theta

    def curvature(self, losses, lam, theta, prepared, y, w):
        return prepared[:, :2].T @ (w.unsqueeze(1) * prepared[:, :2]) + self.penalty_weight * eye(
            theta
        )

    def start(self, lam):
        return lam.new_zeros(2)


def linear(seed=0, only_theta_in_training=False):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 11, 5, generator=draw, dtype=torch.float64)
    y = torch.randn(4, 11, generator=draw, dtype=torch.float64)
    train, val = x[:, :6].clone(), x[:, 6:].clone()
    if only_theta_in_training:
        train[:, :, 2:], val[:, :, :2] = 0, 0
    tasks = Tasks(train, y[:, :6], val, y[:, 6:])
    return MetaProblem(Linear(), tasks, l2=0.2, sample_losses=lambda z, y: (z - y) ** 2 / 2)


def closed_form(problem, weights):
    """lam* by the normal equations, in the residuals of each task's ridge regression."""
    t = problem.tasks
    matrix, side = (
        problem.l2 * torch.eye(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    for k in range(problem.n):
        a, b, y = t.x_train[k][:, :2], t.x_train[k][:, 2:], t.y_train[k]
        # theta = ridge (y - b lam)
        ridge = torch.linalg.solve(a.T @ a / 6 + 0.3 * torch.eye(2, dtype=torch.float64), a.T / 6)
        av, bv, yv = t.x_val[k][:, :2], t.x_val[k][:, 2:], t.y_val[k]
        slope, rest = bv - av @ ridge @ b, yv - av @ ridge @ y
        matrix += weights[k] / problem.n * slope.T @ slope / 5
        side += weights[k] / problem.n * slope.T @ rest / 5
    return torch.linalg.solve(matrix, side), matrix


def test_a_linear_quadratic_problem_has_the_closed_form():
    problem = linear()
    ones = torch.ones(4, dtype=torch.float64)
    lam, matrix = closed_form(problem, ones)
    state = at(problem, lam)
    assert state.gradient().norm() < 1e-13
    assert (state.product(eye(lam)) - matrix).abs().max() < 1e-12
    assert (state.product(eye(lam), "four terms") - matrix).abs().max() < 1e-12  # H' = 0
    for k in range(4):
        weights = ones.clone()
        weights[k] = 0
        wanted, without = closed_form(problem, weights)
        assert (
            relative(
                retrain(problem, lam, tol=1e-12)(problem.with_weights(weights=weights)).w, wanted
            )
            < 1e-9
        )
        effect = estimators.task_removal(state, [k], solver=dense)[0][:, 0]
        # without task k the gradient is -(its share), and the matrix lacks its share too: removal =
        # without^-1 matrix (influence)
        assert relative(torch.linalg.solve(without, matrix @ effect), wanted - lam) < 1e-9


def test_where_the_outer_loss_does_not_depend_on_theta_task_if_is_direct_if():
    problem = linear(only_theta_in_training=True)
    lam, _ = closed_form(problem, torch.ones(4, dtype=torch.float64))
    state = at(problem, lam)
    assert state.outer_slope.abs().max() == 0
    total, direct = (
        estimators.task_removal(state, range(4), method, solver=dense)[0]
        for method in ("task-IF", "direct-IF")
    )
    assert relative(total, direct) < 1e-12


# ---- solving -------------------------------------------------------------------------------------


def test_the_scaled_neumann_series_tends_to_the_solution(anil):
    state = at(anil.problem, anil.lam)
    b = moved(torch.zeros_like(anil.lam), 3)
    exact, _ = cg(state.product, b, tol=1e-12)
    matrix = matrix_of(state.product, b)
    errors = [
        relative(neumann(matrix.matmul, b, depth=depth, tol=None)[0], exact)
        for depth in (1, 10, 50, 2000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    assert neumann(state.product, b, depth=5, tol=None)[1].relative_residual > 1e-3
    with pytest.raises(UserError, match="residual"):
        neumann(matrix.matmul, b, depth=5)


def test_products_do_not_depend_on_those_before(anil):
    """Graphs are kept between products: of other curvatures, of one direction and of many."""
    v = moved(torch.zeros_like(anil.lam), 2)
    many = torch.stack([v, anil.lam, v - anil.lam], 1)
    state = at(anil.problem, anil.lam)
    for curvature in ("exact", "four terms", "gamma", "gauss-newton", "direct", "exact"):
        for direction in (v, many, v):
            alone = at(anil.problem, anil.lam).product(direction, curvature)
            assert relative(state.product(direction, curvature), alone) < 1e-12


def test_a_product_costs_two_inner_solves_a_task_and_direction(anil):
    state = at(anil.problem, anil.lam)
    assert state.inner_solves == 5  # the adjoint
    v = moved(torch.zeros_like(anil.lam))
    state.product(v)
    assert state.inner_solves == 5 + 2 * 5
    state.product(torch.stack([v, v, v], 1))
    assert state.inner_solves == 5 + 2 * 5 * 4
    before = state.inner_solves
    _, info = estimators.adjoint(state, v, solver=EXACT)
    assert state.inner_solves - before == 2 * 5 * info.products
    before = state.inner_solves
    estimators.task_scores(state, v)
    assert state.inner_solves == before  # scores of tasks take no solve
    estimators.train_scores(state, v)
    assert state.inner_solves == before + 2 * 5


def test_the_dense_matrix_of_the_product_is_the_oracle_for_cg(anil):
    state = at(anil.problem, anil.lam)
    matrix = matrix_of(state.product, anil.lam)
    b = moved(torch.zeros_like(anil.lam), 6)
    assert relative(cg(state.product, b, tol=1e-12)[0], torch.linalg.solve(matrix, b)) < 1e-9


def test_inner_problems_are_solved_to_their_minimum(anil, helpers):
    found = anil.problem.adapt(moved(anil.lam))
    assert found.residual <= 1e-12
    for k in range(5):
        task = tuple(part[k] for part in anil.problem.data)
        bend = jacrev(
            grad(lambda th, task=task: anil.problem.inner_loss(moved(anil.lam), th, task))
        )(found.theta[k])
        assert (found.factor[k] @ found.factor[k].T - bend).abs().max() < 1e-12
        assert (bend - helpers.mu * eye(bend[0])).diagonal().min() > 0


def test_retraining_finds_the_same_minimum_with_or_without_the_hessian(anil):
    weights = torch.ones(5, dtype=torch.float64)
    weights[0] = 0
    problem = anil.problem.with_weights(weights=weights)
    shared = retrain(anil.problem, anil.lam)(problem)
    own = polish(Composed(problem), anil.lam)
    assert relative(shared.w, own.w) < 1e-7
    assert relative(shared.w, anil.lam) > 1e-3


def test_an_inner_problem_that_is_not_convex_is_refused(network, helpers):
    problem = MetaProblem(Imaml(network, penalty_weight=1e-4), helpers.make_tasks(2, 1))
    with pytest.raises(UserError, match="penalty"):
        at(problem, torch.zeros_like(network.flat()))
