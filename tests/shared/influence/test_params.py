"""A model as a function of a vector: what goes in comes out, and what would make derivatives wrong
is refused.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from shared.errors import UserError
from shared.influence.params import (
    Parameters,
    refuse_unseen_modes,
    refuse_wrong_third_derivatives,
)
from shared.influence.products import hvp


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def test_the_vector_holds_the_parameters_in_order_and_calls_the_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    parameters = Parameters.of(model)
    assert parameters.size == sum(p.numel() for p in model.parameters())
    assert torch.equal(parameters.flat(), nn.utils.parameters_to_vector(model.parameters()))
    x = torch.randn(5, 3)
    assert torch.equal(parameters.call(parameters.flat(), x), model(x))
    for name, where in parameters.slices.items():
        assert torch.equal(parameters.flat()[where], model.get_parameter(name).flatten())


def test_load_writes_back_what_call_computed_with():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    parameters = Parameters.of(model, ("2.*",))
    w, x = torch.randn(parameters.size), torch.randn(5, 3)
    expected, before = parameters.call(w, x), model[0].weight.clone()
    assert not torch.equal(model(x), expected)
    parameters.load(w)
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight, before)


def test_patterns_choose_and_take_out_again():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert Parameters.of(model, ("*", "!*.bias")).names == ("0.weight", "1.weight")
    assert (
        Parameters.of(model, ("1.*",)).names
        == Parameters.of(model, "1.*").names
        == ("1.weight", "1.bias")
    )
    with pytest.raises(
        UserError, match=r"no parameter is called head\.\*; the model's are 0\.weight"
    ):
        Parameters.of(model, ("head.*",))


def test_another_type_computes_in_it_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    parameters = Parameters.of(model, ("2.*",), torch.float64)
    out = parameters.call(parameters.flat(), torch.randn(5, 3, dtype=torch.float64))
    assert out.dtype == torch.float64
    assert model[0].weight.dtype == torch.float32
    mixed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double())
    with pytest.raises(
        UserError, match=r"of types torch\.float32, torch\.float64; name one as dtype"
    ):
        Parameters.of(mixed)


def test_what_the_model_becomes_later_does_not_change_the_function():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    parameters = Parameters.of(model, ("1.*",))
    w, x = parameters.flat(), torch.randn(5, 3)
    before = parameters.call(w, x)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(parameters.call(w, x), before)


def test_tied_parameters_are_one():
    model = Tied()
    with pytest.raises(
        UserError,
        match=(
            r"embed\.weight and head\.weight are one tensor; select one, e\.g\. add the pattern"
            r" '!head\.weight'"
        ),
    ):
        Parameters.of(model)
    for name in ("embed", "head"):
        parameters = Parameters.of(model, (f"{name}.weight",))
        ids = torch.tensor([0, 3])
        w = torch.randn(15)
        expected = Tied()
        expected.load_state_dict(
            {
                "embed.weight": w.view(5, 3),
                "head.weight": w.view(5, 3),
                "head.bias": model.head.bias,
            }
        )
        assert torch.equal(parameters.call(w, ids), expected(ids))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.BatchNorm1d(3),
            r"0 \(BatchNorm1d\) normalises by statistics of its batch: call model\.eval",
        ),
        (
            nn.BatchNorm1d(3, track_running_stats=False).eval(),
            "normalises by statistics of its batch",
        ),
        (
            nn.InstanceNorm1d(3, track_running_stats=True),
            r"0 \(InstanceNorm1d\) updates its running statistics: call model\.eval",
        ),
        (nn.Dropout(0.1), r"0 \(Dropout\) drops at random: call model\.eval"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "drops at random"),
    ],
)
def test_a_model_that_draws_or_mixes_its_batch_is_refused(module, message):
    mode = module.training
    model = nn.Sequential(module, nn.Linear(3, 2)).train(mode)
    module.train(mode)
    with pytest.raises(UserError, match=message):
        Parameters.of(model)


def test_a_model_set_to_train_later_is_refused_when_called():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    parameters = Parameters.of(model)
    model.train()
    with pytest.raises(UserError, match="drops at random"):
        parameters.call(parameters.flat(), torch.randn(1, 3))


NORMS = {  # whether third derivatives are right in this torch
    "group": (nn.GroupNorm(2, 4), True),
    "rms": (nn.RMSNorm(5, eps=1e-3), True),
    "batch, eval": (nn.BatchNorm1d(4).eval(), True),
    "layer": (nn.LayerNorm(5), False),
    "instance": (nn.InstanceNorm1d(4), False),
    "batch, train": (nn.BatchNorm1d(4), False),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_whose_third_derivatives_are_wrong_is_refused(name):
    norm, right = NORMS[name]
    model = nn.Sequential(norm.double()).train(norm.training)
    norm.train(norm.training)
    if not right:
        with pytest.raises(
            UserError,
            match=(
                r"0 \(\w+\): torch's third derivatives of \w+ are wrong; use GroupNorm or RMSNorm"
            ),
        ):
            refuse_wrong_third_derivatives(model)
        return
    refuse_wrong_third_derivatives(model)
    draw = torch.Generator().manual_seed(0)
    x, w, v = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((3, 4, 5), (20,), (20,))
    )

    def loss(at: torch.Tensor) -> torch.Tensor:
        return (model(torch.tanh(x * at.view(4, 5))).tanh() * x).square().sum()

    def product(at: torch.Tensor) -> torch.Tensor:
        return hvp(loss, at, v)

    exact = torch.func.jvp(product, (w,), (v,))[1]
    difference = (product(w + 1e-4 * v) - product(w - 1e-4 * v)) / 2e-4
    assert (exact - difference).norm() < 1e-5 * difference.norm()


def test_dropout_of_rate_0_and_norms_of_single_samples_are_fine():
    model = nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4))
    assert Parameters.of(model).size == 20 + 8 + 8


def test_a_vector_of_another_length_is_refused():
    parameters = Parameters.of(nn.Linear(3, 2))
    with pytest.raises(UserError, match="a vector of 8 parameters is needed"):
        parameters.unflatten(torch.zeros(7))


class Applied(nn.Linear):
    """A layer with a function of torch.nn.functional behind it."""

    def __init__(self, then) -> None:
        super().__init__(4, 3)
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(super().forward(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functional_layers_in_training_mode_are_refused(dtype):
    x = torch.randn(7, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))

    def check(then) -> None:
        refuse_unseen_modes(Parameters.of(Applied(then).to(dtype).eval()), x)

    with pytest.raises(UserError, match="differ from call to call"):
        check(lambda y: functional.dropout(y, 0.2, training=True))
    with pytest.raises(UserError, match="depends on the samples beside it"):
        check(lambda y: functional.batch_norm(y, None, None, training=True))
    check(lambda y: functional.dropout(y, 0.2, training=False))
    check(lambda y: functional.batch_norm(y, y.new_zeros(3), y.new_ones(3), training=False))
    check(lambda y: functional.group_norm(y, 1).tanh())
