"""Ridge reconstruction against lstsq and scikit-learn, and the properties that it must have."""

import numpy as np
import pytest
import torch
from idp_problems import normal
from sklearn.linear_model import Ridge

from projects.idp.ridge import (
    effective_dimension,
    min_max,
    penalty,
    reconstruct,
    ridge_logits,
)

SHAPES = [(5, 3, 7), (4, 7, 7), (6, 11, 5), (1, 1, 9)]  # cells, rows, width


def operator(codebook, lam):
    """H = U'(U U' + penalty I)^-1 U by an explicit inverse."""
    rows, width = codebook.shape
    gram = codebook @ codebook.T + lam * rows / width * torch.eye(rows, dtype=codebook.dtype)
    return codebook.T @ torch.linalg.inv(gram) @ codebook


@pytest.mark.parametrize(("m", "n", "d"), SHAPES)
@pytest.mark.parametrize("lam", [0.01, 1.0, 30.0])
def test_it_is_the_least_squares_solution_of_the_stacked_system(m, n, d, lam):
    cells, codebook = normal(m, d, seed=1), normal(n, d, seed=2)
    root = (lam * n / d) ** 0.5
    stacked = torch.cat([codebook.T, root * torch.eye(n, dtype=torch.float64)])
    wanted = torch.cat([cells.T, torch.zeros(n, m, dtype=torch.float64)])
    weights = torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution
    assert torch.allclose(
        reconstruct(cells, codebook, lam), weights.T @ codebook, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize(("m", "n", "d"), SHAPES)
def test_it_is_the_prediction_of_scikit_learns_ridge(m, n, d):
    cells, codebook = normal(m, d, seed=3), normal(n, d, seed=4)
    model = Ridge(alpha=n / d, fit_intercept=False, solver="svd")
    model.fit(codebook.T.numpy(), cells.T.numpy())
    predicted = model.predict(codebook.T.numpy()).reshape(d, m).T
    assert np.allclose(reconstruct(cells, codebook).numpy(), predicted, rtol=0, atol=1e-8)


def test_many_tasks_at_once_are_one_at_a_time():
    cells, codebooks = normal(3, 2, 5, 7, seed=5), normal(3, 2, 4, 7, seed=6)
    found = reconstruct(cells, codebooks)
    for a in range(3):
        for b in range(2):
            assert torch.allclose(found[a, b], cells[a, b] @ operator(codebooks[a, b], 1.0))


@pytest.mark.parametrize(("n", "d"), [(3, 7), (7, 7), (11, 5)])
def test_the_operator_is_symmetric_and_shortens(n, d):
    codebook = normal(n, d, seed=7)
    h = reconstruct(torch.eye(d, dtype=torch.float64), codebook)
    assert torch.allclose(h, h.T, atol=1e-12)
    values = torch.linalg.eigvalsh(h)
    assert float(values.min()) > -1e-12
    assert float(values.max()) < 1
    cells = normal(20, d, seed=8)
    assert bool((reconstruct(cells, codebook).norm(dim=1) <= cells.norm(dim=1)).all())
    assert effective_dimension(codebook) == pytest.approx(float(values.sum()))


def test_a_small_penalty_gives_what_is_in_the_span_and_a_large_one_nothing():
    codebook = normal(3, 7, seed=9)
    within = normal(4, 3, seed=10) @ codebook
    assert torch.allclose(reconstruct(within, codebook, 1e-10), within, atol=1e-7)
    everything = normal(9, 7, seed=11)
    cells = normal(4, 7, seed=12)
    assert torch.allclose(reconstruct(cells, everything, 1e-10), cells, atol=1e-6)
    assert float(reconstruct(cells, codebook, 1e10).abs().max()) < 1e-8


def test_repeating_or_permuting_the_rows_changes_nothing():
    cells, codebook = normal(5, 7, seed=13), normal(4, 7, seed=14)
    found = reconstruct(cells, codebook)
    assert torch.allclose(reconstruct(cells, codebook.repeat(2, 1)), found, atol=1e-12)
    assert torch.allclose(reconstruct(cells, codebook.repeat(3, 1)), found, atol=1e-12)  # n > d
    assert torch.allclose(reconstruct(cells, codebook[[2, 0, 3, 1]]), found, atol=1e-12)


def test_a_rotation_of_both_rotates_the_proxies():
    cells, codebook = normal(5, 7, seed=15), normal(4, 7, seed=16)
    q = torch.linalg.qr(normal(7, 7, seed=17)).Q
    assert torch.allclose(
        reconstruct(cells @ q, codebook @ q), reconstruct(cells, codebook) @ q, atol=1e-12
    )


def test_half_precision_is_solved_in_float32():
    cells, codebook = normal(5, 7, seed=18).half(), normal(4, 7, seed=19).half()
    found = reconstruct(cells, codebook)
    assert found.dtype == torch.float16
    exact = reconstruct(cells.double(), codebook.double())
    assert torch.allclose(found.double(), exact, atol=2e-3)


@pytest.mark.parametrize("n", [2, 7, 12])
def test_logits_are_mean_squared_residuals(n):
    """Also where the class codebook is wider than long, and the error is computed otherwise."""
    cells, books = normal(2, 4, 3, 7, seed=20), normal(2, 5, n, 7, seed=21)
    found = ridge_logits(cells, books)
    assert found.shape == (2, 4, 5)
    for task in range(2):
        for image in range(4):
            for label in range(5):
                q = cells[task, image]
                residual = q - q @ operator(books[task, label], 1.0)
                wanted = -residual.square().sum(1).mean()
                assert float(found[task, image, label]) == pytest.approx(float(wanted), abs=1e-9)


def test_a_copy_of_a_class_is_best_reconstructed_from_it():
    books = normal(5, 3, 9, seed=22)
    assert ridge_logits(books, books).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_min_max_scales_each_image_and_leaves_equal_logits_at_zero():
    logits = torch.tensor([[3.0, 1.0, 2.0], [4.0, 4.0, 4.0]], requires_grad=True)
    scaled = min_max(logits)
    assert scaled.tolist() == [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]]
    scaled.sum().backward()
    assert bool(logits.grad.isfinite().all())


def test_the_penalty_grows_with_the_rows():
    assert penalty(9, 64) == 9 / 64
    assert penalty(18, 64, 2.0) == 36 / 64


@pytest.mark.parametrize("lam", [0.0, -1.0])
def test_a_penalty_must_be_positive(lam):
    with pytest.raises(ValueError, match="above 0"):
        reconstruct(normal(2, 3), normal(2, 3), lam)


def test_widths_must_agree():
    with pytest.raises(ValueError, match="width 3, a codebook of width 4"):
        reconstruct(normal(2, 3), normal(2, 4))
