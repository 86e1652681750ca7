"""What would void the guarantee is refused in one line that says what to do."""

import copy
import gc
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from projects.flashdp import FixedSampling, PoissonSampling, make_private, noise_multiplier, untie
from projects.flashdp.accounting import check_delta
from shared.errors import UserError

NAN, INF = float("nan"), float("inf")


def refused(action, *words):
    """The action ends in a UserError of one line with these words in it."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert re.search(word, message), message
    return message


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def inputs(samples=4, *shape):
    return torch.randn(samples, *shape, 3, generator=torch.Generator().manual_seed(1))


def backward(model, samples=4):
    model(inputs(samples)).square().sum().backward()


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clip", [0, -1, NAN, INF, {"*": 0.0}, {"0": 1.0}, {"*": NAN}, {"*": INF}, {}]
)
def test_a_bound_must_be_a_positive_number(clip, helpers):
    refused(lambda: helpers.wrap(plain(), clip=clip), "bound", "above 0")


def test_a_bound_for_a_group_that_is_not_there_is_refused(helpers):
    refused(lambda: helpers.wrap(plain(), clip={"heed": 0.1, "*": 1.0}), "heed", "there are 0, 2")


@pytest.mark.parametrize("sigma", [-1.0, -1e-9, NAN, INF, -INF])
def test_a_noise_multiplier_must_be_a_number_not_below_0(sigma, helpers):
    refused(lambda: helpers.wrap(plain(), noise_multiplier=sigma), "noise_multiplier", "at least 0")


@pytest.mark.parametrize("delta", [0, -1e-5, 0.01, 0.5, 1, NAN, INF])
def test_delta_must_be_below_one_over_the_number_of_records(delta):
    refused(lambda: check_delta(delta, 100), "delta", "1/100", "below")
    check_delta(0.0099, 100)


@pytest.mark.parametrize("delta", [0, 1, -1, NAN])
def test_a_delta_that_is_no_probability_is_refused(delta, helpers):
    dp, _ = helpers.wrap(plain(), noise_multiplier=1.0)
    refused(lambda: dp.epsilon(delta), "delta", "between 0 and 1")
    refused(lambda: dp.report(delta), "delta", "between 0 and 1")


@pytest.mark.parametrize("sampling", [PoissonSampling, FixedSampling])
def test_sampling_needs_records_and_a_batch_size_within_them(sampling):
    refused(lambda: sampling(0, 1), "empty")
    for size in (0, -1, 11, NAN):
        refused(lambda size=size: sampling(10, size), "above 0 and at most")


def test_a_key_needs_a_digest_of_the_records(helpers):
    for options in ({"key": bytes(32)}, {"data": b"records"}):
        refused(lambda o=options: helpers.wrap(plain(), noise_seed=None, **o), "data=", "digest")


@pytest.mark.parametrize(
    "options", [{"key": b"short"}, {"key": bytes(33)}, {"key": bytes(32), "noise_seed": 1}]
)
def test_a_key_is_32_bytes_and_the_only_source_of_the_noise(options, helpers):
    refused(
        lambda: helpers.wrap(plain(), **{"noise_seed": None} | options),
        "32 secret bytes",
        "noise_seed",
    )


@pytest.mark.parametrize(
    "options",
    [{"sensitivity": 0.5}, {"sensitivity": NAN}, {"sensitivity": 2.0, "noise_allocation": "equal"}],
)
def test_the_sensitivity_of_a_whole_model_is_at_least_that_of_its_stage(options, helpers):
    refused(
        lambda: helpers.wrap(plain(), clip=1.0, **options), "sensitivity", "whole model", "uniform"
    )


def test_an_infinite_sensitivity_is_refused(helpers):
    refused(lambda: helpers.wrap(plain(), sensitivity=INF), "sensitivity")


def test_an_unknown_backend_is_refused_with_the_known_ones(helpers):
    refused(lambda: helpers.wrap(plain(), backend="magic"), "magic", "loop", "ghost", "auto")


def test_an_unknown_accountant_is_refused_with_the_known_ones(helpers):
    dp, optimizer = helpers.wrap(plain(), noise_multiplier=1.0)
    optimizer.step()
    refused(lambda: dp.epsilon(1e-5, "gdp"), "gdp", "rdp", "prv", "pld")


@pytest.mark.parametrize("target", [0, -1, NAN])
def test_a_target_epsilon_must_be_positive(target):
    refused(lambda: noise_multiplier(target, 1e-5, 0.01, 10), "epsilon", "above 0")


def test_an_epsilon_out_of_reach_is_refused_with_what_to_change():
    refused(
        lambda: noise_multiplier(1e-6, 1e-12, 1.0, 10**9),
        "cannot be reached",
        "fewer steps, smaller batches or more data",
    )


@pytest.mark.parametrize(
    "option",
    [
        {"groups": "layers"},
        {"loss_reduction": "avg"},
        {"noise_allocation": "same"},
        {"noise_seed": -1},
    ],
    ids=str,
)
def test_a_choice_that_does_not_exist_is_refused(option, helpers):
    refused(lambda: helpers.wrap(plain(), **option))


# ---- models --------------------------------------------------------------------------------------


def test_a_model_with_nothing_to_train(helpers):
    model = plain().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    refused(
        lambda: make_private(model, optimizer, PoissonSampling(10, 1), noise_multiplier=1.0),
        "nothing to train",
    )


class WithParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.inner(x) * self.gain


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), "0.in_proj_weight"),
        (WithParameter, "gain"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), "0.weight"),
        (lambda: nn.Sequential(nn.GRU(3, 3)), "0.weight_ih_l0"),
        (lambda: nn.Sequential(nn.GroupNorm(1, 3)), "0.weight"),
    ],
)
def test_a_trainable_parameter_without_a_rule_is_named(model, name, helpers):
    refused(lambda: helpers.wrap(model()), f"\\b{re.escape(name)}\\b", "freeze", "requires_grad_")


def test_what_is_frozen_needs_no_rule(helpers):
    model = WithParameter()
    model.gain.requires_grad_(False)
    helpers.wrap(model)
    model(inputs()).sum().backward()
    assert model.gain.grad is None
    assert model.inner.weight.grad is not None


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(5),
        lambda: nn.BatchNorm1d(5, affine=False),
        lambda: nn.SyncBatchNorm(5),
    ],
)
def test_batch_norm_is_refused_unless_frozen_in_eval_mode(norm, helpers):
    model = nn.Sequential(nn.Linear(3, 5), norm(), nn.Linear(5, 2))
    refused(lambda: helpers.wrap(model), "BatchNorm", "GroupNorm or LayerNorm")
    model[1].eval().requires_grad_(False)
    helpers.wrap(model)


def test_batch_norm_that_goes_back_to_training_is_refused(helpers):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2)).eval()
    helpers.wrap(model)
    model.train()
    refused(lambda: backward(model), "BatchNorm")


def test_running_statistics_are_refused_while_they_run(helpers):
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True)
    )
    refused(lambda: helpers.wrap(model), "InstanceNorm1d with running statistics", "eval mode")
    model[2].eval()
    helpers.wrap(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_too_narrow_to_add_in_are_refused(dtype, helpers):
    """256 clipped gradients added in bfloat16 are off by more than one of them."""
    refused(lambda: helpers.wrap(plain().to(dtype)), "0.weight", "float32", "autocast")
    frozen = plain().to(dtype).requires_grad_(False)
    frozen[2].float().requires_grad_(True)
    helpers.wrap(frozen)


def test_a_layer_whose_weight_is_made_of_others_is_refused(helpers):
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    refused(lambda: helpers.wrap(model), "no rule", "freeze")


def test_a_private_model_cannot_be_copied(helpers):
    model = plain()
    helpers.wrap(model)
    refused(lambda: copy.deepcopy(model), "copied", "unwrap")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.tokens(ids)))


def test_tied_weights_are_refused_until_untied(helpers):
    torch.manual_seed(0)
    model = Tied()
    refused(lambda: helpers.wrap(model), "tied", "untie", "tokens.weight", "head.weight")
    assert untie(model) == 1
    assert untie(model) == 0
    assert model.head.weight is not model.tokens.weight
    assert torch.equal(model.head.weight, model.tokens.weight)
    helpers.wrap(model)


def test_tied_weights_of_transformers_are_refused_until_untied_and_then_clipped_as_two_layers(
    helpers,
):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 9}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, **sizes)).double().eval()
    refused(lambda: helpers.wrap(model), "tied", "untie")
    assert untie(model) == 1
    assert not model.config.tie_word_embeddings
    by_hand = (
        GPT2LMHeadModel(GPT2Config(vocab_size=31, tie_word_embeddings=False, **sizes))
        .double()
        .eval()
    )
    by_hand.load_state_dict(model.state_dict())
    case = helpers.Case(
        "untied", lambda: by_hand, lambda: helpers.token_ids(5, 7), helpers.token_losses
    )
    samples = helpers.per_sample_gradients(case, case.data(), by_hand)
    bounds = helpers.bounds_in_the_middle(samples, "layer")
    wanted = helpers.summed([helpers.clipped_by_hand(one, bounds, "layer") for one in samples])
    assert helpers.furthest(helpers.private_sums(case, bounds, model=model), wanted) <= 1e-12


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(3, 3)

    def forward(self, x):
        return self.second(self.first(x))


def test_one_module_in_two_places_is_refused(helpers):
    refused(lambda: helpers.wrap(Shared()), "first and second", "one module", "own|freeze")


def test_a_model_wrapped_twice_is_refused(helpers):
    model = plain()
    helpers.wrap(model)
    refused(lambda: helpers.wrap(model), "private already", "unwrap")
    refused(lambda: helpers.wrap(nn.Sequential(model)), "private already", "unwrap")


@pytest.mark.parametrize(
    "option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}]
)
def test_an_embedding_without_a_gradient_per_sample_is_refused(option, helpers):
    model = nn.Sequential(nn.Embedding(5, 3, **option), nn.Linear(3, 2))
    refused(lambda: helpers.wrap(model), "^0: ", "Embedding", "plain one")


def test_an_optimizer_over_other_parameters_is_refused(helpers):
    model, other = plain(), plain()
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=1.0)
    refused(
        lambda: make_private(model, optimizer, PoissonSampling(9, 3), noise_multiplier=1.0),
        "4 trainable parameters",
        "not the model's",
    )


def test_an_optimizer_without_some_trainable_parameters_is_refused():
    model = plain()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=1.0)
    refused(
        lambda: make_private(model, optimizer, PoissonSampling(9, 3), noise_multiplier=1.0),
        "2 trainable",
        "0.weight",
        "freeze|add",
    )
    model[0].requires_grad_(False)
    make_private(model, optimizer, PoissonSampling(9, 3), noise_multiplier=1.0)


def test_a_model_that_is_one_layer_trains(helpers):
    model = nn.Linear(3, 2)
    _, optimizer = helpers.wrap(model)
    backward(model)
    optimizer.step()
    assert float(model.weight.grad.norm()) > 0


# ---- a parameter that would move without noise ---------------------------------------------------


def test_a_layer_unfrozen_after_wrapping_is_refused(helpers):
    model = plain()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    make_private(model, optimizer, PoissonSampling(9, 3), noise_multiplier=1.0)
    model[0].requires_grad_(True)
    backward(model)
    refused(optimizer.step, "0.weight")


def test_parameters_given_to_the_optimizer_after_wrapping_are_refused(helpers):
    model, other = plain(), nn.Linear(2, 2)
    _, optimizer = helpers.wrap(model)
    optimizer.add_param_group({"params": other.parameters()})
    other(model(inputs())).sum().backward()
    refused(optimizer.step)


def test_a_gradient_left_on_a_frozen_parameter_is_not_taken_by_the_optimizer(helpers):
    model = plain()
    backward(model)
    model[0].requires_grad_(False)
    model[2].zero_grad()
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    try:
        make_private(model, optimizer, PoissonSampling(9, 3), noise_multiplier=1.0)
        backward(model)
        optimizer.step()
    except UserError:
        pass
    assert torch.equal(model[0].weight, before)


def test_another_optimizer_over_the_private_parameters_is_refused(helpers):
    model = plain()
    helpers.wrap(model)
    backward(model)
    refused(torch.optim.SGD(model.parameters(), lr=1.0).step)


def test_a_private_model_may_be_collected_during_the_step_of_another(helpers):
    held = [helpers.wrap(plain())]

    def collect(*_):
        held.clear()
        gc.collect()

    handle = register_optimizer_step_pre_hook(collect)
    try:
        _, optimizer = helpers.wrap(plain())
        optimizer.step()
    finally:
        handle.remove()


# ---- the order of calls --------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer, called twice; with a checkpoint around both calls, or around each."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3), how

    def forward(self, x):
        match self.how:
            case "plain":
                return self.layer(self.layer(x))
            case "around both, reentrant":
                return checkpoint(lambda t: self.layer(self.layer(t)), x, use_reentrant=True)
            case "around each, reentrant":
                return checkpoint(
                    self.layer, checkpoint(self.layer, x, use_reentrant=True), use_reentrant=True
                )
            case "around both":
                return checkpoint(lambda t: self.layer(self.layer(t)), x, use_reentrant=False)


@pytest.mark.parametrize(
    "how", ["plain", "around both", "around both, reentrant", "around each, reentrant"]
)
def test_a_layer_called_twice_in_one_forward_is_refused(how, helpers):
    model = Twice(how)
    helpers.wrap(model)
    refused(
        lambda: model(inputs().requires_grad_()).sum().backward(),
        "layer is called twice",
        "of its own",
        "freeze",
    )


def test_one_forward_after_another_is_not_twice(helpers):
    model = plain()
    helpers.wrap(model)
    for _ in range(3):
        backward(model)
    with torch.no_grad():
        model(inputs())


def test_layers_called_past_the_models_forward_are_refused(helpers):
    model = Twice("plain")
    helpers.wrap(model)
    for x in (inputs(), inputs(4, 5)):
        refused(
            lambda x=x: model.layer(x), "layer", "outside the model's forward", "call the model"
        )
    with torch.no_grad():
        model.layer(inputs())


def test_forwards_and_backwards_may_alternate_in_any_order(helpers):
    """As in a pipeline: F1 F2 B1 F3 B2 B3."""
    model = plain()
    helpers.wrap(model)
    first, second = model(inputs()).sum(), model(2 * inputs()).sum()
    first.backward()
    third = model(3 * inputs()).sum()
    second.backward()
    third.backward()
    for _ in range(2):
        (model(inputs()).sum() + model(2 * inputs()).sum()).backward()


def test_sums_without_noise_do_not_outlive_unwrap(helpers):
    model = plain()
    dp, optimizer = helpers.wrap(model)
    backward(model)
    dp.unwrap()
    before = model[0].weight.clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_what_was_abandoned_does_not_count(helpers):
    model = plain()
    dp, optimizer = helpers.wrap(model)
    backward(model, 3)
    optimizer.zero_grad()
    backward(model, 4)
    assert {len(norms) for norms in dp.norms().values()} == {4}


def test_a_second_backward_through_one_graph_is_refused(helpers):
    model = plain()
    helpers.wrap(model)
    loss = model(inputs()).sum()
    loss.backward(retain_graph=True)
    refused(loss.backward, "second backward", "new forward")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_second_backward_through_a_checkpoint_is_refused(reentrant, helpers):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2).requires_grad_(False)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant))

    model = Checkpointed()
    helpers.wrap(model)
    loss = model(inputs().requires_grad_()).sum()
    loss.backward(retain_graph=True)
    refused(loss.backward, "second backward")


def test_a_backward_after_the_step_without_zero_grad_is_refused(helpers):
    model = plain()
    _, optimizer = helpers.wrap(model)
    backward(model)
    optimizer.step()
    refused(lambda: backward(model), "zero_grad")
    optimizer.zero_grad()
    backward(model)


def test_two_steps_with_one_gradient_are_refused(helpers):
    model = plain()
    dp, optimizer = helpers.wrap(model)
    backward(model)
    optimizer.step()
    refused(optimizer.step, "twice", "zero_grad")
    assert dp.steps == 1


def test_a_closure_is_refused(helpers):
    model = plain()
    dp, optimizer = helpers.wrap(model)
    for call in (
        lambda: optimizer.step(lambda: None),
        lambda: optimizer.step(closure=lambda: None),
    ):
        refused(call, "closure", "apart")
    assert dp.steps == 0


def _with_grad(change):
    def apply(model, optimizer):
        with torch.no_grad():
            change(model[2].weight)

    return apply


def _scaled(scale):
    def apply(model, optimizer):
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(inputs()).square().sum()).backward()
        scaler.unscale_(optimizer)

    return apply


CHANGES = {
    "doubled": _with_grad(lambda p: p.grad.mul_(2)),
    "replaced": _with_grad(lambda p: setattr(p, "grad", 2 * p.grad)),
    "an element": _with_grad(lambda p: p.grad[0, 0].fill_(1e6)),
    "clip_grad_norm_": lambda model, optimizer: nn.utils.clip_grad_norm_(
        model.parameters(), 1e-3, foreach=False
    ),
    "clip_grad_norm_ foreach": lambda model, optimizer: nn.utils.clip_grad_norm_(
        model.parameters(), 1e-3, foreach=True
    ),
    "clip_grad_value_": lambda model, optimizer: nn.utils.clip_grad_value_(
        model.parameters(), 1e-3
    ),
    "doubled through .data": _with_grad(lambda p: p.grad.data.mul_(2)),
    "GradScaler": _scaled(65536.0),
    "GradScaler below 1": _scaled(2.0**-10),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_changed_between_backward_and_step_is_refused(change, helpers):
    model = plain()
    dp, optimizer = helpers.wrap(model)
    backward(model)
    CHANGES[change](model, optimizer)
    refused(optimizer.step, "changed between")
    assert dp.steps == 0


def test_a_gradient_changed_between_two_micro_batches_is_refused(helpers):
    model = plain()
    _, _ = helpers.wrap(model)
    backward(model)
    model[0].weight.grad.mul_(2)
    refused(lambda: backward(model), "changed between")


def test_a_gradient_from_before_wrapping_is_refused(helpers):
    model = plain()
    backward(model)
    _, optimizer = helpers.wrap(model)
    refused(optimizer.step, "changed between")


def test_zeroing_in_place_is_fine(helpers):
    one, other = plain(), plain()
    (_, first), (_, second) = helpers.wrap(one), helpers.wrap(other)
    for _ in range(3):
        for model, optimizer, to_none in ((one, first, True), (other, second, False)):
            backward(model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ---- gradients by another way, batch dimensions --------------------------------------------------


class PastTheLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return F.linear(x, self.layer.weight, self.layer.bias)


class Regularised(PastTheLayer):
    def forward(self, x):
        return self.layer(x).sum() + self.layer.weight.square().sum()


@pytest.mark.parametrize("kind", [PastTheLayer, Regularised])
def test_a_parameter_used_past_its_layer_is_refused(kind, helpers):
    model = kind()
    helpers.wrap(model)
    refused(
        lambda: model(inputs()).sum().backward(),
        "layer.(weight|bias) is used outside",
        "freeze it or use the layer",
    )


def test_attention_that_uses_its_projection_past_the_layer_is_refused(helpers):
    model = nn.Sequential()
    model.attention = nn.MultiheadAttention(3, 1, batch_first=True)
    model.forward = lambda x: model.attention(x, x, x)[0]
    model.attention.in_proj_weight.requires_grad_(False)
    model.attention.in_proj_bias.requires_grad_(False)
    helpers.wrap(model)
    refused(lambda: model(inputs(4, 2)).sum().backward(), "out_proj", "used outside")


class Rows(nn.Module):
    """Loses the batch dimension on the way to its layer. Takes a tensor, or a dict with one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        x = x["x"] if isinstance(x, dict) else x
        return self.layer(x.reshape(-1, 3)).view(len(x), -1, 2)


def test_a_lost_batch_dimension_is_refused_unless_declared(helpers):
    x = inputs(4, 5)
    model = Rows()
    helpers.wrap(model)
    refused(lambda: model(x), "layer", "20 rows", "4 samples", "flattened=")
    declared = Rows()
    dp, _ = helpers.wrap(declared, flattened=["lay*"])
    declared(x).sum().backward()
    assert len(dp.norms()["layer"]) == 4


def test_rows_that_do_not_divide_among_the_samples_are_refused(helpers):
    class Some(Rows):
        def forward(self, x):
            return self.layer(x.reshape(-1, 3)[:-1])

    model = Some()
    helpers.wrap(model, flattened=["*"])
    refused(lambda: model(inputs(4, 5)), "19 rows", "4 samples")


def test_a_lost_batch_dimension_is_refused_also_with_a_dict_for_a_batch(helpers):
    model = Rows()
    helpers.wrap(model)
    refused(lambda: model({"x": inputs(4, 5)}), "flattened=")


def test_an_input_without_a_batch_dimension_is_refused(helpers):
    class Vector(Rows):
        def forward(self, x):
            return self.layer(x[0])

    model = Vector()
    helpers.wrap(model)
    refused(lambda: model(inputs(4)), "no batch dimension")


class Positions(nn.Module):
    """Positions without a batch dimension: one embedding for all samples."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.head = (
            nn.Embedding(9, 4),
            nn.Embedding(8, 4),
            nn.Linear(4, 2),
        )

    def forward(self, ids):
        return self.head(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))


@pytest.mark.parametrize("samples", [3, 5])  # of 5 positions
def test_positions_shared_by_all_samples_are_refused(samples, helpers):
    model = Positions()
    helpers.wrap(model)
    refused(lambda: model(torch.ones(samples, 5, dtype=torch.int64)).sum().backward(), "places")


def test_a_backward_of_no_samples_adds_nothing(helpers):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    _, optimizer = helpers.wrap(model)
    model(inputs(0, 2)).sum().backward()
    optimizer.step()
    assert all(not p.grad.any() for p in model.parameters())
    assert math.isfinite(float(model[0].weight.norm()))


# ---- what would couple samples, or pass the noise by ---------------------------------------------


def test_weights_tied_or_replaced_after_make_private_are_refused_at_the_release(helpers):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    _, optimizer = helpers.wrap(model)
    model[2].weight = model[0].weight
    refused(optimizer.step, "2.weight has been tied to 0.weight", "unwrap")
    model = plain()
    _, optimizer = helpers.wrap(model)
    next(m for m in model.modules() if isinstance(m, nn.Linear)).weight = nn.Parameter(
        torch.zeros_like(next(m for m in model.modules() if isinstance(m, nn.Linear)).weight)
    )
    refused(optimizer.step, "has been replaced")


def test_a_models_own_loss_from_labels_is_refused(helpers):
    case = helpers.CASES["gpt2"]
    model = case.make(torch.float32)
    helpers.wrap(model, **case.options)
    ids = case.data()
    refused(lambda: model(input_ids=ids, labels=ids), "couples the samples", "per_sample_loss")
    with torch.no_grad():
        model(input_ids=ids, labels=ids)  # an evaluation trains nothing


def test_a_data_parallel_wrapper_is_refused_with_the_remedy(tmp_path, helpers):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(plain())
        refused(lambda: helpers.wrap(wrapped), "DistributedDataParallel", "process_group=")
        model = nn.Sequential(nn.Linear(4, 3))
        helpers.wrap(model)
        around = nn.parallel.DistributedDataParallel(model)
        refused(lambda: around(torch.ones(2, 4)), "DistributedDataParallel", "process_group=")
    finally:
        dist.destroy_process_group()


class Averages(nn.Module):
    """Keeps a running mean of what goes through."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.layer(x - self.mean)


def test_a_buffer_that_the_forward_changes_is_refused(helpers):
    model = Averages()
    helpers.wrap(model)
    refused(lambda: model(torch.ones(2, 4)), "buffer mean", "without noise")


def test_a_pickle_has_no_key_and_does_not_train(helpers):
    """What pickles hold is what `__getstate__` gives."""
    model = nn.Sequential(nn.Linear(4, 3))
    key = bytes(range(1, 33))
    dp, _ = helpers.wrap(model, noise_seed=None, key=key, data=b"records")
    assert dp._key.startswith(key)
    kept = dp.__getstate__()
    assert "_key" not in kept
    assert not any(key in value for value in kept.values() if isinstance(value, bytes))
    assert key.hex() not in repr(kept)
    del dp._key  # as an unpickled one is
    refused(dp.optimizer.step, "pickle", "make_private")


# ---- batches that are not what was said ----------------------------------------------------------


def seen(batches, size=100, expected=4.0):
    from projects.flashdp.sampling import Seen

    sizes = Seen()
    for batch in batches:
        sizes.add(batch, expected)
    sizes.check(PoissonSampling(size, expected))


def test_samples_are_held_against_the_rate():
    refused(lambda: seen([64]), "64 samples were seen in 1 steps", "private_loader")
    refused(lambda: seen([4] * 30), "all 30 batches had 4 samples", "private_loader")
    refused(lambda: seen([0] * 30), "0 samples")
    seen([100] * 50, expected=100.0)  # at rate 1 all batches are alike
    sampling = PoissonSampling(100, 4.0)
    for run in range(20):
        seen([len(sampling.batch(run, step)) for step in range(200)])


def test_no_epsilon_is_claimed_for_batches_of_another_size(helpers):
    model = nn.Sequential(nn.Linear(4, 3))
    dp, optimizer = helpers.wrap(model, noise_multiplier=1.0, size=100, expected=4)
    model(torch.ones(64, 4)).sum().backward()
    optimizer.step()
    refused(lambda: dp.epsilon(1e-3), "64 samples", "private_loader")
    other, _ = helpers.wrap(nn.Sequential(nn.Linear(4, 3)), size=100, expected=4)
    other.load_state_dict(dp.state_dict())
    refused(lambda: other.report(1e-3), "64 samples")


def test_a_private_loader_draws_poisson_batches_of_any_data_set_or_loader():
    from torch.utils.data import DataLoader, TensorDataset

    from projects.flashdp import private_loader

    data = TensorDataset(torch.arange(50.0))
    for source in (data, DataLoader(data, batch_size=10, shuffle=True)):
        loader = private_loader(source, 0.05, steps=400)
        batches = list(loader)
        assert loader.sampling.sample_rate == 0.05
        assert len(loader) == len(batches) == 400
        sizes = [0 if batch is None else len(batch[0]) for batch in batches]
        assert 0 in sizes  # an empty batch is None
        assert len(set(sizes)) > 4
        assert abs(sum(sizes) - 1000) < 6 * (400 * 50 * 0.05 * 0.95) ** 0.5
        assert len({value for b in batches if b is not None for value in b[0].tolist()}) == 50
    stream = DataLoader(range(5)).dataset.__iter__()
    refused(lambda: private_loader(stream, 0.1, steps=2), "stream")
    refused(lambda: private_loader(data, 1.5, steps=2), "rate")
