"""EK-FAC: exact where gradients are Kronecker products, the same as curvlinops', and as written
down with explicit gradients.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shared.errors import UserError
from shared.influence import products
from shared.influence.ekfac import EKFAC, draw_labels
from shared.influence.params import Parameters
from shared.influence.solvers import cg


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(parameters: Parameters):
    return lambda w, data: F.cross_entropy(parameters.call(w, data[0]), data[1], reduction="none")


def small_conv() -> nn.Module:
    torch.manual_seed(2)
    layers = (
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 1), bias=False),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    return nn.Sequential(*layers).double()


def fitted(
    model: nn.Module, data: tuple[torch.Tensor, ...], **options
) -> tuple[EKFAC, Parameters, torch.Tensor]:
    """The fit and the explicit second moment of the gradients, [p, p]."""
    parameters = Parameters.of(model)
    losses = cross_entropy(parameters)
    rows = products.per_sample_gradients(losses, parameters.flat(), data)
    return (
        EKFAC.fit(parameters, parameters.flat(), losses, data, **options),
        parameters,
        rows.T @ rows / len(rows),
    )


def explicit(block_moment: torch.Tensor, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """(U_S x U_A) diag(Lambda) (U_S x U_A)^T by definition; Lambda is the diagonal of the exact
    moment in that basis.
    """
    basis = torch.kron(torch.linalg.eigh(g.T @ g)[1], torch.linalg.eigh(a.T @ a)[1])
    return basis @ torch.diag((basis.T @ block_moment @ basis).diagonal()) @ basis.T


def test_a_layer_is_exact_where_its_gradients_are_kronecker_by_construction():
    """Activations e_i and output gradients f_j, every pair equally often and of its own size: the
    second moment is diagonal.
    """
    model = nn.Linear(4, 3, bias=False).double()
    parameters = Parameters.of(model)
    turn_a, turn_g = torch.linalg.qr(randn(4, 4))[0], torch.linalg.qr(randn(3, 3, seed=1))[0]
    sizes = torch.rand(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
    x = torch.cat([(i + 1) * turn_a[i].expand(3, 4) for i in range(4)])
    g = torch.cat([sizes[i].unsqueeze(1) * turn_g for i in range(4)])

    def losses(w, data):
        return (parameters.call(w, data[0]) * data[1]).sum(1)

    fit = EKFAC.fit(parameters, parameters.flat(), losses, (x, g), damping=0.01)
    rows = products.per_sample_gradients(losses, parameters.flat(), (x, g))
    b = randn(12, 2)
    assert torch.allclose(fit.product(b), rows.T @ (rows @ b) / 12 + 0.01 * b, atol=1e-12)
    x_, info = fit.solve(b)
    assert torch.allclose(rows.T @ (rows @ x_) / 12 + 0.01 * x_, b, atol=1e-10)
    assert info.relative_residual < 1e-12


@pytest.mark.parametrize("chunk", [None, 7])
def test_linear_layers_are_as_defined(net, chunk):
    parameters, data = net.parameters, net.objective.data
    fit = EKFAC.fit(parameters, net.w, net.objective.losses, data, chunk=chunk, damping=1e-9)
    rows = products.per_sample_gradients(net.objective.losses, net.w, data)
    moment = rows.T @ rows / len(rows)
    x = torch.cat([data[0], torch.ones(53, 1)], 1)
    where = parameters.slices
    outer = rows[:, where["0.bias"]]  # the bias's gradient is that of the outputs
    order = torch.cat(
        [
            torch.cat(
                [
                    torch.arange(213)[where["0.weight"]].view(10, 7),
                    torch.arange(213)[where["0.bias"]].view(10, 1),
                ],
                1,
            )[row]
            for row in range(10)
        ]
    )
    expected = explicit(moment[order][:, order], x, outer)
    v = torch.zeros(213, dtype=torch.float64)
    v[order] = randn(80)
    assert torch.allclose(fit.product(v)[order], expected @ v[order], atol=1e-8)
    rest = torch.ones(213, dtype=torch.bool)
    rest[order] = False
    # nothing between layers
    assert torch.equal(fit.product(v)[rest], torch.zeros(133, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(213,), (213, 1), (213, 3)])
def test_the_inverse_undoes_the_product(net, shape):
    fit = EKFAC.fit(net.parameters, net.w, net.objective.losses, net.objective.data)
    b = randn(*shape)
    assert torch.allclose(fit.inverse(fit.product(b)), b, rtol=1e-8)
    assert fit.solve(b)[0].shape == shape


def test_the_damping_is_a_tenth_of_each_layers_mean(net):
    fit = EKFAC.fit(net.parameters, net.w, net.objective.losses, net.objective.data)
    assert [block.damping for block in fit.blocks] == pytest.approx(
        [0.1 * float(block.lambda_OI.mean()) for block in fit.blocks]
    )
    regularised = EKFAC.fit(
        net.parameters, net.w, net.objective.losses, net.objective.data, damping=0.5, l2=0.25
    )
    assert [block.damping for block in regularised.blocks] == [0.75] * 3


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_curvlinops_has_the_same(net, kind):
    curvlinops = pytest.importorskip("curvlinops")
    model, data = (
        (net.model, net.objective.data)
        if kind == "linear"
        else (small_conv(), (randn(6, 2, 5, 7), torch.tensor([0, 1, 2, 0, 1, 1])))
    )
    fit, parameters, _ = fitted(model, data, damping=0.0, l2=1e-3)
    operator = curvlinops.EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [data],
        fisher_type="empirical",
        separate_weight_and_bias=False,
    )
    v = randn(parameters.size, 2)
    assert torch.allclose(fit.product(v) - 1e-3 * v, operator @ v, atol=1e-12)


def test_a_convolution_is_a_linear_layer_on_patches():
    """Its mean Lambda is the mean square of the per-sample gradients: rotations keep lengths."""
    data = (randn(6, 2, 5, 7), torch.tensor([0, 1, 2, 0, 1, 1]))
    fit, parameters, moment = fitted(small_conv(), data)
    where = parameters.slices
    for block, names in zip(
        fit.blocks, (("0.weight", "0.bias"), ("2.weight",), ("4.weight", "4.bias")), strict=True
    ):
        trace = sum(float(moment.diagonal()[where[name]].sum()) for name in names)
        assert float(block.lambda_OI.sum()) == pytest.approx(trace)


def test_positions_of_a_sequence_are_summed_into_one_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    parameters = Parameters.of(model)

    def losses(w, data):
        return F.cross_entropy(parameters.call(w, data[0]).mean(1), data[1], reduction="none")

    data = (randn(9, 5, 3), torch.arange(9) % 2)
    fit = EKFAC.fit(parameters, parameters.flat(), losses, data)
    rows = products.per_sample_gradients(losses, parameters.flat(), data)
    assert sum(float(block.lambda_OI.sum()) for block in fit.blocks) == pytest.approx(
        float(rows.square().sum() / 9)
    )


def test_it_is_a_preconditioner():
    """Features of very different sizes make plain CG slow; EK-FAC knows their sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    parameters = Parameters.of(model)
    x = randn(300, 8) * torch.logspace(-1.5, 0.5, 8)
    logits = model(x).detach()
    data = (x, draw_labels(logits, torch.Generator().manual_seed(0)))
    losses = cross_entropy(parameters)
    fit = EKFAC.fit(parameters, parameters.flat(), losses, data, damping=1e-5)
    rows = products.per_sample_gradients(losses, parameters.flat(), data)
    matrix = rows.T @ rows / 300 + 1e-5 * torch.eye(parameters.size, dtype=torch.float64)
    x_, plain = cg(matrix.matmul, randn(parameters.size), tol=1e-6)
    y_, better = cg(matrix.matmul, randn(parameters.size), tol=1e-6, preconditioner=fit.inverse)
    assert (x_ - y_).norm() < 1e-2 * x_.norm()
    assert better.iterations < 0.7 * plain.iterations


def test_drawn_labels_follow_the_model():
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(20000, 3)
    drawn = draw_labels(logits, torch.Generator().manual_seed(0))
    assert torch.allclose(torch.bincount(drawn) / 20000, logits[0].softmax(0), atol=0.015)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x).tanh())


@pytest.mark.parametrize(
    ("model", "select", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
            ("*",),
            r"not parameter 1\.weight of a LayerNorm; select without it",
        ),
        (nn.Sequential(nn.Linear(3, 3)), ("0.bias",), r"not parameter 0\.bias"),
        (Twice(), ("layer.*",), "used once; layer is used again"),
        (Twice(), ("*",), "layer is used again|do not use layer spare"),
        (nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten()), ("*",), "ungrouped Conv2d"),
        (
            nn.Sequential(nn.Conv2d(2, 2, 1, padding="same"), nn.Flatten()),
            ("*",),
            "ungrouped Conv2d",
        ),
    ],
)
def test_what_no_rule_covers_is_refused(model, select, message):
    parameters = Parameters.of(model, select)
    with pytest.raises(UserError, match=message):
        EKFAC.fit(
            parameters,
            parameters.flat(),
            cross_entropy(parameters),
            (torch.randn(2, 3), torch.tensor([0, 1])),
        )


def test_a_layer_that_the_losses_do_not_use_is_refused():
    model = Twice()
    parameters = Parameters.of(model, ("spare.*",))
    with pytest.raises(UserError, match="do not use layer spare"):
        EKFAC.fit(
            parameters,
            parameters.flat(),
            cross_entropy(parameters),
            (torch.randn(2, 3), torch.tensor([0, 1])),
        )


def test_without_damping_a_singular_layer_is_refused(net):
    with pytest.raises(UserError, match="singular; use a damping above 0"):
        EKFAC.fit(
            net.parameters,
            net.w,
            lambda w, data: 0 * net.objective.losses(w, data),
            net.objective.data,
            damping=0.0,
        )
