"""Comparing two runs: deterministic values exactly, timings by tolerance."""

import json
import shutil

import pytest

from shared import claims, cli
from shared.compare import differences, is_timing
from shared.experiment import run_experiment


@pytest.fixture
def runs(toy, tmp_path):
    for name in ("squares", "clock"):
        run_experiment("toy", name, "cpu", None, tmp_path)
    claims.evaluate("toy", "cpu", tmp_path)
    one, other = tmp_path / "cpu", tmp_path / "reference" / "cpu"
    shutil.copytree(one, other)
    return one, other


def edit(folder, name, change):
    file = folder / "toy" / name
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("column", "timing"),
    [
        ("step_seconds", True),
        ("seconds", True),
        ("tokens_per_second", True),
        ("read_gigabytes_per_second", True),
        ("time_ratio", True),
        ("walltime_ratio", True),
        ("speedup_ratio", True),
        ("peak_rss_bytes", True),
        ("peak_bytes", False),
        ("loss", False),
        ("timed", False),
        ("across_share", False),
        ("tokens", False),
    ],
)
def test_the_name_decides_what_is_a_timing(column, timing):
    assert is_timing(column) is timing


def test_equal_runs_have_no_differences(runs):
    assert differences(*runs, tolerance=0.25) == []
    assert cli.main(["compare", *map(str, runs)]) == 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda content: content["rows"][1].update(square=5),
            "square (1 of 4 rows; most in row 2, 20 % apart)",
        ),
        (
            lambda content: content["rows"][1].update(scaled_ratio=0.4 + 1e-16),
            "scaled_ratio (1 of 4 rows; most in row 2",
        ),
        (lambda content: content["rows"][0].update(mode="rough"), "mode (1 of 4 rows"),
        (lambda content: content["rows"][0].update(number=True), "number (1 of 4 rows"),
        (lambda content: content["rows"][0].pop("mode"), "mode (1 of 4 rows"),
        (lambda content: content["rows"].pop(), "number of rows"),
        (lambda content: content["config"].update(mode="rough"), "config mode"),
        (lambda content: content["arrays"]["grid"].update(sha256="0" * 64), "array grid"),
        (lambda content: content.update(arrays={}), "array grid"),
    ],
)
def test_a_deterministic_value_that_moved_is_drift(runs, change, what, capsys):
    edit(runs[0], "rows/squares.json", change)
    (found,) = differences(*runs, tolerance=0.25)
    assert found.drift
    assert found.where == "toy/rows/squares.json"
    assert found.what.startswith(what)
    assert cli.main(["compare", *map(str, runs)]) == 1
    assert "drift" in capsys.readouterr().out


def another_cpu(content):
    content["provenance"].update(cpu="another")


def another_torch(content):
    content["provenance"]["packages"]["torch"] = "1.0"


def add_digests(content):
    for row in content["rows"]:
        row["weights_sha256"] = "a" * 64


@pytest.mark.parametrize("change", [another_cpu, another_torch, None])
def test_floats_and_digests_are_exact_only_on_the_same_machine(runs, capsys, change):
    for folder in runs:
        edit(folder, "rows/squares.json", add_digests)

    def drift(content):
        content["rows"][1].update(scaled_ratio=0.4 * (1 + 5e-4), weights_sha256="b" * 64)
        content["arrays"]["grid"].update(sha256="0" * 64)

    edit(runs[0], "rows/squares.json", drift)
    if change:
        edit(runs[0], "rows/squares.json", change)
    found = [one.what.split()[:2] for one in differences(*runs, tolerance=0.25)]
    status = cli.main(["compare", *map(str, runs)])
    said = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("made elsewhere")
    ]
    if change is None:
        assert [what for what, _ in found] == ["array", "scaled_ratio", "weights_sha256"]
        assert (status, said) == (1, [])
    else:
        assert (found, status) == ([], 0)
        assert len(said) == 1
        assert ("CPU another, not " if change is another_cpu else "torch 1.0, not ") in said[0]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"scaled_ratio": 0.4 * (1 + 2e-3)}, "scaled_ratio (1 of 4 rows"),
        ({"square": 5}, "square (1 of 4 rows"),
        ({"scaled_ratio": 1}, "scaled_ratio (1 of 4 rows"),
        ({"mode": "rough"}, "mode (1 of 4 rows"),
    ],
)
def test_on_another_machine_the_rest_stays_exact(runs, row, what):
    edit(runs[0], "rows/squares.json", another_cpu)
    edit(runs[0], "rows/squares.json", lambda content: content["rows"][1].update(row))
    (found,) = differences(*runs, tolerance=0.25)
    assert found.drift
    assert found.what.startswith(what)


def test_provenance_may_differ(runs):
    edit(runs[0], "rows/squares.json", another_cpu)
    assert differences(*runs, tolerance=0.25) == []


def test_the_help_tells_of_other_machines(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    assert "the version of torch differs" in " ".join(capsys.readouterr().out.split())


def test_timings_are_told_beyond_the_tolerance_and_never_fail(runs):
    for folder, seconds in zip(runs, (1.0, 1.2), strict=True):
        edit(
            folder,
            "rows/clock.json",
            lambda content, seconds=seconds: content["rows"][0].update(step_seconds=seconds),
        )
    assert differences(*runs, tolerance=0.25) == []
    (found,) = differences(*runs, tolerance=0.1)
    assert not found.drift
    assert cli.main(["compare", *map(str, runs), "--tolerance", "0.1"]) == 0


def test_a_missing_file_is_named(runs, capsys):
    (runs[0] / "toy/rows/clock.json").unlink()
    assert cli.main(["compare", *map(str, runs)]) == 1
    assert "toy/rows/clock.json" in capsys.readouterr().out
    # the reference may lack what is new
    assert cli.main(["compare", *map(str, reversed(runs))]) == 0
    assert "toy/rows/clock.json" in capsys.readouterr().out


def test_verdicts_must_be_equal_but_those_on_timings(runs):
    def verdict(name, word):
        return lambda content: next(entry for entry in content if entry["id"] == name).update(
            verdict=word
        )

    edit(runs[0], "claims.json", verdict("toy.clock", "partly"))
    (found,) = differences(*runs, tolerance=0.25)
    assert (found.what, found.drift) == ("toy.clock", False)
    edit(runs[0], "claims.json", verdict("toy.squares", "partly"))
    assert sorted((one.what, one.drift) for one in differences(*runs, tolerance=0.25)) == [
        ("toy.clock", False),
        ("toy.squares", True),
    ]


def test_wrong_folders_and_files_are_one_line(runs, tmp_path, refused):
    assert "holds no results" in refused("compare", tmp_path / "nothing", runs[1])
    (runs[0] / "toy/claims.json").write_text("[1]")
    assert "is not a ledger" in refused("compare", *runs)
    (runs[0] / "toy/rows/squares.json").write_text("{")
    assert "make it again" in refused("compare", *runs)
