"""Adapt a backbone to few labelled images of another kind than it was trained on."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from shared.commands.main import main as run_command
from shared.commands.options import Parser
from shared.commands.recipe import Metavar, Recipe, add_options


class Pretraining(Recipe):
    """What decides a source."""

    network: Literal["small", "resnet10"] = "small"
    """small: two blocks, for some 28 pixels; resnet10: the paper's, for 84 to 160"""

    size: int = Field(28, ge=8)
    """pixels an edge that images are brought to"""

    rows: int = Field(5, ge=1)
    """learnable rows of a class"""

    epochs: int = Field(10, ge=1)
    """passes over the images"""

    batch: int = Field(64, ge=2)
    """images of a step"""

    rate: float = Field(0.05, gt=0)
    """first learning rate of SGD"""

    weight_decay: float = Field(5e-5, ge=0)
    """of SGD"""

    seed: int = Field(0, ge=0)
    """of weights and order"""

    device: str = "cpu"
    """cpu or cuda"""


class Adaptation(Recipe):
    """What decides how tasks are adapted and classified."""

    size: int | None = Field(None, ge=8)
    """pixels an edge (those of the pretraining; 224 for other backbones)"""

    codebook_rows: Annotated[int | None, Metavar("N")] = Field(None, ge=1)
    """rows of the source codebook (as many as the map has cells)"""

    steps: int = Field(20, ge=0)
    """of adaptation; 0: none"""

    rate: float = Field(1e-3, gt=0)
    """of Adam"""

    pseudo: int = Field(15, ge=1)
    """changed copies of support images, a class and step"""

    layers: Literal["all", "main", "early", "late"] = "all"
    """BatchNorm layers that are trained"""

    target_weight: float = Field(1.0, ge=0)
    """of the cross-entropy of pseudo queries"""

    proxy_weight: float = Field(1.0, ge=0)
    """of the cross-entropy of their proxies"""

    agreement_weight: float = Field(1.0, ge=0)
    """of the KL divergence of the two"""

    lam: float = Field(1.0, gt=0)
    """multiplier of the proxies' ridge penalty"""

    scale: float | None = Field(None, gt=0)
    """of the logits in the losses (learned in pretraining; 8 for other backbones)"""

    seed: int = Field(0, ge=0)
    """of tasks and pseudo queries"""

    device: str = "cpu"
    """cpu or cuda"""


class Prediction(Adaptation):
    """The same for one task of the user's."""

    inference: Literal["inductive", "transductive"] = "inductive"
    """transductive: queries are normalised, and with --propagate classified, together"""

    propagate: bool = False
    """label propagation among the queries"""

    @model_validator(mode="after")
    def _together(self) -> "Prediction":
        if self.propagate and self.inference != "transductive":
            raise ValueError("--propagate needs --inference transductive: queries see one another")
        return self


class Evaluation(Adaptation):
    """The same for many tasks drawn from a folder of labelled images."""

    ways: int = Field(5, ge=2)
    """classes of a task"""

    shots: int = Field(5, ge=1)
    """support images of a class"""

    queries: int = Field(15, ge=1)
    """query images of a class"""

    tasks: int = Field(200, ge=2)
    """how many"""

    group: int = Field(4, ge=1)
    """tasks adapted at once"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; see `shared.commands.main.main`."""
    return run_command("idp", parser, arguments)


def parser() -> Parser:
    """Of the whole command line."""
    parser = Parser(prog="python -m projects.idp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _pretrain(commands)
    _adapt(commands)
    _evaluate(commands)
    return parser


def _pretrain(commands: "argparse._SubParsersAction[Parser]") -> None:
    added = commands.add_parser(
        "pretrain",
        help="train a source network on your images",
        description=(
            "Train a network with dense prototypes on a folder with a folder of images for each"
            " class.\nThe same command goes on where it was stopped or killed."
        ),
        epilog="example: python -m projects.idp pretrain --images photos/ --out source/",
    )
    added.set_defaults(function="projects.idp.pretrain:pretrain")
    added.add_argument(
        "--images", required=True, type=Path, metavar="DIR", help="a folder for each class"
    )
    added.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="for source.safetensors and the log"
    )
    add_options(added.add_argument_group("training"), Pretraining)


def _source(added: Parser) -> None:
    added.add_argument(
        "--source",
        required=True,
        metavar="DIR|NAME|FILE.py:FUNCTION",
        help=(
            "what pretrain made; efficientnet-lite0; timm:NAME with --weights; or your own module"
            " with spatial_map(images)"
        ),
    )
    added.add_argument(
        "--weights", type=Path, metavar="FILE", help=".safetensors of a timm:NAME backbone"
    )
    added.add_argument(
        "--source-images",
        type=Path,
        metavar="DIR",
        help="a folder for each class, of the source's kind: the codebook of a backbone by name",
    )
    added.add_argument(
        "--codebook",
        type=Path,
        metavar="FILE",
        help=".npz with codebook [n, channels of the map], in place of one made here",
    )


def _adapt(commands: "argparse._SubParsersAction[Parser]") -> None:
    added = commands.add_parser(
        "adapt",
        help="adapt to a few labelled images and classify others",
        description=(
            "Adapt a source to the images of --support, as many for each class, and classify those"
            " of --query."
        ),
        epilog=(
            "example: python -m projects.idp adapt --source source/ --support few/ --query new/"
            " --out predictions.csv\n\n--query is a folder of images; or has a folder for each"
            " class of the support, and then the\naccuracy is said. predictions.csv: file, class,"
            " and the score of each class."
        ),
    )
    added.set_defaults(function="projects.idp.adapt:adapt")
    _source(added)
    added.add_argument(
        "--support", required=True, type=Path, metavar="DIR", help="a folder for each class"
    )
    added.add_argument(
        "--query", required=True, type=Path, metavar="DIR", help="images to classify"
    )
    added.add_argument("--out", required=True, type=Path, metavar="FILE", help=".csv to write")
    add_options(added.add_argument_group("adaptation"), Adaptation)
    add_options(added.add_argument_group("inference"), Prediction, "inference", "propagate")


def _evaluate(commands: "argparse._SubParsersAction[Parser]") -> None:
    added = commands.add_parser(
        "evaluate",
        help="measure accuracy on tasks drawn from your labelled images",
        description=(
            "Draw tasks from --target, a folder with a folder of images for each class, and compare"
            " IDP with\nthe same fine-tuning without proxies, with the ridge head and with nearest"
            " class means, on the\nsame tasks. The same command goes on where it was stopped or"
            " killed."
        ),
        epilog=(
            "example: python -m projects.idp evaluate --source source/ --target photos/ --ways 5"
            " --shots 5 --out accuracy.csv"
        ),
    )
    added.set_defaults(function="projects.idp.evaluate:evaluate")
    _source(added)
    added.add_argument(
        "--target", required=True, type=Path, metavar="DIR", help="a folder for each class"
    )
    added.add_argument("--out", required=True, type=Path, metavar="FILE", help=".csv to write")
    add_options(
        added.add_argument_group("tasks"), Evaluation, "ways", "shots", "queries", "tasks", "group"
    )
    add_options(added.add_argument_group("adaptation"), Adaptation)
