"""The mutations of every paper, and of packages of shared/, still apply to its files.

`python tests/projects/<paper>/mutations.py` runs them, as does `python
tests/shared/<package>/mutations.py`.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import mutating
import pytest

FOLDERS = sorted(
    file.parent
    for where in ("projects", "shared")
    for file in (mutating.ROOT / "tests" / where).glob("*/mutations.py")
)


def _load(folder: Path) -> ModuleType:
    """The lists have one name, so each is loaded from its place."""
    specification = importlib.util.spec_from_file_location(
        f"mutations_of_{folder.name}", folder / "mutations.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


ALL = [(folder, m) for folder in FOLDERS for m in _load(folder).MUTATIONS]


@pytest.mark.parametrize(
    ("folder", "mutation"), ALL, ids=[f"{folder.name}: {m.why}" for folder, m in ALL]
)
def test_every_mutation_still_applies(folder, mutation):
    assert not mutating.broken(mutation)
    assert mutation.old != mutation.new
    assert all((folder / f"test_{name}.py").is_file() for name in mutation.tests)
