"""Alignment against a plain loop over tasks, and what it must leave alone."""

import copy
import math

import pytest
import torch
from idp_problems import network, normal, tasks, uniform
from torch import nn
from torch.nn import functional as F

from projects.idp.align import FINE_TUNING, Alignment, Losses, align, task_losses
from projects.idp.classify import embed, ridge_head
from projects.idp.norms import TaskNetwork, in_scope
from projects.idp.pseudo import pseudo_queries
from shared.errors import UserError

WAYS, SCALE = 3, 4.0
SEEDS = [11, 12, 13]
BOOK = normal(4, 7, seed=30, dtype=torch.float32)


def adapt(how, support=None, seeds=SEEDS, source=None, book=BOOK):
    support = tasks()[0] if support is None else support
    return align(source or network(), support, WAYS, book, SCALE, how, seeds)


def inverse_operator(u):
    n, d = u.shape
    return u.T @ torch.linalg.inv(u @ u.T + n / d * torch.eye(n)) @ u


def by_hand(source, support, seed, how, weights):
    """One task with torch's own BatchNorm, explicit inverses and a loop over classes."""
    model = copy.deepcopy(source).train()
    affine = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            affine += [module.weight, module.bias]
    adam = torch.optim.Adam(affine, lr=how.rate)
    shots = len(support) // WAYS
    y = torch.arange(WAYS).repeat_interleave(how.pseudo)
    for step in range(how.steps):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1 / (1 + math.exp(step))
        extra = pseudo_queries(support[None], WAYS, how.pseudo, [seed], step)[0]
        cells = model.spatial_map(torch.cat([support, extra])).flatten(2).mT
        query = cells[len(support) :]
        books = [cells[c * shots : (c + 1) * shots].flatten(0, 1) for c in range(WAYS)]

        def logits(q, books=books):
            h = [inverse_operator(book) for book in books]
            raw = torch.stack([-(q - q @ one).square().sum(2).mean(1) for one in h], 1)
            low, high = raw.min(1, keepdim=True).values, raw.max(1, keepdim=True).values
            return SCALE * (raw - low) / (high - low)

        target, proxy = logits(query), logits(query @ inverse_operator(BOOK))
        kl = F.kl_div(target.log_softmax(1), proxy.softmax(1), reduction="batchmean")
        loss = (
            weights[0] * F.cross_entropy(target, y)
            + weights[1] * F.cross_entropy(proxy, y)
            + weights[2] * kl
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval()


@pytest.mark.parametrize("weights", [(1, 0, 0), (1, 1, 1), (0, 0.5, 2)])
def test_many_tasks_at_once_are_a_plain_loop_over_tasks(weights):
    source, (support, query) = network(), tasks()
    how = Alignment(steps=3, rate=1e-2, pseudo=2, losses=Losses(*weights))
    found = adapt(how, support, source=source)
    cells = embed(found, support, query, "inductive")[1]
    for n, seed in enumerate(SEEDS):
        model = by_hand(source, support[n], seed, how, weights)
        with torch.no_grad():
            wanted = model.spatial_map(query[n]).flatten(2).mT
        assert torch.allclose(cells[n], wanted, atol=2e-4)
        for name, norm in found.norms.items():
            own = model.get_submodule(name)
            assert torch.allclose(norm.running_mean[n], own.running_mean, atol=1e-5)
            assert torch.allclose(norm.running_var[n], own.running_var, atol=1e-5)
            assert torch.allclose(norm.weight[n], own.weight, atol=1e-4)


def test_together_or_alone_and_in_any_order_a_task_ends_alike():
    support, query = tasks()
    how = Alignment(steps=2, rate=1e-2, pseudo=2)

    def scores(order):
        picked = support[order]
        found = adapt(how, picked, [SEEDS[n] for n in order])
        return ridge_head(*embed(found, picked, query[order], "inductive"), WAYS)

    together = scores([0, 1, 2])
    turned = scores([2, 0, 1])
    assert torch.allclose(together[[2, 0, 1]], turned, atol=1e-5)
    for n in range(3):
        assert torch.allclose(scores([n])[0], together[n], atol=1e-5)


def test_without_steps_it_is_the_ridge_head_bit_by_bit():
    source, (support, query) = network(), tasks()
    found = adapt(Alignment(steps=0), support, source=source)
    plain = TaskNetwork(source, 3)
    for inference in ("inductive", "transductive"):
        assert torch.equal(
            ridge_head(*embed(found, support, query, inference), WAYS),
            ridge_head(*embed(plain, support, query, inference), WAYS),
        )
    with torch.no_grad():  # and the source network itself
        own = torch.stack([source.spatial_map(one).flatten(2).mT for one in query])
    assert torch.allclose(embed(found, support, query, "inductive")[1], own, atol=1e-5)


def test_without_the_proxy_losses_the_codebook_does_not_matter_bit_by_bit():
    how = Alignment(steps=2, rate=1e-2, pseudo=2, losses=FINE_TUNING)
    one, other = adapt(how), adapt(how, book=normal(9, 7, seed=31, dtype=torch.float32))
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with_proxies = adapt(Alignment(steps=2, rate=1e-2, pseudo=2))
    assert not torch.equal(
        next(iter(one.norms.values())).weight, next(iter(with_proxies.norms.values())).weight
    )


def test_only_affine_parameters_change_and_the_source_does_not():
    source = network()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    found = adapt(Alignment(steps=2, rate=1e-2, pseudo=2), source=source)
    for name, value in source.state_dict().items():
        assert torch.equal(value, before[name]), name
    norms = {f"network.{name}" for name in found.norms}
    for name, value in found.state_dict().items():
        if name.rpartition(".")[0] in norms:
            continue
        assert torch.equal(value, before[name.removeprefix("network.")]), name
    assert all(
        not torch.equal(norm.weight, source.get_submodule(name).weight.expand(3, -1))
        for name, norm in found.norms.items()
    )


@pytest.mark.parametrize("scope", ["main", "early", "late"])
def test_a_scope_limits_what_is_trained(scope):
    source = network()
    found = adapt(Alignment(steps=1, rate=1e-2, pseudo=1, scope=scope), source=source)
    changed = [
        name
        for name, norm in found.norms.items()
        if not torch.equal(norm.weight, source.get_submodule(name).weight.expand(3, -1))
    ]
    assert changed == in_scope(list(found.norms), scope)
    assert 0 < len(changed) < len(found.norms)


def test_where_proxies_are_their_targets_they_say_nothing():
    """U spans the width and the penalty vanishes: P = T, so that the KL term is 0, and CE(P) is
    CE(T).
    """
    cells, books = normal(2, 6, 4, 7, seed=32), normal(2, 3, 5, 7, seed=33)
    labels = torch.arange(3).repeat_interleave(2).expand(2, -1)
    whole = normal(20, 7, seed=34)

    def loss(*weights):
        how = Alignment(losses=Losses(*weights), lam=1e-9)
        return task_losses(cells, labels, books, whole, SCALE, how)

    assert torch.allclose(loss(0, 0, 1), torch.zeros(2, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(loss(0, 1, 0), loss(1, 0, 0), atol=1e-6)
    assert bool(
        (
            task_losses(
                cells, labels, books, BOOK.double(), SCALE, Alignment(losses=Losses(0, 0, 1))
            )
            > 1e-3
        ).all()
    )


def test_as_released_the_class_codebooks_are_noise():
    how = Alignment(steps=1, rate=1e-2, pseudo=2)
    plain, released = adapt(how), adapt(Alignment(steps=1, rate=1e-2, pseudo=2, released=True))
    first = next(iter(plain.norms))
    assert not torch.equal(plain.norms[first].bias, released.norms[first].bias)


def test_pseudo_queries_keep_class_order_and_range_and_depend_on_seed_and_step():
    support = torch.stack([torch.full((3, 9, 9), value) for value in (0.1, 0.1, 0.9, 0.9)])[None]
    found = pseudo_queries(support, 2, 5, [3], 0)
    assert found.shape == (1, 10, 3, 9, 9)
    assert float(found[0, :5].max()) < 0.2
    assert float(found[0, 5:].min()) > 0.8
    images = uniform(1, 4, 3, 9, 9, seed=1)
    assert torch.equal(pseudo_queries(images, 2, 5, [3], 0), pseudo_queries(images, 2, 5, [3], 0))
    assert not torch.equal(
        pseudo_queries(images, 2, 5, [3], 0), pseudo_queries(images, 2, 5, [3], 1)
    )
    assert not torch.equal(
        pseudo_queries(images, 2, 5, [3], 0), pseudo_queries(images, 2, 5, [4], 0)
    )
    many = pseudo_queries(images, 2, 300, [5], 0)[0]
    assert 0 <= float(many.min()) <= float(many.max()) <= 1
    same = many == images[0, (torch.arange(2)[:, None] * 2 + torch.arange(300) % 2).flatten()]
    share = float(same.flatten(1).all(1).float().mean())
    assert 0.02 < share < 0.12  # unchanged: .7 * (.7 + .3 / 6) * .5 * .5 * .5, about 0.066


def test_images_that_are_not_square_keep_their_shape():
    support = uniform(1, 2, 3, 6, 9, seed=2)
    assert pseudo_queries(support, 2, 20, [3], 0).shape == (1, 40, 3, 6, 9)


def test_a_network_without_batch_norm_is_refused():
    class Plain(nn.Conv2d):
        def spatial_map(self, images):
            return self(images)

    with pytest.raises(UserError, match="has no BatchNorm2d layer"):
        adapt(Alignment(steps=1), source=Plain(3, 7, 3))


def test_another_width_and_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="7 channels and the codebook is of width 8"):
        adapt(Alignment(steps=1, pseudo=1), book=BOOK.new_ones(4, 8))
    support = tasks()[0]
    support[1, 0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        adapt(Alignment(steps=1, pseudo=1), support)
