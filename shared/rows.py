"""The rows file: the only thing that passes from an experiment to tables, figures and claims.

`results/<scale>/<paper>/rows/<experiment>.json` holds scalars only, in columns whose names carry
their unit. It is written in one step: a kill at any moment leaves the old file or the new one.
Arrays lie beside it under names made of their content, so that a rows file never points at the
array of another run.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from shared.errors import UserError
from shared.files import atomic_write, sha256
from shared.manifest import explain, unknown

if TYPE_CHECKING:
    import pandas
    import torch

Scalar = str | bool | int | float | None

# A column that holds a float ends with one of these, so that its unit can be read off its name.
UNITS = {
    "bytes": "bytes",
    "seconds": "seconds",
    "tokens": "tokens",
    "flops": "floating-point operations",
    "tokens_per_second": "tokens per second",
    "samples_per_second": "samples per second",
    "steps_per_second": "steps per second",
    "flops_per_second": "floating-point operations per second",
    "gigabytes_per_second": "10^9 bytes per second",
    "bytes_per_step": "bytes per step",
    "count": "how many; a mean of counts may be fractional",
    "ratio": "one quantity divided by another of the same unit",
    "share": "part of a whole, 0 to 1",
    "percent": "part of a whole, 0 to 100",
    "probability": "0 to 1",
    "rate": "events per trial, 0 to 1",
    "accuracy": "share of right answers, 0 to 1",
    "precision": "0 to 1",
    "recall": "0 to 1",
    "f1": "harmonic mean of precision and recall, 0 to 1",
    "auc": "area under the ROC curve, 0 to 1",
    "score": "a benchmark's own score",
    "loss": "the objective, in the experiment's own unit",
    "nats": "nats",
    "bits": "bits",
    "perplexity": "exp of the mean negative log-likelihood",
    "error": "distance from the right value",
    "difference": "one value minus another",
    "correlation": "-1 to 1",
    "cosine": "cosine of an angle, -1 to 1",
    "norm": "length of a vector",
    "variance": "variance",
    "deviation": "standard deviation",
    "gradient": "derivative of the objective",
    "scale": "a multiplier",
    "epsilon": "privacy budget, or a probe's step",
    "delta": "privacy failure probability",
    "reward": "mean reward",
    "decibels": "decibels",
    "degrees": "degrees of angle",
    "metres": "metres",
    "pixels": "pixels",
}

_SNAKE_CASE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def has_unit(column: str) -> bool:
    """Whether a column's name ends with a registered unit."""
    return any(column == unit or column.endswith("_" + unit) for unit in UNITS)


def check_row(row: Mapping[str, object]) -> dict[str, Scalar]:
    """The row with numpy scalars made plain. ValueError when a name or a value may not stand in a
    rows file.
    """
    if not row:
        raise ValueError("an empty row")
    plain: dict[str, Scalar] = {}
    for column, value in row.items():
        if isinstance(value, np.generic):
            value = value.item()
        if not _SNAKE_CASE.fullmatch(column):
            raise ValueError(f"column '{column}' must be in snake case")
        if value is not None and not isinstance(value, str | bool | int | float):
            raise ValueError(
                f"column '{column}' holds a {type(value).__name__}; a row holds text, numbers,"
                " true/false or null"
            )
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(
                    f"column '{column}' holds {value}; write None where there is no finite number"
                )
            if not has_unit(column):
                raise ValueError(
                    f"column '{column}' holds a float, so its name must end with a unit, e.g."
                    f" '{column}_ratio' (see shared.rows.UNITS)"
                )
        plain[column] = value
    return plain


class FileEntry(BaseModel):
    """Where an array, or tensors, lie (a name in the folder of the rows file) and what the file
    must hash to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: str = Field(pattern=r"^[A-Za-z0-9_.]+\.(npy|safetensors)$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class RowsFile(BaseModel):
    """The content of a rows file, valid by construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    paper: str
    experiment: str
    scale: str
    config: dict[str, Any]
    seed: int
    provenance: dict[str, Any]
    arrays: dict[str, FileEntry]
    tensors: dict[str, FileEntry] = {}
    rows: list[Annotated[dict[str, Any], AfterValidator(check_row)]]

    def frame(self) -> "pandas.DataFrame":
        """One row per row. `frame.attrs` keeps paper, experiment, scale, config, seed and
        provenance.
        """
        import pandas

        frame = pandas.DataFrame(self.rows)
        frame.attrs.update(
            paper=self.paper,
            experiment=self.experiment,
            scale=self.scale,
            config=self.config,
            seed=self.seed,
            provenance=self.provenance,
        )
        return frame


def rows_path(results: Path, scale: str, paper: str, experiment: str) -> Path:
    """Where the rows of an experiment lie: `<results>/<scale>/<paper>/rows/<experiment>.json`."""
    return results / scale / paper / "rows" / f"{experiment}.json"


def read_rows(path: Path) -> RowsFile:
    """Read and validate a rows file.

    Raises:
        UserError: it is missing, cut, or holds the rows of another experiment than its path says;
            the message names the file and the command that makes it again.
    """
    scale, paper = path.parent.parent.parent.name, path.parent.parent.name
    again = f"make it again: repro run {paper}/{path.stem} --scale {scale}"
    try:
        content = RowsFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {again}") from None
    except ValidationError as error:
        raise UserError(f"{explain(error, str(path), RowsFile)}; {again}") from None
    if (content.paper, content.experiment, content.scale) != (paper, path.stem, scale):
        raise UserError(
            f"{path} holds the rows of {content.paper}/{content.experiment} at scale"
            f" {content.scale}; {again}"
        )
    return content


def digest(path: Path) -> str:
    """The sha256 of a rows file, and so of all that it names. Raises as `read_rows` does."""
    read_rows(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def are_whole(path: Path, tensors: bool = True) -> bool:
    """Whether `path` is a rows file that `read_rows` takes, with every file that it names whole;
    or, without `tensors`, every array (the reference keeps no tensors).
    """
    try:
        content = read_rows(path)
    except UserError:
        return False
    entries = [*content.arrays.values(), *(content.tensors.values() if tensors else ())]
    files = [(path.parent / entry.file, entry.sha256) for entry in entries]
    return all(file.is_file() and sha256(file) == expected for file, expected in files)


def read_frame(path: Path) -> "pandas.DataFrame":
    """The rows as a DataFrame, with the arrays' files in `frame.attrs["arrays"]` for
    `read_array`.
    """
    content = read_rows(path)
    frame = content.frame()
    frame.attrs["arrays"] = {
        name: (str(path.parent / entry.file), entry.sha256)
        for name, entry in content.arrays.items()
    }
    return frame


def read_array(frame: "pandas.DataFrame", name: str) -> np.ndarray:
    """An array that the experiment saved beside its rows, checked against its hash."""
    file, sha256 = frame.attrs["arrays"][name]
    origin = (frame.attrs[key] for key in ("paper", "experiment", "scale"))
    content = _checked(Path(file), sha256, *origin)
    return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))


def read_tensors(path: Path, name: str) -> "dict[str, torch.Tensor]":
    """Tensors that an experiment saved beside its rows at `path`, checked against their hash.

    Raises:
        UserError: the rows or the file are missing or broken, or there are no tensors of that name.
    """
    import safetensors.torch

    content = read_rows(path)
    if name not in content.tensors:
        raise UserError(
            unknown(f"tensors of {content.paper}/{content.experiment}", name, content.tensors)
        )
    entry = content.tensors[name]
    origin = (content.paper, content.experiment, content.scale)
    return safetensors.torch.load(_checked(path.parent / entry.file, entry.sha256, *origin))


def _checked(file: Path, sha256: str, paper: str, experiment: str, scale: str) -> bytes:
    """The content of a file that lies beside rows."""
    again = f"make it again: repro run {paper}/{experiment} --scale {scale}"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {again}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{file} is not the file that its rows file describes; {again}")
    return content


def write_rows(
    path: Path,
    content: dict[str, Any],
    arrays: Mapping[str, np.ndarray],
    tensors: "Mapping[str, Mapping[str, torch.Tensor]] | None" = None,
) -> None:
    """Write a rows file, its arrays and tensors so that a reader sees either the old ones or the
    new ones.

    Args:
        content: the fields of `RowsFile`, under their names in the file, without `arrays` and
            `tensors`.
        arrays: numeric arrays by name, each in a file of its own (.npy).
        tensors: by name, tensors by their own names, in a file each (.safetensors).

    Raises:
        UserError: the disk is full (nothing of the new file is left behind).
        ValueError: a row or a field that a rows file may not hold.
    """
    blobs = {(name, "npy"): _npy(array) for name, array in arrays.items()}
    blobs |= {(name, "safetensors"): _safetensors(given) for name, given in (tensors or {}).items()}
    entries: dict[str, dict[str, FileEntry]] = {"npy": {}, "safetensors": {}}
    for (name, suffix), blob in blobs.items():
        sha256 = hashlib.sha256(blob).hexdigest()
        file = f"{path.stem}.{name}.{sha256[:16]}.{suffix}"
        entries[suffix][name] = FileEntry(file=file, sha256=sha256)
    fields = {"arrays": entries["npy"], "tensors": entries["safetensors"]}
    content = RowsFile.model_validate({"schema": 1, **content, **fields}).model_dump(by_alias=True)
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with _locked(path.parent):
        try:
            for (name, suffix), blob in blobs.items():
                atomic_write(path.parent / entries[suffix][name].file, blob)
            atomic_write(path, text.encode())
        finally:  # on success the files of the last run go, on failure those of this one
            _clean(path)


def clean_stale(path: Path) -> None:
    """Remove what killed runs left beside `path`: temporary files, and arrays that no rows file
    names.
    """
    with _locked(path.parent):
        _clean(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder alone among writers of rows. The lock goes with its process, so a kill leaves
    nothing to clear.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _clean(path: Path) -> None:
    """As `clean_stale`, for who holds the lock: then no temporary file belongs to a running
    process.
    """
    try:
        content = read_rows(path)
        used = {entry.file for entry in (*content.arrays.values(), *content.tensors.values())}
    except UserError:
        used = set()
    patterns = (f".{path.stem}.*.part", f"{path.stem}.*.npy", f"{path.stem}.*.safetensors")
    leftovers = [file for pattern in patterns for file in path.parent.glob(pattern)]
    for file in leftovers:
        if file.name not in used:
            file.unlink(missing_ok=True)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _safetensors(tensors: "Mapping[str, torch.Tensor]") -> bytes:
    import safetensors.torch

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return bytes(safetensors.torch.save(whole))
