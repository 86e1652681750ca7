"""The finished pieces of a result, which outlive a kill."""

import io
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from glob import escape
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from shared.commands.folder import alone
from shared.commands.key import digest
from shared.errors import UserError
from shared.files import atomic_write, remove


class Pieces:
    """A folder beside the file `out`, named after it and the key of the inputs, in which the arrays
    lie that the file will be made of. A context manager: the folder is this process's alone, and
    goes when it is left with nothing in it.

        with Pieces(out, inputs) as pieces:
            s = pieces.array("solution", solve)
            scores = score_in_chunks(lambda rows: score(s, rows), n, chunk, pieces, console)
        write_scores(out, scores)      # and removes the pieces

    Args:
        out: the file that will be written.
        inputs: everything that the pieces depend on, for `shared.commands.key.digest`.

    Raises:
        UserError: another process is at work on the same, or the disk is full.
    """

    def __init__(self, out: Path, inputs: Mapping[str, Any]):
        self.out = out
        self.folder = out.with_name(f"{out.name}.{digest(inputs)[:16]}.chunks")
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(alone(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        if not any(self.folder.glob("*.npy")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def has(self, name: str) -> bool:
        """Whether the piece is there."""
        return self._file(name).exists()

    def array(self, name: str, make: Callable[[], ArrayLike]) -> np.ndarray:
        """The piece `name`: what a call before this one kept, or what `make` gives now.

        Args:
            name: a file's name without its ending.
            make: gives an array, or a tensor of any device.

        Raises:
            UserError: what is there is damaged, or the disk is full.
        """
        file = self._file(name)
        if not file.exists():
            made = make()
            values = np.asarray(made.detach().cpu() if hasattr(made, "detach") else made)
            buffer = io.BytesIO()
            np.save(buffer, values, allow_pickle=False)
            atomic_write(file, buffer.getvalue())
            return values
        return self.read(name)

    def read(self, name: str) -> np.ndarray:
        """The piece `name`, which is there. Raises UserError when it is damaged."""
        file = self._file(name)
        try:
            return np.asarray(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError):
            raise UserError(f"{file} is damaged; delete it and run again") from None

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def remove_pieces(out: Path) -> None:
    """Remove the pieces of `out`, of whatever inputs, once it has been written."""
    remove(*out.parent.glob(f"{escape(out.name)}.{'[0-9a-f]' * 16}.chunks"))
