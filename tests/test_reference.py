"""The committed results of every paper are what the code makes of the committed rows."""

import json
import shutil

import pytest

from shared import claims, figures, manifest, paths, readme, tables

REFERENCE = paths.REFERENCE / "cpu"


@pytest.fixture(scope="module", params=sorted(manifest.manifests()))
def paper(request):
    return request.param


@pytest.fixture(scope="module")
def made(paper, tmp_path_factory):
    """Tables, figures and claims made from the rows of the reference."""
    results = tmp_path_factory.mktemp("results")
    shutil.copytree(REFERENCE / paper / "rows", results / "cpu" / paper / "rows")
    tables.build(paper, "cpu", results)
    figures.build(paper, "cpu", results)
    claims.evaluate(paper, "cpu", results)
    return results / "cpu" / paper


def test_the_reference_has_every_table_and_figure(paper, made):
    wanted, drawn = (set(manifest.ready(paper, "cpu", kind)) for kind in ("tables", "figures"))
    assert {path.stem for path in (REFERENCE / paper / "tables").glob("*.md")} == wanted
    assert {path.stem for path in (REFERENCE / paper / "figures").glob("*.svg")} == drawn
    assert {path.stem for path in (made / "figures").glob("*.svg")} == drawn
    assert wanted


def test_the_reference_keeps_each_thing_in_one_form_and_the_others_are_made(paper, made):
    suffixes = {file.suffix for file in (REFERENCE / paper).rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".npy", ".md", ".svg"}
    for table in (REFERENCE / paper / "tables").glob("*.md"):
        for suffix in (".csv", ".tex", ".html"):
            assert (made / "tables" / table.with_suffix(suffix).name).read_text(), table.name
    for figure in (REFERENCE / paper / "figures").glob("*.svg"):
        assert (made / "figures" / figure.with_suffix(".png").name).read_bytes(), figure.name


def test_the_reference_tables_are_those_of_its_rows(paper, made):
    for path in (REFERENCE / paper / "tables").glob("*.md"):
        assert (made / "tables" / path.name).read_text() == path.read_text(), path.name


def test_the_reference_ledger_is_that_of_its_rows(paper, made):
    assert json.loads((made / "claims.json").read_text()) == json.loads(
        (REFERENCE / paper / "claims.json").read_text()
    )


def test_the_numbers_of_the_readme_are_those_of_the_reference(paper):
    assert readme.update(paper, "cpu", paths.REFERENCE, write=False) == []


def test_the_readme_has_no_number_of_unknown_origin(paper):
    assert readme.unmarked(readme.readme(paper).read_text(encoding="utf-8")) == []


def test_the_main_readme_has_every_paper_and_the_verdicts_of_the_reference():
    assert readme.update(None, "cpu", paths.REFERENCE, write=False) == []
