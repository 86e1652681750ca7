"""Formats, products and policies against their definitions."""

import pytest
import torch

from projects.pahq.engine import Engine
from projects.pahq.families import decoder_of
from projects.pahq.metrics import Kl
from projects.pahq.policy import Policy, Projections
from projects.pahq.quantise import FORMATS, LARGEST, LowMatrix, Rows, decode, encode, scales
from projects.pahq.search import effects, high_heads, search
from tests.projects.pahq.conftest import configuration, prompts, shaken

SHAPES = [(1, 1), (3, 5), (17, 31), (33, 8)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rounding_is_to_the_nearest_code(form, shape):
    x = normal(*shape) * 3
    scale = scales(x, form)
    codes = encode(x, scale, form)
    assert codes.abs().max() <= LARGEST[form]
    assert ((decode(codes, scale) - x).abs() <= scale / 2 * (1 + 1e-5)).all()


def test_e4m3_keeps_four_bits():
    x = normal(50, 7)
    scale = scales(x, "e4m3")
    normal_range = (x / scale).abs() > 2**-6
    error = (decode(encode(x, scale, "e4m3"), scale) - x).abs()
    assert (error[normal_range] <= 2**-4 * x.abs()[normal_range] * (1 + 1e-6)).all()


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_stay_zeros_and_large_values_stay_finite(form):
    x = torch.zeros(3, 4)
    assert (decode(Rows.of(x, form).codes, Rows.of(x, form).scale) == 0).all()
    large = torch.tensor([[1e6, -500.0]])
    codes = encode(large, torch.ones(1, 1), form).float()
    assert codes.isfinite().all()
    if form != "bf16":  # the largest codes, and no wrapping around
        assert codes.tolist() == [[LARGEST[form], -LARGEST[form]]]


@pytest.mark.parametrize(("rows", "outputs"), [(1, 1), (5, 3), (40, 24)])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scale", ["head", "channel"])
def test_a_low_product_is_that_of_the_decoded_matrices(form, scale, rows, outputs):
    weight, x = normal(2, outputs, 16), normal(rows, 16, seed=1)
    low = LowMatrix(weight, form, scale)
    row = low.rows(x)
    for pick in (0, [1, 0], None):
        chosen = weight.shape[0] if pick is None else 0
        w = (
            decode(low.codes, low.scale)
            if pick is None
            else decode(low.codes[pick], low.scale[pick])
        )
        expected = decode(row.codes, row.scale) @ w.reshape(-1, 16).T
        tolerance = 2e-2 if form == "bf16" else 1e-4
        assert torch.allclose(low.product(row, pick), expected, atol=tolerance, rtol=tolerance)
        assert chosen in (0, 2)


def test_int8_products_are_exact_integers():
    low = LowMatrix(normal(9, 64), "int8", "channel")
    row = low.rows(normal(20, 64, seed=1))
    exact = (row.codes.long() @ low.codes.long().T).double()
    assert torch.allclose(low.product(row).double(), exact * row.scale * low.scale.T, rtol=1e-6)


def test_the_e4m3_product_is_that_of_the_instruction():
    low = LowMatrix(normal(32, 48), "e4m3", "channel")
    row = low.rows(normal(16, 48, seed=1))
    one = torch.ones(())
    product = torch._scaled_mm(
        row.codes, low.codes.T, scale_a=one, scale_b=one, out_dtype=torch.float32
    )
    ours = low.product(row)
    assert (ours - product * row.scale * low.scale.T).abs().max() <= 1e-3 * ours.abs().max()


def test_scales_are_one_for_each_head_or_channel():
    weight = normal(3, 8, 16) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    by_head, by_channel = (LowMatrix(weight, "int8", kind).scale for kind in ("head", "channel"))
    assert [len(by_head[head].unique()) for head in range(3)] == [1, 1, 1]
    assert torch.allclose(by_head[:, 0, 0], weight.abs().amax((1, 2)) / 127)
    assert torch.allclose(by_channel[..., 0], weight.abs().amax(2) / 127)
    assert (LowMatrix(weight, "e4m3", "none").scale == 1).all()


# ---- policies ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request):
    model = shaken(configuration(request.param))
    return decoder_of(model), *prompts()


def inputs(decoder):
    graph = decoder.graph
    every = range(graph.heads + 2 * graph.kv_heads)
    return list(every), normal(2, 12, decoder.width), [number % 2 for number in every]


@pytest.mark.parametrize("form", FORMATS)
def test_only_the_high_head_is_exact(case, form):
    decoder = case[0]
    graph = decoder.graph
    receivers, x, which = inputs(decoder)
    exact = Projections(decoder, Policy()).qkv(1, receivers, x, which)
    low = Projections(decoder, Policy("pahq-receiver", form))
    low.select([(1, 2), (0, 1)])
    found = low.qkv(1, receivers, x, which)
    high = {receiver - graph.first_reader(1) for receiver in graph.inputs_of(graph.head(1, 2))}
    for receiver in receivers:
        difference = (found[receiver] - exact[receiver]).abs().max()
        assert (difference < 1e-5) == (receiver in high), receiver


def test_all_heads_high_is_fp32_and_so_is_a_model_of_one_head(case):
    decoder, *data = case
    graph = decoder.graph
    engine, full = Engine(decoder, *data, Policy("pahq-receiver", "int4")), Engine(decoder, *data)
    with torch.no_grad():
        assert (engine.logits() - full.logits()).abs().max() > 1e-4
        engine.select([(layer, head) for layer in range(2) for head in range(graph.heads)])
        corrupted_at_full = engine.corrupted - full.corrupted
        engine.corrupted, engine.deltas[0] = full.corrupted, full.deltas[0]
        engine._bases = full._bases
        engine._recompute()
        assert (engine.logits() - full.logits()).abs().max() < 1e-5
        assert corrupted_at_full.abs().max() > 0


def test_one_layer_of_one_head_is_searched_as_in_fp32():
    config = configuration("gpt2", layers=1, heads=1)
    decoder, data = decoder_of(shaken(config)), prompts()
    with torch.no_grad():
        metric = Kl(Engine(decoder, *data).logits())
    for form in ("bf16", "int8"):
        high = Engine(decoder, *data, Policy("pahq-receiver", form))
        high.select([(0, 0)])
        own = high.projections.qkv(0, [0, 1, 2], normal(1, 4, decoder.width), [0, 0, 0])
        full = Engine(decoder, *data).projections
        assert torch.equal(own, full.qkv(0, [0, 1, 2], normal(1, 4, decoder.width), [0, 0, 0]))
        found = effects(Engine(decoder, *data, Policy("pahq-receiver", form)), metric)
        assert abs(found[:3, 0] - effects(Engine(decoder, *data), metric)[:3, 0]).max() < 0.01


@pytest.mark.parametrize("kind", ["rtn", "pahq-receiver", "pahq-sender", "pahq-both"])
@pytest.mark.parametrize("scope", ["qkv", "attn", "linear"])
def test_trials_in_low_precision_are_whole_low_forwards(case, kind, scope):
    """What a trial computes from the receiver's layer on is what a fresh engine computes."""
    decoder, *data = case
    graph = decoder.graph
    with torch.no_grad():
        metric = Kl(Engine(decoder, *data).logits())
        policy = Policy(kind, "e4m3", scope)
        engine = Engine(decoder, *data, policy)
        for receiver, sender in ((graph.q(1, 3), 2), (graph.k(0, 1), 0), (graph.out, 1)):
            heads = [*(high_heads(graph, receiver) if policy.follows_receiver else [])]
            if policy.follows_sender and graph.head_of(sender):
                heads.append(graph.head_of(sender))
            engine.select(heads)
            trial = engine.trial(receiver, [[sender]], metric)
            fresh = Engine(decoder, *data, policy)
            fresh.projections.select(heads)
            mask = graph.full()
            mask[receiver, sender] = False
            fresh.set_mask(mask)
            assert abs(float(metric(fresh.logits()[None])[0] - trial.metric[0])) < 1e-5


def test_the_head_under_test_is_the_receivers_owner(case):
    decoder = case[0]
    graph = decoder.graph
    assert high_heads(graph, graph.q(1, 2)) == [(1, 2)]
    assert high_heads(graph, graph.out) == high_heads(graph, graph.mlp_receiver(0)) == []
    group = high_heads(graph, graph.v(0, 1))
    assert group == [(0, h) for h in range(graph.group, 2 * graph.group)]


def test_the_floor_is_what_low_precision_costs_the_whole_graph(case):
    decoder, *data = case
    with torch.no_grad():
        full = Engine(decoder, *data).logits()
        low = Engine(decoder, *data, Policy("rtn", "int4")).logits()
    metric = Kl(full)
    assert search(Engine(decoder, *data), metric, 1.0).floor == pytest.approx(0, abs=1e-6)
    found = search(Engine(decoder, *data, Policy("pahq-receiver", "int4")), metric, 1.0)
    assert found.floor == pytest.approx(float(metric(low[None])[0]), abs=1e-6) != 0


def test_weights_are_counted_by_format(case):
    decoder = case[0]
    graph = decoder.graph
    qkv = graph.layers * (graph.heads + 2 * graph.kv_heads) * decoder.layers[0].qkv[0].numel()
    plain = Projections(decoder, Policy()).weight_bytes()
    low = Projections(decoder, Policy("rtn", "int8")).weight_bytes()
    assert plain["low"] == 0
    assert low["low"] == qkv
    assert low["fp32"] == plain["fp32"] - 4 * qkv
    assert Projections(decoder, Policy("rtn", "int4")).weight_bytes()["low"] == qkv // 2
    assert Projections(decoder, Policy("rtn", "int8", "linear")).weight_bytes()["fp32"] == 0
