"""Pseudo labels are those of a plain KNN; the annotated subset follows its rule."""

import math

import numpy as np
import pytest
import torch

from projects.sscbm.pseudo import (
    choose_labelled,
    nearest,
    neighbours_for,
    pseudo_labels,
    weights_of,
)
from shared.errors import UserError


def problem(n=41, labelled=13, d=7, k=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=draw)
    truth = (torch.rand(n, k, generator=draw) > 0.6).float()
    rows = torch.randperm(n, generator=draw)[:labelled]
    concepts = torch.full_like(truth, torch.nan)
    concepts[rows] = truth[rows]
    return features, truth, concepts, rows


def by_hand(features, concepts, k):
    """Loops in double precision, cell by cell."""
    x, c = features.double().numpy(), concepts.double().numpy()
    found = np.empty_like(c)
    for i in range(len(x)):
        for j in range(c.shape[1]):
            away = []
            for other in range(len(x)):
                if not math.isnan(c[other, j]):
                    cosine = x[i] @ x[other] / (np.linalg.norm(x[i]) * np.linalg.norm(x[other]))
                    away.append((max(1 - cosine, 0.0), other))
            closest = sorted(away)[:k]
            weights = [1 / (d + 1e-6) for d, _ in closest]
            found[i, j] = sum(
                w * c[other, j] for w, (_, other) in zip(weights, closest, strict=True)
            ) / sum(weights)
    return found


@pytest.mark.parametrize(("k", "block"), [(1, 3), (3, 1024), (5, 7), (99, 10)])
def test_pseudo_labels_are_those_of_loops(k, block, monkeypatch):
    from projects.sscbm import pseudo

    plain = nearest
    monkeypatch.setattr(pseudo, "nearest", lambda *a: plain(*a, block=block))
    features, _, concepts, _ = problem()
    found = pseudo_labels(features, concepts, k)
    assert np.abs(found.numpy() - by_hand(features, concepts, k)).max() < 1e-6


def test_partly_annotated_images_lend_the_concepts_that_they_have():
    features, _truth, concepts, rows = problem(seed=3)
    concepts[rows[:4], 1] = torch.nan
    concepts[rows[5:9], 3] = torch.nan
    found = pseudo_labels(features, concepts, 3)
    assert np.abs(found.numpy() - by_hand(features, concepts, 3)).max() < 1e-6


def test_pseudo_labels_are_scikit_learns():
    from sklearn.neighbors import KNeighborsRegressor

    features, truth, concepts, rows = problem(n=60, labelled=25, seed=1)
    peer = KNeighborsRegressor(
        n_neighbors=3,
        metric="cosine",
        algorithm="brute",
        weights=lambda d: 1 / (np.maximum(d, 0) + 1e-6),
    )
    peer.fit(features[rows].double().numpy(), truth[rows].double().numpy())
    wanted = peer.predict(features.double().numpy())
    hidden = concepts.isnan().any(1)  # an annotated image is its own neighbour, at a distance of 0
    found = pseudo_labels(features, concepts, 3)
    assert np.abs(found.numpy() - wanted)[hidden.numpy()].max() < 1e-6


def test_neighbours_that_agree_are_believed_exactly():
    features, _truth, concepts, rows = problem()
    concepts[rows, 2] = 1.0
    concepts[rows, 4] = 0.0
    found = pseudo_labels(features, concepts, 3)
    assert found[:, 2].min() > 1 - 1e-6
    assert (found[:, 4] == 0).all()
    assert found.max() <= 1
    assert found.min() >= 0


def test_one_neighbour_gives_its_own_concepts_and_a_copy_gives_its_originals():
    features, truth, concepts, rows = problem()
    hidden = concepts.isnan().any(1).nonzero().squeeze(1)
    _, closest = nearest(features[hidden], features[rows], 1)
    assert torch.equal(pseudo_labels(features, concepts, 1)[hidden], truth[rows[closest[:, 0]]])
    features[hidden[0]] = 2.5 * features[rows[3]]  # the cosine does not see the length
    found = pseudo_labels(features, concepts, 3)[hidden[0]]
    assert (found - truth[rows[3]]).abs().max() < 1e-3
    assert found.isfinite().all()


def test_near_copies_keep_their_order_in_single_precision():
    """Distances of 1e-9 to 1e-7, which 1 - cos in single precision rounds to 0 or below."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 50, generator=draw)
    steps = torch.tensor([4e-4, 5e-5, 2e-4, 1e-4])
    references = query + steps[:, None] * torch.randn(4, 50, generator=draw)
    distances, rows = nearest(query, references, 4)
    assert rows.tolist() == [[1, 3, 2, 0]]
    assert (distances >= 0).all()
    a, b = query.double().numpy()[0], references.double().numpy()
    wanted = [1 - a @ one / np.linalg.norm(a) / np.linalg.norm(one) for one in b[[1, 3, 2, 0]]]
    assert distances[0].tolist() == pytest.approx(wanted, abs=1e-14)


def test_of_equal_neighbours_the_first_comes_first():
    references = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert nearest(torch.tensor([[1.0, 0.0]]), references, 2)[1].tolist() == [[1, 2]]


def test_weights_sum_to_one_and_fall_with_the_distance():
    w = weights_of(torch.tensor([[0.0, 0.5, 1.0], [-1e-8, 1e-8, 2.0]], dtype=torch.float64))
    assert w.sum(1).tolist() == pytest.approx([1, 1])
    assert (w[:, :-1] > w[:, 1:]).all()
    assert w.isfinite().all()


def test_a_concept_that_no_image_has_annotated_is_refused():
    features, _truth, concepts, _rows = problem()
    concepts[:, 2] = torch.nan
    with pytest.raises(UserError, match="concept 3 is annotated for no image"):
        pseudo_labels(features, concepts, 3)


# ---- the annotated subset ------------------------------------------------------------------------

LABELS = torch.tensor([0] * 40 + [1] * 3 + [2] * 17)


@pytest.mark.parametrize(
    ("ratio", "wanted"),
    [(0.05, [1, 1, 1]), (0.06, [2, 2, 2]), (0.2, [4, 3, 4]), (0.3, [6, 3, 6]), (1.0, [20, 3, 17])],
)
def test_every_class_has_the_same_count_rounded_up(ratio, wanted):
    """60 images of 3 classes: ceil(20 ratio) of each, or all that there are."""
    found = choose_labelled(LABELS, ratio, 0)
    assert LABELS[found.rows].bincount().tolist() == wanted == list(found.per_class.values())
    assert found.ratio(60) == sum(wanted) / 60
    assert neighbours_for(found) == min(3, *wanted)


def test_equal_seeds_annotate_the_same_images_and_others_others():
    first, again, other = (choose_labelled(LABELS, 0.2, seed).rows for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == len(first)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1])
def test_a_ratio_is_a_share(ratio):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        choose_labelled(LABELS, ratio, 0)
