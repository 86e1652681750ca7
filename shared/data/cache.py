"""The cache: where the files of an entry lie, and whether they are the right ones. Never touches
the network.

An entry is complete when its folder has a stamp, `.complete.json`, which lists every file with its
size and sha256. The folder is prepared elsewhere and renamed into place with the stamp inside, so a
folder in place is a whole one.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from shared.data.catalogue import Entry, entry
from shared.errors import UserError
from shared.files import sha256
from shared.paths import cache_dir

STAMP = ".complete.json"


class FileRecord(TypedDict):
    """What the stamp says of one file."""

    size: int
    sha256: str


class Stamp(TypedDict):
    """`.complete.json`."""

    content: str  # digest over all files
    source: str  # provider or path they came from
    archives: dict[str, str]  # file name -> sha256
    files: dict[str, FileRecord]  # path relative to the folder -> size, sha256


def stamp(name: str) -> Path:
    """The file that exists once the entry is complete: what a workflow takes as input or output. It
    may be absent.
    """
    entry(name)
    return cache_dir() / name / STAMP


def path(name: str) -> Path:
    """The folder of a complete entry.

    Files are checked for presence and size; `verify` also reads their bytes. Never downloads.

    Raises UserError, naming the command that fetches it, when the entry is unknown, absent or
    incomplete.
    """
    fields, folder = entry(name), cache_dir() / name
    record = read_stamp(folder)
    if record is None:
        raise UserError(f"{name} is not in {cache_dir()}: fetch it with `repro data fetch {name}`")
    if fields.content is not None and record["content"] != fields.content:
        raise UserError(
            f"{name} in {cache_dir()} is another version than the catalogue's: `repro data fetch"
            f" {name}` replaces it"
        )
    for file, known in record["files"].items():
        if not (folder / file).is_file() or (folder / file).stat().st_size != known["size"]:
            raise UserError(
                f"{name} in {cache_dir()} is incomplete ({file}): `repro data fetch {name}`"
                " mends it"
            )
    return folder


def verify(names: Iterable[str]) -> None:
    """Read every byte of these entries and compare with the catalogue.

    Raises UserError naming each entry that is absent or corrupt, with its first wrong file.
    """
    wrong: dict[str, str] = {}
    for name in names:
        try:
            folder = path(name)
        except UserError as error:
            wrong[name] = str(error)
            continue
        record = read_stamp(folder)
        assert record is not None
        found = describe(folder, record["files"])
        changed = [file for file, known in record["files"].items() if found[file] != known]
        if changed:
            wrong[name] = f"{name}: {changed[0]} is corrupt"
        elif content_digest(found) != record["content"]:
            wrong[name] = f"{name}: {STAMP} was altered"
    if wrong:
        raise UserError(
            f"{'; '.join(wrong.values())}. `repro data fetch {' '.join(wrong)}` mends it"
        )


def is_complete(name: str) -> bool:
    """Whether `path(name)` would return a folder."""
    try:
        path(name)
    except UserError:
        return False
    return True


def read_stamp(folder: Path) -> Stamp | None:
    """The folder's stamp, or None where there is none that can be read."""
    try:
        record: Stamp = json.loads((folder / STAMP).read_text())
        return (
            record
            if isinstance(record["files"], dict) and isinstance(record["content"], str)
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(folder: Path, files: Iterable[str]) -> dict[str, FileRecord]:
    """Size and sha256 of these files, paths relative to `folder`."""
    return {
        file: {"size": (folder / file).stat().st_size, "sha256": sha256(folder / file)}
        for file in files
    }


def content_digest(files: dict[str, FileRecord]) -> str:
    """One digest over names and bytes of all files: sha256 of the lines `<sha256>  <path>`, sorted
    by path.
    """
    lines = "".join(f"{files[file]['sha256']}  {file}\n" for file in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def check(name: str, fields: Entry, files: dict[str, FileRecord]) -> None:
    """Compare files, as `describe` gives them, with the catalogue; UserError saying which one is
    missing or different.
    """
    for file, expected in fields.sha256.items():
        if file not in files:
            raise UserError(f"{file} is missing")
        if files[file]["sha256"] != expected:
            raise UserError(f"{file} has sha256 {files[file]['sha256']}, not {expected}")
    if not files:
        raise UserError(f"no file matches {', '.join(fields.files)}")
    digest = content_digest(files)
    if fields.content is not None and digest != fields.content:
        raise UserError(
            f"the {len(files)} files together have the digest {digest}, not {fields.content} as the"
            f" catalogue says for {name}"
        )
