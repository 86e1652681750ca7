"""Fetching an entry: find the bytes, check them, put them in place as a whole.

Nothing under an entry's name is ever half-written: all is prepared in `.tmp/<name>/`, checked
against the catalogue, stamped, and renamed into place. A kill at any moment leaves at most
something in `.tmp/`, which the next call for the same entry removes. Downloads are kept in
`.downloads/`, which may be deleted at any time. A lock per entry and per download lets several
processes fetch at once.
"""

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from shared.data import archives, cache, clients
from shared.data.catalogue import Archive, DebianIndex, Entry, Hub, Python, Torchvision, entry
from shared.errors import UserError
from shared.files import sha256
from shared.paths import cache_dir

Report = Callable[[int], None]  # called with the number of bytes there so far


def fetch(name: str, source: Path | None = None) -> Path:
    """Make the entry complete in the cache and return its folder. An entry that is complete and
    uncorrupted is left alone.

    `source` is a copy of the user's own, instead of the providers: an archive file that the
    catalogue names (by its sha256, the name does not matter), a folder of several such archives, or
    a folder that holds the entry's files.

    Raises UserError, in one line, when no provider can give the right bytes, or the disk is full;
    the cache is then as it was before.
    """
    fields = entry(name)
    with _user_errors(name), _locked(cache_dir() / ".locks" / name), _scratch(name) as work:
        with contextlib.suppress(UserError):
            cache.verify([name])
            return cache.path(name)
        with _progress(name) as report:
            if source is None:
                _from_providers(name, fields, work, report)
            else:
                _from_source(name, fields, work, source, report)
        folder = cache_dir() / name
        if folder.exists():
            folder.rename(work / "old")
        (work / "new").rename(folder)
    return cache.path(name)


def _from_providers(name: str, fields: Entry, work: Path, report: Report) -> None:
    """Complete `work / "new"` from the first provider that can."""
    reasons = []
    for provider in fields.providers:
        target = work / "new"
        target.mkdir()
        try:
            used: list[Archive] = []
            if isinstance(provider, Python):
                _copy(_package_folder(provider), fields, target)
            elif isinstance(provider, DebianIndex | Hub | Torchvision):
                scratch = work / provider.type
                scratch.mkdir()
                _from_client(provider, fields, scratch, target, report)
            else:
                before = 0
                for archive in provider.archives:
                    so_far = partial(_report_further, report, before)
                    file = _downloaded(provider, archive, so_far)
                    archives.unpack(file, archive, target, fields.wants)
                    before += archive.size
                used = provider.archives
            _complete(name, fields, target, str(provider), used)
            return
        except UserError as error:
            reasons.append(f"{provider}: {error}")
            shutil.rmtree(target, ignore_errors=True)
    raise UserError(
        f"{name} could not be fetched ({'; '.join(reasons)}); or bring your own copy: `repro data"
        f" fetch {name} --from PATH`"
    )


def _from_client(
    provider: DebianIndex | Hub | Torchvision,
    fields: Entry,
    scratch: Path,
    target: Path,
    report: Report,
) -> None:
    def watch() -> None:
        report(_folder_size(scratch))

    if isinstance(provider, DebianIndex):
        clients.debian_index(scratch, watch)
        _copy(scratch, fields, target)
    elif isinstance(provider, Hub):
        clients.hub(provider, fields.files, scratch, watch)
        _copy(scratch / "files", fields, target)
    else:
        clients.torchvision(provider, scratch, watch)
        _copy(scratch / provider.folder, fields, target)


def _from_source(name: str, fields: Entry, work: Path, source: Path, report: Report) -> None:
    """Complete `work / "new"` from what the user brings."""
    source = source.expanduser().resolve()
    if not source.exists():
        raise UserError(f"{source} does not exist")
    candidates = (
        [source]
        if source.is_file()
        else [file for file in sorted(source.iterdir()) if file.is_file()]
    )
    sizes = {
        archive.size
        for provider in fields.providers
        for archive in getattr(provider, "archives", [])
    }
    by_hash = {sha256(file): file for file in candidates if file.stat().st_size in sizes}
    target = work / "new"
    target.mkdir()
    for provider in fields.providers:
        wanted: list[Archive] = getattr(provider, "archives", [])
        if wanted and all(archive.sha256 in by_hash for archive in wanted):
            for archive in wanted:
                archives.unpack(by_hash[archive.sha256], archive, target, fields.wants)
            _complete(name, fields, target, str(source), wanted)
            report(_folder_size(target))
            return
    if source.is_file():
        known = [
            f"{archive.file} (sha256 {archive.sha256})"
            for p in fields.providers
            for archive in getattr(p, "archives", [])
        ]
        raise UserError(
            f"{source} is not the right archive for {name}: wanted is"
            f" {' or '.join(known) or 'a folder with the files'}"
        )
    _copy(source, fields, target)
    try:
        _complete(name, fields, target, str(source), [])
    except UserError as error:
        raise UserError(f"{source} does not hold {name}: {error}") from None
    report(_folder_size(target))


def _downloaded(provider: clients.Registry, archive: Archive, report: Report) -> Path:
    """The archive in `.downloads/`, downloaded unless it is there with the right sha256."""
    downloads = cache_dir() / ".downloads"
    downloads.mkdir(exist_ok=True)
    file = downloads / archive.file
    with _locked(cache_dir() / ".locks" / archive.file):
        if file.is_file() and sha256(file) == archive.sha256:
            report(archive.size)
            return file
        with _scratch(archive.file) as scratch:
            clients.download(provider, archive, scratch, lambda: report(_folder_size(scratch)))
            found = scratch / archive.file
            if not found.is_file():
                raise UserError(
                    f"the registry gave {', '.join(f.name for f in scratch.iterdir())}, not"
                    f" {archive.file}"
                )
            if (digest := sha256(found)) != archive.sha256:
                raise UserError(f"wrong sha256 for {archive.file}: {digest}, not {archive.sha256}")
            found.replace(file)
        report(archive.size)
    return file


def _report_further(report: Report, before: int, size: int) -> None:
    """Report bytes of one archive as those of all archives so far."""
    report(before + size)


def _complete(name: str, fields: Entry, target: Path, source: str, used: list[Archive]) -> None:
    """Check the extracted files against the catalogue and write the stamp, last of all."""
    files = cache.describe(
        target,
        sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()),
    )
    cache.check(name, fields, files)
    record: cache.Stamp = {
        "content": cache.content_digest(files),
        "source": source,
        "archives": {archive.file: archive.sha256 for archive in used},
        "files": files,
    }
    (target / cache.STAMP).write_text(json.dumps(record, indent=1))


def _copy(folder: Path, fields: Entry, target: Path) -> None:
    """Copy the entry's files out of a folder; what else lies there is left."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    for file in sorted(folder.rglob("*")):
        relative = str(file.relative_to(folder))
        if file.is_file() and fields.wants(relative):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / relative)


def _package_folder(provider: Python) -> Path:
    spec = importlib.util.find_spec(provider.module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{provider.module} is not installed")
    return Path(spec.submodule_search_locations[0]) / provider.folder


def _folder_size(folder: Path) -> int:
    size = 0
    # clients rename and delete while this looks: os.walk minds neither
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(parent, file)).st_size
    return size


@contextlib.contextmanager
def _scratch(key: str) -> Iterator[Path]:
    """An empty folder, gone afterwards. The caller holds the lock of `key`, so what lies in its
    place is a killed process's.
    """
    place = cache_dir() / ".tmp" / key
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    try:
        # A fresh name, because a client whose parent was killed may still be writing.
        yield Path(tempfile.mkdtemp(dir=place))
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the system drops with the process however it ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _user_errors(name: str) -> Iterator[None]:
    """Say in one line what the operating system says in a traceback."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = entry(name).download_bytes
            need = f" ({name} downloads {size / 1e6:.0f} MB and unpacks to more)" if size else ""
            raise UserError(
                f"no space left in {cache_dir()}{need}: free some, or set REPRO_CACHE to a folder"
                " elsewhere"
            ) from error
        raise UserError(f"{name} could not be fetched into {cache_dir()}: {error}") from error


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Report]:
    """A progress line on a terminal: what is fetched, how much of it, how long."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=entry(name).download_bytes)
        yield lambda size: progress.update(task, completed=size)
