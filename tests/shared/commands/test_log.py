"""A log holds whole lines only, and continues to the byte where a crash cut it."""

import os
import signal
import subprocess
import sys
import tracemalloc

import pytest

from shared.commands.log import Log, read_lines
from shared.errors import UserError


def lines_of(path, strict=False):
    return [line for line, _ in read_lines(path, strict)]


WHOLE = b'{"step":1}\n{"step":2}\n'


def test_lines_are_read_back(tmp_path):
    path = tmp_path / "log.jsonl"
    assert lines_of(path) == []
    with Log(path) as log:
        log.write({"step": 1, "text": "ü", "loss": float("nan"), "more": [float("inf"), (1.5,)]})
        log.write({"step": 2}, sync=False)
        assert log.lines[1] == {"step": 2}
    wanted = {"step": 1, "text": "ü", "loss": None, "more": [None, [1.5]]}
    assert lines_of(path, strict=True) == [wanted, {"step": 2}]


@pytest.mark.parametrize("cut", [b'{"st', b'{"step":3}', b"\xff\xfe\n", b"[1]\n", b"nonsense\n"])
def test_what_a_crash_cut_is_left_out_and_the_rest_stays_to_the_byte(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + cut)
    assert lines_of(path, strict=True) == [{"step": 1}, {"step": 2}]
    with Log(path) as log:
        assert log.lines == [{"step": 1}, {"step": 2}]
        log.write({"step": 3})
    assert path.read_bytes() == WHOLE + b'{"step":3}\n'


def test_a_wrong_line_within_ends_the_log_or_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + b"\0\0\n" + WHOLE)
    assert len(lines_of(path)) == 2
    with pytest.raises(UserError, match=r"log\.jsonl, line 3: not a JSON object; the log is dam"):
        lines_of(path, strict=True)


def test_steps_after_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + b'{"step":3}\n')
    with Log(path, keep=lambda line: line["step"] <= 1) as log:
        assert log.lines == [{"step": 1}]
    assert path.read_bytes() == b'{"step":1}\n'


def test_a_log_that_its_caller_has_read_is_cut_where_it_says_and_held_by_nobody_else(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + b'{"st')
    ends = [end for _, end in read_lines(path, strict=True)]
    assert ends == [len(WHOLE) // 2, len(WHOLE)]
    with Log(path, end=ends[-1]) as log:
        log.write({"step": 3})
        assert log.lines == []
    assert path.read_bytes() == WHOLE + b'{"step":3}\n'


def test_reading_holds_one_line_at_a_time(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE * 50_000)
    tracemalloc.start()
    assert sum(1 for _ in read_lines(path, strict=True)) == 100_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4


def test_a_line_is_on_the_disk_when_the_call_returns(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    with Log(tmp_path / "log.jsonl") as log:
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
        log.write({"step": 1}, sync=False)
        assert synced == []
        log.write({"step": 2})
        assert len(synced) == 1


ENDLESS = """
import pathlib, sys
from shared.commands.log import Log
with Log(pathlib.Path(sys.argv[1])) as log:
    print("ready", flush=True)
    for step in range(len(log.lines), 10**9):
        log.write({"step": step, "text": "x" * 1000}, sync=False)
"""


def test_a_log_that_is_killed_again_and_again_misses_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    for _ in range(3):
        before = len(lines_of(path))
        with subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(path)], stdout=subprocess.PIPE
        ) as writer:
            writer.stdout.readline()
            while len(lines_of(path)) < before + 10:
                pass
            writer.send_signal(signal.SIGKILL)
    assert [line["step"] for line in lines_of(path)] == list(range(len(lines_of(path))))


def test_a_full_disk_cuts_a_line_that_nobody_reads(small_disk):
    path = small_disk / "log.jsonl"

    def fill() -> None:
        with Log(path) as log:
            while True:
                log.write({"text": "x" * 3000}, sync=False)

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert not path.read_bytes().endswith(b"\n")
    assert len(lines_of(path, strict=True)) > 50
