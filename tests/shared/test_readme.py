"""`repro readme`: numbers of a README come from rows, and an unmarked one is noticed."""

import importlib

import pandas as pd
import pytest

from shared import cli, paths, readme
from shared.errors import UserError

PAPER = {
    "paper.yaml": (
        "name: small\ndisplay: Small\ntitle: 'Small: a paper'\narxiv: '0000.00001'\n"
        "experiments: {error: {title: Error, minutes: 1, memory_gb: 1}}\n"
        "tables: {error: [error]}\n"
    ),
    "tables.py": (
        "from shared.tables import Column, Table\n"
        "def error(error):\n"
        "    shown = error.assign(gain=['1.5 ± 0.2', '-0.7 ± 0.1', '0.0'])\n"
        "    columns = {'method': 'method', 'points': 'n', 'error': Column('gap', '{:.3f}'),\n"
        "               'gain': 'gap'}\n"
        "    return Table('Errors', 'Twice; 7.5 ± 0.1 b', shown, columns, notes=['a 3x'])\n"
    ),
    "paper/error.csv": 'method,"error",source\nours,0.25,table 1\n',
}


MEASURED = [("ours", 100, 0.25), ("theirs", 100, 0.5), ("ours", 400, 0.125)]
VERDICT = {"id": "small.rate", "verdict": "holds", "measured": "slope -0.49, 21 of 1,024 cells"}


@pytest.fixture
def small(write_paper):
    """The folder of a paper."""
    return write_paper("small", PAPER)


@pytest.fixture
def source(monkeypatch, small, tmp_path):
    """What the marks of the paper may name; its table and its verdicts need no rows file."""
    table = importlib.import_module("projects.small.tables").error
    frame = pd.DataFrame(MEASURED, columns=["method", "points", "error"])
    monkeypatch.setattr(readme.tables, "make", lambda *_: table(frame))
    monkeypatch.setattr(readme.claims, "judge", lambda *_: [VERDICT])
    return readme.Source("small", "cpu", tmp_path / "results")


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("error[theirs].error", "0.500"),
        ("error[ours; 400].error", "0.125"),
        ("error[ours; 100].gain", "1.5"),
        ("error.caption before ± 0.1", "7.5"),
        ("error.notes after a", "3x"),
        ("claims[rate].measured", "slope -0.49, 21 of 1,024 cells"),
        ("claims[rate].measured after slope", "-0.49"),
        ("claims[rate].measured before cells", "1,024"),
        ("claims[rate].verdict", "holds"),
        ("paper/error[ours].error", "0.25"),
    ],
)
def test_an_address_names_one_text(source, address, text):
    assert source.lookup(address) == text


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("error[ours].error", "2 rows have 'ours'"),
        ("error[nobody].error", "0 rows have 'nobody'"),
        ("error[ours; ours].error", "0 rows have"),
        ("error[theirs].gap", "unknown column 'gap'"),
        ("error[theirs].erorr", "did you mean error"),
        ("claims[rat].measured", "did you mean rate"),
        ("claims[rate].mesured", "did you mean measured"),
        ("claims[rate].measured after 2", "0 numbers stand after"),
        ("paper/nothing[ours].error", "cannot be read"),
        ("0.54", "no address"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(source, address, reason):
    with pytest.raises(UserError, match=reason):
        source.lookup(address)


def test_marks_are_filled_and_all_else_is_left_as_it_is():
    text = "It is <!--=a b-->old<!--/--> (<!--=setting-->30 %<!--/-->).\n\n- x <!--=c--><!--/-->\n"
    filled = readme.fill(text, str.upper)
    assert filled == text.replace("old", "A B").replace("c--><", "c-->C<")
    assert readme.fill(filled, str.upper) == filled


@pytest.mark.parametrize(
    "line",
    [
        "a <!--=x-->1",
        "a <!--=x-->1\n<!--/-->",
        "a 1<!--/-->",
        "<!--=x-->1<!--/-->",
        "- <!--=x-->1<!--/-->",
    ],
)
def test_a_mark_that_would_not_be_read_or_shown_right_is_refused(line):
    with pytest.raises(UserError, match=r"line 2: a mark"):
        readme.fill(f"first\n{line}", str.upper)


@pytest.mark.parametrize(
    "number",
    ["0.54", "1,024.5", "45 %", "12%", "6x", "2.5×", "-3 points", "8 GB", "130 bytes", "7 s"],
)
def test_a_number_with_decimals_or_a_unit_needs_a_mark(number):
    assert readme.unmarked(f"one\nIt is {number}, and more.") == [f"line 2: {number}"]
    assert readme.unmarked(f"one\nIt is <!--=a.b-->{number}<!--/-->.") == []


@pytest.mark.parametrize(
    "text",
    [
        "`0.54` of 21 cells, ResNet-18, 2x2, theorem 5.3, OPT-175B's, Qwen3-1.7B, SmolLM2-135M",
        "[arXiv 2503.12668](https://arxiv.org/abs/2503.12668)",
        "# Version 1.2",
        "```sh\nrun 0.5\n```",
    ],
)
def test_code_links_and_headings_may_have_numbers(text):
    assert readme.unmarked(text) == []


def test_the_command_fills_and_its_check_only_tells(source, small, capsys):
    folder = small
    old = "# Small\n\nIt has <!--=error[theirs].error-->0.4<!--/-->.\n"
    (folder / "README.md").write_text(old)
    assert cli.main(["readme", "small", "--check"]) == 1
    assert (folder / "README.md").read_text() == old
    assert capsys.readouterr().out.splitlines() == [f"{folder / 'README.md'}:3: 0.4 -> 0.500"]
    assert cli.main(["readme", "small"]) == 0
    assert (folder / "README.md").read_text() == old.replace("0.4", "0.500")
    assert cli.main(["readme", "small", "--check"]) == 0


def test_a_readme_that_is_not_there_is_one_line(small, refused):
    assert "README.md is missing" in refused("readme", "small")


TABLE = "# All\n\n| paper | title | arXiv | status |\n| --- | --- | --- | --- |\n{}\n\nEnd.\n"
PLANNED = "| Small | a paper | [0000.00001](https://arxiv.org/abs/0000.00001) | planned |"
OTHER = "| Other | another | – | planned |"


@pytest.mark.parametrize("before", [f"{PLANNED}\n{OTHER}", OTHER])
def test_the_main_table_has_a_row_and_the_verdicts_of_every_paper(
    small, tmp_path, monkeypatch, before
):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(TABLE.format(before))
    readme.update(None, "cpu", tmp_path / "results", write=True)
    row = PLANNED.replace("| Small |", "| [Small](projects/small/README.md) |")
    new = row.replace("planned", "new")
    assert sorted((tmp_path / "README.md").read_text().splitlines()[4:6]) == sorted([new, OTHER])

    ledger = tmp_path / "results" / "cpu" / "small" / "claims.json"
    ledger.parent.mkdir(parents=True)
    ledger.write_text('[{"verdict": "holds"}, {"verdict": "fails"}, {"verdict": "holds"}]')
    assert len(readme.update(None, "cpu", tmp_path / "results", write=True)) == 1
    works = "works: [2 holds, 1 fails](results/cpu/small/claims.json)"
    text = (tmp_path / "README.md").read_text()
    assert row.replace("planned", works) in text
    assert text.endswith("|\n\nEnd.\n")
