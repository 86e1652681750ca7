"""`repro check`: each thing that a paper can lack is a line of its own."""

import importlib
import json
import shutil
import sys

import pytest

import projects
from shared import cli, papers, paths, reference, skeleton
from shared.experiment import run_experiment

REASON = "takes_longer: a reason\n"
CORE_MINUTES = [(5.9, "", True), (6.1, "", False), (7.9, REASON, True), (8.1, REASON, False)]


def move_to(root, monkeypatch):
    """Let `root` be the repository."""
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(paths, "PROJECTS", root / "projects")
    monkeypatch.setattr(paths, "REFERENCE", root / "reference")
    monkeypatch.setattr(projects, "__path__", [str(root / "projects")])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The root of a repository with one paper, `pi`, that lacks nothing."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as monkeypatch:
        move_to(root, monkeypatch)
        skeleton.create("pi", "Pi", "0000.00000")
        (root / "README.md").write_text("| [Pi](projects/pi/README.md) | t | a | new |\n")
        run_experiment("pi", "error", "cpu", None, root / "results")
        reference.keep("pi", "cpu", root / "results")
        forget()
    return root


@pytest.fixture
def whole(made, tmp_path, monkeypatch):
    """A copy of it, to be spoilt."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    move_to(tmp_path, monkeypatch)
    yield tmp_path
    forget()


def forget() -> None:
    """Let the paper's modules be read anew."""
    for module in [name for name in sys.modules if name.split(".")[:2] == ["projects", "pi"]]:
        del sys.modules[module]
    vars(projects).pop("pi", None)
    importlib.invalidate_caches()


def test_a_paper_that_repro_new_wrote_lacks_nothing_once_it_has_a_reference(whole, capsys):
    assert cli.main(["check", "pi"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "file",
    [
        *(f"projects/pi/{name}" for name in papers.ROLES),
        *(f"projects/pi/scales/{scale}.yaml" for scale in paths.SCALES),
        "projects/pi/README.md",
        "tests/projects/pi/test_claims.py",
        "tests/projects/pi/mutations.py",
        "reference/cpu/pi/rows/error.json",
        "reference/cpu/pi/claims.json",
    ],
)
def test_a_missing_file_is_said(whole, file, capsys):
    (whole / file).unlink()
    forget()
    assert cli.main(["check", "pi"]) == 1
    said = capsys.readouterr().out
    name = file.removeprefix("projects/pi/").removeprefix("reference/cpu/pi/")
    assert name in said or name.removesuffix(".json").split("/")[-1] in said


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("projects/pi/paper.yaml", 'arxiv: "0000.00000"', "", "no arxiv"),
        (
            "projects/pi/paper.yaml",
            "experiments:",
            "experiments:\n  other: {title: O, minutes: 1, memory_gb: 1}",
            "no table, figure or claim takes the rows of other",
        ),
        ("projects/pi/scales/smoke.yaml", "error:", "# error:", "no experiment runs at smoke"),
        ("projects/pi/scales/_base.yaml", "repeats: 200", "", "'repeats' is missing"),
        (
            "projects/pi/experiments/common.py",
            "repeats: PositiveInt",
            "repeats: PositiveInt = 3",
            "Config.repeats: a default",
        ),
        (
            "projects/pi/experiments/common.py",
            '    """Estimates for each number, from points of their own."""\n',
            "",
            "Config.repeats: no text",
        ),
        ("projects/pi/README.md", "## The library", "## Library", "no section: The library"),
        ("projects/pi/README.md", "## What differs", "## What is", "no section: What differs"),
        ("projects/pi/README.md", "## What came", "## What fell", "no section: What came out"),
        ("projects/pi/README.md", "## The method", "## What came out", "the sections' order is"),
        ("projects/pi/README.md", "arxiv.org", "example.org", "no link to arXiv 0000.00000"),
        ("README.md", "pi", "e", "no row in its table"),
        (
            "tests/projects/pi/mutations.py",
            "Mutation(\n        CLAIMS",
            "print(\n        CLAIMS",
            "2 mut",
        ),
        ("tests/projects/pi/test_claims.py", "require_falsifiable", "print", "are not shown"),
        ("reference/cpu/pi/rows/error.json", '"rows"', '"lines"', "no rows of error"),
    ],
)
def test_what_is_off_is_said_in_one_line(whole, file, old, new, said):
    text = (whole / file).read_text()
    assert old in text
    (whole / file).write_text(text.replace(old, new))
    forget()
    assert [line for line in papers.lacking("pi") if said in line]


@pytest.mark.parametrize(("minutes", "reason", "allowed"), CORE_MINUTES)
def test_a_paper_that_takes_too_long_is_said(whole, minutes, reason, allowed):
    file = whole / "reference" / "cpu" / "pi" / "rows" / "error.json"
    content = json.loads(file.read_bytes())
    content["provenance"]["core_seconds"] = 60 * minutes
    file.write_text(json.dumps(content))
    manifest = whole / "projects" / "pi" / "paper.yaml"
    manifest.write_text(manifest.read_text() + reason)
    said = papers.lacking("pi")
    assert said == [] if allowed else f"{minutes:.1f} core-minutes" in said[0]


def test_a_helper_with_a_name_of_its_own_is_said(whole):
    shutil.copy(whole / "projects/pi/data.py", whole / "projects/pi/experiments/_setting.py")
    assert papers.lacking("pi") == [
        "experiments/_setting.py: what the experiments share is common.py"
    ]
