"""The loop trains, by its seed alone."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from shared.errors import UserError
from shared.vision.backbones import backbone
from shared.vision.images import synthetic
from shared.vision.training import batches, train

DATA = synthetic(65, 4, size=8, seed=0)
SGD = partial(torch.optim.SGD, lr=0.1)


def trained(seed=0, epochs=3, callback=None, optimiser=SGD, batch=16):
    model = nn.Sequential(backbone("residual-8", (3, 8, 8), seed=0), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight.zero_()
    return train(
        model,
        (DATA.images(), DATA.labels),
        lambda x, y: cross_entropy(model(x), y),
        epochs=epochs,
        batch=batch,
        seed=seed,
        optimiser=optimiser,
        callback=callback,
    )


def test_it_learns_and_says_how_far_it_is():
    told = []
    model = trained(
        epochs=40,
        callback=lambda *line: told.append(line),
        optimiser=partial(torch.optim.Adam, lr=0.03),
    )
    assert [epoch for epoch, _ in told] == list(range(1, 41))
    assert told[-1][1] < told[0][1] / 2
    assert not model.training
    with torch.no_grad():
        right = model(DATA.images()).argmax(1) == DATA.labels
    assert float(right.float().mean()) > 0.9


def test_the_loss_that_is_told_is_a_mean_over_samples():
    model, told, data = nn.Linear(1, 1), [], torch.arange(5.0).unsqueeze(1)
    train(
        model, (data,), lambda x: model(x).mean(), epochs=1, batch=2, seed=0,
        optimiser=partial(SGD, lr=0), callback=lambda _, loss: told.append(loss),
    )  # fmt: skip
    assert told == [pytest.approx(float(model(data).detach().mean()))]


def test_equal_seeds_give_equal_weights():
    torch.manual_seed(5)
    a = trained(seed=1).state_dict()
    torch.manual_seed(5)
    b = trained(seed=1).state_dict()
    torch.manual_seed(5)
    c = trained(seed=2).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own():
    first, second = batches(65, 16, 0, 1), batches(65, 16, 0, 2)
    assert sorted(torch.cat(first).tolist()) == list(range(65))
    assert [len(rows) for rows in first] == [16, 16, 16, 17]  # none is left alone
    assert [len(rows) for rows in batches(1, 16, 0, 1)] == [1]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat(first), torch.cat(batches(65, 16, 0, 1)))


def test_frozen_weights_stay():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(requires_grad=False)
    before = [one.clone() for one in model.parameters()]
    data = (torch.randn(8, 2), torch.zeros(8, dtype=torch.int64))
    train(
        model, data, lambda x, y: cross_entropy(model(x), y), epochs=1, batch=4, seed=0,
        optimiser=partial(torch.optim.AdamW, lr=0.1),
    )  # fmt: skip
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert same == [True, True, False, False]


def test_a_loss_that_is_not_finite_stops_it():
    model = nn.Linear(1, 1)

    def broken(x):
        return model(x).mean() * float("nan")

    with pytest.raises(UserError, match="the loss is nan in epoch 1; lower the learning rate"):
        train(model, (torch.ones(2, 1),), broken, epochs=1, batch=2, seed=0, optimiser=SGD)
