"""Interventions and saliency, and the faults of the authors' code, on cases that can be told by
hand.
"""

import numpy as np
import pytest
import torch
from sscbm_problems import CONCEPTS, data, images, model

from projects.sscbm.intervene import random_order, told, uncertain_order
from projects.sscbm.metrics import predict
from projects.sscbm.released import LeakingObjective, leaked, released_pseudo_labels
from projects.sscbm.saliency import (
    box_hits,
    location_accuracy,
    overlay,
    peaks,
    quadrant_of,
    upsampled,
    visible,
)
from projects.sscbm.training import Losses

GROUPS = ((0, 3), (1,), (2, 4))
TRUTH = torch.tensor([[1.0, 0, 1, 0, 1], [0, 1, 0, 1, 1]])


# ---- interventions -------------------------------------------------------------------------------


def test_an_expert_tells_whole_groups_in_the_images_own_order():
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    nothing = told(TRUTH, order, GROUPS, 0)
    assert nothing.isnan().all()
    found = told(TRUTH, order, GROUPS, 2)
    assert [(~row.isnan()).nonzero().squeeze(1).tolist() for row in found] == [
        [0, 2, 3, 4],
        [1, 2, 4],
    ]
    assert torch.equal(told(TRUTH, order, GROUPS, 3), TRUTH)
    assert torch.equal(found[~found.isnan()], TRUTH[~found.isnan()])


def test_random_orders_are_permutations_of_the_seed():
    first, again, other = (random_order(50, GROUPS, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort(1).values, torch.arange(3).expand(50, 3))
    assert len(first.unique(dim=0)) == 6


def test_the_most_uncertain_group_comes_first():
    p = torch.tensor([[0.5, 0.9, 0.1, 0.6, 0.2], [0.99, 0.45, 0.5, 0.01, 0.52]])
    assert uncertain_order(p, GROUPS).tolist() == [[0, 2, 1], [2, 1, 0]]


@pytest.mark.parametrize("method", ["cbm", "cem", "sscbm"])
def test_told_nothing_a_model_predicts_as_ever_and_told_all_its_own_probabilities_do_not_matter(
    method,
):
    one, x = model(method).eval(), images(4)
    plain = predict(one, x)
    nothing = predict(one, x, torch.full((4, CONCEPTS), torch.nan))
    assert torch.equal(plain.logits, nothing.logits)
    given = (torch.rand(4, CONCEPTS) > 0.5).float()
    before = predict(one, x, given).logits
    head = one.concept_head if method == "cbm" else one.embeddings.probability
    with torch.no_grad():  # other probabilities of its own
        head.weight.mul_(-3)
        head.bias.add_(1)
    assert torch.equal(predict(one, x, given).logits, before)
    assert not torch.equal(predict(one, x).logits, plain.logits)


# ---- saliency ------------------------------------------------------------------------------------


def test_a_map_is_shown_over_its_largest_value():
    maps = torch.tensor([[[-1.0, 2.0], [4.0, 0.0]], [[-1.0, -2.0], [-3.0, -4.0]]])
    assert visible(maps).tolist() == [[[0, 0.5], [1, 0]], [[0, 0], [0, 0]]]


def test_peaks_and_quadrants_are_by_row_then_column():
    maps = torch.zeros(1, 3, 4, 6)
    maps[0, 0, 3, 1] = maps[0, 1, 0, 5] = maps[0, 2, 1, 2] = 1
    found = peaks(maps)
    assert found.tolist() == [[[3, 1], [0, 5], [1, 2]]]
    assert quadrant_of(found, 4, 6).tolist() == [[2, 1, 0]]


def test_a_map_keeps_its_place_when_it_is_brought_to_the_images_size():
    maps = torch.zeros(1, 1, 3, 5)
    maps[0, 0, 2, 1] = 1
    row, column = peaks(upsampled(maps, 12, 20))[0, 0].tolist()
    assert (row // 4, column // 4) == (2, 1)


def test_a_box_around_the_peak_holds_a_part_or_not():
    """Maps of 4 x 4: a cell is 56 of 224 pixels, the box reaches 45 pixels."""
    maps = torch.zeros(2, 2, 4, 4)
    maps[0, 0, 0, 0] = maps[0, 1, 3, 2] = maps[1, 0, 1, 1] = maps[1, 1, 1, 1] = 1
    points = torch.full((2, 2, 2, 2), torch.nan)
    points[0, 0, 1] = torch.tensor([0.2, 0.1])  # of two parts one is seen, and near
    points[0, 1, 0] = torch.tensor([0.1, 0.6])  # far above the peak
    points[1, 0, 0] = torch.tensor([0.375, 0.375])
    hits = box_hits(maps, points)
    assert hits[0].tolist() == [1, 0]
    assert hits[1, 0] == 1
    assert hits[1, 1].isnan()
    assert location_accuracy(hits) == 0.5  # concept 0 always, concept 1 never


def test_an_overlay_is_red_where_the_map_is_high():
    picture = np.full((4, 6, 3), 100, dtype=np.uint8)
    heat = np.zeros((4, 6), dtype=np.float32)
    heat[1, 2] = 1
    found = np.asarray(overlay(picture, heat)).astype(int)
    assert found.shape == (4, 6, 3)
    assert found[1, 2, 0] > 180 > 60 > found[1, 2, 2]
    assert (found[3, 3] == 100).all()


# ---- the authors' code ---------------------------------------------------------------------------


def faulty_by_hand(features, truth, rows, k, index, twice):
    x = features.double().numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    away = 1 - unit @ unit[rows.numpy()].T
    found = np.zeros(truth.shape)
    for i in range(len(x)):
        places = np.argsort(away[i], kind="stable")[:k]
        weights = 1 / (np.maximum(away[i, places], 0) + 1e-6)
        weights = weights / weights.sum()
        for w, place in zip(weights, places, strict=True):
            found[i] += w * truth[place if index else int(rows[place])].numpy()
    return found / k if twice else found


@pytest.mark.parametrize(("index", "twice"), [(True, False), (False, True), (True, True)])
def test_the_faults_are_those_of_the_authors_code(index, twice):
    draw = torch.Generator().manual_seed(0)
    features, truth = (
        torch.randn(30, 5, generator=draw),
        (torch.rand(30, 4, generator=draw) > 0.5).float(),
    )
    rows = torch.randperm(30, generator=draw)[:9].sort().values
    found = released_pseudo_labels(features, truth, rows, 3, index=index, twice=twice)
    wanted = faulty_by_hand(features, truth, rows, 3, index, twice)
    assert np.abs(found.numpy() - wanted).max() < 1e-6
    assert (found.max() <= 1 / 3 + 1e-6) == twice


def test_the_leak_gives_hidden_concepts_and_the_corrected_loss_does_not():
    given, truth = data(9, 3)
    with_truth = leaked(given, truth)
    objective = LeakingObjective(model().eval(), Losses(randint=1.0), 0)
    objective(*with_truth.columns)
    told_to_all = objective.randint(given.concepts)
    assert torch.equal(told_to_all, truth)
