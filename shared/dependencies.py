"""Which files of this repository a Python file imports, so that Snakemake reruns what a change
touches and nothing else.

Imports are read from the syntax tree: nothing is executed. Imports inside functions count; imports
by a computed name do not.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from shared import paths
from shared.errors import UserError

PACKAGES = ("shared", "projects")


def local_imports(file: Path, root: Path | None = None) -> list[Path]:
    """`file` itself and every file under `root` that it imports, directly or not, with the
    `__init__.py` of their packages.

    Args:
        file: a Python file under `root`.
        root: the repository root; by default `shared.paths.ROOT`.

    Raises:
        UserError: there is no such file.
    """
    root = root or paths.ROOT
    if not file.is_file():
        raise UserError(f"{file} is missing; write it, or take its name out of the manifest")
    found: set[Path] = set()
    waiting = [file.resolve()]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += _direct(current, root)
    return sorted(found)


@cache
def _direct(file: Path, root: Path) -> tuple[Path, ...]:
    """Files under `root` that `file` imports directly, and the packages above it and them."""
    here = file.relative_to(root).with_suffix("").parts
    modules = {
        here,
        *(
            target
            for target in _imported(
                ast.parse(file.read_text(encoding="utf-8")), here, file.name == "__init__.py"
            )
        ),
    }
    files: set[Path] = set()
    for module in modules:
        if module[:1] in {(package,) for package in PACKAGES}:
            for length in range(1, len(module) + 1):
                files.update(_file_of(root.joinpath(*module[:length])))
    return tuple(sorted(files))


def _imported(
    tree: ast.Module, here: tuple[str, ...], is_package: bool
) -> Iterator[tuple[str, ...]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base: tuple[str, ...] = ()
            # one dot is the package the file lies in; `here` of a package ends with "__init__",
            # which one dot removes
            if node.level:
                base = here[: len(here) - node.level]
            base += tuple(node.module.split(".")) if node.module else ()
            yield base
            for alias in node.names:  # an imported name may be a module
                yield (*base, alias.name)


def _file_of(stem: Path) -> Iterator[Path]:
    """The file of a module or package, if it is one."""
    for candidate in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
        if candidate.is_file():
            yield candidate
