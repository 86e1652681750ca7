"""A run in a folder: the folder to itself, the same run or none, a full disk in one line."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.commands.folder import locked, plain_errors
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
