"""A CLIP with LoRA as it is fine-tuned and differentiated: against finite differences, AdamW by
hand, and CLIP's own preparation.
"""

import math

import numpy as np
import pytest
import torch
from ecif_problems import make, normal, train
from PIL import Image
from torch.func import grad
from transformers import CLIPImageProcessor

from projects.ecif import Clip, Contrastive, Pairs, baselines, finetune
from projects.ecif.baselines import if_ekfac_by_rows, scores_by_passes, trak, trak_by_forward_mode
from projects.ecif.finetune import base_model, class_accuracy, damped_ggn, fine_tune, with_lora
from projects.ecif.loss import batch_losses, logits, removal_losses
from shared.influence.ekfac import EKFAC
from shared.seeding import generator
from shared.vision.images import LabelledImages


@pytest.fixture(scope="module")
def base():
    found = base_model("tiny")
    with torch.no_grad():
        for parameter in found.model.parameters():  # wide enough apart that pairs differ
            parameter.add_(
                0.1
                * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
                )
            )
    return found


@pytest.fixture(scope="module")
def problem(base):
    """Eleven pairs in three batches, the last of them short, in float64; away from theta_0, where
    half of LoRA's gradients are 0.
    """
    towers = Clip(with_lora(base, 2, 0), select=("*lora_*",), dtype=torch.float64)
    ids, mask = base.tokens([f"a {'bcdefghijkl'[one]}{'x' * (one % 3)}" for one in range(11)])
    pixels = torch.randint(
        0, 256, (11, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    return Contrastive(
        towers, Pairs.of((ids, mask, pixels), 4), 3.0, towers.parameters.flat(), chunk=1
    )


@pytest.fixture(scope="module")
def whole(problem):
    """The same in one piece, whose graph is kept between products."""
    return Contrastive(problem.towers, problem.pairs, problem.delta, problem.centre)


@pytest.fixture(scope="module")
def w(problem):
    return problem.centre + 0.3 * normal(problem.centre.numel(), seed=5)


def differences(f, w, v, step=1e-4):
    """The derivative of f at w along v, to fourth order."""
    return (
        8 * (f(w + step * v) - f(w - step * v)) - (f(w + 2 * step * v) - f(w - 2 * step * v))
    ) / (12 * step)


# ---- derivatives ---------------------------------------------------------------------------------


def test_forward_mode_through_lora_is_a_finite_difference(problem, w):
    v = normal(w.numel(), seed=2)
    found = problem.scores_along(w, v)
    present = problem.pairs.present

    def losses(at):
        return removal_losses(problem.towers.logits(at, problem.pairs.inputs), present)

    with torch.no_grad():
        wanted = differences(losses, w, v) / 3
    assert torch.allclose(found[present], wanted[present], atol=1e-9)
    assert float(found[present].abs().min()) > 1e-5


def test_gauss_newton_products_through_lora_are_finite_differences(problem, whole, w):
    v = normal(w.numel(), seed=3)
    outputs, present = (
        (lambda at: problem.towers.logits(at, problem.pairs.inputs)),
        problem.pairs.present,
    )
    with torch.no_grad():
        jacobian = torch.stack(
            [differences(outputs, w, e).flatten() for e in torch.eye(w.numel(), dtype=w.dtype)], 1
        )
        s = outputs(w)
    bend = torch.autograd.functional.hessian(lambda x: batch_losses(x, present).sum() / 3, s).view(
        s.numel(), -1
    )
    wanted = jacobian.T @ (bend @ (jacobian @ v)) + v  # delta / m = 1
    assert torch.allclose(problem.objective().ggn(w)(v), wanted, atol=1e-8)
    assert torch.allclose(whole.objective().ggn(w)(v), wanted, atol=1e-8)


def test_hessian_products_through_lora_are_finite_differences_of_the_gradient(problem, w):
    v = normal(w.numel(), seed=4)
    assert torch.allclose(
        problem.objective().hessian(w)(v),
        differences(problem.objective().gradient, w, v),
        atol=1e-7,
    )


def test_the_gradient_in_chunks_is_that_of_the_mean_loss(problem, w):
    assert torch.allclose(problem.mean_gradient(w), grad(problem.mean_loss)(w), atol=1e-12)


def test_some_batches_estimate_the_objective(problem, w):
    parts = [problem.objective(slice(b, b + 1)) for b in range(3)]
    assert float(sum(part(w) for part in parts)) / 3 == pytest.approx(
        float(problem.objective()(w)), rel=1e-12
    )
    assert parts[0].n == 1


def test_a_damped_solve_and_its_truncation(whole, w):
    solve = damped_ggn(whole, w, damping=0.1, iterations=60, batches=2)
    matrix = whole.objective(slice(2)).ggn(w)(torch.eye(w.numel(), dtype=w.dtype))
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    b = normal(w.numel(), seed=6)
    x, info = solve(b)
    wanted = torch.linalg.solve(matrix + 0.1 * top * torch.eye(w.numel(), dtype=w.dtype), b)
    # ten iterations find the largest eigenvalue to some per cent
    assert float((x - wanted).norm() / wanted.norm()) < 0.02
    assert info.relative_residual < 1e-8
    short, told = damped_ggn(whole, w, damping=0.1, iterations=3, batches=2)(b)
    assert told.products == 4  # and one for the residual
    assert told.relative_residual > 1e-4
    assert not torch.allclose(short, x)


# ---- training ------------------------------------------------------------------------------------


def test_fine_tuning_is_adamw_without_decay_and_with_the_regulariser():
    problem = make(11, 4, delta=30.0)
    start = problem.centre + 0.5
    points = fine_tune(problem, start, epochs=3, rate=0.01, seed=4)
    draw = generator(4, "epochs")
    w, first, second, step = start.clone(), torch.zeros_like(start), torch.zeros_like(start), 0
    for point in points:
        for b in torch.randperm(3, generator=draw).tolist():
            kept = problem.pairs.present[b]

            def loss(at, b=b, kept=kept):
                s = problem.towers.logits(at, tuple(x[b] for x in problem.pairs.inputs))[kept][
                    :, kept
                ]
                own = torch.arange(len(s))
                total = sum(
                    torch.nn.functional.cross_entropy(x, own, reduction="sum") for x in (s, s.T)
                )
                return total + 30.0 / 6 * (at - start).square().sum()

            g, step = grad(loss)(w), step + 1
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            w = w - 0.01 * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        assert torch.allclose(point, w, atol=1e-10)
    assert len(points) == 3


def test_training_again_keeps_the_order_of_batches_and_skips_empty_ones():
    problem = make(8, 4)
    again = [
        fine_tune(problem, problem.centre, epochs=2, rate=0.01, seed=seed)[-1] for seed in (0, 0, 1)
    ]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
    gone = torch.nonzero(problem.pairs.order < 4).flatten().tolist()  # the whole of the first batch
    alone = Contrastive(
        problem.towers,
        Pairs(
            tuple(x[1:] for x in problem.pairs.inputs), problem.pairs.present[1:], torch.arange(4)
        ),
        3.0,
    )
    # delta / m = 6 / 2
    found = fine_tune(problem.without(gone), problem.centre, epochs=2, rate=0.01, seed=0)[-1]
    assert torch.allclose(
        found, fine_tune(alone, problem.centre, epochs=2, rate=0.01, seed=0)[-1], atol=1e-12
    )


def test_adapters_are_of_queries_and_values_of_both_towers_and_leave_the_base_alone():
    base = base_model("tiny")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    one, same, other = (dict(with_lora(base, 2, seed).named_parameters()) for seed in (0, 0, 1))
    trained = [name for name, value in one.items() if value.requires_grad]
    assert sorted({name.split(".")[-4] for name in trained}) == ["q_proj", "v_proj"]
    assert len(trained) == 2 * 2 * 2  # towers, projections, A and B
    assert all(torch.equal(one[name], same[name]) for name in trained)
    assert any(not torch.equal(one[name], other[name]) for name in trained)
    assert before.keys() == base.model.state_dict().keys()


def test_accuracy_is_of_the_nearest_class_caption(problem, base, w):
    classes = base.tokens(["one", "two", "three"])
    part = LabelledImages(
        torch.randint(
            0, 256, (7, 3, 8, 8), generator=torch.Generator().manual_seed(8), dtype=torch.uint8
        ),
        torch.arange(7) % 3,
        ("one", "two", "three"),
    )
    right = 0
    for image, label in zip(part.pixels, part.labels, strict=True):
        texts, picture, _ = problem.towers.embed(w, (*classes, image.unsqueeze(0)))
        right += int(torch.cosine_similarity(texts, picture, dim=1).argmax()) == int(label)
    assert class_accuracy(problem.towers, w, classes, part, chunk=3) == right / 7


# ---- the model's inputs --------------------------------------------------------------------------


def test_pixels_are_normalised_as_by_clips_own_processor():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    wanted = processor(images=picture, return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).unsqueeze(0)
    assert torch.allclose(Clip.normalise(pixels, torch.float32), wanted, atol=1e-6)
    # what is no uint8 has been prepared
    assert torch.equal(Clip.normalise(wanted, torch.float64), wanted.double())


def test_captions_end_where_they_end(base):
    ids, mask = base.tokens(["ab", "abcd", "é" * 40])
    assert ids[0].tolist()[:5] == [256, 97, 98, 257, 257]
    assert mask.sum(1).tolist() == [4, 6, 32]  # the longest is cut at the model's 32 positions
    towers = Clip(with_lora(base, 2, 0), select=("*lora_*",), dtype=torch.float64)
    pixels, at = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), towers.parameters.flat()
    long, short = (
        towers.embed(at, (ids[:2], mask[:2], pixels))[0],
        towers.embed(at, (*base.tokens(["ab"] * 2), pixels))[0],
    )
    assert torch.allclose(long[0], short[0], atol=1e-10)


# ---- other methods -------------------------------------------------------------------------------


def test_trak_by_forward_mode_is_trak(validation):
    problem = make(13, 5)
    w = train(problem)
    options = {"dimension": 4, "seed": 3}
    found = trak_by_forward_mode(problem, w, validation.mean_loss, **options)
    assert torch.allclose(found, trak(problem, w, validation.mean_loss, **options), rtol=1e-8)


def test_ekfac_by_rows_has_what_passes_through_each_row(problem, w, monkeypatch):
    fitted, seen = EKFAC.fit, []
    monkeypatch.setattr(
        baselines.EKFAC,
        "fit",
        lambda *args, **options: seen.append(fitted(*args, **options)) or seen[-1],
    )
    scores = if_ekfac_by_rows(problem, w, lambda at: at.square().sum())
    assert scores.shape == (11,)
    squares = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        kept = problem.pairs.present[b]
        inputs = tuple(x[b] for x in problem.pairs.inputs)
        for row in torch.nonzero(kept).flatten().tolist():
            only = torch.zeros(4, 1, dtype=torch.bool)
            only[row] = True
            for tower in range(2):

                def loss(at, inputs=inputs, kept=kept, only=only, tower=tower):
                    embeddings = list(problem.towers.embed(at, inputs)[:2])
                    log_tau = problem.towers.embed(w, inputs)[2]
                    still = [one.detach() for one in problem.towers.embed(w, inputs)[:2]]
                    embeddings[tower] = torch.where(only, embeddings[tower], still[tower])
                    embeddings[1 - tower] = still[1 - tower]
                    return batch_losses(logits(*embeddings, log_tau, 0.0), kept)

                squares = squares + grad(loss)(w).square().sum() / 3
    assert float(sum(block.lambda_OI.sum() for block in seen[0].blocks)) == pytest.approx(
        float(squares), rel=1e-8
    )
    assert all(
        block.damping == pytest.approx(0.1 * float(block.lambda_OI.mean()) + 1.0)
        for block in seen[0].blocks
    )


def test_scores_by_passes_are_those_of_the_metric_itself(problem, whole, w):
    held_out = Contrastive(
        problem.towers, Pairs.of([x[0] for x in problem.pairs.inputs], 3), 0.0, chunk=1
    )
    solve = damped_ggn(whole, w, damping=0.1, iterations=6, batches=None)
    points = [problem.centre, w]
    calls = scores_by_passes(problem, w, held_out, solve, points=points, seed=0, dimension=3)
    assert torch.allclose(calls["ECIF"](), problem.scores(w, held_out.mean_loss, solve), atol=1e-9)
    tracin = baselines.tracin(problem, points, held_out.mean_loss)
    assert torch.allclose(calls["TracIn"](), tracin, atol=1e-10)
    own = baselines.Pointwise(problem)
    assert torch.allclose(calls["pair loss"](), -own.sample_losses(w))
    s = problem.towers.logits(w, problem.pairs.inputs)
    present = problem.pairs.present
    first = int(problem.pairs.order[0])
    b, place = first // 4, first % 4
    kept = s[b][present[b]][:, present[b]]
    wanted = math.log(sum(math.exp(float(x - kept[place, place])) for x in kept[place]))
    wanted += math.log(sum(math.exp(float(x - kept[place, place])) for x in kept[:, place]))
    assert float(own.sample_losses(w)[0]) == pytest.approx(wanted, rel=1e-9)
    for name, call in calls.items():
        found = call()
        assert found.shape == (11,), name
        assert found.isfinite().all(), name


def test_a_small_clip_is_trained_on_drawings(monkeypatch):
    monkeypatch.setattr(
        finetune, "quickdraw_classes", lambda: (["held"], [f"class {letter}" for letter in "abcd"])
    )
    monkeypatch.setattr(
        finetune,
        "sketches",
        lambda names: LabelledImages(
            255 * torch.eye(28, dtype=torch.uint8).expand(20, 1, -1, -1),
            torch.arange(4).repeat_interleave(5),
            tuple(names),
        ),
    )
    random = base_model("small")
    before = random.model.text_projection.weight.clone()
    finetune.pretrain(random, 2, classes=4, batch=3)
    assert not torch.equal(before, random.model.text_projection.weight)
    assert not random.model.training
