"""The log of a run: a JSON object a line, whole lines only."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from shared.errors import UserError
from shared.files import sync


def read_lines(path: Path, strict: bool = False) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of a log as far as its lines are whole, each with the number of bytes up to the
    end of its line; none where there is no file. One line at a time is in memory.

    A line that a crash cut is left out, even if what is left of it reads as JSON.

    Args:
        strict: UserError with the number of the line when another than the last is no object. Else
            the log ends before it: after a power cut anything may stand behind what was synced.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        return
    end = 0
    with file:
        for number, line in enumerate(file, 1):
            record = _record(line)
            if record is None:
                if strict and file.read(1):
                    raise UserError(f"{path}, line {number}: not a JSON object; the log is damaged")
                return
            end += len(line)
            yield record, end


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


class Log:
    """Appends to a log, and continues one without the line that a crash cut. A context manager.

        with Log(out / "log.jsonl", keep=lambda line: line["step"] <= done) as log:
            log.write({"step": done + 1, "loss": loss})

    Args:
        path: made if it is not there.
        keep: the log is cut before the first line for which this is false: a checkpoint is older
            than the lines after it, whose steps are made again.
        end: the log is cut after this number of bytes and not read: for a caller that has read it
            with `read_lines` and holds what it needs in less memory. `lines` then stays empty.

    `lines` holds the objects that are in the log. What is kept is not rewritten, so that it stays
    the same to the byte.
    """

    def __init__(
        self,
        path: Path,
        keep: Callable[[dict[str, Any]], bool] = lambda line: True,
        end: int | None = None,
    ):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._holds_lines = end is None
        if end is None:
            end = 0
            for record, end_of_line in read_lines(path):
                if not keep(record):
                    break
                self.lines.append(record)
                end = end_of_line
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._file.truncate(end)
        sync(path.parent)

    def write(self, record: Mapping[str, Any], sync: bool = True) -> None:
        """Append a line. Numbers that are not finite become null, for which JSON has no others.

        Args:
            sync: bring it to the disk before the call returns; without it, call `sync` before a
                checkpoint relies on the line.

        Raises OSError when the disk is full; the line is then cut, and left out by whoever reads.
        """
        text = json.dumps(
            _finite(record), separators=(",", ":"), allow_nan=False, ensure_ascii=False
        )
        left = memoryview(text.encode() + b"\n")
        while left:  # a full disk takes a part first and fails the next time
            left = left[self._file.write(left) :]
        if self._holds_lines:
            self.lines.append(dict(record))
        if sync:
            self.sync()

    def sync(self) -> None:
        """Bring all lines to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(part) for key, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
    return value
