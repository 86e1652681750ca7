"""Whatever happens, a command ends with one line and the right status."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from shared.commands.main import main
from shared.commands.options import Parser
from shared.commands.signals import Stopped
from shared.errors import UserError


def run(work, *arguments, **options):
    """`main` with one command, `go`, that does `work`."""

    def parser():
        parser = Parser(prog="tool")
        go = parser.add_subparsers(required=True).add_parser("go")
        go.add_argument("--steps", type=int)
        go.set_defaults(function=work)
        return parser

    return main("tool", parser, arguments or ("go",), **options)


def raising(error):
    def work(options):
        raise error

    return work


def test_the_status_is_what_the_function_returns(capsys):
    seen = []
    assert run(lambda options: seen.append(options.steps) or 0, "go", "--steps", "3") == 0
    assert run(lambda options: 7) == 7
    assert seen == [3]
    assert capsys.readouterr() == ("", "")


def test_a_function_is_imported_when_it_is_called():
    program = (
        "import sys; from shared.commands.main import main; from shared.commands.options import"
        " Parser\ndef parser():\n    parser = Parser(prog='tool');"
        " parser.set_defaults(function='colorsys:rgb_to_yiq'); return parser\n"
        "status = main('tool', parser, ['--wrong']); print(status, 'colorsys' in sys.modules)\n"
        "main('tool', parser, []); print('colorsys' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 False\nTrue\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such file; name another"), 2, "tool: no such file; name another"),
        (UserError("no model 'a\nb'; name another"), 2, "tool: no model 'a b'; name another"),
        (KeyboardInterrupt(), 130, "tool: stopped"),
        (Stopped("stopped after step 3", signal.SIGTERM), 143, "tool: stopped after step 3"),
        (Stopped("stopped after step 3", signal.SIGINT), 130, "tool: stopped after step 3"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (OSError("odd"), 2, "OSError: odd (--debug shows the traceback)"),
        (MemoryError(), 2, "not enough memory: MemoryError"),
        (RuntimeError("a\nlong\nstory"), 2, "RuntimeError: a long story (--debug shows"),
        (RecursionError("too deep"), 2, "RecursionError: too deep"),
        (ValueError("bad"), 2, "ValueError: bad"),
        (KeyError("k"), 2, "KeyError: 'k'"),
        (AssertionError("broken"), 2, "a bug of this program, not of yours: AssertionError"),
    ],
)
def test_every_error_is_one_line_with_its_status(error, status, line, capsys):
    assert run(raising(error)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tool: ")
    assert line in err
    assert err.count("\n") == 1


def test_the_line_of_ours_where_a_library_failed_is_named(capsys):
    from shared import files

    assert run(lambda options: files.read_json(5)) == 2
    assert "AttributeError in shared/files.py, line " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("go", "--debug"), ("--debug", "go")])
@pytest.mark.parametrize("error", [ValueError("bad"), UserError("bad"), AssertionError("bad")])
def test_debug_shows_the_traceback_before_the_line(arguments, error, capsys):
    assert run(raising(error), *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert "bad" in err.splitlines()[-1]
    assert "--debug shows" not in err


def test_a_wrong_option_is_one_line(capsys):
    assert run(raising(RuntimeError()), "go", "--stepz", "3") == 2
    assert run(raising(RuntimeError()), "stop") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2
    assert "unrecognized arguments: --stepz 3 (see tool --help)" in err


def test_ranks_that_agree_say_it_once(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(raising(UserError("all of us")), agreed=True) == 2
    assert capsys.readouterr().err == ""
    assert run(raising(UserError("I alone"))) == 2
    assert run(raising(ValueError("I alone")), agreed=True) == 2  # nobody agreed on this one
    assert capsys.readouterr().err.count("I alone") == 2
    monkeypatch.setenv("RANK", "0")
    assert run(raising(UserError("all of us")), agreed=True) == 2
    assert "all of us" in capsys.readouterr().err


LOUD = """
import sys
from shared.commands.main import main
from shared.commands.options import Parser
def parser():
    parser = Parser()
    parser.set_defaults(function=lambda options: print("x" * 10) or 0)
    return parser
sys.exit(main("tool", parser, []))
"""


def test_a_reader_that_has_gone_is_no_error():
    read, write = os.pipe()
    os.close(read)
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", LOUD],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["main", "options", "recipe", "folder", "key", "inputs", "log"])
def test_the_modules_wait_for_nothing_heavy(module):
    """A command's `--help` imports them."""
    program = (
        f"import sys, shared.commands.{module}; print([m for m in ('torch', 'transformers',"
        " 'pandas', 'safetensors') if m in sys.modules])"
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == "[]\n"
    assert after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime < 1
