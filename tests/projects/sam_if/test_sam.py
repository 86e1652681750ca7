"""The optimizer is SAM as it is written: against a naive one in plain tensor operations, in
float64.
"""

import copy

import pytest
import torch
from torch import nn

from projects.sam_if import SAM, Recipe, SAMProblem
from shared.errors import UserError
from shared.influence.objective import Objective
from shared.influence.params import Parameters


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches(count: int = 20):
    draw = torch.Generator().manual_seed(3)
    return [
        (torch.randn(6, 5, generator=draw).double(), torch.randint(0, 3, (6,), generator=draw))
        for _ in range(count)
    ]


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def naive_sam(model, parts_of_steps, rho, lr, momentum, decay):
    """w <- w - lr v, v <- momentum v + mean over parts of grad(w + rho g/|g|) + decay w, written
    out.
    """
    w = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in w]

    def slopes(at, batch):
        at = [p.clone().requires_grad_() for p in at]
        hidden = torch.tanh(batch[0] @ at[0].T + at[1])
        log_p = torch.log_softmax(hidden @ at[2].T + at[3], 1)
        return torch.autograd.grad(-log_p[torch.arange(len(batch[1])), batch[1]].mean(), at)

    for parts in parts_of_steps:
        mean = [torch.zeros_like(p) for p in w]
        for batch in parts:
            g = slopes(w, batch)
            size = sum(one.square().sum() for one in g).sqrt()
            there = slopes([p + rho * one / size for p, one in zip(w, g, strict=True)], batch)
            mean = [m + one / len(parts) for m, one in zip(mean, there, strict=True)]
        velocity = [momentum * v + m + decay * p for v, m, p in zip(velocity, mean, w, strict=True)]
        w = [p - lr * v for p, v in zip(w, velocity, strict=True)]
    return w


OPTIONS = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}


def closure_of(optimizer, model, batch):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("way", ["closure", "two steps", "parts"])
def test_twenty_steps_are_those_of_a_naive_sam(way):
    model = network()
    steps = (
        [[one] for one in batches()]
        if way != "parts"
        else [batches(40)[2 * i : 2 * i + 2] for i in range(20)]
    )
    expected = naive_sam(model, steps, 0.3, 0.2, 0.9, 0.01)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.3, **OPTIONS)
    for parts in steps:
        if way == "two steps":
            loss_of(model, parts[0]).backward()
            optimizer.first_step(zero_grad=True)
            loss_of(model, parts[0]).backward()
            optimizer.second_step(zero_grad=True)
        else:
            found = optimizer.step(*(closure_of(optimizer, model, batch) for batch in parts))
            assert found.isfinite()
    for a, b in zip(model.parameters(), expected, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_the_loss_returned_is_that_of_the_weights_before_the_step():
    model, batch = network(), batches(1)[0]
    before = float(loss_of(model, batch))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=5.0, lr=0.1)
    assert float(optimizer.step(closure_of(optimizer, model, batch))) == before


def test_the_run_of_the_estimators_is_this_optimizers():
    model = network()
    x = torch.cat([one[0] for one in batches(5)])
    y = torch.cat([one[1] for one in batches(5)])
    parameters = Parameters.of(copy.deepcopy(model).eval())
    objective = Objective(
        lambda w, part: nn.functional.cross_entropy(
            parameters.call(w, part[0]), part[1], reduction="none"
        ),
        (x, y),
        l2=0.01,
    )
    recipe = Recipe.epochs(
        SAMProblem(objective, 0.3),
        parameters.flat(),
        epochs=3,
        batch=8,
        lr=0.2,
        seed=0,
        momentum=0.9,
    )
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.3, **OPTIONS)
    for step in recipe.steps:
        optimizer.step(closure_of(optimizer, model, (x[step.rows], y[step.rows])))
    assert (Parameters.of(model.eval()).flat() - recipe.train()).abs().max() < 1e-11


def test_without_a_radius_it_is_the_base_optimizer():
    a, b = network(), network()
    sam, plain = (
        SAM(a.parameters(), torch.optim.Adam, rho=0.0, lr=0.01),
        torch.optim.Adam(b.parameters(), lr=0.01),
    )
    for batch in batches(5):
        sam.step(closure_of(sam, a, batch))
        closure_of(plain, b, batch)()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("way", ["closure", "two steps"])
def test_running_statistics_are_those_of_the_first_pass_alone(way):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()

    model, once, twice = make(), make(), make()
    batch = batches(1)[0]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=2.0, model=model, lr=0.1)
    unaware = SAM(twice.parameters(), torch.optim.SGD, rho=2.0, lr=0.1)
    if way == "closure":
        optimizer.step(closure_of(optimizer, model, batch))
    else:
        loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        optimizer.second_step()
    unaware.step(closure_of(unaware, twice, batch))
    loss_of(once, batch)  # one forward pass in train mode
    assert torch.equal(model[1].running_mean, once[1].running_mean)
    assert torch.equal(model[1].running_var, once[1].running_var)
    assert int(model[1].num_batches_tracked) == 1
    assert not torch.equal(twice[1].running_mean, once[1].running_mean)
    # the step is the same
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twice.parameters(), strict=True)
    )
    loss_of(model, batch)
    assert int(model[1].num_batches_tracked) == 2  # afterwards statistics are kept again


def test_each_group_has_its_radius_and_the_norm_is_over_all():
    model, batch = network(), batches(1)[0]
    before = [p.detach().clone() for p in model.parameters()]
    first, second = list(model[0].parameters()), list(model[2].parameters())
    optimizer = SAM(
        [{"params": first}, {"params": second, "rho": 0.0}], torch.optim.SGD, rho=0.5, lr=0.1
    )
    loss_of(model, batch).backward()
    size = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    optimizer.first_step()
    for p, old, rho in zip(model.parameters(), before, (0.5, 0.5, 0.0, 0.0), strict=True):
        assert (p - old - rho * p.grad / size).abs().max() < 1e-12


def test_its_state_is_saved_and_put_back():
    a, b = network(), network()
    first = SAM(a.parameters(), torch.optim.SGD, rho=0.3, **OPTIONS)
    second = SAM(b.parameters(), torch.optim.SGD, rho=0.3, **OPTIONS)
    steps = batches(6)
    for batch in steps[:3]:
        first.step(closure_of(first, a, batch))
    b.load_state_dict(a.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in steps[3:]:
        first.step(closure_of(first, a, batch))
        second.step(closure_of(second, b, batch))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_what_is_loaded_is_what_the_next_step_uses():
    """The rate and the radius of the saved optimizer, and what a scheduler makes of them after."""
    batch = batches(1)[0]
    saved = SAM(network().parameters(), torch.optim.SGD, rho=0.7, lr=0.3, momentum=0.9)
    model, same = network(), network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    wanted = SAM(same.parameters(), torch.optim.SGD, rho=0.7, lr=0.3, momentum=0.9)
    optimizer.load_state_dict(saved.state_dict())
    for one, on in ((optimizer, model), (wanted, same)):
        one.step(closure_of(one, on, batch))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True)
    )
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure_of(optimizer, model, batch))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_scheduler_changes_the_rate():
    model, batch = network(), batches(1)[0]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    optimizer.step(closure_of(optimizer, model, batch))
    scheduler.step()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure_of(optimizer, model, batch))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_would_go_wrong_is_refused():
    model, batch = network(), batches(1)[0]
    with pytest.raises(UserError, match="rho must be a number of at least 0, not -1"):
        SAM(model.parameters(), torch.optim.SGD, rho=-1, lr=0.1)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(UserError, match="no parameter has a gradient"):
        optimizer.first_step()
    with pytest.raises(UserError, match="second_step comes after first_step"):
        optimizer.second_step()
    with pytest.raises(UserError, match="give step\\(\\) a closure"):
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    (loss_of(model, batch) * float("nan")).backward()
    with pytest.raises(UserError, match="the gradient's norm is nan"):
        optimizer.first_step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.first_step()
    with pytest.raises(UserError, match="first_step was called twice"):
        optimizer.first_step()


def test_a_second_pass_that_fails_leaves_the_weights_as_they_were():
    model, batch = network(), batches(1)[0]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def closure():
        if calls:
            raise RuntimeError("out of memory")
        calls.append(1)
        return closure_of(optimizer, model, batch)()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
