"""A sample of the damages of `tests/fuzz.py`, for every command; and what the fuzz would notice."""

import argparse
from pathlib import Path

import fuzz
import pytest
from damages import KINDS

from shared.commands.main import main as run_command
from shared.commands.options import Parser
from shared.errors import UserError

SAMPLE = 16  # inputs of each command

COMMANDS = fuzz.commands()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_damaged_input_is_a_line_or_harmless(command):
    outcomes = list(fuzz.outcomes_of(command, SAMPLE, seed=1))
    assert len(outcomes) > SAMPLE // 2
    assert not [str(outcome) for outcome in outcomes if outcome.problem]


def test_every_kind_of_input_is_damaged_somewhere():
    assert {kind for command in COMMANDS for kind in command.inputs.values()} <= set(KINDS)


# ---- the fuzz itself -----------------------------------------------------------------------------


def parser() -> Parser:
    made = Parser(prog="tool")
    made.add_argument("--data", required=True)
    made.add_argument("--out", required=True)
    made.add_argument("--size", type=int, default=1)
    made.set_defaults(function=lambda options: 0)
    return made


def tool(function):
    """A command whose work is `function`."""

    def built() -> Parser:
        made = parser()
        made.set_defaults(function=function)
        return made

    return fuzz.Command(
        "tool",
        lambda line: run_command("tool", built, line),
        parser,
        lambda folder: (folder / "data.jsonl").write_text('{"text": "a"}\n'),
        ("--data", "{}/data.jsonl"),
        "out",
        {"--data": "text"},
    )


def problems(function) -> set[str]:
    outcomes = fuzz.outcomes_of(tool(function), None, 0)
    return {outcome.problem.partition(":")[0] for outcome in outcomes}


def is_good(options: argparse.Namespace) -> bool:
    file = Path(options.data)
    return file.is_file() and file.read_bytes() == b'{"text": "a"}\n'


def careful(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if is_good(options) and len(out.name) < 200 and out.parent.is_dir() and not out.exists():
        return 0
    raise UserError(f"{options.data!r} is refused")


def test_a_command_that_refuses_what_it_must_in_one_line_has_no_problem():
    assert problems(careful) == {""}


def test_what_goes_wrong_is_noticed():
    def careless(options: argparse.Namespace) -> int:
        return 0

    def surprised(options: argparse.Namespace) -> int:
        raise KeyError("x")

    def other(options: argparse.Namespace) -> int:
        return 7

    def refusing(options: argparse.Namespace) -> int:
        raise UserError("whatever it is")

    def leaving(options: argparse.Namespace) -> int:
        Path(options.out).mkdir()  # where it is there, an error
        if is_good(options):
            return 0
        raise UserError("refused")

    class Escapes(BaseException):
        pass

    def escaping(options: argparse.Namespace) -> int:
        raise Escapes

    assert "silent success" in problems(careless)
    assert "unforeseen" in problems(surprised)
    assert "exit status 7" in problems(other)
    assert "blocked" in problems(leaving)
    assert "does not work" in problems(refusing)
    assert "traceback" in problems(escaping)
