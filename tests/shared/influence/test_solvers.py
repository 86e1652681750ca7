"""Every solver against the dense one on a problem of 213 parameters; what does not converge says
so.
"""

from functools import cache, partial

import pytest
import torch

from shared.errors import UserError
from shared.influence import solvers

DAMPING = 0.05


@cache
def _matrices(problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric positive definite: a damped Gauss-Newton matrix; and one that is not symmetric."""
    spd = problem.objective.ggn_vp(problem.w, torch.eye(213, dtype=torch.float64))
    twist = torch.randn(213, 213, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return spd, spd + 0.3 * spd.norm() * twist / twist.norm()


@pytest.fixture
def spd(net) -> torch.Tensor:
    return _matrices(net)[0]


@pytest.fixture
def skewed(net) -> torch.Tensor:
    return _matrices(net)[1]


def right_hand_side(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def exact(matrix: torch.Tensor, b: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=b.dtype)) @ b


SYMMETRIC = {
    "dense": solvers.dense,
    "cg": partial(solvers.cg, tol=1e-10),
    "gcr": partial(solvers.gcr, tol=1e-10),
    "gmres": partial(solvers.gmres, tol=1e-10),
    "neumann": partial(solvers.neumann, depth=3000, tol=1e-8),
}


@pytest.mark.parametrize("shape", [(213,), (213, 1), (213, 4)])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_systems(spd, name, shape):
    b = right_hand_side(*shape)
    x, info = SYMMETRIC[name](spd.matmul, b, damping=DAMPING)
    assert x.shape == b.shape
    assert (x - exact(spd, b)).norm() < 1e-6 * x.norm()
    residual = (spd @ x + DAMPING * x - b).norm(dim=0) / b.norm(dim=0)
    assert info.relative_residual == pytest.approx(float(residual.max()), rel=1e-2, abs=1e-13)
    assert info.solver == name


@pytest.mark.parametrize("shape", [(213,), (213, 3)])
def test_systems_that_are_not_symmetric(skewed, shape):
    b = right_hand_side(*shape)
    expected = exact(skewed, b)
    for x, info in (
        solvers.dense(skewed, b, damping=DAMPING),
        solvers.gcr(skewed.matmul, b, damping=DAMPING, tol=1e-10),
        solvers.gmres(skewed.matmul, b, damping=DAMPING, tol=1e-10),
        solvers.lsmr(
            skewed.matmul, b, transpose=skewed.T.matmul, damping=DAMPING, tol=1e-8, iterations=20000
        ),
    ):
        assert (x - expected).norm() < 1e-5 * expected.norm(), info
        assert x.shape == b.shape


def test_the_products_are_counted(spd):
    calls = []

    def operator(v):
        calls.append(1 if v.dim() == 1 else v.shape[1])
        return spd @ v

    for solve in SYMMETRIC.values():
        calls.clear()
        _, info = solve(operator, right_hand_side(213, 2), damping=DAMPING)
        assert info.products == sum(calls) or solve is solvers.dense
    assert solvers.dense(operator, right_hand_side(213))[1].products == 213 + 1


@pytest.mark.parametrize("solve", [solvers.cg, solvers.gcr])
def test_with_a_preconditioner_it_gets_there_sooner(spd, solve):
    b, shift = right_hand_side(213, 2), torch.logspace(0, 4, 213, dtype=torch.float64)
    matrix = spd + torch.diag(shift)
    plain_x, plain = solve(matrix.matmul, b, tol=1e-10)
    x, info = solve(matrix.matmul, b, tol=1e-10, preconditioner=lambda v: v / shift.unsqueeze(1))
    assert torch.allclose(x, plain_x, rtol=0, atol=1e-8)
    assert info.iterations < plain.iterations / 3


def test_right_hand_sides_share_the_space_that_gcr_makes(skewed):
    """Together they need fewer products than one by one, and never more than there are unknowns."""
    b = right_hand_side(213, 40)
    solve = partial(solvers.gcr, skewed.matmul, damping=DAMPING, tol=1e-8)
    x, together = solve(b)
    alone = [solve(column) for column in b.T]
    assert together.products < 0.5 * sum(info.products for _, info in alone)
    assert together.products <= 213 + 2 * 40
    assert torch.allclose(x, torch.stack([one for one, _ in alone], 1), atol=1e-6)
    twice, _ = solve(torch.cat([b, b], 1))  # directions that depend on others are left out
    assert torch.allclose(twice[:, :40], twice[:, 40:])


def test_gcr_goes_on_where_residuals_do_not_fall():
    """A turns every unit vector into the next: no residual falls before all are in the space."""
    shift = torch.roll(torch.eye(7, dtype=torch.float64), 1, 0)
    b = torch.eye(7, dtype=torch.float64)[:, 2]
    x, _ = solvers.gcr(shift.matmul, b, tol=1e-12)
    assert torch.allclose(shift @ x, b)


def test_gcr_says_so_where_there_is_no_solution():
    singular = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    with pytest.raises(UserError, match="gcr stopped at a relative residual of"):
        solvers.gcr(singular.matmul, torch.ones(3, dtype=torch.float64))


def test_gcr_makes_its_space_anew_where_memory_ends(skewed, monkeypatch):
    b = right_hand_side(213, 3)
    whole = solvers.gcr(skewed.matmul, b, damping=DAMPING)[1]
    monkeypatch.setattr(solvers, "SPACE_BYTES", 2 * 213 * 8 * 30)
    x, info = solvers.gcr(skewed.matmul, b, damping=DAMPING)
    assert (x - exact(skewed, b)).norm() < 1e-4 * x.norm()
    assert info.iterations > whole.iterations


@pytest.mark.parametrize("solve", [solvers.cg, solvers.gcr])
def test_an_error_of_a_product_does_not_stay_in_the_result(spd, solve):
    """The residual that is updated along with x then differs from the true one: it is taken anew,
    and the solver goes on from there.
    """
    calls = []

    def operator(v):
        calls.append(1)
        return spd @ v * (1.001 if len(calls) == 3 else 1.0)

    b = right_hand_side(213, 2)
    x, info = solve(operator, b, damping=DAMPING, tol=1e-9)
    assert info.relative_residual < 1e-9
    assert (x - exact(spd, b)).norm() < 1e-6 * x.norm()


@pytest.mark.parametrize("solve", [solvers.cg, solvers.gcr])
def test_columns_of_any_size_converge_together(spd, solve):
    b = right_hand_side(213, 4) * torch.tensor([1e-8, 1.0, 1e8, 0.0])
    x, _ = solve(spd.matmul, b, damping=DAMPING, tol=1e-10)
    assert torch.equal(x[:, 3], torch.zeros(213, dtype=torch.float64))
    expected = exact(spd, b)
    assert ((x - expected).norm(dim=0)[:3] < 1e-8 * expected.norm(dim=0)[:3]).all()


def test_cg_refuses_negative_curvature_and_says_what_damping_helps():
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))
    with pytest.raises(UserError, match=r"cg met negative curvature .*add damping"):
        solvers.cg(matrix.matmul, torch.tensor([0.1, 0.1, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "solve",
    [
        partial(solvers.cg, iterations=3),
        partial(solvers.gcr, iterations=3),
        partial(solvers.gmres, iterations=3),
        partial(solvers.neumann, depth=3),
    ],
)
def test_a_solver_that_stops_short_is_an_error_unless_that_is_wanted(spd, solve):
    b = right_hand_side(213)
    with pytest.raises(UserError, match=r"stopped at a relative residual of .* after 3 iterations"):
        solve(spd.matmul, b, damping=DAMPING)
    x, info = solve(spd.matmul, b, damping=DAMPING, tol=None)
    assert info.relative_residual == pytest.approx(
        float(((spd @ x + DAMPING * x) - b).norm() / b.norm())
    )
    assert 1e-3 < info.relative_residual < 1


def test_lsmr_stops_short_too(skewed):
    with pytest.raises(UserError, match="lsmr stopped at a relative residual"):
        solvers.lsmr(skewed.matmul, right_hand_side(213), transpose=skewed.T.matmul, iterations=3)


def test_a_matrix_factored_once_gives_what_dense_gives(skewed):
    solve = solvers.factored(skewed)
    for b in (torch.ones(len(skewed), dtype=skewed.dtype), skewed[:, :3].contiguous()):
        x, info = solve(b)
        wanted, known = solvers.dense(skewed, b)
        assert torch.equal(x, wanted)
        assert (info.relative_residual, info.products) == (known.relative_residual, known.products)
    with pytest.raises(UserError, match="singular"):
        solvers.factored(torch.zeros_like(skewed))


def test_a_singular_matrix_is_refused():
    with pytest.raises(UserError, match="add damping"):
        solvers.dense(torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    with pytest.raises(UserError, match="add damping"):
        solvers.dense(torch.ones(3, 3, dtype=torch.float64), torch.arange(3.0, dtype=torch.float64))


def test_a_matrix_too_large_to_make_is_refused():
    with pytest.raises(
        UserError, match=r"a dense matrix of 100000 x 100000 needs 80\.0 GB; use cg"
    ):
        solvers.dense(lambda v: v, torch.zeros(100000, dtype=torch.float64))


def test_neumann_refuses_a_scale_at_which_it_diverges(spd):
    largest = float(torch.linalg.eigvalsh(spd)[-1])
    with pytest.raises(UserError, match=r"diverges: .* take a larger scale"):
        solvers.neumann(spd.matmul, right_hand_side(213), scale=0.45 * largest)
    with pytest.raises(UserError, match="diverges"):
        solvers.neumann(lambda v: spd @ v - 0.5 * v, right_hand_side(213), scale=2 * largest)
    with pytest.raises(UserError, match="must be positive"):
        solvers.neumann(spd.matmul, right_hand_side(213), scale=0)


def test_a_series_gets_better_with_depth(spd):
    residuals = [
        solvers.neumann(spd.matmul, right_hand_side(213), depth=d, damping=DAMPING, tol=None)[
            1
        ].relative_residual
        for d in (1, 5, 10, 50)
    ]
    assert residuals == sorted(residuals, reverse=True)


def test_lissa_agrees_with_dense_to_its_noise(convex):
    w, objective, damping = convex.w, convex.objective, 0.2
    b = right_hand_side(28)
    sampled = objective.sampled_hessians(w, 40, seed=2)
    x, info = solvers.lissa(
        objective.hessian(w), b, sampled=sampled, scale=3, depth=100, repeats=2, damping=damping
    )
    expected = exact(objective.hvp(w, torch.eye(28, dtype=torch.float64)), b, damping)
    assert (x - expected).norm() < 0.1 * expected.norm()
    assert info.relative_residual < 0.1
    same = solvers.lissa(
        objective.hessian(w),
        b,
        sampled=lambda step: objective.hessian(w),
        scale=3,
        depth=150,
        damping=damping,
        tol=1e-4,
    )
    assert torch.allclose(same[0], expected, rtol=1e-3)
    with pytest.raises(UserError, match="lissa stopped"):
        solvers.lissa(objective.hessian(w), b, sampled=sampled, scale=3, depth=2, damping=damping)


@pytest.mark.parametrize("shape", [(213,), (213, 3)])
@pytest.mark.parametrize("n", [7, 53, 400])
def test_woodbury_is_the_exact_inverse(n, shape):
    rows, b = right_hand_side(n, 213), right_hand_side(*shape)
    x, info = solvers.woodbury(rows, b, damping=0.01)
    assert torch.allclose(x, exact(rows.T @ rows / n, b, 0.01), rtol=1e-6, atol=1e-8)
    assert info.relative_residual < 1e-8


def test_woodbury_needs_damping():
    with pytest.raises(UserError, match="woodbury needs a damping above 0"):
        solvers.woodbury(torch.ones(2, 3), torch.ones(3), damping=0)


def test_galerkin_is_exact_in_a_subspace_that_holds_the_solution(spd):
    basis = solvers.random_basis(213, 20, 0, spd)
    assert torch.allclose(basis.T @ basis, torch.eye(20, dtype=torch.float64), atol=1e-12)
    inside = basis @ right_hand_side(20, 2)
    x, info = solvers.galerkin(
        spd.matmul, spd @ inside + DAMPING * inside, basis, damping=DAMPING, tol=1e-8
    )
    assert torch.allclose(x, inside, rtol=0, atol=1e-9)
    b = right_hand_side(213)
    x, info = solvers.galerkin(spd.matmul, b, basis, damping=DAMPING)
    # nothing left inside it
    assert torch.allclose(
        basis.T @ (spd @ x + DAMPING * x - b), torch.zeros(20, dtype=torch.float64), atol=1e-10
    )
    assert info.relative_residual > 0.1
    with pytest.raises(UserError, match="galerkin stopped"):
        solvers.galerkin(spd.matmul, b, basis, damping=DAMPING, tol=1e-3)
    with pytest.raises(UserError, match="dimension from 1 to 213"):
        solvers.random_basis(213, 214, 0, spd)


def test_logra_projects_every_layer_by_its_own_two_sides(net, spd):
    basis = solvers.logra_basis(net.parameters, 3, 0, spd)
    assert basis.shape == (213, 3 * (3 * 3 + 3))
    assert torch.allclose(basis.T @ basis, torch.eye(36, dtype=torch.float64), atol=1e-12)
    where = net.parameters.slices["2.weight"]
    block = basis[where][:, 12:21].T.view(9, 8, 10)  # every column is a matrix of rank 1
    assert (torch.linalg.matrix_rank(block) == 1).all()
    whole = solvers.logra_basis(net.parameters, 100, 0, spd)
    b = right_hand_side(213)
    assert torch.allclose(
        solvers.galerkin(spd.matmul, b, whole, damping=DAMPING)[0],
        exact(spd, b),
        rtol=1e-6,
        atol=1e-8,
    )


def test_logra_takes_the_leading_directions_of_given_moments(net, spd):
    """Of a layer with moments; the others' are random."""
    rows, columns = net.parameters.shapes[0]
    inputs = torch.diag(torch.arange(1.0, columns + 1, dtype=torch.float64))
    outputs = torch.diag(torch.arange(rows, 0, -1, dtype=torch.float64))
    name = net.parameters.names[0]
    found = solvers.logra_basis(net.parameters, 2, 0, spd, {name: (inputs, outputs)})
    block = found[net.parameters.slices[name]][:, :4].view(rows, columns, 4)
    taken = block.abs().sum(2).nonzero().tolist()
    assert taken == [[row, column] for row in (0, 1) for column in (columns - 2, columns - 1)]
    plain = solvers.logra_basis(net.parameters, 2, 0, spd)
    assert torch.equal(found[:, 4:], plain[:, 4:])


def test_galerkin_refuses_what_is_indefinite_in_the_subspace(spd):
    basis = solvers.random_basis(213, 20, 0, spd)
    with pytest.raises(UserError, match="not positive definite in the subspace"):
        solvers.galerkin((-spd).matmul, right_hand_side(213), basis)


@pytest.mark.parametrize("size", [40, 600])
def test_an_indefinite_hessian_is_refused_without_enough_damping(size):
    spectrum = torch.linspace(0.5, 3, size, dtype=torch.float64)
    spectrum[3] = -0.25
    turn = torch.linalg.qr(right_hand_side(size, size))[0]
    matrix = turn @ torch.diag(spectrum) @ turn.T
    like = right_hand_side(size)
    assert solvers.smallest_eigenvalue(matrix.matmul, like) == pytest.approx(-0.25, rel=1e-3)
    with pytest.raises(
        UserError,
        match=(
            r"indefinite: its smallest eigenvalue is -0\.25 with damping 0; use damping above 0\.25"
        ),
    ):
        solvers.require_positive(matrix.matmul, like)
    with pytest.raises(UserError, match=r"damping above 0\.25"):
        solvers.require_positive(matrix.matmul, like, damping=0.2)
    assert solvers.require_positive(matrix.matmul, like, damping=0.3) == pytest.approx(
        0.05, abs=1e-3
    )


def test_a_search_for_the_smallest_eigenvalue_that_fails_says_so(monkeypatch):
    def fail(*_, **__):
        raise solvers.linalg.ArpackNoConvergence("no", [], [])

    monkeypatch.setattr(solvers.linalg, "eigsh", fail)
    with pytest.raises(
        UserError, match="smallest eigenvalue was not found; use the Gauss-Newton matrix"
    ):
        solvers.smallest_eigenvalue(lambda v: v, torch.ones(600))


def test_the_spectral_radius_of_any_matrix(spd):
    assert solvers.spectral_radius(spd.matmul, right_hand_side(213)) == pytest.approx(
        float(torch.linalg.eigvalsh(spd)[-1]), rel=1e-2
    )
    turn = torch.tensor([[0.0, -0.9], [0.9, 0.0]], dtype=torch.float64)  # eigenvalues +-0.9i
    assert solvers.spectral_radius(
        turn.matmul, torch.ones(2, dtype=torch.float64)
    ) == pytest.approx(0.9)
