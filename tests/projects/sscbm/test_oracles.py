"""What the method rests on, against computations that share no code with it."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from sscbm_problems import CLASSES, CONCEPTS, SHAPE, SIZE, data, images, model, state, trained
from torch import nn
from torch.nn.functional import linear

from projects.sscbm.experiments.common import SETTINGS
from projects.sscbm.metrics import predict, scores
from projects.sscbm.model import ConceptEmbeddings
from projects.sscbm.training import Data, Losses, Objective, hide, imbalance_of
from shared import data as catalogue
from shared.data import cache
from shared.errors import UserError

NOTHING = Losses(unlabelled="nothing")


# ---- concept embeddings --------------------------------------------------------------------------


def layer(width=6, seed=0):
    torch.manual_seed(seed)
    return ConceptEmbeddings(width, CONCEPTS, SIZE)


def by_formula(one, h, given=None):
    """The published formulas, concept by concept, in numpy and double precision."""
    to = lambda tensor: tensor.detach().double().numpy()  # noqa: E731
    w, b = (to(part) for part in one.contexts[0].parameters())
    v, a = (to(part) for part in one.probability.parameters())
    mixed, ps = [], []
    for i in range(CONCEPTS):
        own = slice(i * 2 * SIZE, (i + 1) * 2 * SIZE)
        raw = to(h) @ w[own].T + b[own]
        context = np.where(raw > 0, raw, 0.01 * raw)
        p = 1 / (1 + np.exp(-(context @ v[0] + a[0])))
        ps.append(p)
        if given is not None:
            p = np.where(np.isnan(to(given)[:, i]), p, to(given)[:, i])
        mixed.append(p[:, None] * context[:, :SIZE] + (1 - p)[:, None] * context[:, SIZE:])
    return np.stack(mixed, 1), np.stack(ps, 1)


@pytest.mark.parametrize("given", [False, True])
def test_concept_embeddings_are_the_published_formula(given):
    one, h = layer(), torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    told = None
    if given:
        told = torch.full((7, CONCEPTS), torch.nan)
        told[:3, 1], told[2:, 4], told[5, 0] = 1.0, 0.0, 1.0
    e, logits = one(h, told)
    mixed, p = by_formula(one, h, told)
    assert np.abs(e.detach().numpy() - mixed).max() < 1e-6
    assert np.abs(logits.sigmoid().detach().numpy() - p).max() < 1e-6


def test_a_given_probability_of_one_is_the_positive_embedding_and_of_zero_the_negative():
    one, h = layer(), torch.randn(3, 6)
    contexts = one.contexts(h).view(3, CONCEPTS, 2, SIZE)
    for value, side in ((1.0, 0), (0.0, 1)):
        e, _ = one(h, torch.full((3, CONCEPTS), value))
        assert torch.equal(e, contexts[:, :, side])


def test_concept_embeddings_are_torch_explains(monkeypatch):
    """The peer has a module per concept; its weights are ours, cut in pieces."""
    if not cache.is_complete("torch-explain"):
        pytest.skip("torch-explain is not in the data cache: repro data fetch torch-explain")
    folder = catalogue.path("torch-explain") / "torch_explain" / "nn"
    for name in ("semantics", "concepts"):  # of one package, as the second imports the first
        spec = importlib.util.spec_from_file_location(f"peer.{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"peer.{name}", module)
        spec.loader.exec_module(module)
    peer = module.ConceptEmbedding(6, CONCEPTS, SIZE)
    one, h = layer(), torch.randn(7, 6)
    with torch.no_grad():
        for i, part in enumerate(peer.concept_context_generators):
            own = slice(i * 2 * SIZE, (i + 1) * 2 * SIZE)
            part[0].weight.copy_(one.contexts[0].weight[own])
            part[0].bias.copy_(one.contexts[0].bias[own])
        peer.concept_prob_predictor[0].weight.copy_(one.probability.weight)
        peer.concept_prob_predictor[0].bias.copy_(one.probability.bias)
    e, logits = one(h)
    theirs, p = peer(h)
    assert torch.allclose(e, theirs, atol=1e-6)
    assert torch.allclose(logits.sigmoid(), p, atol=1e-6)
    truth = (torch.rand(7, CONCEPTS) > 0.5).float()
    told = torch.full_like(truth, torch.nan)
    told[:, [1, 3]] = truth[:, [1, 3]]
    assert torch.allclose(one(h, told)[0], peer(h, intervention_idxs=[1, 3], c=truth)[0], atol=1e-6)


# ---- heat maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_the_alignment_is_the_spatial_mean_of_the_heat_maps(similarity):
    one = model(similarity=similarity, dtype=torch.float64).eval()
    x = images().double()
    maps = one.heat_maps(x)
    assert maps.shape == (11, CONCEPTS, 3, 5)  # a quarter of 12 x 20
    assert torch.allclose(one(x).alignment, maps.mean((2, 3)), atol=1e-12)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_heat_maps_are_products_written_as_loops(similarity):
    one = model(similarity=similarity, dtype=torch.float64).eval().requires_grad_(False)
    x = images(2).double()
    found, h = one.encoder(x)
    e, _ = one.embeddings(h)
    maps = one.heat_maps(x)
    for n in range(2):
        for i in range(CONCEPTS):
            for p in range(3):
                for q in range(5):
                    place = linear(found[n, :, p, q], one.place.weight, one.place.bias)
                    value = float(e[n, i] @ place)
                    if similarity == "cosine":
                        value /= float(e[n, i].norm() * place.norm())
                    assert float(maps[n, i, p, q]) == pytest.approx(value, abs=1e-12)


def test_what_moves_to_the_right_moves_to_the_right_in_the_heat_map():
    """An input that is wider than high, so that exchanged axes would not fit, and a spot that moves
    by four columns of the map.
    """
    one = model().eval()
    plain = torch.zeros(1, *SHAPE)
    spots = []
    for column in (2, 14):
        x = plain.clone()
        x[:, :, 5:8, column : column + 3] = 1
        change = (one.heat_maps(x)[0] - one.heat_maps(plain)[0]).abs().sum(0)
        spots.append(divmod(int(change.argmax()), change.shape[1]))
    (row, left), (same, right) = spots
    assert row == same
    assert right - left == 3  # 12 pixels, a place every 4


def test_the_gradient_of_the_alignment_is_that_of_finite_differences():
    one = model(dtype=torch.float64).eval()
    given, _ = data(6, 2)
    given = Data(
        given.images.double(), given.labels, given.concepts.double(), given.pseudo.double()
    )
    objective = Objective(one, Losses(lambda_1=0.0, lambda_2=0.7, randint=0.0), seed=0)
    hidden = given.concepts.isnan()

    def loss():
        return objective.unlabelled(one(given.images), given.images, ~hidden, given.pseudo)

    one.zero_grad()
    loss().backward()
    step = 1e-6
    for parameter in (
        one.place.weight,
        one.embeddings.contexts[0].weight,
        one.encoder.backbone[0].weight,
    ):
        flat, slope = parameter.data.view(-1), parameter.grad.view(-1)
        for at in (0, flat.numel() // 2, flat.numel() - 1):
            before = float(flat[at])
            flat[at] = before + step
            above = float(loss().detach())
            flat[at] = before - step
            below = float(loss().detach())
            flat[at] = before
            assert float(slope[at]) == pytest.approx((above - below) / (2 * step), abs=1e-7)


# ---- what may not be seen ------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, one in SETTINGS.items() if not one.full])
def test_hidden_concepts_and_classes_change_no_bit(method, monkeypatch):
    """The truth of all images that are not annotated is overwritten, from the pseudo labels on."""
    from projects.sscbm.experiments import common
    from projects.sscbm.experiments.main import Config

    config = Config(
        datasets=["synthetic"], pool=40, test=8, train=30, seeds=1, backbone="quarter-3-4",
        size=3, epochs=1, batch=10, rate=0.01, ratio=0.2, lambda_1=1.0, lambda_2=0.1,
        randint=0.25, root=None, edge=None, weights=None, end_to_end=False,
    )  # fmt: skip
    data_set = common.loaded(config, "synthetic")
    pool, test = data_set.pool.images(), data_set.test.images()
    frozen = {"pool": pool.flatten(1), "pool_maps": pool, "test": test, "test_maps": test}
    setting = SETTINGS[method]

    def weights(poison):
        one = common.case(config, "synthetic", 0, 0.2, frozen)
        if poison:
            hidden = one.concepts.isnan().any(1)
            one.truth[hidden] = torch.nan
            if setting.task_labels == "labeled":
                one.labels[hidden] = (one.labels[hidden] + 1) % 4
        return state(common.trained(config, one, setting, one.pseudo())[0])

    clean, poisoned = weights(False), weights(True)
    assert all(torch.equal(clean[name], poisoned[name]) for name in clean)


def test_randint_gives_annotated_concepts_alone_and_the_same_to_all_images_of_a_batch():
    given, truth = data(9, 4)
    objective = Objective(model(), Losses(randint=0.5), seed=4)
    told = objective.randint(given.concepts)
    assert told[4:].isnan().all()
    chosen = ~told[:4].isnan()
    assert (chosen == chosen[0]).all()
    assert 0 < chosen[0].sum() < CONCEPTS
    assert torch.equal(told[:4][chosen], truth[:4][chosen])
    objective.step += 1
    others = [
        Objective(model(), Losses(randint=0.5), 4, step).randint(given.concepts)
        for step in range(20)
    ]
    assert len({tuple(one[0].isnan().tolist()) for one in others}) > 5
    share = torch.stack([~one[0].isnan() for one in others]).float().mean()
    assert 0.35 < share < 0.65


# ---- equal methods -------------------------------------------------------------------------------


def test_with_all_annotations_sscbm_is_cem_to_the_bit():
    given, _truth = data(11, 11)
    cem, sscbm = state(trained("cem", given, NOTHING)), state(trained("sscbm", given))
    assert all(torch.equal(cem[name], sscbm[name]) for name in cem)
    assert set(sscbm) - set(cem) == {"place.weight", "place.bias"}


def test_without_a_weight_on_the_alignment_sscbm_is_cem():
    given, _ = data(11, 5)
    cem = state(trained("cem", given, NOTHING))
    sscbm = state(trained("sscbm", given, Losses(lambda_2=0.0)))
    assert all(torch.equal(cem[name], sscbm[name]) for name in cem)
    with_it = state(trained("sscbm", given))
    assert any(not torch.equal(cem[name], with_it[name]) for name in cem)


def test_pseudo_labels_of_annotated_cells_are_not_used():
    given, _ = data(11, 5)
    other = given.pseudo.clone()
    other[:5] = 0.123
    for method, losses in (("sscbm", Losses()), ("cbm", Losses(unlabelled="direct", randint=0.0))):
        first, second = (
            state(trained(method, Data(given.images, given.labels, given.concepts, pseudo), losses))
            for pseudo in (given.pseudo, other)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the losses ----------------------------------------------------------------------------------


def test_the_loss_is_its_three_terms_written_as_loops():
    given, _truth = data(7, 3)
    given.concepts[1, 2] = torch.nan  # an image that is annotated in part
    known = ~given.concepts.isnan()
    labels = hide(given.labels, given.concepts, "labeled")
    assert labels.tolist() == [*given.labels[:3].tolist(), -1, -1, -1, -1]
    one = model().double().eval()
    x = given.images.double()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    objective = Objective(one, Losses(lambda_1=0.7, lambda_2=0.3, randint=0.0), 0, weights=weights)
    found = objective(x, labels, given.concepts.double(), given.pseudo.double())
    out = one(x)
    task = np.mean([-float(out.logits[n].log_softmax(0)[labels[n]]) for n in range(3)])
    cells = {True: [], False: []}
    for n in range(7):
        for i in range(CONCEPTS):
            there = bool(known[n, i])
            p = float(out.probabilities[n, i] if there else out.alignment[n, i].sigmoid())
            c = float(given.concepts[n, i] if there else given.pseudo[n, i])
            value = -(c * np.log(p) + (1 - c) * np.log(1 - p))
            cells[there].append(value * float(weights[i]) if there else value)
    wanted = task + 0.7 * np.mean(cells[True]) + 0.3 * np.mean(cells[False])
    assert float(found) == pytest.approx(wanted, abs=1e-9)


def test_imbalance_weighs_by_absent_over_present():
    concepts = torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 0, torch.nan], [torch.nan, 0, torch.nan]])
    assert imbalance_of(concepts).tolist() == [2, 1, 0]


@pytest.mark.parametrize("labelled", [0, 1, 4])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("unlabelled", ["align", "direct", "fixmatch"])
def test_any_batch_has_a_finite_loss_and_gradient(n, labelled, unlabelled):
    given, _ = data(n, min(labelled, n))
    one = model().eval()  # a batch norm in train mode needs two images, and `batches` sees to that
    for labels in (given.labels, torch.full((n,), -1)):
        loss = Objective(one, Losses(unlabelled=unlabelled), 0)(
            given.images, labels, given.concepts, given.pseudo
        )
        one.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in one.parameters())


# ---- metrics and permutations --------------------------------------------------------------------


def test_metrics_do_not_depend_on_batches():
    one, x = model().eval(), images(30)
    _, truth = data(30)
    labels = torch.arange(30) % CLASSES
    truth[2, 1] = torch.nan
    found = [scores(predict(one, x, batch=batch), labels, truth) for batch in (7, 100)]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    out = one(x)
    right = [
        (float(out.probabilities[n, i]) > 0.5) == (float(truth[n, i]) > 0.5)
        for n in range(30)
        for i in range(CONCEPTS)
        if not torch.isnan(truth[n, i])
    ]
    assert found[0].concepts == pytest.approx(np.mean(right))
    assert found[0].task == pytest.approx(float((out.logits.argmax(1) == labels).float().mean()))


def test_an_auc_is_the_share_of_pairs_in_order():
    from projects.sscbm.metrics import auc

    p = torch.tensor([[0.1, 0.5], [0.4, 0.5], [0.35, 0.5], [0.8, 0.5]])
    c = torch.tensor([[0.0, 1], [0, 1], [1, 1], [1, 1]])
    assert auc(p, c) == pytest.approx(3 / 4)
    assert auc(p, torch.ones(4, 2)) == 0.5


def test_the_order_of_concepts_and_classes_does_not_matter():
    one, x = model().eval(), images(6)
    maps, out = one.heat_maps(x), one(x)
    order, classes = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 0, 1])
    other = model().eval()
    linear_in, head = other.embeddings.contexts[0], other.class_head
    with torch.no_grad():
        for part in (linear_in.weight, linear_in.bias):
            part.copy_(part.unflatten(0, (CONCEPTS, 2 * SIZE))[order].flatten(0, 1))
        weight = head.weight.unflatten(1, (CONCEPTS, SIZE))[:, order].flatten(1)
        head.weight.copy_(weight[classes])
        head.bias.copy_(head.bias[classes])
    moved = other(x)
    assert torch.allclose(moved.probabilities, out.probabilities[:, order], atol=1e-6)
    assert torch.allclose(moved.logits, out.logits[:, classes], atol=1e-6)
    assert torch.allclose(other.heat_maps(x), maps[:, order], atol=1e-6)


def test_an_image_of_bytes_is_the_image_from_0_to_1():
    one = model().eval()
    pixels = (255 * images(3)).round().byte()
    assert torch.equal(one(pixels).logits, one(pixels / 255).logits)


def test_the_encoder_may_end_in_a_thousand_logits():
    one = model(encoder_output="logits").eval()
    assert one.encoder.width == 1000
    assert one(images(2)).probabilities.shape == (2, CONCEPTS)
    assert one.heat_maps(images(2)).shape == (2, CONCEPTS, 3, 5)


def test_a_model_without_heat_maps_says_so():
    with pytest.raises(UserError, match="no heat maps"):
        model("cem").heat_maps(images(1))


def test_weights_are_of_the_seed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (state(model(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["class_head.weight"], other["class_head.weight"])
    assert isinstance(model("cbm").concept_head, nn.Linear)
