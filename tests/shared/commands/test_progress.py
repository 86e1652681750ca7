"""What is shown of a run that goes on for hours."""

import io

import pytest
from rich.console import Console

from shared.commands import progress as module
from shared.commands.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only element."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def shown(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_without_a_terminal_a_line_is_shown_now_and_then_and_at_the_end(clock: list[float]) -> None:
    console = quiet()
    with Progress(console, 0, 100) as progress:
        for done in range(1, 101):
            clock[0] += 1
            progress.step(done, 50, float(done))
    lines = shown(console)
    assert lines[0] == "step 11/100  loss 6.0000  50 tokens/s  89 s left"
    assert [line.split()[1] for line in lines] == [
        f"{done}/100" for done in (11, 22, 33, 44, 55, 66, 77, 88, 99, 100)
    ]
    # the mean of the last 20
    assert lines[-1] == "step 100/100  loss 90.5000  50 tokens/s  0 s left"


def test_a_run_that_goes_on_is_judged_by_what_it_does_now(clock: list[float]) -> None:
    console = quiet()
    progress = Progress(console, 90, 100)
    clock[0] += 20
    progress.step(92, 100, 1.0)
    assert shown(console) == ["step 92/100  loss 1.0000  5 tokens/s  80 s left"]


def test_a_step_without_a_loss_leaves_the_mean_alone_and_more_may_be_said(
    clock: list[float],
) -> None:
    console = quiet()
    progress = Progress(console, 0, 4)
    for done, loss in ((1, 1.0), (2, None), (3, 3.0)):
        clock[0] += 11
        progress.step(done, 0, loss, "ε 0.5")
    assert [line.split("  ")[1:3] for line in shown(console)] == [
        ["loss 1.0000", "ε 0.5"],
        ["loss 1.0000", "ε 0.5"],
        ["loss 2.0000", "ε 0.5"],
    ]
    clock[0] += 1
    progress.step(4, 0, 0.0)  # a loss of 0 is one
    assert "loss 1.3333" in shown(console)[-1]
    only = quiet()
    Progress(only, 0, 1).step(1, 0, None)
    assert shown(only)[0].startswith("step 1/1 ")
    assert "loss" not in shown(only)[0]


def test_a_line_is_shown_as_it_is() -> None:
    console = quiet()
    Progress(console, 0, 1).line("out [red] and [/nothing]")
    assert shown(console) == ["out [red] and [/nothing]"]


def test_a_terminal_gets_a_bar(clock: list[float]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(console, 2, 5) as progress:
        clock[0] += 2
        progress.step(4, 10, 0.25, "ε 0.5")
        progress.line("a line above")
    text = "\n".join(shown(console))
    assert "4/5" in text
    assert "loss 0.2500  5 tokens/s  ε 0.5" in text
    assert "a line above" in text
    assert "s left" not in text
