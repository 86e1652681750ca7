"""The deliberate faults of every paper still apply to its files; `python tests/projects/<paper>/mutations.py` runs them."""

import importlib.util
from types import ModuleType

import mutating
import pytest

FOLDER = mutating.ROOT / "tests" / "projects"


def _load(paper: str) -> ModuleType:
    """Papers' lists have one name, so each is loaded from its place."""
    specification = importlib.util.spec_from_file_location(f"mutations_of_{paper}", FOLDER / paper / "mutations.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


ALL = [(paper, m) for paper in sorted(p.parent.name for p in FOLDER.glob("*/mutations.py")) for m in _load(paper).MUTATIONS]


@pytest.mark.parametrize(("paper", "mutation"), ALL, ids=[f"{paper}: {m.why}" for paper, m in ALL])
def test_every_deliberate_fault_still_applies(paper, mutation):
    assert not mutating.broken(mutation)
    assert mutation.old != mutation.new
    assert all((FOLDER / paper / f"test_{name}.py").is_file() for name in mutation.tests)
