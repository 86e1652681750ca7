"""A paper that exists for the tests, in this process (`toy`) or as a repository of its own
(`toy_repo`).
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from language_inputs import make_tokenizer

import projects
from shared import cli, paths

TOY = Path(__file__).parent / "workflows" / "toy_repo"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the toy paper the only one there is. Returns its folder."""
    return _only_projects_of(TOY, monkeypatch) / "toy"


@pytest.fixture
def write_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A function `write(name, {path: text})` that makes a paper and makes such papers the only ones
    there are.
    """
    before = set(sys.modules)
    _only_projects_of(tmp_path, monkeypatch)

    def write(name: str, files: dict[str, str]) -> Path:
        for path, text in files.items():
            file = tmp_path / "projects" / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return tmp_path / "projects" / name

    yield write
    for module in set(sys.modules) - before:
        if module.startswith("projects."):
            del sys.modules[module]


def _only_projects_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Look for papers under `root` and nowhere else."""
    monkeypatch.setattr(paths, "PROJECTS", root / "projects")
    monkeypatch.setattr(projects, "__path__", [str(root / "projects"), *projects.__path__])
    return root / "projects"


@dataclass
class Repository:
    """A copy of what this repository runs on, with other papers in it."""

    root: Path

    def repro(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `repro` there."""
        return self._run("-m", "shared.cli", *arguments)

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake there."""
        return self._run("-m", "snakemake", *arguments)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `python -m ...` there in a process group of its own, with stderr to read."""
        command = [sys.executable, "-m", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self._environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def planned(self, *arguments: str) -> set[str]:
        """The names of the rules that Snakemake would run, without the targets that only
        collect.
        """
        done = self.snakemake("-n", *arguments)
        assert done.returncode == 0, done.stderr + done.stdout
        lines = (done.stderr + done.stdout).splitlines()
        if "Job stats:" not in lines:
            return set()
        table = lines[lines.index("Job stats:") + 3 :]
        names = [line.split()[0] for line in table[: table.index("")]]
        return set(names) - {
            "total",
            "reproduce_all",
            "toy",
            "tables",
            "figures",
            "claims",
            "report",
        }

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("REPRO_", "SNAKEMAKE_"))
        }
        return {**kept, "REPRO_CACHE": str(self.root / "cache"), "COLUMNS": "200"}


def make_empty_repository(folder: Path) -> Repository:
    """A copy of this repository without its papers, in `folder`."""
    root = folder / "repository"
    ignore = shutil.ignore_patterns("__pycache__", "cache")
    for name in ("shared", "workflows", "profiles", "data"):
        shutil.copytree(paths.ROOT / name, root / name, ignore=ignore)
    shutil.copy(paths.ROOT / "Snakefile", root)
    (root / "projects").mkdir()
    (root / "projects" / "__init__.py").touch()
    return Repository(root)


def make_toy_repository(folder: Path) -> Repository:
    """A copy of this repository whose only paper is the toy, in `folder`."""
    made = make_empty_repository(folder)
    shutil.copytree(
        TOY / "projects",
        made.root / "projects",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return made


@pytest.fixture
def empty_repo(tmp_path: Path) -> Repository:
    """A copy of this repository without its papers."""
    return make_empty_repository(tmp_path)


@pytest.fixture
def toy_repo(tmp_path: Path) -> Repository:
    """A copy of this repository whose only paper is the toy."""
    return make_toy_repository(tmp_path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs `repro` with arguments it must refuse: status 2, nothing on stdout, one
    line on stderr, which it returns.
    """

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("repro: ")
        assert err.count("\n") == 1
        return err.strip()

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB. Skips where none may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(
            f"a tmpfs cannot be mounted here: {mounted.stderr.strip() or mounted.returncode}"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[[Path], Any]:
    """`make_tokenizer`."""
    return make_tokenizer
