"""Runs an experiment: checks its configuration, calls its `run(config, run)`, writes its rows in
one step.

An experiment module `projects/<paper>/experiments/<name>.py` has a class
`Config(shared.experiment.Config)` and a function `run(config, run)` that measures and calls
`run.row(...)`. It knows nothing of tables, of the paper's numbers, or of files.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from types import ModuleType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from shared import manifest, paths, provenance, rows
from shared.errors import UserError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

T = TypeVar("T")
# Between progress lines where a bar would not do: no terminal, or several jobs on one (Snakemake
# sets REPRO_PLAIN_PROGRESS).
PLAIN_INTERVAL_SECONDS = 10.0


class Config(BaseModel):
    """Base of every experiment's configuration: unknown keys, wrong types and non-finite numbers
    are refused; `seed` is there.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # the text under a field is its description
    )

    seed: int = Field(default=0, ge=0)
    """from which all random numbers of the experiment are derived"""


class Run:
    """What an experiment may do besides computing: emit rows, arrays and tensors, take those of
    experiments that it uses, show progress, log.

    Attributes:
        seed: the configuration's seed.
        scale: the scale that is running, for messages; behaviour belongs in the configuration.
    """

    def __init__(
        self,
        seed: int = 0,
        scale: str = "smoke",
        label: str = "",
        quiet: bool = False,
        used: Mapping[str, Path] | None = None,
    ) -> None:
        """`used`: the rows files of the experiments that this one uses, by experiment."""
        self.seed = seed
        self.scale = scale
        self.rows: list[dict[str, rows.Scalar]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._used = dict(used or {})
        self._label = label
        self._quiet = quiet
        self._bars: Progress | None = None

    def row(self, **values: object) -> None:
        """Emit one row: text, numbers, true/false or None by column. A column of floats ends with a
        unit (`shared.rows.UNITS`).

        Raises:
            ValueError: at once, so that a wrong name shows at the first row and not at the end of
                the run.
        """
        self.rows.append(rows.check_row(values))

    def array(self, name: str, values: np.ndarray) -> None:
        """Save a numeric array beside the rows, under `name`; `shared.rows.read_array(frame, name)`
        reads it.
        """
        if not name.isidentifier():
            raise ValueError(f"array name '{name}' must be an identifier")
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise ValueError(
                f"array '{name}' has dtype {array.dtype}; booleans, integers and floats can be"
                " saved"
            )
        self.arrays[name] = array

    def save_tensors(self, name: str, tensors: "Mapping[str, torch.Tensor]") -> None:
        """Save tensors, as of a state dict, beside the rows under `name`, for experiments whose
        manifest entry `uses` this one (`used_tensors`).
        """
        if not name.isidentifier():
            raise ValueError(f"the tensors' name '{name}' must be an identifier")
        self.tensors[name] = dict(tensors)

    def used_tensors(self, experiment: str, name: str) -> "dict[str, torch.Tensor]":
        """The tensors that an experiment saved which this one `uses`.

        Raises:
            ValueError: the manifest does not say that it uses that experiment.
            UserError: its rows are missing or broken, or hold no such tensors.
        """
        return rows.read_tensors(self._path_of_used(experiment), name)

    def used_rows(self, experiment: str) -> list[dict[str, rows.Scalar]]:
        """The rows of an experiment that this one `uses`. Raises as `used_tensors` does."""
        return rows.read_rows(self._path_of_used(experiment)).rows

    def _path_of_used(self, experiment: str) -> Path:
        if experiment not in self._used:
            raise ValueError(f"the manifest does not say that this experiment uses '{experiment}'")
        return self._used[experiment]

    def progress(self, steps: Iterable[T] | int, description: str) -> Iterator[T]:
        """Iterate over `steps` (or `range(steps)`) while showing how far it is and how long it will
        take; may be nested.
        """
        iterable: Iterable[Any] = range(steps) if isinstance(steps, int) else steps
        total = len(iterable) if isinstance(iterable, Sized) else None
        if self._quiet:
            return iter(iterable)
        watched = sys.stderr.isatty() and "REPRO_PLAIN_PROGRESS" not in os.environ
        return (
            self._bar(iterable, total, description)
            if watched
            else self._lines(iterable, total, description)
        )

    def log(self, text: str) -> None:
        """Say something on stderr."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the progress display down."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _bar(self, iterable: Iterable[T], total: int | None, description: str) -> Iterator[T]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        if self._bars is None:  # one display for all bars, so that nested ones share it
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        bars = self._bars
        task = bars.add_task(description, total=total)
        try:
            for item in iterable:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)

    def _lines(self, iterable: Iterable[T], total: int | None, description: str) -> Iterator[T]:
        start = last = time.monotonic()
        for done, item in enumerate(iterable):
            now = time.monotonic()
            if done and now - last >= PLAIN_INTERVAL_SECONDS:
                last = now
                self.log(f"{self._label} {description} {_ruler(done, total, now - start)}".strip())
            yield item


def _ruler(done: int, total: int | None, seconds: float) -> str:
    """How far, as text: `━━━━━───── 12/24, 0:35 left`."""
    if not total:
        return f"{done} after {_clock(seconds)}"
    filled = round(20 * done / total)
    return (
        f"{'━' * filled}{'─' * (20 - filled)} {done}/{total},"
        f" {_clock(seconds / done * (total - done))} left"
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def load(
    paper: str, name: str, scale: str, overrides: Mapping[str, object] | None = None
) -> tuple[ModuleType, Config]:
    """Import an experiment and make its configuration: the entry of the scale with `overrides` on
    top.

    Raises:
        UserError: an unknown paper, experiment, scale or key, or a value that is not allowed; one
            line.
    """
    manifest.check_experiment(paper, name)
    entries = manifest.scale_config(paper, scale)
    if name not in entries:
        listed = ", ".join(entries) or "nothing"
        raise UserError(
            f"{paper}/{name} does not run at scale '{scale}'; projects/{paper}/scales/{scale}.yaml"
            f" lists: {listed}"
        )
    module = importlib.import_module(f"projects.{paper}.experiments.{name}")
    values = {**entries[name], **(overrides or {})}
    try:
        # As JSON, because strict validation of JSON takes a list for a tuple and text for an
        # enumeration, and nothing else.
        config = module.Config.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise UserError(
            manifest.explain(error, f"{paper}/{name} at scale {scale}", module.Config)
        ) from None
    return module, config


class Setting(NamedTuple):
    """A field of an experiment's configuration, in words.

    Attributes:
        type: with its bounds, "int > 0".
        values: by scale, of those at which the experiment runs.
    """

    name: str
    type: str
    description: str
    values: dict[str, str]


def settings(paper: str, name: str) -> list[Setting]:
    """What an experiment can be told, and is told at each scale. UserError as of `load`."""
    scales = [scale for scale in paths.SCALES if name in manifest.scale_config(paper, scale)]
    module = importlib.import_module(f"projects.{paper}.experiments.{name}")
    told = {scale: load(paper, name, scale)[1].model_dump(mode="json") for scale in scales}
    return [
        Setting(
            field,
            _type(info),
            info.description or "",
            {
                scale: json.dumps(values[field], ensure_ascii=False)
                for scale, values in told.items()
            },
        )
        for field, info in module.Config.model_fields.items()
    ]


_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of"}


def _type(info: FieldInfo) -> str:
    """The type of a field and its bounds: "list[int > 0]", "float >= 0"."""
    text = _type_text(info.annotation)
    bounds = [bound for part in info.metadata for bound in _bounds(part)]
    return " ".join([text, *bounds])


def _type_text(annotation: Any) -> str:
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        bounds = [bound for part in arguments[1:] for bound in _bounds(part)]
        return " ".join([_type_text(arguments[0]), *bounds])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_text, arguments))
    if origin is not None:
        inside = ", ".join("..." if part is ... else _type_text(part) for part in arguments)
        return f"{origin.__name__}[{inside}]"
    return "None" if annotation in (None, type(None)) else getattr(annotation, "__name__", "")


def _bounds(part: object) -> list[str]:
    return [
        f"{sign} {getattr(part, name)}"
        for name, sign in _BOUNDS.items()
        if getattr(part, name, None) is not None
    ]


def run_experiment(
    paper: str, name: str, scale: str, overrides: Mapping[str, object] | None, results_dir: Path
) -> Path:
    """Run one experiment and write `<results_dir>/<scale>/<paper>/rows/<name>.json`.

    Under torchrun every process runs the experiment, and the one of rank 0 writes what it emitted.

    Args:
        overrides: values that replace those of the scale's entry, by key.

    Returns:
        The path of the rows file.

    Raises:
        UserError: see `load`; or the disk is full.
    """
    module, config = load(paper, name, scale, overrides)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(manifest.needs(paper, name, scale).threads)
    path = rows.rows_path(results_dir, scale, paper, name)
    used = {
        other: rows.rows_path(results_dir, scale, paper, other)
        for other in manifest.needs(paper, name, scale).uses
    }
    digests = {other: rows.digest(file) for other, file in used.items()}
    writes = int(os.environ.get("RANK", "0")) == 0
    if writes:
        rows.clean_stale(path)
    started = provenance.collect(scale)
    run = Run(config.seed, scale, f"{paper}/{name}", quiet=not writes, used=used)
    try:
        module.run(config, run)
    finally:
        run.close()
    if not run.rows:
        raise UserError(f"{paper}/{name} emitted no rows; its run() must call run.row(...)")
    if writes:
        content = {
            "paper": paper,
            "experiment": name,
            "scale": scale,
            "config": json.loads(config.model_dump_json()),
            "seed": config.seed,
            "provenance": {
                **provenance.finish(started),
                "overridden": sorted(overrides or {}),
                "used": digests,
            },
            "rows": run.rows,
        }
        if overrides:  # not what the scale says, so the workflow must not take it for that
            path.with_name(f".{name}.current").unlink(missing_ok=True)
        rows.write_rows(path, content, run.arrays, run.tensors)
    return path
