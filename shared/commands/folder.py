"""A run of hours in a folder of the user's: the folder to itself, what the run is, a full disk.

What a run is (`begin`) is compared after the input of the command has been checked, so that what is
wrong with the input is said first; and it binds only a run that has made a step, so that a
corrected command works in the same folder.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from shared.commands.recipe import option_name
from shared.errors import UserError
from shared.files import NO_SPACE, atomic_json, read_json, remove

_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_out(out: Path, *suffixes: str, what: str = "files") -> None:
    """UserError unless the file `out` can be made, which is tried: its folder exists and may be
    written to, and its name ends in one of the suffixes, where there are any.

    Args:
        what: what the file holds, for the message.
    """
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"--out {out}: {what} are written as {' or '.join(suffixes)}; name one so")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    trial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        try:
            trial.write_bytes(b"x")  # not empty: on a full disk that would do
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None


@contextmanager
def locked(
    out: Path,
    log: str = "log.jsonl",
    early: Collection[str] = ("data", "eval-data"),
    lines: int = 1,
) -> Iterator[None]:
    """Inside, `out` exists and is this process's alone, and a full disk is one line
    (`plain_errors`). What a crash left half-written is swept away; a folder that an error leaves
    without a run is removed again if it was made here.

    Args:
        out: the folder; made if it is not there.
        log: a folder holds a run once this file of it has `lines` whole lines: with a header that
            is written before the first step, 2.
        early: other files and folders that a run writes before that. The rest, but for `.part`
            files, would be the user's own.

    Raises:
        UserError: it cannot be made or written to, holds other things, or another process is
            working there.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    ours = {".lock", log, *early}
    if not begun(out / log, lines) and any(
        f.name not in ours and not f.name.endswith(".part") for f in out.iterdir()
    ):
        raise UserError(f"--out {out} is not empty and holds no run; name a new folder")
    try:
        with alone(out, out / "checkpoint"), plain_errors(out):
            yield
    except _Taken:  # it is another process's, even if it was made here
        raise
    except BaseException:
        if made and not begun(out / log, lines):
            shutil.rmtree(out, ignore_errors=True)
        raise


class _Taken(UserError):
    """Another process holds the lock."""


@contextmanager
def alone(folder: Path, *within: Path) -> Iterator[None]:
    """Inside, a folder that exists is this process's alone: what a crash left half-written in it,
    and in the folders `within`, has been swept away. The lock goes with its process, so that a kill
    leaves nothing to clear.

    Raises UserError when the folder cannot be written to, or another process is working there.
    """
    try:
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _Taken(f"another process is working in {folder}") from None
        for place in (folder, *within):
            remove(*place.glob(".*.part"))
        yield


def begun(log: Path, lines: int = 1) -> bool:
    """Whether a run's log has so many whole lines."""
    try:
        with open(log, "rb") as file:
            return sum(line.endswith(b"\n") for line in islice(file, lines)) == lines
    except OSError:
        return False


def begin(path: Path, about: Mapping[str, Any], begun: bool) -> None:
    """Write down in the file `path` what a run is; or, where a run has begun, refuse to go on with
    another one.

    Call it after all input has been checked and before the first step.

    Args:
        path: in the run's folder, usually `run.json`.
        about: everything that the result depends on, by the option that decides it
            (`batch_size`), as JSON; contents (data, a model, a user's module) as digests of 64
            hexadecimal digits (`shared.files.sha256`, `shared.commands.key`).
        begun: whether the run has made a step.

    Raises:
        UserError: it is damaged, or an option differs.
    """
    known = read_json(path) if begun else None
    if begun and known is None:
        raise UserError(
            f"{path.parent} holds a run that has lost its {path.name}; name another --out"
        )
    if known is None:
        atomic_json(path, about)
    else:
        same_run(known, about, path.parent)


def same_run(known: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Compare what the run in `out` began with to what the command is told now.

    Args:
        known, now: as `about` of `begin`; JSON, or what JSON makes of it.

    Raises:
        UserError: names the first option of `now` that differs, with both values; of contents only
            that they differ.
    """
    for key, value in json.loads(json.dumps(dict(now))).items():
        before = known.get(key)
        if before == value:
            continue
        if isinstance(value, str) and _DIGEST.fullmatch(value):
            raise UserError(
                f"{out} holds a run with another {option_name(key)}; name another --out"
            )
        raise UserError(
            f"{out} holds a run with {option_name(key)} {_shown(before)}, not {_shown(value)};"
            " name another --out"
        )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def plain_errors(out: Path) -> Iterator[None]:
    """Turn what a full disk refuses into one line. `locked` has it."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(
            f"no space left for {out}; the last checkpoint and the log are whole: make room and run"
            " the same command again"
        ) from None
