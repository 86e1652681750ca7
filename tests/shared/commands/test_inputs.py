"""Whatever a user hands over is taken, or refused in one line that says what is wrong."""

import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared.commands.inputs import (
    Array,
    load_weights,
    user_arrays,
    user_code,
    user_model,
    user_module,
    user_weights,
)
from shared.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "user_mine"):  # of another test
        monkeypatch.delitem(sys.modules, name, raising=False)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refused(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- functions -----------------------------------------------------------------------------------


def test_a_function_of_a_file_or_of_a_module(here):
    (here / "helper_of_mine.py").write_text("BASE = 40\n")
    (here / "mine_one.py").write_text(
        "from dataclasses import dataclass\nimport helper_of_mine\n"
        "@dataclass\nclass Box:\n    x: int = 2\n"
        "def add(): return helper_of_mine.BASE + Box().x\n"
    )
    package = here / "bundle"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "part.py").write_text("def add(): return 7\n")
    assert user_module("mine_one.py:add", "--reward")() == 42
    assert user_module(f"{here}/mine_one.py:add", "--reward")() == 42
    assert user_module("mine_one:add", "--reward")() == 42
    assert user_module("bundle.part:add", "--reward")() == 7
    assert user_module("math:sqrt", "--reward")(4) == 2


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        ("", "mine", "write file.py:function, or package.module:function"),
        ("", "mine.py:", "write file.py:function"),
        ("", "other.py:f", "there is no file other.py"),
        ("", "no_such_thing:f", "there is no module no_such_thing here"),
        ("", "mine.part:f", "there is no module mine.part here"),
        ("import no_such_thing", "mine:f", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def g(): pass", "mine.py:f", "mine.py has no f; it has g"),
        ("f = 3", "mine.py:f", "f is a int, not a function"),
        ("def f(:", "mine.py:f", "mine.py, line 1: invalid syntax"),
        ("def f(:", "mine:f", "mine.py, line 1: invalid syntax"),
        ("\n1 / 0", "mine.py:f", "ZeroDivisionError: division by zero"),
        ("\n1 / 0", "mine.py:f", "mine.py, line 2)"),
        ("import sys; sys.exit(3)", "mine.py:f", "it ends the program (SystemExit 3)"),
        ("raise BaseException('a\\nb')", "mine.py:f", "BaseException: a b"),
        ("x = '\\0'\n\0", "mine.py:f", "null bytes"),
    ],
)
def test_whatever_is_wrong_with_a_module_is_one_line(here, source, text, message):
    (here / "mine.py").write_text(source)
    said = refused(user_module, text, "--reward")
    assert said.startswith(f"--reward {text}: ")
    assert message in said
    assert "user_mine" not in sys.modules or source in ("def g(): pass", "f = 3")


@pytest.mark.parametrize("error", [ValueError("a\nb"), SystemExit(1), RecursionError("deep")])
def test_what_a_users_function_raises_is_one_line(error):
    def call():
        with user_code("--reward mine:f"):
            raise error

    said = refused(call)
    assert said.startswith("--reward mine:f: ")
    assert type(error).__name__ in said


def test_a_user_may_still_stop_it():
    def call():
        with user_code("--reward mine:f"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call()


# ---- models --------------------------------------------------------------------------------------


def test_a_model_is_a_module_or_made_by_a_function_or_a_class(here):
    (here / "nets.py").write_text(
        "from torch import nn\nready = nn.Linear(2, 3)\ndef make(): return nn.Linear(2, 4)\n"
        "class Net(nn.Linear):\n    def __init__(self): super().__init__(2, 5)\n"
        "def wrong(): return 3\ndef needs(width): return nn.Linear(2, width)\nnumber = 3\n"
    )
    assert user_model("nets.py:ready").out_features == 3
    assert user_model("nets:make").out_features == 4
    assert user_model("nets:Net").out_features == 5
    for name, message in (
        ("wrong", "wrong() returns a int, not a torch.nn.Module"),
        ("needs", "TypeError: needs() missing 1 required positional argument: 'width'"),
        ("number", "number is a int; give a torch.nn.Module, or a function that returns one"),
    ):
        assert message in refused(user_model, f"nets:{name}")


def test_weights_must_fit_and_be_finite(tmp_path):
    file = tmp_path / "w.safetensors"
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    save_file(model.state_dict(), file, {"by": "me"})
    tensors, metadata = user_weights(file)
    assert metadata == {"by": "me"}
    load_weights(other, tensors, "w")
    assert torch.equal(other.weight, model.weight)

    for change, message in (
        ({"bias": torch.zeros(1)}, "bias is [3] in the model and [1] in the file"),
        ({"more": torch.zeros(1)}, "more is absent in the model and [1] in the file"),
    ):
        assert message in refused(load_weights, model, {**tensors, **change}, "w")
    del tensors["bias"]
    assert "bias is [3] in the model and absent" in refused(load_weights, model, tensors, "w")
    save_file({"a": torch.tensor([1.0, float("nan")])}, file)
    assert "a holds values that are not finite" in refused(user_weights, file)
    file.write_bytes(file.read_bytes()[:-2])
    assert "damaged, or no .safetensors file" in refused(user_weights, file)
    assert "no such file" in refused(user_weights, tmp_path / "none")
    assert "no such file" in refused(user_weights, tmp_path)


# ---- arrays --------------------------------------------------------------------------------------

WANTED = {
    "x": Array("fiu", ("samples", 2, ...)),
    "y": Array("iu", ("samples",), least=0),
    "id": Array("USiu", ("samples",), required=False),
}
GOOD = {"x": np.ones((3, 2, 4)), "y": np.arange(3)}


def test_arrays_are_read_and_the_rest_is_not(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, **GOOD, other=np.array([object()]))
    found = user_arrays(file, WANTED)
    assert set(found) == {"x", "y"}
    assert np.array_equal(found["x"], GOOD["x"])
    np.savez_compressed(file, **GOOD, id=np.array(["a", "b", "c"]))
    assert user_arrays(file, WANTED)["id"].tolist() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "has no array 'x'; it has y"),
        ({"x": np.ones(3)}, "'x' must be numbers of shape [samples, 2, ...], not float64 of"),
        ({"x": np.ones((3, 5))}, "'x' must be numbers of shape [samples, 2, ...]"),
        ({"x": np.ones((3, 2)).astype(complex)}, "not complex128 of shape [3, 2]"),
        ({"x": np.ones((4, 2))}, "there are 4 samples in 'x' and 3 in 'y'"),
        ({"x": np.ones((0, 2))}, "'x' holds no samples"),
        ({"x": np.full((3, 2), np.nan)}, "'x' is nan at [0, 0]"),
        ({"y": np.ones((3, 1), int)}, "'y' must be integers of shape [samples], not int64 of"),
        ({"y": np.ones(3)}, "'y' must be integers"),
        ({"y": -np.arange(3)}, "'y' holds -2; values count from 0"),
        ({"id": np.arange(2)}, "there are 3 samples in 'x' and 2 in 'id'"),
        ({"y": np.array([object()] * 3)}, "no .npz file of plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, change, message):
    file = tmp_path / "a.npz"
    arrays = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    np.savez(file, **arrays)
    said = refused(user_arrays, file, WANTED)
    assert said.startswith(f"{file}")
    assert message in said


def test_a_file_that_is_no_npz_is_refused_at_whatever_byte_it_ends(tmp_path):
    file = tmp_path / "a.npz"
    assert "no such file" in refused(user_arrays, file, WANTED)
    assert "a folder" in refused(user_arrays, tmp_path, WANTED)
    np.savez_compressed(file, **GOOD)
    whole = file.read_bytes()
    for size in range(0, len(whole), 37):
        file.write_bytes(whole[:size])
        assert "numpy.savez(path, x=..., y=...)" in refused(user_arrays, file, WANTED)
    for size in range(70, 120, 10):  # flipped in the first array
        file.write_bytes(whole[:size] + bytes([whole[size] ^ 255]) + whole[size + 1 :])
        refused(user_arrays, file, WANTED)
    np.save(tmp_path / "b.npy", GOOD["x"])
    refused(user_arrays, tmp_path / "b.npy", WANTED)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("x.npy", "text")
    file.write_bytes(buffer.getvalue())
    refused(user_arrays, file, WANTED)
