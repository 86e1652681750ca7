"""Each experiment runs at scale smoke, and its rows become tables, figures and claims; pieces that
only experiments use are right.
"""

import json

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from projects.sam_if import baselines
from projects.sam_if.data import Case, Solution, load, resnet18
from projects.sam_if.estimators import Estimator
from projects.sam_if.trajectory import Gif, Recipe
from shared import claims, experiment, figures, manifest, rows, tables
from shared.errors import UserError

UNTIMED = [name for name, one in manifest.manifest("sam_if").experiments.items() if not one.timed]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    where = tmp_path_factory.mktemp("results")
    for name in manifest.manifest("sam_if").experiments:
        experiment.run_experiment("sam_if", name, "smoke", {}, where)
    return where


@pytest.fixture(scope="module")
def case():
    return Case.of(load("blobs", 80, features=5, seed=0, validation=30, test=50), l2=0.05, rho=0.2)


def test_every_table_figure_and_claim_is_made_of_smoke_rows(results):
    known = manifest.manifest("sam_if")
    written = tables.build("sam_if", "smoke", results)
    assert {one.stem for one in written} == set(known.tables)
    for name in known.figures:
        figure = figures.make("sam_if", name, "smoke", results)
        assert figure.axes
        plt.close(figure)
    ledger = claims.evaluate("sam_if", "smoke", results)
    assert all(one["verdict"] in claims.VERDICTS for one in ledger)
    assert next(one for one in ledger if one["id"] == "sam_if.derivative")["verdict"] == "holds"
    assert next(one for one in ledger if one["id"] == "sam_if.passes")["verdict"] == "holds"


@pytest.mark.parametrize("name", ["gallery", "trajectory"])
def test_the_same_rows_come_out_again(results, tmp_path, name):
    experiment.run_experiment("sam_if", name, "smoke", {}, tmp_path)
    first, second = (
        json.loads(rows.rows_path(one, "smoke", "sam_if", name).read_text())
        for one in (results, tmp_path)
    )
    assert first["rows"] == second["rows"]
    assert first["arrays"] == second["arrays"]


def test_the_gallery_shows_the_extreme_scores_and_their_images(results):
    frame = rows.read_frame(rows.rows_path(results, "smoke", "sam_if", "gallery"))
    helpful, harmful = (
        frame[(frame["kind"] == kind) & (frame["query"] == frame["query"].iloc[0])]
        for kind in ("helpful", "harmful")
    )
    assert helpful["influence_score"].is_monotonic_decreasing
    assert harmful["influence_score"].is_monotonic_increasing
    assert helpful["influence_score"].min() > harmful["influence_score"].max()
    assert helpful["influence_score"].iloc[0] > 0 > harmful["influence_score"].iloc[0]
    pictures = rows.read_array(frame, "blobs")
    images = load("blobs", 60, features=4, seed=0, validation=0, test=500)
    assert np.array_equal(pictures[0, 1], images.pictures[helpful["index"].iloc[0]].numpy())
    assert np.array_equal(pictures[0, 0], images.test_pictures[frame["query"].iloc[0]].numpy())


def test_retraining_is_the_fixed_point_without_the_samples(case):
    """Against Newton's method from 0 on the samples that are left, whose number is not the n that
    is divided by.
    """
    solution = Solution.of(case, tol=1e-11)
    gone = [3, 41]
    found = solution.without([gone]).w[0]
    kept = [one for one in range(80) if one not in gone]
    x, y = case.images.x[kept], case.images.y[kept]

    def gradient(w):
        at = w.clone().requires_grad_()
        loss = (
            torch.nn.functional.cross_entropy(case.parameters.call(at, x), y, reduction="sum") / 80
        )
        return torch.autograd.grad(loss, at)[0]

    g = gradient(found)
    assert (gradient(found + 0.2 * g / g.norm()) + 0.05 * found).norm() < 1e-10
    assert not torch.allclose(found, solution.w, atol=1e-4)


def test_images_are_drawn_by_seed_without_overlap():
    a, b = (load("blobs", 50, features=4, seed=1, validation=20, test=30) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.y, b.y)
    assert a.x.shape == (50, 4)
    assert a.x.square().mean() == pytest.approx(1)
    everything = torch.cat([a.pictures.flatten(1), a.test_pictures.flatten(1)])
    assert len(everything.unique(dim=0)) == len(everything)
    assert not torch.equal(a.x, load("blobs", 50, features=4, seed=2, validation=20, test=30).x)
    with pytest.raises(
        UserError, match="blobs has 4000 images, too few for 4010 to train on and validate"
    ):
        load("blobs", 4000, features=4, seed=0, validation=10)
    with pytest.raises(UserError, match="there are no images 'imagenet'"):
        load("imagenet", 10, features=4, seed=0)


def test_checkpoints_cover_the_run_and_its_rates(case):
    recipe = Recipe.epochs(
        case.problem, case.parameters.flat(), epochs=3, batch=20, lr=0.1, seed=0, momentum=0.5
    )
    saved, rates = baselines.checkpoints(recipe, 5)
    assert len(recipe.steps) == 12
    assert torch.equal(saved[-1], recipe.train())
    assert sum(rates) == pytest.approx(12 * 0.1 / 0.5)
    third = [w for _, w, _ in recipe.states()][5]
    assert torch.equal(saved[1], third)  # after 12 x 2/5 steps, rounded


def test_margins_and_metrics_are_those_of_their_definitions(case):
    w = 0.3 * torch.randn(
        case.parameters.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    p = torch.softmax(case.parameters.call(w, case.images.x), 1)[torch.arange(80), case.images.y]
    assert torch.allclose(case.margins(w, (case.images.x, case.images.y)), (p / (1 - p)).log())
    found = case.metrics(3)(w)
    assert found[0] == pytest.approx(float(case.test_loss(w)))
    assert len(found) == 4


def test_a_name_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="sam_if/gallery"):
        experiment.run_experiment("sam_if", "gallery", "smoke", {"top": 0}, tmp_path)
    with pytest.raises(UserError, match="radii"):
        experiment.run_experiment("sam_if", "radius", "smoke", {"radii": "none"}, tmp_path)


def test_only_the_timed_experiment_is_not_the_same_again():
    assert "speed" not in UNTIMED
    assert len(UNTIMED) == 7


def test_a_resnet18_is_one_and_its_samples_do_not_touch_one_another():
    """The published number of parameters of the network for small images; the loss of a sample is
    its own.
    """
    assert (
        sum(one.numel() for one in resnet18(3, (64, 128, 256, 512), 0).parameters()) == 11_173_962
    )
    model = resnet18(1, (4, 4, 8, 8), 0)
    x = torch.randn(5, 1, 9, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(x)[2:3], model(x[2:3]), atol=1e-6)
    assert torch.equal(model(x), resnet18(1, (4, 4, 8, 8), 0)(x))
    assert not torch.allclose(model(x), resnet18(1, (4, 4, 8, 8), 1)(x))
    plain = torch.nn.GroupNorm(4, 64)  # torch's own, with other numbers than 1 and 0
    model.bn1.weight.data = plain.weight.data = torch.linspace(0.5, 2, 64)
    model.bn1.bias.data = plain.bias.data = torch.linspace(-1, 1, 64)
    x = torch.randn(3, 64, 5, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1
    assert torch.allclose(model.bn1(x), plain(x), atol=1e-5)


def test_pixels_are_centred_by_the_training_images():
    images = load("blobs", 60, features=None, seed=0, validation=20, test=30)
    assert images.x.shape == (60, 1, 8, 8)
    assert images.x.dtype == torch.float32
    assert abs(float(images.x.mean())) < 1e-5
    assert float(images.x.std()) == pytest.approx(1, abs=1e-5)
    raw = images.pictures.float()
    assert torch.allclose(images.x[:, 0], (raw - raw.mean()) / raw.std(), atol=1e-5)
    other = (images.test_pictures.float() - raw.mean()) / raw.std()
    assert torch.allclose(images.x_test[:, 0], other, atol=1e-5)


def test_sets_are_taken_out_together_as_one_by_one(case):
    """By a solve and along a run; also along a run that is kept, whose states are those of one that
    is made anew.
    """
    options = {"epochs": 2, "batch": 32, "lr": 0.1, "seed": 0, "momentum": 0.5}
    made, kept = (
        Recipe.epochs(case.problem, case.parameters.flat(), kept=kept, **options)
        for kept in (False, True)
    )
    for (_, *one), (_, *other) in zip(made.states(), kept.states(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(made.train(), kept.train())
    sets = [[3, 41, 7], [5], [3, 6]]
    at = case.problem.at(Solution.of(case).w)
    for method in (Gif(made), Gif(kept), Estimator(at, tol=1e-10), Estimator(at, "if", tol=1e-10)):
        together = method.joint_effects(sets)
        for column, samples in enumerate(sets):
            summed = method.removal_effects(samples).sum(1)
            assert torch.allclose(together[:, column], summed, rtol=1e-7, atol=1e-12)


def test_formed_matrices_are_the_same_estimators(case):
    w = Solution.of(case).w
    plain, formed = (case.problem.at(w, formed=formed) for formed in (False, True))
    for kind in ("if", "sam_if", "sam_hif"):
        options = {"solver": "dense", "tol": 1e-8}
        a, b = (Estimator(at, kind, **options).scores(case.test_loss) for at in (plain, formed))
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_checkpoints_are_states_of_the_run(case):
    recipe = Recipe.epochs(
        case.problem, case.parameters.flat(), epochs=2, batch=32, lr=0.1, seed=0, momentum=0.5
    )
    states = [w for _, w, _ in recipe.states()] + [recipe.train()]
    saved, rates = baselines.checkpoints(recipe, 3)
    assert len(recipe.steps) == 6
    assert [torch.equal(one, states[at]) for one, at in zip(saved, (2, 4, 6), strict=True)] == [
        True
    ] * 3
    assert rates == pytest.approx([2 * 0.1 / 0.5] * 3)
