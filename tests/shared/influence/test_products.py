"""Products against finite differences, against curvlinops, and against the explicit matrices;
passes are counted.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shared.errors import UserError
from shared.influence import products
from shared.influence.objective import Objective, class_curvature, class_losses
from shared.influence.params import Parameters
from shared.influence.products import count_passes


def directions(size: int, *k: int) -> torch.Tensor:
    return torch.randn(size, *k, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_hvp_is_the_finite_difference_of_the_gradient(net):
    v, step = directions(213), 1e-5
    difference = (
        products.gradient(net.objective, net.w + step * v)
        - products.gradient(net.objective, net.w - step * v)
    ) / (2 * step)
    assert torch.allclose(products.hvp(net.objective, net.w, v), difference, atol=1e-8)
    assert torch.allclose(net.objective.hvp(net.w, v), difference, atol=1e-8)


def test_columns_are_directions(net):
    v = directions(213, 3)
    for product in (
        net.objective.hvp,
        net.objective.ggn_vp,
        lambda w, v: products.hvp(net.objective, w, v),
    ):
        together = product(net.w, v)
        for column in range(3):
            assert torch.allclose(
                together[:, column], product(net.w, v[:, column]), rtol=0, atol=1e-13
            )
    assert net.objective.hvp(net.w, v[:, :0]).shape == (213, 0)


def test_the_dense_hessian_is_autograd_s(convex):
    expected = torch.autograd.functional.hessian(convex.objective, convex.w)
    assert torch.allclose(products.hessian(convex.objective, convex.w), expected, atol=1e-12)


def test_hessian_and_ggn_are_those_of_curvlinops(net):
    curvlinops = pytest.importorskip("curvlinops")
    x, y = net.objective.data
    arguments = (net.model, nn.CrossEntropyLoss(), list(net.model.parameters()), [(x, y)])
    v = directions(213, 2)
    for operator, product in (
        (curvlinops.HessianLinearOperator(*arguments), net.objective.hvp),
        (curvlinops.GGNLinearOperator(*arguments), net.objective.ggn_vp),
    ):
        expected = operator @ v + net.objective.l2 * v
        assert torch.allclose(product(net.w, v), expected.to(v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 7])
def test_operators_with_a_kept_graph_are_the_products(net, chunk):
    """On one vector, on columns, again and again, with weights; and every column is counted."""
    weights = torch.linspace(0, 2, net.objective.n, dtype=torch.float64)
    objective = replace(net.objective, chunk=chunk, weights=weights)
    v = directions(213, 3)
    for operator, product in (
        (objective.hessian(net.w), objective.hvp),
        (objective.ggn(net.w), objective.ggn_vp),
    ):
        with count_passes() as passes:
            for _ in range(2):
                assert torch.allclose(
                    operator(v[:, 1]), product(net.w, v[:, 1]), rtol=0, atol=1e-12
                )
                assert torch.allclose(operator(v), product(net.w, v), rtol=0, atol=1e-12)
        assert passes.curvature_products == 16
    without = Objective(net.objective.losses, net.objective.data)
    with pytest.raises(UserError, match="need the losses in two steps"):
        without.ggn(net.w)(v)


def test_ggn_vp_of_functions_is_that_of_the_objective(net):
    x, y = net.objective.data
    v = directions(213)
    found = products.ggn_vp(
        lambda w: net.parameters.call(w, x), lambda z: F.cross_entropy(z, y), net.w, v
    )
    assert torch.allclose(
        found + net.objective.l2 * v, net.objective.ggn_vp(net.w, v), rtol=0, atol=1e-13
    )


def test_losses_of_classes_are_torch_s_cross_entropy():
    """Values and first to third derivatives, for logits of any shape, far apart too."""
    logits = 5 * directions(3, 4, 5)
    logits[0, 0] = torch.tensor([800.0, -800.0, 0.0, 790.0, 1.0])
    labels = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]])
    v = directions(60).view(3, 4, 5)

    def torch_s(z):
        return F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none").view(3, 4)

    ours, expected = (
        (lambda z: class_losses(z, labels).square().sum()),
        (lambda z: torch_s(z).square().sum()),
    )
    assert torch.allclose(class_losses(logits, labels), torch_s(logits), rtol=1e-12, atol=1e-12)
    for z, label, curvature in zip(logits[1], labels[1], class_curvature(logits)[1], strict=True):
        by_autodiff = torch.func.hessian(lambda at, label=label: class_losses(at, label))(z)
        assert torch.allclose(curvature, by_autodiff, rtol=1e-12, atol=1e-14)
    for _ in range(3):
        assert torch.allclose(ours(logits), expected(logits), rtol=1e-9)
        ours, expected = (
            lambda z, f=f: (torch.func.grad(f)(z) * v).sum() for f in (ours, expected)
        )
    assert torch.allclose(ours(logits), expected(logits), rtol=1e-9)


def test_the_gauss_newton_matrix_of_a_linear_model_is_its_hessian(convex):
    v = directions(28)
    assert torch.allclose(
        convex.objective.ggn_vp(convex.w, v), convex.objective.hvp(convex.w, v), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("chunk", [None, 1, 20, 53, 100])
def test_per_sample_dots_are_the_explicit_gradients_dotted(net, chunk):
    objective = net.objective
    gradients = []
    for i in range(objective.n):  # one backward each
        w = net.w.clone().requires_grad_()
        loss = objective.losses(w, tuple(part[i : i + 1] for part in objective.data))
        gradients.append(torch.autograd.grad(loss.sum(), w)[0])
    explicit = torch.stack(gradients)
    v = directions(213, 3)
    rows = products.per_sample_gradients(objective.losses, net.w, objective.data, chunk)
    assert torch.allclose(rows, explicit, rtol=0, atol=1e-12)
    assert torch.allclose(
        products.per_sample_gradients(objective.losses, net.w, objective.data, chunk, v),
        explicit @ v,
        rtol=0,
        atol=1e-12,
    )
    dots = products.per_sample_dots(objective.losses, net.w, objective.data, v, chunk)
    assert torch.allclose(dots, explicit @ v, rtol=1e-9, atol=1e-12)
    single = products.per_sample_dots(objective.losses, net.w, objective.data, v[:, 0], chunk)
    assert torch.allclose(single, explicit @ v[:, 0], rtol=1e-9, atol=1e-12)


def test_dots_of_losses_that_depend_on_one_another(net):
    """A contrastive loss has no gradient per row of the data, but its derivative along a direction
    is the same.
    """
    x = net.objective.data[0][:12]

    def losses(w: torch.Tensor, data: tuple[torch.Tensor, ...]) -> torch.Tensor:
        z = net.parameters.call(w, data[0])
        return (z @ z.T).log_softmax(1).diagonal()

    v = directions(213)
    jacobian = torch.func.jacrev(lambda w: losses(w, (x,)))(net.w)
    assert torch.allclose(products.per_sample_dots(losses, net.w, (x,), v), jacobian @ v, rtol=1e-9)


def test_attention_has_forward_mode():
    """torch's fused kernels have none, and would be taken for such shapes."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
    parameters = Parameters.of(layer, ("self_attn.*", "linear1.weight"))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    w = parameters.flat() + 0.1 * directions(parameters.size)
    v, step = directions(parameters.size), 1e-5

    def losses(at: torch.Tensor, data: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return parameters.call(at, data[0]).tanh().mul(data[0]).sum((1, 2))

    objective = Objective(losses, (x,))
    difference = (objective.gradient(w + step * v) - objective.gradient(w - step * v)) / (2 * step)
    assert torch.allclose(objective.hvp(w, v), difference, atol=1e-7)
    assert torch.allclose(objective.sample_dots(w, v), objective.sample_gradients(w) @ v, rtol=1e-9)


def test_passes_are_counted_whole_whatever_the_chunks(net):
    v = directions(213, 4)
    with count_passes() as outer:
        with count_passes() as passes:
            net.objective.sample_dots(net.w, v)
            net.objective.sample_dots(net.w, v[:, 0])
            net.objective.hvp(net.w, v)
            net.objective.ggn_vp(net.w, v[:, 0])
            net.objective.gradient(net.w)
            net.objective.sample_gradients(net.w)
        products.hvp(net.objective, net.w, v[:, 0])
    assert passes == products.Passes(
        gradients=1, curvature_products=5, per_sample_gradients=1, forward_mode=5
    )
    assert outer.curvature_products == 6


# ---- the objective -------------------------------------------------------------------------------


def test_the_objective_is_the_weighted_sum_over_n_and_the_regulariser(net):
    x, y = net.objective.data
    weights = torch.rand(53, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centre = torch.full_like(net.w, 0.3)
    objective = Objective(net.objective.losses, (x, y), 0.7, weights, centre, 20)
    losses = F.cross_entropy(net.parameters.call(net.w, x), y, reduction="none")
    expected = (
        sum(weights[i] * losses[i] for i in range(53)) / 53 + 0.35 * ((net.w - centre) ** 2).sum()
    )
    assert torch.allclose(objective(net.w), expected, rtol=1e-13)
    assert torch.allclose(objective.sample_losses(net.w), losses, rtol=1e-13)
    w = net.w.clone().requires_grad_()
    slope = torch.autograd.grad(objective(w), w)[0]
    assert torch.allclose(objective.gradient(net.w), slope, rtol=0, atol=1e-13)
    v, step = directions(213), 1e-5
    difference = (objective.gradient(net.w + step * v) - objective.gradient(net.w - step * v)) / (
        2 * step
    )
    assert torch.allclose(objective.hvp(net.w, v), difference, atol=1e-8)


def test_sampled_hessians_are_unbiased_and_the_same_each_time(convex):
    sampled = convex.objective.sampled_hessians(convex.w, 30, seed=1)
    v = directions(28)
    assert torch.equal(sampled(3)(v), sampled(3)(v))
    mean = torch.stack([sampled(step)(v) for step in range(200)]).mean(0)
    whole = convex.objective.hvp(convex.w, v)
    assert (mean - whole).norm() < 0.05 * whole.norm()
