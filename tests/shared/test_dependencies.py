"""Which files a module imports."""

import pytest

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


@pytest.fixture
def lazy_tree(tree):
    files = {
        "shared/lazy/__init__.py": "import lazy_loader",
        "shared/lazy/__init__.pyi": "from .engine import Engine\nfrom .tools import tool\n",
        "shared/lazy/engine.py": "",
        "shared/lazy/tools.py": "",
        "shared/takes_one.py": "from shared.lazy import Engine",
        "shared/takes_all.py": "from shared import lazy",
        "shared/takes_none.py": (
            "import typing\nif typing.TYPE_CHECKING:\n    from shared.lazy import Engine"
        ),
    }
    for path, text in files.items():
        (tree / path).parent.mkdir(exist_ok=True)
        (tree / path).write_text(text)
    return tree


@pytest.mark.parametrize(
    ("file", "modules"),
    [
        ("takes_one", {"engine.py"}),
        ("takes_all", {"engine.py", "tools.py"}),
        ("takes_none", set()),
    ],
)
def test_a_name_of_a_lazy_package_is_an_import_of_its_module(lazy_tree, file, modules):
    found = {one.name for one in local_imports(lazy_tree / f"shared/{file}.py", lazy_tree)}
    assert found & {"engine.py", "tools.py"} == modules
    assert ("__init__.pyi" in found) == bool(modules)
