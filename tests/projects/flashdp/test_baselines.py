"""The methods that FlashDP is measured against compute what they say: flat and per-layer clipping,
by hand on every sample.
"""

import copy
import math

import pytest
import torch

from projects.flashdp.baselines import trainer
from projects.flashdp.decoder import Decoder
from projects.flashdp.experiments.cost import moved_bytes
from projects.flashdp.labels import FLAT, METHODS, clipping
from projects.flashdp.losses import per_sample_loss

IDS = torch.randint(0, 23, (5, 9), generator=torch.Generator().manual_seed(3))
IDS[:, 4] = IDS[:, 1]  # tokens that repeat
CLIP = 3.0


def model() -> Decoder:
    return Decoder(23, 16, 2, 2, 12, seed=1)


def gradients_of_samples() -> list[dict[str, torch.Tensor]]:
    found = []
    for sample in IDS:
        plain = model()
        per_sample_loss(plain(sample[None]), sample[None]).sum().backward()
        found.append({name: p.grad for name, p in plain.named_parameters()})
    return found


def by_hand(groups: list[list[str]], bound: float) -> dict[str, torch.Tensor]:
    """The mean of clipped gradients, each group with the same bound."""
    total = {name: torch.zeros_like(p) for name, p in model().named_parameters()}
    clipped = []
    for gradients in gradients_of_samples():
        for group in groups:
            norm = math.sqrt(sum(float(gradients[name].double().square().sum()) for name in group))
            clipped.append(norm > bound)
            for name in group:
                total[name] += min(1, bound / norm) * gradients[name] / len(IDS)
    assert any(clipped)
    return total


def of_trainer(method: str) -> dict[str, torch.Tensor]:
    """What the optimizer takes, without noise."""
    one = trainer(method, model(), len(IDS), clip=CLIP, sigma=0.0)
    one.backward(IDS, IDS)
    before = {
        name.removeprefix("_module."): p.detach().clone()
        for name, p in one.model.named_parameters()
    }
    inner = getattr(one.optimizer, "original_optimizer", one.optimizer)
    for group in inner.param_groups:
        group["lr"] = 1.0
    taken: dict[int, torch.Tensor] = {}
    inner.register_step_pre_hook(
        lambda optimizer, *_: taken.update(
            {id(p): p.grad.clone() for g in optimizer.param_groups for p in g["params"]}
        )
    )
    one.optimizer.step()
    found = {
        name.removeprefix("_module."): taken[id(p)] for name, p in one.model.named_parameters()
    }
    assert set(found) == set(before)
    return found


@pytest.mark.parametrize("method", FLAT)
def test_flat_methods_clip_the_whole_gradient_of_a_sample(method):
    names = list(dict(model().named_parameters()))
    wanted, found = by_hand([names], CLIP), of_trainer(method)
    for name in names:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("method", [m for m in METHODS if clipping(m) == "per layer"])
def test_per_layer_methods_clip_each_layer(method):
    """Opacus has a threshold a parameter, the others one a layer."""
    names = list(dict(model().named_parameters()))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(
            name if method.startswith("Opacus") else name.rsplit(".", 1)[0], []
        ).append(name)
    wanted, found = (
        by_hand(list(groups.values()), CLIP / math.sqrt(len(groups))),
        of_trainer(method),
    )
    for name in names:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6), name


def test_without_privacy_nothing_is_clipped():
    plain = model()
    per_sample_loss(plain(IDS), IDS).mean().backward()
    found = of_trainer("non-private")
    assert all(torch.equal(found[name], p.grad) for name, p in plain.named_parameters())


@pytest.mark.parametrize("method", [method for method in METHODS if method != "non-private"])
def test_every_private_method_adds_noise_of_one_size(method):
    """sigma times the clipping bound over the batch size, whichever way it clips."""
    # the gradients are nothing beside the noise
    one = trainer(method, model(), len(IDS), clip=1e-6, sigma=1e6, lr=0.0)
    inner = getattr(one.optimizer, "original_optimizer", one.optimizer)
    taken: list[torch.Tensor] = []
    inner.register_step_pre_hook(
        lambda optimizer, *_: taken.extend(
            p.grad.flatten().clone() for g in optimizer.param_groups for p in g["params"]
        )
    )
    one.step(IDS)
    noise = torch.cat(taken)
    assert float(noise.std()) == pytest.approx(1 / len(IDS), rel=0.05)


def test_two_steps_of_every_method_run():
    for method in METHODS:
        one = trainer(method, copy.deepcopy(model()), len(IDS))
        first, second = one.step(IDS), one.step(IDS)
        assert first.shape == second.shape == (len(IDS),)
        assert not torch.equal(first, second), method


def test_moved_bytes_are_those_read_and_written():
    a, b = torch.ones(10, 20), torch.ones(20, 30)
    assert moved_bytes(lambda: a @ b) == 4 * (200 + 600 + 300)
    out = torch.empty(10, 30)
    assert moved_bytes(lambda: torch.mm(a, b, out=out)) == 4 * (200 + 600 + 300)
    assert moved_bytes(lambda: out.add_(out)) == 4 * 3 * 300
    assert moved_bytes(lambda: out.view(30, 10).T) == 0
    assert moved_bytes(lambda: torch.empty(1000)) == 0
