"""Claims: a sentence of the paper in our words, bound to a check over measured rows, with a verdict
that may be a disappointment.

A paper's `claims.py` has one function per claim, decorated with `@claim(...)`. Its parameters name
the experiments whose rows it takes.
"""

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from shared import manifest, rows
from shared.errors import UserError
from shared.files import atomic_write

VerdictWord = Literal["holds", "partly", "fails", "not tested here"]
VERDICTS: tuple[str, ...] = get_args(VerdictWord)


@dataclass(frozen=True)
class Verdict:
    """What the rows say about a claim, with the number that says so, in words ('1.42x at L=16')."""

    verdict: VerdictWord
    measured: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"'{self.verdict}' is no verdict; there are: {', '.join(VERDICTS)}")
        if not isinstance(self.measured, str) or not self.measured:
            raise ValueError("a verdict says what was measured")


@dataclass(frozen=True)
class Claim:
    """A claim and its check. The fields are those of `claim`."""

    id: str
    claim: str
    source: str
    bound: str
    paper: str | None
    needs: str
    check: Callable[..., Verdict]

    @property
    def experiments(self) -> list[str]:
        """The experiments whose rows the check takes."""
        return list(inspect.signature(self.check).parameters)


def claim(
    *, id: str, claim: str, source: str, bound: str, needs: str, paper: str | None = None
) -> Callable[[Callable[..., Verdict]], Callable[..., Verdict]]:
    """Register the decorated function as the check of a claim.

    Args:
        id: "<paper>.<name>", unique.
        claim: what the paper says, in our words.
        source: where it says so ("abstract", "table 2").
        bound: what the rows must show for `holds`.
        needs: what it takes to test it where it is not tested.
        paper: the paper's own value, or None where we had no access to it.
    """
    for key, text in (
        ("id", id),
        ("claim", claim),
        ("source", source),
        ("bound", bound),
        ("needs", needs),
    ):
        if not text.strip():
            raise ValueError(f"claim '{id}': {key} is empty")

    def register(check: Callable[..., Verdict]) -> Callable[..., Verdict]:
        check.claim = Claim(id, claim, source, bound, paper, needs, check)  # type: ignore[attr-defined]
        return check

    return register


def claims_of(paper: str) -> list[Claim]:
    """The claims of a paper in the order of its `claims.py`; none without that file. UserError for
    a clash or an unknown experiment.
    """
    known = manifest.manifest(paper)
    if importlib.util.find_spec(f"projects.{paper}.claims") is None:
        return []
    module = importlib.import_module(f"projects.{paper}.claims")
    found = [
        value.claim
        for value in vars(module).values()
        if isinstance(getattr(value, "claim", None), Claim)
    ]
    seen: set[str] = set()
    for one in found:
        if one.id in seen or not one.id.startswith(f"{paper}."):
            raise UserError(
                f"projects/{paper}/claims.py: the id '{one.id}' must start with '{paper}.' and be"
                " used once"
            )
        seen.add(one.id)
        for experiment in one.experiments:
            if experiment not in known.experiments:
                raise UserError(
                    f"projects/{paper}/claims.py: {one.id}: "
                    + manifest.unknown("experiment", experiment, known.experiments)
                )
    return found


def evaluate(paper: str, scale: str, results_dir: Path) -> list[dict[str, str | None]]:
    """Judge every claim of a paper (`judge`), write `claims.json` in the paper's results and return
    its content.
    """
    ledger = judge(paper, scale, results_dir)
    text = json.dumps(ledger, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(results_dir / scale / paper / "claims.json", text.encode())
    return ledger


def judge(paper: str, scale: str, results_dir: Path) -> list[dict[str, str | None]]:
    """The verdict on every claim of a paper from the rows at `scale`, as `claims.json` has them.

    A claim whose rows are not there is `not tested here`. A broken rows file is a UserError, not a
    missing one.
    """
    ledger = []
    for one in claims_of(paper):
        files = {name: rows.rows_path(results_dir, scale, paper, name) for name in one.experiments}
        absent = [name for name, file in files.items() if not file.exists()]
        if absent:
            verdict = Verdict("not tested here", f"no rows of {', '.join(absent)} at scale {scale}")
        else:
            verdict = one.check(**{name: rows.read_frame(file) for name, file in files.items()})
            if not isinstance(verdict, Verdict):
                raise UserError(
                    f"projects/{paper}/claims.py: {one.id} must return a Verdict, not"
                    f" {type(verdict).__name__}"
                )
        ledger.append(
            {
                "id": one.id,
                "claim": one.claim,
                "source": one.source,
                "verdict": verdict.verdict,
                "measured": verdict.measured,
                "bound": one.bound,
                "paper": one.paper,
                "needs": one.needs if verdict.verdict == "not tested here" else None,
            }
        )
    return ledger


def read_ledger(file: Path) -> list[dict[str, str | None]]:
    """The content of a `claims.json`. UserError where it is not one."""
    try:
        ledger = json.loads(file.read_text(encoding="utf-8"))
        if all(entry["verdict"] in VERDICTS for entry in ledger):
            return list(ledger)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{file} is no claims.json; make it: repro claims PAPER")


Rows = Mapping[str, list[dict[str, Any]]]  # rows by experiment


def require_falsifiable(
    paper: str, failing: Mapping[str, Rows], holding: Mapping[str, Rows]
) -> None:
    """For tests: every claim of `paper` says `fails` on rows made to fail it and `holds` on rows
    made to hold it.

    Args:
        failing, holding: by claim id, rows by experiment.

    Raises:
        AssertionError: naming the claim that has no such rows, or that gives another verdict on
            them.
    """
    registered = {one.id: one for one in claims_of(paper)}
    for wanted, examples in (("fails", failing), ("holds", holding)):
        missing = sorted(set(registered) - set(examples))
        extra = sorted(set(examples) - set(registered))
        assert not missing, (
            f"claims without rows on which the verdict '{wanted}' is shown: {', '.join(missing)}"
        )
        assert not extra, f"rows for claims that do not exist: {', '.join(extra)}"
        for name, one in registered.items():
            verdict = one.check(
                **{
                    experiment: pd.DataFrame(examples[name][experiment])
                    for experiment in one.experiments
                }
            )
            assert verdict.verdict == wanted, (
                f"{name}: '{verdict.verdict}' ({verdict.measured})"
                f" on rows that must give '{wanted}'"
            )
