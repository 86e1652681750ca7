"""Principal components are scikit-learn's, and depend on the training rows alone."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from shared.errors import UserError
from shared.vision.projection import Projection, Standardisation


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, d)) * np.linspace(3, 1, d) + draw.normal(size=d)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
@pytest.mark.parametrize("gram", ["features", "smaller"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_components_are_scikit_learns(shape, gram, as_tensor):
    train, other = rows(*shape), rows(5, shape[1], 1)
    sklearn = PCA(4, svd_solver="full").fit(train)
    convert = torch.from_numpy if as_tensor else np.asarray
    projection = Projection.fit(convert(train), 4, gram=gram)
    found = np.asarray(projection(convert(other)))
    assert np.abs(found) == pytest.approx(np.abs(sklearn.transform(other)), abs=1e-9)
    components = np.asarray(projection.components)
    assert components.T @ components == pytest.approx(np.eye(4), abs=1e-9)
    assert np.asarray(projection.mean) == pytest.approx(train.mean(0))


def test_the_sign_is_of_the_components_and_not_of_the_solver(monkeypatch):
    train = rows(40, 6)
    both = [Projection.fit(train, 6, sign=sign).components for sign in ("largest", "sum")]
    solve = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda gram: (solve(gram)[0], -solve(gram)[1]))
    turned = [Projection.fit(train, 6, sign=sign).components for sign in ("largest", "sum")]
    assert np.array_equal(both, turned)
    assert (both[0].max(0) == np.abs(both[0]).max(0)).all()
    assert (both[1].sum(0) > 0).all()


def test_directions_that_hold_nothing_are_left_out():
    train = rows(30, 4) @ np.eye(4, 10)
    assert Projection.fit(train, 10).components.shape == (10, 4)
    assert Projection.fit(train[:3], 3).components.shape == (10, 2)  # about their mean
    assert Projection.fit(train, 10, gram="features").components.shape == (10, 10)


@pytest.mark.parametrize(("dimensions", "gram"), [(0, "features"), (7, "features"), (0, "smaller")])
def test_no_components_or_more_than_there_are_is_refused(dimensions, gram):
    with pytest.raises(UserError, match=f"{dimensions} components cannot be had of 6 samples"):
        Projection.fit(rows(6, 9), dimensions, gram=gram)


def test_standardised_training_images_have_mean_0_and_deviation_1():
    train = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    train[:, 2] = 0.5
    scaled = Standardisation.fit(train)
    assert torch.allclose(scaled(train).mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(scaled(train).std((0, 2, 3)), torch.tensor([1.0, 1, 0]).double())
    assert torch.equal(scaled(train[:1]), scaled(train)[:1])
