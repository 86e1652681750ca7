"""The reference itself, against code that shares nothing with it: plain Python loops and formulas
written out.
"""

import pytest
import torch
from torch import nn

from projects.zo2 import MeZO


class Quadratic(nn.Module):
    """1/2 sum_i a_i (x_i - i)^2 + the sum of a matrix that is called a bias."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=dtype))
        self.bias = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=dtype))
        self.fixed = nn.Parameter(torch.tensor([3.0], dtype=dtype), requires_grad=False)

    def forward(self, batch):
        a = torch.tensor([1.0, 2.0, 3.0], dtype=self.x.dtype)
        i = torch.arange(3, dtype=self.x.dtype)
        return batch * (0.5 * (a * (self.x - i) ** 2).sum() + self.bias.sum() + self.fixed.sum())


def _loss(model, batch):
    return model(batch)


def test_mezo_on_a_quadratic_equals_a_loop_over_numbers():
    eps, decay, factors = 1e-3, 0.3, [1.0, 2.0, 0.5, 1.0, 3.0]
    model = Quadratic()
    mezo = MeZO(model, lr=lambda t: 0.01 / (t + 1), eps=eps, weight_decay=decay, loss=_loss)
    x, bias = [0.5, -1.0, 2.0], [1.0, 2.0]

    def value(x, bias, factor):
        return factor * (sum(0.5 * (k + 1) * (x[k] - k) ** 2 for k in range(3)) + sum(bias) + 3.0)

    for t, factor in enumerate(factors):
        generator = torch.Generator().manual_seed(t)
        zx = torch.empty(3, dtype=torch.float64).normal_(generator=generator).tolist()
        zb = torch.empty(2, dtype=torch.float64).normal_(generator=generator).tolist()
        plus = value(
            [v + eps * z for v, z in zip(x, zx, strict=True)],
            [v + eps * z for v, z in zip(bias, zb, strict=True)],
            factor,
        )
        minus = value(
            [v - eps * z for v, z in zip(x, zx, strict=True)],
            [v - eps * z for v, z in zip(bias, zb, strict=True)],
            factor,
        )
        g = (plus - minus) / (2 * eps)
        lr = 0.01 / (t + 1)
        x = [v - lr * (g * z + decay * v) for v, z in zip(x, zx, strict=True)]
        bias = [v - lr * (g * z) for v, z in zip(bias, zb, strict=True)]
        loss, found = mezo.step(factor, t)
        assert loss == pytest.approx(plus, rel=1e-13)
        assert found == pytest.approx(g, rel=1e-9)
    assert model.x.tolist() == pytest.approx(x, rel=1e-9)
    assert model.bias.tolist() == [pytest.approx(bias, rel=1e-9)]
    assert model.fixed.tolist() == [3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_expression_is_rounded_as_published(dtype):
    """One step, with the published expressions written out in the tensor's own dtype."""
    model = Quadratic(dtype)
    x = model.x.detach().clone()
    MeZO(model, lr=0.02, eps=1e-3, weight_decay=0.1, loss=lambda m, b: m(b) * 0 + 1).step(1.0, 5)
    z = torch.normal(0.0, 1.0, (3,), generator=torch.Generator().manual_seed(5), dtype=dtype)
    x = x + 1 * z * 1e-3
    x = x + -2 * z * 1e-3
    x = x + 1 * z * 1e-3
    x = x - 0.02 * (0.0 * z + 0.1 * x)
    assert torch.equal(model.x, x)


def test_names_with_these_parts_do_not_decay():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "some_bias", "my_layer_norm_gain", "layernorm", "ln_f", "norm"):
                setattr(self, name, nn.Parameter(torch.ones(2)))

        def forward(self, _):
            return self.weight.sum() * 0

    model = Named()
    MeZO(model, lr=0.1, eps=1e-9, weight_decay=1.0, loss=_loss).step(None, 1)
    shrunk = {name for name, p in model.named_parameters() if p[0] < 0.95}
    assert shrunk == {"weight", "ln_f", "norm"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_no_update(bad):
    model = Quadratic()
    before = model.x.detach().clone()
    mezo = MeZO(model, lr=1.0, weight_decay=1.0, loss=_loss)
    _, g = mezo.step(bad, 1)
    assert g - g != 0
    torch.testing.assert_close(model.x.detach(), before, rtol=0, atol=1e-12)
    assert mezo.steps == 1


def test_the_direction_is_that_of_the_given_order():
    a, b = Quadratic(), Quadratic()
    MeZO(a, loss=_loss, lr=0.1).step(1.0, 3)
    MeZO(b, loss=_loss, lr=0.1, parameters=[("bias", b.bias), ("fixed", b.fixed), ("x", b.x)]).step(
        1.0, 3
    )
    assert not torch.equal(a.x, b.x)
    assert b.fixed.item() == 3.0


def test_micro_batches_are_averaged():
    a, b = Quadratic(), Quadratic()
    loss_a, g_a = MeZO(a, loss=_loss, lr=0.1).step([1.0, 2.0, 6.0], 3)
    loss_b, g_b = MeZO(b, loss=_loss, lr=0.1).step(3.0, 3)
    assert loss_a == pytest.approx(loss_b)
    assert g_a == pytest.approx(g_b, rel=1e-9)
    torch.testing.assert_close(a.x, b.x)


def test_mezo_descends():
    model = Quadratic(torch.float32)
    mezo = MeZO(model, lr=5e-2, eps=1e-3, loss=lambda m, b: m(b) - m.bias.sum())
    for seed in range(400):
        mezo.step(1.0, seed)
    torch.testing.assert_close(model.x.detach(), torch.tensor([0.0, 1.0, 2.0]), rtol=0, atol=0.02)
