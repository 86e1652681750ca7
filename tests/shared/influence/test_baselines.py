"""Scores: against retraining and closed forms, in one convention of sign and scale; counted in
passes.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from shared.errors import UserError
from shared.influence import baselines, products, retrain
from shared.influence.ekfac import EKFAC
from shared.influence.objective import Objective
from shared.influence.params import Parameters
from shared.influence.solvers import cg, dense, woodbury


def exact(problem):
    return partial(dense, problem.objective.hessian(problem.w))


# ---- influence is the derivative of retraining ---------------------------------------------------


def test_the_removal_effect_is_the_derivative_of_the_optimum_in_the_weight(convex):
    samples, step = [0, 7, 60], 1e-4
    predicted = baselines.removal_effect(convex.objective, convex.w, samples, exact(convex))
    for column, k in enumerate(samples):
        up, down = torch.ones(61, dtype=torch.float64), torch.ones(61, dtype=torch.float64)
        up[k], down[k] = 1 + step, 1 - step
        # per unit of weight taken away: removal takes 1
        derivative = (convex.train(down).w - convex.train(up).w) / (2 * step)
        assert (predicted[:, column] - derivative).norm() < 1e-6 * derivative.norm()


def test_the_sign_is_that_of_leaving_one_out(convex):
    """removal_effect ~ w_without - w, score ~ metric_without - metric, and both to a few
    per cent.
    """
    samples = list(range(0, 61, 4))
    truth = retrain.leave_one_out(convex.train, 61, samples)
    assert float(truth.residuals.max()) <= 1e-11
    change = truth.w - convex.w
    effect = baselines.removal_effect(convex.objective, convex.w, samples, exact(convex)).T
    assert (effect - change).norm() < 0.3 * change.norm()
    scores = baselines.influence(convex.objective, convex.w, convex.metric, exact(convex))[samples]
    metric = torch.stack([convex.metric(w) for w in truth.w]) - convex.metric(convex.w)
    assert scores.shape == metric.shape == (16, 5)
    assert float(torch.corrcoef(torch.stack([scores.flatten(), metric.flatten()]))[0, 1]) > 0.98
    own = baselines.self_influence(convex.objective, convex.w, exact(convex), chunk=7)[samples]
    losses = convex.objective
    rise = torch.stack(
        [
            losses.sample_losses(w)[k] - losses.sample_losses(convex.w)[k]
            for k, w in zip(samples, truth.w, strict=True)
        ]
    )
    assert (rise > 0).all()  # without it, a sample is explained less well: it was helpful to itself
    assert (own > 0).all()
    assert torch.allclose(own, rise, rtol=0.5)


def test_linear_regression_has_the_closed_form_of_sherman_and_morrison():
    """Ridge with squared loss: w_without - w = - M^-1 x e / (n - h), with M the Hessian, e the
    residual, h = x M^-1 x the leverage.
    """
    n, p, l2 = 40, 6, 0.1
    draw = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(n, p, generator=draw, dtype=torch.float64),
        torch.randn(n, generator=draw, dtype=torch.float64),
    )
    objective = Objective(lambda w, data: (data[0] @ w - data[1]).square() / 2, (x, y), l2=l2)
    matrix = x.T @ x / n + l2 * torch.eye(p, dtype=torch.float64)
    w = torch.linalg.solve(matrix, x.T @ y / n)
    samples = [0, 5, 39]
    effect = baselines.removal_effect(
        objective, w, samples, partial(cg, objective.hessian(w), tol=1e-12)
    ).T
    truth = (
        retrain.leave_one_out(
            lambda weights: retrain.newton_root(
                lambda v: (x.T @ (weights * (x @ v - y))) / n + l2 * v, w
            ),
            n,
            samples,
        ).w
        - w
    )
    for row, k in enumerate(samples):
        leverage = x[k] @ torch.linalg.solve(matrix, x[k])
        first_order = torch.linalg.solve(matrix, x[k]) * (x[k] @ w - y[k]) / n
        assert torch.allclose(effect[row], first_order, atol=1e-11)
        assert torch.allclose(truth[row], first_order / (1 - leverage / n), atol=1e-11)


def test_a_positive_score_is_a_helpful_sample_and_every_method_says_so(convex):
    """A copy of the query among the samples is helpful to it; the same picture with a wrong label
    is harmful.
    """
    x, y = convex.objective.data
    query, label = convex.query[0][0], convex.query[1][0]
    data = (
        torch.cat([x, query.expand(2, -1)]),
        torch.cat([y, torch.stack([label, (label + 1) % 4])]),
    )
    objective = Objective.of_outputs(
        convex.objective.outputs, convex.objective.output_losses, data, l2=0.03
    )
    w = retrain.minimise(objective, convex.w, tol=1e-10).w

    def metric(at):
        return convex.metric(at)[0]

    def margins(at, part):
        return baselines.margins(convex.parameters.call(at, part[0]), part[1])

    rows = objective.sample_gradients(w)
    solve = partial(dense, objective.hessian(w))
    found = {
        "influence": baselines.influence(objective, w, metric, solve),
        "fisher": baselines.influence(objective, w, metric, partial(woodbury, rows, damping=0.03)),
        "ekfac": baselines.influence(
            objective, w, metric, EKFAC.fit(convex.parameters, w, objective.losses, data).solve
        ),
        "gradient_dot": baselines.gradient_dot(objective, w, metric),
        "tracin": baselines.tracin(objective, [convex.w, w], [0.1, 0.2], metric),
        "trak": baselines.trak(margins, data, [w], metric, dimension=20, seed=0),
    }
    for name, scores in found.items():
        assert scores.shape == (63,), name
        assert scores[61] > 0, name
        assert scores[62] < 0, name
    # the wrong label is the most harmful by its loss too
    assert baselines.loss_value(objective, w).argmin() == 62


# ---- the ways to the same number -----------------------------------------------------------------


def test_scores_are_the_gradients_dotted_with_the_effects(net):
    solve = partial(dense, net.objective.ggn(net.w))
    scores = baselines.influence(net.objective, net.w, net.metric, solve)
    effect = baselines.removal_effect(net.objective, net.w, range(53), solve)
    assert torch.allclose(
        scores, effect.T @ torch.func.jacrev(net.metric)(net.w).T, rtol=1e-9, atol=1e-13
    )
    one = baselines.influence(net.objective, net.w, lambda w: net.metric(w)[2], solve)
    assert torch.allclose(one, scores[:, 2], rtol=1e-9, atol=1e-14)
    own = baselines.self_influence(net.objective, net.w, solve)
    assert torch.allclose(
        own, 53 * (net.objective.sample_gradients(net.w) * effect.T).sum(1) / 53, rtol=1e-9
    )


def test_all_samples_are_scored_by_one_solve_and_one_forward_mode_pass(convex):
    with products.count_passes() as passes:
        baselines.influence(
            convex.objective,
            convex.w,
            lambda w: convex.metric(w).mean(),
            partial(cg, convex.objective.hessian(convex.w)),
        )
    assert (passes.forward_mode, passes.per_sample_gradients, passes.gradients) == (1, 0, 1)
    assert passes.curvature_products <= 28 + 4


def test_a_sample_of_weight_0_has_no_effect(convex):
    weights = torch.ones(61, dtype=torch.float64)
    weights[[3, 8]] = torch.tensor([0.0, 3.0], dtype=torch.float64)
    weighted = Objective(convex.objective.losses, convex.objective.data, 0.03, weights)
    solve = exact(convex)
    effect = baselines.removal_effect(weighted, convex.w, [3, 8, 9], solve)
    plain = baselines.removal_effect(convex.objective, convex.w, [3, 8, 9], solve)
    assert torch.equal(effect[:, 0], torch.zeros(28, dtype=torch.float64))
    assert torch.allclose(effect[:, 1:], plain[:, 1:] * torch.tensor([3.0, 1.0]))
    scores = baselines.influence(weighted, convex.w, convex.metric, solve)
    assert torch.equal(scores[3], torch.zeros(5, dtype=torch.float64))


def test_tracin_sums_checkpoints_by_their_rates(net):
    other = net.w + 0.1
    at = [
        net.objective.sample_gradients(w) @ torch.func.jacrev(net.metric)(w).T / 53
        for w in (net.w, other)
    ]
    assert torch.allclose(
        baselines.tracin(net.objective, [net.w, other], [0.5, 2.0], net.metric),
        0.5 * at[0] + 2 * at[1],
        rtol=1e-9,
    )
    with pytest.raises(UserError, match="a learning rate per checkpoint; there are 1 for 2"):
        baselines.tracin(net.objective, [net.w, other], [0.5], net.metric)


def test_tracin_of_every_step_predicts_a_short_training_without_the_sample(convex):
    """Gradient descent with a small rate: to first order in it, removal changes the metric by what
    TracIn sums up.
    """
    rate, steps, k = 1e-4, 5, 3

    def descend(objective):
        path = [torch.zeros_like(convex.w)]
        for _ in range(steps):
            path.append(path[-1] - rate * objective.gradient(path[-1]))
        return path

    x, y = convex.objective.data
    path = descend(convex.objective)
    without = descend(Objective(convex.objective.losses, (x, y), 0.03, retrain.without(61, [k])))
    scores = baselines.tracin(convex.objective, path[:-1], [rate] * steps, convex.metric)
    assert torch.allclose(
        scores[k], convex.metric(without[-1]) - convex.metric(path[-1]), rtol=1e-2
    )


# ---- TRAK ----------------------------------------------------------------------------------------


def logistic(n: int = 80, p: int = 5):
    """Binary logistic regression in the logits (0, x w): its margins are linear in w."""
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(n, p, generator=draw, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(n, generator=draw, dtype=torch.float64) > 0).long()

    def margins(w, data):
        logits = torch.stack([torch.zeros(len(data[0]), dtype=w.dtype), data[0] @ w], 1)
        return baselines.margins(logits, data[1])

    return x, y, margins


def test_trak_without_projection_is_its_formula():
    x, y, margins = logistic()
    w = torch.tensor([0.5, -0.2, 0.1, 0.0, 0.3], dtype=torch.float64)
    phi = x * (2 * y - 1).unsqueeze(1)
    test = torch.tensor([1.0, 0.5, -1.0, 0.2, 0.3], dtype=torch.float64)
    p_right = torch.sigmoid(phi @ w)
    tau = test @ torch.linalg.inv(phi.T @ phi) @ phi.T * (1 - p_right)
    found = baselines.trak(
        margins, (x, y), [w], lambda at: at @ test, dimension=5, seed=0, chunk=13
    )
    assert torch.allclose(found, -tau)
    both = baselines.trak(margins, (x, y), [w, 2 * w], lambda at: at @ test, dimension=5, seed=0)
    slope = (1 - p_right + 1 - torch.sigmoid(2 * phi @ w)) / 2
    assert torch.allclose(both, -(test @ torch.linalg.inv(phi.T @ phi) @ phi.T) * slope)


def test_the_margin_is_the_log_odds():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(1)[torch.arange(6), labels]
    assert torch.allclose(baselines.margins(logits, labels), torch.log(p / (1 - p)))


def test_projections_keep_dot_products_in_the_mean():
    a, b = (
        torch.randn(300, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in (0, 1)
    )
    products_ = [
        float((a @ m) @ (b @ m))
        for m in (baselines.projection(300, 50, seed, a) for seed in range(200))
    ]
    assert np.mean(products_) == pytest.approx(float(a @ b), abs=3 * np.std(products_) / 200**0.5)
    assert torch.equal(baselines.projection(4, 9, 0, a), torch.eye(4, dtype=torch.float64))
    with pytest.raises(UserError, match="at least 1 dimension"):
        baselines.projection(4, 0, 0, a)


def test_trak_of_few_samples_needs_damping():
    x, y, margins = logistic(3)
    with pytest.raises(UserError, match="singular; add damping or project to less"):
        baselines.trak(
            margins,
            (x, y),
            [torch.zeros(5, dtype=torch.float64)],
            lambda at: at.sum(),
            dimension=5,
            seed=0,
        )
    with pytest.raises(UserError, match="at least one trained model"):
        baselines.trak(margins, (x, y), [], lambda at: at.sum(), dimension=5, seed=0)


# ---- what a user can get wrong -------------------------------------------------------------------


def test_wrong_samples_metrics_and_data_are_refused(convex):
    for k in (61, -1):
        with pytest.raises(UserError, match="there are samples 0 to 60"):
            baselines.removal_effect(convex.objective, convex.w, [k], exact(convex))
    with pytest.raises(UserError, match="a metric is a number or a list of numbers"):
        baselines.influence(convex.objective, convex.w, lambda w: w.view(4, 7), exact(convex))
    x, y = convex.objective.data
    with pytest.raises(UserError, match="hold 60, 61 samples"):
        Objective(convex.objective.losses, (x, y[:60]))
    with pytest.raises(UserError, match="hold no samples"):
        Objective(convex.objective.losses, (x[:0], y[:0]))
    with pytest.raises(UserError, match="one weight per sample"):
        Objective(convex.objective.losses, (x, y), weights=torch.ones(3))
    with pytest.raises(UserError, match=r"Objective\.of_outputs"):
        Objective(convex.objective.losses, (x, y)).ggn_vp(convex.w, convex.w)
    broken = x.clone()
    broken[4, 0] = float("nan")
    with pytest.raises(UserError, match=r"the loss of sample 4 is nan \(1 of 61 are not finite\)"):
        Objective(convex.objective.losses, (broken, y), chunk=10).sample_losses(convex.w)


def test_chance_is_seeded():
    assert torch.equal(baselines.chance(9, 1), baselines.chance(9, 1))
    assert not torch.equal(baselines.chance(9, 1), baselines.chance(9, 2))


def test_a_model_in_float32_is_scored_as_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    found = []
    for dtype in (torch.float32, torch.float64):
        parameters = Parameters.of(model, dtype=dtype)
        objective = Objective.of_outputs(
            lambda w, data, parameters=parameters: parameters.call(w, data[0]),
            lambda z, data: nn.functional.cross_entropy(z, data[1], reduction="none"),
            (x.to(dtype), y),
            l2=0.1,
        )
        w = parameters.flat()
        scores = baselines.influence(
            objective,
            w,
            lambda at, o=objective: o.losses(at, o.data)[:2],
            partial(cg, objective.ggn(w), tol=1e-5),
        )
        assert scores.dtype == dtype
        found.append(scores.double())
    assert torch.allclose(*found, rtol=1e-3, atol=1e-5)
