"""`repro keep`: a finished run becomes the reference, what the repository keeps of results.

Kept are what cannot be made again, the rows with the arrays that they name, and what a reader sees
before running anything: verdicts, figures (SVG), tables (Markdown). Tensors, which experiments hand
to one another, are not: no table is made of them, they may be large, and rows hold their digests.
"""

import shutil
import tempfile
from pathlib import Path

from shared import claims, experiment, figures, manifest, paths, rows, tables
from shared.errors import UserError
from shared.files import atomic_folder

KEPT = {"tables": ".md", "figures": ".svg"}


def keep(paper: str, scale: str, results: Path, reference: Path | None = None) -> Path:
    """Put a paper's run at `scale` in the place of its reference.

    Args:
        results: the folder of the run.
        reference: where references lie, by scale; None: the repository's own.

    Returns:
        The paper's folder in the reference.

    Raises:
        UserError: the run is not whole: rows are missing, broken, or not of the values that the
            scale has now. The reference stays as it was.
    """
    entries = manifest.scale_config(paper, scale)
    if not entries:
        raise UserError(f"nothing of {paper} runs at scale {scale}")
    for name in entries:
        _check(paper, name, scale, results)
    place = (reference or paths.REFERENCE) / scale / paper
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / scale / paper
        for name in entries:
            _copy(rows.rows_path(results, scale, paper, name), made / "rows")
        tables.build(paper, scale, Path(temporary))
        figures.build(paper, scale, Path(temporary))
        claims.evaluate(paper, scale, Path(temporary))
        for kind, suffix in KEPT.items():
            for file in (made / kind).glob("*"):
                if file.suffix != suffix:
                    file.unlink()
        with atomic_folder(place) as folder:
            shutil.copytree(made, folder, dirs_exist_ok=True)
    return place


def _check(paper: str, name: str, scale: str, results: Path) -> None:
    path = rows.rows_path(results, scale, paper, name)
    again = f"repro run {paper}/{name} --scale {scale}"
    if not rows.are_whole(path):
        raise UserError(f"{path} is missing, or not whole; make it: {again}")
    _, config = experiment.load(paper, name, scale)
    content = rows.read_rows(path)
    for other in manifest.needs(paper, name, scale).uses:
        used = rows.digest(rows.rows_path(results, scale, paper, other))
        if content.provenance.get("used", {}).get(other) != used:
            raise UserError(f"{path} was made with other rows of {other} than are there: {again}")
    if content.config != config.model_dump(mode="json"):
        raise UserError(f"{path} was made with other values than scales/{scale}.yaml has: {again}")


def _copy(path: Path, folder: Path) -> None:
    """A rows file and the arrays that it names."""
    content = rows.read_rows(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (path.name, *(entry.file for entry in content.arrays.values())):
        shutil.copy(path.parent / name, folder)
