"""`python -m projects.meta_if`: which of your meta-training tasks, or of their samples, help or
harm your test tasks.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.commands.options import Parser, number
from shared.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 (UserError), 128 + the number of a signal
    that stopped it (Ctrl-C: 130).
    """
    try:
        options = _parser().parse_args(arguments)
        from projects.meta_if import score  # torch, which --help need not wait for
        from shared.commands.signals import Stopped

        try:
            return getattr(score, options.command)(options)
        except Stopped as stopped:
            print(f"meta_if: {stopped}", file=sys.stderr)
            return 128 + stopped.signal
    except UserError as error:
        print(f"meta_if: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("meta_if: stopped", file=sys.stderr)
        return 130


FILES = (
    "a file of tasks (.npz of plain arrays):\n  x_train, x_val [tasks, samples, ...]  y_train,"
    " y_val [tasks, samples]  and ids [tasks] if any\na model: mlp-64-32, conv4-64, or mine:body"
    " for the function body() of mine.py, which returns a module without norms"
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m projects.meta_if", description=__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, dest="command"
    )
    positive, natural, above = number(int, 1), number(int, 0), number(float, 0, above=True)

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}\n\n{FILES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument(
            "--model",
            required=True,
            metavar="NAME",
            help="the body (anil) or the whole network (imaml)",
        )
        added.add_argument(
            "--data", required=True, type=Path, metavar="FILE", help="meta-training tasks, .npz"
        )
        added.add_argument("--ways", type=positive, metavar="N", help="classes of a task")
        added.add_argument(
            "--chunk",
            type=positive,
            metavar="N",
            help="tasks handled at once (all); for memory only",
        )
        return added

    added = add(
        "fit",
        "meta-train to a minimum and write the weights",
        "python -m projects.meta_if fit --model mlp-32 --data tasks.npz --out meta.safetensors",
    )
    added.add_argument("--out", required=True, type=Path, metavar="FILE", help=".safetensors")
    added.add_argument(
        "--inner",
        choices=("anil", "imaml"),
        default="anil",
        help="anil (default): a head adapts; imaml: all does",
    )
    added.add_argument(
        "--penalty", type=above, default=0.05, metavar="X", help="of the task parameters (0.05)"
    )
    added.add_argument(
        "--l2", type=above, default=0.03, metavar="X", help="of the meta-parameters (0.03)"
    )
    added.add_argument(
        "--steps",
        type=natural,
        default=50,
        metavar="N",
        help="of gradient descent, before a second-order method (50)",
    )
    added.add_argument(
        "--rate", type=above, default=0.5, metavar="X", help="of gradient descent (0.5)"
    )
    added.add_argument(
        "--tol",
        type=above,
        default=1e-7,
        metavar="X",
        help="norm of the total gradient to end at (1e-7)",
    )
    added.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of the first weights (0)"
    )

    added = add(
        "score",
        "score meta-training tasks or their samples for query tasks: what leaving each out would do"
        " to the query loss",
        "python -m projects.meta_if score --model mlp-32 --weights meta.safetensors --data"
        " tasks.npz --query test.npz --out scores.parquet",
    )
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
    added.add_argument(
        "--level",
        choices=("tasks", "train", "val"),
        default="tasks",
        help="what to score: tasks (default), or samples",
    )
    added.add_argument(
        "--method",
        default="task-IF",
        metavar="NAME",
        help="task-IF (default), 'task-IF (Gamma)', direct-IF, ...",
    )
    added.add_argument("--only", type=natural, nargs="+", metavar="TASK", help="these tasks alone")
    added.add_argument(
        "--inner",
        choices=("anil", "imaml"),
        help="as the weights were trained (fit leaves it in their file)",
    )
    added.add_argument("--penalty", type=above, metavar="X", help="likewise")
    added.add_argument("--l2", type=above, metavar="X", help="likewise")
    added.add_argument(
        "--tol",
        type=above,
        default=1e-5,
        metavar="X",
        help="total gradient's norm above which it is no minimum (1e-5)",
    )
    added.add_argument(
        "--damping",
        type=number(float, 0),
        default=0.0,
        metavar="X",
        help="added to the total Hessian (0)",
    )
    added.add_argument(
        "--solve-tol",
        type=above,
        default=1e-5,
        metavar="X",
        help="relative residual of the solve (1e-5)",
    )
    added.add_argument(
        "--iterations",
        type=positive,
        metavar="N",
        help="of the solve at most (10 per meta-parameter)",
    )
    added.add_argument("--rows", type=positive, metavar="N", help="tasks between two saves (64)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
