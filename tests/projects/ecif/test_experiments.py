"""What the experiments build on: splits, features, baselines in the package's convention."""

import numpy as np
import pytest
import torch
from ecif_problems import make, train

from projects.ecif import labels
from projects.ecif.baselines import (
    Pointwise,
    all_scores,
    checkpoints,
    clip_score,
    if_ekfac,
    tracin,
    tracin_by_gradients,
    trak,
)
from projects.ecif.data import load
from projects.ecif.experiments import misalignment
from projects.ecif.experiments.common import SplitConfig, build
from shared.influence import baselines
from shared.influence.products import hessian
from shared.influence.solvers import dense

SMALL = {
    "train": 60,
    "validation": 24,
    "batch": 8,
    "dimensions": 6,
    "size": 4,
    "delta": 60.0,
    "smoothing": 1.0,
}


def test_parts_do_not_overlap_and_features_are_fitted_on_the_training_part():
    data = load("synthetic", 60, 24, 24, 6, 0)
    parts = [set(part.captions) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [60, 24, 24]
    assert len(set.union(*parts)) == 108
    for x in data.train.inputs:
        assert torch.allclose(x.mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-9)
        assert float(x.square().mean()) == pytest.approx(1)
        covariance = x.T @ x / 60
        assert torch.allclose(covariance, covariance.diagonal().diag(), atol=1e-9)


def test_exchanged_captions_are_of_training_pairs_only():
    plain, exchanged = (
        build(SplitConfig(**SMALL), "synthetic", 0, 24),
        build(SplitConfig(**SMALL), "synthetic", 0, 24, shuffled_share=0.2),
    )
    texts = [
        case.problem.pairs.by_pair(case.problem.pairs.inputs[0]) for case in (plain, exchanged)
    ]
    assert torch.equal((texts[0] != texts[1]).any(1), exchanged.corrupted)
    assert int(exchanged.corrupted.sum()) == 12
    assert torch.equal(plain.validation.pairs.inputs[0], exchanged.validation.pairs.inputs[0])
    assert max(plain.fitted.gradient_norm, exchanged.fitted.gradient_norm) < 1e-6


def test_the_share_of_repeated_captions_is_within_batches():
    pairs = make(8, 4).pairs
    batch = (pairs.order // 4).tolist()
    captions = [f"{b}" if n < 6 else f"own {n}" for n, b in enumerate(batch)]
    same = [
        sum(captions[i] == captions[n] and batch[i] == batch[n] for i in range(8)) > 1
        for n in range(8)
    ]
    assert pairs.repeated_share(captions) == np.mean(same)
    assert pairs.repeated_share([str(n) for n in range(8)]) == 0


@pytest.fixture(scope="module")
def small():
    problem = make(13, 5)
    return problem, train(problem)


def test_the_pointwise_view_is_the_positive_part(small, validation):
    problem, w = small
    matrix = hessian(problem.objective(), w)
    pointwise = baselines.influence(
        Pointwise(problem), w, validation.mean_loss, lambda b: dense(matrix, b)
    )
    assert torch.allclose(
        pointwise,
        problem.scores(w, validation.mean_loss, lambda b: dense(matrix, b), parts="positive"),
        atol=1e-12,
    )
    assert torch.allclose(
        Pointwise(problem).own_losses(w, Pointwise(problem).expanded()),
        Pointwise(problem).sample_losses(w),
        atol=1e-12,
    )


def test_tracin_by_forward_mode_is_tracin_by_gradients(small, validation):
    problem, w = small
    points = checkpoints(problem, problem.centre, w, 3)
    assert len(points) == 3
    assert torch.equal(points[-1], w)
    objective = problem.objective()
    assert float(objective(points[0])) > float(objective(points[1])) > float(objective(w))
    found = tracin(problem, points, validation.mean_loss)
    assert torch.allclose(
        found, tracin_by_gradients(problem, points, validation.mean_loss), atol=1e-12
    )


def test_ekfac_with_an_overwhelming_damping_is_the_gradient_dot_product(
    small, validation, monkeypatch
):
    problem, w = small
    from projects.ecif import baselines as own

    fitted = own.EKFAC.fit
    monkeypatch.setattr(
        own.EKFAC, "fit", lambda *args, **options: fitted(*args, **{**options, "damping": 1e9})
    )
    found = if_ekfac(problem, w, validation.mean_loss)
    tau = problem.towers.parameters.slices["log_tau"]
    g = torch.func.grad(validation.mean_loss)(w)
    g[tau] = 0  # EK-FAC holds it fixed
    wanted = problem.pair_gradients(w, parts="positive") @ g
    assert torch.allclose(found / found.norm(), wanted / wanted.norm(), atol=1e-6)


def test_traks_margin_has_the_pairs_mean_loss(small):
    problem, w = small
    pointwise = Pointwise(problem)
    margin = pointwise.own_margins(w, pointwise.expanded())
    assert torch.allclose(
        torch.log1p(torch.exp(-margin)), pointwise.sample_losses(w) / 2, atol=1e-10
    )
    assert trak(problem, w, lambda at: problem.mean_loss(at), dimension=4, seed=0).shape == (13,)


def test_the_clip_score_is_the_cosine_of_a_pair(small):
    problem, w = small
    texts, images, _ = problem.towers.embed(w, problem.pairs.inputs)
    place = int(problem.pairs.order[7])
    u, v = texts.flatten(0, 1)[place], images.flatten(0, 1)[place]
    assert float(clip_score(problem, w)[7]) == pytest.approx(float(u @ v / u.norm() / v.norm()))


def test_every_method_of_the_table_gives_a_score_per_pair(small, validation):
    problem, w = small
    matrix = hessian(problem.objective(), w)
    calls = all_scores(
        problem,
        w,
        validation.mean_loss,
        lambda b: dense(matrix, b),
        start=problem.centre,
        seed=0,
        dimension=4,
    )
    for name, call in calls.items():
        assert call().shape == (13,), name
        assert call().isfinite().all(), name
    assert (calls["self-influence"]() <= 0).all()
    assert (calls["pair loss"]() <= 0).all()


def test_clean_pairs_are_counted_by_method():
    case = build(SplitConfig(**SMALL), "synthetic", 0, 24)
    assert misalignment.clean_pairs(case, "CLIP-score") == 0
    assert misalignment.clean_pairs(case, "ECIF") == 24
    assert misalignment.clean_pairs(case, labels.LARGER_CLEAN_SET) == 48
