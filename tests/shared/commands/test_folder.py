"""A run in a folder: the folder to itself, the same run or none, a full disk in one line."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.commands.folder import begin, begun, check_out, locked, plain_errors, same_run
from shared.errors import UserError


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


def line_in(file: Path, count: int = 1) -> Callable[[], object]:
    def write() -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}\n" * count + "{")

    return write


def test_a_folder_made_here_goes_with_an_error_unless_it_holds_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail_in(out, (out / "data").mkdir)
    assert not out.exists()
    fail_in(out, (out / "log.jsonl").touch)  # opened, and no step was made
    assert not out.exists()
    fail_in(out, lambda: (out / "log.jsonl").write_text("{"))
    assert not out.exists()
    fail_in(out, line_in(out / "log.jsonl"))
    assert (out / "log.jsonl").exists()
    fail_in(out)  # the run of before
    assert (out / "log.jsonl").exists()

    other = tmp_path / "other"
    fail_in(other, line_in(other / "log.jsonl"), log="ledger.jsonl")
    assert not other.exists()
    fail_in(other, line_in(other / "ledger.jsonl"), log="ledger.jsonl")
    assert other.exists()

    found = tmp_path / "found"
    found.mkdir()
    fail_in(found)
    assert found.exists(), "it was there before"


def test_with_a_header_a_run_begins_with_its_second_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    log = out / "log.jsonl"
    assert not begun(log)
    fail_in(out, line_in(log), lines=2)
    assert not out.exists()
    fail_in(out, line_in(log, 2), lines=2)
    assert begun(log, 2)
    assert not begun(log, 3)


def test_a_folder_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    (tmp_path / ".x.part").touch()
    with pytest.raises(UserError, match="is not empty and holds no run"), locked(tmp_path):
        pass
    assert {f.name for f in tmp_path.iterdir()} == {"thesis.tex", ".x.part"}
    line_in(tmp_path / "log.jsonl")()
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
    line_in(tmp_path / "log.jsonl")()
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
from shared.commands.folder import locked
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

    monkeypatch.setattr(fcntl, "flock", flock)
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


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    line_in(tmp_path / "log.jsonl")()
    (tmp_path / ".lock").mkdir()  # permissions do not stop a superuser
    with pytest.raises(UserError, match=r"--out .*: Is a directory"), locked(tmp_path):
        pass


# ---- a single file -------------------------------------------------------------------------------


def test_a_file_is_tried_before_hours_of_work(tmp_path: Path) -> None:
    check_out(tmp_path / "a.csv", ".csv", ".parquet")
    check_out(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.csv").write_text("old")
    check_out(tmp_path / "b.csv", ".csv")
    assert (tmp_path / "b.csv").read_text() == "old"
    (tmp_path / "folder.csv").mkdir()
    for out, message in (
        ("a.txt", r"scores are written as \.csv or \.parquet; name one so"),
        ("no/a.csv", "there is no folder"),
        ("folder.csv", "is a folder; name a file"),
        ("x" * 251 + ".csv", "File name too long"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            check_out(tmp_path / out, ".csv", ".parquet", what="scores")
        assert str(caught.value).startswith("--out ")


def test_a_full_disk_is_known_before_hours_of_work(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        (small_disk / "large").write_bytes(bytes(1 << 20))
    with pytest.raises(UserError, match=r"--out .*No space left"):
        check_out(small_disk / "a.csv")
    assert [file.name for file in small_disk.iterdir()] == ["large"]


# ---- the same run --------------------------------------------------------------------------------

ABOUT = {"data": "a" * 64, "batch_size": 4, "lr": 1e-3, "stop": ["x"], "dtype": "float32"}


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run.json"
    begin(run, ABOUT, begun=False)
    before = run.read_bytes()
    begin(run, {**ABOUT, "stop": ("x",)}, begun=True)  # JSON knows no tuples
    assert run.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "holds a run with --batch-size 4, not 8; name another --out"),
        ({"dtype": "float64"}, "holds a run with --dtype float32, not float64; name another"),
        ({"lr": None}, "holds a run with --lr 0.001, not null"),
        ({"data": "b" * 64}, "holds a run with another --data; name another --out"),
        ({"new": 1}, "holds a run with --new null, not 1"),
    ],
)
def test_another_run_is_refused_by_the_option_that_differs(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    begin(tmp_path / "run.json", ABOUT, begun=False)
    with pytest.raises(UserError, match=message) as caught:
        begin(tmp_path / "run.json", {**ABOUT, **change}, begun=True)
    assert str(caught.value).startswith(f"{tmp_path} ")
    with pytest.raises(UserError, match=message):
        same_run(ABOUT, {**ABOUT, **change}, tmp_path)


def test_a_run_without_a_step_binds_nobody(tmp_path: Path) -> None:
    """A command that was corrected works in the same folder."""
    run = tmp_path / "run.json"
    begin(run, ABOUT, begun=False)
    begin(run, {**ABOUT, "batch_size": 8}, begun=False)
    begin(run, {**ABOUT, "batch_size": 8}, begun=True)


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        begin(tmp_path / "run.json", ABOUT, begun=True)


# ---- a full disk ---------------------------------------------------------------------------------


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
    out = small_disk / "out"
    with pytest.raises(UserError, match="no space left"), locked(out):
        (out / "large").write_bytes(bytes(1 << 20))
    assert not out.exists()


def test_other_errors_are_not_taken_for_a_full_disk() -> None:
    with pytest.raises(PermissionError), plain_errors(Path("out")):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(ValueError, match="other"), plain_errors(Path("out")):
        raise ValueError("other")
