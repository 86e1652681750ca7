"""The patched forward against the model itself and against a plain implementation on hooks."""

import numpy as np
import pytest
import torch

from projects.pahq.baselines import Hooked, plain_search
from projects.pahq.engine import Engine, check
from projects.pahq.graph import Graph
from projects.pahq.metrics import Kl, kl
from projects.pahq.policy import Policy
from projects.pahq.search import effects, search
from tests.projects.pahq.conftest import FAMILIES, tiny


def engine_of(case, policy=None, **options):
    return Engine(case.decoder, case.clean, case.corrupted, case.positions, policy, **options)


def reference_of(case):
    with torch.no_grad():
        return case.decoder.logits(case.clean)[:, -1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_are_the_model_and_none_the_corrupted_run(of_family, family):
    case = of_family(family)
    assert check(case.decoder, case.clean) < 1e-5
    engine = engine_of(case)
    with torch.no_grad():
        own = case.model(case.clean).logits[:, -1:]
        corrupted = case.model(case.corrupted).logits[:, -1:]
        assert (engine.logits() - own).abs().max() < 1e-5
        engine.set_mask(np.zeros_like(engine.mask))
        assert (engine.logits() - corrupted).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edge_has_the_effect_that_hooks_on_the_model_give(of_family, family):
    case = of_family(family)
    engine, hooked = engine_of(case), Hooked(case.model)
    metric = Kl(reference_of(case))
    found = effects(engine, metric)
    full = hooked.full()
    assert (full == engine.mask).all()
    with torch.no_grad():
        c = hooked.run(case.corrupted, full, None).written
        for receiver, sender in np.argwhere(full):
            mask = full.copy()
            mask[receiver, sender] = False
            logits = hooked.run(case.clean, mask, c).logits[:, -1:]
            assert abs(float(metric(logits[None])[0]) - found[receiver, sender]) < 1e-5, (
                engine.graph.sender_name(sender),
                engine.graph.receiver_name(receiver),
            )
    # an edge into every head, not only into head 0, does something
    assert (np.nanmax(np.abs(found), axis=1) > 1e-6).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("ablation", ["corrupted", "zero"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_random_circuits_give_the_logits_that_hooks_give(of_family, family, ablation, share):
    case = of_family(family)
    engine, hooked = engine_of(case, ablation=ablation), Hooked(case.model)
    draw = np.random.default_rng(1)
    for _ in range(3):
        mask = hooked.full() & (draw.random(hooked.full().shape) < share)
        with torch.no_grad():
            c = hooked.run(case.corrupted, hooked.full(), None).written
            c = None if ablation == "zero" else c
            expected = hooked.run(case.clean, mask, c).logits[:, -1:]
            engine.set_mask(mask)
            assert (engine.logits() - expected).abs().max() < 2e-5


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_search_is_the_plain_one(of_family, family):
    case = of_family(family)
    reference = reference_of(case)
    for threshold in (0.003, 0.03):
        engine = engine_of(case)
        found = search(engine, Kl(reference), threshold)
        expected, runs = plain_search(
            case.model,
            case.clean,
            case.corrupted,
            lambda logits: float(kl(reference, logits[:, -1:])),
            threshold,
            list(engine.graph.search_order()),
        )
        # the plain one does not drop what leads nowhere untested; it removes it all the same
        assert (found.mask == expected).all()
        assert 0 < found.mask.sum() < engine.graph.edges
        assert found.evaluations <= runs - 1 == engine.graph.edges


def test_letters_and_heads_are_independent(of_family):
    """Patching the input of one letter of one head leaves all others bit for bit."""
    case = of_family("gpt2")
    engine = engine_of(case)
    graph = engine.graph
    with torch.no_grad():
        base = engine.deltas.clone()
        for receiver in (graph.q(1, 2), graph.k(1, 3), graph.v(1, 1)):
            trial = engine.trial(receiver, [[0]], Kl(reference_of(case)))
            own = graph.owners(receiver)[0]
            assert trial.senders[0] == own
            others = [s for s in trial.senders if s != own]
            assert others == [graph.mlp_sender(1)]  # nothing else reads this head
            assert (trial.deltas[0, 0] != base[own]).any()
        assert torch.equal(engine.deltas, base)


@pytest.mark.parametrize("order", ["normal", "reverse"])
@pytest.mark.parametrize("policy", [Policy(), Policy("pahq-receiver")])
def test_look_ahead_is_the_sequential_search(of_family, order, policy):
    case = of_family("llama")
    metric = Kl(reference_of(case))
    for threshold in (0.001, 0.01, 0.1):
        one, many = (
            search(engine_of(case, policy), metric, threshold, order=order, look_ahead=size)
            for size in (1, 5)
        )
        assert (one.mask == many.mask).all()
        assert np.allclose(one.effects, many.effects, atol=1e-5, equal_nan=True)
        assert one.evaluations < many.evaluations


def test_a_kept_state_is_the_state_of_a_fresh_engine(of_family):
    """Restarting from the receiver's layer, and skipping what is not reached, lose nothing."""
    case = of_family("qwen3")
    engine = engine_of(case)
    found = search(engine, Kl(reference_of(case)), 0.01)
    fresh = engine_of(case)
    with torch.no_grad():
        fresh.set_mask(found.mask)
        assert (fresh.logits() - engine.logits()).abs().max() < 1e-5


def test_dead_edges_change_nothing(of_family):
    case = of_family("gpt2")
    draw = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(5):
            engine = engine_of(case)
            engine.set_mask(engine.graph.full() & (draw.random(engine.mask.shape) < 0.2))
            before = engine.logits()
            cut = engine.graph.without_dead(engine.mask)
            assert cut.sum() < engine.mask.sum()
            engine.set_mask(cut)
            assert (engine.logits() - before).abs().max() < 1e-5


def test_extremes_of_the_threshold(of_family):
    case = of_family("opt")
    metric = Kl(reference_of(case))
    assert search(engine_of(case), metric, float("inf")).mask.sum() == 0
    full = search(engine_of(case), metric, -float("inf"))
    assert (full.mask == case.decoder.graph.full()).all()
    same = Engine(case.decoder, case.clean, case.clean, case.positions)
    assert search(same, metric, 1e-4).mask.sum() == 0


def test_at_equality_an_edge_stays(of_family):
    """Removed is what rises by less than the threshold, strictly."""
    case = of_family("gpt2")
    same = Engine(case.decoder, case.clean, case.clean, case.positions)

    def constant(logits):
        return torch.zeros(len(logits))

    assert (search(same, constant, 0.0).mask == same.graph.full()).all()


def test_the_order_of_senders_is_the_one_asked_for(of_family):
    case = of_family("gpt2")
    for order, sign in (("normal", 1), ("reverse", -1)):
        found = search(engine_of(case), Kl(reference_of(case)), 0.01, order=order)
        assert found.steps[0].receiver == case.decoder.graph.out
        for step in found.steps:
            assert step.senders == sorted(step.senders, reverse=sign < 0)


@pytest.mark.parametrize(
    ("graph", "edges"),
    [
        (Graph(2, 8, 8, mlp=False), 257),
        (Graph(4, 8, 8, mlp=False), 1281),
        (Graph(12, 12, 12), 32_491),
        (Graph(24, 16, 16), 231_877),
        (Graph(30, 9, 3), 70_651),
    ],
)
def test_edges_are_as_many_as_published(graph, edges):
    assert graph.edges == edges == graph.full().sum()


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_edges_by_the_formula(kv_heads, mlp, parallel):
    layers, heads, m = 3, 4, int(mlp)
    readers, writers = heads + 2 * kv_heads, heads + m
    expected = sum(
        readers * (1 + layer * writers) + m * (1 + layer * writers + (0 if parallel else heads))
        for layer in range(layers)
    )
    graph = Graph(layers, heads, kv_heads, mlp, parallel)
    assert graph.edges == expected + 1 + layers * writers
    names = [graph.sender_name(sender) for sender in range(graph.senders)]
    assert [graph.sender_of(name) for name in names] == list(range(graph.senders))
    names = [graph.receiver_name(receiver) for receiver in range(graph.receivers)]
    assert [graph.receiver_of(name) for name in names] == list(range(graph.receivers))


def test_a_tiny_decoder_is_its_own_dense_forward():
    for inner in (0, 40):
        model = tiny(layers=3, inner=inner)
        tokens = torch.randint(2, 30, (2, 9))
        assert check(model.decoder(), tokens) < 1e-5
