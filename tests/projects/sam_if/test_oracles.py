"""SAM-HIF is the derivative of SAM's solution: held against the solution found anew, the Jacobian
of the composed problem, closed forms.
"""

import pytest
import torch
from torch import nn
from torch.func import jacrev

from projects.sam_if import (
    Estimator,
    Gif,
    Recipe,
    SAMProblem,
    fit,
    gif_checkpoints,
    unrolled_effects,
)
from projects.sam_if.fixed_point import Linearised, partition
from shared.errors import UserError
from shared.influence import solvers
from shared.influence.objective import Objective
from shared.influence.products import count_passes

N = 31  # samples of the cases


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


# ---- the fixed point and its Jacobian ------------------------------------------------------------


def test_the_field_is_that_of_the_naive_loop_and_zero_at_the_solution(case, helpers):
    w = case.w + 0.1
    assert relative(case.problem.field(w), helpers.naive_field(case, w)) < 1e-12
    assert helpers.naive_field(case, case.w).norm() < 1e-12
    assert relative(case.problem.at(w).residual, helpers.naive_field(case, w)) < 1e-12


def test_the_jacobian_is_that_of_the_composed_field(case):
    """Reverse mode through F with nothing of the closed form; J and J^T both, on columns and on one
    vector.
    """
    w = case.w + 0.05
    at, eye = case.problem.at(w), torch.eye(case.w.numel(), dtype=torch.float64)
    exact = jacrev(case.problem.field)(w)
    assert (at.jacobian(eye) - exact).abs().max() < 1e-10
    assert (at.jacobian_transposed(eye) - exact.T).abs().max() < 1e-10
    assert (exact - exact.T).abs().max() > 1e-4  # F is no gradient
    v = torch.linspace(-1, 2, case.w.numel(), dtype=torch.float64)
    assert relative(at.jacobian(v), exact @ v) < 1e-10
    assert relative(at.jacobian_transposed(v), exact.T @ v) < 1e-10


def test_the_right_hand_sides_are_the_derivative_in_a_samples_weight(case):
    n = case.problem.objective.n
    estimator = Estimator(case.problem.at(case.w))

    def field(m):
        return case.problem.weighted(m).field(case.w)

    # [p, n]; a weight of 1 is 1/n of the loss
    exact = n * jacrev(field)(torch.ones(n, dtype=torch.float64))
    assert relative(estimator.right_hand_side(torch.eye(n, dtype=torch.float64)), exact) < 1e-10
    assert (
        relative(estimator.right_hand_side(torch.ones(n, dtype=torch.float64)), exact.sum(1))
        < 1e-10
    )


def test_hif_is_the_finite_difference_of_the_solution_found_anew(case, helpers):
    """The property all rests on. The rest of the estimators miss it."""
    n, step = case.problem.objective.n, 1e-3
    hif, frozen, plain = (
        Estimator(case.problem.at(case.w), kind, tol=1e-11) for kind in ("sam_hif", "sam_if", "if")
    )
    for k in (0, 13, n - 1):
        ends = []
        for sign in (1, -1):
            m = torch.ones(n, dtype=torch.float64)
            m[k] += sign * step
            ends.append(helpers.solve_again(case, m))
        true = -(ends[0] - ends[1]) / (2 * step)  # removal lowers m_k by 1
        assert relative(hif.removal_effects([k])[:, 0], true) < 1e-5
        assert relative(frozen.removal_effects([k])[:, 0], true) > 1e-3
        assert relative(plain.removal_effects([k])[:, 0], true) > 1e-3


def test_one_term_of_the_perturbation_alone_is_worse_than_none(convex):
    """The derivatives in the matrix and in the right-hand side nearly cancel."""
    at, ids = convex.problem.at(convex.w), [2, 17]
    exact = Estimator(at, tol=1e-11).removal_effects(ids)
    frozen = relative(Estimator(at, "sam_if").removal_effects(ids), exact)
    assert relative(Estimator(at, drop_eq9_term=True).removal_effects(ids), exact) > 1.5 * frozen
    assert relative(Estimator(at, drop_matrix_term=True).removal_effects(ids), exact) > 1.5 * frozen


@pytest.mark.parametrize("batches", [None, 7])
def test_without_a_radius_all_three_are_the_influence_function(batches, helpers):
    made = helpers.make(rho=0.0, batches=batches)
    at = made.problem.at(made.w)
    plain, frozen, hif = (
        Estimator(at, kind, solver="dense") for kind in ("if", "sam_if", "sam_hif")
    )
    scores = plain.scores(made.metric)
    if batches is None:  # no arithmetic differs
        assert torch.equal(frozen.scores(made.metric), scores)
        assert torch.equal(hif.scores(made.metric), scores)
    assert relative(hif.scores(made.metric), scores) < 1e-12
    assert relative(hif.removal_effects([3, 1]), plain.removal_effects([3, 1])) < 1e-12
    # of the whole objective, by other code
    hessian = jacrev(torch.func.grad(made.problem.objective))(made.w)
    gradients = jacrev(made.losses)(made.w)
    by_hand = torch.linalg.solve(hessian, gradients.T).T @ torch.func.grad(made.metric)(made.w) / N
    assert relative(scores, by_hand) < 1e-9


def test_batches_of_all_samples_are_no_batches(convex):
    n = convex.problem.objective.n
    same = SAMProblem(
        convex.problem.objective,
        convex.problem.rho,
        (torch.randperm(n, generator=torch.Generator().manual_seed(0)),),
    )
    a, b = (
        Estimator(problem.at(convex.w)).scores(convex.metric) for problem in (convex.problem, same)
    )
    assert relative(b, a) < 1e-7


# ---- scores --------------------------------------------------------------------------------------


def test_adjoint_scores_are_the_explicit_ones(case):
    """q . J^-1 r_k from a solve per sample is what one adjoint solve and two forward-mode passes
    give.
    """
    n = case.problem.objective.n
    query = torch.func.grad(case.metric)(case.w)
    for kind in ("if", "sam_if", "sam_hif"):
        estimator = Estimator(case.problem.at(case.w), kind, solver="dense")
        effects = estimator.removal_effects(range(n))
        assert relative(estimator.scores(case.metric), query @ effects) < 1e-9


def test_several_queries_are_scored_as_each_alone(convex, helpers):
    x, y = helpers.data(3, seed=8)

    def losses(w):
        return nn.functional.cross_entropy(convex.outputs(w, x), y, reduction="none")

    estimator = Estimator(convex.problem.at(convex.w), tol=1e-11)
    together = estimator.scores(losses)
    for q in range(3):
        alone = estimator.scores(lambda w, q=q: losses(w)[q])
        assert relative(together[:, q], alone) < 1e-8


@pytest.mark.parametrize("solver", ["gcr", "gmres", "lsmr", "dense"])
def test_every_solver_gives_the_inverse_of_the_transpose(convex, solver):
    jacobian = jacrev(convex.problem.field)(convex.w)
    query = torch.func.grad(convex.metric)(convex.w)
    exact = torch.linalg.solve(jacobian.T, query)
    found, info = Estimator(convex.problem.at(convex.w), solver=solver, tol=1e-9).solve(
        query, transposed=True
    )
    assert relative(found, exact) < 1e-7
    assert info.relative_residual <= 1e-9
    assert relative(torch.linalg.solve(jacobian, query), exact) > 1e-4  # that of J is another


def test_scoring_costs_one_solve_and_three_passes(convex):
    """The cost does not grow with the number of samples scored."""
    estimator = Estimator(convex.problem.at(convex.w))
    query = torch.func.grad(convex.metric)(convex.w)
    with count_passes() as solving:
        s, info = estimator.solve(query, transposed=True)
    assert solving.curvature_products == 2 * info.products
    with count_passes() as scoring:
        estimator.along(s)
    assert (
        scoring.forward_mode,
        scoring.curvature_products,
        scoring.gradients,
        scoring.per_sample_gradients,
    ) == (2, 1, 0, 0)


def test_the_effect_of_a_set_is_the_sum_of_its_samples(case):
    estimator, ids = Estimator(case.problem.at(case.w), tol=1e-11), [4, 30, 11]
    assert relative(estimator.removal_effect(ids), estimator.removal_effects(ids).sum(1)) < 1e-8


def test_a_sample_that_is_already_removed_has_no_effect(helpers):
    made = helpers.make(weights=torch.where(torch.arange(N) == 6, 0.0, 1.0).double())
    estimator = Estimator(made.problem.at(made.w))
    assert estimator.scores(made.metric)[6] == 0
    assert not estimator.removal_effects([6]).any()
    assert helpers.naive_field(made, made.w, made.problem.objective.weights).norm() < 1e-12


def test_gauss_newton_is_the_hessian_of_a_model_that_is_linear(convex):
    a, b = (
        Estimator(convex.problem.at(convex.w, curvature)).scores(convex.metric)
        for curvature in ("hessian", "ggn")
    )
    assert relative(b, a) < 1e-6


def test_gauss_newton_is_positive_where_the_hessian_of_a_network_is_not(helpers):
    made = helpers.make(hidden=4, rho=0.1)
    w = made.w + 0.8 * torch.randn(
        made.w.numel(), generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    eye = torch.eye(w.numel(), dtype=torch.float64)
    hessian, ggn = (made.problem.at(w, curvature).frozen(eye) for curvature in ("hessian", "ggn"))
    assert torch.linalg.eigvalsh(hessian)[0] < 0 < torch.linalg.eigvalsh(ggn)[0]


# ---- true removal --------------------------------------------------------------------------------


def test_linear_regression_without_a_radius_has_sherman_and_morrisons_removal(helpers):
    """Infinitesimal removal is the first term of the closed form: the leverage alone is between
    them.
    """
    x, _ = helpers.data(20)
    y = (
        x @ torch.linspace(-1, 1, x.shape[1], dtype=torch.float64)
        + torch.randn(20, generator=torch.Generator().manual_seed(1)).double()
    )
    objective = Objective(lambda w, part: (part[0] @ w - part[1]).square() / 2, (x, y), l2=0.01)
    problem = SAMProblem(objective, 0.0)
    w = fit(problem, torch.zeros(x.shape[1], dtype=torch.float64)).w
    a = x.T @ x / 20 + 0.01 * torch.eye(x.shape[1])
    for k in (0, 7):
        leverage = x[k] @ torch.linalg.solve(a, x[k]) / 20
        closed = torch.linalg.solve(a, x[k]) * (x[k] @ w - y[k]) / 20 / (1 - leverage)
        closed_form = torch.linalg.solve(
            a - torch.outer(x[k], x[k]) / 20, (x.T @ y - x[k] * y[k]) / 20
        )
        assert relative(closed_form - w, closed) < 1e-8
        assert (
            relative(Estimator(problem.at(w)).removal_effects([k])[:, 0] / (1 - leverage), closed)
            < 1e-6
        )


def test_hif_is_nearest_to_the_removed_solution(convex, helpers):
    errors = {kind: [] for kind in ("if", "sam_if", "sam_hif")}
    for k in range(0, N, 3):
        m = torch.ones(N, dtype=torch.float64)
        m[k] = 0
        true = helpers.solve_again(convex, m) - convex.w
        for kind, found in errors.items():
            found.append(
                relative(
                    Estimator(convex.problem.at(convex.w), kind).removal_effects([k])[:, 0], true
                )
            )
    mean = {kind: sum(found) / len(found) for kind, found in errors.items()}
    assert mean["sam_hif"] < mean["sam_if"] < mean["if"]


# ---- the whole run -------------------------------------------------------------------------------


def recipe_of(
    helpers, momentum: float = 0.9, rho: float = 0.2, cosine: bool = True, hidden: int = 4
) -> Recipe:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()
    objective, parameters = helpers.objective_of(model, l2=0.01)
    problem = SAMProblem(objective, rho)
    return Recipe.epochs(
        problem,
        parameters.flat(),
        epochs=4,
        batch=8,
        lr=0.3,
        seed=2,
        momentum=momentum,
        cosine=cosine,
    )


def naive_run(recipe: Recipe, m):
    """The run by loops over samples and autograd's backward."""
    w, velocity = recipe.w0.clone(), torch.zeros_like(recipe.w0)
    objective = recipe.problem.objective

    def slope(at, rows):
        at = at.detach().requires_grad_()
        loss = sum(
            m[i]
            * objective.losses(at, (objective.data[0][i : i + 1], objective.data[1][i : i + 1]))[0]
            for i in rows.tolist()
        )
        return torch.autograd.grad(loss / len(rows), at)[0]

    for step in recipe.steps:
        g = slope(w, step.rows)
        velocity = (
            recipe.momentum * velocity
            + slope(w + recipe.problem.rho * g / g.norm(), step.rows)
            + objective.l2 * w
        )
        w = w - step.lr * velocity
    return w


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_many_runs_make_their_steps_together(momentum, helpers):
    recipe = recipe_of(helpers, momentum)
    draw = torch.Generator().manual_seed(7)
    weights = torch.rand(5, recipe.problem.objective.n, generator=draw, dtype=torch.float64)
    ends = recipe.retrain(weights, chunk=2)
    for m, end in zip(weights, ends, strict=True):
        assert relative(end, naive_run(recipe, m)) < 1e-10
    with pytest.raises(UserError, match="training diverged"):
        recipe.retrain(1e300 * weights)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unrolled_effects_are_finite_differences_of_the_whole_run(momentum, helpers):
    recipe = recipe_of(helpers, momentum)
    ones = torch.ones(N, dtype=torch.float64)
    assert relative(recipe.train(), naive_run(recipe, ones)) < 1e-10
    ids = [0, 12, 30]
    found = unrolled_effects(recipe, ids, chunk=2)
    for column, k in enumerate(ids):
        h = 1e-4
        up, down = ones.clone(), ones.clone()
        up[k] += h
        down[k] -= h
        true = -(naive_run(recipe, up) - naive_run(recipe, down)) / (2 * h)
        assert relative(found[:, column], true) < 1e-6


def test_gif_is_the_tangent_of_a_run_without_curvature(helpers):
    """With losses that are linear in w every Hessian is 0, and what GIF leaves out is nothing."""
    x, _ = helpers.data(N)
    objective = Objective(lambda w, part: part[0] @ w, (x,), l2=0.05)
    recipe = Recipe.epochs(
        SAMProblem(objective, 0.3),
        torch.ones(x.shape[1], dtype=torch.float64),
        epochs=3,
        batch=8,
        lr=0.2,
        seed=0,
        momentum=0.8,
        cosine=True,
    )
    ids = list(range(N))
    gif = Gif(recipe)
    exact = unrolled_effects(recipe, ids)
    assert relative(gif.removal_effects(ids), exact) < 1e-10
    assert relative(gif.removal_effect([3, 9]), exact[:, [3, 9]].sum(1)) < 1e-10
    assert relative(gif.scores(lambda w: w.square().sum()), 2 * recipe.train() @ exact) < 1e-10


def test_gif_takes_gradients_at_the_perturbed_points(helpers):
    """A sum written by hand, without momentum and decay, on a network where the points matter."""
    recipe = recipe_of(helpers, momentum=0.0, cosine=False)
    objective = recipe.problem.objective
    plain = Recipe(
        SAMProblem(Objective(objective.losses, objective.data), 0.2), recipe.w0, recipe.steps
    )
    k, total = 12, torch.zeros_like(recipe.w0)
    w = plain.w0
    for step in plain.steps:
        part = tuple(one[step.rows] for one in objective.data)
        g = torch.func.grad(lambda at, part=part: objective.losses(at, part).mean())(w)
        wt = w + 0.2 * g / g.norm()
        if k in step.rows.tolist():
            own = tuple(one[k : k + 1] for one in objective.data)
            total += (
                step.lr
                / len(step.rows)
                * torch.func.grad(lambda at, own=own: objective.losses(at, own)[0])(wt)
            )
        w = w - step.lr * torch.func.grad(lambda at, part=part: objective.losses(at, part).mean())(
            wt
        )
    assert relative(Gif(plain).removal_effects([k])[:, 0], total) < 1e-10
    query = torch.linspace(-1, 1, w.numel(), dtype=torch.float64)
    assert abs(float(Gif(plain).scores(lambda at: query @ at)[k] - query @ total)) < 1e-10


def test_gif_from_checkpoints_is_the_run_of_full_batches_that_saved_every_step(helpers):
    objective = recipe_of(helpers).problem.objective
    problem = SAMProblem(Objective(objective.losses, objective.data), 0.2)
    recipe = Recipe.epochs(problem, recipe_of(helpers).w0, epochs=5, batch=N, lr=0.3, seed=0)
    saved = [w for _, w, _ in recipe.states()]

    def metric(w):
        return w.square().sum()

    end = recipe.train()
    found = gif_checkpoints(problem, [*saved, end], [0.3] * 5 + [0.0], metric)
    assert relative(found, Gif(recipe).scores(metric)) < 1e-10


# ---- bad problems --------------------------------------------------------------------------------


def test_a_gradient_of_zero_has_no_direction():
    objective = Objective(
        lambda w, part: (part[0] @ w).square() / 2, (torch.eye(3).double(),), l2=0.1
    )
    with pytest.raises(UserError, match="exactly 0 here, so SAM's perturbation has no direction"):
        SAMProblem(objective, 0.1).at(torch.zeros(3).double())
    assert not SAMProblem(objective, 0.0).at(torch.zeros(3).double()).residual.any()
    # in training it perturbs nothing
    assert not SAMProblem(objective, 0.1).field(torch.zeros(3).double()).any()


def test_where_sam_has_no_fixed_point_it_says_so():
    """For one quadratic bowl F = w + rho w/|w| + l2 w jumps over 0."""
    objective = Objective(
        lambda w, part: (part[0] @ w - 0.1).square() / 2, (torch.eye(3).double(),), l2=1e-4
    )
    with pytest.raises(
        UserError,
        match=(
            r"fixed point was not found near the plain minimum, where .* take a smaller rho or a"
            r" larger l2"
        ),
    ):
        fit(SAMProblem(objective, 0.5), torch.ones(3).double())


def test_a_gradient_that_is_almost_zero_is_refused(convex):
    assert convex.problem.at(convex.w).check_turning() < 100
    at = Linearised(convex.problem, convex.w)
    exact = (
        max(
            torch.linalg.eigvalsh(
                at.plain(torch.eye(convex.w.numel()).double()) - 0.02 * torch.eye(convex.w.numel())
            )
        )
        * at.pieces[0].c
    )
    assert at.turning() == pytest.approx(float(exact), rel=0.05)
    with pytest.raises(UserError, match="is too small for rho"):
        at.check_turning(limit=float(exact) / 2)


def test_a_loss_that_is_not_a_number_is_refused(convex):
    with pytest.raises(UserError, match="gradient's norm is nan"):
        convex.problem.at(convex.w * float("nan"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "rho must be a number of at least 0, not -1"),
        ({"rho": float("nan")}, "rho must be a number"),
        ({"rho": 0.1, "batches": (torch.arange(5),)}, "the batches must be disjoint"),
        (
            {"rho": 0.1, "batches": (torch.arange(N), torch.arange(2))},
            "the batches must be disjoint",
        ),
        ({"rho": 0.1, "batches": ()}, "the batches must be disjoint"),
    ],
)
def test_bad_problems_are_refused(convex, options, message):
    with pytest.raises(UserError, match=message):
        SAMProblem(convex.problem.objective, **options)


def test_a_partition_is_fixed_and_holds_every_sample_once():
    a, b = partition(10, 4, seed=1), partition(10, 4, seed=1)
    assert [len(one) for one in a] == [4, 4, 2]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert sorted(torch.cat(a).tolist()) == list(range(10))
    assert not torch.equal(a[0], partition(10, 4, seed=2)[0])
    with pytest.raises(UserError, match="a batch holds at least 1 sample, not 0"):
        partition(10, 0, seed=1)


def test_bad_estimators_are_refused(convex):
    at = convex.problem.at(convex.w)
    for options, message in (
        ({"kind": "sam_xif"}, "there is no estimator 'sam_xif'"),
        ({"damping": -1.0}, "damping must be a number of at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            Estimator(at, **options)
    with pytest.raises(UserError, match="there is no solver 'magic'"):
        Estimator(at, solver="magic").scores(convex.metric)
    with pytest.raises(UserError, match="sample 31 cannot be removed"):
        Estimator(at).removal_effects([31])
    with pytest.raises(UserError, match="sample 3 is to be removed twice"):
        Estimator(at).removal_effect([3, 3])
    with pytest.raises(UserError, match="gcr stopped at a relative residual of"):
        Estimator(at, tol=1e-18).scores(convex.metric)


def test_damping_is_added_to_the_matrix(convex):
    at = convex.problem.at(convex.w)
    b = torch.func.grad(convex.metric)(convex.w)
    for kind in ("if", "sam_hif"):
        estimator = Estimator(at, kind, damping=0.5)
        x = estimator.solve(b, transposed=True)[0]
        assert relative(estimator.transposed(x) + 0.5 * x, b) < 1e-7


def test_solvers_report_the_residual_of_the_matrix_itself(convex):
    estimator = Estimator(convex.problem.at(convex.w))
    b = torch.func.grad(convex.metric)(convex.w)
    x, info = estimator.solve(b)
    assert info.relative_residual == pytest.approx(
        solvers.relative_residual(estimator.matrix, x, b)
    )
