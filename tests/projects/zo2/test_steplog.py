"""The log of a run: what a crash may do to it, and what must be refused."""

import json
import math
import os
import tracemalloc
from pathlib import Path

import pytest

from projects.zo2 import Step
from projects.zo2.steplog import SCHEMA, StepLog, read_log
from shared.errors import UserError

ORDER = ["", "embedding", "blocks.0"]
STEPS = [
    Step(0, 2.5, -0.1, 1e-6, 7),
    Step(1, math.nan, math.nan, 1e-6, 8),
    Step(2, 2.4, 1 / 3, 5e-7, 2**63 - 1),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log with three steps, a flush and an evaluation: six lines."""
    with StepLog(tmp_path / "steps.jsonl", {"settings": {"lr": 1e-6}}) as log:
        log.step(STEPS[0], ORDER)
        log.step(STEPS[1], ORDER)
        log.flush()
        log.flush()
        log.evaluation(2.25)
        log.step(STEPS[2], ORDER)
        assert log.records.steps[::2] == STEPS[::2]
    return log.path


def test_what_was_written_is_read(path: Path) -> None:
    log = read_log(path)
    assert log is not None
    assert log.header == {"schema": SCHEMA, "settings": {"lr": 1e-6}}
    assert (log.order, log.flushes, log.evaluations) == (ORDER, {2}, {2: 2.25})
    # NaN is not equal to itself
    assert [repr(step) for step in log.steps] == [repr(step) for step in STEPS]
    assert [step.skipped for step in log.steps] == [False, True, False]
    lines = path.read_text().splitlines()
    assert len(lines) == 6
    assert json.loads(lines[2])["projected_gradient"] is None
    assert len(lines[-1]) < 150


def test_every_line_is_on_the_disk_before_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "steps.jsonl"
    fsync, durable = os.fsync, [0]

    def seen(handle: int) -> None:
        fsync(handle)
        if os.path.samestat(os.fstat(handle), path.stat()):
            durable[0] = path.stat().st_size

    monkeypatch.setattr(os, "fsync", seen)
    with StepLog(path, {}) as log:
        assert durable[0] == path.stat().st_size > 0
        for write in (
            lambda: log.step(STEPS[0], ORDER),
            log.flush,
            lambda: log.evaluation(2.0),
            lambda: log.step(STEPS[1], ORDER),
        ):
            before = durable[0]
            write()
            assert durable[0] == path.stat().st_size > before


def test_a_torn_last_line_is_left_out_wherever_it_tore(path: Path) -> None:
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        log = read_log(path)
        assert log is not None
        assert len(log.steps) == 2
    path.write_bytes(whole[:last] + b"\0\0\0\n")
    assert len(read_log(path).steps) == 2  # type: ignore[union-attr]


def test_the_next_append_cuts_the_torn_line_off(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with StepLog(path, {"ignored": True}) as log:
        assert len(log.records.steps) == 2
        log.step(STEPS[2], ORDER)
    assert path.read_bytes() == whole


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with StepLog(path, {}) as log:
        log.step(STEPS[0], ORDER)
        log.evaluation(math.inf)
    assert json.loads(path.read_text().splitlines()[-1])["loss"] is None
    assert math.isnan(read_log(path).evaluations[1])  # type: ignore[union-attr]


def test_a_log_without_a_step_begins_anew(path: Path) -> None:
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    for end in (0, 1, header - 1):
        path.write_bytes(whole[:end])
        assert read_log(path) is None
    flush = b'{"event":"flush","step":0}\n'
    for text in (whole[: header - 1], whole[:header], whole[:header] + flush):
        path.write_bytes(text)
        with StepLog(path, {"settings": {"lr": 2e-6}}) as log:
            assert log.records.flushes == set()
        assert path.read_bytes() == whole[:header].replace(b"1e-06", b"2e-06")


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        (1, '{"settings": {}}', "line 1: not the header of a step log; the log is damaged"),
        (1, '{"schema":1}', "steps.jsonl is of another version .*name another --out"),
        (1, '{"schema":9}', "schema 9; this version reads 3"),
        (1, "[]", "line 1: not a JSON object"),
        (2, "{", "line 2: not a JSON object"),
        (
            2,
            '{"event":"step","step":0,"seed":7,"projected_gradient":1,"lr":1,"loss":1}',
            "line 2: 'order' is missing",
        ),
        (
            3,
            '{"event":"step","step":2,"seed":7,"projected_gradient":1,"lr":1,"loss":1}',
            "line 3: step 2 where step 1 should be",
        ),
        (
            3,
            '{"event":"step","step":1,"projected_gradient":1,"lr":1,"loss":1}',
            "line 3: 'seed' is missing",
        ),
        (
            3,
            '{"event":"step","step":1,"seed":7,"projected_gradient":"x","lr":1,"loss":1}',
            "line 3: could not convert",
        ),
        (4, '{"event":"flush","step":1}', "line 4: flush after 1 steps where 2 were made"),
        (5, '{"event":"party","step":2}', "line 5: unknown event 'party'"),
        (
            6,
            '{"event":"step","step":9,"seed":7,"projected_gradient":1,"lr":1,"loss":1}',
            "line 6: step 9 where step 2",
        ),
    ],
)
def test_anything_else_is_refused_with_its_line(
    path: Path, line: int, replacement: str, message: str
) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = replacement
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        read_log(path)


def test_a_missing_log_is_none(tmp_path: Path) -> None:
    assert read_log(tmp_path / "steps.jsonl") is None


def test_a_log_of_another_version_without_a_step_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    flush = '{"event":"flush","step":0}\n'
    for rest in ("", flush, flush + '{"event":"evaluation","step":0,"loss":1}\n', '{"event":"st'):
        path.write_text('{"schema":1}\n' + rest)
        with StepLog(path, {}):
            pass
        assert path.read_text() == f'{{"schema":{SCHEMA}}}\n'


def test_a_resumed_log_needs_little_more_memory_than_its_steps(path: Path) -> None:
    """A user's --memory-budget holds while a long log is read: never all of its lines at once."""
    first = path.read_text().splitlines(keepends=True)[:2]
    path.write_text(
        "".join(first)
        + "".join(
            f'{{"event":"step","step":{n},"seed":{2**62 + n},"projected_gradient":{n / 7},'
            f'"lr":{1 / n},"loss":{n / 3}}}\n'
            for n in range(1, 5000)
        )
    )
    tracemalloc.start()
    with StepLog(path, {}) as log:
        assert len(log.records.steps) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * path.stat().st_size  # with all lines as dictionaries it is nine times
