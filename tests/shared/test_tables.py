"""Tables: measured first, the paper's numbers labelled, in every format; and the paper's numbers
with their sources.
"""

import csv
import io

import numpy as np
import pandas as pd
import pytest

from shared import tables
from shared.errors import UserError
from shared.experiment import run_experiment
from shared.tables import Column, Table

MEASURED = pd.DataFrame(
    {
        "method": ["a|b", "c_d & <e>"],
        "peak_bytes": [1.5e9, 2e3],
        "step_seconds": [0.0012, np.nan],
        "ok": [True, False],
    }
)
PAPER = pd.DataFrame({"method": ["x"], "peak_bytes": [18.04e9], "source": ["table 1, 100 %"]})


def table(**changes):
    return Table(
        **{
            "title": "T & t",
            "caption": "C <c>",
            "frame": MEASURED,
            "paper": PAPER,
            "notes": ["n_1"],
            "scale": "cpu",
            "device": "D",
            **changes,
        }
    )


def test_markdown():
    text = table().to_markdown()
    lines = text.splitlines()
    assert "**Measured at scale cpu on D**" in lines
    assert (
        lines.index("| method | peak | step | ok |")
        < lines.index("**The paper's own numbers**")
        < lines.index("| x | 18.04 GB | table 1, 100 % |")
    )
    assert "| a\\|b | 1.50 GB | 1.20 ms | yes |" in lines
    assert "| c_d & <e> | 2.00 kB | – | no |" in lines
    assert "| --- | ---: | ---: | --- |" in lines
    assert lines[-1] == "- n_1"


def test_a_table_without_the_papers_numbers_says_so():
    without = table(paper=None)
    for text in (without.to_markdown(), without.to_latex(), without.to_html()):
        assert "paper: not available" in text
    for text in (table().to_markdown(), table().to_latex(), table().to_html()):
        assert "not available" not in text


def test_a_table_of_predictions_says_that_nothing_was_measured():
    predicted = table(predicted=True)
    for text in (predicted.to_markdown(), predicted.to_latex(), predicted.to_html()):
        assert "Predicted, not measured" in text
        assert "Measured" not in text
    assert [line["origin"] for line in csv.DictReader(io.StringIO(predicted.to_csv()))] == [
        "predicted",
        "predicted",
        "paper",
    ]


def test_csv_keeps_raw_numbers_and_says_whose_they_are():
    lines = list(csv.DictReader(io.StringIO(table().to_csv())))
    assert [line["origin"] for line in lines] == ["measured", "measured", "paper"]
    assert float(lines[0]["step_seconds"]) == 0.0012
    assert lines[1]["step_seconds"] == ""
    assert lines[2]["source"] == "table 1, 100 %"
    with pytest.raises(ValueError, match="origin"):
        table(frame=MEASURED.assign(origin=1)).to_csv()


def test_html_escapes_every_text():
    text = table(columns={"method": "<method>", "ok": "ok"}, notes=["<n>"], device="<D>").to_html()
    for raw in ("<c>", "<e>", "<method>", "<n>", "<D>"):
        assert raw not in text
        assert raw.replace("<", "&lt;").replace(">", "&gt;") in text
    assert '<div class="scroll"><table>' in text


def test_latex_escapes_every_text():
    text = table().to_latex()
    assert r"c\_d \& <e>" in text
    assert r"table 1, 100 \%" in text
    assert r"\caption{T \& t. C <c>" in text
    assert text.count(r"\toprule") == 2
    assert r"\begin{tabular}{lrrl}" in text


def test_columns_choose_order_heading_and_format():
    columns = {
        "step_seconds": Column("step", "{:.4f} s"),
        "method": Column("which", None),
        "peak_bytes": Column("peak", lambda value: f"<{value:.0f}>"),
    }
    lines = table(columns=columns).to_markdown().splitlines()
    assert "| step | which | peak |" in lines
    assert "| 0.0012 s | a\\|b | <1500000000> |" in lines
    assert "| which | peak | source |" in lines


def test_a_column_that_is_not_there_is_a_fault():
    with pytest.raises(ValueError, match="lacks: pek"):
        table(columns={"pek": "x"})


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (tables.human_bytes, 0, "0 B"),
        (tables.human_bytes, 999, "999 B"),
        (tables.human_bytes, 1500, "1.50 kB"),
        (tables.human_bytes, 18.04e9, "18.04 GB"),
        (tables.human_bytes, 600e9, "600.0 GB"),
        (tables.human_bytes, -2e6, "-2.00 MB"),
        (tables.human_bytes, 3.2e12, "3.20 TB"),
        (tables.human_seconds, 0, "0.00 s"),
        (tables.human_seconds, 12.345, "12.35 s"),
        (tables.human_seconds, 0.0123, "12.30 ms"),
        (tables.human_seconds, 4.2e-6, "4.20 µs"),
        (tables.human_seconds, 5e-9, "5.00 ns"),
        (tables.human_seconds, 12345, "12,345 s"),
        (tables.human_share, 0.1234, "12.3 %"),
    ],
)
def test_units_for_readers(function, value, text):
    assert function(value) == text


def test_the_papers_numbers_have_sources(toy):
    assert list(tables.paper_numbers("toy", "squares")["source"]) == ["table 1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n,source\n1,table 1\n2,\n", "line 3 has no source"),
        ('n,source\n1,"  "\n', "line 2 has no source"),
        ("n\n1\n", "has no column 'source'"),
        ("", "not a CSV table"),
        ("n,source\n1,2,3,4\n1,2\n1,2,3,4,5,6\n", "not a CSV table"),
    ],
)
def test_a_number_without_a_source_is_refused(write_paper, text, said):
    write_paper("one", {"paper/t.csv": text})
    with pytest.raises(UserError, match=said):
        tables.paper_numbers("one", "t")


def test_a_missing_file_of_the_papers_numbers(toy):
    with pytest.raises(UserError, match="paper=None"):
        tables.paper_numbers("toy", "nothing")


def test_build_writes_every_format_of_every_table(toy, tmp_path):
    for name in ("squares", "slow"):
        run_experiment("toy", name, "smoke", None, tmp_path)
    written = tables.build("toy", "smoke", tmp_path)
    assert {file.name for file in written} == {
        f"{name}.{suffix}"
        for name in ("squares", "both")
        for suffix in ("md", "csv", "tex", "html")
    }
    assert "Measured at scale smoke on " in (tmp_path / "smoke/toy/tables/both.md").read_text()
    before = {file: file.read_bytes() for file in written}
    tables.build("toy", "smoke", tmp_path)
    assert {file: file.read_bytes() for file in written} == before


def test_build_makes_what_it_can_and_names_the_rest(toy, tmp_path):
    run_experiment("toy", "squares", "smoke", None, tmp_path)
    with pytest.raises(
        UserError,
        match="no rows of slow for the other tables; make them: repro run toy/slow --scale smoke",
    ):
        tables.build("toy", "smoke", tmp_path)
    assert (tmp_path / "smoke/toy/tables/squares.md").exists()


def test_a_function_that_returns_no_table_is_told(write_paper, tmp_path):
    manifest = (
        "name: one\ndisplay: One\ntitle: T\nexperiments:\n  e: {title: A, minutes: 1, memory_gb:"
        " 1}\ntables: {t: [e]}\n"
    )
    experiment = (
        "from shared import experiment\nclass Config(experiment.Config): pass\ndef run(config,"
        " run): run.row(n=1)\n"
    )
    write_paper(
        "one",
        {
            "paper.yaml": manifest,
            "scales/cpu.yaml": "e:",
            "experiments/e.py": experiment,
            "tables.py": "def t(e): return 3",
        },
    )
    run_experiment("one", "e", "cpu", None, tmp_path / "results")
    with pytest.raises(UserError, match=r"t must return a shared\.tables\.Table, not int"):
        tables.make("one", "t", "cpu", tmp_path / "results")
