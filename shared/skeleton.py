"""`repro new`: the files of a paper, from `shared/templates/paper/`.

The templates are the files themselves, as they lie in the repository, with PAPER, DISPLAY and
ARXIV in place of the paper's own, and `.tmpl` behind their names.
"""

import keyword
import re
from pathlib import Path

from shared import paths
from shared.errors import UserError
from shared.files import atomic_write

TEMPLATES = Path(__file__).parent / "templates" / "paper"
# A paper's name is a target of Snakemake and of make; these have theirs.
TAKEN = {
    *("tables", "figures", "claims", "report", "all", "shared", "projects"),
    *("help", "reproduce", "bench", "compare", "test", "lint", "reproduce_all"),
}


def create(paper: str, display: str, arxiv: str) -> list[Path]:
    """Write the skeleton of a paper: `projects/<paper>/` and `tests/projects/<paper>/`.

    Args:
        display: how the paper is called in tables, "ZO2".
        arxiv: its number, "2503.12668".

    Returns:
        The files, in order.

    Raises:
        UserError: a name that cannot be one, or a folder that is there; nothing is written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", paper) or keyword.iskeyword(paper):
        raise UserError(f"'{paper}' cannot name a paper: a-z, 0-9 and _, as of a Python module")
    if paper in TAKEN:
        raise UserError(f"'{paper}' cannot name a paper: it is a target of make or snakemake")
    if not re.fullmatch(r"\d{4}\.\d{5}", arxiv):
        raise UserError(f"--arxiv takes a number such as 2503.12668, not '{arxiv}'")
    if not display.strip() or re.search(r'[\n"\\|\[\]<>{}$&]', display):
        raise UserError(f"--display takes plain text, not {display!r}")
    folders = [paths.PROJECTS / paper, paths.PROJECTS.parent / "tests" / "projects" / paper]
    for folder in folders:
        if folder.exists():
            raise UserError(f"{folder} is there already")
    return [
        _write(template, {"PAPER": paper, "DISPLAY": display, "ARXIV": arxiv})
        for template in sorted(TEMPLATES.rglob("*.tmpl"))
    ]


def _write(template: Path, values: dict[str, str]) -> Path:
    def filled(text: str) -> str:
        return re.sub("|".join(values), lambda word: values[word[0]], text)

    place = template.relative_to(TEMPLATES).as_posix().removesuffix(".tmpl")
    file = paths.PROJECTS.parent / filled(place)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, filled(template.read_text(encoding="utf-8")).encode())
    return file
