"""The key changes with everything that the result depends on, and with nothing else."""

import copy
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared import paths
from shared.commands.inputs import user_model, user_module
from shared.commands.key import digest, loaded_code, model_digest, source_digest
from shared.commands.recipe import Recipe
from shared.errors import UserError


class Settings(Recipe):
    rate: float = 0.5


def inputs(tmp_path):
    file, folder = tmp_path / "data.txt", tmp_path / "folder"
    file.write_text("content")
    folder.mkdir(exist_ok=True)
    (folder / "a").write_text("a")
    return {
        "x": torch.arange(6.0).reshape(2, 3),
        "y": np.arange(3),
        "half": torch.zeros(3, dtype=torch.bfloat16),
        "n": 3,
        "text": "t",
        "list": [1, torch.zeros(2)],
        "mapping": {"a": 1, "b": np.zeros(2)},
        "recipe": Settings(),
        "file": file,
        "folder": folder,
        "model": nn.Linear(2, 2).requires_grad_(False).apply(lambda m: nn.init.ones_(m.weight)),
    }


def test_equal_inputs_have_one_key_in_any_order(tmp_path):
    given = inputs(tmp_path)
    with torch.no_grad():
        given["model"].bias.zero_()
    key = digest(given)
    assert len(key) == 64
    assert digest(dict(reversed(given.items()))) == key
    assert digest(copy.deepcopy(given)) == key
    strided = given["x"].T.contiguous().T
    assert digest({**given, "x": strided}) == key  # content, not layout


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("x", torch.arange(6.0).reshape(3, 2)),
        ("x", torch.arange(6.0).reshape(2, 3).double()),
        ("x", torch.arange(1.0, 7.0).reshape(2, 3)),
        ("y", np.arange(3).astype(np.int32)),
        ("y", np.arange(1, 4)),
        ("half", torch.tensor([0, 0, 1], dtype=torch.bfloat16)),
        ("n", 4),
        ("text", "u"),
        ("list", [torch.zeros(2), 1]),
        ("list", [1, torch.ones(2)]),
        ("mapping", {"a": 1, "b": np.ones(2)}),
        ("mapping", {"a": 1, "c": np.zeros(2)}),
        ("recipe", Settings(rate=0.25)),
        ("model", nn.Linear(2, 2)),
        ("more", None),
    ],
)
def test_another_input_has_another_key(tmp_path, name, other):
    given = inputs(tmp_path)
    assert digest({**given, name: other}) != digest(given)


def test_files_count_by_content(tmp_path):
    given = {name: value for name, value in inputs(tmp_path).items() if name in ("file", "folder")}
    key = digest(given)
    (tmp_path / "folder" / "a").write_text("b")
    changed = digest(given)
    (tmp_path / "folder" / "a").rename(tmp_path / "folder" / "c")
    renamed = digest(given)
    given["file"].write_text("other")
    assert len({key, changed, renamed, digest(given)}) == 4
    with pytest.raises(UserError, match="none: No such file"):
        digest({"file": tmp_path / "none"})


def test_what_runs_together_is_kept_apart():
    assert digest({"a": "bc"}) != digest({"ab": "c"})
    assert digest({"a": 1, "b": 2}) != digest({"ajson 1b": 2})  # what is hashed for each, joined
    assert digest({"a": [1, 2]}) != digest({"a": [[1], 2]})
    assert digest({"a": 1}) != digest({"a": "1"})


def test_what_has_no_content_is_refused():
    for value in (float("nan"), object(), np.array([object()])):
        with pytest.raises((TypeError, ValueError)):
            digest({"x": value})


# ---- models --------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Its outputs depend on a number that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("shift", torch.zeros(2), persistent=False)
        self.scale = 1.0

    def forward(self, x):
        return {"logits": self.scale * self.norm(self.linear(x)) + self.shift, "note": "text"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Scaled()


BATCH = torch.arange(6.0).reshape(3, 2)


def changes(model, change, *batch):
    before = model_digest(model, *batch)
    with torch.no_grad():
        change(model)
    return model_digest(model, *batch) != before


def test_a_model_is_left_as_it_is(model):
    state = copy.deepcopy(model.state_dict())
    key = model_digest(model, BATCH)
    assert model_digest(copy.deepcopy(model), BATCH) == key
    assert model.training
    assert model.norm.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.norm.eval()
    model_digest(model, BATCH)
    assert (model.training, model.norm.training) == (True, False)


def test_parameters_buffers_and_modes_count(model):
    assert changes(model, lambda m: m.linear.bias.add_(1))
    assert changes(model, lambda m: m.norm.running_mean.add_(1))
    assert changes(model, lambda m: m.shift.add_(1))  # which no checkpoint keeps
    assert changes(model, lambda m: m.norm.eval())
    assert not changes(model, lambda m: None, BATCH)


def test_outputs_count_where_weights_are_equal(model):
    def twice(m):
        m.scale = 2.0

    assert not changes(copy.deepcopy(model), twice)
    assert changes(model, twice, BATCH)


def test_the_random_numbers_of_a_run_are_left_alone(model):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    model_digest(model, BATCH)
    assert torch.equal(torch.rand(2), wanted)


def test_the_source_of_a_users_module_counts(tmp_path):
    file = tmp_path / "rewards.py"
    keys = set()
    for body in ("return 1", "return 2"):
        file.write_text(f"def reward(): {body}\n")
        keys.add(source_digest(user_module(f"{file}:reward", "--reward")))
    assert len(keys) == 2
    with pytest.raises(UserError, match="written in no file"):
        source_digest(len)


HELPER = """
from torch import nn

class Clipped(nn.Module):
    def forward(self, x):
        return x.clamp(max={most})
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a helper of a user's module, and forgets it as another process would."""

    def write(most):
        (tmp_path / "layers").mkdir(exist_ok=True)  # without __init__.py
        (tmp_path / "layers" / "clipped.py").write_text(HELPER.format(most=most))
        for name in ("layers", "layers.clipped", "user_mine"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


def test_all_modules_that_a_users_model_is_made_of_count(tmp_path, written):
    """Also where the outputs on the batch do not show the change, and the class is torch's own."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom layers.clipped import Clipped\n"
        "def net(): return nn.Sequential(nn.Identity(), Clipped())\n"
    )
    keys = []
    for most in (1e3, 1e3, 1e6):
        written(most)
        keys.append(model_digest(user_model(f"{tmp_path}/mine.py:net"), BATCH))
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_what_a_users_function_imports_counts(tmp_path, written):
    (tmp_path / "mine.py").write_text("import layers.clipped\ndef reward(): return 1\n")
    keys = []
    for most in (1e3, 1e3, 1e6):
        written(most)
        keys.append(source_digest(user_module(f"{tmp_path}/mine.py:reward", "--reward")))
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_installed_packages_and_our_own_are_not_the_users_code():
    names = set(loaded_code())
    assert names.isdisjoint({"torch", "numpy", "json", "pytest", "shared", "shared.commands.key"})
    files = {Path(sys.modules[name].__file__).resolve() for name in names if name in sys.modules}
    for package in ("shared", "projects"):
        assert not any(paths.ROOT / package in file.parents for file in files)
