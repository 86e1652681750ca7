"""Which files of this repository a Python file imports, so that Snakemake reruns what a change
touches and nothing else.

Imports are read from the syntax tree: nothing is executed. Imports inside functions count; imports
by a computed name, or for type checkers alone, do not. A name of a lazy package counts as an import
of the module that its stub takes it from.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from shared import paths
from shared.errors import UserError

PACKAGES = ("shared", "projects")
_TYPES_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


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
            # a stub says where names come from; which of them are used, the importer says
            waiting += [] if current.suffix == ".pyi" else direct_imports(current, root)
    return sorted(found)


def files_read(modules: Iterable[Path]) -> list[Path]:
    """What modules read besides code: every file below a module's folder, other than Python, whose
    path stands in the module as a text (`Path(__file__).with_name("hardware.csv")`).
    """
    files: set[Path] = set()
    for module in modules:
        if module.suffix == ".py":
            files.update(_named_files(module))
    return sorted(files)


@cache
def _named_files(module: Path) -> tuple[Path, ...]:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    named = {
        module.parent / text
        for text in texts
        if isinstance(text, str) and re.fullmatch(r"[\w./-]+\.\w+", text) and ".." not in text
    }
    return tuple(file for file in named if file.suffix not in (".py", ".pyi") and file.is_file())


@cache
def direct_imports(file: Path, root: Path) -> tuple[Path, ...]:
    """Files under `root` that `file` imports directly, and the packages above it and them."""
    here = file.relative_to(root).with_suffix("").parts
    files: set[Path] = set()
    for module in (here, *imported_modules(file, root)):
        if module[:1] in {(package,) for package in PACKAGES}:
            for length in range(1, len(module) + 1):
                files.update(_file_of(root.joinpath(*module[:length])))
    return tuple(sorted(files))


def imported_modules(file: Path, root: Path) -> Iterator[tuple[str, ...]]:
    """The modules that a file imports, as tuples of names; an imported name may look like one."""
    here = file.relative_to(root).with_suffix("").parts
    for module, whole in _imported(ast.parse(file.read_text(encoding="utf-8")), here):
        yield module
        if whole:
            yield from _lazy(root.joinpath(*module), root).values()
        else:
            yield from _lazy(root.joinpath(*module[:-1]), root, module[-1]).values()


def _imported(tree: ast.Module, here: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """What a file imports, and whether as a whole: a package whose attributes may then be used."""
    skipped = {node for block in _for_types_only(tree) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split(".")), True
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, here)
            yield base, False
            for alias in node.names:  # an imported name may be a module, or what a stub names
                yield (*base, alias.name), False
                yield (*base, alias.name), True


def _base(node: ast.ImportFrom, here: tuple[str, ...]) -> tuple[str, ...]:
    """The module that `from ... import` takes its names from."""
    base: tuple[str, ...] = ()
    # one dot is the package the file lies in; `here` of a package ends with "__init__", which one
    # dot removes
    if node.level:
        base = here[: len(here) - node.level]
    return base + (tuple(node.module.split(".")) if node.module else ())


def _for_types_only(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements under `if TYPE_CHECKING:`, which never run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in _TYPES_ONLY:
            yield from node.body


@cache
def _lazy(package: Path, root: Path, name: str | None = None) -> dict[str, tuple[str, ...]]:
    """Names that a package loads at their first use, with their modules, read from its stub
    `__init__.pyi` (`lazy_loader.attach_stub`); all of them, or `name` alone. Empty without a stub.
    """
    stub = package / "__init__.pyi"
    if not stub.is_file():
        return {}
    here = (*package.relative_to(root).parts, "__init__")
    names = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names.update({alias.name: _base(node, here) for alias in node.names})
    return {key: module for key, module in names.items() if name in (None, key)}


def _file_of(stem: Path) -> Iterator[Path]:
    """The file of a module or package, if it is one."""
    for candidate in (
        stem.with_name(stem.name + ".py"),
        stem / "__init__.py",
        stem / "__init__.pyi",
    ):
        if candidate.is_file():
            yield candidate
