"""docs/adding-a-paper.md works: its files are written into a copy of the repository and taken to
the report.
"""

import os
import re
import subprocess
import sys

import pytest

from shared import paths

pytestmark = pytest.mark.workflow

PAGE = (paths.ROOT / "docs" / "adding-a-paper.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/.-]+)`\n\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))


def test_the_reader_writes_fewer_than_80_lines():
    assert len(FILES) >= 8
    assert sum(1 for text in FILES.values() for line in text.splitlines() if line.strip()) < 80


@pytest.fixture
def followed(empty_repo):
    for path, text in FILES.items():
        file = empty_repo.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return empty_repo


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_the_page_leads_to_a_report(followed, scale):
    run = followed.snakemake("--cores", "2", "--config", f"scale={scale}")
    assert run.returncode == 0, run.stderr
    page = (followed.root / "results" / scale / "report.html").read_text()
    for said in (
        "Estimating π from random points",
        "Error against points",
        "table 1",
        "The error falls with the square root",
        "data:image/svg+xml",
    ):
        assert said in page
    if scale == "cpu":
        assert "✓ holds" in page


def test_the_commands_that_the_page_names_work(followed):
    for command in re.findall(r"`repro ([^`]+)`", PAGE):
        assert followed.repro(*command.split()).returncode == 0, command
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            command, *arguments = line.split("#")[0].split()
            environment = {**followed._environment(), "PYTHONPATH": str(followed.root)}
            run = subprocess.run(
                [sys.executable, "-m", command, *arguments],
                cwd=followed.root,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, (line, run.stdout, run.stderr)


def test_every_file_that_the_page_names_is_there():
    for path in re.findall(r"`((?:docs|data|shared)/[\w/.-]+\.\w+)`", PAGE):
        assert os.path.exists(paths.ROOT / path), path
