"""What a command needs that works for hours in a folder of the user's: the folder to itself, an end
in good order, progress; and options that are refused in one line.
"""

import argparse
import errno
import fcntl
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from shared.errors import UserError

if TYPE_CHECKING:
    import torch

_QUIET_SECONDS = 10.0  # between lines of progress where there is no terminal
_LOSSES = 20  # so many of the last ones are averaged for display


# ---- options -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def number(
    kind: type[int] | type[float], least: float, above: bool = False
) -> Callable[[str], float]:
    """The `type` of an option that is a finite number of at least `least`, or `above` it."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if (
            value is None
            or not (value > least if above else value >= least)
            or value == float("inf")
        ):
            bound = f"above {least:g}" if above else f"of at least {least:g}"
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a{'n integer' if kind is int else ' number'} {bound}"
            )
        return value

    return convert


def device(name: str) -> "torch.device":
    """The device of an option: cpu, or a GPU with its number (torch sets budgets on nothing else).
    UserError for any other.
    """
    import torch

    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: use cpu or cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: use cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this torch sees no GPU")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


# ---- the folder ----------------------------------------------------------------------------------


@contextmanager
def locked(
    out: Path, log: str = "steps.jsonl", early: Collection[str] = ("data", "eval-data")
) -> Iterator[None]:
    """Inside, `out` exists and is this process's alone. What a crash left half-written is swept
    away; a folder that an error leaves without a run is removed again if it was made here.

    A folder with the file `log` holds a run. Without it nothing may lie there but the lock, `.part`
    files and what is named in `early`, which a run writes before its log: the rest would be the
    user's own.

    Raises UserError when it cannot be made, holds other things, or another process is working
    there.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    ours = {".lock", log, *early}
    if not (out / log).exists() and any(
        f.name not in ours and not f.name.endswith(".part") for f in out.iterdir()
    ):
        raise UserError(f"--out {out} is not empty and holds no run; name a new folder")
    try:
        with open(out / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                made = False
                raise UserError(f"another process is working in {out}") from None
            for leftover in (*out.glob(".*.part"), *out.glob("checkpoint/.*.part")):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield
    except BaseException:
        if made and not (out / log).exists():
            shutil.rmtree(out, ignore_errors=True)
        raise


@contextmanager
def plain_errors(out: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"no space left for {out}; the last checkpoint and the log are whole: make room and run"
            " the same command again"
        ) from None


# ---- while it runs -------------------------------------------------------------------------------


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, a first Ctrl-C or SIGTERM is put in the list, so that the step under way can end; a
    second one stops at once.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """A bar on a terminal; elsewhere a line now and then. Of `steps` steps `done` were made before;
    a context manager.
    """

    def __init__(self, console: Console, done: int, steps: int):
        self.console, self.steps = console, steps
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._tokens, self._first = 0, done
        self._began = self._spoke = time.perf_counter()
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task("", total=steps, completed=done, text="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(text, markup=False)

    def step(self, done: int, tokens: int, loss: float | None, extra: str = "") -> None:
        """Show that `done` steps have been made, the last on `tokens` tokens. `loss` None: it had
        none worth averaging; `extra` stands after the rest.
        """
        if loss is not None:
            self._losses.append(loss)
        self._tokens += tokens
        now = time.perf_counter()
        parts = [f"loss {sum(self._losses) / len(self._losses):.4f}"] if self._losses else [""]
        if self._tokens:
            parts.append(f"{self._tokens / (now - self._began):.0f} tokens/s")
        if extra:
            parts.append(extra)
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif now - self._spoke > _QUIET_SECONDS or done == self.steps:
            self._spoke = now
            left = (now - self._began) / (done - self._first) * (self.steps - done)
            self.line(f"step {done}/{self.steps}  {text}  {left:.0f} s left")
