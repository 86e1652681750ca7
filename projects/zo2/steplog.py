"""The log of a run: one JSON object per line, a few dozen bytes per step, from which the trained
weights can be rebuilt.

The first line is a header (which model, which data, which settings). Then one line per step (seed,
projected gradient, learning rate, loss; the first step also names the order in which the units draw
their noise), one per flush (in low-bit storage an update that is applied early is rounded at
another place, so a replay must flush where the run did) and one per evaluation. Every line is on
the disk before the run goes on; a crash can tear only the last one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.commands.log import Log, read_lines
from shared.errors import UserError

if TYPE_CHECKING:
    from projects.zo2.engine import ZO2, Step

SCHEMA = 3  # of 2, a replay would round its updates otherwise


@dataclass
class Records:
    """What a log holds.

    `flushes` has the numbers of steps after which everything pending was applied, `evaluations` the
    held-out loss after a number of steps. `nbytes` is where the whole lines end; after it there may
    be a torn one.
    """

    header: dict[str, Any]
    steps: "list[Step]" = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    flushes: set[int] = field(default_factory=set)
    evaluations: dict[int, float] = field(default_factory=dict)
    nbytes: int = 0


def read_log(path: Path) -> Records | None:
    """Read a log. None when there is none, or none with a whole first line: the run died before it
    began.

    One torn last line is left out. Of a log of another schema only the header is read, and only as
    long as no step follows.

    Raises UserError for the steps of another schema, and with the number of the line when anything
    else is wrong.
    """
    records: Records | None = None
    for number, (line, end) in enumerate(read_lines(path, strict=True), 1):
        if records is not None and records.header["schema"] != SCHEMA:
            _check_stepless(records.header["schema"], line, path)
            continue
        try:
            if records is None:
                records = Records(_header(line))
            else:
                _take(records, line)
            records.nbytes = end
        except (KeyError, TypeError, ValueError) as error:
            what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}, line {number}: {what}; the log is damaged") from None
    return records


def _header(record: dict[str, Any]) -> dict[str, Any]:
    if type(record.get("schema")) is not int:
        raise ValueError("not the header of a step log")
    return record


def _check_stepless(schema: int, line: Mapping[str, Any], path: Path) -> None:
    """Refuse a line of another schema that is a step, or may be one."""
    if line.get("event") not in ("flush", "evaluation"):
        raise UserError(
            f"{path} is of another version (a step log of schema {schema}; this version reads"
            f" {SCHEMA}): name another --out, or use the version that wrote it"
        )


def _take(records: Records, line: Mapping[str, Any]) -> None:
    from projects.zo2.engine import Step

    done = len(records.steps)
    match line.get("event"):
        case "step":
            if line["step"] != done:
                raise ValueError(f"step {line['step']} where step {done} should be")
            if not records.steps:
                records.order = [str(name) for name in line["order"]]
            records.steps.append(
                Step(
                    line["step"],
                    loss=_number(line["loss"]),
                    projected_gradient=_number(line["projected_gradient"]),
                    lr=float(line["lr"]),
                    seed=int(line["seed"]),
                )
            )
        case "flush" | "evaluation" as event:
            if line["step"] != done:
                raise ValueError(f"{event} after {line['step']} steps where {done} were made")
            if event == "flush":
                records.flushes.add(done)
            else:
                records.evaluations[done] = _number(line["loss"])
        case other:
            raise ValueError(f"unknown event {other!r}")


def _number(value: float | None) -> float:
    """JSON has no numbers that are not finite; the log has null for them."""
    return math.nan if value is None else float(value)


class StepLog:
    """Appends to a log. Each line is on the disk before the call returns. A context manager.

    Args:
        path: continued, without its torn last line, when it holds a step; otherwise begun with
            `header`.
        header: the settings of the run; `SCHEMA` is added.

    `records` holds what has been written so far.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path
        known = read_log(path)
        if known is not None and known.steps != []:
            self.records = known
            self._log = Log(path, end=known.nbytes)
        else:
            self.records = Records({"schema": SCHEMA, **header})
            self._log = Log(path, end=0)
            self._log.write(self.records.header)

    def step(self, step: "Step", order: Sequence[str]) -> None:
        """Log one step of an engine whose `order` is given."""
        line = {
            "event": "step",
            "step": step.number,
            "seed": step.seed,
            "projected_gradient": step.projected_gradient,
            "lr": step.lr,
            "loss": step.loss,
        }
        if not self.records.steps:
            line["order"] = list(order)
        self._append(line)

    def flush(self) -> None:
        """Log that everything pending is applied now. Called before it is done, so that a crash in
        between replays it.
        """
        done = len(self.records.steps)
        if done not in self.records.flushes:
            self._append({"event": "flush", "step": done})

    def evaluation(self, loss: float) -> None:
        """Log the held-out loss at the current weights."""
        self._append({"event": "evaluation", "step": len(self.records.steps), "loss": loss})

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._log.write(line)
        _take(self.records, line)


def replay(engine: "ZO2", log: Records, progress: Any = None) -> None:
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
