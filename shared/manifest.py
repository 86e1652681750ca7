"""What a paper consists of, read from `projects/<paper>/paper.yaml`, and what runs at a scale, from
`scales/<scale>.yaml`.

This module imports neither torch nor pandas, so that `repro --help` and a dry run of Snakemake are
instant.
"""

import difflib
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared import paths
from shared.errors import UserError


class Experiment(BaseModel):
    """One experiment: what it is called and what it needs of a machine. `needs` says what it needs
    at a scale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    title: str = Field(min_length=1)
    timed: bool = False  # measures time, so it runs alone, or at least
    beside: bool = False  # beside one-thread jobs that measure none: its ratios do not move by them
    gpu: bool = False  # needs a GPU
    data: list[str] = []  # names in data/catalogue.yaml
    uses: list[str] = []  # experiments of this paper whose rows and tensors it takes
    minutes: float = Field(gt=0)  # wall time, with room to spare
    memory_gb: float = Field(gt=0)
    threads: int = Field(default=1, ge=1)  # compute threads inside one process
    processes: int = Field(default=1, ge=1)  # more than one: started by torchrun
    # scale -> any of the above but the title, where that scale needs something else
    at: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _every_scale_is_right(self) -> "Experiment":
        for scale, changes in self.at.items():
            if scale not in paths.SCALES:
                raise ValueError(f"at: {unknown('scale', scale, paths.SCALES)}")
            for key in changes:
                if key not in _BY_SCALE:
                    raise ValueError(f"at {scale}: {unknown('key', key, _BY_SCALE)}")
            try:
                self.at_scale(scale)
            except ValidationError as error:
                raise ValueError(explain(error, f"at {scale}", Experiment)) from None
        return self

    def at_scale(self, scale: str) -> "Experiment":
        """This entry with the changes of one scale."""
        return Experiment.model_validate(
            {**self.model_dump(exclude={"at"}), **self.at.get(scale, {})}
        )


_BY_SCALE = [key for key in Experiment.model_fields if key not in ("title", "at")]


class Manifest(BaseModel):
    """One paper: its experiments, and which experiments each table and figure takes its
    rows from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    display: str
    title: str
    arxiv: str | None = None
    note: str = ""
    takes_longer: str = ""  # why scale cpu takes more than the core-minutes that a paper has
    experiments: dict[str, Experiment] = Field(min_length=1)
    tables: dict[str, list[str]] = {}
    figures: dict[str, list[str]] = {}

    @model_validator(mode="after")
    def _names_exist(self) -> "Manifest":
        for kind, wanted in (("table", self.tables), ("figure", self.figures)):
            for name, experiments in wanted.items():
                for experiment in experiments:
                    if experiment not in self.experiments:
                        raise ValueError(
                            f"{kind} '{name}' takes rows of '{experiment}', which is not an"
                            " experiment of this paper"
                        )
        for name in self.experiments:
            self._check_uses(name, ())
        for name in (*self.experiments, *self.tables, *self.figures):
            if not name.isidentifier():
                raise ValueError(
                    f"'{name}' must be a Python identifier: it names a module or a function"
                )
        return self

    def _check_uses(self, name: str, users: tuple[str, ...]) -> None:
        """ValueError where an experiment uses, directly or not, itself or an unknown one."""
        if name in users:
            raise ValueError(f"'{name}' uses itself by way of {', '.join(users)}")
        for other in self.experiments[name].uses:
            if other not in self.experiments:
                raise ValueError(
                    f"'{name}' uses '{other}', which is not an experiment of this paper"
                )
            self._check_uses(other, (*users, name))


def manifests() -> dict[str, Manifest]:
    """Every paper that has a `paper.yaml`, by folder name, sorted."""
    return {
        file.parent.name: manifest(file.parent.name)
        for file in sorted(paths.PROJECTS.glob("*/paper.yaml"))
    }


def manifest(paper: str) -> Manifest:
    """The manifest of one paper. UserError for an unknown paper or an invalid file."""
    file = paths.PROJECTS / paper / "paper.yaml"
    if not file.is_file():
        raise UserError(
            unknown(
                "paper", paper, (found.parent.name for found in paths.PROJECTS.glob("*/paper.yaml"))
            )
        )
    try:
        result = Manifest.model_validate(read_yaml(file))
    except ValidationError as error:
        raise UserError(explain(error, str(file), Manifest)) from None
    if result.name != paper:
        raise UserError(
            f"{file}: name is '{result.name}', but the folder is '{paper}'; make them equal"
        )
    return result


def scale_config(paper: str, scale: str) -> dict[str, dict[str, Any]]:
    """The configuration of every experiment that runs at `scale`. Empty when the paper has no file
    for that scale.

    What several scales share stands once in `scales/_base.yaml`: the entry of a scale is laid over
    the entry of the same experiment there, key by key. Which experiments run is the scale's to say.
    """
    known = manifest(paper)
    check_scale(scale)
    folder = paths.PROJECTS / paper / "scales"
    if not (folder / f"{scale}.yaml").is_file():
        return {}
    entries = _entries(known, folder / f"{scale}.yaml")
    base = _entries(known, folder / "_base.yaml") if (folder / "_base.yaml").is_file() else {}
    for name in entries:
        for other in known.experiments[name].at_scale(scale).uses:
            if other not in entries:
                raise UserError(
                    f"{folder / scale}.yaml lists {name}, which uses {other}: list that too"
                )
    return {name: {**base.get(name, {}), **entry} for name, entry in entries.items()}


def _entries(known: Manifest, file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a scale file by experiment, checked against the manifest."""
    entries = read_yaml(file)
    for name, entry in entries.items():
        if name not in known.experiments:
            raise UserError(f"{file}: " + unknown("experiment", str(name), known.experiments))
        if entry is not None and not isinstance(entry, dict):
            raise UserError(f"{file}: the entry of '{name}' must map keys to values, not {entry!r}")
    return {name: dict(entry or {}) for name, entry in entries.items()}


def data_needed(paper: str | None, scale: str) -> list[str]:
    """Names of the catalogue entries that `paper` (every paper when None) needs at `scale`, sorted,
    without repeats.
    """
    papers = [paper] if paper is not None else list(manifests())
    return sorted(
        {
            entry
            for name in papers
            for run in scale_config(name, scale)
            for entry in needs(name, run, scale).data
        }
    )


def data_users() -> dict[str, list[str]]:
    """The papers that need each catalogue entry, at whatever scale."""
    users: dict[str, list[str]] = {}
    for paper in manifests():
        for entry in sorted({name for scale in paths.SCALES for name in data_needed(paper, scale)}):
            users.setdefault(entry, []).append(paper)
    return users


def check_scale(scale: str) -> None:
    """UserError unless `scale` is one of `shared.paths.SCALES`."""
    if scale not in paths.SCALES:
        raise UserError(unknown("scale", scale, paths.SCALES))


def check_experiment(paper: str, experiment: str) -> Experiment:
    """The manifest's entry of an experiment. UserError with near names when there is none."""
    known = manifest(paper).experiments
    if experiment not in known:
        raise UserError(unknown(f"experiment of {paper}", experiment, known))
    return known[experiment]


def needs(paper: str, experiment: str, scale: str) -> Experiment:
    """What an experiment needs at `scale`: its entry with what `at` says of that scale. UserError
    for an unknown name.
    """
    known = check_experiment(paper, experiment)
    check_scale(scale)
    return known.at_scale(scale)


def ready(paper: str, scale: str, kind: str) -> dict[str, list[str]]:
    """The paper's tables or figures (`kind`) all of whose experiments run at `scale`, with those
    experiments.
    """
    listed = scale_config(paper, scale)
    declared: dict[str, list[str]] = getattr(manifest(paper), kind)
    return {
        name: experiments
        for name, experiments in declared.items()
        if all(experiment in listed for experiment in experiments)
    }


def bound_function(paper: str, kind: str, name: str) -> Callable[..., Any]:
    """`projects.<paper>.<kind>.<name>`, checked: its parameters must be the experiments that the
    manifest lists for it.

    Args:
        kind: "tables" or "figures": the section of the manifest and the module of the paper.
    """
    declared: dict[str, list[str]] = getattr(manifest(paper), kind)
    if name not in declared:
        raise UserError(unknown(f"{kind[:-1]} of {paper}", name, declared))
    function = getattr(importlib.import_module(f"projects.{paper}.{kind}"), name, None)
    if function is None:
        raise UserError(
            f"projects/{paper}/{kind}.py has no function '{name}', which paper.yaml lists under"
            f" {kind}"
        )
    parameters = list(inspect.signature(function).parameters)
    if set(parameters) != set(declared[name]):
        raise UserError(
            f"projects/{paper}/{kind}.py: {name}({', '.join(parameters)}) must take"
            f" {declared[name]}, as paper.yaml says"
        )
    return function


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; here it is a number, as everyone who writes it means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML safely (plain data only), with `1e-3` a number."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML mapping. UserError, in one line, when the file is not one; an empty file is an
    empty mapping.
    """
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: must map names to values")
    return content


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: near names first, else every known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names)
    if near:
        return f"unknown {what} '{name}'; did you mean {' or '.join(near)}?"
    return f"unknown {what} '{name}'; there are: {', '.join(names) or 'none'}"


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """A pydantic error as one line: where, which key, what is allowed."""
    sentences = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            names = model.model_fields if len(detail["loc"]) == 1 else ()
            sentences.append(unknown("key", key, names) if names else f"unknown key '{key}'")
        elif detail["type"] == "missing":
            sentences.append(f"'{key}' is missing")
        else:
            message = detail["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            given = textwrap.shorten(repr(detail["input"]), 60, placeholder=" ...")
            sentences.append(f"'{key}' = {given}: {message}" if key else message)
    return f"{where}: {'; '.join(' '.join(sentence.split()) for sentence in sentences)}"
