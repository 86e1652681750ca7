"""Running an experiment: what it refuses, what it writes, and what a fault leaves."""

import io
import json
import os
import signal
import sys

import numpy as np
import pytest

from shared import cli, experiment, rows
from shared.errors import UserError
from shared.experiment import Run, run_experiment


def test_a_run_writes_rows_with_their_origin(toy, tmp_path):
    path = run_experiment("toy", "squares", "cpu", {"seed": 7}, tmp_path)
    content = rows.read_rows(path)
    assert path == tmp_path / "cpu" / "toy" / "rows" / "squares.json"
    assert [row["square"] for row in content.rows] == [1, 4, 9, 16]
    assert content.config == {
        "seed": 7,
        "numbers": [1, 2, 3, 4],
        "factor_scale": 0.1,
        "mode": "exact",
    }
    assert content.seed == 7
    assert content.provenance["overridden"] == ["seed"]
    assert content.provenance["scale"] == "cpu"
    assert content.provenance["duration_seconds"] >= 0
    np.testing.assert_array_equal(rows.read_array(rows.read_frame(path), "grid"), np.arange(4.0))


def test_an_experiment_has_the_threads_of_its_scale(write_paper, tmp_path):
    torch = pytest.importorskip("torch")
    code = "import shared.experiment, torch\nclass Config(shared.experiment.Config): pass\n"
    code += "def run(config, run): run.row(threads=torch.get_num_threads())"
    known = (
        "name: one\ndisplay: One\ntitle: T\nexperiments:\n  first: {title: A, minutes: 1,"
        " memory_gb: 1, at: {gpu: {threads: 2}}}\n"
    )
    write_paper(
        "one",
        {
            "paper.yaml": known,
            "experiments/first.py": code,
            "scales/cpu.yaml": "first:",
            "scales/gpu.yaml": "first:",
        },
    )
    before = torch.get_num_threads()
    try:
        for scale, threads in (("cpu", 1), ("gpu", 2)):
            assert rows.read_rows(
                run_experiment("one", "first", scale, None, tmp_path / "results")
            ).rows == [{"threads": threads}]
    finally:
        torch.set_num_threads(before)


TRAINS = """
import torch
from shared import experiment
class Config(experiment.Config): pass
def run(config, run):
    run.save_tensors("net", {"w": torch.full((2,), float(config.seed))})
    run.row(seed=config.seed)
"""
TAKES = """
from shared import experiment
class Config(experiment.Config): pass
def run(config, run):
    w = run.used_tensors("first", "net")["w"]
    run.row(seed=run.used_rows("first")[0]["seed"], weight_loss=float(w[0]))
"""


def test_an_experiment_takes_the_tensors_of_one_that_it_uses(write_paper, tmp_path):
    known = (
        "name: one\ndisplay: One\ntitle: T\nexperiments:\n"
        "  first: {title: A, minutes: 1, memory_gb: 1}\n"
        "  second: {title: B, minutes: 1, memory_gb: 1, uses: [first]}\n"
        "  third: {title: C, minutes: 1, memory_gb: 1}\n"
    )
    files = {"first": TRAINS, "second": TAKES, "third": TAKES}
    code = {f"experiments/{name}.py": text for name, text in files.items()}
    scale = {"scales/cpu.yaml": "{first: {seed: 3}, second: , third: }"}
    write_paper("one", {"paper.yaml": known, **code, **scale})
    with pytest.raises(UserError, match=r"first.json is missing; make it again: repro run one/fir"):
        run_experiment("one", "second", "cpu", None, tmp_path)
    first = run_experiment("one", "first", "cpu", None, tmp_path)
    content = rows.read_rows(run_experiment("one", "second", "cpu", None, tmp_path))
    assert content.rows == [{"seed": 3, "weight_loss": 3.0}]
    assert content.provenance["used"] == {"first": rows.digest(first)}
    with pytest.raises(ValueError, match="does not say that this experiment uses 'first'"):
        run_experiment("one", "third", "cpu", None, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("toy/squares", "--set", "nmbers=[1]"), "unknown key 'nmbers'; did you mean numbers?"),
        (
            ("toy/squares", "--set", "numbers=three"),
            "'numbers' = 'three': input should be a valid array",
        ),
        (
            ("toy/squares", "--set", "numbers=[1, a]"),
            "'numbers.1' = 'a': input should be a valid integer",
        ),
        (("toy/squares", "--set", "numbers=[1.5]"), "'numbers.0' = 1.5"),
        (("toy/squares", "--set", "numbers=[true]"), "'numbers.0' = True"),
        (("toy/squares", "--set", "numbers=[]"), "at least 1 item"),
        (
            ("toy/squares", "--set", "factor_scale=0"),
            "'factor_scale' = 0: input should be greater than 0",
        ),
        (("toy/squares", "--set", "factor_scale=.nan"), "finite number"),
        (
            ("toy/squares", "--set", "factor_scale='2'"),
            "'factor_scale' = '2': input should be a valid number",
        ),
        (("toy/squares", "--set", "mode=fast"), "input should be 'exact' or 'rough'"),
        (
            ("toy/squares", "--set", "seed=-1"),
            "'seed' = -1: input should be greater than or equal to 0",
        ),
        (("toy/squares", "--set", "seed"), "--set takes KEY=VALUE"),
        (("toy/squares", "--set", "seed=[1"), "not valid YAML"),
        (("toy/squares", "--scale", "cpv"), "unknown scale 'cpv'; did you mean cpu?"),
        (("toy/card", "--scale", "cpu"), "toy/card does not run at scale 'cpu'"),
        (("toy/sqares",), "unknown experiment of toy 'sqares'; did you mean squares?"),
        (("tot/squares",), "unknown paper 'tot'; did you mean toy?"),
        (("toy",), "must be PAPER/EXPERIMENT"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(toy, tmp_path, refused, arguments, said):
    assert said in refused("run", *arguments, "--results", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_set_replaces_values_of_the_scale(toy, tmp_path, capsys):
    arguments = [
        "run",
        "toy/squares",
        "--scale",
        "smoke",
        "--set",
        "numbers=[5]",
        "--set",
        "factor_scale=1e-2",
        "--results",
        str(tmp_path),
    ]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert rows.read_rows(rows.rows_path(tmp_path, "smoke", "toy", "squares")).rows == [
        {"number": 5, "square": 25, "scaled_ratio": 0.25, "mode": "exact"}
    ]
    assert out.strip().endswith("squares.json")
    assert "--set" in err


def test_an_experiment_without_rows_is_a_fault(write_paper, tmp_path):
    files = {
        "paper.yaml": (
            "name: one\ndisplay: One\ntitle: T\nexperiments:\n  e: {title: A, minutes: 1,"
            " memory_gb: 1}\n"
        ),
        "scales/cpu.yaml": "e:",
        "experiments/e.py": (
            "from shared import experiment\nclass Config(experiment.Config): pass\ndef run(config,"
            " run): pass\n"
        ),
    }
    write_paper("one", files)
    with pytest.raises(UserError, match="emitted no rows"):
        run_experiment("one", "e", "cpu", None, tmp_path / "results")


def test_only_rank_0_writes(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not run_experiment("toy", "squares", "smoke", None, tmp_path).exists()
    monkeypatch.setenv("RANK", "0")
    assert run_experiment("toy", "squares", "smoke", None, tmp_path).exists()


def test_a_failed_run_leaves_the_old_rows(toy, tmp_path):
    path = run_experiment("toy", "slow", "smoke", None, tmp_path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="this experiment fails"):
        run_experiment("toy", "slow", "smoke", {"fails": True}, tmp_path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_status_2(toy, small_disk, refused):
    cli.main(["run", "toy/squares", "--results", str(small_disk)])
    path = rows.rows_path(small_disk, "cpu", "toy", "squares")
    before = path.read_bytes()
    assert "no space left" in refused(
        "run", "toy/squares", "--results", small_disk, "--set", f"numbers={list(range(5000))}"
    )
    assert path.read_bytes() == before


def test_kill_9_leaves_the_old_rows_and_the_next_run_goes_on(toy_repo):
    path = toy_repo.root / "results" / "cpu" / "toy" / "rows" / "slow.json"
    assert toy_repo.repro("run", "toy/slow").returncode == 0
    before = path.read_bytes()
    running = toy_repo.start("shared.cli", "run", "toy/slow", "--set", "seconds=60")
    assert running.stderr.readline() == "slow has begun\n"
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    running.stderr.close()
    assert path.read_bytes() == before
    assert toy_repo.repro("run", "toy/slow", "--set", "seconds=0.01").returncode == 0
    assert json.loads(path.read_text())["rows"] == [{"slept_seconds": 0.01}]
    assert list(path.parent.iterdir()) == [path]


def test_several_processes_run_under_torchrun_and_one_writes(toy_repo):
    done = toy_repo.repro("run", "toy/pair")
    assert done.returncode == 0, done.stderr
    path = toy_repo.root / "results" / "cpu" / "toy" / "rows" / "pair.json"
    assert rows.read_rows(path).rows == [{"rank": 0, "world": 2}]
    assert done.stdout.split() == [str(path)]


class Terminal(io.StringIO):
    """A stderr that says whether someone watches."""

    def __init__(self, watched):
        super().__init__()
        self.watched = watched

    def isatty(self):
        return self.watched


def test_without_a_terminal_progress_is_a_few_lines(monkeypatch):
    stderr = Terminal(False)
    monkeypatch.setattr(sys, "stderr", stderr)
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(experiment.time, "monotonic", lambda: next(clock))
    assert list(Run(label="toy/x").progress(20, "steps")) == list(range(20))
    lines = stderr.getvalue().splitlines()
    assert 3 <= len(lines) <= 6
    assert lines[0] == "toy/x steps ━━━───────────────── 3/20, 1:08 left"


def test_progress_of_unknown_length(monkeypatch):
    stderr = Terminal(False)
    monkeypatch.setattr(sys, "stderr", stderr)
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr(experiment.time, "monotonic", lambda: next(clock))
    assert list(Run().progress(iter("abc"), "letters")) == ["a", "b", "c"]
    assert stderr.getvalue().splitlines() == ["letters 1 after 0:22", "letters 2 after 0:33"]


def test_on_a_terminal_bars_may_be_nested(monkeypatch):
    stderr = Terminal(True)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("REPRO_PLAIN_PROGRESS", raising=False)
    run = Run()
    pairs = [
        (outer, inner)
        for outer in run.progress("ab", "outer")
        for inner in run.progress(2, "inner")
    ]
    run.log("a line [with] brackets")
    run.close()
    assert pairs == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert "outer" in stderr.getvalue()
    assert "inner" in stderr.getvalue()
    assert "a line [with] brackets" in stderr.getvalue()


def test_a_wrong_row_or_array_is_told_when_it_is_emitted():
    run = Run()
    with pytest.raises(ValueError, match="must end with a unit"):
        run.row(value=0.5)
    with pytest.raises(ValueError, match="dtype object"):
        run.array("grid", np.array([None]))
    with pytest.raises(ValueError, match="identifier"):
        run.array("a/b", np.zeros(1))
