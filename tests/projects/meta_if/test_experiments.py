"""Tasks are drawn and spoiled as they say, and the baselines are what they are called."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.func import grad

from projects.meta_if import baselines, estimators
from projects.meta_if.data import (
    Pool,
    pools,
    principal_components,
    sample_tasks,
    show_labels,
    spoil_tasks,
)
from projects.meta_if.experiments.depth import series_errors
from projects.meta_if.problems import MetaProblem
from projects.meta_if.total import at
from projects.meta_if.training import Composed, fit
from shared.errors import UserError
from shared.influence.evaluate import auroc
from shared.influence.solvers import cg, neumann


def pool() -> Pool:
    """Samples that say their class and number."""
    y = np.repeat(np.arange(6), 9)
    return Pool(np.stack([y, np.arange(54)], 1).astype(float), y)


def test_a_task_has_its_classes_in_order_and_no_sample_twice():
    tasks = sample_tasks(pool(), 5, ways=4, shots=2, queries=3, seed=1)
    assert [tuple(part.shape) for part in tasks] == [(5, 8, 2), (5, 8), (5, 12, 2), (5, 12)]
    for k in range(5):
        both = torch.cat([tasks.x_train[k], tasks.x_val[k]])
        assert len(both[:, 1].unique()) == 20
        names = torch.stack(
            [tasks.x_train[k][tasks.y_train[k] == way, 0].unique() for way in range(4)]
        ).flatten()
        assert len(names.unique()) == 4  # a class a way
        for way in range(4):
            assert (tasks.x_val[k][tasks.y_val[k] == way, 0] == names[way]).all()
    assert not torch.equal(tasks.x_train[0], tasks.x_train[1])


def test_too_few_classes_or_samples_are_refused():
    with pytest.raises(UserError, match="7 classes"):
        sample_tasks(pool(), 1, ways=7, shots=1, queries=1, seed=0)
    with pytest.raises(UserError, match="at least 9"):
        sample_tasks(pool(), 1, ways=2, shots=5, queries=5, seed=0)


def test_spoiled_labels_say_nothing_and_the_others_stay():
    tasks = sample_tasks(pool(), 10, ways=3, shots=4, queries=4, seed=1)
    spoiled, mask = spoil_tasks(tasks, 0.4, seed=2)
    assert int(mask.sum()) == 4
    for k in range(10):
        same = (
            torch.equal(spoiled.y_train[k], tasks.y_train[k]),
            torch.equal(spoiled.y_val[k], tasks.y_val[k]),
        )
        assert same == ((False, False) if mask[k] else (True, True))
        assert torch.equal(spoiled.y_val[k].sort().values, tasks.y_val[k].sort().values)
        if mask[k]:  # not a renaming of the classes: a class has several labels
            assert (
                max(len(spoiled.y_train[k][tasks.y_train[k] == way].unique()) for way in range(3))
                > 1
            )
    with pytest.raises(UserError, match="between 0 and 1"):
        spoil_tasks(tasks, 1.2, 0)


def test_shown_labels_can_be_read_from_the_images_of_marked_tasks_alone():
    tasks = sample_tasks(pool(), 6, ways=3, shots=4, queries=4, seed=1)
    spoiled, mask = spoil_tasks(tasks, 0.5, seed=2)
    shown = show_labels(spoiled, mask, seed=3)
    assert torch.equal(shown.y_train, spoiled.y_train)
    assert torch.equal(shown.y_val, spoiled.y_val)
    patterns = set()
    for after, before, y in (
        (shown.x_train, spoiled.x_train, spoiled.y_train),
        (shown.x_val, spoiled.x_val, spoiled.y_val),
    ):
        added = after - before
        assert (added[~mask] == 0).all()
        for way in range(3):
            of_label = added[mask][y[mask] == way]
            assert torch.allclose(of_label, of_label[0].expand_as(of_label))
            patterns.add(tuple(of_label[0].round(decimals=6).tolist()))
            size = spoiled.x_train.norm(dim=2).mean()
            assert float(of_label[0].norm()) == pytest.approx(float(size))
    assert len(patterns) == 3  # a label has the same one in training and validation, and its own


def test_components_are_those_of_the_training_pool_alone():
    train, test = pools("synthetic")
    a, b = principal_components(train, test, 3)
    c, _ = principal_components(train, Pool(100 * test.x, test.y), 3)
    assert np.array_equal(a.x, c.x)
    assert a.x.std() == pytest.approx(1)
    variances = a.x.var(0)
    assert variances.tolist() == sorted(variances, reverse=True)
    assert np.abs(np.corrcoef(a.x.T) - np.eye(3)).max() < 1e-10
    assert b.x.shape == (len(test.x), 3)
    with pytest.raises(UserError, match="components"):
        principal_components(train, test, 21)


def test_a_folder_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="set `folder`"):
        pools("omniglot", folder=None)


# ---- baselines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(anil, helpers):
    """The small problem with a tenth of a training's points, test tasks, and the state at its
    minimum.
    """
    tests = MetaProblem(anil.problem.inner, helpers.make_tasks(3, 9), inner_tol=1e-12)
    fitted = fit(
        anil.problem, anil.problem.inner.parameters.flat(), steps=10, checkpoints=2, tol=1e-9
    )
    return anil.problem, tests, fitted


def test_tracin_is_the_sum_of_dot_products_of_total_gradients(trained):
    problem, tests, fitted = trained
    assert len(fitted.checkpoints) == 2
    assert fitted.rates == (2.5, 2.5)  # 5 steps of 0.5 each
    wanted = torch.zeros(5, dtype=torch.float64)
    for lam in fitted.checkpoints:
        slope = Composed(tests).gradient(lam)
        for k in range(5):
            weights = torch.zeros(5, dtype=torch.float64)
            weights[k] = 1
            # already over n
            one = Composed(problem.with_weights(weights=weights, l2=0.0)).gradient(lam)
            wanted[k] += 2.5 * float(one @ slope)
    assert torch.allclose(baselines.tracin(problem, tests, fitted), wanted, rtol=1e-8)


def test_trak_is_the_influence_function_of_its_logistic_regression(trained):
    problem, tests, fitted = trained
    lam = fitted.lam
    # above q: no projection
    found = baselines.trak(problem, tests, lam, dimension=100, seed=0, damping=0.3)
    state = at(problem, lam)
    loss, slopes = problem.outer_losses(lam, state.theta), state.task_gradients(range(5))
    wrong = 1 - torch.exp(-loss)  # 1 - p, for loss = -log p
    features = -slopes / wrong.unsqueeze(1)
    gram = features.T @ features
    gram += 0.3 * gram.diagonal().mean() * torch.eye(len(lam), dtype=lam.dtype)
    wanted = -(features @ torch.linalg.solve(gram, Composed(tests).gradient(lam))) * wrong
    assert torch.allclose(found, wanted, rtol=1e-6)


def test_ekfac_knows_the_body_alone(trained):
    problem, _, fitted = trained
    state = at(problem, fitted.lam)
    found = baselines.ekfac(state, seed=0)
    assert found.size == fitted.lam.numel()
    assert len(found.blocks) == 1
    v = torch.randn(found.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(found.product(found.inverse(v)), v)
    assert float(v @ found.product(v)) > problem.l2 * float(v @ v)


def test_orders_by_loss_and_gradient(trained):
    problem, _, fitted = trained
    state = at(problem, fitted.lam)
    loss, norm = baselines.loss_value(state), baselines.gradient_norm(state)
    for k in range(5):
        task = tuple(part[k] for part in problem.data)
        assert float(loss[k]) == pytest.approx(
            -float(problem.outer_loss(fitted.lam, state.theta[k], task))
        )
    weights = torch.zeros(5, dtype=torch.float64)
    weights[2] = 5
    assert float(norm[2]) == pytest.approx(
        -float(Composed(problem.with_weights(weights=weights, l2=0.0)).gradient(fitted.lam).norm())
    )


@pytest.mark.parametrize("name", [name for name in baselines.SCORES if name != "four terms"])
def test_every_method_scores_every_task(trained, name):
    problem, tests, fitted = trained
    found = baselines.scores(name, at(problem, fitted.lam), tests, fitted, seed=0, dimension=3)
    assert found.shape == (5,)
    assert found.isfinite().all()
    assert found.std() > 0


def test_unknown_methods_are_refused(trained):
    problem, tests, fitted = trained
    with pytest.raises(UserError, match="there is no method 'magic'"):
        baselines.scores("magic", at(problem, fitted.lam), tests, fitted, seed=0)


def test_a_spoiled_task_has_the_highest_loss_of_few(anil, helpers):
    tasks, mask = spoil_tasks(helpers.make_tasks(8, 4), 0.25, seed=0)
    problem = MetaProblem(anil.problem.inner, tasks, l2=helpers.l2)
    lam = fit(problem, anil.lam, steps=5, tol=1e-7).lam
    assert auroc(-baselines.loss_value(at(problem, lam)), mask) > 0.6


def test_direct_if_of_imaml_is_refused_since_it_is_zero(imaml):
    state = at(imaml.problem, imaml.lam)
    assert (
        grad(
            lambda lam: imaml.problem.outer_loss(
                lam, state.theta[0], tuple(p[0] for p in imaml.problem.data)
            )
        )(imaml.lam).norm()
        == 0
    )
    with pytest.raises(UserError, match="direct-IF is 0"):
        estimators.task_removal(state, [0], "direct-IF", partial(cg, damping=1.0))


def test_the_errors_of_the_series_are_those_of_the_solver_by_depth():
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    matrix = root @ root.T + 0.5 * torch.eye(6, dtype=torch.float64)
    b = torch.randn(6, 2, generator=draw, dtype=torch.float64)
    found = series_errors(matrix, b, wanted=0.01, most=10_000)
    assert found[-1] <= 0.01 < found[-2]
    solution = torch.linalg.solve(matrix, b)
    scale = 1.05 * float(torch.linalg.eigvalsh(matrix)[-1])
    for depth in (0, 3, len(found) - 1):
        x, _ = neumann(matrix.matmul, b, scale=scale, depth=depth, tol=None)
        error = (x - solution).norm(dim=0) / solution.norm(dim=0)
        assert found[depth] == pytest.approx(float(error.mean()))
    assert len(series_errors(matrix, b, wanted=1e-9, most=5)) == 6
