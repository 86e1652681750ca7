"""Fine-tune the user's own language model with several processes; or plan that."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from projects.zo2.command import Recipe, add_run, add_training
from shared.commands.main import main as run_command
from shared.commands.options import Parser, number
from shared.commands.recipe import Metavar, add_options
from shared.commands.recipe import Recipe as Base


class Sharing(Base):
    """How the work is shared out among ranks. The weights depend on none of it (on ZO2's `Recipe`
    alone), so that it may change when a run goes on.
    """

    pert: Literal[1, 2] = 1
    """2: the two perturbed forwards on two ranks"""

    transfer: Literal["replicated", "sliced"] = "replicated"
    """sliced: each rank moves an N-th of a block"""

    check_every: int = Field(100, ge=0)
    """steps between comparisons of all weights"""

    timeout: Annotated[float, Metavar("S")] = Field(300.0, ge=1)
    """seconds a rank waits for the others"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on this rank and return the exit status; see
    `shared.commands.main.main`.
    """
    return run_command("distzo2", parser, arguments, agreed=True)


def parser() -> Parser:
    """Of the whole command line."""
    parser = Parser(prog="torchrun ... -m projects.distzo2", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    added = commands.add_parser(
        "finetune",
        help="fine-tune a causal language model on your text",
        description=(
            "Fine-tune a causal language model on your text with forward passes only, shared out"
            " among processes. The result is that of `python -m projects.zo2 finetune` with the"
            " same options, to the last bit. The same command goes on where it was stopped or"
            " killed."
        ),
        epilog=(
            "example:\n  torchrun --standalone --nproc-per-node 2 -m projects.distzo2 finetune"
            " --model smollm2-135m --data reviews.jsonl \\\n    --accumulate 2 --steps 1000 --out"
            " tuned\n\na step's global batch is --accumulate micro-batches, which the ranks"
            " share out"
        ),
    )
    added.set_defaults(
        function="projects.distzo2.finetune:finetune",
        storage_dtype=None,  # what ZO2's command has besides
        eval_data=None,
    )
    add_run(added, "where the model and the log go; a folder that all ranks see")
    group = added.add_argument_group("processes")
    add_options(group, Sharing)
    add_options(group, Recipe, "dtype", "device")
    add_training(added)
    add_options(added.add_argument_group("faults"), Recipe, "checkpoint_every")

    added = commands.add_parser(
        "plan",
        help="predict the speed of every mode on so many GPUs",
        description=(
            "Predict tokens a second, bytes and speed-up over ZO2 on one GPU for every mode, from"
            " the datasheet's rates. Nothing is run."
        ),
        epilog="example: python -m projects.distzo2 plan --model opt-175b --gpus 4 --gpu h100-sxm",
    )
    added.set_defaults(function="projects.distzo2.plan:plan")
    added.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_SIZE",
        help="a model folder, or a size of OPT: opt-1.3b ... opt-175b",
    )
    added.add_argument(
        "--gpus", type=number(int, 1), required=True, metavar="N", help="how many, a rank each"
    )
    added.add_argument(
        "--gpu", default="a100-sxm", metavar="NAME", help="of hardware.csv (a100-sxm)"
    )
    added.add_argument(
        "--tokens", type=number(int, 1), default=2048, metavar="N", help="of a sequence (2048)"
    )
    added.add_argument(
        "--batch",
        type=number(int, 1),
        metavar="N",
        help="sequences a step in all (as many as GPUs)",
    )
    added.add_argument(
        "--host-link",
        type=number(float, 0, above=True),
        metavar="GB/S",
        help="of a link to the host, each way (the GPU's)",
    )
    added.add_argument(
        "--links",
        type=number(int, 1),
        metavar="N",
        help="links to the host that the GPUs share (one each)",
    )
    added.add_argument(
        "--exchange",
        type=number(float, 0, above=True),
        metavar="GB/S",
        help="into a GPU from others (the GPU's)",
    )
    return parser
