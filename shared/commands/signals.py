"""Ctrl-C and SIGTERM end a run in good order."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """A signal came, and what has been done is kept. `main` prints the text and exits with 128 +
    `signal`.

    Args:
        text: how far the work is, and that the same command goes on.
        signal: the number of the signal.
    """

    def __init__(self, text: str, signal: int):
        super().__init__(text)
        self.signal = signal


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
