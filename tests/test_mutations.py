"""The mutations of every paper, and of packages of shared/, still apply to its files.

`python tests/mutating.py` runs them all.
"""

import mutating
import pytest

ALL = [(folder, m) for folder in mutating.lists() for m in mutating.load(folder)]


@pytest.mark.parametrize(
    ("folder", "mutation"), ALL, ids=[f"{folder.name}: {m.why}" for folder, m in ALL]
)
def test_every_mutation_still_applies(folder, mutation):
    assert not mutating.broken(mutation)
    assert mutation.old != mutation.new
    assert all((folder / f"test_{name}.py").is_file() for name in mutation.tests)


def test_tests_that_do_not_end_decide_nothing(monkeypatch, capsys):
    """Neither killed nor survived, and the list is not all right."""
    folder, mutation = ALL[0]

    def hangs(mutation, *arguments):
        return mutating.TIMEOUT if mutation else ""

    monkeypatch.setattr(mutating, "run", hangs)
    assert mutating.main([mutation], folder.name, (), folder.parent.name) == 1
    told = capsys.readouterr().out
    assert "UNDECIDED" in told
    assert told.endswith("0 of 1 mutations killed\n")


def test_a_run_that_takes_too_long_is_a_timeout(monkeypatch):
    monkeypatch.setattr(mutating, "TIMEOUT_SECONDS", 0.01)
    folder, mutation = ALL[0]
    assert mutating.run(None, mutation.tests, folder.name, folder.parent.name) == mutating.TIMEOUT
