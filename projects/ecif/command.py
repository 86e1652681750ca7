"""Which of your image-text pairs helped or harmed a contrastively trained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.commands.main import main as run_command
from shared.commands.options import Parser
from shared.commands.recipe import Metavar, Recipe, add_options


class Scoring(Recipe):
    """The settings that decide the scores: no piece of a result outlives a change."""

    batch: int = Field(32, ge=1)
    """pairs in a batch, as in training"""

    seed: int = Field(0, ge=0)
    """of the partition into batches, heads, projections"""

    partitions: Annotated[int, Metavar("K")] = Field(1, ge=1)
    """partitions into batches to average over; the file then has the scores' standard deviation
    over them as spread"""

    delta: float | None = Field(None, gt=0)
    """weight of the pull to theta_0 beside the sum of losses (a sixth of the pairs)"""

    size: int = Field(16, ge=1)
    """dimensions of the heads' embeddings"""

    fit: bool = False
    """train the adapters on to a minimum first (small models; with --dtype float64)"""

    score: Literal["influence", "relative", "span", "self"] = "influence"
    """influence; relative: over the length of the change; span: to trace one query back; self:
    self-influence"""

    mode: Literal["exact", "paper"] = "exact"
    """of the negative part: exact, or linear"""

    parts: Literal["both", "positive", "negative"] = "both"
    """of the pair's role"""

    solver: Literal["cg", "ggn", "dense", "logra"] = "cg"
    """Hessian by CG; Gauss-Newton; Hessian as a matrix; Hessian, projected"""

    damping: float = Field(0.0, ge=0)
    """added to the curvature"""

    rank: Annotated[int, Metavar("R")] = Field(16, ge=1)
    """directions a side of a layer with --solver logra"""

    basis: Literal["leading", "random"] = "leading"
    """these directions: of the layers' largest second moments, or random"""

    tol: float = Field(1e-3, gt=0)
    """relative residual of the solver at most (three digits, which ranks do not feel)"""

    dtype: Literal["float32", "float64"] = "float32"
    """of a CLIP model; heads are float64"""


class Work(Recipe):
    """The settings that decide what is refused and how the work is done. What they change in
    parameters that are trained here shows in these, which are in the key of the pieces themselves.
    """

    gradient_tol: float = Field(1e-6, gt=0)
    """norm of the gradient at most, or it is refused"""

    chunk: int | None = Field(None, ge=1)
    """batches handled at once (all)"""

    device: str = "cpu"
    """cpu or cuda"""

    threads: int | None = Field(None, ge=1)
    """of the computation (torch's default)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; see `shared.commands.main.main`."""
    return run_command("ecif", parser, arguments)


def parser() -> Parser:
    """Of the whole command line."""
    parser = Parser(prog="python -m projects.ecif", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    added = commands.add_parser(
        "score",
        help="rank training pairs for a validation set or one pair",
        description=(
            "Rank image-text pairs by what the loss of a clean validation set (or of one pair)"
            " would do\nwithout each: below 0 it would fall, the pair is harmful. Scores depend on"
            " which pairs share a\nbatch, which --seed and --batch decide. The same command goes on"
            " where it was stopped or killed."
        ),
        epilog=(
            "examples:\n  python -m projects.ecif score --model heads --data train.npz --query"
            " clean.npz --out scores.parquet\n  python -m projects.ecif score --model clip/"
            " --adapter lora/ --data train.csv --query one.csv --out scores.csv --solver"
            " logra\n\nan .npz holds text [n, t] and image [n, v] (embeddings), and may hold ids"
            " [n]; linear heads are\ntrained on them in place. a .csv has the columns image (a"
            " path), caption, and may have id; the\nadapters must have been trained on these pairs"
            " to a minimum."
        ),
    )
    added.set_defaults(function="projects.ecif.score:score")
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
    add_options(group, Scoring, "batch", "seed", "partitions", "delta", "size", "fit")
    add_options(group, Work, "gradient_tol")
    group = added.add_argument_group("scores")
    add_options(
        group, Scoring, "score", "mode", "parts", "solver", "damping", "rank", "basis", "tol"
    )
    group = added.add_argument_group("computation")
    add_options(group, Scoring, "dtype")
    add_options(group, Work, "chunk", "device", "threads")
    return parser
