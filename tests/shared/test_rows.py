"""The rows file: what may stand in it, and that nothing leaves half of one."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from shared import rows
from shared.errors import UserError

CONTENT = {
    "paper": "toy",
    "experiment": "squares",
    "scale": "cpu",
    "config": {"n": 1},
    "seed": 0,
    "provenance": {"cpu": "x"},
    "rows": [{"n": 1}],
}


@pytest.fixture
def path(tmp_path):
    return rows.rows_path(tmp_path, "cpu", "toy", "squares")


def test_what_is_written_is_read(path):
    line = {"name": "é", "n": 3, "ok": True, "none": None, "peak_bytes": 1.5, "x_ratio": 0.1 + 0.2}
    rows.write_rows(path, {**CONTENT, "rows": [line, {"n": 4}]}, {"grid": np.arange(4.0)})
    content = rows.read_rows(path)
    assert content.rows == [line, {"n": 4}]
    assert (content.schema_version, content.paper, content.seed) == (1, "toy", 0)
    frame = rows.read_frame(path)
    assert list(frame["n"]) == [3, 4]
    assert frame["x_ratio"][0] == 0.1 + 0.2
    assert frame.attrs["provenance"] == {"cpu": "x"}
    np.testing.assert_array_equal(rows.read_array(frame, "grid"), np.arange(4.0))


def test_numpy_scalars_become_plain():
    row = rows.check_row({"n": np.int64(3), "loss": np.float32(0.5), "ok": np.bool_(True)})
    assert row == {"n": 3, "loss": 0.5, "ok": True}
    assert [type(value) for value in row.values()] == [int, float, bool]


WRONG = [
    ({"loss": float("nan")}, "no finite number"),
    ({"loss": float("inf")}, "no finite number"),
    ({"value": 1.5}, "must end with a unit"),
    ({"seconds_per": 1.5}, "must end with a unit"),
    ({"Loss": 1.5}, "snake case"),
    ({"a b": 1}, "snake case"),
    ({"n": [1]}, "holds a list"),
    ({"n": {}}, "holds a dict"),
    ({}, "empty row"),
]


@pytest.mark.parametrize(("row", "said"), WRONG)
def test_a_row_that_may_not_stand_is_refused_when_written(path, row, said):
    with pytest.raises(ValueError, match=said):
        rows.check_row(row)
    with pytest.raises(ValueError, match=said):
        rows.write_rows(path, {**CONTENT, "rows": [row]}, {})
    assert not path.exists()


@pytest.mark.parametrize(("row", "said"), [one for one in WRONG if one[1] != "no finite number"])
def test_and_when_read(path, row, said):
    rows.write_rows(path, CONTENT, {})
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": [row]}))
    with pytest.raises(UserError) as caught:
        rows.read_rows(path)
    assert "repro run toy/squares --scale cpu" in str(caught.value)


@pytest.mark.parametrize(
    "column",
    ["loss", "peak_bytes", "forward_tokens_per_second", "x_ratio", "train_accuracy", "epsilon"],
)
def test_a_unit_ends_the_name(column):
    assert rows.check_row({column: 0.5})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"seed": 0', '"seed": "0"'),
        lambda text: text.replace('"n": 1\n', '"loss": NaN\n'),
        lambda text: text.replace('"seed"', '"sead"'),
    ],
    ids=["truncated", "empty", "schema", "type", "nan", "key"],
)
def test_a_broken_file_is_one_line_with_the_command_that_makes_it_again(path, spoil):
    rows.write_rows(path, CONTENT, {})
    text = path.read_text()
    path.write_text(spoil(text))
    assert path.read_text() != text
    with pytest.raises(UserError) as caught:
        rows.read_rows(path)
    assert str(path) in str(caught.value)
    assert "make it again: repro run toy/squares --scale cpu" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_too(path):
    with pytest.raises(
        UserError, match="is missing; make it again: repro run toy/squares --scale cpu"
    ):
        rows.read_rows(path)


def test_a_changed_array_is_refused(path):
    rows.write_rows(path, CONTENT, {"grid": np.arange(4.0)})
    frame = rows.read_frame(path)
    (file,) = path.parent.glob("*.npy")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="is not the file that its rows file describes"):
        rows.read_array(frame, "grid")
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        rows.read_array(frame, "grid")


def test_the_arrays_of_the_last_run_go_and_those_of_other_experiments_stay(path):
    other = path.with_name("squares_more.json")
    rows.write_rows(other, {**CONTENT, "experiment": "squares_more"}, {"grid": np.arange(9.0)})
    rows.write_rows(path, CONTENT, {"grid": np.arange(4.0), "gone": np.arange(2)})
    rows.write_rows(path, CONTENT, {"grid": np.arange(5.0)})
    assert len(list(path.parent.iterdir())) == 4
    assert rows.read_array(rows.read_frame(path), "grid").size == 5
    assert rows.read_array(rows.read_frame(other), "grid").size == 9


def test_what_a_killed_run_left_is_cleared(path):
    rows.write_rows(path, CONTENT, {"grid": np.arange(4.0)})
    kept = set(path.parent.iterdir())
    (path.parent / ".squares.json.99.part").write_text("half")
    (path.parent / ".squares.grid.abc.npy.99.part").write_text("half")
    (path.parent / "squares.grid.0123456789abcdef.npy").write_text("orphan")
    rows.clean_stale(path)
    assert set(path.parent.iterdir()) == kept


def test_a_full_disk_is_one_line_and_the_old_file_stays(small_disk):
    path = rows.rows_path(small_disk, "cpu", "toy", "squares")
    rows.write_rows(path, CONTENT, {"grid": np.arange(4.0)})
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    for big in (
        ({**CONTENT, "rows": [{"name": "x" * 1000}] * 1000}, {}),
        (CONTENT, {"grid": np.zeros(100_000)}),
        # the array fits, the rows do not
        ({**CONTENT, "rows": [{"name": "x" * 1000}] * 150}, {"grid": np.zeros(20_000)}),
    ):
        with pytest.raises(UserError, match="no space left") as caught:
            rows.write_rows(path, *big)
        assert "\n" not in str(caught.value)
        assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def _write_many(path, number):
    for turn in range(30):
        rows.write_rows(
            path,
            {**CONTENT, "seed": number, "rows": [{"n": number}] * (turn + 1)},
            {"grid": np.full(100, number)},
        )


def test_writers_at_the_same_time_leave_a_whole_file_at_every_moment(path):
    # a new process would look for this module in a package `tests`, and packages install theirs
    context = get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, number)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            content = rows.read_rows(path)
            assert {row["n"] for row in content.rows} == {content.seed}
            reads += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert reads > 10
    frame = rows.read_frame(path)
    assert set(rows.read_array(frame, "grid")) == {frame.attrs["seed"]}
    assert len(list(path.parent.iterdir())) == 2


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(path):
    code = (
        "import numpy as np, sys; from pathlib import Path; from shared import rows; turn ="
        f" 0\nwhile True:\n    turn += 1\n    rows.write_rows(Path(sys.argv[1]), {{**{CONTENT!r},"
        " 'seed': turn}, {'grid': np.full(200_000, turn)})\n"
    )
    rows.write_rows(path, CONTENT, {"grid": np.full(2, 0)})
    for delay in (0.01, 0.03, 0.05, 0.08, 0.13):
        before = path.stat().st_ino
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        while path.stat().st_ino == before:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        frame = rows.read_frame(path)
        assert set(rows.read_array(frame, "grid")) == {frame.attrs["seed"]}
    rows.clean_stale(path)
    assert len(list(path.parent.iterdir())) == 2


def test_tensors_lie_beside_the_rows_and_are_checked(path):
    weights = {"a": torch.arange(6).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    rows.write_rows(path, CONTENT, {}, {"policy": weights})
    read = rows.read_tensors(path, "policy")
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    assert rows.are_whole(path)
    with pytest.raises(UserError, match="unknown tensors of toy/squares 'polcy'; did you mean"):
        rows.read_tensors(path, "polcy")
    (file,) = path.parent.glob("squares.policy.*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="is not the file that its rows file describes; make it ag"):
        rows.read_tensors(path, "policy")
    rows.write_rows(path, CONTENT, {})
    assert not file.exists(), "those of the last run go"


@pytest.mark.parametrize("part", ["paper", "experiment", "scale"])
def test_rows_are_bound_to_their_path(path, part):
    rows.write_rows(path, {**CONTENT, part: "other"}, {})
    with pytest.raises(UserError, match=r"holds the rows of .*other.*; make it again: repro run"):
        rows.read_rows(path)
    assert not rows.are_whole(path)


@pytest.mark.parametrize("file", ["squares.json", "squares.grid.*.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_rows_without_one_of_their_files_are_not_whole(path, file, damage):
    rows.write_rows(path, CONTENT, {"grid": np.arange(3)})
    assert rows.are_whole(path)
    (damaged,) = path.parent.glob(file)
    damaged.write_bytes(damaged.read_bytes()[:-2]) if damage == "cut" else damaged.unlink()
    assert not rows.are_whole(path)
