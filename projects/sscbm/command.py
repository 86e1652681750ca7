"""A concept bottleneck model from your images, of which some have concepts annotated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from shared.commands.main import main as run_command
from shared.commands.options import Parser, number
from shared.commands.recipe import Metavar, Recipe, add_options


class Training(Recipe):
    """The settings that decide what a model becomes."""

    method: Literal["sscbm", "cem-ssl", "cbm-ssl", "cem"] = "sscbm"
    """sscbm; cem-ssl, cbm-ssl: pseudo labels directly on the concepts; cem: none"""

    epochs: int = Field(30, ge=1)
    """epochs on the training images"""

    batch: int = Field(64, ge=2)
    """images in a batch"""

    rate: float = Field(3e-3, gt=0)
    """learning rate of Adam at the start; it falls to 0 along a line"""

    seed: int = Field(0, ge=0)
    """of the split, the weights and the order of images"""

    validation: float = Field(0.2, gt=0, lt=1)
    """share of each class that is held out to measure the model"""

    edge: int = Field(64, ge=16)
    """pixels of an edge that images are brought to"""

    mode: Literal["RGB", "L"] = "RGB"
    """colours, or grey"""

    backbone: str = "quarter-16-32-32-64-64"
    """network with a spatial map: quarter-W1-W2-..., residual-W1-..., resnet34, timm:NAME"""

    size: int = Field(16, ge=1)
    """numbers in a concept's embedding (m)"""

    encoder_output: Literal["pooled", "logits"] = "pooled"
    """the image's vector: mean of the map, or 1000 numbers of a last layer"""

    heatmap_sim: Literal["dot", "cosine"] = "dot"
    """heat maps by products, or by cosines"""

    task_labels: Literal["all", "labeled"] = "all"
    """whose class is used: of all images, or of those with annotated concepts"""

    features: Literal["efficientnet-lite0", "pixels"] = "efficientnet-lite0"
    """frozen features that neighbours are searched in"""

    neighbours: Annotated[int | None, Metavar("K")] = Field(None, ge=1)
    """nearest annotated images that make a pseudo label (as many as a class has annotated, at most
    3)"""

    lambda_1: float = Field(1.0, ge=0)
    """weight of the annotated concepts"""

    lambda_2: float = Field(0.1, ge=0)
    """weight of the alignment"""

    randint: float = Field(0.25, ge=0, le=1)
    """probability that training gives an annotated concept its true value"""

    imbalance: bool = False
    """weigh concepts by absent over present"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; see `shared.commands.main.main`."""
    return run_command("sscbm", parser, arguments)


def parser() -> Parser:
    """Of the whole command line."""
    parser = Parser(prog="python -m projects.sscbm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _train(commands)
    _predict(commands)
    _explain(commands)
    _intervene(commands)
    return parser


def _train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train on your images",
        description=(
            "Train on a folder of images and a CSV of annotations. The same command goes on where"
            " it was stopped or\nkilled."
        ),
        epilog=(
            "the CSV has the columns file (a path below --images) and class, and a column a concept"
            " with 1, 0, or\nnothing where it is not annotated. a column GROUP:CONCEPT belongs to a"
            " group, which an expert tells at\nonce.\n\nexample:\n  python -m projects.sscbm train"
            " --images birds/ --annotations concepts.csv --out model/"
        ),
    )
    train.set_defaults(function="projects.sscbm.fitting:train_command")
    train.add_argument("--images", required=True, type=Path, metavar="DIR", help="your images")
    train.add_argument(
        "--annotations", required=True, type=Path, metavar="FILE", help="CSV of them"
    )
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="for the model")
    train.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="safetensors to start the backbone from, under the names it has in timm",
    )
    add_options(
        train.add_argument_group("the model"), Training,
        "method", "backbone", "edge", "mode", "size", "encoder_output", "heatmap_sim",
    )  # fmt: skip
    add_options(
        train.add_argument_group("training"), Training,
        "epochs", "batch", "rate", "seed", "validation",
    )  # fmt: skip
    add_options(
        train.add_argument_group("the losses"), Training,
        "task_labels", "features", "neighbours", "lambda_1", "lambda_2", "randint", "imbalance",
    )  # fmt: skip
    train.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")


def _predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="concepts and class of images, as a CSV")
    predict.set_defaults(function="projects.sscbm.apply:predict_command")
    _model_and_images(predict)
    predict.add_argument("--out", required=True, type=Path, metavar="FILE", help="a .csv")


def _explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain", help="what each concept looked at: overlays and an HTML sheet"
    )
    explain.set_defaults(function="projects.sscbm.apply:explain_command")
    _model_and_images(explain)
    explain.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="for overlays and index.html"
    )
    explain.add_argument(
        "--concept",
        action="append",
        default=[],
        metavar="NAME",
        help="show this concept; may be repeated (the most probable ones of each image)",
    )
    explain.add_argument(
        "--top",
        type=number(int, least=1),
        default=4,
        metavar="N",
        help="so many of the most probable ones (4)",
    )


def _intervene(commands: Any) -> None:
    intervene = commands.add_parser(
        "intervene", help="what the class becomes when concepts are set"
    )
    intervene.set_defaults(function="projects.sscbm.apply:intervene_command")
    intervene.add_argument("--model", required=True, type=Path, metavar="DIR", help="of `train`")
    intervene.add_argument("--image", required=True, type=Path, metavar="FILE", help="an image")
    intervene.add_argument(
        "--set",
        action="append",
        required=True,
        metavar="CONCEPT=0|1",
        help="the expert's word; may be repeated",
    )


def _model_and_images(command: Parser) -> None:
    command.add_argument("--model", required=True, type=Path, metavar="DIR", help="of `train`")
    command.add_argument("--images", required=True, type=Path, metavar="DIR", help="images")
    command.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
