"""The command: scores are the library's, a kill costs nothing, and what a user can get wrong is one
line.
"""

import importlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from projects.sam_if import SAMProblem, gif_checkpoints, partition, score
from projects.sam_if.command import main
from projects.sam_if.estimators import Estimator
from projects.sam_if.score import architecture, read_samples
from shared.commands.key import digest
from shared.errors import UserError
from shared.influence.objective import Objective
from shared.influence.params import Parameters

RHO, L2 = 0.2, 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory, helpers):
    """Data, queries and a model trained by the command."""
    where = tmp_path_factory.mktemp("score")
    x, y = helpers.data(23)
    x_query, y_query = helpers.data(4, seed=9)
    np.savez(
        where / "train.npz",
        x=x.numpy(),
        y=y.numpy(),
        id=np.array([f"sample-{one}" for one in range(23)]),
    )
    np.savez(where / "query.npz", x=x_query.numpy(), y=y_query.numpy())
    assert (
        main(
            [
                "train",
                "--data",
                f"{where}/train.npz",
                "--rho",
                str(RHO),
                "--l2",
                str(L2),
                "--out",
                f"{where}/model.safetensors",
            ]
        )
        == 0
    )
    return where


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    given = [
        "score",
        "--model",
        f"{folder}/model.safetensors",
        "--architecture",
        "softmax",
        "--data",
        f"{folder}/train.npz",
    ]
    given += [
        "--query",
        f"{folder}/query.npz",
        "--rho",
        str(RHO),
        "--l2",
        str(L2),
        "--out",
        str(out),
    ]
    return [*given, *more]  # a later option replaces an earlier one


def refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(given) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("sam_if: ")
    assert message in lines[-1]


@pytest.fixture(scope="module")
def loaded(folder):
    """The same problem made by hand."""
    data, query = (
        read_samples(folder / "train.npz", torch.float64),
        read_samples(folder / "query.npz", torch.float64),
    )
    model = architecture("softmax", 5, 3).double()
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    parameters = Parameters.of(model.eval())
    objective = Objective.of_outputs(
        lambda w, part: parameters.call(w, part[0]),
        lambda z, part: cross_entropy(z, part[1], reduction="none"),
        (data.x, data.y),
        L2,
    )
    w = parameters.flat()
    return SimpleNamespace(
        problem=SAMProblem(objective, RHO),
        w=w,
        metric=lambda at: cross_entropy(parameters.call(at, query.x), query.y),
        model=model,
    )


def test_the_trained_model_is_at_the_fixed_point(loaded):
    assert loaded.problem.field(loaded.w).norm() < 1e-8


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_file_holds_the_librarys_scores(folder, loaded, tmp_path, suffix, capsys):
    out = tmp_path / f"scores{suffix}"
    # the queries, too, in several
    assert main(arguments(folder, out, "--chunk", "7", "--data-chunk", "3")) == 0
    table = pd.read_csv(out) if suffix == ".csv" else pd.read_parquet(out)
    expected = Estimator(loaded.problem.at(loaded.w), tol=1e-6).scores(loaded.metric).numpy()
    assert list(table.columns) == ["index", "score", "rank", "id", "label"]
    assert np.allclose(table["score"], expected, rtol=1e-5, atol=1e-8)
    assert table["rank"].tolist() == (np.argsort(np.argsort(table["score"])) + 1).tolist()
    assert table["id"].tolist() == [f"sample-{one}" for one in range(23)]
    assert [one.name for one in tmp_path.iterdir()] == [out.name]  # nothing is left beside it
    said = capsys.readouterr()
    worst = table.loc[table["rank"] == 1, "id"].iloc[0]
    assert f"most harmful: {worst}" in said.out
    assert "relative residual" in said.err


@pytest.mark.parametrize("kind", ["if", "sam_if"])
def test_the_other_estimators_are_the_librarys(folder, loaded, tmp_path, kind):
    assert (
        main(
            arguments(folder, tmp_path / "a.csv", "--estimator", kind, "--gradient-tolerance", "1")
        )
        == 0
    )
    expected = Estimator(loaded.problem.at(loaded.w), kind, tol=1e-6).scores(loaded.metric).numpy()
    assert np.allclose(pd.read_csv(tmp_path / "a.csv")["score"], expected, rtol=1e-5, atol=1e-8)


def test_options_reach_the_estimator(folder, loaded, tmp_path):
    more = ["--curvature", "ggn", "--damping", "0.1", "--drop-eq9-term", "--solver", "lsmr"]
    assert main(arguments(folder, tmp_path / "a.csv", *more)) == 0
    own = (
        Estimator(loaded.problem.at(loaded.w, "ggn"), damping=0.1, drop_eq9_term=True)
        .scores(loaded.metric)
        .numpy()
    )
    assert np.allclose(pd.read_csv(tmp_path / "a.csv")["score"], own, rtol=1e-4, atol=1e-8)
    whole = Estimator(loaded.problem.at(loaded.w)).scores(loaded.metric).numpy()
    assert not np.allclose(whole, own, rtol=1e-2)


def test_batches_that_share_a_perturbation(folder, loaded, tmp_path):
    more = ["--batch-size", "6", "--batch-seed", "3", "--gradient-tolerance", "1", "--chunk", "4"]
    assert main(arguments(folder, tmp_path / "a.csv", *more)) == 0
    problem = SAMProblem(loaded.problem.objective, RHO, partition(23, 6, 3))
    expected = Estimator(problem.at(loaded.w), tol=1e-6).scores(loaded.metric).numpy()
    assert np.allclose(pd.read_csv(tmp_path / "a.csv")["score"], expected, rtol=1e-4, atol=1e-8)


def test_checkpoints_are_summed(folder, loaded, tmp_path):
    half = {
        name: value / 2
        for name, value in safetensors.torch.load_file(folder / "model.safetensors").items()
    }
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    more = [
        "--estimator",
        "gif_checkpoints",
        "--checkpoints",
        f"{tmp_path}/half.safetensors:0.3",
        f"{folder}/model.safetensors:0.1",
    ]
    assert main(arguments(folder, tmp_path / "a.csv", *more)) == 0
    expected = gif_checkpoints(
        loaded.problem, [loaded.w / 2, loaded.w], [0.3, 0.1], loaded.metric
    ).numpy()
    assert np.allclose(pd.read_csv(tmp_path / "a.csv")["score"], expected)


def test_a_function_of_a_module_gives_the_model(folder, tmp_path, monkeypatch, loaded):
    (tmp_path / "my_model.py").write_text(
        "import safetensors.torch\nfrom torch import nn\n\ndef trained():\n    model ="
        " nn.Sequential(nn.Flatten(), nn.Linear(5, 3)).double()\n   "
        " model.load_state_dict("
        f"safetensors.torch.load_file({str(folder / 'model.safetensors')!r}))\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(arguments(folder, tmp_path / "a.csv", "--model", "my_model:trained")) == 0
    assert main(arguments(folder, tmp_path / "b.csv")) == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


def test_a_folder_of_images_is_read_by_class(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for part, count in (("train", 6), ("query", 2)):
        for label, name in enumerate(("cats", "dogs")):
            (tmp_path / part / name).mkdir(parents=True)
            for one in range(count):
                values = (draw.random((4, 3, 3)) * 120 + 100 * label).astype(np.uint8)
                Image.fromarray(values).save(tmp_path / part / name / f"{one}.png")
    model = str(tmp_path / "m.safetensors")
    assert (
        main(
            ["train", "--data", f"{tmp_path}/train", "--rho", "0.1", "--l2", "0.1", "--out", model]
        )
        == 0
    )
    given = [
        "score",
        "--model",
        model,
        "--architecture",
        "softmax",
        "--data",
        f"{tmp_path}/train",
        "--query",
        f"{tmp_path}/query",
    ]
    given += ["--rho", "0.1", "--l2", "0.1", "--out", f"{tmp_path}/a.csv"]
    assert main(given) == 0
    table = pd.read_csv(tmp_path / "a.csv")
    assert table["id"].tolist()[:2] == ["cats/0.png", "cats/1.png"]
    assert table["label"].tolist() == [0] * 6 + [1] * 6
    (tmp_path / "query" / "birds").mkdir()
    refused(given, "no class 'birds'", capsys)
    (tmp_path / "query" / "birds").rmdir()
    (tmp_path / "query" / "cats" / "0.png").write_bytes(b"no image")
    refused(given, "0.png is no image that can be read", capsys)
    Image.fromarray(np.zeros((5, 3, 3), np.uint8)).save(tmp_path / "query" / "cats" / "0.png")
    refused(given, "make all alike", capsys)


# ---- stopping ------------------------------------------------------------------------------------


def test_after_a_kill_the_same_command_goes_on(folder, tmp_path, monkeypatch, capsys):
    """The second call solves nothing and scores the rest; the file is that of a run that was not
    killed.
    """
    more = ["--chunk", "5"]
    assert main(arguments(folder, tmp_path / "whole.csv", *more)) == 0
    original, calls = Estimator.score_samples, []

    def killed(self, carriers, rows=None):
        calls.append(rows)
        if len(calls) == 3:
            raise MemoryError
        return original(self, carriers, rows)

    monkeypatch.setattr(Estimator, "score_samples", killed)
    assert main(arguments(folder, tmp_path / "parts.csv", *more)) == 2
    assert not (tmp_path / "parts.csv").exists()
    done = list(calls)
    monkeypatch.setattr(Estimator, "solve", lambda *_, **__: pytest.fail("solved again"))
    assert main(arguments(folder, tmp_path / "parts.csv", *more)) == 0
    assert [rows.start for rows in calls[len(done) :]] == [10, 15, 20]
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert {one.name for one in tmp_path.iterdir()} == {"whole.csv", "parts.csv"}
    assert "going on from there" in capsys.readouterr().err


NETWORK = """
import safetensors.torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(5, 3)).double()

    def forward(self, x):
        return self.layers(x){change}

def net():
    model = Net()
    model.layers.load_state_dict(safetensors.torch.load_file({weights!r}))
    return model
"""


def test_another_model_with_the_same_weights_does_not_go_on_from_it(folder, tmp_path, monkeypatch):
    """Killed between two chunks; then the user changes `forward`."""
    weights, file = str(folder / "model.safetensors"), tmp_path / "mine.py"
    model = ["--model", f"{file}:net", "--gradient-tolerance", "10", "--chunk", "5"]
    original = Estimator.score_samples

    def interrupted(self, carriers, rows=None):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, carriers, rows)

    file.write_text(NETWORK.format(change="", weights=weights))
    with monkeypatch.context() as killed:
        killed.setattr(Estimator, "score_samples", interrupted)
        status = main(arguments(folder, tmp_path / "a.csv", *model))
    assert status == 128 + signal.SIGTERM
    assert list(tmp_path.glob("a.csv.*.chunks/*.npy"))
    file.write_text(NETWORK.format(change=" * 0.7", weights=weights))
    assert main(arguments(folder, tmp_path / "a.csv", *model)) == 0
    assert main(arguments(folder, tmp_path / "fresh.csv", *model)) == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "fresh.csv").read_text()


HELPER = """
from torch import nn

class Layers(nn.Sequential):
    def forward(self, x):
        return super().forward(x.clamp(max={most}))
"""

USING_IT = """
import safetensors.torch
from torch import nn
from own_layers import Layers

def net():
    model = nn.Sequential(Layers(nn.Flatten(), nn.Linear(5, 3)).double())
    model[0].load_state_dict(safetensors.torch.load_file({weights!r}))
    return model
"""


def test_code_that_the_first_samples_do_not_show_is_in_the_key(folder, tmp_path, monkeypatch):
    """Killed between two chunks; then the user changes a module that the model's module imports, in
    what it does to the last sample alone.
    """
    with np.load(folder / "train.npz") as saved:
        arrays = {name: np.concatenate([saved[name]] * 3) for name in ("x", "y")}
    assert len(arrays["x"]) > score.KEYED
    arrays["x"][-1] *= 50
    np.savez(tmp_path / "train.npz", **arrays)
    helper = tmp_path / "own_layers.py"
    (tmp_path / "mine.py").write_text(USING_IT.format(weights=str(folder / "model.safetensors")))
    more = ["--model", f"{tmp_path}/mine.py:net", "--data", f"{tmp_path}/train.npz"]
    more += ["--gradient-tolerance", "100", "--chunk", "5", "--estimator", "if"]
    original = Estimator.score_samples

    def interrupted(self, carriers, rows=None):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, carriers, rows)

    def run(name, most):
        helper.write_text(HELPER.format(most=most))
        sys.modules.pop("own_layers", None)
        importlib.invalidate_caches()
        return main(arguments(folder, tmp_path / name, *more))

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with monkeypatch.context() as killed:
        killed.setattr(Estimator, "score_samples", interrupted)
        assert run("a.csv", most=1e3) == 128 + signal.SIGTERM
    assert run("a.csv", most=20.0) == 0
    assert run("fresh.csv", most=20.0) == 0
    assert run("before.csv", most=1e3) == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "fresh.csv").read_text()
    assert (tmp_path / "a.csv").read_text() != (tmp_path / "before.csv").read_text()


def test_what_a_score_depends_on_is_in_the_key_of_its_pieces(folder, tmp_path, monkeypatch):
    keys: list[str] = []

    def recorded(out, inputs):
        keys.append(digest(inputs))
        raise UserError("far enough")

    monkeypatch.setattr(score, "Pieces", recorded)

    def key(*more: str) -> str:
        assert main(arguments(folder, tmp_path / "a.csv", *more)) == 2
        return keys.pop()

    def moved(name: str, array: str) -> str:
        with np.load(folder / name) as saved:
            arrays = dict(saved)
        arrays[array] = arrays[array][::-1]
        np.savez(tmp_path / f"{array}-{name}", **arrays)
        return f"{tmp_path}/{array}-{name}"

    plain = key()
    work = ["--chunk", "7", "--data-chunk", "9", "--gradient-tolerance", "1"]
    assert plain == key(*work)  # how the work is cut does not matter
    halved = {
        name: value / 2
        for name, value in safetensors.torch.load_file(folder / "model.safetensors").items()
    }
    safetensors.torch.save_file(halved, tmp_path / "halved.safetensors")
    deciding = {
        "rho": "0.1", "l2": "0.1", "batch-size": "6", "batch-seed": "3", "estimator": "sam_if",
        "curvature": "ggn", "damping": "0.5", "solver": "lsmr", "tolerance": "1e-3",
        "dtype": "float32", "model": f"{tmp_path}/halved.safetensors",
        "data": moved("train.npz", "y"), "query": moved("query.npz", "x"),
    }  # fmt: skip
    others = [key(f"--{option}", value) for option, value in deciding.items()]
    others.append(key("--drop-eq9-term"))
    assert len({plain, *others}) == 1 + len(others)


def test_a_signal_ends_it_between_chunks(folder, tmp_path, monkeypatch, capsys):
    original = Estimator.score_samples

    def interrupted(self, carriers, rows=None):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, carriers, rows)

    monkeypatch.setattr(Estimator, "score_samples", interrupted)
    assert main(arguments(folder, tmp_path / "a.csv", "--chunk", "5")) == 128 + signal.SIGTERM
    assert (
        "stopped after 5 of 23 samples; the same command goes on from there"
        in capsys.readouterr().err
    )


# ---- bad input -----------------------------------------------------------------------------------

OPTIONS = [
    (["--rho", "0.9"], "the model is not trained to a minimum: the gradient's norm is"),
    (["--tolerance", "1e-30"], "gcr stopped at a relative residual of"),
    (["--out", "scores.txt"], "scores are written as .csv or .parquet"),
    (["--out", "nowhere/scores.csv"], "there is no folder nowhere"),
    (["--rho", "-1"], "argument --rho: '-1' is not a number of at least 0"),
    (["--damping", "x"], "argument --damping: 'x' is not a number"),
    (["--estimator", "magic"], "argument --estimator: invalid choice: 'magic'"),
    (["--estimator", "gif_checkpoints"], "needs --checkpoints"),
    (
        ["--estimator", "gif_checkpoints", "--checkpoints", "a.safetensors"],
        "give FILE.safetensors:RATE",
    ),
    (
        ["--estimator", "gif_checkpoints", "--checkpoints", "absent.safetensors:1"],
        "absent.safetensors: no such file",
    ),
    (["--batch-size", "0"], "argument --batch-size"),
    (["--model", "absent.safetensors"], "absent.safetensors: no such file"),
    (["--model", "absent:model"], "there is no module absent here"),
    (["--model", "os:nothing"], "os has no nothing; it has"),
    (["--model", "os:getcwd"], "getcwd() returns a str, not a torch.nn.Module"),
    (["--model", "model"], "write file.py:function, or package.module:function"),
    (["--architecture", "resnet"], "--architecture resnet: use softmax, or mlp-32"),
    (
        ["--architecture", "mlp-4"],
        "does not fit the model: 1.weight is [4, 5] in the model and [3, 5] in the file",
    ),
    (["--data", "absent.npz"], "absent.npz: no such file"),
    (["--device", "tpu"], "use cpu or cuda"),
]


@pytest.mark.parametrize(("given", "message"), OPTIONS, ids=[" ".join(one) for one, _ in OPTIONS])
def test_a_bad_option_is_one_line(folder, tmp_path, capsys, given, message):
    refused(arguments(folder, tmp_path / "out.csv", *given), message, capsys)
    assert not list(tmp_path.glob("out.csv*"))


def test_weights_alone_need_their_architecture(folder, tmp_path, capsys):
    given = arguments(folder, tmp_path / "out.csv")
    place = given.index("--architecture")
    refused(
        given[:place] + given[place + 2 :], "holds weights alone; say with --architecture", capsys
    )


def test_bad_data_are_one_line(folder, tmp_path, capsys):
    x, y = np.ones((4, 5)), np.zeros(4, np.int64)
    hurt = x.copy()
    hurt[2, 1] = np.nan
    cases = [
        ({"x": x}, "has no array 'y'; it has x"),
        ({"x": x, "y": y[:3]}, "there are 4 samples in 'x' and 3 in 'y'"),
        ({"x": x[:0], "y": y[:0]}, "'x' holds no samples"),
        ({"x": x, "y": y.astype(float)}, "'y' must be integers of shape [samples]"),
        ({"x": x, "y": y - 1}, "'y' holds -1; values count from 0"),
        ({"x": hurt, "y": y}, "'x' is nan at [2, 1]"),
        ({"x": y, "y": y}, "'x' must be numbers of shape [samples, values, ...]"),
        (
            {"x": x, "y": y, "id": np.array(["a", "b", "a", "c"])},
            "samples 0 and 2 have the same id 'a'",
        ),
        ({"x": x, "y": y, "id": np.array(["a"])}, "there are 4 samples in 'x' and 1 in 'id'"),
        (
            {"x": x[:, :3], "y": y},
            "a query's tensor 0 has the shape (5,), a training sample's (3,)",
        ),
        ({"x": x, "y": y + 7}, "a training label is 7, and the model has 3 classes"),
    ]
    for arrays, message in cases:
        np.savez(tmp_path / "bad.npz", **arrays)
        refused(
            arguments(folder, tmp_path / "out.csv", "--data", f"{tmp_path}/bad.npz"),
            message,
            capsys,
        )
    np.savez(tmp_path / "bad.npz", x=x[:, :3], y=y)
    refused(
        arguments(folder, tmp_path / "out.csv", "--query", f"{tmp_path}/bad.npz"),
        "a query's tensor 0 has the shape (3,)",
        capsys,
    )
    np.savez(tmp_path / "bad.npz", x=x, y=y + 3)
    refused(
        arguments(folder, tmp_path / "out.csv", "--query", f"{tmp_path}/bad.npz"),
        "a query's label is 3, and the model has 3",
        capsys,
    )
    np.savez(tmp_path / "bad.npz", x=np.array([{"a": 1}], dtype=object), y=y)
    refused(
        arguments(folder, tmp_path / "out.csv", "--data", f"{tmp_path}/bad.npz"),
        "is damaged, or no .npz file of plain arrays",
        capsys,
    )
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    refused(
        arguments(folder, tmp_path / "out.csv", "--data", f"{tmp_path}/bad.npz"),
        "is damaged, or no .npz file of plain arrays",
        capsys,
    )
    (tmp_path / "empty").mkdir()
    refused(
        arguments(folder, tmp_path / "out.csv", "--data", f"{tmp_path}/empty"),
        "holds no images",
        capsys,
    )


def test_weights_and_losses_that_are_no_numbers_are_refused(folder, tmp_path, capsys):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    out, file = tmp_path / "out.csv", tmp_path / "mine.py"
    for factor, message in (
        (float("nan"), "holds values that are not finite"),
        (1e308, "the loss of sample 0 is"),
    ):
        hurt = {name: value * factor for name, value in weights.items()}
        safetensors.torch.save_file(hurt, tmp_path / "hurt.safetensors")
        refused(arguments(folder, out, "--model", f"{tmp_path}/hurt.safetensors"), message, capsys)
    safetensors.torch.save_file(
        {name: value * float("nan") for name, value in weights.items()},
        tmp_path / "hurt.safetensors",
    )
    file.write_text(NETWORK.format(change="", weights=f"{tmp_path}/hurt.safetensors"))
    refused(arguments(folder, out, "--model", f"{file}:net"), "holds NaN or infinity", capsys)
    file.write_text("import torch\n\ndef net():\n    return torch.nn.Linear(4, 3)\n")
    refused(
        arguments(folder, out, "--model", f"{file}:net"),
        "called with a sample of shape (5,): RuntimeError",
        capsys,
    )


def test_a_model_at_no_minimum_has_an_indefinite_hessian(folder, tmp_path, capsys):
    torch.manual_seed(0)
    model = architecture("mlp-6", 5, 3).double()
    weights = {name: 3 * torch.randn_like(value) for name, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "net.safetensors")
    more = [
        "--model",
        f"{tmp_path}/net.safetensors",
        "--architecture",
        "mlp-6",
        "--gradient-tolerance",
        "100",
    ]
    refused(
        arguments(folder, tmp_path / "out.csv", *more),
        "the Hessian is indefinite: its smallest eigenvalue is",
        capsys,
    )
    assert main(arguments(folder, tmp_path / "out.csv", *more, "--curvature", "ggn")) == 0
    assert main(arguments(folder, tmp_path / "out.csv", *more, "--damping", "10")) == 0


def test_a_gradient_of_zero_is_refused(tmp_path, capsys):
    """Two samples that pull with the same force in opposite directions, at weights 0."""
    np.savez(tmp_path / "two.npz", x=np.ones((2, 3)), y=np.array([0, 1]))
    model = architecture("softmax", 3, 2).double()
    safetensors.torch.save_file(
        {name: torch.zeros_like(value) for name, value in model.state_dict().items()},
        tmp_path / "m.safetensors",
    )
    given = [
        "score",
        "--model",
        f"{tmp_path}/m.safetensors",
        "--architecture",
        "softmax",
        "--data",
        f"{tmp_path}/two.npz",
    ]
    refused(
        [*given, "--query", f"{tmp_path}/two.npz", "--out", f"{tmp_path}/a.csv"],
        "exactly 0 here, so SAM's perturbation has no",
        capsys,
    )
    more = [
        "--query",
        f"{tmp_path}/two.npz",
        "--out",
        f"{tmp_path}/a.csv",
        "--rho",
        "0",
        "--l2",
        "0.1",
    ]
    assert main([*given, *more]) == 0


def test_a_folder_that_is_missing_is_refused_in_training(folder, tmp_path, capsys):
    given = ["train", "--data", f"{folder}/train.npz", "--out"]
    refused([*given, f"{tmp_path}/model.pt"], "weights are written as .safetensors", capsys)
    refused([*given, f"{tmp_path}/none/model.safetensors"], "there is no folder", capsys)


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    assert "example:\n  python -m projects.sam_if score --model" in capsys.readouterr().out
