"""The log of a run: one JSON object per line, a few dozen bytes per step, from which the trained
weights can be rebuilt.

The first line is a header (which model, which data, which settings). Then one line per step (seed,
projected gradient, learning rate, loss; the first step also names the order in which the units draw
their noise), one per flush (in low-bit storage an update that is applied early is rounded at
another place, so a replay must flush where the run did) and one per evaluation. Every line is on
the disk before the run goes on; a crash can tear only the last one.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.files import sync

if TYPE_CHECKING:
    from projects.zo2.engine import ZO2, Step

SCHEMA = 1


@dataclass
class Log:
    """What a log holds.

    `flushes` has the numbers of steps after which everything pending was applied, `evaluations` the
    held-out loss after a number of steps. `nbytes` is where the good lines end: after it there may
    be a torn one.
    """

    header: dict[str, Any]
    steps: "list[Step]" = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    flushes: set[int] = field(default_factory=set)
    evaluations: dict[int, float] = field(default_factory=dict)
    nbytes: int = 0


def read_log(path: Path) -> Log | None:
    """Read a log. None when it has no whole first line: the run died before it began.

    One torn last line is left out. Raises UserError when the file is missing, and with the number
    of the line when anything else is wrong.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    lines = data.splitlines(keepends=True)
    log: Log | None = None
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it has no end")
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is no JSON object")
        except ValueError:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: not a JSON object; the log is damaged"
            ) from None
        try:
            if log is None:
                log = Log(_header(record))
            else:
                _take(log, record)
        except (KeyError, TypeError, ValueError) as error:
            what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}, line {number}: {what}; the log is damaged") from None
        log.nbytes += len(line)
    return log


def _header(record: dict[str, Any]) -> dict[str, Any]:
    if record.get("schema") != SCHEMA:
        raise ValueError(f"not the header of a step log of schema {SCHEMA}")
    return record


def _take(log: Log, record: dict[str, Any]) -> None:
    from projects.zo2.engine import Step

    match record.get("event"):
        case "step":
            if record["step"] != len(log.steps):
                raise ValueError(f"step {record['step']} where step {len(log.steps)} should be")
            if not log.steps:
                log.order = [str(name) for name in record["order"]]
            values = {
                key: math.nan if record[key] is None else float(record[key])
                for key in ("loss", "projected_gradient")
            }
            log.steps.append(
                Step(record["step"], lr=float(record["lr"]), seed=int(record["seed"]), **values)
            )
        case "flush" | "evaluation" as event:
            if record["step"] != len(log.steps):
                raise ValueError(
                    f"{event} after {record['step']} steps where {len(log.steps)} were made"
                )
            if event == "flush":
                log.flushes.add(record["step"])
            else:
                log.evaluations[record["step"]] = float(record["loss"])
        case other:
            raise ValueError(f"unknown event {other!r}")


class StepLog:
    """Appends to a log. Each line is flushed to the disk before the call returns.

    Args:
        path: made with `header` when it does not exist or has no whole line; otherwise continued,
            without its torn last line.
        header: the settings of the run; `SCHEMA` is added.

    `log` holds what has been written so far.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path
        known = read_log(path) if path.exists() else None
        self.log = known or Log({"schema": SCHEMA, **header})
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._file.truncate(self.log.nbytes)
        if known is None:
            self._append(self.log.header)
            sync(path.parent)  # a new file's name survives a crash of the machine

    def step(self, step: "Step", order: Sequence[str]) -> None:
        """Log one step of an engine whose `order` is given."""
        record = {
            "event": "step",
            "step": step.number,
            "seed": step.seed,
            "projected_gradient": _number(step.projected_gradient),
        }
        record |= {"lr": step.lr, "loss": _number(step.loss)}
        if not self.log.steps:
            record["order"] = list(order)
        self._append(record)
        _take(self.log, record)

    def flush(self) -> None:
        """Log that everything pending is applied now. Called before it is done, so that a crash in
        between replays it.
        """
        if len(self.log.steps) not in self.log.flushes:
            record = {"event": "flush", "step": len(self.log.steps)}
            self._append(record)
            _take(self.log, record)

    def evaluation(self, loss: float) -> None:
        """Log the held-out loss at the current weights."""
        record = {"event": "evaluation", "step": len(self.log.steps), "loss": loss}
        self._append(record)
        _take(self.log, record)

    def close(self) -> None:
        self._file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):  # a full disk takes a part first and fails the next time
            self._file.write(line[written:])
        os.fsync(self._file.fileno())
        self.log.nbytes += len(line)


def replay(engine: "ZO2", log: Log, progress: Any = None) -> None:
    """Do to `engine`, which stands after `engine.steps` of the logged steps, what the log did from
    there on.

    Bit for bit, in every storage; without data or forwards. `progress(number of steps made)` is
    called after each.
    """
    if engine.steps in log.flushes:
        engine.flush()
    for step in log.steps[engine.steps :]:
        engine.replay([step], log.order)
        if engine.steps in log.flushes:
            engine.flush()
        if progress is not None:
            progress(engine.steps)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
