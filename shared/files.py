"""Files that appear with all their content or not at all, and what a file's content hashes to.

Everything is written under another name in the same folder (`.<name>.<process>.part`), brought to
the disk and renamed: a kill at any moment leaves the old file or the new one. What a kill leaves
half-written is swept away by whoever holds the folder (`shared.commands.folder.locked`).
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---- reading -------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal. Raises UserError when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is no file. Raises UserError when it is
    damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); name another --out") from None


# ---- writing -------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Inside, a temporary file to write to; after it, that file is `path`. An error inside leaves
    `path` as it was and nothing else behind.

    Args:
        path: its folder is made if it is not there.
        mode: permissions of the file, less what the process's umask takes away.

    Raises:
        UserError: no space is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)  # of a killed process with this number, with its permissions
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(
            f"no space left to write {path}; free some and run the same command again"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file in one step; see `replacing` for the arguments and the error."""
    with replacing(path, mode) as temporary:
        temporary.write_bytes(content)


def atomic_json(path: Path, value: object) -> None:
    """Write JSON in one step. Raises ValueError for NaN and infinite numbers, which JSON does not
    have; write None instead.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write(path, text.encode())


def atomic_save(
    tensors: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one step, readable for whom the umask allows.

    Args:
        tensors: by name; no two may share memory.
        metadata: text that is kept with them.

    Raises:
        UserError: one of them holds NaN or infinity, which is what training that has failed
            leaves; or no space is left. `path` is then as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from shared.finite import check_trained

    check_trained(tensors.items())
    with replacing(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                temporary,
                dict(metadata or {}),
            )
        except SafetensorError as error:  # the only trace of the disk's error is its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        temporary.chmod(mode)  # safetensors lets none but its maker read a file


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Inside, an empty temporary folder to fill; after it, that folder is `path`, in the place of
    what was there. An error inside leaves `path` as it was; a kill in the moment of the exchange
    leaves what was there in `.<name>.<process>.former`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    former = path.with_name(f".{path.name}.{os.getpid()}.former")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        if path.exists():  # a folder that holds something cannot be replaced in one step
            os.replace(path, former)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        if former.exists() and not path.exists():
            os.replace(former, path)
        shutil.rmtree(former, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_files(folder: Path, last: str | None = None) -> Iterator[Path]:
    """Inside, an empty temporary folder to fill; after it, each of its files, also in folders
    below, is in `folder`, which keeps what else it has. Files appear one by one, in the order of
    their names.

    Args:
        folder: exists.
        last: the name of the file that appears after all others, and so says that all are there.
    """
    temporary = folder / f".new.{os.getpid()}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = [file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()]
        files.sort(key=lambda file: (str(file) == last, file))
        for file in files:
            sync(temporary / file)
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True, parents=True)
            os.replace(temporary / file, folder / file)
        for changed in {(folder / file).parent for file in files}:
            sync(changed)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(*paths: Path) -> None:
    """Remove files and folders, whichever of them are there."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
