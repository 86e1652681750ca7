"""`python -m projects.sam_if`: rank the reader's own training samples by what they did to a model
that was trained with SAM.
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
        from projects.sam_if import score  # torch, which --help need not wait for
        from shared.commands.signals import Stopped

        try:
            return score.score(options) if options.command == "score" else score.train(options)
        except Stopped as stopped:
            print(f"sam_if: {stopped}", file=sys.stderr)
            return 128 + stopped.signal
    except UserError as error:
        print(f"sam_if: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sam_if: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m projects.sam_if", description=__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, dest="command"
    )
    least, above = number(float, 0), number(float, 0, above=True)

    added = commands.add_parser(
        "score",
        help="rank training samples for a query or a validation set",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Predict for every training sample how the mean loss on the queries changes when it is"
            " removed. Positive: helpful. Negative: harmful.\nThe model must have been trained to"
            " an optimum with the --rho and --l2 given. The same command goes on after a kill."
        ),
        epilog=(
            "example:\n  python -m projects.sam_if score --model model.safetensors --architecture"
            " softmax --data train.npz --query test.npz --rho 0.05 --l2 0.01 --out scores.parquet"
        ),
    )
    added.add_argument(
        "--model",
        required=True,
        help="module:function that returns the trained model, or weights (.safetensors)",
    )
    added.add_argument(
        "--architecture",
        help="what the weights are of: softmax, or mlp-32 (tanh layers of these widths)",
    )
    added.add_argument(
        "--data",
        type=Path,
        required=True,
        help=".npz with x, y (and id), or a folder with a folder of images per class",
    )
    added.add_argument(
        "--query",
        type=Path,
        required=True,
        help="the same, of the queries: one or a validation set",
    )
    added.add_argument(
        "--out",
        type=Path,
        required=True,
        help=".csv or .parquet, with index, score, rank, id, label",
    )
    added.add_argument(
        "--rho", type=least, default=0.05, help="SAM's radius in training (default 0.05)"
    )
    added.add_argument(
        "--l2", type=least, default=0.0, help="weight decay in training: l2/2 |w|^2 (default 0)"
    )
    added.add_argument(
        "--batch-size", type=number(int, 1), help="samples that shared a perturbation; default: all"
    )
    added.add_argument(
        "--batch-seed", type=number(int, 0), default=0, help="which fixed batches (default 0)"
    )
    added.add_argument(
        "--estimator",
        choices=("sam_hif", "sam_if", "if", "gif_checkpoints"),
        default="sam_hif",
        help="default sam_hif",
    )
    added.add_argument(
        "--curvature",
        choices=("hessian", "ggn"),
        default="hessian",
        help="ggn: Gauss-Newton, for networks",
    )
    added.add_argument(
        "--damping",
        type=least,
        default=0.0,
        help="added to the matrix that is inverted (default 0)",
    )
    added.add_argument(
        "--solver",
        choices=("auto", "cg", "gmres", "lsmr", "dense"),
        default="auto",
        help="default auto",
    )
    added.add_argument(
        "--tolerance",
        type=above,
        default=1e-6,
        help="relative residual of the solve (default 1e-6)",
    )
    added.add_argument(
        "--gradient-tolerance",
        type=above,
        default=1e-3,
        help="how far from the optimum the model may be (default 1e-3)",
    )
    added.add_argument(
        "--drop-eq9-term",
        action="store_true",
        help="the paper's cheaper and less exact right-hand side",
    )
    added.add_argument(
        "--checkpoints",
        nargs="+",
        metavar="FILE:RATE",
        help="for gif_checkpoints; the last one is the trained model",
    )
    added.add_argument(
        "--chunk",
        type=number(int, 1),
        default=1000,
        help="samples scored between two saves (default 1000)",
    )
    added.add_argument(
        "--data-chunk",
        type=number(int, 1),
        help="samples at once in a pass over the data; default: all",
    )
    added.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64", help="default float64"
    )
    added.add_argument("--device", default="cpu", help="cpu or cuda")

    added = commands.add_parser(
        "train",
        help="train a small model to SAM's fixed point, to try `score` on",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Softmax regression or a small tanh network, full batches, up to a few thousand"
            " parameters."
        ),
        epilog=(
            "example:\n  python -m projects.sam_if train --data train.npz --rho 0.05 --l2 0.01"
            " --out model.safetensors"
        ),
    )
    added.add_argument("--data", type=Path, required=True, help="as of score")
    added.add_argument("--architecture", default="softmax", help="softmax (default), or mlp-32")
    added.add_argument("--rho", type=least, default=0.05, help="default 0.05")
    added.add_argument("--l2", type=least, default=0.01, help="default 0.01")
    added.add_argument("--gradient-tolerance", type=above, default=1e-8, help="default 1e-8")
    added.add_argument("--seed", type=number(int, 0), default=0, help="of the start")
    added.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
