"""`repro check`: what a paper lacks, or has otherwise than the others, one line for each."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from shared import claims, experiment, manifest, paths, readme, rows
from shared.errors import UserError

# What has a role has its name in every paper.
ROLES = {
    "__init__.py": "names of the library, imported at their first use",
    "__init__.pyi": "the names of __init__.py",
    "__main__.py": "calls command.py",
    "command.py": "the command: parser and main",
    "labels.py": "names, order and colours of methods",
    "data.py": "what the experiments read",
    "baselines.py": "what the method is compared with",
    "experiments/__init__.py": "one line that says what it is",
    "experiments/common.py": "what the experiments share",
    "tables.py": "rows in, tables out",
    "figures.py": "rows in, figures out",
    "claims.py": "rows in, verdicts out",
}
HEADINGS = {
    "The method": "## The method",
    "The library": "## The library",
    "The command": "## The command",
    "What differs from the paper, and why": "## What differs",
    "What came out": "## What came out",
}
WITH_DEFAULTS = {"seed", "device"}  # all else that an experiment runs with stands in a scale file
LEAST_MUTATIONS = 3
NEEDED_SCALES = ("smoke", "cpu")
CORE_MINUTES = 6.0  # of all experiments of a paper at scale cpu
MOST_CORE_MINUTES = 8.0  # where the manifest gives a reason


def lacking(paper: str) -> list[str]:
    """A line for everything that is missing or off, in the order in which one would mend it.

    Raises:
        UserError: no such paper, or a manifest that cannot be read.
    """
    manifest.manifest(paper)
    lines: list[str] = []
    for check in (_files, _manifest, _scales, _configs, _page, _main_page, _reference, _tests):
        try:
            lines += check(paper)
        except (ImportError, SyntaxError, TypeError, ValueError, UserError) as error:
            lines.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return lines


def _files(paper: str) -> Iterator[str]:
    folder = paths.PROJECTS / paper
    for name, what in ROLES.items():
        if not (folder / name).is_file():
            yield f"{name}: missing ({what})"
    for file in sorted((folder / "experiments").glob("_[!_]*.py")):
        yield f"experiments/{file.name}: what the experiments share is common.py"


def _manifest(paper: str) -> Iterator[str]:
    known = manifest.manifest(paper)
    if not known.arxiv:
        yield "paper.yaml: no arxiv"
    taken = [*known.tables.values(), *known.figures.values()]
    taken += [entry.uses for entry in known.experiments.values()]
    taken += [entry.experiments for entry in claims.claims_of(paper)]
    for name in known.experiments:
        if not any(name in experiments for experiments in taken):
            yield f"paper.yaml: no table, figure or claim takes the rows of {name}"
    if not claims.claims_of(paper):
        yield "claims.py: no claim"


def _scales(paper: str) -> Iterator[str]:
    for scale in paths.SCALES:
        if not (paths.PROJECTS / paper / "scales" / f"{scale}.yaml").is_file():
            yield f"scales/{scale}.yaml: missing"
    for scale in NEEDED_SCALES:
        if not manifest.scale_config(paper, scale):
            yield f"scales/{scale}.yaml: no experiment runs at {scale}"


def _configs(paper: str) -> Iterator[str]:
    """Every value stands in a scale file, and every field says what it is."""
    wrong: dict[str, None] = {}
    for scale in paths.SCALES:
        for name in manifest.scale_config(paper, scale):
            try:
                module, _ = experiment.load(paper, name, scale)
            except UserError as error:
                yield str(error)
                continue
            for field, info in module.Config.model_fields.items():
                where = f"experiments/{name}.py: Config.{field}"
                if not info.description:
                    wrong[f"{where}: no text under it that describes it"] = None
                if not info.is_required() and field not in WITH_DEFAULTS:
                    wrong[f"{where}: a default; its value belongs in scales/"] = None
    yield from wrong


def _page(paper: str) -> Iterator[str]:
    file = readme.readme(paper)
    if not file.is_file():
        yield "README.md: missing"
        return
    text = file.read_text(encoding="utf-8")
    sections = {
        what: re.search(rf"^{pattern}", text, re.MULTILINE) for what, pattern in HEADINGS.items()
    }
    for what, section in sections.items():
        if section is None:
            yield f"README.md: no section: {what}"
    starts = [section.start() for section in sections.values() if section is not None]
    if starts != sorted(starts):
        yield f"README.md: the sections' order is: {'; '.join(HEADINGS)}"
    arxiv = manifest.manifest(paper).arxiv
    if arxiv and f"(https://arxiv.org/abs/{arxiv})" not in text:
        yield f"README.md: no link to arXiv {arxiv}"


def _main_page(paper: str) -> Iterator[str]:
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    if f"](projects/{paper}/README.md) |" not in text:
        yield "the main README.md: no row in its table: repro readme"


def _reference(paper: str) -> Iterator[str]:
    scale = "cpu"
    core_seconds = 0.0
    for name in manifest.scale_config(paper, scale):
        file = rows.rows_path(paths.REFERENCE, scale, paper, name)
        if rows.are_whole(file, tensors=False):
            core_seconds += rows.read_rows(file).provenance.get("core_seconds", 0)
        else:
            yield f"results/reference: no rows of {name}, or broken ones: repro keep {paper}"
    reason = manifest.manifest(paper).takes_longer
    most = MOST_CORE_MINUTES if reason else CORE_MINUTES
    if core_seconds > 60 * most:
        yield (
            f"results/reference: {core_seconds / 60:.1f} core-minutes at scale {scale}; at most"
            f" {most:g}" + ("" if reason else ", or say why in paper.yaml: takes_longer")
        )
    if not (paths.REFERENCE / scale / paper / "claims.json").is_file():
        yield f"results/reference: no claims.json: repro keep {paper}"


def _tests(paper: str) -> Iterator[str]:
    folder = paths.ROOT / "tests" / "projects" / paper
    if "require_falsifiable" not in _text(folder / "test_claims.py"):
        yield f"tests/projects/{paper}/test_claims.py: claims are not shown to hold and to fail"
    mutations = _text(folder / "mutations.py")
    calls = [node for node in ast.walk(ast.parse(mutations)) if isinstance(node, ast.Call)]
    count = sum(ast.unparse(call.func) == "Mutation" for call in calls)
    if count < LEAST_MUTATIONS:
        where = f"tests/projects/{paper}/mutations.py"
        yield f"{where}: {count} mutations, fewer than {LEAST_MUTATIONS}"
    if not list(folder.glob("test_*.py")):
        yield f"tests/projects/{paper}: no tests"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
