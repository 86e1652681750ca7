"""ZO2 is MeZO: the oracles that hold for the engine as a whole, on every family of models."""

import contextlib
import copy
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from projects.zo2 import ZO2

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    ),
]


# ---- bit for bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_thirty_steps_equal_mezo_to_the_last_bit(case, helpers, device):
    engine = helpers.make_engine(case, device=device)
    found = helpers.run_engine(engine, case, device=device)
    state = engine.state_dict()
    order = engine.parameter_order()
    if case.order is not None:
        assert order == case.order(3)
    wanted = helpers.run_mezo(case, order=order, device=device)
    assert found == wanted.found
    assert helpers.differing(state, {n: wanted.state[n] for n in state}) == []
    assert (
        helpers.differing(
            {n: t.cpu() for n, t in engine.unwrap().state_dict().items()}, wanted.state
        )
        == []
    )


@pytest.mark.parametrize("case", ["opt-tied", "opt-untied", "llama-tied", "plain"], indirect=True)
def test_fresh_noise_order_is_the_execution_order_and_not_the_registration_order(case, helpers):
    engine = helpers.make_engine(case)
    assert engine.parameter_order() == []
    helpers.run_engine(engine, case, 1)
    assert engine.parameter_order() == case.order(3)
    registered = [n for n, _ in case.make().named_parameters()]
    assert sorted(engine.parameter_order()) == sorted(registered)


def _variants():
    """Every depth, slot count, overlap and tier; the switches that should not matter take turns."""
    switches = itertools.cycle(itertools.product([True, False], repeat=4))
    for depth, slots, overlap, tier in itertools.product(
        [1, 2, 3], [1, 2, 3, 5], [True, False], ["ram", "disk"]
    ):
        cache_noise, reuse, bucket, drop_cache = next(switches)
        drop_cache = drop_cache and tier == "disk" and slots in (1, 3)
        yield depth, slots, overlap, tier, cache_noise, reuse, bucket, drop_cache


@pytest.mark.parametrize(
    ("depth", "slots", "overlap", "tier", "cache_noise", "reuse", "bucket", "drop_cache"),
    list(_variants()),
)
def test_how_blocks_travel_changes_no_bit(
    depth,
    slots,
    overlap,
    tier,
    cache_noise,
    reuse,
    bucket,
    drop_cache,
    plain,
    plain_reference,
    helpers,
    tmp_path,
):
    switches = {
        "cache_noise": cache_noise,
        "reuse": reuse,
        "bucket": bucket,
        "drop_cache": drop_cache,
    }
    storage = "ram" if tier == "ram" else tmp_path / "blocks.safetensors"
    got = helpers.run_zo2(
        plain, depth=depth, slots=slots, overlap=overlap, storage=storage, **switches
    )
    helpers.assert_same(got, plain_reference(depth))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("cache_noise", [True, False])
def test_blocks_that_stay_change_no_bit(depth, cache_noise, plain, plain_reference, helpers):
    helpers.assert_same(
        helpers.run_zo2(plain, depth=depth, storage=None, cache_noise=cache_noise),
        plain_reference(depth),
    )


@pytest.mark.parametrize("case", ["opt-tied", "llama-tied", "timm-vit"], indirect=True)
@pytest.mark.parametrize(
    "switches",
    [
        {"cache_noise": False, "slots": 2},
        {"overlap": False, "slots": 1},
        {"reuse": False, "bucket": False},
    ],
)
def test_tied_and_root_parameters_do_not_depend_on_how_blocks_travel(case, switches, helpers):
    helpers.assert_same(
        helpers.run_zo2(case, 8, **switches), helpers.run_zo2(case, 8, storage=None)
    )


def test_the_weights_are_one_step_old_until_the_flush(plain, plain_reference, helpers):
    engine = helpers.make_engine(plain)
    helpers.run_engine(engine, plain)
    away = {
        n: p.detach().clone()
        for n, p in engine.model.named_parameters()
        if not n.startswith("blocks")
    }
    wanted = plain_reference().state
    assert all(not torch.equal(away[n], wanted[n]) for n in away)
    engine.flush()
    now = {n: p.detach() for n, p in engine.model.named_parameters() if not n.startswith("blocks")}
    assert helpers.differing(now, {n: wanted[n] for n in now}) == []
    assert helpers.differing(engine.state_dict(), wanted) == []


def test_flushing_at_any_time_changes_no_bit(plain, plain_reference, helpers):
    engine = helpers.make_engine(plain)
    found = []
    for t in range(30):
        found += helpers.run_engine(engine, plain, 1, first=t)
        if t % 4 == 1:
            engine.flush()
            engine.flush()
        if t % 5 == 2:
            assert engine.evaluate(helpers.batch_of(plain, 1)) == engine.evaluate(
                helpers.batch_of(plain, 1)
            )
    assert found == plain_reference().found
    assert helpers.differing(engine.state_dict(), plain_reference().state) == []


def test_blocks_of_two_containers_with_different_shapes(helpers):
    class Two(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.last = nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 3))
            self.first = nn.ModuleList([nn.Linear(5, 5, bias=i % 2 == 0) for i in range(depth)])

        def forward(self, x):
            for layer in self.first:
                x = torch.tanh(layer(x))
            return self.last(x)

    case = helpers.Case("two", Two, helpers.CASES["plain"].batches, helpers.class_loss)
    order = ["first.0.weight", "first.0.bias", "first.1.weight", "first.2.weight", "first.2.bias"]
    order += ["last.0.weight", "last.0.bias", "last.2.weight", "last.2.bias"]
    wanted = helpers.run_mezo(case, order=order)
    for blocks in (["first", "last"], ["last", "first"], ["first"], None):
        helpers.assert_same(helpers.run_zo2(case, blocks=blocks), wanted)


# ---- what a step may contain ---------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "opt-tied"], indirect=True)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_micro_batches_are_averaged_under_one_direction(case, count, helpers):
    def batch(step):
        return [helpers.batch_of(case, step + i) for i in range(count)]

    engine = helpers.make_engine(case)
    found = helpers.run_engine(engine, case, 8, batch=batch)
    assert max(engine.traffic.offloads.values()) == 8, (
        "a block travels once, however many micro-batches there are"
    )
    wanted = helpers.run_mezo(case, 8, order=case.order(3), batch=batch)
    assert found == wanted.found
    assert helpers.differing(engine.unwrap().state_dict(), wanted.state) == []


def test_a_gradient_of_zero_still_decays(plain, helpers):
    case = helpers.Case(
        "constant",
        plain.build,
        plain.batches,
        lambda model, batch: helpers.class_loss(model, batch) * 0,
        plain.order,
    )
    wanted = helpers.run_mezo(case, 5)
    got = helpers.run_zo2(case, 5)
    assert got.found == wanted.found == [(0.0, 0.0)] * 5
    assert helpers.differing(got.state, wanted.state) == []
    before = plain.make().state_dict()
    shrunk = before["blocks.0.up.weight"].double() * np.prod(
        [1 - helpers.falling(t) * 0.1 for t in range(5)]
    )
    torch.testing.assert_close(
        got.state["blocks.0.up.weight"].double(), shrunk, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        got.state["blocks.0.up.bias"], before["blocks.0.up.bias"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("case", ["plain", "llama-tied"], indirect=True)
def test_frozen_parameters_draw_no_noise(case, helpers):
    def model():
        made = case.make()
        for index, (_, parameter) in enumerate(made.named_parameters()):
            parameter.requires_grad_(index % 3 != 0)
        return made

    frozen = {n for n, p in model().named_parameters() if not p.requires_grad}
    wanted = helpers.run_mezo(
        case, model=model(), order=[n for n in case.order(3) if n not in frozen]
    )
    got = helpers.run_zo2(case, model=model())
    helpers.assert_same(got, wanted)
    assert (
        helpers.differing(
            {n: got.state[n] for n in frozen},
            {n: t for n, t in case.make().state_dict().items() if n in frozen},
        )
        == []
    )


def test_a_frozen_block_never_travels_back(helpers):
    from transformers import OPTForCausalLM

    case = helpers.CASES["opt-tied"]
    model = case.make()
    assert isinstance(model, OPTForCausalLM)
    model.model.decoder.layers[1].requires_grad_(False)
    order = [n for n in case.order(3) if ".layers.1." not in n]
    engine = helpers.make_engine(case, model=model)
    found = helpers.run_engine(engine, case, 6)
    assert engine.traffic.offloads == {0: 6, 2: 6}
    frozen = case.make()
    frozen.model.decoder.layers[1].requires_grad_(False)
    wanted = helpers.run_mezo(case, 6, model=frozen, order=order)
    assert found == wanted.found
    assert helpers.differing(engine.unwrap().state_dict(), wanted.state) == []


def test_with_all_blocks_frozen_no_byte_goes_down(helpers):
    case = helpers.CASES["llama-tied"]
    model = case.make()
    model.model.layers.requires_grad_(False)
    engine = helpers.make_engine(case, model=model)
    helpers.run_engine(engine, case, 5)
    assert engine.traffic.bytes_down == 0
    assert engine.parameter_order() == ["model.embed_tokens.weight", "model.norm.weight"]


def test_lora_through_peft(helpers):
    peft = pytest.importorskip("peft")
    case = helpers.CASES["llama-tied"]

    def model():
        torch.manual_seed(3)
        return peft.get_peft_model(
            case.make(),
            peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )

    order = [
        f"base_model.model.model.layers.{i}.self_attn.{m}_proj.lora_{half}.default.weight"
        for i in range(3)
        for m in "qv"
        for half in "AB"
    ]
    wanted = helpers.run_mezo(case, 10, model=model(), order=order)
    engine = helpers.make_engine(case, model=model())
    found = helpers.run_engine(engine, case, 10)
    assert engine.parameter_order() == order
    assert found == wanted.found
    adapters = 3 * 2 * (3 * 24 + 3 * 24) - 3 * (3 * 12)  # v_proj has half the outputs
    # Every tensor takes a multiple of 64 bytes in the buffer.
    assert 4 * adapters * 10 <= engine.traffic.bytes_down <= (4 * adapters + 64 * 12) * 10
    assert helpers.differing(engine.unwrap().state_dict(), wanted.state) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("switches", [{}, {"cache_noise": False}, {"storage": None}])
def test_any_working_dtype_equals_mezo(dtype, switches, plain, helpers):
    def batch(step):
        x, y = helpers.batch_of(plain, step)
        return x.to(dtype), y

    wanted = helpers.run_mezo(plain, 12, model=plain.make().to(dtype), batch=batch)
    got = helpers.run_zo2(plain, 12, model=plain.make().to(dtype), batch=batch, **switches)
    assert got.found == wanted.found
    assert helpers.differing(got.state, wanted.state) == []


@pytest.mark.parametrize("case", ["plain", "opt-tied", "llama-tied"], indirect=True)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast_does_not_serve_one_forwards_weights_to_the_other(case, where, helpers):
    def loss(model, batch):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16)
            if where == "inside"
            else contextlib.nullcontext()
        ):
            return case.loss(model, batch).float()

    mixed = helpers.Case("mixed", case.build, case.batches, loss, case.order)
    with torch.autocast(
        "cpu", dtype=torch.bfloat16, enabled=where == "outside", cache_enabled=False
    ):
        wanted = helpers.run_mezo(mixed, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "outside"):
        got = helpers.run_zo2(mixed, 10)
        assert torch.is_autocast_cache_enabled()
    assert got.found == wanted.found
    assert len({g for _, g in got.found}) == 10
    assert helpers.differing(got.state, wanted.state) == []
    full = helpers.run_mezo(case, 10)
    assert got.found != full.found, "the loss was not computed in bfloat16"


def test_dropout_is_off_even_for_a_model_in_training_mode(plain, plain_reference, helpers):
    engine = helpers.make_engine(plain, model=plain.make().train())
    assert not any(module.training for module in engine.model.modules())
    found = []
    for t in range(30):
        engine.model.train()  # as a training loop may
        found += helpers.run_engine(engine, plain, 1, first=t)
        if t % 7 == 3:
            engine.model.train()
            assert engine.evaluate(helpers.batch_of(plain, 0)) == engine.evaluate(
                helpers.batch_of(plain, 0)
            )
    assert found == plain_reference().found
    assert helpers.differing(engine.unwrap().state_dict(), plain_reference().state) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", ["plain", "opt-tied"], indirect=True)
def test_a_loss_that_is_not_finite_leaves_no_update(bad, case, helpers):
    number = itertools.count()

    def loss(model, batch):
        found = case.loss(model, batch)
        return found * bad if next(number) in (4, 5, 9) else found

    broken = helpers.Case("broken", case.build, case.batches, loss, case.order)
    wanted = helpers.run_mezo(broken, 7)
    number = itertools.count()
    engine = helpers.make_engine(broken)
    results = [engine.step(helpers.batch_of(case, t), seed=helpers.seed_of(t)) for t in range(7)]
    assert [r.skipped for r in results] == [False, False, True, False, True, False, False]
    assert repr([(r.loss, r.projected_gradient) for r in results]) == repr(wanted.found)
    assert helpers.differing(engine.unwrap().state_dict(), wanted.state) == []


def test_a_pending_update_uses_the_learning_rate_of_its_own_step(plain, helpers):
    rates = [1e-3, 0.0, 5e-3, 0.0]
    got = helpers.run_zo2(plain, 4, lr=lambda t: rates[t])
    helpers.assert_same(got, helpers.run_mezo(plain, 4, lr=lambda t: rates[t]))
    engine = helpers.make_engine(plain, lr=77.0)
    for t in range(4):
        assert (
            engine.step(helpers.batch_of(plain, t), seed=helpers.seed_of(t), lr=rates[t]).lr
            == rates[t]
        )
    assert helpers.differing(engine.unwrap().state_dict(), got.state) == []


def test_seed_zero_is_a_seed_like_any_other(plain, helpers):
    batch = helpers.batch_of(plain, 0)
    found = {
        seed: helpers.make_engine(plain, seed=5).step(batch, seed=seed) for seed in (0, 1, None)
    }
    assert found[0].seed == 0
    assert len({f.projected_gradient for f in found.values()}) == 3
    assert (
        helpers.make_engine(plain, seed=9).step(batch, seed=0).projected_gradient
        == found[0].projected_gradient
    )
    assert (
        helpers.make_engine(plain, seed=0).step(batch).seed
        != helpers.make_engine(plain, seed=1).step(batch).seed
    )


# ---- the fresh probe -----------------------------------------------------------------------------


def _naive_fresh(case, helpers, steps):
    """theta +- eps z formed beside theta, everything drawn at once: shares nothing with the engine
    but the order of the parameters.
    """
    model = case.make()
    named = dict(model.named_parameters())
    theta = {name: named[name].detach().clone() for name in case.order(3)}
    found = []

    def noise(seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.normal(0.0, 1.0, t.shape, generator=generator) for name, t in theta.items()
        }

    for t in range(steps):
        z = noise(helpers.seed_of(t))
        losses = []
        for sign in (1, -1):
            for name, value in theta.items():
                moved = value + sign * (z[name] * 1e-3)
                # the layout is visible in a product's last bit
                named[name].data = moved.contiguous() if "." in name else moved
            with torch.no_grad():
                losses.append(case.loss(model, helpers.batch_of(case, t)))
        g = ((losses[0] - losses[1]) / (2 * 1e-3)).item()
        found.append((losses[0].item(), g))
        for name, value in theta.items():
            decays = not any(part in name for part in ("bias", "layer_norm", "layernorm"))
            step = g * z[name] + 0.1 * value if decays else g * z[name]
            theta[name] = value - helpers.falling(t) * step
    return found, theta


@pytest.mark.parametrize("case", ["plain", "opt-tied", "opt-untied", "llama-tied"], indirect=True)
@pytest.mark.parametrize(
    "switches", [{}, {"cache_noise": False}, {"storage": None}, {"overlap": False, "slots": 1}]
)
def test_the_fresh_probe_equals_its_naive_form(case, switches, helpers):
    found, theta = _naive_fresh(case, helpers, 30)
    engine = helpers.make_engine(case, probe="fresh", **switches)
    assert helpers.run_engine(engine, case) == found
    state = {n: p for n, p in engine.state_dict().items() if n in theta}
    assert helpers.differing(state, theta) == []


@pytest.mark.parametrize("case", ["plain", "opt-tied"], indirect=True)
def test_fresh_does_not_drift_and_inplace_does(case, helpers):
    before = dict(case.make().named_parameters())
    for probe in ("fresh", "inplace"):
        engine = helpers.make_engine(case, probe=probe, lr=0.0)
        helpers.run_engine(engine, case, 100)
        after = {n: t for n, t in engine.state_dict().items() if n in before}
        changed = helpers.differing(after, {n: p.detach() for n, p in before.items()})
        assert changed == [] if probe == "fresh" else len(changed) > len(before) / 2


# ---- it is a gradient ----------------------------------------------------------------------------


def _in_double(case, batch):
    """The batch and a loss that nowhere leaves float64 (transformers' own rounds the logits to
    float32).
    """
    if isinstance(batch, dict):
        flat = batch["labels"][:, 1:].reshape(-1)
        return batch, lambda model, b: nn.functional.cross_entropy(
            model(b["input_ids"]).logits[:, :-1].reshape(len(flat), -1), flat
        )
    return (batch[0].double(), batch[1]), lambda model, b: nn.functional.cross_entropy(
        model(b[0]), b[1]
    )


@pytest.mark.parametrize("case", ["plain", "opt-tied", "gpt2", "timm-vit"], indirect=True)
@pytest.mark.parametrize("probe", ["inplace", "fresh"])
def test_g_is_the_directional_derivative(case, probe, helpers):
    batch, loss = _in_double(case, helpers.batch_of(case, 0))
    model = case.make().double()
    loss(model, batch).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    engine = helpers.make_engine(case, model=case.make().double(), eps=1e-7, probe=probe, loss=loss)
    for seed in range(3):
        g = engine.step(batch, seed=seed, lr=0.0).projected_gradient
        generator = torch.Generator().manual_seed(seed)
        along = 0.0
        for name in engine.parameter_order():
            z = torch.normal(
                0.0, 1.0, gradients[name].shape, generator=generator, dtype=torch.float64
            )
            along += (gradients[name] * z).sum().item()
        assert g == pytest.approx(along, rel=1e-6, abs=1e-8)


def test_g_times_z_averages_to_the_gradient(plain, helpers):
    batch, loss = _in_double(plain, helpers.batch_of(plain, 0))
    model = plain.make(1).double()
    loss(model, batch).backward()
    gradient = torch.cat(
        [dict(model.named_parameters())[n].grad.reshape(-1) for n in plain.order(1)]
    )
    engine = helpers.make_engine(
        plain, model=plain.make(1).double(), storage=None, lr=0.0, weight_decay=0.0, loss=loss
    )
    total, count = torch.zeros_like(gradient), 1500
    for seed in range(count):
        g = engine.step(batch, seed=seed).projected_gradient
        generator = torch.Generator().manual_seed(seed)
        shapes = [dict(model.named_parameters())[n].shape for n in plain.order(1)]
        total += g * torch.cat(
            [
                torch.normal(0.0, 1.0, s, generator=generator, dtype=torch.float64).reshape(-1)
                for s in shapes
            ]
        )
    cosine = torch.nn.functional.cosine_similarity(total, gradient, dim=0).item()
    # noise of variance |grad|^2 in each direction, over `count` draws
    expected = (1 + gradient.numel() / count) ** -0.5
    assert cosine == pytest.approx(expected, abs=0.05)


# ---- what travels --------------------------------------------------------------------------------


def _self_io():
    with open("/proc/self/io") as file:
        return {key: int(value) for key, value in (line.split(":") for line in file)}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("overlap", [True, False])
def test_each_block_travels_once_up_and_once_down_a_step(depth, slots, overlap, plain, helpers):
    engine = helpers.make_engine(plain, depth=depth, slots=slots, overlap=overlap)
    steps = 9
    helpers.run_engine(engine, plain, steps)
    traffic = engine.traffic
    assert [traffic.offloads[b] for b in range(depth)] == [steps] * depth
    ahead = [
        traffic.uploads[b] - (steps if depth > slots or not overlap else traffic.uploads[b])
        for b in range(depth)
    ]
    assert all(a in (0, 1) for a in ahead), (
        "only blocks of the next step may have been brought ahead"
    )
    assert sum(traffic.uploads.values()) - depth * steps in range(slots + 1)
    assert engine.host_nbytes * steps == traffic.bytes_down
    sizes = [layout.nbytes for layout in engine._placement.layouts]
    assert traffic.bytes_up == sum(sizes[b] * n for b, n in traffic.uploads.items())


@pytest.mark.parametrize("overlap", [True, False])
def test_the_file_is_read_and_written_exactly_once_a_step(overlap, plain, helpers, tmp_path):
    engine = helpers.make_engine(plain, storage=tmp_path / "w.safetensors", overlap=overlap)
    helpers.run_engine(engine, plain, 3)
    before, counted = _self_io(), copy.deepcopy(engine.traffic)
    calls = [_self_io() for _ in range(2)]
    own = calls[1]["rchar"] - calls[0]["rchar"]  # what looking costs
    start = _self_io()
    helpers.run_engine(engine, plain, 10, first=3)
    traffic = engine.traffic
    end = _self_io()
    assert before["rchar"] <= start["rchar"]
    block_bytes = sum(
        t.numel() * t.element_size()
        for n, t in plain.make().state_dict().items()
        if n.startswith("blocks.")
    )
    assert traffic.bytes_up - counted.bytes_up == 10 * block_bytes
    assert traffic.bytes_down - counted.bytes_down == 10 * block_bytes
    assert end["rchar"] - start["rchar"] - own == 10 * block_bytes
    assert end["wchar"] - start["wchar"] == 10 * block_bytes


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_blocks_only_ever_stand_in_the_slots(slots, helpers):
    case = helpers.CASES["opt-tied"]
    engine = helpers.make_engine(case, depth=6, slots=slots)
    seen = set()
    for block in engine.model.model.decoder.layers:
        block.register_forward_pre_hook(
            lambda module, _: seen.add(module.self_attn.k_proj.weight.untyped_storage().data_ptr())
        )
    helpers.run_engine(engine, case, 5)
    engine.evaluate(helpers.batch_of(case, 0))
    assert seen <= engine.slot_pointers
    assert len(engine.slot_pointers) == slots


def test_without_reuse_every_visit_allocates(helpers, monkeypatch):
    from projects.zo2.lanes import Pager

    counts = {}
    for reuse in (True, False):
        made = []
        allocate = Pager._allocate
        monkeypatch.setattr(
            Pager,
            "_allocate",
            lambda self, allocate=allocate, made=made: made.append(1) or allocate(self),
        )
        engine = helpers.make_engine(helpers.CASES["plain"], reuse=reuse)
        helpers.run_engine(engine, helpers.CASES["plain"], 5)
        uploads = sum(engine.traffic.uploads.values())  # once the lanes have come to rest
        counts[reuse] = len(made)
        assert counts[reuse] == (3 if reuse else uploads)
        monkeypatch.undo()
    assert counts[False] >= 15


# ---- random numbers of others --------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["inplace", "fresh"])
@pytest.mark.parametrize("case", ["plain", "opt-tied"], indirect=True)
def test_nobody_elses_random_numbers_are_touched(case, probe, helpers):
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002
    random.seed(4)

    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002
        cuda = (
            [s.tolist() for s in torch.cuda.get_rng_state_all()]
            if torch.cuda.is_available()
            else []
        )
        return (
            torch.get_rng_state().tolist(),
            cuda,
            numpy_state[1].tolist(),
            numpy_state[2],
            random.getstate(),
        )

    model = case.make()
    before = states()
    engine = helpers.make_engine(
        case, model=model, probe=probe, storage_dtype=torch.bfloat16, rounding="stochastic"
    )
    helpers.run_engine(engine, case, 4)
    engine.step(helpers.batch_of(case, 0))
    engine.evaluate(helpers.batch_of(case, 0))
    engine.unwrap()
    assert states() == before


def test_two_engines_side_by_side_do_not_disturb_each_other(plain, plain_reference, helpers):
    other = helpers.CASES["opt-tied"]
    a, b = helpers.make_engine(plain), helpers.make_engine(other)
    found_a, found_b = [], []
    for t in range(30):
        found_a += helpers.run_engine(a, plain, 1, first=t)
        torch.randn(3)
        found_b += helpers.run_engine(b, other, 1, first=t)
    assert found_a == plain_reference().found
    assert found_b == helpers.run_mezo(other).found
    assert helpers.differing(a.unwrap().state_dict(), plain_reference().state) == []


# ---- low-bit storage -----------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_storage_in_the_working_dtype_is_exact(
    rounding, tier, plain, plain_reference, helpers, tmp_path
):
    storage = "ram" if tier == "ram" else tmp_path / "w.safetensors"
    got = helpers.run_zo2(plain, storage=storage, storage_dtype=torch.float32, rounding=rounding)
    helpers.assert_same(got, plain_reference())


LOW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_low_bit_storage_errs_by_half_an_ulp_a_visit(dtype, tier, plain, helpers, tmp_path):
    storage = "ram" if tier == "ram" else tmp_path / "w.safetensors"
    before = plain.make().state_dict()
    engine = helpers.make_engine(plain, storage=storage, storage_dtype=dtype, probe="fresh", lr=0.0)
    steps = 4
    helpers.run_engine(engine, plain, steps)
    sent = engine.traffic.bytes_down
    after = engine.state_dict()
    relative, absolute = (
        torch.finfo(dtype).eps / 2,
        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2,
    )
    for name in (n for n in before if n.startswith("blocks.") and before[n].is_floating_point()):
        error = (after[name] - before[name]).abs()
        assert (error <= relative * before[name].abs() + absolute).all(), (
            "rounding what is already rounded changes nothing"
        )
        assert torch.equal(after[name], before[name].to(dtype).float())
    assert torch.equal(after["blocks.0.calls"], torch.tensor(2 * steps))
    full = sum(
        t.numel() * 4
        for n, t in before.items()
        if n.startswith("blocks.") and t.is_floating_point()
    )
    if tier == "disk":
        assert sent == steps * (full // 4 * dtype.itemsize + 3 * 8)


@pytest.mark.parametrize("dtype", LOW)
def test_a_low_bit_run_stays_within_half_an_ulp_a_step_of_the_exact_one(dtype, plain, helpers):
    options = {"probe": "fresh", "lr": 1e-3, "weight_decay": 0.0}
    steps = 5
    low = helpers.make_engine(plain, storage_dtype=dtype, **options)
    start = low.state_dict()
    sent = []
    for t in range(steps):
        low.step(helpers.batch_of(plain, t), seed=t)
        sent.append(low._perturbation.pending)
    z = {}
    exact = {n: p.double() for n, p in start.items()}
    for pending in sent:
        generator = torch.Generator().manual_seed(pending.seed)
        for name in plain.order(3):
            z[name] = torch.normal(0.0, 1.0, exact[name].shape, generator=generator).double()
            exact[name] -= pending.lr * pending.g * z[name]
    after = low.state_dict()
    for name in (n for n in plain.order(3) if n.startswith("blocks.")):
        largest = torch.maximum(exact[name].abs(), start[name].abs()) + 0.05
        bound = (steps + 1) * torch.finfo(dtype).eps / 2 * largest + (steps + 1) * torch.finfo(
            dtype
        ).smallest_normal
        assert ((after[name].double() - exact[name]).abs() <= 2 * bound).all()


def test_rounding_to_nearest_loses_small_updates_and_stochastic_rounding_keeps_them(plain, helpers):
    """A pull of 1e-4 of a step (ulp of bfloat16 at 1: 7.8e-3) on gains of 1, by weight
    decay alone.
    """
    case = helpers.Case(
        "decay",
        plain.build,
        plain.batches,
        lambda model, batch: helpers.class_loss(model, batch) * 0,
        plain.order,
    )
    steps, width = 60, 7
    moved = {}
    for rounding in ("nearest", "stochastic"):
        engine = helpers.make_engine(
            case,
            storage_dtype=torch.bfloat16,
            rounding=rounding,
            probe="fresh",
            lr=1e-3,
            weight_decay=1.0,
            no_decay=(),
            seed=3,
        )
        weights = [f"blocks.{i}.norm.weight" for i in range(3)]
        helpers.run_engine(engine, case, steps)
        state = engine.state_dict()
        moved[rounding] = 1 - torch.cat([state[n] for n in weights]).double()
    assert (moved["nearest"] == 0).all()
    wanted = 1 - (1 - 1e-3) ** steps
    spread = (steps * 1e-3 * 2**-8 / (3 * width)) ** 0.5
    assert moved["stochastic"].mean().item() == pytest.approx(wanted, abs=5 * spread)


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_does_not_depend_on_the_overlap(dtype, plain, helpers):
    options = {"storage_dtype": dtype, "rounding": "stochastic"}
    first = helpers.run_zo2(plain, 8, **options)
    for switches in ({}, {"overlap": False}, {"slots": 1}, {"slots": 5}, {"bucket": False}):
        again = helpers.run_zo2(plain, 8, **options, **switches)
        assert again.found == first.found
        assert helpers.differing(again.state, first.state) == []
    assert helpers.run_zo2(plain, 8, seed=1, **options).found != first.found, (
        "its seed is the engine's"
    )


def test_a_model_may_be_trained_by_one_engine_after_another(plain, plain_reference, helpers):
    model = plain.make()
    found = []
    for first in (0, 11, 12, 25):
        engine = ZO2(
            model,
            lr=lambda t, first=first: helpers.falling(t + first),
            weight_decay=0.1,
            loss=plain.loss,
        )
        found += helpers.run_engine(
            engine, plain, {0: 11, 11: 1, 12: 13, 25: 5}[first], first=first
        )
        model = engine.unwrap()
    assert found == plain_reference().found
    assert helpers.differing(model.state_dict(), plain_reference().state) == []
