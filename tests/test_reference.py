"""The committed results of every paper are what the code makes of the committed rows."""

import json
import shutil

import pytest

from shared import claims, figures, manifest, tables
from shared.paths import ROOT

REFERENCE = ROOT / "results" / "reference" / "cpu"


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


def test_the_reference_tables_are_those_of_its_rows(paper, made):
    for path in (REFERENCE / paper / "tables").glob("*.md"):
        assert (made / "tables" / path.name).read_text() == path.read_text(), path.name


def test_the_reference_ledger_is_that_of_its_rows(paper, made):
    assert json.loads((made / "claims.json").read_text()) == json.loads(
        (REFERENCE / paper / "claims.json").read_text()
    )
