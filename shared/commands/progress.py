"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import time
from collections import deque

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

_QUIET_SECONDS = 10.0  # between lines of progress where there is no terminal
_LOSSES = 20  # so many of the last ones are averaged for display


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
