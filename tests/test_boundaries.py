"""Who may import whom: each boundary keeps a part of the house usable, or quick, by itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

from shared import manifest, paths
from shared.dependencies import direct_imports, imported_modules

PAPERS = list(manifest.manifests())
BUILDS_ON = {"distzo2": {"zo2"}}  # the papers that build on one another
FILES = [file for top in ("shared", "projects") for file in (paths.ROOT / top).rglob("*.py")]


def inside(file: Path) -> tuple[str, ...]:
    return file.relative_to(paths.ROOT).with_suffix("").parts


def imports() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every import of a module of this repository: who, and what."""
    for file in FILES:
        for module in imported_modules(file, paths.ROOT):
            if module[:1] in (("shared",), ("projects",), ("tests",)):
                yield inside(file), module


def test_shared_imports_no_paper_and_nothing_imports_tests():
    assert [edge for edge in imports() if edge[0][0] == "shared" and edge[1][0] == "projects"] == []
    assert [edge for edge in imports() if edge[1][0] == "tests"] == []


def test_a_paper_imports_another_only_where_it_builds_on_it():
    for here, module in imports():
        if here[0] == "projects" and module[0] == "projects" and len(module) > 1:
            assert module[1] in {here[1], *BUILDS_ON.get(here[1], ())}, (here, module)


def test_only_experiments_import_experiments_and_those_of_their_own_paper():
    for here, module in imports():
        if module[0] == "projects" and "experiments" in module[1:]:
            assert here[:3] == ("projects", module[1], "experiments"), (here, module)


def test_no_module_imports_itself_by_way_of_others():
    graph = networkx.DiGraph(
        (inside(file), inside(imported))
        for file in FILES
        for imported in direct_imports(file, paths.ROOT)
        if file != imported and "__init__" not in (file.stem, imported.stem)
    )
    assert [sorted(circle) for circle in networkx.simple_cycles(graph)] == []


@pytest.mark.parametrize("paper", PAPERS)
def test_tables_figures_and_claims_load_neither_torch_nor_an_experiment(paper):
    code = f"""
import importlib, sys
for name in ("tables", "figures", "claims"):
    importlib.import_module("projects.{paper}." + name)
print(*(m for m in sys.modules if m == "torch" or m.startswith("projects.{paper}.experiments")))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


COMMANDS = [p for p in PAPERS if (paths.ROOT / "projects" / p / "command.py").is_file()]


@pytest.mark.parametrize("paper", COMMANDS)
def test_help_and_a_wrong_option_of_a_command_load_no_engine(paper):
    code = f"""
import argparse, sys
from projects.{paper}.command import main, parser
(commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
for name in commands.choices:
    assert main([name, "--nonsense"]) == 2
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert end.code == 0
print(*({{"torch", "transformers", "pandas"}} & set(sys.modules)), file=sys.stderr)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True)
    assert f"python -m projects.{paper}" in done.stdout
    assert done.stderr.splitlines()[-1] == ""


def test_heavy_packages_are_not_loaded_before_they_are_used():
    """`repro --help` and the Snakefile import these; the engines come later."""
    modules = "shared.cli, shared.manifest, shared.rows, shared.statistics"
    code = f"import sys, {modules}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pandas"} & set(done.stdout.split())


def test_a_lazy_package_imports_nothing_by_itself():
    for top in ("shared", "projects"):
        for stub in (paths.ROOT / top).rglob("__init__.pyi"):
            package = ast.parse(stub.with_suffix(".py").read_text(encoding="utf-8"))
            statements = [ast.unparse(node) for node in package.body]
            assert statements[1:] == [
                "import lazy_loader",
                "__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)",
            ], stub
