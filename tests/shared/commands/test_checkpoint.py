"""A checkpoint brings weights and optimizer back to the bit; pieces outlive a kill."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from shared.commands.checkpoint import load_checkpoint, save_checkpoint
from shared.commands.pieces import Pieces, remove_pieces
from shared.errors import UserError


def made(kind=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return dict(model.named_parameters()), kind(model.parameters(), lr=0.1, **options)


def step(parameters, optimizer, number):
    torch.manual_seed(number)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})]
)
def test_after_a_checkpoint_the_same_steps_follow(tmp_path, kind, options):
    path = tmp_path / "c.safetensors"
    parameters, optimizer = made(kind, **options)
    for number in range(3):
        step(parameters, optimizer, number)
    save_checkpoint(path, parameters, optimizer, {"steps": 3, "more": [1, None]})
    for number in range(3, 5):
        step(parameters, optimizer, number)

    again, other = made(kind, **options)
    assert load_checkpoint(path, again, other) == {"steps": 3, "more": [1, None]}
    for number in range(3, 5):
        step(again, other, number)
    assert all(torch.equal(again[name], parameters[name]) for name in parameters)


def test_without_a_checkpoint_a_run_begins(tmp_path):
    assert load_checkpoint(tmp_path / "none", *made()) is None


def test_a_damaged_or_foreign_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "c.safetensors"
    parameters, optimizer = made()
    save_checkpoint(path, {"weight": parameters["weight"]}, optimizer, {})
    with pytest.raises(UserError, match=r"c\.safetensors is damaged \(.*\); name another --out"):
        load_checkpoint(path, parameters, optimizer)
    wide = nn.Linear(3, 1)
    save_checkpoint(path, dict(wide.named_parameters()), torch.optim.SGD(wide.parameters()), {})
    with pytest.raises(UserError, match="is damaged"):  # [1, 3] would go into [2, 3]
        load_checkpoint(path, parameters, optimizer)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint(path, parameters, optimizer)


# ---- pieces --------------------------------------------------------------------------------------


def test_a_piece_is_made_once(tmp_path):
    out = tmp_path / "scores.csv"
    calls = []

    def make():
        calls.append(1)
        return torch.arange(3.0)

    for _ in range(2):
        with Pieces(out, {"w": 1}) as pieces:
            assert pieces.has("solution") == bool(calls)
            assert pieces.array("solution", make).tolist() == [0, 1, 2]
    assert calls == [1]
    with Pieces(out, {"w": 2}) as pieces:
        assert not pieces.has("solution")
        pieces.array("solution", make)
    (tmp_path / "scores.csv.notes.chunks").mkdir()  # the user's own
    remove_pieces(out)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv.notes.chunks"]


def test_a_call_that_made_nothing_leaves_nothing(tmp_path):
    def work():
        with Pieces(tmp_path / "a.csv", {}) as pieces:
            pieces.array("x", lambda: json.loads("{"))

    with pytest.raises(ValueError, match="Expecting"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_make_the_same_pieces(tmp_path):
    with Pieces(tmp_path / "a.csv", {}) as pieces:
        pieces.array("x", lambda: np.zeros(1))
        with pytest.raises(UserError, match="another process"), Pieces(tmp_path / "a.csv", {}):
            pass
        with Pieces(tmp_path / "b.csv", {}):
            pass
    with Pieces(tmp_path / "a.csv", {}) as pieces:
        assert pieces.has("x")


def test_a_damaged_piece_is_named(tmp_path):
    with Pieces(tmp_path / "a.csv", {}) as pieces:
        pieces.array("x", lambda: np.zeros(3))
        (pieces.folder / "x.npy").write_bytes(b"")
        with pytest.raises(UserError, match=r"x\.npy is damaged; delete it and run again"):
            pieces.array("x", lambda: np.zeros(3))
