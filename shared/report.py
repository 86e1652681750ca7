"""The page: `results/<scale>/report.html`, one file that needs nothing else, made from files that
are already there.

The ledger of claims comes first, then each paper's tables, figures, provenance and the command that
makes them again. What is not there is said to be absent; nothing is computed here.
"""

import ast
import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from shared import manifest, paths, provenance, rows
from shared.errors import UserError
from shared.files import atomic_write

# with a sign, as not everyone sees the colours
VERDICTS = {"holds": "✓", "partly": "◐", "fails": "✗", "not tested here": "–"}
LEDGER_KEYS = {"id", "claim", "source", "verdict", "measured", "bound", "paper", "needs"}


def build(scale: str, results_dir: Path) -> Path:
    """Write the page of a scale from its results and return its path. UserError for a broken rows
    or claims file.
    """
    papers = [_paper(name, scale, results_dir) for name in manifest.manifests()]
    shown = [paper for paper in papers if paper["runs"]]
    ledger = [
        {**entry, "display": paper["display"], "anchor": paper["name"]}
        for paper in shown
        for entry in paper["ledger"]
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("templates/report.html.j2").render(
        scale=scale,
        papers=shown,
        without=[paper["display"] for paper in papers if not paper["runs"]],
        ledger=ledger,
        counts={
            verdict: sum(entry["verdict"] == verdict for entry in ledger) for verdict in VERDICTS
        },
        signs=VERDICTS,
        devices=sorted({run["hardware"] for paper in shown for run in paper["runs"]}),
        dates=sorted({run["started"][:10] for paper in shown for run in paper["runs"]}),
        commits=sorted({run["commit"] for paper in shown for run in paper["runs"]}),
        dirty=any(run["dirty"] for paper in shown for run in paper["runs"]),
        minutes=sum(run["minutes"] for paper in shown for run in paper["runs"]),
    )
    path = results_dir / scale / "report.html"
    atomic_write(path, page.encode())
    return path


def _paper(paper: str, scale: str, results_dir: Path) -> dict[str, Any]:
    """Everything that the page says about one paper."""
    known = manifest.manifest(paper)
    listed = manifest.scale_config(paper, scale)
    folder = results_dir / scale / paper
    runs = [
        _run(rows.read_rows(file))
        for name in known.experiments
        if (file := rows.rows_path(results_dir, scale, paper, name)).exists()
    ]
    for run in runs:
        run["title"] = known.experiments[run["experiment"]].title
    tables = {name: folder / "tables" / f"{name}.html" for name in known.tables}
    figures = {name: folder / "figures" / f"{name}.svg" for name in known.figures}
    captions = _docstrings(paths.PROJECTS / paper / "figures.py")
    packages = {name: version for run in runs for name, version in run["packages"].items()}
    return {
        "name": paper,
        "display": known.display,
        "title": known.title,
        "arxiv": known.arxiv,
        "note": known.note,
        "ledger": _ledger(folder / "claims.json", paper, scale),
        # The fragments are written by Table.to_html, which escapes every text.
        "tables": [
            Markup(file.read_text(encoding="utf-8")) for file in tables.values() if file.exists()
        ],
        "figures": [
            (name, captions.get(name, ""), _data_uri(file))
            for name, file in figures.items()
            if file.exists()
        ],
        "absent": [
            name.replace("_", " ")
            for name, file in {**tables, **figures}.items()
            if not file.exists()
        ],
        "not_run": [
            known.experiments[name].title
            for name in known.experiments
            if name not in {run["experiment"] for run in runs}
        ],
        "stale": [run["experiment"] for run in runs if run["experiment"] not in listed],
        "runs": runs,
        "minutes": sum(run["minutes"] for run in runs),
        "packages": dict(sorted(packages.items())),
    }


def _run(content: rows.RowsFile) -> dict[str, Any]:
    """One experiment's line of provenance."""
    origin = content.provenance
    return {
        "experiment": content.experiment,
        "seed": content.seed,
        "rows": len(content.rows),
        "device": provenance.device(origin),
        "hardware": str(origin.get("gpu") or origin.get("cpu") or "unknown device"),
        "commit": f"commit {origin['commit'][:10]}"
        if origin.get("commit")
        else "outside version control",
        "dirty": bool(origin.get("dirty")),
        "started": str(origin.get("started", "")),
        "minutes": float(origin.get("duration_seconds", 0)) / 60,
        "load": f"{origin.get('load_start', '?')} → {origin.get('load_end', '?')}",
        "overridden": list(origin.get("overridden", [])),
        "packages": {"python": origin.get("python", "?"), **origin.get("packages", {})},
    }


def _ledger(file: Path, paper: str, scale: str) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_bytes())
    except ValueError:
        entries = None
    well_formed = isinstance(entries, list) and all(
        isinstance(entry, dict) and set(entry) == LEDGER_KEYS for entry in entries
    )
    if not well_formed or any(entry["verdict"] not in VERDICTS for entry in entries):
        raise UserError(
            f"{file} is not a ledger; make it again: repro claims {paper} --scale {scale}"
        )
    return list(entries)


def _docstrings(file: Path) -> dict[str, str]:
    """First paragraph of every function's docstring: a figure's caption. Read without importing,
    which would draw in matplotlib.
    """
    if not file.is_file():
        return {}
    functions = [
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]
    return {
        node.name: " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        for node in functions
    }


def _data_uri(file: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode()
