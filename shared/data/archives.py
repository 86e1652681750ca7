"""Unpacking: wheels, sdists, npm tarballs and Debian packages, members chosen by name, and no way
out of the target folder.
"""

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO

from shared.data.catalogue import Archive
from shared.errors import UserError

Wanted = Callable[[str], bool]


def unpack(file: Path, archive: Archive, target: Path, wanted: Wanted) -> None:
    """Extract the wanted members of `file` below `target`.

    `archive.strip` is taken off the members' names before `wanted` is asked. Only plain files are
    extracted.

    Raises UserError when the archive is damaged, or when any member, wanted or not, has a path that
    leads out of the archive, or a wanted one is not a plain file.
    """
    try:
        if zipfile.is_zipfile(file):
            _unzip(file, archive.strip, target, wanted)
            return
        with file.open("rb") as stream:
            if file.suffix == ".deb":
                _seek_data_member(stream)
            with tarfile.open(fileobj=stream, mode="r|*") as tar:
                if archive.inner is None:
                    _untar(tar, archive.strip, target, wanted)
                else:
                    _untar_inner(tar, archive, target, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, LZMAError, zlib.error, EOFError) as error:
        raise UserError(f"{file.name} cannot be unpacked: {error}") from error


def _unzip(file: Path, strip: str, target: Path, wanted: Wanted) -> None:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = _stripped(member.filename, strip)
            if name is None or member.is_dir() or not wanted(name):
                continue
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"{file.name} holds a link, {member.filename}: refused")
            with archive.open(member) as source:
                _write(source, target / name)


def _untar(tar: tarfile.TarFile, strip: str, target: Path, wanted: Wanted) -> None:
    for member in tar:
        name = _stripped(member.name, strip)
        if name is None or member.isdir() or not wanted(name):
            continue
        # refuses what Python itself holds to be unsafe in an archive of data
        tarfile.data_filter(member, str(target))
        if not member.isreg():
            raise UserError(f"{member.name} is not a plain file: refused")
        source = tar.extractfile(member)
        assert source is not None
        _write(source, target / name)


def _untar_inner(tar: tarfile.TarFile, archive: Archive, target: Path, wanted: Wanted) -> None:
    for member in tar:
        _stripped(member.name, "")
        if member.name == archive.inner and member.isreg():
            with tarfile.open(fileobj=tar.extractfile(member), mode="r|*") as inner:
                _untar(inner, archive.strip, target, wanted)
            return
    raise UserError(f"{archive.file} has no {archive.inner}")


def _stripped(name: str, strip: str) -> str | None:
    """The member's name below the folder `strip`, or None when it lies elsewhere."""
    path = PurePosixPath(name.removeprefix("./"))
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"the archive holds a path that leads out of it, {name}: refused")
    return str(path).removeprefix(strip) if str(path).startswith(strip) else None


def _write(source: IO[bytes], destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.open("xb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def _seek_data_member(stream: IO[bytes]) -> None:
    """Move to the start of data.tar.* in a Debian package.

    That is an `ar` archive: 8 magic bytes, then for each member a header of 60 bytes (name in 0:16,
    size in decimal in 48:58) and its bytes, padded to an even length.
    """
    if stream.read(8) != b"!<arch>\n":
        raise UserError("not a Debian package")
    while len(header := stream.read(60)) == 60:
        if header[:16].startswith(b"data.tar"):
            return
        size = int(header[48:58])
        stream.seek(size + size % 2, 1)
    raise UserError("a Debian package without data.tar")
