"""Mutations, each of which must turn the tests red: what
`tests/projects/<paper>/mutations.py` lists, and how they are run; likewise for a package of shared/
with a list in `tests/shared/<package>/mutations.py`.

Each mutation is put into a copy of the repository's files, where the tests named with it run until
the first one fails. Exit status 1 when one survives, is undecided, or when the text it replaces is
not there. Tests that do not end in time decide nothing: a hang may be the machine's.

    python tests/mutating.py                # every list
    python tests/mutating.py zo2 influence  # these lists
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 240
TIMEOUT = "timeout"  # what `run` returns then


@dataclass(frozen=True)
class Mutation:
    """In `file`, `old` (found exactly once) becomes `new`; the test files `tests` must notice."""

    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...] = ("oracles",)


def broken(mutation: Mutation, root: Path = ROOT) -> bool:
    """Whether the text to replace is not there exactly once."""
    return len(_places((root / mutation.file).read_text(), mutation.old)) != 1


def _places(text: str, old: str) -> list[tuple[int, int]]:
    """Where `old` stands in `text`, from its first to behind its last visible character. White
    space does not count, nor a comma before a closing bracket: the formatter may change them.
    """
    letters = [i for i, letter in enumerate(text) if not _passed_over(text, i, letter)]
    packed = "".join(text[i] for i in letters)
    wanted = "".join(c for i, c in enumerate(old) if not _passed_over(old, i, c))
    starts = [i for i in range(len(packed)) if packed.startswith(wanted, i)]
    return [(letters[i], letters[i + len(wanted) - 1] + 1) for i in starts]


def _passed_over(text: str, i: int, letter: str) -> bool:
    return letter.isspace() or (letter == "," and text[i + 1 :].lstrip()[:1] in (")", "]", "}"))


def mutated(text: str, old: str, new: str) -> str:
    """`text` with `old`, which stands there once, replaced by `new`."""
    ((start, end),) = _places(text, old)
    # The white space around `old` is left as it is in `text`, unless the fault changes it.
    if _margin(old) != _margin(new):
        start = text.rindex("\n", 0, start) + 1
        return text[:start] + new.rstrip() + text[end:]
    return text[:start] + new.strip() + text[end:]


def _margin(text: str) -> str:
    return text[: len(text) - len(text.lstrip())] if text.strip() else ""


def run(
    mutation: Mutation | None, tests: Sequence[str], paper: str, under: str = "projects"
) -> str:
    """Run the paper's tests on a copy with the mutation; returns the first failure, "" when they
    pass, or `TIMEOUT`.
    """
    folder = f"tests/{under}/{paper}"
    with tempfile.TemporaryDirectory(prefix="mutation-") as temporary:
        copy = Path(temporary)
        for one in ("projects", "shared", folder):
            shutil.copytree(ROOT / one, copy / one, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for shared in (
            "conftest.py",
            "fake_cuda.py",
            "language_inputs.py",
        ):  # what papers' tests share
            shutil.copy(ROOT / "tests" / shared, copy / "tests")
        if mutation is not None:
            target = copy / mutation.file
            target.write_text(mutated(target.read_text(), mutation.old, mutation.new))
        files = [f"{folder}/test_{name}.py" for name in tests]
        environment = {
            **os.environ,
            "PYTHONPATH": str(copy),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            *files,
        ]
        try:
            done = subprocess.run(
                command,
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return TIMEOUT
        if done.returncode == 0:
            return ""
        assert done.returncode == 1, (
            done.stdout + done.stderr
        )  # 1: a test failed; anything else: pytest itself did
        return next(
            (
                line.removeprefix("FAILED ")
                for line in done.stdout.splitlines()
                if line.startswith(("FAILED ", "ERROR "))
            ),
            "failed",
        )


def main(
    mutations: Sequence[Mutation], paper: str, words: Sequence[str], under: str = "projects"
) -> int:
    """Run the mutations whose reason contains the words, and say what became of each."""
    chosen = [m for m in mutations if all(word in m.why for word in words)]
    if not chosen:
        sys.stderr.write("no mutation's reason contains these words\n")
        return 2

    tests = sorted({test for mutation in chosen for test in mutation.tests})
    if failure := run(None, tests, paper, under):
        sys.stderr.write(f"red without any mutation: {failure}\n")
        return 2

    def judge(mutation: Mutation) -> str:
        if broken(mutation):
            return "TEXT NOT FOUND"
        failure = run(mutation, mutation.tests, paper, under)
        if failure == TIMEOUT:
            return f"UNDECIDED: no answer within {TIMEOUT_SECONDS} s"
        return f"killed by {failure.split(' - ')[0]}" if failure else "SURVIVED"

    killed = 0
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for number, (mutation, result) in enumerate(
            zip(chosen, workers.map(judge, chosen), strict=True), 1
        ):
            killed += result.startswith("killed")
            sys.stdout.write(f"{number:3}/{len(chosen)}  {mutation.why}: {result}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{killed} of {len(chosen)} mutations killed\n")
    return 0 if killed == len(chosen) else 1


def lists() -> list[Path]:
    """The folders that hold a `mutations.py`."""
    return sorted(
        file.parent
        for under in ("projects", "shared")
        for file in (ROOT / "tests" / under).glob("*/mutations.py")
    )


def load(folder: Path) -> list[Mutation]:
    """The mutations of one folder. All lists have the same file name, so each is loaded from its
    place.
    """
    specification = importlib.util.spec_from_file_location(
        f"mutations_of_{folder.name}", folder / "mutations.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return list(module.MUTATIONS)


def main_of_all(wanted: Sequence[str]) -> int:
    """Run the lists of these folders, or all; the worst exit status of them."""
    status = 0
    for folder in lists():
        if not wanted or folder.name in wanted:
            sys.stdout.write(f"{folder.name}\n")
            status = max(status, main(load(folder), folder.name, (), folder.parent.name))
    return status


if __name__ == "__main__":
    sys.modules["mutating"] = sys.modules["__main__"]  # the lists' own `Mutation` is this one
    sys.exit(main_of_all(sys.argv[1:]))
