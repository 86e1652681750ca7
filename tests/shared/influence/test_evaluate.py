"""Metrics against values known by hand; corrupted data are corrupted as they say."""

import numpy as np
import pytest
import torch

from shared.errors import UserError
from shared.influence import evaluate, noise

# ---- correlation and LDS -------------------------------------------------------------------------


def test_correlations_of_known_lists():
    assert evaluate.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert evaluate.pearson([1, 2, 3], [1, 0, 1]) == pytest.approx(0)
    assert evaluate.spearman([1, 2, 30], [1, 20, 21]) == pytest.approx(1)
    assert evaluate.spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert evaluate.noise_ceiling([1, 2, 3, 4], [1.1, 1.9, 3.2, 3.9]) > 0.99


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 1, 1], [1, 2, 3], "the predicted values are all equal"),
        ([1, 2, 3], [5, 5, 5], "the true values are all equal"),
        ([1, 2], [1, 2, 3], r"two lists of the same length, at least 2, not \(2,\) and \(3,\)"),
        ([1], [1], "at least 2"),
        ([1, float("nan")], [1, 2], "finite"),
    ],
)
def test_where_there_is_no_correlation(a, b, message):
    with pytest.raises(UserError, match=message):
        evaluate.pearson(a, b)
    with pytest.raises(UserError, match=message):
        evaluate.spearman(a, b)


def test_the_lds_of_an_additive_metric_is_1_and_removed_samples_are_what_counts():
    draw = np.random.default_rng(0)
    kept = draw.random((40, 12)) < 0.5
    scores = draw.normal(size=(12, 3))
    outcomes = (
        np.stack(
            [[sum(scores[k, q] for k in range(12) if not row[k]) for q in range(3)] for row in kept]
        )
        + 7
    )
    assert np.allclose(evaluate.subset_predictions(scores, kept) + 7, outcomes)
    assert evaluate.lds(scores, kept, outcomes) == pytest.approx(1)
    assert evaluate.lds(-scores, kept, outcomes) == pytest.approx(-1)
    assert evaluate.lds(scores[:, 0], kept, outcomes[:, 0]) == pytest.approx(1)
    with pytest.raises(UserError, match="scores of 12 samples do not go with subsets of 11"):
        evaluate.lds(scores, kept[:, :11], outcomes)
    with pytest.raises(UserError, match="must be of the same queries"):
        evaluate.lds(scores, kept, outcomes[:, :2])


def test_errors_of_parameters():
    true = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    predicted = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, -1.0]])
    assert np.allclose(evaluate.cosine(predicted, true), [1, 0, -1])
    assert np.allclose(evaluate.relative_error(predicted, true), [0, 2**0.5, 1.5])
    assert float(evaluate.cosine(np.zeros(2), true[0])) == 0


# ---- detection -----------------------------------------------------------------------------------


def test_detection_puts_the_most_harmful_first():
    harm, corrupted = [0.9, 0.1, 0.8, 0.2, 0.3], [True, False, False, False, True]
    assert evaluate.auroc(harm, corrupted) == pytest.approx(5 / 6)
    assert evaluate.average_precision(harm, corrupted) == pytest.approx((1 + 2 / 3) / 2)
    assert [evaluate.precision_at(harm, corrupted, k) for k in (1, 2, 3)] == [
        1,
        0.5,
        pytest.approx(2 / 3),
    ]
    assert evaluate.found_share(harm, corrupted, [0, 0.2, 0.4, 0.6, 1]) == [0, 0.5, 0.5, 1, 1]
    assert evaluate.most_harmful([1, 1, 2]).tolist() == [2, 0, 1]
    with pytest.raises(UserError, match="precision at 6 needs 1 to 5"):
        evaluate.precision_at(harm, corrupted, 6)
    for mask in ([True] * 5, [False] * 5):
        with pytest.raises(UserError, match="some corrupted samples and some clean ones"):
            evaluate.auroc(harm, mask)


def test_a_removal_curve_trains_without_the_most_harmful():
    asked = []

    def outcome(removed):
        asked.append(removed)
        return float(len(removed))

    assert evaluate.removal_curve([0.1, 0.9, 0.5, 0.2], [0, 0.25, 0.75], outcome) == [0, 1, 3]
    assert asked == [[], [1], [1, 2, 3]]


# ---- corrupted data ------------------------------------------------------------------------------


def test_flipped_labels_are_others_and_the_mask_says_which():
    labels = torch.arange(1000) % 7
    flipped, mask = noise.flip_labels(labels, 0.2, 7, seed=3)
    assert int(mask.sum()) == 200
    assert torch.equal(flipped != labels, mask)
    assert flipped.min() >= 0
    assert flipped.max() <= 6
    shifts = torch.bincount((flipped - labels)[mask] % 7, minlength=7)
    assert shifts[0] == 0
    assert (shifts[1:] > 15).all()  # 33 each on average
    assert torch.equal(noise.flip_labels(labels, 0.2, 7, seed=3)[0], flipped)
    assert not torch.equal(noise.flip_labels(labels, 0.2, 7, seed=4)[1], mask)
    assert torch.equal(labels, torch.arange(1000) % 7)


NAMES, CLASSES, HALVES = (
    [f"a picture of {i}" for i in range(100)],
    [f"class {i % 4}" for i in range(100)],
    ["a", "b"] * 50,
)


@pytest.mark.parametrize(
    ("captions", "fraction"),
    [(NAMES, 0.02), (NAMES, 0.5), (NAMES, 1), (CLASSES, 0.3), (CLASSES, 1), (HALVES, 1)],
)
def test_every_chosen_caption_changes_and_none_is_made_up(captions, fraction):
    source, mask = noise.shuffle_captions(captions, fraction, seed=5)
    assert int(mask.sum()) == round(100 * fraction)
    assert sorted(source) == list(range(100))
    for pair in range(100):
        assert (captions[source[pair]] != captions[pair]) == bool(mask[pair])
        assert mask[pair] or source[pair] == pair
    assert noise.shuffle_captions(captions, fraction, seed=5)[0] == source


def test_noise_that_cannot_be_made_is_refused():
    with pytest.raises(UserError, match="at least 2 are needed"):
        noise.flip_labels(torch.zeros(4), 0.5, 1, seed=0)
    with pytest.raises(UserError, match=r"between 0 and 1, not 1\.5"):
        noise.flip_labels(torch.zeros(4), 1.5, 2, seed=0)
    with pytest.raises(UserError, match="caption 'cat' is that of 3 of 4 chosen pairs"):
        noise.shuffle_captions(["cat", "cat", "cat", "dog"], 1.0, seed=0)
    with pytest.raises(UserError, match="is one pair"):
        noise.shuffle_captions(["cat", "dog", "owl", "ant"], 0.25, seed=0)
    assert noise.shuffle_captions(["cat", "dog"], 0.0, seed=0)[0] == [0, 1]
