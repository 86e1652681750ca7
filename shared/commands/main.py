"""The `main` of every command: from the arguments to an exit status, and one line for whatever goes
wrong between.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.commands.signals import Stopped
from shared.errors import UserError
from shared.paths import ROOT

_LONGEST = 400  # letters of a library's error that are shown


def main(
    program: str,
    parser: Callable[[], argparse.ArgumentParser],
    arguments: Sequence[str] | None = None,
    *,
    agreed: bool = False,
) -> int:
    """Parse the arguments, do what they say, and return the exit status.

    Args:
        program: what every line on stderr begins with.
        parser: makes the parser (a `shared.commands.options.Parser`, which has `--debug`). Each of
            its commands has a default `function`: what to call with the parsed options, which
            returns an exit status, or its place as "package.module:function", which is imported
            only then, so that `--help` and a wrong option wait for nothing heavy.
        arguments: the command line; None takes the process's own.
        agreed: under torchrun, a UserError is one on all ranks, and only the first says it.

    Returns:
        What the function returned; 2 for a UserError and for every other error, in one line; 130
        for Ctrl-C; 128 + its number for a signal that ended a run in good order (`Stopped`); 0
        where the reader of a pipe has gone. With `--debug` the traceback comes before the line.
    """
    debug = False
    try:
        options = parser().parse_args(arguments)
        debug = getattr(options, "debug", False)
        status = int(_function(options.function)(options))
        sys.stdout.flush()  # here, where a broken pipe is quiet
        return status
    except KeyboardInterrupt:
        return _said(program, "stopped", 130)
    except Stopped as stopped:
        return _said(program, str(stopped), 128 + stopped.signal)
    except BrokenPipeError:  # `repro list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        if debug:
            traceback.print_exc()
        if agreed and os.environ.get("RANK", "0") != "0":
            return 2
        return _said(program, str(error), 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _said(program, _explained(error, debug), 2)


def _function(function: Callable[[argparse.Namespace], int] | str) -> Callable[..., int]:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    found: Callable[..., int] = getattr(importlib.import_module(module), name)
    return found


def _said(program: str, text: str, status: int) -> int:
    print(f"{program}: {' '.join(text.splitlines())}", file=sys.stderr)
    return status


def _explained(error: Exception, debug: bool) -> str:
    """An error that nobody expected, as a line: what, where, and how to see more."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        if error.filename is not None:  # says all: the user's file, and what is wrong with it
            return _short(f"{error.filename}: {error.strerror}")
        text = error.strerror
    text = _short(text) or "no more is said"
    what = f"{type(error).__name__}{_place(error)}: {text}"
    if isinstance(error, AssertionError):
        what = f"a bug of this program, not of yours: {what}; please report it"
    elif (
        isinstance(error, MemoryError)
        or "OutOfMemory" in type(error).__name__
        or "allocate memory" in text  # a RuntimeError of torch or safetensors
    ):
        what = f"not enough memory: {what}"
    return what if debug else f"{what} (--debug shows the traceback)"


def _short(text: str) -> str:
    """In one line, the end of which is kept: what is wrong stands there."""
    line = " ".join(text.split())
    return (
        line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    )


def _place(error: Exception) -> str:
    """The last line of ours that the error passed."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        ours = any(file.is_relative_to(ROOT / folder) for folder in ("shared", "projects"))
        if ours and file != Path(__file__):
            return f" in {file.relative_to(ROOT)}, line {frame.lineno}"
    return ""
