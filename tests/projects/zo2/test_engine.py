"""The engine beside the arithmetic: faults inside a step, replay, saving, models that never were in
memory, what is refused.
"""

import contextvars
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from projects.zo2 import ZO2
from projects.zo2.lanes import Pager
from projects.zo2.noise import Noise
from projects.zo2.placement import Placement
from projects.zo2.storage import RamStore
from shared.errors import UserError


def _current(engine):
    return {name: tensor.detach().clone() for name, tensor in engine.tensors()}


# ---- faults inside a step ------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "opt-tied", "timm-vit"], indirect=True)
@pytest.mark.parametrize("probe", ["inplace", "fresh"])
@pytest.mark.parametrize("options", [{}, {"overlap": False, "slots": 1, "cache_noise": False}])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_wherever_a_step_breaks_off_the_weights_are_those_before_it(
    case, probe, options, error, helpers, interrupting
):
    """The step is broken off at every call of every module, in every one of its forwards; all in
    one life of the engine.
    """
    engine = helpers.make_engine(case, probe=probe, **options)
    with interrupting(engine.model, -1, error) as calls:
        engine.step(helpers.batch_of(case, 0), seed=0, lr=1e-5)
    stride = 1 if case.name == "plain" else 17  # the families have hundreds of calls
    for at in range(0, len(calls), stride):
        before = _current(engine)
        engine.step(helpers.batch_of(case, 1), seed=at, lr=1e-5)
        wanted = _updated(before, engine)
        with interrupting(engine.model, at, error), pytest.raises(error, match="deliberate"):
            engine.step(helpers.batch_of(case, 2), seed=at + 1)
        after = _current(engine)
        for name in (n for n in wanted if not n.endswith("calls")):
            if probe == "fresh":
                assert torch.equal(after[name], wanted[name]), (at, name)
            else:
                torch.testing.assert_close(after[name], wanted[name], rtol=2e-5, atol=2e-6)
    found = engine.step(helpers.batch_of(case, 0), seed=1)
    assert found.projected_gradient != 0
    assert engine.evaluate(helpers.batch_of(case, 0)) == engine.evaluate(helpers.batch_of(case, 0))


def _updated(before, engine):
    """The weights with the engine's pending update applied, by formula."""
    pending = engine._perturbation.pending
    generator = torch.Generator().manual_seed(pending.seed)
    state = dict(before)
    for name in engine.parameter_order():
        theta = before[name]
        z = torch.normal(0.0, 1.0, theta.shape, generator=generator)
        if any(part in name for part in engine.options.no_decay):
            state[name] = theta - pending.lr * (pending.g * z)
        else:
            state[name] = theta - pending.lr * (pending.g * z + 0.1 * theta)
    return state


def test_an_interrupted_run_goes_on_as_if_the_step_had_not_been_tried(plain, helpers, interrupting):
    """With the fresh probe to the last bit; the counter in the blocks is the only witness."""
    engine, other = (helpers.make_engine(plain, probe="fresh") for _ in range(2))
    for t in range(6):
        with interrupting(engine.model, 5 * t, ZeroDivisionError), pytest.raises(ZeroDivisionError):
            engine.step(helpers.batch_of(plain, 0), seed=99)
        assert engine.steps == t
        assert helpers.run_engine(engine, plain, 1, first=t) == helpers.run_engine(
            other, plain, 1, first=t
        )
    states = [
        {n: s for n, s in e.state_dict().items() if not n.endswith("calls")}
        for e in (engine, other)
    ]
    assert helpers.differing(*states) == []


def test_an_exception_in_the_loss_after_the_model(plain, helpers):
    armed = False

    def loss(model, batch):
        found = plain.loss(model, batch)
        if armed:
            raise LookupError("no label")
        return found

    engine = helpers.make_engine(plain, loss=loss, probe="fresh")
    helpers.run_engine(engine, plain, 3)
    before = engine.state_dict()
    armed = True
    with pytest.raises(LookupError, match="no label"):
        helpers.run_engine(engine, plain, 1)
    with pytest.raises(LookupError, match="no label"):
        engine.evaluate(helpers.batch_of(plain, 0))
    armed = False
    after = engine.state_dict()
    assert [n for n in helpers.differing(after, before) if not n.endswith("calls")] == []


@pytest.mark.parametrize("overlap", [True, False])
def test_a_file_cut_short_in_mid_run_never_puts_one_block_in_the_place_of_another(
    overlap, plain, helpers, tmp_path
):
    path = tmp_path / "w.safetensors"
    engine = helpers.make_engine(plain, storage=path, overlap=overlap, slots=1)
    helpers.run_engine(engine, plain, 2)
    engine.flush()
    engine._placement.pager.drop()
    before = load_file(path)
    kept = path.read_bytes()
    os.truncate(path, len(kept) - 500)  # the last block's end
    for _ in range(3):
        with pytest.raises(
            (OSError, UserError),
            match=r"truncated while in use|interrupted while it changed weights",
        ):
            helpers.run_engine(engine, plain, 1)
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(kept[file.tell() :])
    after = load_file(path)
    for name in (n for n in before if n.startswith("blocks.") and before[n].is_floating_point()):
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-5)


def test_a_model_whose_blocks_are_away_refuses_to_be_called(plain, helpers):
    engine = helpers.make_engine(plain)
    helpers.run_engine(engine, plain, 1)
    with pytest.raises(UserError, match=r"blocks are away: call it through engine.step"):
        engine.model(helpers.batch_of(plain, 0)[0])
    with torch.no_grad():
        logits = engine.forward(lambda model: model(helpers.batch_of(plain, 0)[0]))
    model = engine.unwrap()
    with torch.no_grad():
        assert torch.equal(model(helpers.batch_of(plain, 0)[0]), logits)


# ---- what is refused -----------------------------------------------------------------------------


class _Chooses(nn.Module):
    """Takes one of two blocks, by the sign of its input's sum, or both."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x, which):
        x = self.first(x)
        for index in which(x):
            x = self.blocks[index](x)
        return x.square().mean()


def _choosing(which, **options):
    torch.manual_seed(0)
    return ZO2(_Chooses(), loss=lambda model, b: model(b, which), lr=1e-2, **options)


def test_forwards_that_take_different_paths_are_refused():
    calls = []

    def which(x):
        calls.append(1)
        return [len(calls) % 2]

    engine = _choosing(which, probe="fresh")
    before = engine.state_dict()
    with pytest.raises(UserError, match="took different paths"):
        engine.step(torch.ones(2, 3))
    after = engine.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_a_forward_that_ends_early_is_refused():
    calls = []

    def which(x):
        calls.append(1)
        return [0, 1, 2][: len(calls)]

    with pytest.raises(UserError, match="took different paths"):
        _choosing(which).step(torch.ones(2, 3))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_used_twice_is_refused(frozen):
    engine = _choosing(lambda x: [0, 1, 0])
    if frozen:
        model = _Chooses()
        model.blocks.requires_grad_(False)
        engine = ZO2(model, loss=lambda m, b: m(b, lambda x: [0, 1, 0]))
    with pytest.raises(UserError, match=r"runs 'blocks.0' twice"):
        engine.step(torch.ones(2, 3))


@pytest.mark.parametrize("storage", ["ram", None])
def test_an_order_of_units_that_changes_between_steps_loses_no_update(storage):
    """Each step draws noise for the units it reaches; an update reaches exactly those, whatever the
    next step does.
    """
    paths = [[0, 1], [2, 0], [2, 1, 0], [], [1], [0, 1, 2]]
    path = []
    engine = _choosing(lambda x: path, storage=storage, probe="fresh", weight_decay=0.1)
    theta = engine.state_dict()
    x = torch.linspace(-1, 1, 6).view(2, 3)
    for seed, path in enumerate(paths):  # the closure above reads `path`
        step = engine.step(x, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for name in ("first", *(f"blocks.{i}" for i in path)):
            for kind in ("weight", "bias"):
                value = theta[f"{name}.{kind}"]
                z = torch.normal(0.0, 1.0, value.shape, generator=generator)
                decay = 0.1 * value if kind == "weight" else 0
                theta[f"{name}.{kind}"] = value - 1e-2 * (step.projected_gradient * z + decay)
    after = engine.state_dict()
    for name, value in theta.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)


def test_blocks_that_share_parameters_are_refused():
    model = _Chooses()
    model.blocks[2].weight = model.blocks[0].weight
    with pytest.raises(UserError, match=r"block 'blocks.2' shares a parameter with 'blocks.0'"):
        ZO2(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be positive"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"storage": None, "storage_dtype": torch.bfloat16}, "storage_dtype needs a storage"),
        ({"blocks": ["layers"]}, "no module 'layers'; its containers are: blocks"),
        ({"blocks": ["first"]}, "nothing in there holds parameters"),
        ({"shared": ["middle"]}, r"shared=\['middle'\]: not a resident module; those are first"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ZO2(_Chooses(), **options)


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(UserError, match="no trainable parameter"):
        ZO2(_Chooses().requires_grad_(False))


def test_a_model_without_weights_needs_their_file():
    with torch.device("meta"):
        model = _Chooses()
    with pytest.raises(UserError, match=r"on the meta device: name the file"):
        ZO2(model)


def test_a_step_on_nothing_is_refused(plain, helpers):
    with pytest.raises(UserError, match="at least one micro-batch"):
        helpers.make_engine(plain).step([])


def test_an_engine_that_has_let_go_is_refused(plain, helpers):
    engine = helpers.make_engine(plain)
    engine.unwrap()
    for call in (engine.step, engine.evaluate):
        with pytest.raises(UserError, match="has let go of the model"):
            call(helpers.batch_of(plain, 0))


class _Iterates(nn.Module):
    """Runs the layers of its parts one by one, so that the parts themselves are never called."""

    def __init__(self, pre, blocks):
        super().__init__()
        self.pre, self.blocks = pre, nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.pre:
            x = layer(x)
        for block in self.blocks:
            x = block[0](x) if isinstance(block, nn.ModuleList) else block(x)
        return x.square().mean()


def test_parts_of_what_is_never_called_itself_are_refused_and_not_forgotten():
    def engine(pre, blocks):
        return ZO2(_Iterates(pre, blocks), blocks=["blocks"], loss=lambda model, x: model(x))

    blocks = [nn.Linear(3, 3) for _ in range(3)]
    with pytest.raises(UserError, match=r"'pre.0' runs outside 'pre'"):
        engine(nn.Sequential(nn.Linear(3, 3)), blocks).step(torch.ones(2, 3))
    lists = engine(
        nn.ModuleList([nn.Linear(3, 3)]), [nn.ModuleList([nn.Linear(3, 3)]) for _ in range(2)]
    )
    with pytest.raises(UserError, match=r"'blocks.0.0' runs outside 'blocks.0'"):
        lists.step(torch.ones(2, 3))
    with pytest.raises(UserError, match=r"'blocks.0.0' runs outside 'blocks.0'"):
        lists.evaluate(torch.ones(2, 3))
    trained = engine(nn.ModuleList([nn.Linear(3, 3)]), [nn.Linear(3, 3) for _ in range(2)])
    trained.step(torch.ones(2, 3))
    assert trained.parameter_order()[:2] == ["pre.0.weight", "pre.0.bias"]


def test_an_existing_file_is_refused_and_left_alone(plain, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists: name a new file"):
        ZO2(plain.make(), storage=path)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("storage", ["ram", "disk"])
@pytest.mark.parametrize(
    "broken",
    [(RamStore, "fill", 2), (Pager, "_allocate", 1), (Placement, "_place_resident", 0)],
    ids=lambda place: place[1],
)
def test_a_model_that_cannot_be_taken_in_whole_is_left_as_it_was(
    storage, broken, tmp_path, monkeypatch
):
    """The memory of the host, or of the device, ends when some blocks have gone."""
    owner, method, calls = broken
    if storage == "disk" and owner is RamStore:
        pytest.skip("a file has no memory to run out of")
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    real, left = getattr(owner, method), [calls]

    def failing(self, *arguments):
        if not left[0]:
            raise torch.OutOfMemoryError("deliberate")
        left[0] -= 1
        return real(self, *arguments)

    monkeypatch.setattr(owner, method, failing)
    where = "ram" if storage == "ram" else tmp_path / "weights.safetensors"
    options = {"storage": where, "loss": lambda model, batch: model(batch).square().mean()}
    with pytest.raises(torch.OutOfMemoryError):
        ZO2(model, **options)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert ZO2(model, **options).step(torch.ones(2, 5)).loss > 0


def test_a_unit_that_runs_inside_another_is_refused():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.entry = nn.Linear(3, 3)
            self.blocks = nn.ModuleList([nn.Linear(3, 3)])
            self.blocks[0].register_forward_pre_hook(lambda _, args: (self.entry(args[0]),))

        def forward(self, x):
            return self.blocks[0](x).square().mean()

    with pytest.raises(UserError, match=r"'entry' runs inside 'blocks.0'"):
        ZO2(Inner(), loss=lambda model, x: model(x)).step(torch.ones(2, 3))


# ---- what a loss may do --------------------------------------------------------------------------


def test_context_variables_reach_the_loss(plain, helpers):
    chosen = contextvars.ContextVar("chosen", default="nothing")
    seen = set()

    def loss(model, batch):
        seen.add(chosen.get())
        return plain.loss(model, batch)

    token = chosen.set("mine")
    helpers.run_engine(helpers.make_engine(plain, loss=loss), plain, 1)
    chosen.reset(token)
    assert seen == {"mine"}


def test_gradient_mode_is_as_it_was(plain, helpers):
    def loss(model, batch):
        with torch.enable_grad():
            assert torch.is_grad_enabled()
            found = plain.loss(model, batch)
            assert torch.is_grad_enabled()
        return found.detach()

    engine = helpers.make_engine(plain, loss=loss)
    helpers.run_engine(engine, plain, 2)
    assert torch.is_grad_enabled()


def test_inference_mode_inside_the_loss_does_not_leak(plain, helpers):
    def loss(model, batch):
        with torch.inference_mode():
            return plain.loss(model, batch)

    engine = helpers.make_engine(plain, loss=loss)
    with pytest.raises(UserError, match="inference_mode"):
        helpers.run_engine(engine, plain, 1)
    assert not torch.is_inference_mode_enabled()


def test_a_resident_module_called_twice_is_refused_unless_it_is_named(helpers):
    class Loop(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.turn = nn.Linear(5, 5)
            self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(depth))
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            for block in self.blocks:
                x = torch.tanh(block(self.turn(x)))
            return self.head(x)

    order = [
        "turn.weight",
        "turn.bias",
        *(f"blocks.{i}.{p}" for i in range(3) for p in ("weight", "bias")),
        "head.weight",
        "head.bias",
    ]
    case = helpers.Case(
        "loop", Loop, helpers.CASES["plain"].batches, helpers.class_loss, lambda _: order
    )
    with pytest.raises(UserError, match=r"runs 'turn' twice.*shared=\[...\]"):
        helpers.run_zo2(case, 1)
    helpers.assert_same(helpers.run_zo2(case, 8, shared=["turn"]), helpers.run_mezo(case, 8))


# ---- replay --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "opt-tied", "timm-vit"], indirect=True)
@pytest.mark.parametrize("probe", ["inplace", "fresh"])
@pytest.mark.parametrize("storage_dtype", [None, torch.bfloat16])
def test_replay_ends_where_the_run_ended(case, probe, storage_dtype, helpers):
    options = {"probe": probe, "storage_dtype": storage_dtype}
    engine = helpers.make_engine(case, **options)
    steps = [engine.step(helpers.batch_of(case, t)) for t in range(8)]
    again = helpers.make_engine(case, lr=55.0, seed=9, **options)
    again.replay(steps[:3], engine.order)
    again.replay(steps[3:], engine.order)
    assert again.steps == 8
    states = [
        {n: t for n, t in e.state_dict().items() if not n.endswith("calls")}
        for e in (engine, again)
    ]
    assert helpers.differing(*states) == []
    assert again.evaluate(helpers.batch_of(case, 0)) == engine.evaluate(helpers.batch_of(case, 0))


def test_replay_of_a_step_without_an_update(plain, helpers):
    def loss(model, batch):
        return plain.loss(model, batch[:2]) * batch[2]

    engine = helpers.make_engine(plain, loss=loss)
    factors = [1.0, float("nan"), 1.0, float("inf"), 2.0]
    steps = [engine.step((*helpers.batch_of(plain, 0), factor)) for factor in factors]
    assert [s.skipped for s in steps] == [False, True, False, True, False]
    again = helpers.make_engine(plain)
    again.replay(steps, engine.order)
    states = [
        {n: t for n, t in e.state_dict().items() if not n.endswith("calls")}
        for e in (engine, again)
    ]
    assert helpers.differing(*states) == []


def test_a_replay_may_be_followed_by_training(plain, plain_reference, helpers):
    first = helpers.make_engine(plain)
    steps = [first.step(helpers.batch_of(plain, t), seed=helpers.seed_of(t)) for t in range(12)]
    engine = helpers.make_engine(plain)
    engine.replay(steps, first.order)
    assert helpers.run_engine(engine, plain, 18, first=12) == plain_reference().found[12:]


def test_replay_of_another_models_log_is_refused(plain, helpers):
    with pytest.raises(UserError, match=r"the log names 'model.layers.0'"):
        helpers.make_engine(plain).replay([], ["", "model.layers.0"])


# ---- saving and loading --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "opt-tied", "bert-classifier"], indirect=True)
@pytest.mark.parametrize("tier", ["ram", "disk", "none"])
def test_a_run_resumed_from_a_file_equals_one_that_was_not_interrupted(
    case, tier, helpers, tmp_path
):
    def storage(name):
        return {"ram": "ram", "disk": tmp_path / name, "none": None}[tier]

    whole = helpers.run_zo2(case, 12)
    first = helpers.make_engine(case, storage=storage("a"))
    found = helpers.run_engine(first, case, 5)
    first.save(tmp_path / "saved.safetensors", metadata={"step": "5"})
    state = first.state_dict()
    with_first = helpers.run_engine(first, case, 7, first=5)
    second = helpers.make_engine(case, storage=storage("b"), seed=3)
    helpers.run_engine(second, case, 1)  # something pending that must be forgotten
    second.load(tmp_path / "saved.safetensors")
    second.steps = 5
    assert helpers.differing(second.state_dict(), state) == []
    with_second = helpers.run_engine(second, case, 7, first=5)
    assert found + with_first == found + with_second == whole.found
    assert helpers.differing(second.unwrap().state_dict(), whole.state) == []
    first.close()


def test_a_saved_file_is_an_ordinary_checkpoint(helpers, tmp_path):
    case = helpers.CASES["opt-tied"]
    engine = helpers.make_engine(case)
    helpers.run_engine(engine, case, 3)
    engine.save(tmp_path / "model.safetensors", metadata={"step": "3"})
    loaded = load_file(tmp_path / "model.safetensors")
    assert helpers.differing(loaded, engine.state_dict()) == []
    loss = engine.evaluate(helpers.batch_of(case, 0))
    model = engine.unwrap()
    model.config.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert stock(**helpers.batch_of(case, 0)).loss.item() == loss
    assert helpers.differing(stock.state_dict(), model.state_dict()) == []


def test_a_file_of_another_model_is_refused(plain, helpers, tmp_path):
    engine = helpers.make_engine(plain)
    engine.save(tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"'blocks.3.*' is only in the model|'blocks.2.*' is only in the file"
    ):
        helpers.make_engine(plain, depth=2).load(tmp_path / "a.safetensors")


def test_a_save_that_fails_leaves_nothing(plain, helpers, tmp_path, monkeypatch):
    engine = helpers.make_engine(plain)
    (tmp_path / "w.safetensors").write_text("older")
    monkeypatch.setattr(ZO2, "tensors", lambda self: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        engine.save(tmp_path / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert (tmp_path / "w.safetensors").read_text() == "older"


# ---- models that never were in memory ------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["opt-tied", "opt-untied", "gpt2", "llama-tied", "qwen3"], indirect=True
)
def test_training_a_file_in_place_equals_training_in_memory(case, helpers, tmp_path):
    from shared.models import empty_causal_lm

    case.make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    model = empty_causal_lm(tmp_path)
    assert all(p.is_meta for p in model.parameters())
    engine = helpers.make_engine(case, model=model, storage=path)
    found = helpers.run_engine(engine, case, 8)
    wanted = helpers.run_zo2(case, 8)
    assert found == wanted.found
    engine.write_resident()
    engine.close()
    stock = type(model).from_pretrained(tmp_path)
    assert helpers.differing(stock.state_dict(), wanted.state) == []
    assert (
        json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type
    )


def test_a_plain_model_made_on_the_meta_device(plain, helpers, tmp_path):
    from accelerate import init_empty_weights

    path = tmp_path / "w.safetensors"
    save_file({n: t.contiguous() for n, t in plain.make().state_dict().items()}, path)
    with init_empty_weights(include_buffers=False):
        model = plain.build(3)
    engine = helpers.make_engine(plain, model=model, storage=path)
    found = helpers.run_engine(engine, plain, 6)
    full = plain.make()
    for parameter in full.parameters():
        parameter.data = parameter.data.contiguous()
    wanted = helpers.run_mezo(plain, 6, model=full)
    assert found == wanted.found
    assert helpers.differing(engine.unwrap().state_dict(), wanted.state) == []


def test_a_file_that_does_not_fit_is_refused(plain, helpers, tmp_path):
    from accelerate import init_empty_weights

    def empty():
        with init_empty_weights(include_buffers=False):
            return plain.build(2)

    state = {n: t.contiguous() for n, t in plain.make(2).state_dict().items()}
    path = tmp_path / "w.safetensors"
    for broken, message in [
        (
            {n: t for n, t in state.items() if n != "blocks.1.gain"},
            "holds no tensor 'blocks.1.gain'",
        ),
        ({n: t for n, t in state.items() if n != "shift"}, "holds no tensor 'shift'"),
        (
            state | {"blocks.0.up.bias": torch.zeros(12)},
            r"'blocks.0.up.bias' is F32 \[12\], the model wants F32 \[11\]",
        ),
        (
            state | {"blocks.0.up.bias": torch.zeros(11, dtype=torch.float16)},
            r"is F16 \[11\], the model wants F32 \[11\]",
        ),
    ]:
        save_file(broken, path)
        with pytest.raises(UserError, match=message):
            helpers.make_engine(plain, model=empty(), storage=path)


# ---- the way back --------------------------------------------------------------------------------


def test_unwrap_returns_the_model_as_it_was(helpers):
    case = helpers.CASES["llama-tied"]
    model = case.make()
    model.train()
    model.model.norm.eval()
    model.config.use_cache = True
    before = {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    engine = helpers.make_engine(case, model=model)
    helpers.run_engine(engine, case, 2)
    assert not model.training
    assert not model.config.use_cache
    assert engine.unwrap() is model
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training
    assert model.config.use_cache
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()} == before
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in model.parameters()), (
        "every block has memory of its own again"
    )
    model(**helpers.batch_of(case, 0)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("case", ["gpt2", "opt-tied", "llama-tied"], indirect=True)
def test_generation_through_the_engine_equals_the_stock_model(case, helpers):
    settings = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 1}
    prompt = helpers.batch_of(case, 0)["input_ids"][:1, :4]
    engine = helpers.make_engine(case)
    helpers.run_engine(engine, case, 2)
    generated = engine.forward(lambda model: model.generate(prompt, use_cache=False, **settings))
    cached = engine.forward(lambda model: model.generate(prompt, use_cache=True, **settings))
    model = engine.unwrap()
    assert torch.equal(generated, model.generate(prompt, use_cache=False, **settings))
    assert torch.equal(cached, model.generate(prompt, use_cache=True, **settings))


def test_evaluation_in_between_changes_nothing(plain, plain_reference, helpers):
    engine = helpers.make_engine(plain)
    assert engine.evaluate(helpers.batch_of(plain, 0)) == engine.evaluate(
        helpers.batch_of(plain, 0)
    )
    found = []
    for t in range(30):
        found += helpers.run_engine(engine, plain, 1, first=t)
        engine.evaluate(helpers.batch_of(plain, 2))
    assert found == plain_reference().found
    assert helpers.differing(engine.state_dict(), plain_reference().state) == []


def test_evaluation_sees_the_update_of_the_last_step(plain, helpers):
    engine = helpers.make_engine(plain)
    for t in range(4):
        helpers.run_engine(engine, plain, 1, first=t)
        seen = engine.evaluate(helpers.batch_of(plain, 0))
        model = plain.make()
        model.load_state_dict(engine.state_dict())
        with torch.no_grad():
            assert plain.loss(model, helpers.batch_of(plain, 0)).item() == seen


def test_spans_show_all_three_lanes(plain, helpers):
    engine = helpers.make_engine(plain, trace=True)
    helpers.run_engine(engine, plain, 3)
    engine.flush()
    lanes = {
        lane: [s for s in engine.spans if s.lane == lane]
        for lane in ("upload", "compute", "offload")
    }
    assert len(lanes["compute"]) == 9
    assert all(s.start <= s.end for spans in lanes.values() for s in spans)
    for visit in lanes["compute"]:
        assert any(u.block == visit.block and u.end <= visit.start for u in lanes["upload"])
        assert any(o.block == visit.block and o.start >= visit.end for o in lanes["offload"])


class _BlockWithBuffers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)
        self.register_buffer("saved", torch.full((6,), 0.5))
        self.register_buffer("unsaved", torch.full((6,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.saved + self.unsaved


def test_a_file_holds_what_the_state_dict_holds(tmp_path):
    model = torch.nn.ModuleDict(
        {"blocks": torch.nn.ModuleList([_BlockWithBuffers() for _ in range(2)])}
    )

    def loss(model, x):
        for block in model["blocks"]:
            x = block(x)
        return x.square().mean()

    x = torch.ones(3, 6)
    expected, names = loss(model, x).item(), set(model.state_dict())
    engine = ZO2(model, loss=loss, storage=tmp_path / "weights.safetensors")
    assert set(load_file(tmp_path / "weights.safetensors")) == set(engine.state_dict()) == names
    assert engine.evaluate(x) == expected
    engine.close()


# ---- interruptions in the midst of the engine's own arithmetic -----------------------------------


@pytest.mark.parametrize("probe", ["inplace", "fresh"])
@pytest.mark.parametrize("method", ["update", "draw", "add"])
def test_ctrl_c_waits_until_the_weights_are_whole(
    method, probe, plain, helpers, monkeypatch, request
):
    """Interrupted while noise is added, the engine ends the addition first; what it goes on with is
    what it had.
    """
    # a shell that starts tests in the background has them ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    calm, hasty = (helpers.make_engine(plain, probe=probe) for _ in range(2))
    for engine in (calm, hasty):
        helpers.run_engine(engine, plain, 2)
    original, calls = getattr(Noise, method), []

    def interrupt(self, *args):
        original(self, *args)
        calls.append(method)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Noise, method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        helpers.run_engine(hasty, plain, 1)
    monkeypatch.undo()
    assert len(calls) >= 3
    for name, value in calm.state_dict().items():
        torch.testing.assert_close(hasty.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    helpers.run_engine(hasty, plain, 1)
    for engine in (calm, hasty):
        engine.close()


@pytest.mark.parametrize(
    ("storage", "probe"), [("ram", "inplace"), (None, "inplace"), (None, "fresh"), ("ram", "fresh")]
)
def test_a_failure_in_the_midst_of_a_change_is_not_passed_over(
    storage, probe, plain, helpers, monkeypatch, tmp_path
):
    """Out of memory while noise is added: the engine says that it is unusable, until it has loaded
    a checkpoint.
    """
    engine = helpers.make_engine(plain, storage=storage, probe=probe, cache_noise=False)
    helpers.run_engine(engine, plain, 2)
    engine.save(tmp_path / "good.safetensors")
    good = engine.state_dict()
    original, calls = Noise.add, []

    def fail(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        original(self, *args)

    monkeypatch.setattr(Noise, "add", fail)
    with pytest.raises(MemoryError) as raised:
        helpers.run_engine(engine, plain, 1)
    monkeypatch.undo()
    assert "load a checkpoint" in raised.value.__notes__[0]
    for use in (
        lambda: helpers.run_engine(engine, plain, 1),
        engine.unwrap,
        lambda: engine.forward(lambda model: None),
    ):
        with pytest.raises(UserError, match="load a checkpoint"):
            use()
    engine.load(tmp_path / "good.safetensors")
    for name, value in engine.state_dict().items():
        assert torch.equal(value, good[name]), name
    engine.step(helpers.batch_of(plain, 0), lr=0.0)
    # nothing is still bound to memory that a step uses
    for name, value in engine.state_dict().items():
        if value.is_floating_point():  # a counter of calls has moved on
            torch.testing.assert_close(
                value, good[name], rtol=0, atol=0 if probe == "fresh" else 1e-6
            )
    engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": "Fresh"}, "probe"),
        ({"rounding": "stohastic"}, "rounding"),
        ({"storage": "disk"}, "pathlib.Path"),
    ],
)
def test_a_misspelt_option_is_refused(options, message, plain, helpers):
    with pytest.raises(UserError, match=message):
        helpers.make_engine(plain, **options)


def test_a_list_of_tensors_is_not_taken_for_micro_batches(plain, helpers):
    engine = helpers.make_engine(plain)
    with pytest.raises(UserError, match="micro-batches"):
        engine.step([torch.ones(2), torch.ones(2)])
    engine.close()
