"""Which files a module imports; and who may import whom."""

import ast

import pytest

from shared import paths
from shared.dependencies import local_imports


@pytest.fixture
def tree(tmp_path):
    files = {
        "shared/__init__.py": "from shared import always",
        "shared/always.py": "",
        "shared/used.py": "import os, numpy\n",
        "shared/unused.py": "",
        "shared/package/__init__.py": "from .inner import name",
        "shared/package/inner.py": "from ..deep import thing",
        "shared/package/other.py": "",
        "shared/deep.py": "def f():\n    import shared.late",
        "shared/late.py": "",
        "projects/__init__.py": "",
        "projects/a/__init__.py": "",
        "projects/a/x.py": (
            "from shared import used\nfrom shared.package import name\nfrom . import y"
        ),
        "projects/a/y.py": "import projects.a.x",
        "projects/a/z.py": "",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_imports_are_followed_with_the_packages_above_them(tree):
    found = {str(file.relative_to(tree)) for file in local_imports(tree / "projects/a/x.py", tree)}
    assert found == {
        "projects/__init__.py",
        "projects/a/__init__.py",
        "projects/a/x.py",
        "projects/a/y.py",
        "shared/__init__.py",
        "shared/always.py",
        "shared/used.py",
        "shared/package/__init__.py",
        "shared/package/inner.py",
        "shared/deep.py",
        "shared/late.py",
    }


def test_a_package_file_resolves_its_own_relative_imports(tree):
    found = {file.name for file in local_imports(tree / "shared/package/__init__.py", tree)}
    assert {"inner.py", "deep.py"} <= found
    assert "other.py" not in found


ALLOWED = {"distzo2": {"zo2"}}  # papers that build on one another


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_shared_never_imports_projects():
    for file in (paths.ROOT / "shared").rglob("*.py"):
        assert not [name for name in imported_modules(file) if name.split(".")[0] == "projects"], (
            file
        )


def test_a_paper_imports_another_only_where_it_builds_on_it():
    for file in (paths.ROOT / "projects").rglob("*.py"):
        paper = file.relative_to(paths.ROOT / "projects").parts[0]
        others = {
            name.split(".")[1] for name in imported_modules(file) if name.startswith("projects.")
        } - {paper}
        assert others <= ALLOWED.get(paper, set()), f"{file} imports {others}"
