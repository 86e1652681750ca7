"""What the experiments build on: equal steps, controls, and where maps are said to point."""

import pytest
import torch
from sscbm_problems import model

from projects.sscbm import data, labels
from projects.sscbm.baselines import propagated
from projects.sscbm.experiments import ablation, common, main, saliency
from projects.sscbm.experiments.common import SETTINGS, Case
from projects.sscbm.metrics import predict
from shared.data import cache

SMALL = {
    "pool": 60, "test": 24, "train": 50, "seeds": 1, "backbone": "quarter-3-4", "size": 3,
    "epochs": 2, "batch": 10, "rate": 0.01, "ratio": 0.2, "lambda_1": 1.0, "lambda_2": 0.1,
    "randint": 0.25, "root": None, "edge": None, "weights": None, "end_to_end": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def one():
    config = main.Config(datasets=["synthetic"], **SMALL)
    pool = common.loaded(config, "synthetic").pool.images().flatten(1)
    test = common.loaded(config, "synthetic").test.images().flatten(1)
    return config, common.case(config, "synthetic", 0, 0.2, {"pool": pool}), test


def test_fewer_images_make_as_many_steps(one):
    config, case, _ = one
    pseudo = case.pseudo()
    steps = {
        name: common.trained(config, case, SETTINGS[name], pseudo)[1]
        for name in (labels.LABELLED_ONLY, labels.SSCBM)
    }
    assert steps[labels.SSCBM] == 10  # five batches, twice
    assert steps[labels.LABELLED_ONLY] == 10


def test_hidden_concepts_are_nan_and_the_others_the_truth(one):
    _, case, _ = one
    known = ~case.concepts.isnan()
    assert known.any(1).sum() == len(case.choice.rows) == known.all(1).sum()
    assert torch.equal(case.concepts[known], case.truth[known])
    assert case.ratio == len(case.choice.rows) / 50
    right = ((case.pseudo() > 0.5) == (case.truth > 0.5))[~known].float().mean()
    assert case.agreement(case.pseudo()) == pytest.approx(float(right))


def test_a_classs_concepts_from_one_annotated_image_are_all_concepts(one):
    _, case, _ = one
    assert torch.equal(propagated(case.labels, case.concepts), case.truth)


def test_the_controls_are_what_they_say(one):
    _, case, test = one
    held, rows = case.data.test, case.choice.rows
    found = main.controls(case, test)
    guess = case.truth[rows].mean(0) > 0.5
    right = (guess == (held.concepts > 0.5)).float().mean()
    assert found[labels.MAJORITY].concepts == pytest.approx(float(right))
    commonest = case.labels[rows].bincount().argmax()
    share = float((held.labels == commonest).float().mean())
    assert found[labels.MAJORITY].task == pytest.approx(share)
    # patterns of four classes under noise: their neighbours know
    assert found[labels.KNN].task == found[labels.KNN].concepts == 1


def test_only_the_faulty_variants_are_given_the_truth(one):
    config, case, _ = one
    poisoned = Case(
        **{**vars(case), "truth": torch.where(case.concepts.isnan(), torch.nan, case.truth)}
    )
    pixels = case.images.flatten(1) / 255
    settings = ablation.Config(datasets=["synthetic"], neighbours=[1], strong=1.0, **SMALL)
    honest = [labels.STRONGER, labels.COSINE, labels.BY_PIXELS]
    for variant in honest:
        first, second = (
            ablation.trainings(settings, it, pixels)[variant]().state_dict()
            for it in (case, poisoned)
        )
        assert all(torch.equal(first[name], second[name]) for name in first), variant
    plain = common.trained(config, case, SETTINGS[labels.SSCBM], case.pseudo())[0].state_dict()
    leaking = ablation.trainings(settings, case, pixels)[labels.LEAKED]().state_dict()
    assert any(not torch.equal(plain[name], leaking[name]) for name in plain)


def test_predictions_are_told_row_by_row():
    one, images = model().eval(), torch.rand(9, 2, 12, 20)
    given = (torch.rand(9, 5) > 0.5).float()
    assert torch.allclose(
        predict(one, images, given, batch=4).logits, predict(one, images, given).logits, atol=1e-6
    )


# ---- saliency ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    if not cache.is_complete("mnist"):
        pytest.skip("mnist is not in the data cache")
    found = data.load("scenes", 40, 40)
    nothing = torch.zeros(0)
    return Case(found, 0, *[nothing] * 6, None, nothing, 1)


def test_maps_that_are_the_ink_of_the_own_digit_point_at_it(scenes):
    test, places = scenes.data.test, scenes.data.places
    ink = test.images()[:, 0]
    at = torch.arange(32) // 16
    quadrant = 2 * at[:, None] + at[None]
    own = torch.stack(
        [torch.where(quadrant == places[:, d, None, None], ink, 0) for d in range(10)], 1
    )
    small = torch.nn.functional.avg_pool2d(own, 4)
    found = saliency.pointing(small, scenes)
    assert found["pointing_accuracy"] == 1
    assert found["other_share"] == found["empty_share"] == 0
    assert found["inside_share"] > 0.8  # bicubic interpolation spills over the border
    assert found["box_accuracy"] > 0.8  # not all of a digit is near the middle


def test_a_random_pixel_of_ink_is_half_of_the_time_the_other_digits(scenes):
    found = saliency.ink(scenes)
    assert found["pointing_accuracy"] == pytest.approx(0.5, abs=1e-6)
    assert found["pointing_accuracy"] + found["other_share"] == 1
