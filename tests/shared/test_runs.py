"""A run in a folder: the folder to itself, an end in good order, what is shown; options in one
line.
"""

import argparse
import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from shared import runs
from shared.errors import UserError
from shared.runs import Parser, Progress, locked, number, plain_errors, stop_signals

# ---- the folder ----------------------------------------------------------------------------------


class Crash(Exception):
    pass


def fail_in(out: Path, then: Callable[[], object] = lambda: None, **options: object) -> None:
    def work() -> None:
        with locked(out, **options):  # type: ignore[arg-type]
            then()
            raise Crash

    with pytest.raises(Crash):
        work()


def test_a_folder_is_made_and_stays(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with locked(out):
        (out / "weights").touch()
    assert (out / "weights").exists()


def test_a_folder_made_here_goes_with_an_error_unless_it_holds_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail_in(out, (out / "data").mkdir)
    assert not out.exists()
    fail_in(out, (out / "steps.jsonl").touch)
    assert (out / "steps.jsonl").exists()
    fail_in(out)  # the run of before
    assert (out / "steps.jsonl").exists()

    other = tmp_path / "other"
    fail_in(other, (other / "steps.jsonl").touch, log="ledger.jsonl")
    assert not other.exists()
    fail_in(other, (other / "ledger.jsonl").touch, log="ledger.jsonl")
    assert other.exists()

    found = tmp_path / "found"
    found.mkdir()
    fail_in(found)
    assert found.exists(), "it was there before"


def test_a_folder_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    (tmp_path / ".x.part").touch()
    with pytest.raises(UserError, match="is not empty and holds no run"), locked(tmp_path):
        pass
    assert {f.name for f in tmp_path.iterdir()} == {"thesis.tex", ".x.part"}
    (tmp_path / "steps.jsonl").touch()
    with locked(tmp_path):
        pass
    with pytest.raises(UserError, match="holds no run"), locked(tmp_path, log="ledger.jsonl"):
        pass


def test_what_a_run_writes_before_its_log_does_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokens.bin").touch()
    with locked(tmp_path):
        assert (tmp_path / "data" / "tokens.bin").exists()
    with pytest.raises(UserError, match="holds no run"), locked(tmp_path, early=()):
        pass


def test_what_a_crash_left_half_written_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "steps.jsonl").touch()
    half = [tmp_path / ".a.part", tmp_path / "checkpoint" / ".weights.safetensors.1.part"]
    whole = [
        tmp_path / "model.safetensors",
        tmp_path / "checkpoint" / "weights.safetensors",
        tmp_path / "shown.part",
    ]
    for file in (*half, *whole):
        file.touch()
    (tmp_path / ".data.part").mkdir()
    (tmp_path / ".data.part" / "tokens.bin").touch()
    with locked(tmp_path):
        assert [file for file in (*half, tmp_path / ".data.part") if file.exists()] == []
        assert all(file.exists() for file in whole)


HOLD = """
import sys, pathlib
from shared.runs import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_one_processs_until_it_ends(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        (out / ".weights.part").touch()  # the holder is writing it
        with pytest.raises(UserError, match="another process is working in"), locked(out):
            pass
        assert (out / ".weights.part").exists()
        holder.kill()
    with locked(out):
        assert not (out / ".weights.part").exists()


def test_a_folder_that_another_process_has_just_made_is_not_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process"), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"--out .*file/out: Not a directory"),
        locked(tmp_path / "file" / "out"),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_is_one_line(code: int) -> None:
    with (
        pytest.raises(
            UserError, match=r"no space left for out; .* run the same command again"
        ) as caught,
        plain_errors(Path("out")),
    ):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line(small_disk: Path) -> None:
    with pytest.raises(UserError, match="no space left"), plain_errors(small_disk):
        (small_disk / "large").write_bytes(bytes(1 << 20))


def test_other_errors_are_not_taken_for_a_full_disk() -> None:
    with pytest.raises(PermissionError), plain_errors(Path("out")):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(ValueError, match="other"), plain_errors(Path("out")):
        raise ValueError("other")


# ---- signals -------------------------------------------------------------------------------------


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


# ---- progress ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only element."""
    now = [100.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
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


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "least", "above", "text", "value"),
    [
        (int, 1, False, "1", 1),
        (int, 0, False, "0", 0),
        (float, 0, False, "0", 0.0),
        (float, 0, True, "1e-9", 1e-9),
        (float, -1, False, "-1", -1.0),
    ],
)
def test_a_number_in_bounds_is_taken(
    kind: type, least: float, above: bool, text: str, value: float
) -> None:
    found = number(kind, least, above)(text)
    assert found == value
    assert type(found) is kind


@pytest.mark.parametrize(
    ("kind", "least", "above", "text", "message"),
    [
        (int, 1, False, "0", "'0' is not an integer of at least 1"),
        (int, 1, False, "1.5", "'1.5' is not an integer of at least 1"),
        (float, 0, True, "0", "'0' is not a number above 0"),
        (float, 0.5, False, "0.4", "'0.4' is not a number of at least 0.5"),
        *(
            (float, 0, False, text, f"'{text}' is not a number of at least 0")
            for text in ("nan", "inf", "-inf", "-1", "many", "")
        ),
    ],
)
def test_a_number_out_of_bounds_is_refused(
    kind: type, least: float, above: bool, text: str, message: str
) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        number(kind, least, above)(text)
    assert str(caught.value) == message


def test_a_bad_option_is_one_line_that_names_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="tool")
    command = parser.add_subparsers(required=True, parser_class=Parser).add_parser("go")
    command.add_argument("--steps", type=number(int, 1))
    assert parser.parse_args(["go", "--steps", "3"]).steps == 3
    with pytest.raises(UserError) as caught:
        parser.parse_args(["go", "--steps", "0"])
    assert (
        str(caught.value)
        == "argument --steps: '0' is not an integer of at least 1 (see tool go --help)"
    )
    with pytest.raises(UserError, match=r"\(see tool --help\)$"):
        parser.parse_args(["stop"])
    assert capsys.readouterr() == ("", "")


def test_the_module_waits_for_nothing_heavy() -> None:
    """A command's `--help` imports it."""
    program = (
        "import sys, shared.runs; print([m for m in ('torch', 'transformers', 'pandas') if m in"
        " sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
