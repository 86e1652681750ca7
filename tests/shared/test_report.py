"""The page: self-contained, escaped, and honest about what is not there."""

import json
import re
from html.parser import HTMLParser

import pytest

from shared import claims, figures, report, tables
from shared.errors import UserError
from shared.experiment import run_experiment


@pytest.fixture
def results(toy, tmp_path):
    for name in ("squares", "slow"):
        run_experiment("toy", name, "smoke", None, tmp_path)
    tables.build("toy", "smoke", tmp_path)
    figures.build("toy", "smoke", tmp_path)
    claims.evaluate("toy", "smoke", tmp_path)
    return tmp_path


class Page(HTMLParser):
    """What the page loads, and whether its tags close."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}  # noqa: RUF012

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.tags = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [
            value
            for name, value in attributes
            if name in ("src", "srcset", "poster", "data") or (tag == "link" and name == "href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def build(results):
    path = report.build("smoke", results)
    assert path == results / "smoke" / "report.html"
    return path.read_text()


def test_the_page_needs_nothing_else(results):
    text = build(results)
    page = Page(text)
    assert page.loads
    assert all(value.startswith("data:image/svg+xml;base64,") for value in page.loads)
    assert "script" not in page.tags
    assert "@import" not in text
    assert not re.search(r"url\(", text)


def test_the_ledger_comes_first_and_counts(results):
    text = build(results)
    assert text.index('class="ledger"') < text.index('id="toy"')
    counts = dict(re.findall(r'class="count (\w+)"><b>(\d+)</b>', text))
    assert counts == {"holds": "1", "partly": "0", "fails": "0", "untested": "2"}
    assert "needs a GPU: --config scale=gpu" in text


def test_tables_figures_provenance_and_the_command_are_there(results):
    text = build(results)
    assert "<h4>Squares</h4>" in text
    assert "The paper’s own numbers" in text
    assert "paper: not available" in text
    assert "Squares grow &amp; &lt;grow&gt;." in text
    assert "This paragraph" not in text
    assert "snakemake toy --cores all --config scale=smoke" in text
    assert "Not run at this scale: Time of nothing; Two processes; On the GPU." in text
    assert "numpy " in text


def test_texts_are_escaped(results):
    text = build(results)
    assert "<b>&amp;</b>" not in text
    assert "&lt;b&gt;squares&lt;/b&gt;" in text
    assert "Toy: squares &lt;b&gt;&amp;&lt;/b&gt; clocks" in text


def test_what_is_not_made_is_named(results):
    (results / "smoke/toy/tables/both.html").unlink()
    text = build(results)
    assert "Not made at this scale: both." in text


def test_a_paper_without_results_is_not_shown_as_done(toy, tmp_path):
    text = build(tmp_path)
    assert 'id="toy"' not in text
    assert "Without results at this scale: Toy." in text
    assert "No claim has been judged" in text
    assert "snakemake toy" not in text


def test_a_run_by_hand_with_other_values_is_marked(results):
    run_experiment("toy", "slow", "smoke", {"seconds": 0.001}, results)
    assert "run by hand with other values of seconds" in build(results)


def test_the_same_results_give_the_same_page(results):
    assert build(results) == build(results)


@pytest.mark.parametrize(
    "text", ["{", "[{}]", "{}", json.dumps([dict.fromkeys(report.LEDGER_KEYS, "x")])]
)
def test_a_broken_ledger_is_told(results, text):
    (results / "smoke/toy/claims.json").write_text(text)
    with pytest.raises(UserError, match="make it again: repro claims toy --scale smoke"):
        report.build("smoke", results)


def test_broken_rows_are_told(results):
    (results / "smoke/toy/rows/slow.json").write_text("{")
    with pytest.raises(UserError, match="make it again: repro run toy/slow --scale smoke"):
        report.build("smoke", results)
