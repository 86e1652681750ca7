"""MeZO as its authors publish it (arXiv 2305.17333, algorithm 1 and their trainer), written down
here expression by expression: neither the engine nor the reference takes part, and torch's own
global generator draws the noise.
"""

import copy

import pytest
import torch

from projects.zo2 import ZO2
from projects.zo2.baselines import NaiveOffload
from shared.errors import UserError

STEPS = 40
EPS = 1e-3


def published(model, names, loss_of, rate_of, seed_of, decay, steps=STEPS):
    """Train in place; returns the loss and the projected gradient of each step.

    Args:
        names: of the trained parameters, in the order in which they draw noise.
        loss_of: (model, step) -> a loss, a tensor.
        rate_of, seed_of: of a step.
    """
    named = dict(model.named_parameters())
    told = []

    def noise(parameter):
        return torch.normal(
            mean=0,
            std=1,
            size=parameter.data.size(),
            device=parameter.data.device,
            dtype=parameter.data.dtype,
        )

    def perturb(seed, scaling_factor):
        torch.manual_seed(seed)
        for name in names:
            z = noise(named[name])
            named[name].data = named[name].data + scaling_factor * z * EPS

    with torch.random.fork_rng(), torch.no_grad():
        for step in range(steps):
            seed, lr = seed_of(step), rate_of(step)
            perturb(seed, 1)
            loss1 = loss_of(model, step)
            perturb(seed, -2)
            loss2 = loss_of(model, step)
            projected_grad = ((loss1 - loss2) / (2 * EPS)).item()
            perturb(seed, 1)
            torch.manual_seed(seed)
            for name in names:
                theta, z = named[name], noise(named[name])
                if "bias" not in name and "layer_norm" not in name and "layernorm" not in name:
                    theta.data = theta.data - lr * (projected_grad * z + decay * theta.data)
                else:
                    theta.data = theta.data - lr * (projected_grad * z)
            told.append((loss1.item(), projected_grad))
    return told


def assert_published(case, helpers, decay, engine, model):
    """`engine`, made of a copy of `model`, and the published algorithm end in the same bits."""
    found = [
        engine.step(helpers.batch_of(case, step), seed=helpers.seed_of(step))
        for step in range(STEPS)
    ]
    state, order = engine.state_dict(), engine.parameter_order()
    engine.close()
    told = published(
        model,
        order,
        lambda net, step: case.loss(net, helpers.batch_of(case, step)),
        helpers.falling,
        helpers.seed_of,
        decay,
    )
    assert [(step.loss, step.projected_gradient) for step in found] == told
    assert all(g != 0 for _, g in told)
    wanted = model.state_dict()
    assert helpers.differing(state, {name: wanted[name] for name in state}) == []


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_zo2_equals_the_published_algorithm_to_the_last_bit(case, helpers, decay):
    model = case.make()
    settings = {"lr": helpers.falling, "weight_decay": decay, "loss": case.loss, **case.options}
    engine = ZO2(copy.deepcopy(model), **settings)
    assert_published(case, helpers, decay, engine, model)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", [ZO2, NaiveOffload])
def test_zo2_on_disk_equals_the_published_algorithm_to_the_last_bit(
    plain, helpers, decay, kind, tmp_path
):
    model = plain.make()
    engine = kind(
        copy.deepcopy(model),
        lr=helpers.falling,
        weight_decay=decay,
        loss=plain.loss,
        storage=tmp_path / "blocks.safetensors",
    )
    assert_published(plain, helpers, decay, engine, model)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_reference_equals_the_published_algorithm_to_the_last_bit(case, helpers, decay):
    reference, model = case.make(), case.make()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = helpers.run_mezo(
        case, STEPS, model=reference, order=names, weight_decay=decay, eps=EPS
    )
    told = published(
        model,
        names,
        lambda net, step: case.loss(net, helpers.batch_of(case, step)),
        helpers.falling,
        helpers.seed_of,
        decay,
    )
    assert wanted.found == told
    assert helpers.differing(wanted.state, model.state_dict()) == []


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_zeros_of_either_sign_and_a_flat_loss_change_no_bit_but_the_published_ones(
    plain, helpers, decay
):
    """A pruned model holds negative zeros, and a loss that does not move leaves g = 0."""
    model = plain.make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_contiguous():
                parameter.view(-1)[::3] = -0.0

    def flat(net, batch):
        return plain.loss(net, batch) * 0 + 1

    engine = ZO2(copy.deepcopy(model), lr=0.1, weight_decay=decay, loss=flat)
    for step in range(3):
        assert engine.step(helpers.batch_of(plain, step), seed=step).projected_gradient == 0
    state, order = engine.state_dict(), engine.parameter_order()
    engine.close()
    published(
        model,
        order,
        lambda net, step: flat(net, helpers.batch_of(plain, step)),
        lambda step: 0.1,
        lambda step: step,
        decay,
        steps=3,
    )
    wanted = model.state_dict()
    assert helpers.differing(state, {name: wanted[name] for name in state}) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_projected_gradient_is_rounded_in_the_dtype_of_the_loss(plain, helpers, dtype):
    engine = ZO2(plain.make(), loss=lambda net, batch: plain.loss(net, batch).to(dtype) * 1.1)
    found = [engine.step(helpers.batch_of(plain, step)).projected_gradient for step in range(5)]

    def rounded(to):
        return [torch.tensor(g, dtype=to).item() for g in found]

    assert rounded(dtype) == found
    assert (rounded(torch.float32) == found) == (dtype != torch.float64)


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_no_number_is_refused_before_it_reaches_a_weight(
    plain, helpers, rate
):
    engine = ZO2(plain.make(), lr=lambda step: rate if step else 1e-3, loss=plain.loss)
    engine.step(helpers.batch_of(plain, 0))
    with pytest.raises(UserError, match="the learning rate of step 1 is"):
        engine.step(helpers.batch_of(plain, 1))
    assert all(tensor.isfinite().all() for tensor in engine.state_dict().values())
    assert engine.steps == 1
