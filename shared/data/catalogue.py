"""The catalogue: what each dataset and model is, who provides it, and which bytes are the right
ones (`data/catalogue.yaml`).

It describes; it neither looks into the cache (`cache.py`) nor downloads anything (`fetching.py`).
"""

import difflib
import fnmatch
import functools
from pathlib import PurePosixPath
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared.errors import UserError
from shared.paths import ROOT

CATALOGUE = ROOT / "data" / "catalogue.yaml"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Archive(_Model):
    """One file of a registry: a wheel, an sdist, an npm tarball, a Debian package."""

    package: str
    version: str
    file: str = Field(description="the name under which the registry's own client saves it")
    sha256: Sha256
    size: int = Field(gt=0, description="bytes")
    inner: str | None = Field(
        default=None,
        description="a tar file inside the archive that holds the members; the rest is ignored",
    )
    strip: str = Field(
        default="", description="the folder inside the archive that becomes the entry's folder"
    )


class _Packages(_Model):
    archives: list[Archive] = Field(min_length=1)

    def __str__(self) -> str:
        names = [archive.package for archive in self.archives]
        return f"{self.type} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")  # type: ignore[attr-defined]


class PyPI(_Packages):
    type: Literal["pypi"]
    form: Literal["wheel", "sdist"] = "wheel"
    python_version: str | None = Field(
        default=None, description="of the wheel, where the package is particular about it"
    )
    platform: str | None = Field(
        default=None, description="of the wheel, where it holds compiled code"
    )


class Npm(_Packages):
    type: Literal["npm"]


class Debian(_Packages):
    type: Literal["debian"]


class DebianIndex(_Model):
    """The list of all packages with their descriptions. It changes with each point release, so its
    bytes cannot be pinned.
    """

    type: Literal["debian-index"]

    def __str__(self) -> str:
        return "debian's package index"


class Hub(_Model):
    type: Literal["hub"]
    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hub {self.repo}"


class Torchvision(_Model):
    type: Literal["torchvision"]
    dataset: str = Field(description="a class of torchvision.datasets")
    folder: str = Field(description="where that class puts the files, under its root")

    def __str__(self) -> str:
        return f"torchvision {self.dataset}"


class Python(_Model):
    """Files that an installed package brings along."""

    type: Literal["python"]
    module: str = Field(description="importable name of the package")
    folder: str = Field(description="where the files are, under the package's folder")

    def __str__(self) -> str:
        return f"python {self.module}"


Provider = Annotated[
    PyPI | Npm | Debian | DebianIndex | Hub | Torchvision | Python, Field(discriminator="type")
]


class Entry(_Model):
    """One dataset, model or tokenizer."""

    kind: Literal["dataset", "model", "tokenizer", "code"]
    title: str
    licence: str = Field(description="as the package states it")
    data_licence: str | None = Field(
        default=None, description="as the data's owner states it, where the owner is another"
    )
    holds: str = Field(description="what is inside, in one line")
    providers: list[Provider] = Field(
        min_length=1, description="tried in this order; all give the same bytes"
    )
    files: list[str] = Field(
        min_length=1, description="glob patterns (`*` also matches `/`) of the files wanted"
    )
    sha256: dict[str, Sha256] = Field(default={}, description="of the key files")
    content: Sha256 | None = Field(
        description="digest over all files (`cache.content_digest`); null: they cannot be pinned"
    )

    @field_validator("files")
    @classmethod
    def _inside(cls, files: list[str]) -> list[str]:
        for pattern in files:
            if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
                raise ValueError(f"{pattern} leads out of the entry's folder")
        return files

    def wants(self, path: str) -> bool:
        """Whether `path`, relative to the entry's folder, is one of the entry's files."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.files)

    @property
    def download_bytes(self) -> int | None:
        """What the first provider that has archives downloads; None where the size is not known
        beforehand.
        """
        for provider in self.providers:
            if isinstance(provider, _Packages):
                return sum(archive.size for archive in provider.archives)
        return None


@functools.cache
def catalogue() -> dict[str, Entry]:
    """All entries by name.

    Raises UserError where `data/catalogue.yaml` does not fit the schema.
    """
    try:
        raw = yaml.safe_load(CATALOGUE.read_text())
        return {name: Entry.model_validate(fields) for name, fields in raw.items()}
    except (OSError, yaml.YAMLError, ValidationError, AttributeError) as error:
        raise UserError(f"{CATALOGUE}: {' '.join(str(error).split())}") from error


def entry(name: str) -> Entry:
    """The entry of that name; UserError with the nearest names where there is none."""
    entries = catalogue()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "`repro data list` shows all names"
        raise UserError(f"no dataset or model is called {name!r}; {hint}")
    return entries[name]
