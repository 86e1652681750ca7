"""The command: what it writes, what it goes on with, and what it refuses, each in one line."""

import importlib
import json
import os
import signal
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from projects.meta_if import estimators, labels, score
from projects.meta_if.command import Problem, main
from projects.meta_if.total import at
from shared.commands.inputs import load_weights, user_weights
from shared.commands.key import digest
from shared.errors import UserError


def write(file, tasks, **changes):
    arrays = {name: part.numpy() for name, part in zip(score.NAMES, tasks, strict=True)}
    np.savez(file, **{**arrays, **changes})
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory, helpers):
    """Tasks, queries and trained weights in a folder."""
    folder = tmp_path_factory.mktemp("command")
    write(folder / "tasks.npz", helpers.make_tasks(5, 0), ids=np.array(list("abcde")))
    # other numbers of samples are fine
    write(folder / "test.npz", helpers.make_tasks(3, 9, train=9, val=5))
    fit = [
        "fit",
        "--model",
        "mlp-2",
        "--data",
        f"{folder}/tasks.npz",
        "--out",
        f"{folder}/meta.safetensors",
        "--steps",
        "10",
    ]
    assert main(fit) == 0
    return folder


def arguments(
    folder,
    out,
    *more,
    data="tasks.npz",
    query="test.npz",
    model="mlp-2",
    weights="meta.safetensors",
):
    files = [
        "--data",
        str(folder / data),
        "--query",
        str(folder / query),
        "--weights",
        str(folder / weights),
    ]
    return ["score", "--model", model, *files, "--out", str(out), *more]


@pytest.fixture
def refused(capsys):
    def run(given):
        capsys.readouterr()
        assert main(given) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("meta_if: ")]
        assert out == ""
        assert len(lines) == 1
        assert err.splitlines()[-1] == lines[0]
        return lines[0]

    return run


def problem_of(folder):
    tasks, _ = score.read_tasks(folder / "tasks.npz")
    queries, _ = score.read_tasks(folder / "test.npz")
    model = score.make_model("mlp-2", (4,)).double()
    tensors, metadata = user_weights(folder / "meta.safetensors")
    load_weights(model, tensors, "meta.safetensors")
    settings = Problem.from_record(json.loads(metadata["meta_if"]), "meta.safetensors")
    problem = score.make_problem("mlp-2", model, tasks, settings, None, settings.l2)
    return problem, score.make_problem("mlp-2", model, queries, settings, None, 0.0)


def test_scores_are_those_of_the_library_whatever_the_pieces(files, tmp_path):
    problem, tests = problem_of(files)
    lam = problem.inner.parameters.flat()
    state = at(problem, lam)
    s, _ = estimators.adjoint(state, estimators.metric_gradient(tests, lam))
    assert main(arguments(files, tmp_path / "whole.csv")) == 0
    assert main(arguments(files, tmp_path / "pieces.parquet", "--rows", "2")) == 0
    whole, pieces = (
        pd.read_csv(tmp_path / "whole.csv"),
        pd.read_parquet(tmp_path / "pieces.parquet"),
    )
    assert list(whole.columns) == ["index", "score", "rank", "task", "id"]
    assert whole["id"].tolist() == list("abcde")
    assert np.allclose(whole["score"], estimators.task_scores(state, s), rtol=1e-3)
    assert np.allclose(whole["score"], pieces["score"], rtol=1e-9)
    assert whole.loc[whole["rank"] == 1, "score"].item() == whole["score"].min()
    # nothing left behind
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pieces.parquet", "whole.csv"]
    for level, of in (("train", estimators.train_scores), ("val", estimators.val_scores)):
        assert (
            main(
                arguments(
                    files,
                    tmp_path / f"{level}.csv",
                    "--level",
                    level,
                    "--rows",
                    "2",
                    "--only",
                    "1",
                    "4",
                    "3",
                )
            )
            == 0
        )
        found = pd.read_csv(tmp_path / f"{level}.csv")
        wanted = of(state, s)[[1, 4, 3]]
        assert np.allclose(found["score"].to_numpy().reshape(wanted.shape), wanted, rtol=1e-3)
        assert found["task"].unique().tolist() == [1, 4, 3]
        assert found["id"].unique().tolist() == ["b", "e", "d"]
        assert found["sample"].max() == wanted.shape[1] - 1


def test_a_killed_run_goes_on_without_solving_again(files, tmp_path, monkeypatch):
    calls = []
    real = estimators.adjoint
    monkeypatch.setattr(estimators, "adjoint", lambda *given: calls.append(1) or real(*given))
    whole = score.scoring.score_in_chunks

    def killed(of, n, chunk, *rest):
        count = []

        def dies(piece):
            if count:
                raise KeyboardInterrupt
            count.append(1)
            return of(piece)

        return whole(dies, n, chunk, *rest)

    monkeypatch.setattr(score.scoring, "score_in_chunks", killed)
    given = arguments(files, tmp_path / "scores.csv", "--rows", "2")
    assert main(given) == 130
    assert not (tmp_path / "scores.csv").exists()
    monkeypatch.setattr(score.scoring, "score_in_chunks", whole)
    assert main(given) == 0
    assert len(calls) == 1
    assert len(pd.read_csv(tmp_path / "scores.csv")) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]


BODY = """
from torch import nn

class Body(nn.Sequential):
    def forward(self, x):
        return super().forward(x){change}

def body():
    return Body(nn.Flatten(), nn.Linear(4, 2), nn.Tanh())
"""


def test_another_model_with_the_same_weights_does_not_go_on_from_it(files, tmp_path, monkeypatch):
    """Killed between two pieces; then the user changes `forward`."""
    file = tmp_path / "mine.py"
    more = ["--rows", "2", "--tol", "10", "--damping", "1"]
    model = {"model": f"{file}:body"}
    original = estimators.task_scores

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    file.write_text(BODY.format(change=""))
    with monkeypatch.context() as killed:
        killed.setattr(estimators, "task_scores", interrupted)
        assert main(arguments(files, tmp_path / "a.csv", *more, **model)) == 128 + signal.SIGTERM
    assert list(tmp_path.glob("a.csv.*.chunks/*.npy"))
    file.write_text(BODY.format(change=" * 0.7"))
    assert main(arguments(files, tmp_path / "a.csv", *more, **model)) == 0
    assert main(arguments(files, tmp_path / "fresh.csv", *more, **model)) == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "fresh.csv").read_text()


def test_what_a_score_depends_on_is_in_the_key_of_its_pieces(files, tmp_path, monkeypatch, helpers):
    keys: list[str] = []

    def recorded(out, inputs):
        keys.append(digest(inputs))
        raise UserError("far enough")

    monkeypatch.setattr(score, "Pieces", recorded)

    def key(*more, **changes):
        given = arguments(files, tmp_path / "a.csv", "--tol", "10", *more, **changes)
        assert main(given) == 2
        return keys.pop()

    plain = key()
    # how the work is cut does not matter
    assert plain == key("--rows", "2", "--chunk", "2", "--iterations", "99")
    tensors, metadata = user_weights(files / "meta.safetensors")
    moved = {name: value + 0.1 for name, value in tensors.items()}
    save_file(moved, tmp_path / "moved.safetensors", metadata)
    write(tmp_path / "other.npz", helpers.make_tasks(5, 3))
    deciding = {
        "damping": "1", "solve-tol": "1e-3", "method": labels.DIRECT_IF, "level": "val",
        "penalty": "0.06", "l2": "0.04", "ways": "4", "only": "1",
    }  # fmt: skip
    others = [key(f"--{option}", value) for option, value in deciding.items()]
    others.append(key(weights=tmp_path / "moved.safetensors"))
    others.append(key(data=tmp_path / "other.npz"))
    others.append(key(query=tmp_path / "other.npz"))
    assert len({plain, *others}) == 1 + len(others)


def test_code_that_the_first_task_does_not_show_is_in_the_key(files, tmp_path, monkeypatch):
    """The user changes a module that the model's module imports."""
    keys: list[str] = []

    def recorded(out, inputs):
        keys.append(digest(inputs))
        raise UserError("far enough")

    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom own_layers import Clipped\ndef body():\n    return"
        " nn.Sequential(Clipped(), nn.Flatten(), nn.Linear(4, 2), nn.Tanh())\n"
    )
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(score, "Pieces", recorded)
    monkeypatch.setattr(score, "load_weights", lambda *_: None)
    for most in (1e3, 1e3, 1e6):
        (tmp_path / "own_layers.py").write_text(
            "from torch import nn\nclass Clipped(nn.Module):\n    def forward(self, x):\n"
            f"        return x.clamp(max={most})\n"
        )
        sys.modules.pop("own_layers", None)
        importlib.invalidate_caches()
        torch.manual_seed(0)
        given = arguments(
            files, tmp_path / "a.csv", "--tol", "10", model=f"{tmp_path}/mine.py:body"
        )
        assert main(given) == 2
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_the_methods_that_are_offered_are_those_there_are():
    assert tuple(estimators.METHODS) == labels.METHODS


def test_a_body_of_the_users_own_module(files, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef body():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2),"
        " nn.Tanh())\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(arguments(files, tmp_path / "own.csv", model="mine:body")) == 0
    assert main(arguments(files, tmp_path / "named.csv")) == 0
    assert (tmp_path / "own.csv").read_text() == (tmp_path / "named.csv").read_text()


def test_a_module_of_the_users_own_that_is_made_already(files, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nbody = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Tanh())\n"
    )
    assert main(arguments(files, tmp_path / "own.csv", model=f"{tmp_path}/mine.py:body")) == 0
    assert main(arguments(files, tmp_path / "named.csv")) == 0
    assert (tmp_path / "own.csv").read_text() == (tmp_path / "named.csv").read_text()


def test_imaml_by_the_command(files, tmp_path):
    weights = tmp_path / "whole.safetensors"
    given = [
        "fit",
        "--model",
        "mlp-2-3",
        "--inner",
        "imaml",
        "--penalty",
        "20",
        "--data",
        f"{files}/tasks.npz",
        "--out",
        str(weights),
    ]
    assert main([*given, "--steps", "10"]) == 0
    assert main(arguments(files, tmp_path / "s.csv", model="mlp-2-3", weights=weights)) == 0
    assert len(pd.read_csv(tmp_path / "s.csv")) == 5


# ---- refusals ------------------------------------------------------------------------------------


def test_weights_that_are_no_minimum(files, tmp_path, refused):
    from safetensors import safe_open

    with safe_open(files / "meta.safetensors", framework="pt") as saved:
        metadata = saved.metadata()
    tensors = {name: value + 0.1 for name, value in load_file(files / "meta.safetensors").items()}
    save_file(tensors, tmp_path / "off.safetensors", metadata)
    line = refused(arguments(files, tmp_path / "s.csv", weights=tmp_path / "off.safetensors"))
    assert "not trained to a minimum" in line
    assert "above 1e-05" in line
    allowed = arguments(
        files,
        tmp_path / "s.csv",
        "--tol",
        "10",
        "--damping",
        "1",
        weights=tmp_path / "off.safetensors",
    )
    assert main(allowed) == 0


def test_an_indefinite_total_hessian_without_damping(files, tmp_path, refused, monkeypatch):
    from projects.meta_if.total import Implicit

    product = Implicit.product
    monkeypatch.setattr(
        Implicit,
        "product",
        lambda self, v, curvature="exact": product(self, v, curvature) - 0.3 * v,
    )
    line = refused(arguments(files, tmp_path / "s.csv"))
    assert "indefinite" in line
    assert "damping above" in line
    assert main(arguments(files, tmp_path / "s.csv", "--damping", "0.5")) == 0


def test_a_solve_that_does_not_converge_says_its_residual(files, tmp_path, refused):
    line = refused(
        arguments(files, tmp_path / "s.csv", "--iterations", "2", "--solve-tol", "1e-12")
    )
    assert "relative residual of" in line
    assert "2 iterations" in line


def test_a_task_that_is_not_there(files, tmp_path, refused):
    assert "there is no task 5: the tasks are numbered 0 to 4" in refused(
        arguments(files, tmp_path / "s.csv", "--only", "1", "5")
    )
    assert "twice" in refused(arguments(files, tmp_path / "s.csv", "--only", "1", "1"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids": np.array(list("abcda"))}, "samples 0 and 4 have the same id 'a'"),
        ({"ids": np.array(list("abc"))}, "there are 5 tasks in 'x_train' and 3 in 'ids'"),
        (
            {"x_val": np.full((5, 7, 4), np.nan)},
            "'x_val' is nan at [0, 0, 0]",
        ),
        ({"y_val": np.full((5, 7), 3)}, "a task has a class 3"),
        ({"y_val": np.full((5, 7), -1)}, "'y_val' holds -1; values count from 0"),
        ({"y_train": np.zeros((5, 6))}, "integers"),
        ({"y_train": np.zeros((4, 6), int)}, "there are 5 tasks in 'x_train' and 4 in 'y_train'"),
        ({"x_train": np.zeros((5, 6, 3))}, "they must be of one kind"),
    ],
)
def test_faulty_tasks(files, tmp_path, refused, helpers, changes, said):
    write(tmp_path / "bad.npz", helpers.make_tasks(5, 0), **changes)
    assert said in refused(arguments(files, tmp_path / "s.csv", data=tmp_path / "bad.npz"))


def test_query_tasks_of_another_shape(files, tmp_path, refused, helpers):
    tasks = helpers.make_tasks(2, 0)
    write(tmp_path / "wide.npz", tasks, x_train=np.zeros((2, 6, 5)), x_val=np.zeros((2, 7, 5)))
    assert "query tasks has the shape (5,)" in refused(
        arguments(files, tmp_path / "s.csv", query=tmp_path / "wide.npz")
    )
    write(tmp_path / "more.npz", tasks, y_val=np.full((2, 7), 4))
    assert "a class 4" in refused(arguments(files, tmp_path / "s.csv", query=tmp_path / "more.npz"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": "none.npz"}, "no such file"),
        ({"weights": "none.safetensors"}, "none.safetensors: no such file"),
        ({"weights": "tasks.npz"}, "or no .safetensors file"),
        ({"data": "meta.safetensors"}, "or no .npz file of plain arrays"),
        ({"model": "mlp-3"}, "does not fit the model"),
        ({"model": "resnet"}, "there is no backbone 'resnet'"),
        ({"model": "no_such_module:body"}, "there is no module no_such_module here"),
        ({"model": "json:body"}, "json has no body; it has"),
        ({"model": "time:time"}, "time() returns a float, not a torch.nn.Module"),
    ],
)
def test_files_and_models_that_are_none(files, tmp_path, given, said, refused):
    assert said in refused(arguments(files, tmp_path / "s.csv", **given))


def test_a_file_without_an_array_says_which_one(files, tmp_path, refused):
    np.savez(tmp_path / "bad.npz", x_train=np.zeros((1, 2, 4)))
    line = refused(arguments(files, tmp_path / "s.csv", data=tmp_path / "bad.npz"))
    assert line.endswith("has no array 'y_train'; it has x_train")


def test_settings_in_the_weights_that_are_none_are_refused(files, tmp_path, refused):
    tensors = load_file(files / "meta.safetensors")
    for text, said in (
        ("{", "its metadata are damaged"),
        ("[1]", "its metadata are damaged"),
        ('{"inner":"anil","ways":3,"penalty":-1,"l2":0.03}', "--penalty -1"),
    ):
        save_file(tensors, tmp_path / "odd.safetensors", {"meta_if": text})
        assert said in refused(
            arguments(files, tmp_path / "s.csv", weights=tmp_path / "odd.safetensors")
        )


def test_pickles_are_not_read(files, tmp_path, refused, helpers):
    write(
        tmp_path / "objects.npz", helpers.make_tasks(2, 0), x_train=np.array([{}, {}], dtype=object)
    )
    assert "Object arrays cannot be" in refused(
        arguments(files, tmp_path / "s.csv", data=tmp_path / "objects.npz")
    )


def test_options_are_refused_before_any_work(files, tmp_path, refused):
    assert "--damping" in refused(arguments(files, tmp_path / "s.csv", "--damping", "-1"))
    assert ".csv or .parquet" in refused(arguments(files, tmp_path / "s.txt"))
    assert "there is no method 'x'" in refused(
        arguments(files, tmp_path / "s.csv", "--method", "x")
    )
    assert "samples are scored" in refused(
        arguments(files, tmp_path / "s.csv", "--method", "direct-IF", "--level", "val")
    )
    save_file(load_file(files / "meta.safetensors"), tmp_path / "bare.safetensors")
    bare = refused(arguments(files, tmp_path / "s.csv", weights=tmp_path / "bare.safetensors"))
    assert "--inner --ways --penalty --l2" in bare


@pytest.mark.parametrize("inner", ["anil", "imaml"])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("dropout(x, 0.5)", "differ from call to call"),
        ("batch_norm(x, None, None, training=True)", "depends on the samples beside it"),
    ],
)
def test_functional_layers_in_training_mode(files, tmp_path, refused, inner, function, said):
    outputs = 2 if inner == "anil" else 3
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom torch.nn import functional\n\nclass Body(nn.Linear):\n"
        f"    def forward(self, x):\n        x = super().forward(x)\n        return functional."
        f"{function}\n\ndef body():\n    return Body(4, {outputs})\n"
    )
    given = ["fit", "--model", f"{tmp_path}/mine.py:body", "--inner", inner, "--penalty", "20"]
    files_of = ["--data", str(files / "tasks.npz"), "--out", str(tmp_path / "m.safetensors")]
    assert said in refused([*given, *files_of])


def test_a_norm_whose_third_derivatives_are_wrong(files, tmp_path, refused, monkeypatch):
    (tmp_path / "normed.py").write_text(
        "from torch import nn\ndef body():\n    return nn.Sequential(nn.Linear(4, 2),"
        " nn.LayerNorm(2))\n"
    )
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.LayerNorm(2))
    save_file(
        model.state_dict(),
        tmp_path / "normed.safetensors",
        {"meta_if": '{"inner":"anil","ways":3,"penalty":0.05,"l2":0.03}'},
    )
    line = refused(
        arguments(
            files, tmp_path / "s.csv", model="normed:body", weights=tmp_path / "normed.safetensors"
        )
    )
    assert "third derivatives of LayerNorm are wrong" in line
