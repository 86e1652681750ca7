"""Damaged input for every command: no traceback, no success on what is damaged, no folder that
blocks the corrected command.

A command that works (`tests/projects/<paper>/fuzzed.py` says which) is given one damage at a time:
to a file, to a folder, or to an option. Damages are systematic by kind of input; where they need
positions or values these come from the seed. What is checked:

- the command returns an exit status, in time, and says on stderr why not 0: one line, of a kind
  that somebody foresaw (a line that ends with "--debug shows the traceback" was not);
- a damage that no result can survive (weights with NaN, a file that is cut) is not a success;
- where it left something at `--out`, the command without the damage works there.

    python tests/fuzz.py                        # every command, every damage once
    python tests/fuzz.py --inputs 2000 zo2      # so many in all, of these papers
"""

import argparse
import contextlib
import importlib.util
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from damages import KINDS, Inapplicable

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # a command may take with a damage; one that goes on working is stopped there


@dataclass(frozen=True)
class Command:
    """A command that works.

    Args:
        name: of the paper and the command, "zo2 finetune".
        main: the paper's `main`.
        parser: the paper's parser, in whose options numbers and choices are found.
        prepare: fills a folder with input; called once, the folder is copied for every damage.
        arguments: of the command, without `--out`; "{}" stands for the folder.
        out: what `--out` is called, relative to the folder; a suffix makes it a file. "" where
            there is none.
        inputs: the kind of what an option names: "text", "model", "arrays", "weights", "table",
            "images", "module".
    """

    name: str
    main: Callable[[Sequence[str]], int]
    parser: Callable[[], argparse.ArgumentParser]
    prepare: Callable[[Path], None]
    arguments: tuple[str, ...]
    out: str
    inputs: dict[str, str] = field(default_factory=dict)

    def line(self, folder: Path, **changed: str) -> list[str]:
        """The arguments in `folder`, with other values of some options."""
        given = [word.replace("{}", str(folder)) for word in self.arguments]
        for option, value in changed.items():
            if option in given:
                given[given.index(option) + 1] = value
            else:
                given += [option, value]
        return [*given, "--out", str(folder / self.out)] if self.out else given

    def named(self, option: str, folder: Path) -> Path:
        """What an option names."""
        return Path(self.line(folder)[self.arguments.index(option) + 1].partition(":")[0])


@dataclass(frozen=True)
class Damage:
    """What is done to `what` (an option, or "--out"); `to` changes the input in place, or returns
    another value of the option. `fatal`: no result can survive it.
    """

    what: str
    how: str
    to: Callable[[Path], Any]
    fatal: bool = False


# ---- options and places --------------------------------------------------------------------------

NUMBERS = (
    "-1",
    "0",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e300",
    "99999999999999999999",
    "abc",
    "",
    "0x10",
)
WORDS = ("nonesuch", "", "../..", "a\nb", "é", "a" * 5000)


def of_options(command: Command) -> Iterator[tuple[str, str, str]]:
    """(option, how, value) for every option that takes a number or a word."""
    for action in _actions(command):
        option = next((o for o in action.option_strings if o.startswith("--")), None)
        if option in (None, "--out", "--help", "--debug") or action.nargs == 0:
            continue
        if option in command.inputs:
            continue
        kinds = NUMBERS if action.type not in (None, str, Path) else WORDS
        for value in kinds:
            yield option, f"{value[:24]!r}", value


def _actions(command: Command) -> list[argparse.Action]:
    parser = command.parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[command.arguments[0]]._actions
    return parser._actions


def of_out(command: Command) -> Iterator[tuple[str, Callable[[Path], Any], bool]]:
    """Of the place for the result."""

    def foreign(path: Path) -> None:
        path.mkdir()
        (path / "thesis.tex").write_text("all I have")

    def below_a_file(path: Path) -> str:
        (path.parent / "file").write_text("x")
        return str(path.parent / "file" / path.name)

    def broken(name: str, content: str) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            path.mkdir(exist_ok=True)
            (path / name).write_text(content)

        return apply

    yield "below a file", below_a_file, True
    yield "a name too long", lambda path: str(path.parent / ("x" * 300 + path.suffix)), True
    if Path(command.out).suffix:
        yield "a folder", lambda path: path.mkdir(), True
        yield "another suffix", lambda path: str(path.with_suffix(".xyz")), True
        yield "no suffix", lambda path: str(path.with_suffix("")), True
    else:
        yield "a file", lambda path: path.write_text("x"), True
        yield "a folder with a thesis", foreign, False
        for name in ("run.json", "steps.jsonl", "log.jsonl", "checkpoint.safetensors"):
            yield f"{name} of no sense", broken(name, "}{"), False
            yield f"{name} of another run", broken(name, '{"a": 1}\n'), False


def damages(command: Command, seed: int) -> list[Damage]:
    """Every damage of a command once; another seed puts them elsewhere."""
    draw = random.Random(f"{seed} {command.name}")
    found = []
    for option, kind in command.inputs.items():
        for how, to, fatal in KINDS[kind](draw):
            found.append(Damage(option, how, to, fatal))
    for how, to, fatal in of_out(command) if command.out else ():
        found.append(Damage("--out", how, to, fatal))
    for option, how, value in of_options(command):
        found.append(Damage(option, how, lambda path, value=value: value))
    return found


# ---- running -------------------------------------------------------------------------------------


class _Late(BaseException):
    """Not an Exception, which a command would turn into a line."""


@dataclass(frozen=True)
class Outcome:
    command: str
    damage: Damage
    status: int | str  # the exit status, "late", or the traceback
    said: str
    problem: str  # "" where all is well

    def __str__(self) -> str:
        words = (self.command, self.damage.what, self.damage.how, self.status, self.said[:200])
        return " | ".join(map(str, words))


UNFORESEEN = ("--debug shows the traceback", "a bug of this program")


def call(command: Command, line: list[str]) -> tuple[int | str, str]:
    """The exit status and what was said on stderr."""

    def late(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status: int | str = command.main(line)
    except _Late:
        status = "late"
    except SystemExit as error:  # --help and the like
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        status = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status, said.getvalue()


def judge(command: Command, damage: Damage, good: Path) -> Outcome:
    """Run a command with a damage in a copy of `good`."""
    import torch

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = Path(temporary) / "case"
        shutil.copytree(good, folder)
        out = folder / command.out
        at = out if damage.what == "--out" else (
            command.named(damage.what, folder) if damage.what in command.inputs else folder
        )  # fmt: skip
        value = damage.to(at)
        line = command.line(folder)
        if isinstance(value, str):
            line = command.line(folder, **{damage.what: value})
            if damage.what == "--out":
                line = [*line[: line.index("--out")], "--out", value]
        here = os.getcwd()
        os.chdir(folder)
        try:
            status, said = call(command, line)
            problem = _problem(command, damage, status, said)
            left = command.out and out.exists() and damage.what != "--out"
            if not problem and status == 2 and left and "another --out" not in said:
                problem = _blocked(command, good, folder)
        finally:
            os.chdir(here)
            torch.set_num_threads(threads)
    last = said.strip().splitlines()[-1] if said.strip() else ""
    return Outcome(command.name, damage, status, last, problem)


def _problem(command: Command, damage: Damage, status: int | str, said: str) -> str:
    if (isinstance(status, str) and status != "late") or "Traceback" in said:
        return "traceback"
    if status == "late":
        return "late" if damage.what in command.inputs else ""  # a large number may take long
    last = said.strip().splitlines()[-1] if said.strip() else ""
    if any(words in last for words in UNFORESEEN):
        return "unforeseen"
    if status == 0:
        return "silent success" if damage.fatal else ""
    if damage.how == "none":
        return f"does not work: {said.strip()[-200:]}"
    if status != 2:
        return f"exit status {status}"
    return "" if re.match(r"\w+: \S", last) else "nothing said"


def _blocked(command: Command, good: Path, folder: Path) -> str:
    """Whether the command without the damage works where the damaged one left something."""
    for item in good.iterdir():
        there = folder / item.name
        shutil.rmtree(there, ignore_errors=True)
        there.unlink(missing_ok=True) if not there.is_dir() else None
        (shutil.copytree if item.is_dir() else shutil.copy)(item, there)
    status, said = call(command, command.line(folder))
    return "" if status == 0 else f"blocked: {said.strip()[-200:]}"


def commands(papers: Sequence[str] = ()) -> list[Command]:
    """Of these papers, or of all."""
    found: list[Command] = []
    for file in sorted((ROOT / "tests").glob("*/*/fuzzed.py")):
        if papers and file.parent.name not in papers:
            continue
        specification = importlib.util.spec_from_file_location(f"fuzzed_{file.parent.name}", file)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        found += module.COMMANDS
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("papers", nargs="*", help="all, where none is named")
    parser.add_argument("--inputs", type=int, help="how many in all (each damage once)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = total = 0
    chosen = commands(options.papers)
    share = options.inputs and -(-options.inputs // len(chosen))
    for command in chosen:
        began, bad, tried = time.monotonic(), 0, 0
        for outcome in outcomes_of(command, share, options.seed):
            tried += 1
            if outcome.problem:
                bad += 1
                print(f"{outcome.problem.upper()}: {outcome}", flush=True)
        took = time.monotonic() - began
        print(f"{command.name}: {tried} inputs, {bad} wrong, {took:.0f} s", flush=True)
        wrong, total = wrong + bad, total + tried
    print(f"{total} inputs, {wrong} wrong")
    return min(wrong, 1)


def outcomes_of(command: Command, wanted: int | None, seed: int) -> Iterator[Outcome]:
    """Of a command's damages, each once, or `wanted` of them drawn by the seed; more of them than
    there are come again at other places.
    """
    chosen = damages(command, seed)
    if wanted is not None:
        random.Random(seed).shuffle(chosen)
        more = 1
        while len(chosen) < wanted:
            chosen += [d for d in damages(command, seed + more) if d.what in command.inputs]
            more += 1
        chosen = chosen[:wanted]
    with tempfile.TemporaryDirectory(prefix="fuzzed-") as temporary:
        good = Path(temporary) / "good"
        good.mkdir()
        command.prepare(good)
        yield judge(command, Damage("--out", "none", lambda path: None), good)
        for damage in chosen:
            with contextlib.suppress(Inapplicable):
                yield judge(command, damage, good)


if __name__ == "__main__":
    sys.modules["fuzz"] = sys.modules["__main__"]  # the papers' own `Command` is this one
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # tests/projects is not the package
    sys.exit(main())
