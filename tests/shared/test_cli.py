"""`repro`: help with an example everywhere, one line for a mistake, and status codes."""

import argparse
import resource
import subprocess
import sys

import pytest

from shared import cli, experiment


def subcommands():
    (action,) = [
        action
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return action.choices


@pytest.mark.parametrize("name", list(subcommands()))
def test_every_subcommand_has_help_with_an_example(name):
    text = subcommands()[name].format_help()
    assert f"repro {name}" in text
    assert "example" in text


def test_help_is_fast():
    def cpu_seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = cpu_seconds()
    subprocess.run([sys.executable, "-m", "shared.cli", "--help"], check=True, capture_output=True)
    assert cpu_seconds() - start < 1  # of the processor's time, as the machine may be busy


def test_list_shows_what_runs_and_what_is_there(toy, tmp_path, capsys):
    experiment.run_experiment("toy", "squares", "smoke", None, tmp_path)
    assert cli.main(["list", "--results", str(tmp_path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["toy/squares"].count("●") == 1
    assert lines["toy/squares"].count("○") == 2
    assert lines["toy/card"].count("○") == 1


def test_table_figure_claims_report(toy, tmp_path, capsys):
    options = ["--scale", "smoke", "--results", str(tmp_path)]
    for name in ("squares", "slow"):
        assert cli.main(["run", f"toy/{name}", *options]) == 0
    for arguments, said in (
        (["table", "toy/squares"], "| number | its square | <mode> |"),
        (["table", "toy"], "both.tex"),
        (["figure", "toy/squares"], "squares.svg"),
        (["figure", "toy"], "squares.png"),
        (["claims", "toy"], "toy.squares"),
        (["report"], "report.html"),
    ):
        capsys.readouterr()
        assert cli.main([*arguments, *options]) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "toi"], "unknown paper 'toi'; did you mean toy?"),
        (["table", "toi"], "unknown paper"),
        (["table", "toy/both_"], "did you mean both?"),
        (
            ["table", "toy/squares"],
            "squares.json is missing; make it again: repro run toy/squares --scale cpu",
        ),
        (["table", "toy", "--scale", "big"], "unknown scale 'big'"),
        (["figure", "toy/x"], "unknown figure of toy 'x'; there are: squares"),
        (["claims", "toi"], "unknown paper"),
        (["claims", "toy", "--scale", "big"], "unknown scale"),
        (["report", "--scale", "big"], "unknown scale"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(toy, tmp_path, refused, arguments, said):
    assert said in refused(*arguments, "--results", tmp_path)


def test_a_stop_by_the_user_is_130(toy, tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_experiment", stop)
    assert cli.main(["run", "toy/squares", "--results", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "repro: stopped\n"


def test_a_closed_pipe_is_no_error(toy_repo):
    command = f"{sys.executable} -m shared.cli list | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=toy_repo.root, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_doctor_names_what_it_found(capsys):
    assert cli.main(["doctor"]) in (0, 1)
    out = capsys.readouterr().out
    for what in ("python", "packages", "torch", "torchvision", "memory", "disk", "cores", "data"):
        assert any(line.split()[1] == what for line in out.splitlines()), what


def test_doctor_tells_a_version_that_is_not_pinned(tmp_path, monkeypatch, capsys):
    from shared import doctor, paths

    (tmp_path / "constraints.txt").write_text("numpy==0.1  # old\nno-such-package==1\n")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    ((fine, _, said),) = doctor._pins()
    assert fine
    assert "(pinned 0.1)" in said
    assert "not installed: no-such-package" in said
