"""`python -m projects.ecif`: which of your image-text pairs helped or harmed a contrastively
trained model.
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
        from projects.ecif import command  # torch and transformers, which --help need not wait for

        return command.score(options)
    except UserError as error:
        print(f"ecif: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ecif: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m projects.ecif", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    positive, natural, above, least = (
        number(int, 1),
        number(int, 0),
        number(float, 0, above=True),
        number(float, 0),
    )

    added = commands.add_parser(
        "score",
        help="rank training pairs for a validation set or one pair",
        description=(
            "Rank image-text pairs by what the loss of a clean validation set (or of one pair)"
            " would do without each: below 0 it would fall, the pair is harmful. Scores depend on"
            " which pairs share a batch, which --seed and --batch decide. The same command goes on"
            " where it was stopped or killed."
        ),
        epilog=(
            "examples:\n  python -m projects.ecif score --model heads --data train.npz --query"
            " clean.npz --out scores.parquet\n  python -m projects.ecif score --model clip/"
            " --adapter lora/ --data train.csv --query one.csv --out scores.csv --solver"
            " logra\n\nan .npz holds text [n, t] and image [n, v] (embeddings), and may hold ids"
            " [n]; linear heads are trained on them in place.\na .csv has the columns image (a"
            " path), caption, and may have id; the adapters must have been trained on these pairs"
            " to a minimum."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.add_argument(
        "--model",
        required=True,
        metavar="heads|DIR",
        help="heads: train heads on embeddings; or a CLIP model's folder",
    )
    added.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="LoRA adapters of the CLIP model, as PEFT saves them",
    )
    added.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="training pairs: .npz for heads, .csv for CLIP",
    )
    added.add_argument(
        "--query",
        required=True,
        type=Path,
        metavar="FILE",
        help="clean pairs, or a single one, of the same kind",
    )
    added.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help=".csv or .parquet: index, score, rank (1: most harmful)",
    )

    group = added.add_argument_group("the training problem")
    group.add_argument(
        "--batch",
        type=positive,
        default=32,
        metavar="N",
        help="pairs in a batch, as in training (32)",
    )
    group.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="of the partition into batches, heads, projections (0)",
    )
    group.add_argument(
        "--delta",
        type=above,
        metavar="X",
        help="weight of the pull to theta_0 beside the sum of losses (a sixth of the pairs)",
    )
    group.add_argument(
        "--size",
        type=positive,
        default=16,
        metavar="N",
        help="dimensions of the heads' embeddings (16)",
    )
    group.add_argument(
        "--fit",
        action="store_true",
        help="train the adapters on to a minimum first (small models; with --dtype float64)",
    )
    group.add_argument(
        "--gradient-tol",
        type=above,
        default=1e-6,
        metavar="X",
        help="norm of the gradient at most, or it is refused (1e-6)",
    )

    group = added.add_argument_group("scores")
    group.add_argument(
        "--score",
        choices=("influence", "relative", "span", "self"),
        default="influence",
        help=(
            "influence (default); relative: over the length of the change; span: to trace one query"
            " back; self: self-influence"
        ),
    )
    group.add_argument(
        "--mode",
        choices=("exact", "paper"),
        default="exact",
        help="of the negative part: exact (default), or linear",
    )
    group.add_argument(
        "--parts",
        choices=("both", "positive", "negative"),
        default="both",
        help="of the pair's role (both)",
    )
    group.add_argument(
        "--solver",
        choices=("cg", "ggn", "dense", "logra"),
        default="cg",
        help="Hessian by CG (default); Gauss-Newton; whole; projected",
    )
    group.add_argument(
        "--damping", type=least, default=0.0, metavar="X", help="added to the curvature (0)"
    )
    group.add_argument(
        "--rank",
        type=positive,
        default=16,
        metavar="R",
        help="directions a side of a layer with --solver logra (16)",
    )
    group.add_argument(
        "--tol",
        type=above,
        default=1e-6,
        metavar="X",
        help="relative residual of the solver at most (1e-6)",
    )

    group = added.add_argument_group("computation")
    group.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="of a CLIP model; heads are float64 (float32)",
    )
    group.add_argument("--chunk", type=positive, metavar="N", help="batches handled at once (all)")
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="of the computation (torch's default)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
