"""Scores by gradients against differences, areas against known values, built circuits."""

import numpy as np
import pytest
import torch

from projects.pahq import attribution, built, roc
from projects.pahq.baselines import Released
from projects.pahq.engine import Engine, check
from projects.pahq.graph import Graph
from projects.pahq.metrics import Kl, Margin, SquaredDistance, kl
from projects.pahq.policy import Policy
from projects.pahq.search import effects, search
from tests.projects.pahq.conftest import prompts, tiny


class Sum:
    """A smooth metric with a gradient everywhere."""

    def __call__(self, logits):
        return torch.tanh(logits).sum(dim=(-3, -2, -1)) / logits.shape[-3]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_the_dense_forward_is_the_engine(of_family, family):
    case = of_family(family)
    engine = Engine(case.decoder, case.clean, case.corrupted, case.positions)
    draw = np.random.default_rng(0)
    with torch.no_grad():
        assert torch.allclose(attribution.dense(engine), engine.logits(), atol=1e-5)
        for _ in range(3):
            mask = engine.graph.full() & (draw.random(engine.mask.shape) < 0.6)
            real = torch.from_numpy(mask).float()
            found = attribution.dense(engine, real)
            engine.set_mask(mask)
            assert torch.allclose(found, engine.logits(), atol=1e-5)
            engine.set_mask(engine.graph.full())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_eap_is_the_derivative_of_an_edge(of_family, family):
    """Against a finite difference of one entry of a real-valued mask."""
    case = of_family(family)
    engine = Engine(case.decoder, case.clean, case.corrupted, case.positions)
    scores, metric = attribution.eap(engine, Sum()), Sum()
    draw = np.random.default_rng(0)
    edges = np.argwhere(engine.graph.full())
    step = 1e-2
    with torch.no_grad():
        for receiver, sender in draw.choice(edges, 12, replace=False):
            values = []
            for sign in (1, -1):
                mask = torch.from_numpy(engine.graph.full()).float()
                mask[receiver, sender] += sign * step
                values.append(float(metric(attribution.dense(engine, mask)[None])[0]))
            slope = (values[0] - values[1]) / (2 * step)
            assert -scores[receiver, sender] == pytest.approx(slope, abs=5e-3, rel=2e-2)


def test_eap_is_the_effect_where_the_corruption_is_small(of_family):
    """Corrupted embeddings that approach the clean ones: effect / EAP approaches 1."""
    case = of_family("gpt2")
    errors = []
    for size in (0.1, 0.01):
        decoder = _moved(case.decoder, size)
        engine = Engine(decoder, case.clean, case.clean + 100, case.positions)
        scores, exact = attribution.eap(engine, Sum()), effects(engine, Sum())
        edges = engine.graph.full()
        scale = np.abs(scores[edges]).max()
        errors.append(np.abs(scores[edges] - exact[edges]).max() / scale)
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


def _moved(decoder, size):
    """Tokens from 100 on are those below with an embedding a little aside."""
    from dataclasses import replace

    def embed(tokens):
        plain = decoder.embed(tokens % 100)
        aside = torch.sin(torch.arange(plain.shape[-1]) * 1.7)
        return plain + size * aside * (tokens >= 100)[..., None]

    return replace(decoder, embed=embed)


def test_integrated_gradients_of_one_step_are_eap_halfway(of_family):
    case = of_family("qwen2")
    engine = Engine(case.decoder, case.clean, case.corrupted, case.positions)
    half = (engine.corrupted[0] + engine.clean_embedding) / 2
    gradient = attribution.gradients(engine, Sum(), half)
    expected = -torch.einsum("rbtd,sbtd->rs", gradient, engine.deltas).numpy()
    found = attribution.eap_ig(engine, Sum(), steps=1)
    edges = engine.graph.full()
    assert np.allclose(found[edges], expected[edges], atol=1e-4)
    assert (found[~edges] == 0).all()


def test_integrated_gradients_add_up_to_the_whole_change(of_family):
    """Completeness: the scores of the embedding's edges alone, along the path, sum to the change
    (every path from the embedding begins with one of them).
    """
    case = of_family("llama")
    engine = Engine(case.decoder, case.clean, case.corrupted, case.positions)
    metric = Sum()
    with torch.no_grad():
        clean = float(metric(engine.logits()[None])[0])
        engine.set_mask(np.zeros_like(engine.mask))
        corrupted = float(metric(engine.logits()[None])[0])
        engine.set_mask(engine.graph.full())
    found = attribution.eap_ig(engine, metric, steps=40)
    assert found[:, 0].sum() == pytest.approx(corrupted - clean, rel=0.02, abs=0.02)


def test_hisp_is_the_size_of_output_times_gradient(of_family):
    case = of_family("gpt2")
    engine = Engine(case.decoder, case.clean, case.corrupted, case.positions)
    scores, metric = attribution.hisp(engine, Sum()), Sum()
    node = engine.graph.head(0, 2)
    output = engine.deltas[node] + engine.corrupted[node]
    step, total = 1e-2, 0.0
    with torch.no_grad():
        for prompt in range(len(case.clean)):
            values = []
            for sign in (1, -1):

                def tap(sender, delta, sign=sign, prompt=prompt):
                    place = node - sender
                    if not 0 <= place < len(delta):
                        return delta
                    delta = delta.clone()
                    delta[place, prompt] += sign * step * output[prompt]
                    return delta

                values.append(float(metric(attribution.dense(engine, tap=tap)[None])[0]))
            total += abs(values[0] - values[1]) / (2 * step)
    assert scores[node] == pytest.approx(total / len(case.clean), rel=2e-2, abs=1e-4)


def test_an_edge_between_nodes_has_the_lower_score():
    graph = Graph(2, 4, 2)
    scores = np.random.default_rng(0).random(graph.senders)
    found = attribution.edges_of_nodes(graph, scores)
    receiver, sender = graph.k(1, 1), graph.head(0, 1)
    best = max(scores[graph.head(1, 2)], scores[graph.head(1, 3)])
    assert found[receiver, sender] == min(best, scores[sender])
    assert found[graph.out, sender] == scores[sender]


def test_probing_keeps_what_the_metric_needs():
    circuit = built.build("proportion", 0, 8)
    engine = Engine(
        circuit.model.decoder(), circuit.clean, circuit.corrupted, circuit.positions,
        ablation="zero",
    )  # fmt: skip
    with torch.no_grad():
        metric = SquaredDistance(engine.logits())
    kept = attribution.probe(engine, metric, 0.05, attribution.Probe(steps=60))
    needed = circuit.true.any(axis=0)
    assert kept[torch.from_numpy(needed)].min() > kept[torch.from_numpy(~needed)].max()


# ---- areas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "area"),
    [([0, 1], 0.0), ([0, 0.5, 1], 0.25), ([0, 0.25, 1], 0.1875), ([0, 0.25, 0.5, 1], 0.3125)],
)
def test_pessimistic_areas_of_the_public_code(rates, area):
    points = [roc.Point(rate, rate) for rate in rates]
    assert roc.pessimistic_auc(points) == pytest.approx(area)
    assert roc.trapezoid_auc(points) == pytest.approx(0.5)


def test_a_perfect_circuit_has_all_of_the_area_and_a_worse_one_takes_none_away():
    assert roc.pessimistic_auc([roc.Point(0, 1)]) == 1
    assert roc.pessimistic_auc([roc.Point(0, 1), roc.Point(0.5, 0.2)]) == 1
    assert roc.pessimistic_auc([]) == 0


def test_rates_are_over_all_edges():
    edges = np.ones((2, 4), dtype=bool)
    edges[0, 3] = False
    true = np.zeros_like(edges)
    true[1, :2] = True
    found = np.zeros_like(edges)
    found[1, 1:3] = True
    assert roc.point(found, true, edges) == roc.Point(1 / 5, 1 / 2)
    assert roc.jaccard(found, true) == 1 / 3
    assert roc.jaccard(np.zeros_like(edges), np.zeros_like(edges)) == 1


# ---- built circuits ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", built.NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_finds_a_built_circuit_edge_for_edge(name, seed):
    circuit = built.build(name, seed, 12)
    decoder = circuit.model.decoder()
    assert check(decoder, circuit.clean) < 1e-5
    data = (circuit.clean, circuit.corrupted, circuit.positions)
    for policy in (Policy(), Policy("pahq-receiver", "int8")):
        engine = Engine(decoder, *data, policy, ablation="zero")
        with torch.no_grad():
            metric = SquaredDistance(Engine(decoder, *data, ablation="zero").logits())
        assert (search(engine, metric, 0.01).mask == circuit.true).all()


def test_built_circuits_do_their_task():
    circuit = built.build("induction", 0, 6)
    logits = circuit.model(circuit.clean)
    half = built.LENGTH // 2
    # the token after this one's first occurrence (the first token is its own predecessor as well)
    assert (logits[:, half + 1 : -1].argmax(-1) == circuit.clean[:, 2:half]).all()
    circuit = built.build("reverse", 0, 6)
    logits = circuit.model(circuit.clean)
    assert (logits[:, half:].argmax(-1) == circuit.clean[:, :half].flip(1)).all()
    circuit = built.build("proportion", 0, 6)
    share = (circuit.clean == 0).float().cumsum(1) / torch.arange(1, built.LENGTH + 1)
    assert torch.allclose(circuit.model(circuit.clean)[..., 0], share, atol=1e-5)


def test_as_released_only_head_zero_is_seen():
    """Edges into other heads have no effect at all; those into head 0 act on every head."""
    model = tiny()
    data = prompts()
    decoder = model.decoder()
    engine, graph = Released(decoder, *data), decoder.graph
    with torch.no_grad():
        metric = Kl(Engine(decoder, *data).logits())
        found = effects(engine, metric)
    others = [graph.q(1, h) for h in (1, 2, 3)] + [graph.k(1, h) for h in (1, 2, 3)]
    assert np.abs(found[others][:, : graph.visible[others[0]]]).max() < 1e-7
    assert np.abs(found[graph.v(1, 0), : graph.visible[graph.v(1, 0)]]).max() > 1e-5


# ---- metrics -------------------------------------------------------------------------------------


def test_kl_is_that_of_torch():
    reference, logits = torch.randn(2, 4, 3, 9).unbind()
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert torch.allclose(kl(reference, logits[None])[0], expected / 12)


def test_margins_by_hand():
    logits = torch.tensor([[[[2.0, 1.0, 0.0, 5.0]]]])
    right = torch.tensor([[[True, False, False, False]]])
    wrong = torch.tensor([[[False, True, True, False]]])
    p = logits.softmax(-1)[0, 0, 0]
    expected = {"difference": 1.5, "hardest": 1.0, "probability": float(p[0] - p[1] - p[2])}
    for kind, value in expected.items():
        metric = Margin(right, wrong, kind)
        assert float(metric(logits)[0]) == pytest.approx(-value)
        assert float(metric.accuracy(logits)[0]) == 1
