"""Retraining: roots and minima are found or an error is raised; weights, subsets, the cache, other
processes.
"""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared.errors import UserError
from shared.influence import retrain
from shared.influence.retrain import Root


def weighted_mean(weights: torch.Tensor, values: tuple[float, ...]) -> Root:
    """A training whose result is the sum of the kept values over n."""
    w = (weights * torch.tensor(values, dtype=torch.float64)).sum().view(1) / len(values)
    return Root(w, 0.0, 1)


TRAIN = partial(weighted_mean, values=(1.0, 10.0, 100.0, 1000.0))


def test_newton_finds_the_root_of_what_is_no_gradient():
    def field(w):
        return torch.stack([w[0] ** 2 + w[1] - 3, w[0] - w[1] ** 3 + 1])

    root = retrain.newton_root(field, torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert field(root.w).norm() <= 1e-10
    assert root.residual == float(field(root.w).norm())


def test_newton_shortens_steps_that_go_too_far():
    # whole steps diverge from here
    root = retrain.newton_root(torch.arctan, torch.tensor([3.0], dtype=torch.float64))
    assert float(root.w.abs()) < 1e-10


def test_newton_goes_on_from_a_singular_jacobian():
    root = retrain.newton_root(
        lambda w: torch.stack([w.sum() - 1, 2 * w.sum() - 2]), torch.zeros(2, dtype=torch.float64)
    )
    assert root.residual <= 1e-10


def test_newton_without_a_root_says_so():
    with pytest.raises(UserError, match=r"training stopped at \|F\| = .* Newton steps"):
        retrain.newton_root(lambda w: w**2 + 1, torch.tensor([2.0], dtype=torch.float64))


def test_broyden_finds_newtons_root_with_an_old_jacobian():
    def field(w):
        return torch.stack([w[0] ** 2 + w[1] - 3, w[0] - w[1] ** 3 + 1])

    start = torch.tensor([1.0, 1.0], dtype=torch.float64)
    root = retrain.broyden_root(field, start, retrain.factored_jacobian(field, start))
    assert torch.allclose(root.w, retrain.newton_root(field, start).w, atol=1e-9)
    assert root.residual == float(field(root.w).norm()) <= 1e-10
    # the inverse decides how fast, not which
    rough = retrain.broyden_root(field, start, lambda v: 0.1 * v)
    assert torch.allclose(rough.w, root.w, atol=1e-9)
    assert rough.iterations > root.iterations


def test_broyden_without_a_root_says_so():
    start = torch.tensor([2.0], dtype=torch.float64)
    with pytest.raises(UserError, match=r"training stopped at \|F\| = .* quasi-Newton steps"):
        retrain.broyden_root(lambda w: w**2 + 1, start, lambda v: v / 4)
    with pytest.raises(UserError, match="the Jacobian is singular"):
        retrain.factored_jacobian(
            lambda w: w.sum() * torch.ones_like(w), torch.ones(2, dtype=torch.float64)
        )


def test_minimise_reaches_the_minimum_to_rounding(convex):
    start = torch.ones_like(convex.w)
    root = retrain.minimise(convex.objective, start, tol=1e-11)
    assert torch.allclose(root.w, convex.w, atol=1e-9)
    assert float(torch.func.grad(convex.objective)(root.w).norm()) == root.residual <= 1e-11
    with pytest.raises(UserError, match="stopped at a gradient of norm"):
        retrain.minimise(convex.objective, start, tol=1e-11, iterations=2, polish=False)


def test_a_matrix_like_the_hessian_saves_steps_and_a_wrong_one_does_not_change_where_they_end(
    convex,
):
    start = torch.ones_like(convex.w)
    wrong = torch.diag(torch.linspace(0.5, 2, start.numel(), dtype=start.dtype))
    for like in (torch.func.hessian(convex.objective)(convex.w), wrong):
        root = retrain.minimise(convex.objective, start, tol=1e-11, like=like)
        assert torch.allclose(root.w, convex.w, atol=1e-9)
        assert root.residual == float(torch.func.grad(convex.objective)(root.w).norm()) <= 1e-11
    with pytest.raises(UserError, match="to take steps by is not positive definite"):
        retrain.minimise(convex.objective, start, like=-wrong)

    scale = torch.logspace(0, 5, 60, dtype=torch.float64)

    def stretched(w):
        return (scale * (w - 1).square()).sum() / 2 + (w - 2).cosh().log().sum()

    near = torch.full((60,), 1.1, dtype=torch.float64)
    plain, helped = (
        retrain.minimise(stretched, near, tol=1e-9, like=like) for like in (None, scale.diag())
    )
    assert torch.allclose(plain.w, helped.w, atol=1e-8)
    assert helped.iterations < plain.iterations / 3


def test_a_way_of_its_own_to_the_gradient_is_taken(convex):
    calls = []

    def both(w):
        calls.append(1)
        return torch.func.grad_and_value(convex.objective)(w)

    start = torch.ones_like(convex.w)
    root = retrain.minimise(convex.objective, start, tol=1e-6, polish=False, both=both)
    plain = retrain.minimise(convex.objective, start, tol=1e-6, polish=False)
    assert torch.equal(root.w, plain.w)
    assert root.residual == plain.residual
    assert len(calls) > root.iterations


def test_minimise_refuses_a_start_that_is_not_finite():
    with pytest.raises(UserError, match="the objective is nan where training starts"):
        retrain.minimise(lambda w: w.sum() * float("nan"), torch.ones(2))


def test_a_maximum_is_not_taken_for_a_minimum(monkeypatch):
    """Newton's method from 0.1 goes to the maximum of the cosine at 0; L-BFGS before it, to the
    minimum at pi.
    """
    start = torch.tensor([0.1], dtype=torch.float64)
    assert float(retrain.minimise(lambda w: w.cos().sum(), start, tol=1e-10).w) == pytest.approx(
        torch.pi
    )
    monkeypatch.setattr(
        retrain,
        "minimize",
        lambda *_, **__: SimpleNamespace(x=start.numpy(), fun=math.cos(0.1), nfev=1),
    )
    with pytest.raises(UserError, match="Newton's method went up, to a saddle or a maximum"):
        retrain.minimise(lambda w: w.cos().sum(), start)


def test_what_is_removed_has_weight_0_and_the_others_keep_theirs():
    found = retrain.leave_one_out(TRAIN, 4, [2, 0])
    assert found.w.flatten().tolist() == [1011 / 4, 1110 / 4]  # over n, not n - 1
    assert retrain.retrain(TRAIN, 4, [[], [0, 3]]).w.flatten().tolist() == [1111 / 4, 110 / 4]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([4], "sample 4 cannot be removed: the samples are numbered 0 to 3"),
        ([-1], "sample -1 cannot"),
        ([1, 2, 1], "1 is to be removed twice"),
    ],
)
def test_wrong_removals_are_refused(removed, message):
    with pytest.raises(UserError, match=message):
        retrain.retrain(TRAIN, 4, [removed])


def test_no_removals_and_a_cache_without_config_are_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to remove"):
        retrain.retrain(TRAIN, 4, [])
    with pytest.raises(UserError, match="needs the config"):
        retrain.retrain(TRAIN, 4, [[0]], cache=tmp_path)


def test_subsets_have_their_size_and_depend_on_the_seed_alone():
    masks = retrain.subsets(50, 0.3, 6, seed=1)
    assert masks.shape == (6, 50)
    assert masks.sum(1).tolist() == [15] * 6
    assert len({tuple(row) for row in masks.tolist()}) == 6
    assert torch.equal(retrain.subsets(50, 0.3, 3, seed=1), masks[:3])
    assert not torch.equal(retrain.subsets(50, 0.3, 6, seed=2), masks)
    for fraction in (0.001, 1.0):
        with pytest.raises(UserError, match="must keep some and leave some out"):
            retrain.subsets(50, fraction, 2, seed=0)


def test_a_result_is_trained_once_for_each_config_and_removal(tmp_path):
    asked = []

    def train(weights):
        asked.append(weights.tolist())
        return TRAIN(weights)

    options = {"config": {"l2": 0.1}, "cache": tmp_path}
    first = retrain.retrain(train, 4, [[0], [3, 1]], **options)
    again = retrain.retrain(train, 4, [[1, 3], [0], [2]], **options)
    assert asked == [[0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert torch.equal(again.w[:2], first.w.flip(0))
    retrain.retrain(train, 4, [[0]], config={"l2": 0.2}, cache=tmp_path)
    assert len(asked) == 4
    assert len(list(tmp_path.iterdir())) == 4


def test_a_broken_file_in_the_cache_is_named(tmp_path):
    options = {"config": {}, "cache": tmp_path}
    retrain.retrain(TRAIN, 4, [[0]], **options)
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PK"):
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=r"\.npz holds no trained parameters; delete it and run again"
        ):
            retrain.retrain(TRAIN, 4, [[0]], **options)
    # a pickle inside is not opened
    np.savez(file, w=np.array([{}], dtype=object), residual=0.0, iterations=1)
    with pytest.raises(UserError, match="holds no trained parameters"):
        retrain.retrain(TRAIN, 4, [[0]], **options)
    np.savez(file, w=np.zeros(1))
    with pytest.raises(UserError, match="holds no trained parameters"):
        retrain.retrain(TRAIN, 4, [[0]], **options)


def test_two_processes_find_the_same():
    # "trains" to the weights themselves; other processes cannot import a test's function
    train = partial(Root, residual=0.5, iterations=1)
    removals = [[0], [1], [2, 3]]
    found = retrain.retrain(train, 4, removals, processes=2)
    assert found.w.tolist() == [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]]
    assert found.residuals.tolist() == [0.5] * 3
