"""Which of your meta-training tasks, or of their samples, help or harm your test tasks."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from projects.meta_if import labels
from shared.commands.main import main as run_command
from shared.commands.options import Parser, number
from shared.commands.recipe import Recipe, add_options

FILES = """a file of tasks (.npz of plain arrays):
  x_train, x_val [tasks, samples, ...]  y_train, y_val [tasks, samples]  and ids [tasks] if any
a model: mlp-64-32, conv4-64, or mine.py:body for the function body() of mine.py, which returns a
  module without norms"""


class Problem(Recipe):
    """What weights are a minimum of; `fit` leaves it in their file."""

    inner: Literal["anil", "imaml"]
    ways: int = Field(ge=1)
    penalty: float = Field(gt=0)
    l2: float = Field(gt=0)


class Training(Recipe):
    """The settings of `fit`."""

    ways: int | None = Field(None, ge=1)
    """classes of a task (as many as the labels have)"""

    inner: Literal["anil", "imaml"] = "anil"
    """anil: a head adapts; imaml: all does"""

    penalty: float = Field(0.05, gt=0)
    """of the task parameters"""

    l2: float = Field(0.03, gt=0)
    """of the meta-parameters"""

    steps: int = Field(50, ge=0)
    """of gradient descent, before a second-order method"""

    rate: float = Field(0.5, gt=0)
    """of gradient descent"""

    tol: float = Field(1e-7, gt=0)
    """norm of the total gradient to end at"""

    seed: int = Field(0, ge=0)
    """of the first weights"""


class Scoring(Recipe):
    """The settings of `score` that decide its numbers, besides the problem: no piece of a result
    outlives a change.
    """

    level: Literal["tasks", "train", "val"] = "tasks"
    """what to score: tasks, or samples"""

    method: str = labels.TASK_IF
    """exact task-IF, or an approximation: 'task-IF (Gamma)', direct-IF ..."""

    damping: float = Field(0.0, ge=0)
    """added to the total Hessian"""

    solve_tol: float = Field(1e-5, gt=0)
    """relative residual of the solve"""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.method not in labels.METHODS:
            raise ValueError(
                f"there is no method '{self.method}'; there are {', '.join(labels.METHODS)}"
            )
        if self.level != "tasks" and self.method != labels.TASK_IF:
            raise ValueError(
                f"samples are scored by task-IF's total Hessian alone, not by '{self.method}'"
            )
        return self


class Work(Recipe):
    """The settings of `score` that decide what is refused and how the work is cut, but no number;
    they may change when a run goes on.
    """

    tol: float = Field(1e-5, gt=0)
    """total gradient's norm above which it is no minimum"""

    iterations: int | None = Field(None, ge=1)
    """of the solve at most (10 per meta-parameter)"""

    rows: int = Field(64, ge=1)
    """tasks between two saves"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; see `shared.commands.main.main`."""
    return run_command("meta_if", parser, arguments)


def parser() -> Parser:
    """Of the whole command line."""
    parser = Parser(prog="python -m projects.meta_if", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    added = commands.add_parser(
        "fit",
        help="meta-train to a minimum and write the weights",
        description="Meta-train to a minimum and write the weights.",
        epilog=(
            "example:\n  python -m projects.meta_if fit --model mlp-32 --data tasks.npz --out"
            f" meta.safetensors\n\n{FILES}"
        ),
    )
    added.set_defaults(function="projects.meta_if.score:fit")
    add_input(added)
    added.add_argument("--out", required=True, type=Path, metavar="FILE", help=".safetensors")
    add_options(added, Training)

    added = commands.add_parser(
        "score",
        help="score meta-training tasks or their samples for query tasks",
        description=(
            "Score meta-training tasks or their samples for query tasks: what leaving each out"
            " would do to the\nquery loss. The same command goes on after a kill."
        ),
        epilog=(
            "example:\n  python -m projects.meta_if score --model mlp-32 --weights meta.safetensors"
            f" --data tasks.npz --query test.npz --out scores.parquet\n\n{FILES}"
        ),
    )
    added.set_defaults(function="projects.meta_if.score:score")
    add_input(added)
    add_score(added)
    return parser


def add_input(added: argparse.ArgumentParser) -> None:
    """The options that both commands have."""
    added.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="the body (anil) or the whole network (imaml)",
    )
    added.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="meta-training tasks, .npz"
    )
    added.add_argument(
        "--chunk",
        type=number(int, 1),
        metavar="N",
        help="tasks handled at once (all); for memory only",
    )


def add_score(added: argparse.ArgumentParser) -> None:
    """The other options of `score`."""
    added.add_argument(
        "--weights",
        required=True,
        type=Path,
        metavar="FILE",
        help=".safetensors of the model, at a minimum",
    )
    added.add_argument(
        "--query", required=True, type=Path, metavar="FILE", help="tasks to score for, .npz"
    )
    added.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help=".csv or .parquet: index, score, rank, task, sample, id",
    )
    group = added.add_argument_group("scores")
    add_options(group, Scoring)
    group.add_argument(
        "--only", type=number(int, 0), nargs="+", metavar="TASK", help="these tasks alone"
    )
    group = added.add_argument_group(
        "the training", "where the file of weights does not say it, as that of `fit` does"
    )
    group.add_argument("--inner", choices=("anil", "imaml"), help="what adapts to a task")
    group.add_argument("--ways", type=number(int, 1), metavar="N", help="classes of a task")
    above = number(float, 0, above=True)
    group.add_argument("--penalty", type=above, metavar="X", help="of the task parameters")
    group.add_argument("--l2", type=above, metavar="X", help="of the meta-parameters")
    add_options(added.add_argument_group("computation"), Work)
