"""Two folders of results side by side: `repro compare results/cpu results/reference/cpu`.

Everything must be equal but what measures time or the memory of a process, which no second run
repeats: those are told by a tolerance and never fail. The name of a column decides which it is.

Floats are equal to the last bit only on the same model of CPU with the same version of torch, as
others add in another order. Where the provenance of two rows files differs in one of these, their
floats may be 0.1 % apart (`FLOAT_TOLERANCE`) and digests (arrays, columns ending in `sha256`) are
passed over; whole numbers, text and truth values must be equal all the same.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import manifest, rows
from shared.errors import UserError

FLOAT_TOLERANCE = 1e-3  # relative, between different CPUs or versions of torch

_TIMING = re.compile(r"(^|_)(seconds|per_second|\w*time|speed\w*|rss|vmdata)(_|$)")


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        where: the file, relative to the folders.
        what: the column, the claim, or "file".
        measured, reference: what they say, in words.
        drift: whether it is a fault (exit status 1) or only worth telling.
    """

    where: str
    what: str
    measured: str
    reference: str
    drift: bool


def is_timing(column: str) -> bool:
    """Whether a column's name says that a second run gives another value: times, speeds, a
    process's memory.
    """
    return _TIMING.search(column) is not None


def elsewhere(measured: Path, reference: Path) -> str:
    """In one line: by which CPUs or versions of torch the two folders' rows differ, so that floats
    need not be equal to the last bit.

    Empty where all were made alike.
    """
    told = {}
    for name in sorted(_files(measured) & _files(reference)):
        if not name.endswith("claims.json"):
            told.update(
                dict.fromkeys(
                    _made_otherwise(
                        rows.read_rows(measured / name), rows.read_rows(reference / name)
                    )
                )
            )
    if not told:
        return ""
    return (
        f"made elsewhere ({'; '.join(told)}): there floats may be {100 * FLOAT_TOLERANCE:g} %"
        " apart, and digests are not compared"
    )


def _made_otherwise(one: rows.RowsFile, other: rows.RowsFile) -> list[str]:
    """What of the provenance makes other last bits: "torch 2.11.0, not 2.12.0"."""
    found = []
    for what in ("CPU", "torch"):
        first, second = (
            (
                side.provenance.get("cpu")
                if what == "CPU"
                else side.provenance.get("packages", {}).get("torch")
            )
            for side in (one, other)
        )
        if first != second:
            found.append(f"{what} {first}, not {second}")
    return found


def differences(measured: Path, reference: Path, tolerance: float) -> list[Difference]:
    """Everything that is not the same in two folders `results/<scale>`.

    Args:
        tolerance: relative difference of timings that is still passed over.

    Raises:
        UserError: a folder is not there or holds no results, or a rows file is broken.
    """
    names = {folder: _files(folder) for folder in (measured, reference)}
    for folder, files in names.items():
        if not files:
            raise UserError(f"{folder} holds no results (<paper>/rows/*.json, <paper>/claims.json)")
    found = [
        Difference(name, "file", "missing", "there", True)
        for name in sorted(names[reference] - names[measured])
    ]
    found += [
        Difference(name, "file", "there", "missing", False)
        for name in sorted(names[measured] - names[reference])
    ]
    for name in sorted(names[measured] & names[reference]):
        if name.endswith("claims.json"):
            found += _claims(name, measured / name, reference / name)
        else:
            found += _rows(
                name, rows.read_rows(measured / name), rows.read_rows(reference / name), tolerance
            )
    return found


def _files(folder: Path) -> set[str]:
    return {
        str(file.relative_to(folder))
        for pattern in ("*/rows/*.json", "*/claims.json")
        for file in folder.glob(pattern)
    }


def _rows(
    where: str, one: rows.RowsFile, other: rows.RowsFile, tolerance: float
) -> Iterator[Difference]:
    for key in sorted({*one.config, *other.config}):
        if one.config.get(key) != other.config.get(key):
            yield Difference(
                where, f"config {key}", str(one.config.get(key)), str(other.config.get(key)), True
            )
    same_bits = not _made_otherwise(one, other)
    files = [{**side.arrays, **side.tensors} for side in (one, other)]
    for name in sorted({*files[0], *files[1]}):
        if name in files[0] and name in files[1] and not same_bits:
            continue
        first, second = (
            entries[name].sha256[:12] if name in entries else "missing" for entries in files
        )
        if first != second and not is_timing(name):
            yield Difference(where, f"array {name}", first, second, True)
    if len(one.rows) != len(other.rows):
        yield Difference(where, "number of rows", str(len(one.rows)), str(len(other.rows)), True)
        return
    for column in sorted({column for row in (*one.rows, *other.rows) for column in row}):
        if not same_bits and column.endswith("sha256"):
            continue
        first_values, second_values = (
            [row.get(column, "absent") for row in side.rows] for side in (one, other)
        )
        yield from _column(
            where,
            column,
            first_values,
            second_values,
            tolerance,
            0.0 if same_bits else FLOAT_TOLERANCE,
        )


def _column(
    where: str,
    column: str,
    one: Sequence[rows.Scalar],
    other: Sequence[rows.Scalar],
    tolerance: float,
    float_tolerance: float,
) -> Iterator[Difference]:
    """At most one difference per column: how many rows differ, and the one that differs most."""
    timing = is_timing(column)
    apart = []
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        allowed = (
            tolerance
            if timing
            else float_tolerance
            if isinstance(a, float) and isinstance(b, float)
            else 0.0
        )
        if (a != b or type(a) is not type(b)) and (_apart(a, b) > allowed or allowed == 0.0):
            apart.append((_apart(a, b), index))
    if apart:
        distance, index = max(apart)
        share = f", {100 * distance:.3g} % apart" if distance != float("inf") else ""
        what = f"{column} ({len(apart)} of {len(one)} rows; most in row {index + 1}{share})"
        yield Difference(where, what, str(one[index]), str(other[index]), drift=not timing)


def _apart(one: rows.Scalar, other: rows.Scalar) -> float:
    """Relative difference of two numbers; infinite for anything else."""
    if isinstance(one, str | bool | None) or isinstance(other, str | bool | None):
        return float("inf")
    largest = max(abs(one), abs(other))
    return abs(one - other) / largest if largest else 0.0


def _claims(where: str, one: Path, other: Path) -> Iterator[Difference]:
    """Verdicts must be equal, except of claims that judge timed experiments. What was measured is
    compared in the rows.
    """
    first, second = _verdicts(one), _verdicts(other)
    timed = _timed_claims(one.parent.name)
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name):
            yield Difference(
                where,
                name,
                str(first.get(name, "absent")),
                str(second.get(name, "absent")),
                drift=name not in timed,
            )


def _verdicts(file: Path) -> dict[str, Any]:
    try:
        return {entry["id"]: entry["verdict"] for entry in json.loads(file.read_bytes())}
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{file} is not a ledger; make it again: repro claims {file.parent.name} --scale"
            f" {file.parent.parent.name}"
        ) from None


def _timed_claims(paper: str) -> set[str]:
    """The ids of a paper's claims that take rows of a timed experiment; none for a paper that is
    not in this repository.
    """
    from shared.claims import claims_of

    if paper not in manifest.manifests():
        return set()
    experiments = manifest.manifest(paper).experiments
    return {
        one.id
        for one in claims_of(paper)
        if any(experiments[name].timed for name in one.experiments)
    }
