"""Claims: verdicts from rows, honest where there are none, and never constant."""

import ast
import json

import pytest

from shared import claims, paths
from shared.claims import Verdict, claim, require_falsifiable
from shared.errors import UserError
from shared.experiment import run_experiment

KEYS = {"id", "claim", "source", "verdict", "measured", "bound", "paper", "needs"}


def test_the_ledger(toy, tmp_path):
    run_experiment("toy", "squares", "smoke", None, tmp_path)
    ledger = claims.evaluate("toy", "smoke", tmp_path)
    assert json.loads((tmp_path / "smoke/toy/claims.json").read_text()) == ledger
    assert all(set(entry) == KEYS for entry in ledger)
    squares, card, _ = ledger
    assert (squares["verdict"], squares["measured"], squares["needs"]) == (
        "holds",
        "0 wrong rows",
        None,
    )
    assert (card["verdict"], card["needs"]) == ("not tested here", "a GPU: --config scale=gpu")
    assert card["measured"] == "no rows of card at scale smoke"
    assert card["paper"] is None


def test_broken_rows_are_not_missing_rows(toy, tmp_path):
    path = run_experiment("toy", "squares", "smoke", None, tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match="make it again: repro run toy/squares --scale smoke"):
        claims.evaluate("toy", "smoke", tmp_path)


def test_a_verdict_is_one_of_four_words_and_says_what_was_measured():
    for word in ("holds", "partly", "fails", "not tested here"):
        assert Verdict(word, "x").verdict == word
    with pytest.raises(ValueError, match="no verdict"):
        Verdict("true", "x")
    with pytest.raises(ValueError, match="what was measured"):
        Verdict("holds", "")


GOOD = {"id": "one.a", "claim": "c", "source": "s", "bound": "b", "needs": "n"}


@pytest.mark.parametrize("key", list(GOOD))
def test_every_text_of_a_claim_is_given(key):
    with pytest.raises(ValueError, match=f"{key} is empty"):
        claim(**{**GOOD, key: " "})


MANIFEST = (
    "name: one\ndisplay: One\ntitle: T\nexperiments:\n  e: {title: A, minutes: 1, memory_gb: 1}\n"
)
TEXT = """
from shared.claims import Verdict, claim
@claim(id="one.a", claim="c", source="s", bound="b", needs="n")
def a(e):
    return Verdict("holds" if e["n"].min() > 0 else "fails", "x")
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            TEXT + TEXT.split("claim\n", 1)[1].replace("def a", "def b"),
            "'one.a' must start with 'one.' and be used once",
        ),
        (TEXT.replace("one.a", "two.a"), "must start with 'one.'"),
        (TEXT.replace("def a(e)", "def a(f)"), "unknown experiment 'f'"),
    ],
)
def test_ids_are_unique_and_inputs_are_experiments(write_paper, text, said):
    write_paper("one", {"paper.yaml": MANIFEST, "claims.py": text})
    with pytest.raises(UserError, match=said):
        claims.claims_of("one")


def test_a_paper_without_claims(write_paper):
    write_paper("one", {"paper.yaml": MANIFEST, "__init__.py": ""})
    assert claims.claims_of("one") == []


HOLDS, FAILS = {"one.a": {"e": [{"n": 1}]}}, {"one.a": {"e": [{"n": 0}]}}


def test_a_claim_that_can_fail_and_can_hold_passes(write_paper):
    write_paper("one", {"paper.yaml": MANIFEST, "claims.py": TEXT})
    require_falsifiable("one", failing=FAILS, holding=HOLDS)


@pytest.mark.parametrize(
    ("text", "failing", "holding", "said"),
    [
        (TEXT.replace('"fails"', '"holds"'), FAILS, HOLDS, "one.a: 'holds'"),
        (TEXT.replace('"holds" if', '"fails" if'), FAILS, HOLDS, "one.a: 'fails'"),
        (TEXT, {}, HOLDS, "without rows on which the verdict 'fails' is shown: one.a"),
        (TEXT, FAILS, {}, "without rows on which the verdict 'holds' is shown: one.a"),
        (TEXT, {**FAILS, "one.b": {}}, HOLDS, "claims that do not exist: one.b"),
        (TEXT, HOLDS, HOLDS, "that must give 'fails'"),
    ],
)
def test_a_constant_verdict_is_caught(write_paper, text, failing, holding, said):
    write_paper("one", {"paper.yaml": MANIFEST, "claims.py": text})
    with pytest.raises(AssertionError, match=said):
        require_falsifiable("one", failing=failing, holding=holding)


def test_the_toy_claims_can_fail_and_can_hold(toy):
    require_falsifiable(
        "toy",
        failing={
            "toy.squares": {"squares": [{"number": 2, "square": 5}]},
            "toy.card": {"card": []},
            "toy.clock": {"clock": [{"step_seconds": 1.0}]},
        },
        holding={
            "toy.squares": {"squares": [{"number": 2, "square": 4}]},
            "toy.card": {"card": [{"n": 1}]},
            "toy.clock": {"clock": [{"step_seconds": 1e-6}]},
        },
    )


def papers_with_claims():
    return sorted(file.parent.name for file in paths.PROJECTS.glob("*/claims.py"))


@pytest.mark.parametrize("paper", papers_with_claims())
def test_every_paper_shows_that_its_claims_can_fail(paper):
    """tests/projects/<paper>/test_claims.py calls require_falsifiable("<paper>", ...), which looks
    at every claim there is.
    """
    file = paths.ROOT / "tests" / "projects" / paper / "test_claims.py"
    assert file.is_file(), f"{file} is missing; see docs/adding-a-paper.md, section 5"
    calls = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    named = [
        node
        for node in calls
        if getattr(node.func, "id", getattr(node.func, "attr", "")) == "require_falsifiable"
    ]
    assert any(node.args and getattr(node.args[0], "value", None) == paper for node in named)
