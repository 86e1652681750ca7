"""Rank your own training samples by what they did to a model that was trained with SAM."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from shared.commands.main import main as run_command
from shared.commands.options import Parser
from shared.commands.recipe import Recipe, add_options


class Scoring(Recipe):
    """The settings of `score` that decide its numbers: no piece of a result outlives a change."""

    rho: float = Field(0.05, ge=0)
    """SAM's radius in training"""

    l2: float = Field(0.0, ge=0)
    """weight decay in training: l2/2 |w|^2"""

    batch_size: int | None = Field(None, ge=1)
    """samples that shared a perturbation (all)"""

    batch_seed: int = Field(0, ge=0)
    """which fixed batches"""

    estimator: Literal["sam_hif", "sam_if", "if", "gif_checkpoints"] = "sam_hif"
    """sam_hif: the derivative; sam_if, if: with less of it; gif_checkpoints: along a run"""

    curvature: Literal["hessian", "ggn"] = "hessian"
    """ggn: Gauss-Newton, for networks"""

    damping: float = Field(0.0, ge=0)
    """added to the matrix that is inverted"""

    solver: Literal["auto", "cg", "gcr", "gmres", "lsmr", "dense"] = "auto"
    """what solves with it"""

    tolerance: float = Field(1e-6, gt=0)
    """relative residual of the solve"""

    drop_eq9_term: bool = False
    """the paper's cheaper and less exact right-hand side"""

    dtype: Literal["float64", "float32"] = "float64"
    """to compute in"""


class Work(Recipe):
    """The settings of `score` that decide what is refused and how the work is cut, but no number;
    they may change when a run goes on. (Another device, whose last bits differ, begins anew: the
    key of a run holds the model's outputs.)
    """

    gradient_tolerance: float = Field(1e-3, gt=0)
    """how far from the optimum the model may be"""

    chunk: int = Field(1000, ge=1)
    """samples scored between two saves"""

    data_chunk: int | None = Field(None, ge=1)
    """samples at once in a pass over the data (all)"""

    device: str = "cpu"
    """cpu or cuda"""


class Training(Recipe):
    """The settings of `train`."""

    architecture: str = "softmax"
    """softmax, or mlp-32 (tanh layers of these widths)"""

    rho: float = Field(0.05, ge=0)
    """SAM's radius"""

    l2: float = Field(0.01, ge=0)
    """weight decay: l2/2 |w|^2"""

    gradient_tolerance: float = Field(1e-8, gt=0)
    """how far from the optimum it may end"""

    seed: int = Field(0, ge=0)
    """of the start"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; see `shared.commands.main.main`."""
    return run_command("sam_if", parser, arguments)


def parser() -> Parser:
    """Of the whole command line."""
    parser = Parser(prog="python -m projects.sam_if", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_score(
        commands.add_parser(
            "score",
            help="rank training samples for a query or a validation set",
            description=(
                "Predict for every training sample how the mean loss on the queries changes when"
                " it is\nremoved. Positive: helpful. Negative: harmful.\nThe model must have been"
                " trained to an optimum with the --rho and --l2 given. The same command goes\non"
                " after a kill."
            ),
            epilog=(
                "example:\n  python -m projects.sam_if score --model model.safetensors"
                " --architecture softmax --data train.npz --query test.npz --rho 0.05 --l2 0.01"
                " --out scores.parquet"
            ),
        )
    )

    added = commands.add_parser(
        "train",
        help="train a small model to SAM's fixed point, to try `score` on",
        description=(
            "Softmax regression or a small tanh network, full batches, up to a few thousand"
            " parameters."
        ),
        epilog=(
            "example:\n  python -m projects.sam_if train --data train.npz --rho 0.05 --l2 0.01"
            " --out model.safetensors"
        ),
    )
    added.set_defaults(function="projects.sam_if.score:train")
    added.add_argument("--data", required=True, type=Path, metavar="PATH", help="as of score")
    added.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="for the weights, .safetensors"
    )
    add_options(added, Training)
    return parser


def add_score(added: argparse.ArgumentParser) -> None:
    """The options of `score`."""
    added.set_defaults(function="projects.sam_if.score:score")
    added.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="module:function or file.py:function that returns the trained model, or weights"
        " (.safetensors)",
    )
    added.add_argument(
        "--architecture",
        metavar="NAME",
        help="what the weights are of: softmax, or mlp-32 (tanh layers of these widths)",
    )
    added.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="PATH",
        help=".npz with x, y (and id), or a folder with a folder of images per class",
    )
    added.add_argument(
        "--query",
        required=True,
        type=Path,
        metavar="PATH",
        help="the same, of the queries: one or a validation set",
    )
    added.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help=".csv or .parquet, with index, score, rank, id, label",
    )
    group = added.add_argument_group("the training")
    add_options(group, Scoring, "rho", "l2", "batch_size", "batch_seed")
    add_options(group, Work, "gradient_tolerance")
    group = added.add_argument_group("scores")
    add_options(group, Scoring, "estimator", "curvature", "damping", "solver", "tolerance")
    add_options(group, Scoring, "drop_eq9_term")
    group.add_argument(
        "--checkpoints",
        nargs="+",
        default=[],
        metavar="FILE:RATE",
        help="for gif_checkpoints; the last one is the trained model",
    )
    group = added.add_argument_group("computation")
    add_options(group, Work, "chunk", "data_chunk", "device")
    add_options(group, Scoring, "dtype")
