"""Stretches in which weights change, and what an exception in their midst means.

Ctrl-C waits until such a stretch has ended. Any other exception inside leaves the weights between
two values: whoever owns them must not go on.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import UserError

UNUSABLE = (
    "the engine was interrupted while it changed weights, which are now of no use: load a"
    " checkpoint, or start again"
)


class Changes:
    """Whether weights are changing, and whether they can still be used.

    Attributes:
        under_way: inside a stretch, and for good after an exception in one.
        unusable: the owner has given the weights up.
    """

    def __init__(self) -> None:
        self.under_way = self.unusable = False

    def check(self) -> None:
        """Raises UserError where the weights cannot be used."""
        if self.unusable:
            raise UserError(UNUSABLE)

    def renewed(self) -> None:
        """The weights were replaced as a whole."""
        self.under_way = self.unusable = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """While weights change: Ctrl-C waits until the end, and any other exception is remembered
        as one in their midst.
        """
        interrupted: list[int] = []
        # Signals reach the main thread alone, and a handler of the user's own stays in force.
        defer = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if defer:
            signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
        self.under_way = True
        try:
            yield
            self.under_way = False
        finally:
            if defer:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupted:
            raise KeyboardInterrupt
