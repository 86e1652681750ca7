"""The committed results are what the code makes of the committed rows; and the arithmetic of the tables, by hand."""

import json
import shutil

import pandas as pd
import pytest

from projects.flashdp.tables import batch_size, costs, speeds
from shared import claims, figures, manifest, tables
from shared.paths import ROOT

REFERENCE = ROOT / "results" / "reference" / "cpu" / "flashdp"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tables, figures and claims made from the rows of the reference."""
    results = tmp_path_factory.mktemp("results")
    shutil.copytree(REFERENCE / "rows", results / "cpu" / "flashdp" / "rows")
    tables.build("flashdp", "cpu", results)
    figures.build("flashdp", "cpu", results)
    claims.evaluate("flashdp", "cpu", results)
    return results / "cpu" / "flashdp"


def test_the_reference_has_every_table_and_figure(made):
    paper = manifest.manifest("flashdp")
    assert {path.stem for path in (REFERENCE / "tables").glob("*.md")} == set(paper.tables)
    assert {path.stem for path in (REFERENCE / "figures").glob("*.svg")} == set(paper.figures)
    assert {path.stem for path in (made / "figures").glob("*.svg")} == set(paper.figures)


def test_the_reference_tables_are_those_of_its_rows(made):
    for path in (REFERENCE / "tables").glob("*.md"):
        assert (made / "tables" / path.name).read_text() == path.read_text(), path.name


def test_the_reference_ledger_is_that_of_its_rows(made):
    assert json.loads((made / "claims.json").read_text()) == json.loads((REFERENCE / "claims.json").read_text())


def test_shares_are_paired_round_by_round_and_memory_is_over_the_non_private():
    common = {"model": "m", "batch_size": 2, "tokens": 8, "clipping": "none"}
    rows = [
        {**common, "method": method, "repeat": r, "step_seconds": seconds, "tokens_per_second": 16 / seconds}
        for r, (plain, flash) in enumerate([(1.0, 2.0), (10.0, 20.0), (4.0, 8.0)])
        for method, seconds in (("non-private", plain), ("FlashDP", flash))
    ]
    rows += [{**common, "method": "non-private", "peak_bytes": 100}, {**common, "method": "FlashDP", "peak_bytes": 103}]
    found = speeds(pd.DataFrame(rows)).set_index("method")
    assert found.loc["FlashDP", ["throughput_share", "low_share", "high_share"]].tolist() == [0.5, 0.5, 0.5]
    assert found.loc["FlashDP", "memory_ratio"] == 1.03
    assert found.loc["non-private", "tokens_per_second"] == 4.0


def test_a_method_without_memory_is_shown_as_a_gap():
    common = {"model": "m", "batch_size": 2, "tokens": 8, "clipping": "none", "peak_bytes": None}
    timed = [{**common, "method": "non-private", "repeat": r, "step_seconds": 1.0, "tokens_per_second": 16.0} for r in range(6)]
    failed = {**common, "method": "explicit", "peak_bytes": None, "out_of_memory": True}
    shown = batch_size(pd.DataFrame([*timed, failed])).to_markdown()
    assert "| explicit | none | – | – | – | – | – |" in shown


def test_savings_are_of_what_the_other_method_takes():
    rows = [{"method": m, "step_flops": f, "moved_bytes": b} for m, f, b in (("non-private", 10, 4), ("BK", 20, 8), ("FlashDP", 12, 6))]
    found = costs(pd.DataFrame(rows)).set_index("method")
    assert found.loc["BK", ["redundant_share", "movement_share"]].tolist() == pytest.approx([0.4, 0.25])
    assert found.loc["FlashDP", ["flops_ratio", "moved_ratio"]].tolist() == [1.2, 1.5]
