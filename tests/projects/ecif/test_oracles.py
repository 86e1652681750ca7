"""The identities that ECIF rests on, against loops, autodiff of the composed problem, and training
again.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from ecif_problems import loop_loss, make, normal, train
from torch.func import grad, jacrev

from projects.ecif import Contrastive, Pairs, relative
from projects.ecif.loss import (
    batch_losses,
    group_losses,
    logits,
    negative_losses,
    pair_losses,
    removal_losses,
)
from shared.influence.products import count_passes, hessian
from shared.influence.solvers import dense

MODES = ("exact", "paper")


def all_present(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def zeta_loss(s: torch.Tensor, n: int, zeta: torch.Tensor) -> torch.Tensor:
    """The batch's loss with log(zeta) added to row and column n of its logits: the paper's device,
    by torch's own cross-entropy.
    """
    ones = torch.zeros_like(s)
    ones[n, :] = ones[:, n] = 1
    moved = s + zeta.log() * ones
    own = torch.arange(len(s))
    cross_entropy = partial(torch.nn.functional.cross_entropy, reduction="sum")
    return cross_entropy(moved, own) + cross_entropy(moved.T, own)


def hessian_solve(problem: Contrastive, w: torch.Tensor):
    matrix = hessian(problem.objective(), w)
    return lambda b: dense(matrix, b)


# ---- the loss ------------------------------------------------------------------------------------


def test_the_loss_is_that_of_loops():
    s = 3 * normal(2, 5, 5)
    present = all_present(2, 5)
    present[1, 3] = False
    found = batch_losses(s, present)
    assert float(found[0]) == pytest.approx(loop_loss(s[0]), abs=1e-12)
    assert float(found[1]) == pytest.approx(loop_loss(s[1], [0, 1, 2, 4]), abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_without_a_pair_the_loss_falls_by_positive_plus_exact_negative(scale):
    s = scale * normal(6, 6)
    present = all_present(6)
    found = pair_losses(s, present) + negative_losses(s, present)
    for n in range(6):
        truth = loop_loss(s) - loop_loss(s, [k for k in range(6) if k != n])
        assert float(found[n]) == pytest.approx(truth, abs=1e-10)


@pytest.mark.parametrize("removed", [[0], [2, 5], [0, 1, 3, 6], list(range(7)), []])
def test_without_a_group_the_loss_falls_by_the_group_form(removed):
    s = 2 * normal(7, 7, seed=3)
    gone = torch.zeros(7, dtype=torch.bool)
    gone[removed] = True
    truth = loop_loss(s) - loop_loss(s, [k for k in range(7) if k not in removed])
    assert float(group_losses(s, all_present(7), gone)) == pytest.approx(truth, abs=1e-10)


def test_a_group_is_not_the_sum_of_its_pairs():
    s = 2 * normal(7, 7, seed=3)
    gone = torch.zeros(7, dtype=torch.bool)
    gone[:3] = True
    group = group_losses(s, all_present(7), gone)
    singles = removal_losses(s, all_present(7))[:3].sum()
    assert abs(float(group - singles)) > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_a_group_of_one_is_the_pair(mode):
    s, present = 2 * normal(6, 6), all_present(6)
    present[4] = False
    for n in range(6):
        gone = torch.zeros(6, dtype=torch.bool)
        gone[n] = True
        assert float(group_losses(s, present, gone, mode)) == pytest.approx(
            float(removal_losses(s, present, mode)[n]), abs=1e-12
        )


def test_the_papers_group_form_is_a_sum_over_who_stays():
    s, removed = 2 * normal(5, 5), [1, 4]
    p, q = s.softmax(1), s.softmax(0)
    gone = torch.zeros(5, dtype=torch.bool)
    gone[removed] = True
    wanted = sum(float(p[k, i] + q[i, k]) for k in (0, 2, 3) for i in removed)
    assert float(group_losses(s, all_present(5), gone, "paper", "negative")) == pytest.approx(
        wanted, abs=1e-12
    )


def test_the_papers_negative_part_is_the_derivative_in_zeta():
    s = 2 * normal(7, 7, seed=4)
    found = negative_losses(s, all_present(7), "paper")
    for n in range(7):
        slope = grad(partial(zeta_loss, s, n))(torch.tensor(1.0, dtype=torch.float64))
        assert float(found[n]) == pytest.approx(float(slope), abs=1e-10)


def test_zeta_at_0_deletes_the_pair_as_a_negative():
    s = 2 * normal(7, 7, seed=4)
    gone = zeta_loss(s, 2, torch.tensor(1e-200, dtype=torch.float64))
    rest = loop_loss(s, [k for k in range(7) if k != 2]) + float(pair_losses(s, all_present(7))[2])
    assert float(gone) == pytest.approx(rest, abs=1e-10)


def test_the_exact_form_keeps_its_digits_where_a_negative_has_all_of_the_softmax():
    s = torch.zeros(3, 3)
    s[0, 1] = 40.0  # in float32 the softmax of text 0 on image 1 is 1
    found = negative_losses(s, all_present(3))[1]
    assert float(found) == pytest.approx(
        loop_loss(s) - loop_loss(s, [0, 2]) - float(pair_losses(s, all_present(3))[1]), rel=1e-5
    )
    slope = grad(lambda x: negative_losses(x, all_present(3))[1])(s)
    assert bool(slope.isfinite().all())


def test_a_batch_of_one_pair_has_no_loss_and_no_influence():
    s, present = normal(1, 1), all_present(1)
    for mode in MODES:
        assert float(batch_losses(s, present)) == 0
        assert removal_losses(s, present, mode).tolist() == [0]
        assert grad(lambda x, mode=mode: removal_losses(x, present, mode).sum())(s).tolist() == [
            [0]
        ]


def test_equal_pairs_have_equal_losses_and_swapped_modalities_the_same():
    texts, images, log_tau = (
        normal(5, 3),
        normal(5, 3, seed=1),
        torch.tensor(-0.5, dtype=torch.float64),
    )
    texts[4], images[4] = texts[1], images[1]
    s, swapped = logits(texts, images, log_tau, 1.0), logits(images, texts, log_tau, 1.0)
    for mode in MODES:
        found = removal_losses(s, all_present(5), mode)
        assert float(found[1]) == pytest.approx(float(found[4]), abs=1e-12)
        assert found.tolist() == pytest.approx(
            removal_losses(swapped, all_present(5), mode).tolist(), abs=1e-12
        )


def test_the_smoothed_cosine_by_hand():
    texts, images = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert float(logits(texts, images, torch.tensor(0.5).log(), 0.0)) == pytest.approx(0.8 / 0.5)
    assert float(logits(texts, images, torch.tensor(0.0), 1.0)) == pytest.approx(
        8 / math.sqrt(26 * 5)
    )


# ---- influence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [0, 3, 10])
def test_linear_ecif_is_the_derivative_of_the_re_solved_optimum(trained, pair):
    problem, w = trained
    gone = problem.pairs.mask([pair])
    (batch, place) = (int(one) for one in gone.nonzero()[0])

    def family(t: float):
        """The pair's own rows by 1 - t, zeta = 1 - t in the others'."""

        def objective(at):
            rest = [b for b in range(problem.pairs.batches) if b != batch]
            s = problem.towers.logits(at, problem.pairs.inputs)
            kept = problem.pairs.present[batch]
            own = s[batch][kept][:, kept]
            positive = pair_losses(own, all_present(len(own)))[place]
            touched = zeta_loss(own, place, torch.tensor(1 - t, dtype=torch.float64)) - t * positive
            others = batch_losses(s[rest], problem.pairs.present[rest]).sum()
            away = problem.delta / 2 * (at - problem.centre).square().sum()
            return (touched + others + away) / problem.pairs.batches

        return objective

    def solved(t: float):
        at = w.clone()
        for _ in range(4):
            at = at - torch.linalg.solve(hessian(family(t), at), grad(family(t))(at))
        assert float(grad(family(t))(at).norm()) < 1e-12
        return at

    step = 1e-4
    truth = (8 * (solved(step) - solved(-step)) - (solved(2 * step) - solved(-2 * step))) / (
        12 * step
    )
    found = problem.removal_effect(w, [[pair]], hessian_solve(problem, w), "paper")[:, 0]
    assert float((found - truth).norm() / truth.norm()) < 1e-6


def test_the_exact_removal_gradient_is_the_difference_of_the_objectives(trained):
    problem, w = trained
    for removed in ([2], [0, 1, 5], [int(i) for i in range(11)]):
        truth = problem.objective().gradient(w) - problem.without(removed).objective().gradient(w)
        assert torch.allclose(problem.removal_gradient(w, removed), truth, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", ["both", "positive", "negative"])
def test_scores_of_one_forward_pass_are_dot_products_pair_by_pair(trained, validation, mode, parts):
    problem, w = trained
    solve = hessian_solve(problem, w)
    g = grad(validation.mean_loss)(w)
    found = problem.scores(w, validation.mean_loss, solve, mode, parts)
    for pair in range(11):
        effect = problem.removal_effect(w, [[pair]], solve, mode, parts)[:, 0]
        assert float(found[pair]) == pytest.approx(float(g @ effect), abs=1e-10)
    rows = problem.pair_gradients(w, mode, parts)
    assert torch.allclose(rows @ solve(g)[0], found, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_scores_of_one_forward_pass_are_the_closed_form(mode):
    problem = make(10, 5)
    w, v = problem.centre, normal(problem.centre.numel(), seed=5)
    s = problem.towers.logits(w, problem.pairs.inputs)
    moved = jacrev(lambda at: problem.towers.logits(at, problem.pairs.inputs))(w) @ v
    wanted = torch.zeros(2, 5, dtype=torch.float64)
    for b in range(2):
        p, q, d = s[b].softmax(1), s[b].softmax(0), moved[b]
        for i in range(5):
            wanted[b, i] = (p[i] * d[i]).sum() + (q[:, i] * d[:, i]).sum() - 2 * d[i, i]
            for k in range(5):
                if k != i:
                    row = p[k, i] * (d[k, i] - (p[k] * d[k]).sum())
                    column = q[i, k] * (d[i, k] - (q[:, k] * d[:, k]).sum())
                    wanted[b, i] += (
                        row / (1 - p[k, i]) + column / (1 - q[i, k])
                        if mode == "exact"
                        else row + column
                    )
    found = problem.scores_along(w, v, mode)
    assert torch.allclose(found, wanted / problem.pairs.batches, atol=1e-12)
    assert torch.allclose(
        problem.scores_along(w, v, mode, batches=slice(1, 2)), found[1:], atol=1e-14
    )
    assert torch.equal(problem.pairs.by_pair(found)[3], found.flatten()[problem.pairs.order[3]])


def test_scoring_costs_a_solve_and_one_forward_pass(trained, validation):
    problem, w = trained
    solve = hessian_solve(problem, w)
    with count_passes() as passes:
        problem.scores(w, validation.mean_loss, solve)
    assert (
        passes.gradients,
        passes.forward_mode,
        passes.per_sample_gradients,
        passes.curvature_products,
    ) == (1, 1, 0, 0)


def test_only_the_exact_form_tends_to_retraining_as_effects_become_small():
    problem = make(24, 6, delta=4000.0)
    w = train(problem)
    solve = hessian_solve(problem, w)
    errors = {("exact", "both"): [], ("paper", "both"): [], ("exact", "positive"): []}
    for group in ([0], [5], [10, 3], [2, 6, 20]):
        truth = train(problem.without(group), w) - w
        for (mode, parts), found in errors.items():
            found.append(
                float(
                    (problem.removal_effect(w, [group], solve, mode, parts)[:, 0] - truth).norm()
                    / truth.norm()
                )
            )
    assert max(errors["exact", "both"]) < 0.02
    assert min(errors["paper", "both"]) > 0.02
    assert all(
        positive > paper
        for positive, paper in zip(
            errors["exact", "positive"], errors["paper", "both"], strict=True
        )
    )


def test_a_stiff_regulariser_leaves_a_gradient_step(trained):
    problem, _ = trained
    stiff = Contrastive(problem.towers, problem.pairs, 1e9, problem.centre)
    w = problem.centre
    found = stiff.removal_effect(w, [[4]], hessian_solve(stiff, w))[:, 0]
    step = stiff.removal_gradient(w, [4]) * problem.pairs.batches / 1e9
    assert float((found - step).norm() / step.norm()) < 1e-6


def test_retraining_keeps_the_partition_and_theta_0(trained):
    problem, _ = trained
    less = problem.without([1, 7])
    assert less.pairs.batches == problem.pairs.batches
    assert int(less.pairs.present.sum()) == 9
    assert torch.equal(less.pairs.order, problem.pairs.order)
    assert all(a is b for a, b in zip(less.pairs.inputs, problem.pairs.inputs, strict=True))
    assert less.centre is problem.centre
    gone = ~less.pairs.present & problem.pairs.present
    assert torch.equal(problem.pairs.by_pair(gone).nonzero().flatten(), torch.tensor([1, 7]))


def test_order_within_a_batch_does_not_matter_and_the_partition_does():
    texts, images = normal(8, 5), normal(8, 7, seed=1)
    problem = make()
    v = normal(problem.centre.numel(), seed=2)

    def scores(order):
        pairs = Pairs.of((texts[order], images[order]), 4, seed=None)
        found = Contrastive(problem.towers, pairs, 1.0).scores_along(problem.centre, v)
        return torch.empty(8, dtype=torch.float64).index_copy(
            0, torch.tensor(order), pairs.by_pair(found)
        )

    plain, permuted, mixed = (
        scores([0, 1, 2, 3, 4, 5, 6, 7]),
        scores([2, 0, 3, 1, 7, 6, 5, 4]),
        scores([0, 4, 1, 5, 2, 6, 3, 7]),
    )
    assert torch.allclose(plain, permuted, atol=1e-12)
    assert not torch.allclose(plain, mixed, atol=1e-3)


def test_the_partition_is_the_seeds():
    """Two seeds, two partitions and two sets of scores; one seed, one."""
    texts, images = normal(12, 5), normal(12, 7, seed=1)
    problem = make()
    v = normal(problem.centre.numel(), seed=2)

    def scored(seed):
        pairs = Pairs.of((texts, images), 4, seed)
        assert sorted(pairs.order.tolist()) == list(range(12))
        company = {
            frozenset((pairs.order // 4 == b).nonzero().flatten().tolist()) for b in range(3)
        }
        found = Contrastive(problem.towers, pairs, 1.0).scores_along(problem.centre, v)
        return company, pairs.by_pair(found)

    (first, scores), (again, same), (other, others) = scored(0), scored(0), scored(1)
    assert first == again
    assert torch.equal(scores, same)
    assert first != other
    assert not torch.allclose(scores, others, atol=1e-3)


@pytest.mark.parametrize(("n", "batch", "kinds"), [(12, 4, 4), (11, 4, 5), (23, 5, 6), (9, 9, 3)])
def test_pairs_of_one_caption_are_kept_apart(n, batch, kinds):
    draw = np.random.default_rng(n)
    captions = [f"{draw.integers(kinds)}" for _ in range(n)]
    inputs = (torch.arange(n), normal(n, 7))
    pairs = Pairs.of(inputs, batch, 0, captions)
    assert pairs.by_pair(pairs.inputs[0]).tolist() == list(range(n))
    assert sorted(pairs.inputs[0][pairs.present].tolist()) == list(range(n))
    sizes = pairs.present.sum(1)
    assert int(sizes.max() - sizes.min()) <= 1
    assert int(sizes.max()) <= batch
    # a batch has a caption again only where there are more of it than batches
    for number in range(pairs.batches):
        of = [captions[i] for i in pairs.inputs[0][number][pairs.present[number]].tolist()]
        assert all(of.count(one) <= -(-captions.count(one) // pairs.batches) for one in of)
    assert not torch.equal(pairs.order, Pairs.of(inputs, batch, 1, captions).order)


def test_self_influence_is_the_quadratic_form(trained):
    problem, w = trained
    inverse = torch.linalg.inv(hessian(problem.objective(), w))
    found = problem.self_influence(w, hessian_solve(problem, w))
    for pair in (0, 6):
        g = problem.removal_gradient(w, [pair])
        assert float(found[pair]) == pytest.approx(float(g @ inverse @ g), rel=1e-9)


def test_relative_influence_is_a_projection(trained, validation):
    problem, w = trained
    solve = hessian_solve(problem, w)
    g = grad(validation.mean_loss)(w)
    found = problem.relative_scores(w, validation.mean_loss, solve)
    for pair in range(11):
        a, b = (
            problem.removal_effect(w, [[pair]], solve, "exact", part)[:, 0]
            for part in ("positive", "negative")
        )
        span = torch.stack([a, b], 1).numpy()
        shadow = span @ np.linalg.lstsq(span, g.numpy(), rcond=None)[0]
        assert float(found.span[pair]) == pytest.approx(float(np.linalg.norm(shadow)), rel=1e-8)
        c, gram = span.T @ g.numpy(), span.T @ span
        assert float(found.span[pair]) == pytest.approx(
            float(np.sqrt(c @ np.linalg.solve(gram, c))), rel=1e-6
        )
        assert float(found.signed[pair]) == pytest.approx(
            float(g @ (a + b) / (a + b).norm()), rel=1e-8
        )


def test_relative_influence_of_several_queries_is_that_of_each(trained, validation):
    problem, w = trained
    effects = problem.pair_effects(w, hessian_solve(problem, w))
    queries = torch.stack([grad(validation.mean_loss)(w), w.cos()], 1)
    together = relative(*effects, queries)
    for number, query in enumerate(queries.T):
        alone = relative(*effects, query)
        assert torch.allclose(together.span[:, number], alone.span, rtol=1e-12)
        assert torch.allclose(together.signed[:, number], alone.signed, rtol=1e-12)


def test_relative_influence_where_the_gram_matrix_is_singular():
    g = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    e = torch.eye(3, dtype=torch.float64)
    a = torch.stack([e[0], e[0], 0 * e[0], 0 * e[0], e[2]])
    b = torch.stack([2 * e[0], 0 * e[0], e[1], 0 * e[0], -e[2]])
    # b a multiple of a to rounding, which is no direction of its own
    odd, h = normal(40, 7), normal(7, seed=1)
    assert relative(odd, math.pi * odd, h).span.tolist() == pytest.approx(
        ((odd @ h) / odd.norm(dim=1)).abs().tolist()
    )
    found = relative(a, b, g)
    assert found.span.tolist() == pytest.approx([3, 3, 4, 0, 0])
    assert found.signed.tolist() == pytest.approx([3, 3, 4, 0, 0])
