"""docs/adding-a-paper.md works: followed in a copy of this repository, it ends with a paper that
passes the repository's own tests.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import manifest, paths

pytestmark = pytest.mark.workflow

PAGE = (paths.ROOT / "docs" / "adding-a-paper.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/.-]+)`\n\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = [
    line.split("  #")[0].split()
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
PROGRAMS = {"repro": "shared.cli", "pytest": "pytest", "snakemake": "snakemake"}
OTHERS = " and ".join(f"not [{paper}]" for paper in manifest.manifests())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m ...` in a copy of this repository, under git as this one is."""
    copy = tmp_path_factory.mktemp("copy") / "repository"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (paths.ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(paths.ROOT / name, copy / name)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REPRO_")}
    environment = {**kept, "PYTHONPATH": str(copy), "REPRO_CACHE": str(paths.cache_dir())}

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False
        )

    run.root = copy
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    for program, *arguments in COMMANDS:
        done = run(PROGRAMS[program], *arguments)
        assert done.returncode == 0, ([program, *arguments], done.stdout, done.stderr)
    subprocess.run(["git", "add", "-A"], cwd=copy, check=True)
    return run


def test_the_page_shows_what_repro_new_writes(run):
    assert len(FILES) >= 10
    for path, text in FILES.items():
        assert (run.root / path).read_text(encoding="utf-8") == text, path


def test_the_commands_that_the_page_names_work(run):
    for command in re.findall(r"`repro ([^`]+)`", PAGE):
        assert run("shared.cli", *command.split()).returncode == 0, command


@pytest.mark.parametrize(
    "arguments",
    [
        ["tests/projects/pi"],
        [
            "tests/test_papers.py",
            "tests/test_reference.py",
            "tests/test_mutations.py",
            "-k",
            OTHERS,
        ],
        ["tests/test_boundaries.py", "-k", OTHERS],
        [
            "tests/test_repository.py",
            "-k",
            "[pi] or projects.pi or readme_lists or link or no_file_names or nothing_runs"
            " or models_enter or results_in",
        ],
    ],
    ids=lambda arguments: Path(arguments[0]).stem,
)
def test_the_papers_and_the_repositorys_own_tests_pass(run, arguments):
    done = run("pytest", "-q", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_is_as_the_linter_wants_it(run):
    files = ("projects/pi", "tests/projects/pi")
    for arguments in (("check", *files), ("format", "--check", *files)):
        done = run("ruff", *arguments)
        assert done.returncode == 0, done.stdout


def test_the_report_shows_the_paper(run):
    page = Path(run("shared.cli", "report", "--scale", "cpu").stdout.strip()).read_text()
    for said in (
        "Estimating π from random points",
        "Error against points",
        "table 1",
        "The error falls with the square root",
        "data:image/svg+xml",
        "✓ holds",
    ):
        assert said in page


def test_every_file_that_the_page_names_is_there():
    for path in re.findall(r"`((?:docs|data|shared)/[\w/.-]+\.\w+)`", PAGE):
        assert os.path.exists(paths.ROOT / path), path
