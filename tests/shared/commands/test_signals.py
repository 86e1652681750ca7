"""The first signal is noted, the second stops."""

import os
import signal

import pytest

from shared.commands.signals import stop_signals


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_stops(number: signal.Signals) -> None:
    before, reached = handlers(), []

    def work() -> None:
        with stop_signals() as stop:
            assert stop == []
            os.kill(os.getpid(), number)
            assert stop == [number]
            reached.append("the end of the step")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("too far")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["the end of the step"]
    assert handlers() == before
