"""What a user can get wrong is one line and exit status 2; the command goes on where it was
stopped.
"""

import math
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from ecif_problems import make, normal

from projects.ecif import Contrastive, Heads, Pairs, TwoTower, score
from projects.ecif.command import main
from projects.ecif.fit import Fit, check_trained, fit, projection, solver
from projects.ecif.loss import batch_losses, check_mode, logits
from shared.commands.key import digest
from shared.errors import UserError
from shared.influence.baselines import metric_gradient
from shared.seeding import step_seed

SIZES = ["--model", "heads", "--batch", "4", "--size", "3", "--delta", "6"]


@pytest.fixture
def files(tmp_path):
    """Embeddings of 11 pairs, of 9 clean ones and of one."""
    for name, n, seed in (("train", 11, 1), ("clean", 9, 8), ("one", 1, 8)):
        np.savez(
            tmp_path / f"{name}.npz",
            text=normal(n, 5, seed=seed),
            image=normal(n, 7, seed=seed + 1),
        )
    return tmp_path


def run(files, *options, data="train", query="clean", out="scores.csv") -> int:
    arguments = [
        "--data",
        files / f"{data}.npz",
        "--query",
        files / f"{query}.npz",
        "--out",
        files / out,
        *SIZES,
        *options,
    ]
    return main(["score", *map(str, arguments)])


def refused(capsys, status) -> str:
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("ecif: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "seed"), [("scores.csv", 0), ("scores.parquet", 3)])
def test_the_command_scores_as_the_library_does(files, out, seed):
    options = ("--gradient-tol", "1e-9", "--solver", "dense", "--seed", str(seed))
    assert run(files, *options, out=out) == 0
    found = pd.read_csv(files / out) if out.endswith("csv") else pd.read_parquet(files / out)
    towers = TwoTower(Heads(5, 7, 3, seed))
    problem = Contrastive(
        towers,
        Pairs.of((normal(11, 5, seed=1), normal(11, 7, seed=2)), 4, seed),
        6.0,
        towers.parameters.flat(),
    )
    w = fit(problem).w
    metric = Contrastive(
        towers, Pairs.of((normal(9, 5, seed=8), normal(9, 7, seed=9)), 4), 0.0
    ).mean_loss
    scores = problem.scores(w, metric, solver(problem, w, "dense"))
    assert found["score"].tolist() == pytest.approx(scores.tolist(), rel=1e-5, abs=1e-8)
    assert found["rank"].tolist() == (scores.argsort().argsort() + 1).tolist()


def test_every_kind_of_score_agrees_with_the_library(files):
    towers = TwoTower(Heads(5, 7, 3))
    problem = Contrastive(
        towers,
        Pairs.of((normal(11, 5, seed=1), normal(11, 7, seed=2)), 4),
        6.0,
        towers.parameters.flat(),
    )
    w = fit(problem).w
    solve = solver(problem, w, "dense")
    metric = score.query_metric(problem, (normal(1, 5, seed=8), normal(1, 7, seed=9)), 4)
    related = problem.relative_scores(w, metric, solve)
    wanted = {
        "relative": related.signed,
        "span": related.span,
        "self": -problem.self_influence(w, solve),
    }
    for kind, scores in wanted.items():
        assert (
            run(files, "--score", kind, "--gradient-tol", "1e-9", "--solver", "dense", query="one")
            == 0
        )
        assert pd.read_csv(files / "scores.csv")["score"].tolist() == pytest.approx(
            scores.tolist(), rel=1e-5, abs=1e-8
        )


def test_a_single_query_is_taken_among_training_pairs(files):
    assert run(files, query="one") == 0
    # alone in a batch its loss would be 0
    assert pd.read_csv(files / "scores.csv")["score"].abs().max() > 1e-4


def test_a_single_query_is_scored_for_its_own_loss(trained):
    """Its row and column of softmax among the first training pairs, written as loops, and nothing
    of theirs.
    """
    problem, w = trained
    query = (normal(1, 5, seed=8), normal(1, 7, seed=9))
    metric = score.query_metric(problem, query, 4)
    among = tuple(
        torch.cat([own, of[0]]) for own, of in zip(query, problem.pairs.inputs, strict=True)
    )
    s = problem.towers.logits(w, among).tolist()
    row, column = (
        sum(math.exp(value - s[0][0]) for value in values)
        for values in (s[0], [line[0] for line in s])
    )
    assert float(metric(w)) == pytest.approx(math.log(row) + math.log(column), rel=1e-12)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("1", "11 pairs in batches of 1 leave 11 of them alone in a batch"),
        ("5", "11 pairs in batches of 5 leave 1 of them alone in a batch"),
    ],
)
def test_a_pair_without_negatives_is_not_ranked(files, capsys, batch, message):
    assert message in refused(capsys, run(files, "--batch", batch))
    assert "choose another --batch" in refused(capsys, run(files, "--batch", batch))
    assert "give more pairs" in refused(capsys, run(files, data="one"))
    assert not (files / "scores.csv").exists()


def test_partitions_are_averaged_with_their_spread(files, monkeypatch):
    """Of the library's scores, partition by partition; chunks may cross from one to the next."""
    monkeypatch.setattr(score, "BATCHES", 2)
    options = ("--gradient-tol", "1e-9", "--solver", "dense", "--partitions", "3")
    assert run(files, *options) == 0
    found = pd.read_csv(files / "scores.csv")
    inputs = (normal(11, 5, seed=1), normal(11, 7, seed=2))
    towers, each = TwoTower(Heads(5, 7, 3)), []
    for seed in (0, step_seed(0, "partition", 1), step_seed(0, "partition", 2)):
        pairs = Pairs.of(inputs, 4, seed)
        problem = Contrastive(towers, pairs, 6.0, towers.parameters.flat())
        w = fit(problem).w
        metric = score.query_metric(problem, (normal(9, 5, seed=8), normal(9, 7, seed=9)), 4)
        each.append(problem.scores(w, metric, solver(problem, w, "dense")).numpy())
    assert found["score"].tolist() == pytest.approx(np.mean(each, 0).tolist(), rel=1e-5, abs=1e-8)
    assert found["spread"].tolist() == pytest.approx(
        np.std(each, 0, ddof=1).tolist(), rel=1e-5, abs=1e-8
    )
    assert found["rank"].tolist() == (found["score"].rank().astype(int)).tolist()


def test_the_command_goes_on_where_it_was_stopped(files, monkeypatch, capsys):
    assert run(files) == 0
    whole = pd.read_csv(files / "scores.csv")
    (files / "scores.csv").unlink()
    monkeypatch.setattr(score, "BATCHES", 1)
    plain, calls = Contrastive.scores_along, []

    def stopping(self, w, s, mode, parts, batches):
        calls.append(batches)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, w, s, mode, parts, batches)

    monkeypatch.setattr(Contrastive, "scores_along", stopping)
    assert run(files) == 128 + signal.SIGTERM
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (files / "scores.csv").exists()
    assert run(files) == 0
    assert [one.start for one in calls] == [0, 1, 2]
    assert pd.read_csv(files / "scores.csv")["score"].tolist() == pytest.approx(
        whole["score"].tolist(), rel=1e-12
    )
    assert not list(files.glob("*.chunks"))


def test_what_a_score_depends_on_is_in_the_key_of_its_pieces(files, monkeypatch):
    keys: list[str] = []

    def recorded(out, inputs):
        keys.append(digest(inputs))
        raise UserError("far enough")

    monkeypatch.setattr(score, "Pieces", recorded)

    def key(*options, **changes) -> str:
        assert run(files, *options, "--gradient-tol", "1e-8", **changes) == 2
        return keys.pop()

    plain = key()
    os.utime(files / "train.npz", (0, 0))
    assert plain == key()  # content counts, and not when it was written
    deciding = {
        "mode": "paper", "parts": "positive", "solver": "dense", "damping": "1", "tol": "1e-5",
        "score": "self", "seed": "1", "partitions": "2", "batch": "6", "delta": "7",
        "size": "2", "basis": "random",
    }  # fmt: skip
    others = [key(f"--{option}", value) for option, value in deciding.items()]
    others.append(key(query="one"))
    with np.load(files / "train.npz") as saved:
        arrays = dict(saved)
    np.savez(files / "moved.npz", text=arrays["text"], image=arrays["image"] * 1.001)
    others.append(key(data="moved"))
    assert len({plain, *others}) == 1 + len(others)


def test_the_pieces_of_other_options_are_not_taken(files, monkeypatch):
    assert run(files, "--mode", "paper") == 0
    wanted = pd.read_csv(files / "scores.csv")["score"]
    with monkeypatch.context() as killed:
        # ended with all chunks there, and no file of scores
        killed.setattr(score, "write_scores", lambda *_: None)
        assert run(files) == 0
    assert list(files.glob("*.chunks"))
    assert run(files, "--mode", "paper") == 0
    assert pd.read_csv(files / "scores.csv")["score"].tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"text": normal(4, 5)}, "has no array 'image'"),
        (
            {"text": normal(4, 5), "image": normal(4)},
            "'image' must be numbers of shape [pairs, features of an image]",
        ),
        (
            {"text": normal(4, 5), "image": normal(3, 7)},
            "4 pairs in 'text' and 3 in 'image'",
        ),
        ({"text": normal(4, 5) * np.nan, "image": normal(4, 7)}, "'text' is nan at [0, 0]"),
        (
            {"text": normal(4, 5), "image": normal(4, 7), "ids": np.array(["a", "b", "a", "c"])},
            "samples 0 and 2 have the same id 'a'",
        ),
        (
            {"text": normal(4, 5), "image": normal(4, 6)},
            "tensor 1 has the shape (7,), a training sample's (6,)",
        ),
        ({"text": np.array(["x"] * 4), "image": normal(4, 6)}, "'text' must be numbers"),
    ],
)
def test_training_pairs_that_are_none_are_refused(files, capsys, arrays, message):
    np.savez(files / "bad.npz", **{name: np.asarray(one) for name, one in arrays.items()})
    assert message in refused(capsys, run(files, data="bad"))


def test_files_that_are_none_are_refused(files, capsys):
    assert "nowhere.npz: no such file" in refused(capsys, run(files, data="nowhere"))
    np.savez(files / "objects.npz", text=np.array([{}], dtype=object), image=np.zeros((1, 2)))
    assert "or no .npz file of plain arrays" in refused(capsys, run(files, data="objects"))
    (files / "text.npz").write_text("no archive")
    assert "or no .npz file of plain arrays" in refused(capsys, run(files, data="text"))
    assert "scores are written as .csv or .parquet" in refused(capsys, run(files, out="scores.txt"))
    assert "neither 'heads' nor a folder" in refused(capsys, run(files, "--model", str(files)))


def test_a_solver_that_does_not_converge_is_refused_with_its_residual(files, capsys):
    assert "residual" in refused(capsys, run(files, "--tol", "1e-30"))


def test_a_model_that_is_not_at_a_minimum_is_not_scored(files, capsys, monkeypatch):
    monkeypatch.setattr(score, "fit", lambda problem, start, **_: Fit(problem, start, 0.0, None))
    assert "the model is not trained to a minimum: the gradient's norm is" in refused(
        capsys, run(files)
    )
    assert not (files / "scores.csv").exists()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["score", "--help"])
    assert stop.value.code == 0
    assert "python -m projects.ecif score --model heads --data train.npz" in capsys.readouterr().out


# ---- the library ---------------------------------------------------------------------------------


def test_an_untrained_model_and_a_loss_that_is_not_finite_are_refused(trained):
    problem, w = trained
    assert check_trained(problem, w, 1e-8) < 1e-10
    with pytest.raises(UserError, match="not trained to a minimum: the gradient's norm is"):
        check_trained(problem, problem.centre, 1e-8)
    with pytest.raises(UserError, match="the loss of sample 0 is nan"):
        check_trained(problem, w * float("nan"), 1e-8)


def test_an_indefinite_hessian_needs_damping(trained):
    problem = make(delta=0.01)
    w = problem.centre
    with pytest.raises(UserError, match="the Hessian is indefinite"):
        solver(problem, w, "dense")
    with pytest.raises(UserError, match="negative curvature"):
        solver(problem, w, "cg")(metric_gradient(problem.mean_loss, w))
    for name, damping in (("dense", 50.0), ("cg", 50.0), ("ggn", 0.0), ("logra", 50.0)):
        assert (
            solver(problem, w, name, damping, rank=2)(metric_gradient(problem.mean_loss, w))[0]
            .isfinite()
            .all()
        )
    with pytest.raises(UserError, match="the solver is one of"):
        solver(problem, w, "lu")


def test_the_solvers_agree_where_they_must(trained):
    problem, w = trained
    b = normal(w.numel(), seed=3)
    wanted = solver(problem, w, "dense")(b)[0]
    assert torch.allclose(solver(problem, w, "cg", tol=1e-10)(b)[0], wanted, atol=1e-8)
    for basis in ("leading", "random"):
        # as many directions as there are
        whole = solver(problem, w, "logra", rank=7, basis=basis)(b)[0]
        assert torch.allclose(whole, wanted, atol=1e-8)


def test_leading_directions_are_those_of_the_layers_inputs_and_slopes(trained):
    """Of the heads, whose inputs are the features and whose slopes are the loss's in the
    embeddings, by autograd on the embeddings themselves.
    """
    problem, w = trained
    found = projection(problem, w, 2, 0, "leading")
    assert found.shape == (3 * 5 + 3 * 7 + 1, 2 * 2 + 2 * 2 + 1)
    assert torch.allclose(found.T @ found, torch.eye(9, dtype=torch.float64), atol=1e-12)
    inputs, present = problem.pairs.inputs, problem.pairs.present
    texts, images, log_tau = (one.detach() for one in problem.towers.embed(w, inputs))
    embedded = [texts.requires_grad_(), images.requires_grad_()]
    loss = batch_losses(logits(*embedded, log_tau, problem.towers.epsilon), present).sum()
    slopes = torch.autograd.grad(loss, embedded)
    where = problem.towers.parameters.slices
    for name, features, slope in (
        ("text.weight", inputs[0], slopes[0]),
        ("image.weight", inputs[1], slopes[1]),
    ):
        sides = [
            np.linalg.svd(rows.flatten(0, -2).numpy().T, full_matrices=False)[0][:, :2]
            for rows in (slope, features)
        ]
        span = np.kron(*sides)  # [out * in, 4]
        own = found[where[name]]
        own = own[:, own.abs().sum(0) > 0].numpy()
        assert own.shape[1] == 4
        assert np.allclose(span @ span.T, own @ own.T, atol=1e-8)


def test_a_projection_is_refused_where_the_hessian_is_indefinite():
    problem = make(delta=0.01)
    b = metric_gradient(problem.mean_loss, problem.centre)
    with pytest.raises(UserError, match="not positive definite in the subspace: add damping"):
        solver(problem, problem.centre, "logra", rank=7)(b)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([11], "sample 11 cannot be removed"),
        ([-1], "sample -1"),
        ([3, 3], "sample 3 is to be removed twice"),
    ],
)
def test_pairs_that_are_not_there_cannot_be_removed(trained, removed, message):
    problem, w = trained
    for call in (lambda: problem.removal_gradient(w, removed), lambda: problem.without(removed)):
        with pytest.raises(UserError, match=message):
            call()


def test_other_things_that_do_not_fit_are_refused(trained):
    problem, w = trained
    with pytest.raises(UserError, match="nothing to remove"):
        problem.removal_effect(w, [], lambda b: (b, None))
    with pytest.raises(UserError, match="'sum' is none of exact, paper"):
        check_mode("sum")
    with pytest.raises(UserError, match="needs float64"):
        fit(problem, w.float())
    with pytest.raises(UserError, match="there are no pairs"):
        Pairs.of((torch.zeros(0, 5), torch.zeros(0, 7)), 4)
    with pytest.raises(UserError, match="at least 1 pair"):
        Pairs.of((torch.zeros(3, 5), torch.zeros(3, 7)), 0)
    with pytest.raises(UserError, match="smoothing"):
        TwoTower(Heads(5, 7, 3), epsilon=-1.0)
